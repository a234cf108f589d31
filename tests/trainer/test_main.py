import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, features

import trainer.__main__ as main
from tests.conftest import PROJECT, make_pictures, run_trainer
from trainer.common.command import one_line
from trainer.common.errors import MISTAKE, OK
from trainer.settings import config as settings
from trainer.settings.compose import explain_settings

RUN = (
    "name=run",
    "data=folder",
    "model=small_cnn",
    "data.root=pictures",
    "data.size=16",
    "data.resize=16",
    "train.epochs=2",
    "train.batch_size=8",
)


def test_a_complete_run_says_so_and_trains_no_more(tmp_path):
    make_pictures(tmp_path / "pictures", {"train": 8, "valid": 3, "test": 3})
    run = (*RUN, "train.tensorboard=true")
    code, first = run_trainer(tmp_path, *run)
    assert code == OK, first
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "runs/run").rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".lock", "config.yaml")
    }
    code, second = run_trainer(tmp_path, *run)
    assert code == OK and "this run is complete" in second and "metrics:" not in second
    assert first.splitlines()[-10:] == second.splitlines()[-10:]  # the summary
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    files = {path.name for path in (tmp_path / "runs/run").iterdir()}
    assert files >= {
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "checkpoints",
        "model.tar.gz",
        "report.html",
        "result.json",
        "tensorboard",
    }
    with (tmp_path / "runs/run/predictions.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["path"].split("/")[-2] for row in rows] == [row["true_label"] for row in rows]
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    hits = sum(row["correct"] == "true" for row in rows)
    assert hits == sum(row["label"] == row["true_label"] for row in rows)
    assert hits / len(rows) == pytest.approx(result["top1"], abs=1e-6)


def test_on_windows_one_line_says_where_it_runs():
    # As Windows is, as far as this process can be: nothing of Unix is there.
    pretend = (
        "import runpy, sys; sys.platform = 'win32'; sys.modules.update(fcntl=None, resource=None);"
        "sys.argv = ['trainer', 'train.epochs=1'];"
        "runpy.run_module('trainer', run_name='__main__', alter_sys=True)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", pretend], cwd=PROJECT, capture_output=True, text=True
    )
    assert ran.returncode == MISTAKE and ran.stdout == ""
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1 and "WSL" in ran.stderr


GIVEN = [
    ({}, "1000"),
    ({"GOMP_SPINCOUNT": "77"}, "77"),
    ({"OMP_WAIT_POLICY": "passive"}, "0"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="it is GNU's OpenMP that says so")
@pytest.mark.parametrize(("given", "looks"), GIVEN)
def test_pytorchs_threads_soon_sleep_while_they_wait(given, looks):
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    ran = subprocess.run(
        [sys.executable, "-c", "import trainer, torch"],
        cwd=PROJECT,
        env=kept | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ran.stderr) == [looks]


def test_without_a_valid_and_a_test_folder_a_run_still_ends_with_figures(tmp_path):
    make_pictures(tmp_path / "pictures", {"train": 8})
    code, output = run_trainer(tmp_path, *RUN, "data.valid_fraction=0.25")
    assert code == OK, output
    assert (
        "18 train, 6 valid" in output
        and "valid accuracy" in output
        and "there is no test folder" in output
    )


def test_a_full_gpu_is_a_mistake_with_a_remedy():
    line = one_line(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    )
    assert line is not None and "CUDA out of memory" in line and "train.accumulate" in line


def test_a_fault_of_ours_keeps_its_traceback():
    assert (
        one_line(RuntimeError("shapes"), explain_settings) is None
        and one_line(KeyError("x"), explain_settings) is None
        and one_line(OSError("no number"), explain_settings) is None
    )


def test_a_folder_as_the_world_has_it_trains_to_the_end_on_a_terminal_without_umlauts(tmp_path):
    """Zipped, with a system's folders and other files, a class `ä` in two forms, and AVIF."""
    root = make_pictures(
        tmp_path / "set", {"train": 6, "val": 3, "Test": 2}, ("a\u0308", "b", "日本")
    )
    (root / "val/a\u0308").rename(root / "val/\u00e4")
    left_out = ["a\u0308/1.jxl", "b/2.jxl", "日本/3", "4.png", "@eaDir/b.png", "b/Thumbs.db"]
    for name in left_out:
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).touch()
    if features.check("avif"):
        for path in sorted((root / "train/b").glob("00*.png")):
            Image.open(path).save(path.with_suffix(".avif"), quality=100)
            path.unlink()
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path, "set"))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = [word.replace("data.root=pictures", f"data.root={archive.name}") for word in RUN]
    code, output = run_trainer(tmp_path, *run, "platform.cache=cache", **ascii_only)
    assert code == OK, output
    assert "18 train, 9 valid, 6 test; 3 classes" in output
    counts = "2 .jxl, 1 loose (in no class folder), 1 without extension"
    assert f"left out: {counts}; see runs/run/quarantine.txt" in output
    listed = (tmp_path / "runs/run/quarantine.txt").read_text().splitlines()
    assert [line.rsplit("\t", 1)[0].rsplit("/", 1)[1] for line in listed] == [
        "4.png", "1.jxl", "2.jxl", "3",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "runs/run/model.tar.gz") as package:
        manifest, requirements = map(package.extractfile, ("package.json", "code/requirements.txt"))
        assert json.load(manifest)["classes"] == ["b", "\u00e4", "日本"]
        assert (b"pillow>=11.3\n" in requirements.read()) == features.check("avif")


@pytest.mark.parametrize(
    ("word", "by"), [("seed=3", "us"), ("hydra.verbose=false", "Hydra"), ("--cfg=job", "Hydra")]
)
def test_hydra_composes_a_run_only_where_it_is_meant(monkeypatch, word, by):
    asked = []
    monkeypatch.setattr(sys, "argv", ["trainer"])
    monkeypatch.setattr(main, "hydra_main", lambda: asked.append("Hydra"))
    monkeypatch.setattr(main, "train", lambda config, world, given: asked.append((config, given)))
    settings.register()
    main.run(["model=small_cnn", word])
    [answer] = asked
    if by == "Hydra":
        assert answer == by and word in sys.argv
        return
    config, given = answer
    assert config.seed == 3 and {"model=small_cnn", word} <= {*given}
