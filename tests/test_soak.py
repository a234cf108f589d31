"""What `make soak` compares, damages and takes for a refusal, and what it says of it."""

import io
import random
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest
import safetensors.torch

from tests import soak
from tests.conftest import QUICK, environment, run_trainer
from tests.forked import Forked
from trainer.common.errors import MISTAKE, OK


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    directory = tmp_path_factory.mktemp("soak")
    own = ("data=folder", f"data.root={pictures}", "model=small_cnn")
    code, said = run_trainer(directory, *QUICK, "name=run", "platform.cache=cache", *own)
    assert code == OK, said
    return directory


@pytest.fixture
def other(undisturbed: Path, tmp_path: Path) -> Path:
    """Another run with the same outcome."""
    return shutil.copytree(undisturbed, tmp_path / "other", symlinks=True)


def change_package(archive: Path, name: str) -> None:
    """Write the package anew with a file changed: one of the weights, or its last byte."""
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    if name == "model.safetensors":
        weights = safetensors.torch.load(files[name])
        next(iter(weights.values())).view(-1)[0] += 1
        files[name] = safetensors.torch.save(weights)
    else:
        files[name] = files[name][:-1] + b"?"
    with tarfile.open(archive, "w:gz") as tar:
        for each, content in files.items():
            entry = tarfile.TarInfo(each)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def compared(one: Path, other: Path) -> list[str]:
    return soak.compare(soak.everything(one / soak.RUN), other)


def test_equal_runs_are_equal(undisturbed, other):
    assert compared(undisturbed, other) == []


@pytest.mark.parametrize("name", ["model.safetensors", "golden/expected.npz"])
def test_another_byte_in_the_package_is_seen(undisturbed, other, name):
    change_package(other / soak.RUN / "model.tar.gz", name)
    [fault] = compared(undisturbed, other)
    assert fault.startswith("differs from the undisturbed run in /package/")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("metrics.jsonl", "/told/metrics.jsonl"),
        ("report.html", "/told/report.html"),
        ("result.json", ": JSONDecodeError"),
        ("model.tar.gz", ": "),
    ],
)
def test_half_a_file_is_seen(undisturbed, other, name, where):
    path = other / soak.RUN / name
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 3].rpartition(b"\n")[0])
    faults = compared(undisturbed, other)
    assert len(faults) == 1 and where in faults[0]


def test_what_a_killed_writer_left_is_seen(undisturbed, other):
    (other / soak.RUN / ".writing-x").touch()
    assert compared(undisturbed, other) == ["left behind ['run/.writing-x']"]


def test_what_differs_is_not_called_equal(undisturbed, tmp_path, monkeypatch, capsys):
    """The soak itself, with runs that come out otherwise."""

    class Life:
        lines: tuple[str, ...] = ()

        def __init__(self, directory, variant, rng, terminal=False):
            if (directory / "runs").exists():
                return
            shutil.copytree(undisturbed / "runs", directory / "runs")
            if not directory.name.startswith("undisturbed"):
                change_package(directory / soak.RUN / "model.tar.gz", "model.safetensors")

        def wait_for(self, stage, after):
            return False

        def end(self):
            return OK

    monkeypatch.setattr(soak, "Life", Life)
    tally = soak.soak(1, 0, tmp_path, soak.QUICK)
    assert tally.failures and tally.verdicts["different"] and not tally.verdicts["equal"]
    said = capsys.readouterr().out
    assert "differs from the undisturbed run in /package/" in said and "is equal" not in said


def test_a_soak_that_fails_itself_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "Life", None)
    monkeypatch.setattr(soak.threading, "excepthook", lambda given: None)
    assert soak.soak(1, 0, tmp_path, soak.QUICK).failures


# --- damage ---


def some_files(root: Path) -> Path:
    for name in ("runs/run/a", "runs/run/checkpoints/step-1/b", "cache/pixels/c"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 9)
    (root / "runs/run/.lock").touch()
    (root / "cache/elsewhere").symlink_to("/etc/hostname")
    return root


def test_each_damage_changes_one_file_and_can_be_mended(tmp_path):
    before = {path: path.read_bytes() for path in some_files(tmp_path).rglob("*") if path.is_file()}
    seen = set()
    for seed in range(150):
        harm = soak.harm(tmp_path, random.Random(seed))
        assert harm is not None and harm.path in before
        seen.add((harm.how, harm.path.name))
        if harm.how == "unreadable":
            with pytest.raises(OSError, match="Input/output error"):
                harm.path.read_bytes()
        elif harm.how == "delete":
            assert not harm.path.exists()
        elif harm.how != "replace":  # by itself, it may be
            assert harm.path.read_bytes() != before[harm.path]
        rest = {path for path in before if path != harm.path}
        assert all(path.read_bytes() == before[path] for path in rest)
        harm.mend()
        assert harm.path.read_bytes() == before[harm.path]
    assert len(seen) == len(soak.HARMS) * 3


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (["run x", "error: runs/run/step-9/state.json can't be read: fix that"], None),
        (["error: checkpoints/step-9: it is damaged"], None),
        (["error: something is wrong"], "the line does not name"),
        (["error: state.json", "error: state.json"], "2 lines of error"),
        (["Traceback (most recent call last):", "error: state.json"], "a traceback"),
        (["stopped"], "0 lines of error"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_file(lines, wrong):
    said = soak.refusal(lines, soak.Harm(Path("runs/run/step-9/state.json"), "flip", b""))
    assert said == wrong if wrong is None else str(said).startswith(wrong)
    assert soak.refusal(["error: x"], None) == "no file was damaged"


def test_each_end_of_a_life_has_its_exit_codes():
    for how in soak.KILLS:
        assert OK in soak.allowed(how) and 1 not in soak.allowed(how)
        assert (MISTAKE in soak.allowed(how)) == (how == soak.DISK)


def test_two_threads_that_ask_for_an_exit_code_both_have_it(tmp_path, monkeypatch):
    read = forkserver.read_signed
    monkeypatch.setattr(forkserver, "read_signed", lambda end: time.sleep(0.2) or read(end))
    process = Forked(tmp_path, ["this"], environment(tmp_path))
    assert process.stdout is not None
    with process.stdout, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: process.wait(60), range(2))) == [0, 0]
