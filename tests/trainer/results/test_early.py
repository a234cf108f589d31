import json
import re
from pathlib import Path

import pytest

from tests.conftest import QUICK, ended, start_trainer

# A backbone whose way depends on what it sees, which no exporter can follow.
ODD = """
import torch
from trainer.network import build, weights

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        if images.sum() > 0:
            images = images + 1
        return images.mean((2, 3)) * self.scale

build.BUILDERS["small_cnn"] = lambda name, weights, size: (Odd(), 3)
"""
NEVER = """
from trainer.results import early
def never(*arguments):
    raise AssertionError("tried again")
early._try = never
"""
ONCE = """
import torch
real, exported = torch.onnx.export, []
def export(*arguments, **options):
    exported.append(arguments)
    assert len(exported) == 1, "exported again"
    return real(*arguments, **options)
torch.onnx.export = export
"""
FREE = """
import shutil
from trainer.results import early
early.shutil = type("Disk", (), {{"disk_usage": lambda path: shutil._ntuple_diskusage(0, 0, {})}})
"""


def run(cwd: Path, pictures: Path, *words: str, before: str = "") -> tuple[int, str]:
    (cwd / "cache/exports").mkdir(parents=True, exist_ok=True)  # not what the tests share
    own = ("platform.cache=cache", "model=small_cnn")
    return ended(start_trainer(cwd, *QUICK, f"data.root={pictures}", *own, *words, before=before))


def rows(cwd: Path, name: str) -> list[dict]:
    kept = []
    for line in (cwd / "runs" / name / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line).items()
        kept.append({key: value for key, value in row if not re.search("seconds|wait", key)})
    return kept


def test_a_network_that_cant_be_exported_is_refused_before_the_first_step(tmp_path, pictures):
    code, output = run(tmp_path, pictures, "name=odd", before=ODD)
    last = output.splitlines()[-1]
    assert code == 2 and "PyTorch can't export this network as ONNX" in last, output
    assert "Traceback" not in output
    assert not list((tmp_path / "cache").glob("*/*"))  # no picture was packed
    assert not (tmp_path / "runs/odd").exists()  # nothing was trained


def test_a_package_that_serving_cant_load_is_refused_before_the_first_step(tmp_path, pictures):
    broken = tmp_path / "broken/onnxruntime"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libgomp.so.1 is missing')\n")
    before = f"import os; os.environ['PYTHONPATH'] = {str(broken.parent)!r}"
    code, output = run(tmp_path, pictures, "name=odd", before=before)
    assert code == 2 and "libgomp.so.1 is missing" in output.splitlines()[-1], output
    assert not (tmp_path / "runs/odd/metrics.jsonl").exists()


def test_a_network_is_tried_once_on_a_machine_and_that_changes_no_bit(tmp_path, pictures):
    code, output = run(tmp_path, pictures, "name=first", before=ONCE)
    assert code == 0, output
    (known,) = (tmp_path / "cache/exports").glob("*.json")
    assert "onnxruntime" in json.loads(known.read_text())["versions"]
    assert known.with_suffix(".graph").exists()
    code, output = run(tmp_path, pictures, "name=second", before=NEVER)
    assert code == 0 and rows(tmp_path, "first") == rows(tmp_path, "second"), output
    code, output = run(tmp_path, pictures, "name=third", "data.size=12", before=NEVER)
    assert code == 1 and "tried again" in output, output


@pytest.mark.parametrize(
    ("free", "code", "says"), [(1_000_000, 2, "error: "), (8_000_000, 0, "warning: ")]
)
def test_a_disk_that_is_too_small_is_told_at_the_start(tmp_path, pictures, free, code, says):
    before = FREE.format(free) + "early._try = lambda *arguments: None\n"
    given, output = run(tmp_path, pictures, "name=small", before=before)
    (line,) = (line for line in output.splitlines() if "free some" in line)
    assert given == code and line.startswith(f"{says}runs/small/checkpoints: check"), output
    assert re.search(r"will take \d.* MB to \d.* MB, and \d MB are free", line)
    assert (tmp_path / "runs/small/metrics.jsonl").exists() == (code == 0)
