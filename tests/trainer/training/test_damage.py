"""What a run packages in the end, when its checkpoints are damaged, cut off, unreadable, or another
run's.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import run_trainer
from tests.soak import difference, packaged
from trainer import __main__ as trainer
from trainer.common import files
from trainer.common.errors import OK, UserError
from trainer.distributed.world import World
from trainer.images import identity
from trainer.results import early, outcome
from trainer.sweep import batch
from trainer.training import checkpoint
from trainer.training.checkpoints import Checkpoints

SETTINGS = (
    "name=run", "platform=local", "platform.runs=runs", "platform.cache=cache",
    "data=folder", "model=small_cnn", "data.size=16", "data.resize=16", "data.workers=0",
    "train.epochs=6", "train.batch_size=8", "train.threads=1", "train.monitor=valid_top1",
    "optim.lr=1e-2",  # so fast that the last epoch isn't the best
)  # fmt: skip
VARIANTS = {
    "whole network": (),
    "moving average": ("train.ema_decay=0.5",),
    "frozen backbone": (
        *("model.freeze=backbone", "model.cached_views=2"),
        *("optim.lr=3e-3", "seed=1"),
    ),
    "exact": ("train.exact_shards=2",),
}
ROOT = Path("runs/run/checkpoints")

Packaged = dict[str, torch.Tensor]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_a_directory_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS = (truncate, flip_a_bit, zero, empty, Path.unlink, put_a_directory_there)


@pytest.fixture
def train(monkeypatch, configure, pictures) -> Callable[..., Packaged]:
    """A run as `python -m trainer` does it, saved after every epoch; returns what it would package.

    The package itself, which takes seconds, is not made.
    """
    came: list[Packaged] = []
    monkeypatch.setattr(Checkpoints, "due", lambda self, epoch_ends=False: epoch_ends)

    def build_package(training, tested):
        came.append(training.network.state_dict())

    monkeypatch.setattr(early, "check_package", lambda *arguments: None)
    monkeypatch.setattr(outcome, "build_package", build_package)
    monkeypatch.setattr(outcome, "write_report", lambda *arguments: None)

    def train(directory: Path, *overrides: str) -> Packaged:
        directory.mkdir(exist_ok=True)
        monkeypatch.chdir(directory)
        trainer.train(configure(*SETTINGS, f"data.root={pictures}", *overrides), World())
        return came[-1]

    return train


def forget_the_end(directory: Path) -> None:
    """As if it had been killed at the very end."""
    (directory / "runs/run/result.json").unlink()


def delete_checkpoints(directory: Path) -> None:
    for path in (directory / ROOT).glob("step-*"):
        shutil.rmtree(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_best_weights_are_packaged_and_not_the_last(tmp_path, train, variant, monkeypatch):
    monkeypatch.setattr(outcome, "SAME_LOSS_HERE", (0, 0))
    result = train(tmp_path, *VARIANTS[variant])
    (last, previous) = [checkpoint.load(path) for path in checkpoint.steps(tmp_path / ROOT)][::-1]
    assert last["progress"]["best"]["epoch"] < 6  # else it would prove nothing
    served = last["average"] or last["network"]
    prefix = "head." if variant == "frozen backbone" else ""
    best = {prefix + name: tensor for name, tensor in last["best"]["network"].items()}
    assert difference(best, {name: result[name] for name in best}) is None
    assert difference(last["best"]["network"], served) is not None
    assert previous["best"] is not None  # each has its own


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_its_end_packages_the_same(tmp_path, train, variant, monkeypatch):
    monkeypatch.setattr(outcome, "SAME_LOSS_HERE", (0, 0))
    result = train(tmp_path, *VARIANTS[variant])
    forget_the_end(tmp_path)
    assert difference(result, train(tmp_path, *VARIANTS[variant])) is None


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_damage_anywhere_costs_no_bit(tmp_path, train, every):
    """every: each harm to each file; else one harm to each, another one from file to file."""
    whole = train(tmp_path / "whole")
    forget_the_end(tmp_path / "whole")
    found = checkpoint.steps(tmp_path / "whole" / ROOT)
    previous, newest = [path.relative_to(tmp_path / "whole") for path in found]
    names = sorted(path.name for path in (tmp_path / "whole" / newest).iterdir())
    assert len(names) == 5
    damages = [(previous / name, flip_a_bit) for name in names]
    damages += [(newest / name, harm) for name, harm in product(names, HARMS)]
    if not every:
        turns = [(newest / names[turn % 5], harm) for turn, harm in enumerate(HARMS)]
        damages = [damages[0], *turns, *((newest / name, flip_a_bit) for name in names[2:])]
    for file, harm in damages:
        damaged = tmp_path / f"{file.parent.name}-{file.name}-{harm.__name__}"
        shutil.copytree(tmp_path / "whole", damaged)
        harm(damaged / file)
        assert difference(whole, train(damaged)) is None, damaged.name
        shutil.rmtree(damaged)


def test_a_file_that_cannot_be_read_costs_no_bit(tmp_path, train, monkeypatch):
    whole = train(tmp_path)
    forget_the_end(tmp_path)
    ill = next(iter(checkpoint.steps(tmp_path / ROOT)[-1].glob("tensors*"))).relative_to(tmp_path)
    fail_to_read(monkeypatch, lambda path: path == ill)
    assert difference(whole, train(tmp_path)) is None


@pytest.mark.parametrize("harm", [flip_a_bit, Path.unlink, put_a_directory_there])
def test_what_lies_beside_the_checkpoints_is_written_anew(tmp_path, train, harm):
    whole = train(tmp_path, "train.epochs=1")
    forget_the_end(tmp_path)
    noted = (tmp_path / ROOT / identity.INDEX).read_bytes()
    harm(tmp_path / ROOT / identity.INDEX)
    assert difference(whole, train(tmp_path, "train.epochs=1")) is None
    assert (tmp_path / ROOT / identity.INDEX).read_bytes() == noted


def test_a_file_system_without_locks_and_flushes_of_directories_costs_no_bit(
    tmp_path, train, monkeypatch
):
    whole = train(tmp_path / "whole", "train.epochs=1")
    fsync = os.fsync

    def of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "fsync", of_files)
    monkeypatch.setattr(fcntl, "flock", none)
    assert difference(whole, train(tmp_path / "there", "train.epochs=1")) is None
    assert not list(tmp_path.rglob("*-owner"))


def fail_to_read(monkeypatch, which: Callable[[Path], bool]) -> None:
    def read_bytes(path: Path) -> bytes:
        if which(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        with path.open("rb") as file:
            return file.read()

    monkeypatch.setattr(files, "PAUSES", ())
    monkeypatch.setattr(Path, "read_bytes", read_bytes)


def test_where_no_checkpoint_can_be_read_one_line_says_so_and_all_stays(
    tmp_path, train, monkeypatch
):
    train(tmp_path)
    forget_the_end(tmp_path)
    before = sorted((tmp_path / ROOT).rglob("*"))
    fail_to_read(monkeypatch, lambda path: path.name == "tensors.safetensors")
    with pytest.raises(
        UserError, match=r"none of its 2 checkpoints is whole .*tensors.safetensors can't be read"
    ):
        train(tmp_path)
    assert sorted((tmp_path / ROOT).rglob("*")) == before


@pytest.mark.parametrize("left", [(), ("state.json",), ("tensors.safetensors", "state.json")])
def test_a_first_checkpoint_that_was_cut_off_starts_over(tmp_path, train, left):
    whole = train(tmp_path)
    forget_the_end(tmp_path)
    first, *others = checkpoint.steps(tmp_path / ROOT)
    for path in others:
        shutil.rmtree(path)
    for file in first.iterdir():
        if file.name not in left:
            file.unlink()
    assert difference(whole, train(tmp_path)) is None


# --- an earlier life of the directory ---


OTHER = "optim.lr=1e-4"


def test_weights_of_an_earlier_life_are_not_packaged(tmp_path, train):
    # One epoch: both lives have their best weights at the same step.
    whole = train(tmp_path / "whole", "train.epochs=1", OTHER)
    train(tmp_path / "again", "train.epochs=1")
    forget_the_end(tmp_path / "again")
    delete_checkpoints(tmp_path / "again")  # to start over
    assert difference(whole, train(tmp_path / "again", "train.epochs=1", OTHER)) is None


def test_checkpoints_of_an_earlier_life_that_were_cut_off_are_replaced(tmp_path, train):
    whole = train(tmp_path / "whole", OTHER)
    train(tmp_path / "again")
    forget_the_end(tmp_path / "again")
    for path in checkpoint.steps(tmp_path / "again" / ROOT):
        (path / "manifest.json").unlink()
    assert difference(whole, train(tmp_path / "again", OTHER)) is None
    states = [checkpoint.load(path) for path in checkpoint.steps(tmp_path / "again" / ROOT)]
    assert {state["facts"]["identity"]["optim.lr"] for state in states} == {1e-4}


def test_a_whole_checkpoint_of_other_settings_is_replaced_and_not_believed(
    tmp_path, train, monkeypatch
):
    whole = train(tmp_path / "whole", OTHER)
    train(tmp_path / "other")
    write = checkpoint.write
    came: list[Path] = []

    def brought_back(root: Path, name: str, *rest: Any) -> Path:
        """As where a copy of the earlier life arrives late."""
        if (tmp_path / "other" / ROOT / name).exists() and not (root / name).exists():
            came.append(shutil.copytree(tmp_path / "other" / ROOT / name, root / name))
        return write(root, name, *rest)

    monkeypatch.setattr(checkpoint, "write", brought_back)
    assert difference(whole, train(tmp_path / "again", OTHER)) is None
    assert came
    forget_the_end(tmp_path / "again")
    assert difference(whole, train(tmp_path / "again", OTHER)) is None


def replace_best(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Whole checkpoints whose best weights are others."""
    for path in checkpoint.steps(directory / ROOT):
        state = checkpoint.load(path)
        change(state)
        checkpoint.save(path.parent, path.name, state)


