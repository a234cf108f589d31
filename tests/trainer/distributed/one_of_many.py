"""One process of several, as the tests start it: `python -m tests.trainer.distributed.one_of_many ROOT SCENARIO...`. It trains as `trainer.__main__` does, from
the settings to the best weights, each scenario in turn, and writes what came out beside the run.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.common.console import to_terminal
from trainer.common.errors import Interrupted
from trainer.common.interrupt import Stop
from trainer.distributed.job import World, world
from trainer.images.datasets import find_images
from trainer.images.loader import Batch, Batches
from trainer.network.build import Classifier
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.training import metrics, stages
from trainer.training.loop import evaluate, fit
from trainer.training.run import open_run

BASE = (
    "data=folder", "data.root=pictures", "data.size=16", "data.resize=18", "data.cache=none", "data.workers=0", "train.threads=1",
    "model=small_cnn",
    "train.batch_size=11", "train.epochs=3", "train.ema_decay=0.9", "train.clip_norm=1", "optim.head_lr=3e-3",
    "platform=local", "platform.cache=cache", "train.timeout_seconds=60",
)  # fmt: skip
EXACT = ("train.exact_shards=4", "data.augment.mixup=0.4", "data.augment.cutmix=1")


class StopAt:
    """Batches that ask one process to stop when it has read a certain number of them."""

    def __init__(self, batches: Batches, stop: Stop, at: int) -> None:
        self._batches, self._stop, self._left = batches, stop, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._left -= 1
            if self._left == 0:
                self._stop.ask("the test")
            yield batch

    def train_batches(self, epoch: int, first: int = 0) -> Any:
        yield from self._counted(self._batches.train_batches(epoch, first))

    def eval_batches(self, name: str) -> Any:
        yield from self._counted(self._batches.eval_batches(name))


def norm_by_groups(network: nn.Module) -> None:
    """In the place of BatchNorm, whose statistics are those of a process."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            network.set_submodule(name, nn.GroupNorm(8, layer.num_features))


def train(
    world: World, stop_at: int | None, dropout: float, groups: bool, *overrides: str
) -> dict[str, Any]:
    """stop_at: batches of rank 1 (or of the only process) until it is asked to stop."""
    config = compose([*BASE, *overrides])
    stop = Stop()
    with open_run(config, world) as run:
        found = find_images(config)
        machine = stages.prepare_machine(config, world)
        network = stages.make_network(config, found, machine, world)
        if dropout:
            network.head = nn.Sequential(nn.Dropout(dropout), network.head)
        if groups:
            norm_by_groups(network)
        found, read = stages.read_pictures(config, found, run, stop, world)
        feed = stages.make_loader(config, found, read, machine, world)
        batches = stages.cache_features(config, network, feed, machine, stop, world)
        learner = stages.make_learner(config, network, batches, machine, world)
        checkpoints, progress = stages.resume(
            config, run, learner, stages.make_ledger(config, run, world), found, machine, world
        )
        if stop_at is not None and world.rank == min(1, world.size - 1):
            batches = StopAt(batches, stop, stop_at)  # type: ignore[assignment]
        try:
            fit(learner, batches, config, progress, checkpoints.ledger, checkpoints, stop)
        except Interrupted as reason:
            return {"interrupted": str(reason), "step": progress.step}
        stages.load_best(learner, batches, progress, checkpoints, stop, world)
        logits, labels = evaluate(
            network, feed.eval_batches("test"), torch.device("cpu"), torch.float32, stop, world
        )
        return {
            "test": metrics.classification(logits, labels, "test")
            if world.is_main_process
            else None,
            "step": progress.step,
            "bytes": sent(learner),
        }


def sent(learner: Any) -> int:
    """Bytes of the gradients that are exchanged in a step."""
    part = (
        learner.network.head
        if isinstance(learner.network, Classifier) and learner.network.frozen
        else learner.network
    )
    return sum(4 * parameter.numel() for parameter in part.parameters() if parameter.requires_grad)


SCENARIOS: dict[str, tuple[float, bool, tuple[str, ...]]] = {
    "exact": (0.3, False, EXACT),
    "chain": (0.3, False, EXACT),
    "fast": (0.3, False, ("data.augment.mixup=0.4",)),
    "plain": (0.0, True, ("train.accumulate=2",)),
    "fp16": (0.0, True, ("train.compression=fp16",)),
    "frozen": (0.0, False, ("model.freeze=backbone", "model.cached_views=2")),
}


def main() -> None:
    here, names = world(), sys.argv[1:]
    settings.register()
    to_terminal()
    config = compose(BASE)
    here.share_config(config if here.is_main_process else None)
    with here.connected(60, Stop()):
        for name in names:
            scenario, _, rest = name.partition(":")  # NAME[:RUN[:STOP_AT]]
            run, _, stop_at = rest.partition(":")
            dropout, groups, overrides = SCENARIOS[scenario]
            run = run or f"{scenario}-{here.size}"
            came = train(
                here, int(stop_at) if stop_at else None, dropout, groups, *overrides, f"name={run}"
            )
            if here.is_main_process:
                Path("runs", run, f"outcome-{here.size}.json").write_text(json.dumps(came))


if __name__ == "__main__":
    main()
