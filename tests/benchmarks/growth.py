"""How what a run does besides training grows with the number of pictures."""

import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.loop import compose_settings
from tests.benchmarks.measure import cpu_seconds, short
from tests.benchmarks.table import Row, Table
from tests.conftest import PROJECT
from tests.trainer.trainings import open_training
from trainer.common.console import loading
from trainer.images import care
from trainer.images.augment import Augmentation
from trainer.images.cache import PixelCache
from trainer.images.decode import Preprocessing
from trainer.images.folder import ImageFolder, scan
from trainer.images.loader import ImageLoader
from trainer.network.build import build
from trainer.results import outcome
from trainer.training.loop import fit

TITLE = "More pictures"
SIZES = (2_000, 8_000, 32_000, 100_000)
CLASSES, SIDE, FIRST = 20, 32, 200  # FIRST: pictures that the network is trained on
MOST = 1.1  # the largest exponent that is linear
NOTE = f"""CPU seconds of what a run does with each of its pictures besides training, for more and
more of them: JPEGs of 40 px in {CLASSES} classes, small_cnn at {SIDE} px. Scan: the folders are
listed. Packed first and again: each picture is read, known by its content, decoded and kept; then
found again. Care: duplicates, leaks and blank pictures are looked for. Test, report: all are
evaluated, calibrated, and written into the table and the page. Predict: `python -m serving
predict`, the whole command. The exponent is the slope through the last three sizes, on logarithmic
scales; 1 is linear."""


def measure(scratch: Path, rounds: int) -> Table:
    costs: dict[str, list[float]] = {}
    with loading():  # as in a run: the collector leaves out what is imported
        importlib.import_module("torchvision")
    for count in SIZES:
        place = scratch / str(count)
        write(place / "pictures/train", count)
        for name, seconds in costs_of(place).items():
            costs.setdefault(name, []).append(seconds)
        print(f"  {count:,} pictures", file=sys.stderr, flush=True)
        shutil.rmtree(place)
    rows = []
    for name, seconds in costs.items():
        slope = exponent(SIZES[1:], seconds[1:])
        cells = (*map(short, seconds), f"{slope:.2f}")
        rows.append(Row(name, cells, f"at most {MOST:g}", slope <= MOST))
    return Table(TITLE, NOTE, (*(f"{size:,}" for size in SIZES), "exponent"), rows)


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Return the slope of the line of least squares through the logarithms."""
    slope, _ = np.polyfit([math.log(size) for size in sizes], [math.log(s) for s in seconds], 1)
    return float(slope)


def write(root: Path, count: int) -> None:
    """Write root/CLASS/*.jpg: smooth noise, no two alike."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class{number % CLASSES:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize((40, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())


def costs_of(place: Path) -> dict[str, float]:
    """Return the CPU seconds of each part."""
    costs: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = cpu_seconds()
        result = work()
        costs[name] = cpu_seconds() - before
        return result

    root = place / "pictures/train"
    images = timed("scan", lambda: scan({"train": str(root)}, 0.1))
    everything = [path for split in images.splits.values() for path in split.paths]
    store = PixelCache(place / "pixels", SIDE, "bilinear", digests=place / "digests")
    nothing = lambda *_: None  # noqa: E731
    timed("packed first", lambda: store.pack(everything, 0, nothing))
    packed = timed("packed again", lambda: store.pack(everything, 0, nothing))
    known = ImageFolder(images.classes, images.splits, (), digests=packed.digests)
    timed("care", lambda: care.look(known, packed, SIDE, 0, nothing))

    training = open_training(
        place / "run",
        compose_settings(
            "model=small_cnn", "train.epochs=1", f"data.size={SIDE}", f"data.resize={SIDE}"
        ),
        loader_of(known, packed),
        build("small_cnn", CLASSES),
    )
    fit(training)
    tested = timed("test", lambda: outcome.test(training))
    timed("report", lambda: written(training, tested))
    outcome.build_package(training, tested)
    timed("predict", lambda: predict(place / "run", root))
    return costs


def loader_of(images: ImageFolder, packed: Callable[[str], np.ndarray]) -> ImageLoader:
    """Return a loader that trains on few pictures and tests on all."""
    train = images.splits["train"]
    few = np.linspace(0, len(train.paths) - 1, FIRST).astype(int)
    part = type(train)(tuple(train.paths[number] for number in few), train.labels[few])
    splits = {"train": part, "valid": part, "test": train}
    return ImageLoader(
        ImageFolder(images.classes, splits, (), digests=images.digests),
        Preprocessing(SIDE, SIDE, "bilinear"),
        Augmentation((1.0, 1.0), (1.0, 1.0), False, False),
        batch_size=32,
        seed=0,
        workers=0,
        read=packed,
    )


def written(training: outcome.Training, tested: outcome.Tested) -> None:
    outcome.write_predictions(training, tested)
    outcome.write_report(training, tested)


def predict(run: Path, pictures: Path) -> None:
    command = [sys.executable, "-m", "serving", "predict", str(run), str(pictures)]
    command += ["--csv", str(run / "said.csv")]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run(command, env=environment, capture_output=True, check=True)