def other_head(state: dict[str, Any]) -> None:
    weight = state["best"]["network"]["head.weight"]
    weight += 0.3 * torch.randn(weight.shape)


def the_last(state: dict[str, Any]) -> None:
    state["best"]["network"] = state["network"]


def elsewhere(state: dict[str, Any]) -> None:
    other_head(state)
    state["best"]["environment"]["cpu"] = "another"


@pytest.mark.parametrize("change", [other_head, the_last, elsewhere])
def test_weights_that_do_not_give_what_was_noted_stop_the_run(tmp_path, train, change):
    train(tmp_path)
    forget_the_end(tmp_path)
    torch.manual_seed(0)
    replace_best(tmp_path, change)
    with pytest.raises(
        UserError,
        match=r"best weights, of epoch ., have valid_loss=.*was noted for them: .*another name=",
    ):
        train(tmp_path)
    assert not (tmp_path / "runs/run/result.json").exists()


def test_what_another_machine_computes_may_lie_a_little_off(tmp_path, train):
    train(tmp_path)
    forget_the_end(tmp_path)

    def move(state: dict[str, Any]) -> None:
        state["best"]["environment"]["precision"] = "bfloat16"
        for tensor in state["best"]["network"].values():
            tensor.copy_(tensor.bfloat16())

    replace_best(tmp_path, move)
    train(tmp_path)


