"""What the training loop costs over a bare one: the same network, optimizer, loss and pixels."""

import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.measure import Work, apart, ratio, short
from tests.benchmarks.table import Row, Table, installed
from tests.trainer.trainings import make_run
from trainer.images.augment import Augmentation
from trainer.images.decode import Preprocessing
from trainer.images.folder import ImageFolder, Split
from trainer.images.loader import Batch, ImageLoader
from trainer.images.sampler import Share
from trainer.network import build as model
from trainer.network import optim
from trainer.settings import config
from trainer.settings.compose import compose
from trainer.settings.config import Config
from trainer.training.loop import train_one_epoch
from trainer.training.run import Run
from trainer.training.training import Training, build_training

TITLE = "Loop"
CLASSES = 10
SETTINGS = {
    "lr": 0.01,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "nesterov": True,
    "fused": True,
}  # of SGD
NOTE = """Images per second of one epoch of the training loop, without evaluation, against a bare
hand-written loop, each in processes of its own, which take turns: the same network with the
normalisation of pixels in it, the same fused SGD (biases and BatchNorm don't decay), the same loss
with label smoothing, the same batches, which are in memory. No clipping, and a moving average of
the weights only where it says so. The bare loop keeps no statistics, has no schedule, and can't be
stopped, saved or repeated; ours sets PyTorch up as it does for a run."""

SIZES = {
    "tiny": ("tiny net, 32 px, batch 8", 32, 8, 300, 0.99),
    "resnet18": ("ResNet-18, 64 px, batch 32", 64, 32, 6, 1.0),
}
AVERAGED = "bare loop, with a moving average", "ours, with a moving average"
AVERAGED_TARGET = 0.95
DECAY = 0.999


def measure(scratch: Path, rounds: int) -> Table:
    rows: list[Row] = []
    missing = [peer for peer in PEERS if not installed(peer)]
    peers = {peer: make for peer, make in PEERS.items() if peer not in missing}
    for network, (title, size, batch_size, steps, target) in SIZES.items():
        contenders = {"bare loop": bare, "ours": ours} | peers
        if network == "tiny":
            contenders |= {AVERAGED[0]: bare_with_average, AVERAGED[1]: ours_with_average}
        costs: dict[str, list[float]] = {contender: [] for contender in contenders}
        for number in range(3 * rounds):
            # In turn forwards and backwards: what the machine does meanwhile should not fall on the
            # same one each time.
            for contender, make in list(contenders.items())[:: 1 if number % 2 else -1]:
                costs[contender].append(
                    apart(prepared, make, network, size, batch_size, steps).wall
                )
                print(
                    f"\r  {title}: round {number + 1}/{3 * rounds}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
        print(file=sys.stderr)
        targets = {"ours": target, AVERAGED[1]: AVERAGED_TARGET}
        for contender, walls in costs.items():
            averaged = contender in AVERAGED
            speed = ratio(costs[AVERAGED[0] if averaged else "bare loop"], walls)
            wanted = targets.get(contender)
            met = speed.median >= wanted if wanted else None
            cells = (
                str(speed),
                short(1 / median(walls)),
                f"{1000 * batch_size * median(walls):.3f}",
            )
            rows.append(
                Row(
                    f"{title}: {contender}",
                    cells,
                    f"{wanted:g}x" if wanted else "",
                    met,
                )
            )
    return Table(
        TITLE,
        NOTE,
        ("throughput", "images/s", "ms per step"),
        rows,
        ("lightning", "accelerate"),
        missing,
    )


def prepared(
    make: Callable[[model.Classifier, list[Batch]], Work],
    name: str,
    size: int,
    batch_size: int,
    steps: int,
) -> Work:
    network = tiny() if name == "tiny" else model.build(name, CLASSES)
    return make(network, make_batches(size, batch_size, steps))


def tiny() -> model.Classifier:
    torch.manual_seed(0)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    backbone = nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return model.Classifier(backbone, nn.Linear(64, CLASSES), (0.5,) * 3, (0.5,) * 3).to(
        memory_format=torch.channels_last
    )


def make_batches(size: int, batch_size: int, count: int) -> list[Batch]:
    torch.manual_seed(0)
    return [
        Batch(
            torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8),
            torch.randint(0, CLASSES, (batch_size,)),
        )
        for _ in range(count)
    ]


# --- the contenders: each does one epoch and returns how many images it saw ---


def images(batches: list[Batch]) -> int:
    return sum(len(batch.target) for batch in batches)


def sgd(network: model.Classifier) -> torch.optim.Optimizer:
    """With the recipe's two groups: biases and BatchNorm have no weight decay."""
    return torch.optim.SGD(
        optim.parameter_groups(network, SETTINGS["lr"], SETTINGS["lr"], SETTINGS["weight_decay"]),
        **SETTINGS,
    )


