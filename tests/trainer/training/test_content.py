"""A run goes on after any single file has been replaced, damaged, restored or can't be read: equal
to the bit, or refused in one line.
"""

import errno
import io
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.soak import difference
from trainer import __main__ as trainer
from trainer.common import files
from trainer.common.errors import UserError
from trainer.distributed.world import World
from trainer.images import cache, identity
from trainer.network import features
from trainer.network.build import build
from trainer.results import early, outcome
from trainer.training import checkpoint, training
from trainer.training.checkpoints import Checkpoints

SETTINGS = (
    "name=run", "platform=local", "platform.runs=runs", "platform.cache=cache",
    "data=folder", "data.root=pictures", "model=small_cnn", "data.size=12", "data.resize=14",
    "data.workers=0", "data.max_broken=0.5", "train.epochs=2", "train.batch_size=8",
    "train.threads=1", "train.monitor=valid_loss", "optim.lr=3e-3",
    "model.head_hidden=4",
)  # fmt: skip
WEIGHTS = "model.weights=weights/small.safetensors"
VARIANTS = {
    "packed": ("data.cache=auto", WEIGHTS),
    "decoded": ("data.cache=none",),
    "features": ("model.freeze=backbone", "model.cached_views=2", WEIGHTS),
    "split": ("data.cache=auto",),  # no valid folder
}
EQUAL, REFUSED, EITHER = "equal", "refused", "either"

Trained = dict[str, torch.Tensor]


