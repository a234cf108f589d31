"""What a sweep of heads costs: 16 trials against one, against the naive way, and in batches."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from tests.benchmarks import photos
from tests.benchmarks.measure import Work, paired, ratio
from tests.benchmarks.table import Row, Table
from trainer.common.interrupt import Stop
from trainer.images.folder import Split
from trainer.images.loader import ImageLoader
from trainer.network import build as model
from trainer.network import device, optim
from trainer.network.features import FeatureLoader
from trainer.settings import config
from trainer.sweep import heads
from trainer.training import checkpoint, metrics
from trainer.training.loop import Checkpoints, Learner, Progress, train_epoch

TITLE = "Sweep"
PROJECT = Path(__file__).parents[2]
TRIALS, EPOCHS = 16, 10
PHOTOS = 185  # as many as pets37 has
# An image folder in the place of the benchmarks' own photos, and a state dict in the place of
# random weights.
DATA, WEIGHTS = (
    os.environ.get("PACKHORSE_BENCH_DATA"),
    os.environ.get("PACKHORSE_BENCH_WEIGHTS", "null"),
)
NOTE = f"""{TRIALS} trials (4 learning rates x 4 weight decays, {EPOCHS} epochs) of a head on a
frozen MobileNetV2 at 224 px: whole processes as a user starts them, each with empty caches. The
sweep, with the model package and report of its best trial, is held against one run of one trial
with cached features; the naive way is {TRIALS} runs without caches, taken as one such run times
{TRIALS}. Below them the epochs alone, in one process: {TRIALS} heads, 2048 features, 133 classes,
1,000 pictures, batch 64, AdamW with a moving average; the trainer's own loop taking one head after
the other against one pass for all of them, in CPU time."""


def measure(scratch: Path, rounds: int) -> Table:
    data = Path(DATA) if DATA else photos.write(scratch / "photos", PHOTOS, 256, 192)
    one, sweep, naive = "one trial, cached", "16 trials, one sweep", "16 trials, the naive way"
    contenders = {
        one: run(data, scratch, "one"),
        sweep: run(data, scratch, "sweep", "-m", "sweep=head"),
    }
    contenders[naive] = run(data, scratch, "naive", "model.cached_views=null", "data.cache=none")
    walls = {
        name: [cost.wall for cost in values]
        for name, values in paired(contenders, max(rounds // 2, 1), warm_up=False).items()
    }
    walls[naive] = [TRIALS * wall for wall in walls[naive]]
    shares = {name: ratio(values, walls[one]) for name, values in walls.items()}
    targets = {sweep: ("at most 1.5x", shares[sweep].median <= 1.5)}
    rows = [
        Row(name, (str(shares[name]), f"{median(values):.1f} s"), *targets.get(name, ()))
        for name, values in walls.items()
    ]

    epochs = {
        "heads, together": together(scratch),
        "heads, one after the other": one_by_one(scratch),
    }
    costs = {
        name: [cost.cpu for cost in values] for name, values in paired(epochs, 2 * rounds).items()
    }
    dearer = ratio(costs["heads, one after the other"], costs["heads, together"])
    shown = {
        "heads, together": ("1", "", None),
        "heads, one after the other": (str(dearer), "at least 1.4x", dearer.median >= 1.4),
    }
    for name, (cell, target, met) in shown.items():
        rows.append(
            Row(
                name,
                (cell, f"{1000 * median(costs[name]):.1f} ms per trial and epoch"),
                target,
                met,
            )
        )
    return Table(TITLE, NOTE, ("cost, as a multiple", "time"), rows)


def run(data: Path, scratch: Path, name: str, *overrides: str) -> Work:
    """A whole process, from an empty cache."""
    count = iter(range(1000))

    def work() -> int:
        where = scratch / f"{name}-{next(count)}"
        where.mkdir()
        command = [
            sys.executable,
            "-m",
            "trainer",
            *overrides,
            "data=folder",
            f"data.root={data}",
            "platform=local",
            "platform.runs=runs",
        ]
        command += [
            "model=mobilenet_v2",
            f"model.weights={WEIGHTS}",
            "model.freeze=backbone",
            f"platform.cache={where / 'cache'}",
        ]
        command += [f"train.epochs={EPOCHS}", "train.batch_size=16"]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        with (where / "log").open("wb") as log:
            subprocess.run(
                command,
                cwd=where,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        return 1

    return work


# --- the epochs alone ---

PICTURES, FEATURES, CLASSES, BATCH = 1000, 2048, 133, 64


def features() -> FeatureLoader:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, PICTURES)
    splits = {
        name: Split(paths=tuple(map(str, range(PICTURES))), labels=labels)
        for name in ("train", "valid")
    }
    folder = dataclasses.make_dataclass("Folder", ["splits", "classes"])(
        splits, tuple(map(str, range(CLASSES)))
    )
    feed = ImageLoader(folder, None, None, BATCH, 0, 0)  # type: ignore[arg-type]  # neither pictures nor views are looked at
    values = rng.standard_normal((PICTURES, FEATURES), dtype=np.float32)
    return FeatureLoader(feed, (values,), values)


def configurations() -> dict[int, config.Config]:
    config.register()
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        pairs = [
            (lr, decay)
            for lr in ("1e-4", "1e-3", "1e-2", "1e-1")
            for decay in ("1e-4", "1e-3", "1e-2", "1e-1")
        ]
        return {
            number: config.load(
                compose(
                    "config",
                    [f"optim.lr={lr}", f"optim.weight_decay={decay}", "train.epochs=1000000"],
                )
            )
            for number, (lr, decay) in enumerate(pairs)
        }


def classifier() -> model.Classifier:
    torch.manual_seed(0)
    return model.Classifier(
        nn.Identity(), nn.Linear(FEATURES, CLASSES), (0.5,) * 3, (0.5,) * 3, frozen=True
    )


def one_by_one(scratch: Path) -> Work:
    feed, epochs = features(), []
    for number, settings in configurations().items():
        epochs.append(alone(scratch / f"alone-{number}", settings, feed))

    def work() -> int:
        for epoch in epochs:
            epoch()
        return len(epochs)

    return work


def alone(scratch: Path, settings: config.Config, feed: FeatureLoader) -> Callable[[], None]:
    network, choice = classifier(), settings.optim
    optimizer = optim.build(
        network,
        choice.name,
        lr=choice.lr,
        head_lr=choice.head_lr,
        weight_decay=choice.weight_decay,
        momentum=choice.momentum,
    )
    learner = Learner(
        network.head, optimizer, torch.device("cpu"), torch.float32, settings.train.ema_decay
    )
    scratch.mkdir()
    checkpoints = Checkpoints(
        scratch, checkpoint.Cadence(10, 0.02), 2, metrics.Ledger(scratch / "metrics.jsonl"), {}
    )
    progress, stop = Progress(), Stop()

    def epoch() -> None:
        progress.batch, progress.sums = 0, [0.0, 0.0, 0.0]
        train_epoch(learner, feed, settings, progress, checkpoints, stop)

    return epoch


def together(scratch: Path) -> Work:
    feed, settings = features(), configurations()
    for number in settings:
        (scratch / f"{number:04d}").mkdir()
    group = heads.Group(
        settings, scratch, classifier(), device.Machine(torch.device("cpu"), torch.float32)
    )

    def work() -> int:
        group.progress.batch = 0
        heads.train_epoch(group, feed, Stop())
        return len(settings)

    return work
