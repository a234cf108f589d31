"""Small trainings for the tests, built by the function that builds every training."""

import copy
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.images.augment import Augmentation
from trainer.images.decode import Preprocessing
from trainer.images.folder import scan
from trainer.images.loader import ImageLoader, Loader
from trainer.network import device
from trainer.network.build import Classifier, build
from trainer.settings.config import Config
from trainer.training.run import Run
from trainer.training.training import Training, build_training

# Saved whenever it may be.
SAVED_OFTEN = ("checkpoint.minutes=1e-9", "checkpoint.max_cost=1.0")
# Of a row of metrics.jsonl: not part of the result.
TIMES = ("seconds", "data_wait", "evaluate_seconds")


def make_loader(pictures: Path, workers: int = 0) -> ImageLoader:
    """Random views of the test images of 16 px: three training batches and two of valid."""
    folder = scan({split: str(pictures / split) for split in ("train", "valid", "test")}, 0.2)
    return ImageLoader(
        folder,
        Preprocessing(18, 16, "bilinear"),
        Augmentation(
            (0.3, 1.0),
            (0.75, 1.33),
            True,
            True,
            vertical_flip=True,
            rotation=5,
            jitter=(0.1, 0.1, 0.1, 0.02),
            randaugment=1,
            magnitude=5,
            erasing=0.2,
        ),
        batch_size=8,
        seed=7,
        workers=workers,
        balanced=True,
    )


def make_network(dropout: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    network = build("small_cnn", 3)
    if dropout:
        network.head = nn.Sequential(nn.Dropout(dropout), network.head)
    return network


def make_run(root: Path, config: Config) -> Run:
    root.mkdir(exist_ok=True)
    if config.optim.warmup_epochs is None:  # which a whole run takes from its pictures
        config.optim.warmup_epochs = 1.0
    package = root / "model.tar.gz"
    return Run(config, World(), Stop(), "run", root, root / "checkpoints", package)


def open_training(
    root: Path,
    config: Config,
    loader: ImageLoader,
    network: Classifier | None = None,
    data: Loader | None = None,
    precision: torch.dtype = torch.float32,
) -> Training:
    """Build the training that lies in `root`, or resume it. precision: float16 too, as no setting
    allows on a CPU.
    """
    run = make_run(root, config)
    with mock.patch.object(device, "choose_precision", return_value=precision):
        return build_training(
            run, loader.folder, network=network or make_network(), loader=loader, data=data
        )


def outcome(training: Training) -> dict[str, Any]:
    """What came out, without what tells of time: the state, the rows and where it stands."""
    state = copy.deepcopy(training.state())
    progress = dataclasses.asdict(training.progress)
    rows = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in training.metrics_file.rows
    ]
    kept = {key: progress[key] for key in ("epoch", "batch", "step", "best")}
    return state | {"rows": rows, "progress": kept}