def draw(path: Path, seed: int) -> None:
    """BMP: pictures of equal dimensions have equal sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (15, 15, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@dataclass
class Scene:
    """A folder with pictures, weights, a cache, and a run that was killed after its first epoch."""

    place: Path
    train: Callable[[], Trained]
    expected: Trained
    files: list[Path]  # of the pictures, the weights and the cache, relative

    @property
    def spare(self) -> Path:
        return self.place.with_name(f"{self.place.name}-spare")

    def restore(self) -> None:
        """Bring everything back. Pictures and weights that are as they were keep their times."""
        for name in ("runs", "cache"):
            shutil.rmtree(self.place / name, ignore_errors=True)
            shutil.copytree(self.spare / name, self.place / name)
        for name in ("pictures", "weights"):
            for path in (self.place / name).rglob("*"):
                if not (self.spare / path.relative_to(self.place)).exists():
                    path.unlink()
            for path in (self.spare / name).rglob("*.*"):
                here = self.place / path.relative_to(self.spare)
                if not here.exists() or here.read_bytes() != path.read_bytes():
                    shutil.copy(path, here)


def lay_out(place: Path, variant: str) -> None:
    counts = {"train": 6, "valid": 3, "test": 2}
    if variant == "split":
        counts = {"train": 9, "test": 2}
    seed = 0
    for split, count in counts.items():
        for name in ("circle", "square"):
            for number in range(count):
                seed += 1
                draw(place / "pictures" / split / name / f"{number}.bmp", seed)
    (place / "weights").mkdir()
    for number, name in enumerate(("small", "other")):
        torch.manual_seed(number)
        state = build("small_cnn", 2, channels_last=False).backbone.state_dict()
        save_file(state, place / f"weights/{name}.safetensors")


def kill_after_the_first_epoch(run: Path) -> None:
    (run / "result.json").unlink()
    for path in checkpoint.steps(run / "checkpoints"):
        if checkpoint.load(path)["progress"]["epoch"] > 1:
            shutil.rmtree(path)
    assert checkpoint.steps(run / "checkpoints")


@pytest.fixture
def stage(tmp_path, monkeypatch, configure) -> Callable[..., Scene]:
    came: list[Trained] = []

    def build_package(run: Any, tested: Any) -> None:
        came.append({name: each.clone() for name, each in run.network.state_dict().items()})

    monkeypatch.setattr(Checkpoints, "due", lambda self, epoch_ends=False: epoch_ends)
    monkeypatch.setattr(outcome, "build_package", build_package)
    monkeypatch.setattr(early, "check_package", lambda *arguments: None)
    monkeypatch.setattr(outcome, "write_report", lambda *arguments: None)
    monkeypatch.setattr(identity, "TICK", 0)  # trusted at once: each harm comes later than a tick
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(features, "BATCH", 8)
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def prepare(variant: str, kill: bool = True) -> Scene:
        place = tmp_path / variant
        lay_out(place, variant)
        config = configure(*SETTINGS, *VARIANTS[variant])

        def train() -> Trained:
            monkeypatch.chdir(place)
            trainer.train(config, World())
            return came[-1]

        expected = train()
        if kill:
            kill_after_the_first_epoch(place / "runs/run")
        scene = Scene(place, train, expected, [])
        shutil.copytree(place, scene.spare)
        paths = [path for name in ("pictures", "cache") for path in (place / name).rglob("*")]
        if WEIGHTS in VARIANTS[variant]:
            paths.append(place / "weights/small.safetensors")
        scene.files = sorted(
            path.relative_to(place)
            for path in paths
            if path.is_file() and not path.name.startswith(".")
        )
        return scene

    return prepare


# --- harms: each takes the file and a random source, and returns what must come of it ---


def replaced(path: Path, rng: random.Random) -> str:
    """By other bytes of the same size, with the time set back, as cp -p and rsync -t do."""
    status, data = path.stat(), path.read_bytes()
    if path.suffix == ".bmp":
        draw(path, rng.randrange(1000, 10**6))
        assert path.stat().st_size == status.st_size
    else:
        path.write_bytes(data[:-4] + bytes(each ^ 0x20 for each in data[-4:]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return REFUSED


def swapped(path: Path, rng: random.Random) -> str:
    """With another file of the same kind; of pictures, one of the other class."""
    if path.suffix == ".bmp":
        classes = {"circle": "square", "square": "circle"}
        other = path.parent.with_name(classes[path.parent.name]) / path.name
    else:
        others = [each for each in path.parent.iterdir() if each.is_file() and each != path]
        other = rng.choice(sorted(others))
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return REFUSED


def flipped(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return REFUSED


def cut_off(path: Path, rng: random.Random) -> str:
    os.truncate(path, rng.randrange(path.stat().st_size + 1) // 2)
    return REFUSED


def emptied(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return REFUSED


def zeroed(path: Path, rng: random.Random) -> str:
    path.write_bytes(bytes(path.stat().st_size))
    return REFUSED


def deleted(path: Path, rng: random.Random) -> str:
    path.unlink()
    return REFUSED


def lengthened(path: Path, rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(40))
    return REFUSED


def touched(path: Path, rng: random.Random) -> str:
    path.touch()
    return EQUAL


def renamed(path: Path, rng: random.Random) -> str:
    if path.suffix != ".bmp":
        return EQUAL
    path.rename(path.with_name(f"{rng.randrange(100, 10**6)}.bmp"))
    return EQUAL


def restored(path: Path, rng: random.Random) -> str:
    """From a backup: deleted, and brought back."""
    status, data = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return EQUAL


def failing(path: Path, rng: random.Random, patch: pytest.MonkeyPatch, times: int) -> str:
    """Can't be opened, so often, for a reason that has nothing to do with its bytes."""
    number = rng.choice([errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE])
    left = [times]

    def fault(call: Callable[..., Any], file: Any, *rest: Any, **more: Any) -> Any:
        named = isinstance(file, str | os.PathLike) and Path(file).absolute() == path
        if left[0] and (named or (isinstance(file, int) and path.suffix in (".pixels", ".f32"))):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return call(file, *rest, **more)

    for module, name in ((io, "open"), (os, "open"), (os, "pread")):
        patch.setattr(module, name, partial(fault, getattr(module, name)))
    if times == 1:
        return EQUAL
    return EITHER  # it may not be read at all


HARMS: dict[str, Callable[..., str]] = {
    each.__name__: each
    for each in (
        replaced, swapped, flipped, cut_off, emptied, zeroed, deleted, lengthened, touched,
        renamed, restored,
    )
}  # fmt: skip
FAULTS = {"failing once": 1, "failing": 10**9}


def kind(path: Path) -> tuple[str, ...]:
    """What a file is: a picture, weights, or which part of the cache."""
    if path.parts[0] != "cache":
        return path.parts[:1]
    return (*path.parts[:2], path.suffix)