def bare(
    network: model.Classifier, batches: list[Batch], after: Callable[[], None] = lambda: None
) -> Work:
    optimizer = sgd(network)

    def epoch() -> int:
        network.train()
        for pixels, labels in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(pixels), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            after()
        return images(batches)

    return epoch


def bare_with_average(network: model.Classifier, batches: list[Batch]) -> Work:
    """With the average of weights and floating buffers, in one call for all of them."""
    weights = [each for each in network.state_dict().values() if each.is_floating_point()]
    averages = [each.clone() for each in weights]
    return bare(network, batches, lambda: torch._foreach_lerp_(averages, weights, 1 - DECAY))


@dataclass(frozen=True)
class InMemory:
    """As `loader.ImageLoader`: this process's batches, which are there already."""

    batches: list[Batch]
    share: Share
    holds_features: bool = False
    classes: int = CLASSES

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches)

    @property
    def global_batch_size(self) -> int:
        return len(self.batches[0].target) * self.share.size

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        yield from self.batches[first:]

    def eval_batches(self, name: str) -> Generator[Batch, None, None]:
        yield from self.batches


def compose_settings(*overrides: str) -> Config:
    """Return the settings of a training whose epochs are timed: all alike, and without an end."""
    config.register()
    fixed = ["optim=sgd", "optim.lr=0.01", "optim.weight_decay=1e-4", "optim.momentum=0.9"]
    fixed += ["optim.schedule=constant", "optim.warmup_epochs=1", "train.epochs=1000000"]
    fixed += ["train.ema_decay=null", "train.device=cpu", "train.precision=fp32"]
    return compose([*fixed, *overrides])


def open_in_memory(run: Run, network: model.Classifier, data: InMemory) -> Training:
    """Build a training on batches from memory, by the function that builds every training."""
    # A data set is known by its pictures; this one is never opened.
    train = Split(("in memory",), np.zeros(1, np.int64))
    classes = tuple(map(str, range(data.classes)))
    folder = ImageFolder(classes, {"train": train}, (), digests={"in memory": ""})
    size = data.batches[0].image.shape[1]
    loader = ImageLoader(
        folder,
        Preprocessing(size, size, "bilinear"),
        Augmentation((1.0, 1.0), (1.0, 1.0), False, False),
        batch_size=data.global_batch_size,
        seed=run.config.seed,
        workers=0,
    )
    return build_training(run, folder, network=network, loader=loader, data=data)


def train_epoch_again(training: Training) -> None:
    """Train the epoch in which the training stands, from its beginning."""
    training.progress.batch, training.progress.sums = 0, [0.0, 0.0, 0.0]
    train_one_epoch(training)


def ours(network: model.Classifier, batches: list[Batch], *overrides: str) -> Work:
    root = Path(tempfile.mkdtemp(prefix="packhorse-loop-"))
    training = open_in_memory(
        make_run(root, compose_settings(*overrides)), network, InMemory(batches, Share())
    )

    def epoch() -> int:
        train_epoch_again(training)
        return images(batches)

    return epoch


def ours_with_average(network: model.Classifier, batches: list[Batch]) -> Work:
    return ours(network, batches, f"train.ema_decay={DECAY}")


def accelerate_loop(network: model.Classifier, batches: list[Batch]) -> Work:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    network, optimizer, loader = accelerator.prepare(
        network, sgd(network), DataLoader(batches, batch_size=None)
    )

    def epoch() -> int:
        network.train()
        for pixels, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(
                functional.cross_entropy(network(pixels), labels, label_smoothing=0.1)
            )
            optimizer.step()
        return images(batches)

    return epoch


def lightning_loop(network: model.Classifier, batches: list[Batch]) -> Work:
    """Lightning without its logger, checkpoints, progress bar and summary."""
    import logging
    import warnings

    import lightning
    from torch.utils.data import DataLoader

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            pixels, labels = batch
            return functional.cross_entropy(self.network(pixels), labels, label_smoothing=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.network)

    off = dict.fromkeys(
        (
            "logger",
            "enable_checkpointing",
            "enable_progress_bar",
            "enable_model_summary",
            "barebones",
        ),
        False,
    )
    module, loader = Module(), DataLoader(batches, batch_size=None)

    def epoch() -> int:
        lightning.Trainer(accelerator="cpu", max_epochs=1, **off).fit(module, loader)
        return images(batches)

    return epoch


PEERS: dict[str, Callable[[model.Classifier, list[Batch]], Work]] = {
    "accelerate": accelerate_loop,
    "lightning": lightning_loop,
}
