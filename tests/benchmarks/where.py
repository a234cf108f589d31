"""Where a run's time goes, by its own clock, and the least that each part could take here."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import frozen, photos
from tests.benchmarks.measure import run_trainer, short
from tests.benchmarks.table import Row, Table
from trainer.network import build
from trainer.network.build import Classifier
from trainer.results.outcome import FOR_MEANS

TITLE = "Where the time goes"
NETWORK, SIZE, EPOCHS, PARTS = "resnet18", 224, 3, ("frozen", "fine-tuned", "from scratch")
VIEWS = 2  # of model.cached_views
STEP = 3.0  # forward passes that a training step costs
NOTE = f"""The wall time of whole commands by the run's own clock (`stages` of result.json), in the
threads that the last line names: {NETWORK} at {SIZE} px on photos of ~500x375
({frozen.TRAIN} + {frozen.VALID} + {frozen.VALID}), nothing cached. Frozen: `model.freeze=backbone`,
20 epochs of the head on {VIEWS} cached views, the default. Fine-tuned and from scratch: {EPOCHS}
epochs of all layers, the latter of small_cnn at 64 px. Random weights; they don't change the time.

The limit is what the part's own work takes here by itself: "start" a process that imports PyTorch
and torchvision; "scan" the SHA-256 of all files and decoding each picture once with Pillow;
"features", "training" and "test" the multiplications of the pictures that are seen, at the rate of
one large matrix product in float32 (in training {STEP:g} times those of a forward pass; features
may be seen in bfloat16, which beats it); "package" PyTorch's export of the network alone.
[What to do about each](performance.md)."""
COLUMNS = ("seconds", "of all", "limit, s", "times its limit")


@dataclass(frozen=True)
class Limits:
    """What the parts' own work takes here by itself, in seconds."""

    start: float
    scan: float
    decode: float  # of one picture
    flops: float  # of matrix products, a second


def measure(scratch: Path, rounds: int) -> Table:
    root = frozen.photos_in(scratch / "photos")
    limits = Limits(start(), scan(root), decode(root), matrix_products())
    whole = (f"model.name={NETWORK}", "model.weights=null", f"data.size={SIZE}", "data.resize=256")
    jobs = {
        "frozen": ("model.freeze=backbone", "train.epochs=20", *whole),
        "fine-tuned": (f"train.epochs={EPOCHS}", *whole),
        "from scratch": ("model=small_cnn", "data.size=64", f"train.epochs={EPOCHS}"),
    }
    rows = []
    for name, words in jobs.items():
        stages = run(scratch / name.replace(" ", "-"), root, *words)
        network, size = build.build(NETWORK, photos.CLASSES), SIZE
        if name == "from scratch":
            network, size = build.build("small_cnn", photos.CLASSES), 64
        least = least_of(name, network, size, limits)
        total = sum(stages.values())
        for stage, seconds in stages.items():
            limit = least.get(stage)
            cells = [short(seconds), f"{seconds / total:.0%}", "", ""]
            if limit:
                cells[2:] = [short(limit), short(seconds / limit)]
            rows.append(Row(f"{name}: {stage}", tuple(cells)))
    return Table(TITLE, NOTE, COLUMNS, rows)


def run(place: Path, root: Path, *words: str) -> dict[str, float]:
    """Return the seconds of each stage of a run with nothing cached."""
    run_trainer(place, f"data.root={root}", "train.batch_size=32", *words)
    result = json.loads((place / "runs/run/result.json").read_text())
    stages: dict[str, float] = result["stages"]
    return {stage: seconds for stage, seconds in stages.items() if seconds >= 0.05}


def least_of(job: str, network: Classifier, size: int, limits: Limits) -> Mapping[str, float]:
    """Return the limit of each part of a job that has one."""
    forward = flops(network, size) / limits.flops
    train, others = frozen.TRAIN, frozen.VALID
    tested = 2 * others * forward  # valid and test
    scanned = limits.scan + (train + 2 * others) * limits.decode
    least = {"start": limits.start, "scan": scanned, "package": export(network, size)}
    if job == "frozen":
        least["features"] = (VIEWS * train + others) * forward
        least["test"] = tested
        return least
    least["training"] = EPOCHS * (STEP * train + others) * forward
    means = min(train, FOR_MEANS * photos.CLASSES)  # pictures for the classes' mean features
    least["test"] = tested + means * forward
    return least


# --- the limits ---


def seconds_of(work: Callable[[], object]) -> float:
    """Return the least of three."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def start() -> float:
    command = [sys.executable, "-c", "import torch, torchvision"]
    return seconds_of(lambda: subprocess.run(command, check=True))


def scan(root: Path) -> float:
    files = [path for path in root.rglob("*") if path.is_file()]
    return seconds_of(lambda: [hashlib.sha256(path.read_bytes()) for path in files])


def decode(root: Path) -> float:
    """Return the seconds of one picture."""
    paths = sorted(root.rglob("*.jpg"))[:100]

    def work() -> None:
        for path in paths:
            with Image.open(path) as image:
                image.convert("RGB")

    return seconds_of(work) / len(paths)


def matrix_products() -> float:
    """Return the floating-point operations of one large product in float32, a second."""
    side = 2048
    one, other = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / seconds_of(lambda: one @ other)


def flops(network: Classifier, size: int) -> float:
    """Return the floating-point operations of a picture, forward."""
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.eval()(pixels)
    return float(counter.get_total_flops())


def export(network: Classifier, size: int) -> float:
    """Return the seconds of PyTorch's own export of the network."""
    pixels = (torch.zeros(2, size, size, 3, dtype=torch.uint8),)
    started = time.perf_counter()
    torch.onnx.export(network.eval(), pixels, dynamo=True, verbose=False)
    return time.perf_counter() - started