def cases(scene: Scene, rng: random.Random) -> list[tuple[Path, str]]:
    """Return each harm to a file of each kind, in any order."""
    kinds: dict[tuple[str, ...], list[Path]] = {}
    for path in scene.files:
        kinds.setdefault(kind(path), []).append(path)
    chosen = [(rng.choice(paths), harm) for paths in kinds.values() for harm in (*HARMS, *FAULTS)]
    rng.shuffle(chosen)
    return chosen


def check(scene: Scene, path: Path, harm: str, rng: random.Random) -> str:
    """Do the harm and go on; return what came of it. What may not come of it fails."""
    with pytest.MonkeyPatch.context() as patch:
        if harm in FAULTS:
            must = failing(scene.place / path, rng, patch, FAULTS[harm])
        else:
            must = HARMS[harm](scene.place / path, rng)
        try:
            trained = scene.train()
        except UserError as error:
            line = str(error)
            assert "\n" not in line, line
            assert path.parts[0] != "cache", (path, harm, line)
            assert must != EQUAL, (path, harm, line)
            assert path.name in line or "pictures can't be used" in line, (path, harm, line)
            return REFUSED
    may_be_equal = path.parts[0] == "cache" or (path.parts[0] == "weights" and harm == "flipped")
    assert must != REFUSED or may_be_equal, (path, harm)
    assert difference(scene.expected, trained) is None, (path, harm)
    return EQUAL


def run_cases(scene: Scene, seed: int, count: int | None = None) -> list[str]:
    rng = random.Random(seed)
    chosen = cases(scene, rng)[:count]
    came = []
    for path, harm in chosen:
        came.append(check(scene, path, harm, rng))
        scene.restore()
    return came


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_to_the_same_bits_or_is_refused(stage, variant):
    run_cases(stage(variant), 0, 6)


def test_a_complete_run_is_complete_for_its_own_content_alone(stage):
    scene = stage("features", kill=False)
    circle, small = Path("pictures/train/circle/1.bmp"), Path("weights/small.safetensors")
    for path, harm, said in (
        (circle, swapped, "2 changed: train/circle/1.bmp, train/square/1.bmp"),
        (circle, emptied, "1 missing: train/circle/1.bmp"),
        (circle, touched, None),
        (circle, renamed, None),
        (small, swapped, "model.weights=weights/small.safetensors has changed"),
        (small, touched, None),
    ):
        harm(scene.place / path, random.Random(0))
        if said is None:
            scene.train()
        else:
            with pytest.raises(UserError, match=f"{said}.*since|since.*{said}"):
                scene.train()
        scene.restore()


def test_a_complete_run_decodes_and_builds_nothing_to_say_so(stage, monkeypatch):
    scene = stage("features", kill=False)

    def never(*arguments: Any) -> None:
        raise AssertionError(arguments)

    train = scene.place / "pictures/train/circle"
    monkeypatch.setattr(training, "new_network", never)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "shrink", never)
        for harm in (touched, renamed):
            harm(train / "1.bmp", random.Random(0))
        touched(scene.place / "weights/small.safetensors", random.Random(0))
        scene.train()
        shutil.rmtree(scene.place / "cache")
        scene.train()
    (train / "broken.bmp").write_bytes(b"no picture")
    scene.train()  # another that can't be used
    draw(train / "new.bmp", 77)
    with pytest.raises(UserError, match=r"1 new: train/circle/new\.bmp"):
        scene.train()


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_cache_that_can_be_written_the_run_goes_on(stage, variant):
    scene = stage(variant)
    shutil.rmtree(scene.place / "cache")
    (scene.place / "cache").write_text("a file where the folder should be")
    assert difference(scene.expected, scene.train()) is None


def test_a_run_that_another_version_began_is_refused_in_one_line(stage):
    scene = stage("decoded")
    for path in checkpoint.steps(scene.place / "runs/run/checkpoints"):
        state = checkpoint.load(path)
        state["facts"]["identity"].pop("format")
        checkpoint.save(path.parent, path.name, state)
    with pytest.raises(UserError, match=r"another version of Packhorse began this run.*name="):
        scene.train()


@pytest.mark.long
def test_a_run_goes_on_to_the_same_bits_or_is_refused_in_many_cases(stage):
    came = [each for variant in VARIANTS for each in run_cases(stage(variant), 1)]
    assert min(came.count(EQUAL), came.count(REFUSED)) > 50
    assert len(came) >= 200
