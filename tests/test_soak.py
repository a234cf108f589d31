"""What `make soak` compares, and what it says of it."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import safetensors.torch

from tests import soak
from tests.conftest import QUICK, run_trainer
from trainer.common.errors import OK


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
    return shutil.copytree(undisturbed, tmp_path / "other")


def change_packaged_weights(archive: Path) -> None:
    """Write the package anew with one of its weights changed."""
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    weights = safetensors.torch.load(files["model.safetensors"])
    next(iter(weights.values())).view(-1)[0] += 1
    files["model.safetensors"] = safetensors.torch.save(weights)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_equal_runs_are_equal(undisturbed, other):
    assert soak.compare(soak.outcome(undisturbed / "runs/run"), other) == []


def test_other_weights_in_the_package_are_seen(undisturbed, other):
    change_packaged_weights(other / "runs/run/model.tar.gz")
    [fault] = soak.compare(soak.outcome(undisturbed / "runs/run"), other)
    assert fault.startswith("differs from the undisturbed run in /package/")


def test_what_differs_is_not_called_equal(undisturbed, tmp_path, monkeypatch, capsys):
    """The soak itself, with a disturbed run that comes out otherwise."""

    def undisturbed_run(directory, settings, tally):
        shutil.copytree(undisturbed / "runs", directory / "runs")

    def disturbed_run(directory, settings, rng, pace, kills, tally, lock):
        undisturbed_run(directory, settings, tally)
        change_packaged_weights(directory / "runs/run/model.tar.gz")
        tally.kills["SIGTERM"] += kills

    monkeypatch.setattr(soak, "measured", undisturbed_run)
    monkeypatch.setattr(soak, "disturbed_run", disturbed_run)
    tally = soak.soak(1, 0, tmp_path)
    assert tally.failures
    said = capsys.readouterr().out
    assert "differs from the undisturbed run in /package/" in said and "is equal" not in said