def test_a_real_run_in_the_place_of_an_earlier_one_packages_its_own_weights(
    tmp_path, train, pictures
):
    settings = ("train.epochs=1", OTHER)
    whole = train(tmp_path / "whole", *settings)
    train(tmp_path / "again", "train.epochs=1")
    forget_the_end(tmp_path / "again")
    delete_checkpoints(tmp_path / "again")
    code, output = run_trainer(tmp_path / "again", *SETTINGS, f"data.root={pictures}", *settings)
    assert code == OK, output
    assert difference(whole, packaged(tmp_path / "again/runs/run")) is None


def test_a_real_run_packages_its_best_weights_and_not_its_last(tmp_path, train, pictures):
    whole = train(tmp_path / "whole")
    code, output = run_trainer(
        tmp_path, *SETTINGS, f"data.root={pictures}", "checkpoint.max_cost=1"
    )
    assert code == OK, output
    last = checkpoint.load(checkpoint.steps(tmp_path / ROOT)[-1])
    assert last["progress"]["best"]["epoch"] < 6  # else it would prove nothing
    assert difference(whole, packaged(tmp_path / "runs/run")) is None
    assert difference(last["best"]["network"], packaged(tmp_path / "runs/run")) is None


# --- trials that share a process ---


@pytest.mark.parametrize("change", ["settings", "pictures"])
def test_a_checkpoint_of_a_batched_trial_is_not_believed_of_others(
    tmp_path, monkeypatch, configure, pictures, change
):
    shutil.copytree(pictures, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint.Cadence, "due", lambda self, epoch_ends: True)
    overrides = (*SETTINGS, *VARIANTS["frozen backbone"], "data.root=pictures")

    def write(number: int, lr: float) -> None:
        place = tmp_path / f"{number:04d}"
        place.mkdir(exist_ok=True)
        words = (f"name='{number:04d}'", f"platform.runs={tmp_path}", f"optim.lr={lr}")
        config = OmegaConf.create(asdict(configure(*overrides, *words)))
        (place / "config.yaml").write_text(OmegaConf.to_yaml(config))

    for number, lr in enumerate((1e-3, 1e-2)):
        write(number, lr)
    batch.train(tmp_path, [0, 1])
    assert json.loads((tmp_path / "outcomes-0000.json").read_text()).keys() == {"0", "1"}
    if change == "settings":
        write(1, 1e-1)
    else:
        shutil.copy("pictures/train/circle/000.png", "pictures/train/circle/another.png")
    with pytest.raises(
        UserError,
        match={"settings": "optim.lr: 0.01 then, 0.1 now"}.get(change, "the pictures have"),
    ):
        batch.train(tmp_path, [0, 1])
