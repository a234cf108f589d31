"""One process of several, as the tests start it: `python -m tests.trainer.distributed.one_of_many
ROOT SCENARIO...`. It trains as `trainer.__main__` does, from the settings to the best weights, each
scenario in turn, and writes what came out beside the run.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from trainer.common.console import to_terminal
from trainer.common.errors import Interrupted
from trainer.common.interrupt import Stop
from trainer.distributed.world import World, current_world
from trainer.images.datasets import find_images
from trainer.images.loader import Batch, Loader
from trainer.network.ema import trained_part
from trainer.results import outcome
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.training.loop import fit
from trainer.training.run import open_run
from trainer.training.training import build_network, build_training, prepare_machine

BASE = (
    "data=folder", "data.root=pictures", "data.size=16", "data.resize=18", "data.cache=none",
    "data.workers=0", "train.threads=1",
    "model=small_cnn",
    "train.batch_size=11", "train.epochs=2", "train.ema_decay=0.9", "train.clip_norm=1",
    "optim.head_lr=3e-3", "optim.warmup_epochs=1",
    "platform=local", "platform.cache=cache", "train.timeout_seconds=60",
)  # fmt: skip
EXACT = (
    "train.exact_shards=4", "data.augment.mixup=0.4", "data.augment.cutmix=1",
    "model.unfreeze_epochs=1", "train.imbalance=sampler",
)  # fmt: skip


class StopAt:
    """Batches that ask one process to stop when it has read a certain number of them."""

    def __init__(self, batches: Loader, stop: Stop, at: int) -> None:
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


def train(world: World, stop_at: int | None, scenario: str, *overrides: str) -> dict[str, Any]:
    """stop_at: batches of rank 1 (or of the only process) until it is asked to stop."""
    dropout, groups, words = SCENARIOS[scenario]
    config = compose([*BASE, *words, *overrides])
    with open_run(config, world, Stop()) as run:
        images = find_images(config)
        network = build_network(run, images, prepare_machine(config, world))
        if dropout:
            network.head = nn.Sequential(nn.Dropout(dropout), network.head)
        if groups:
            norm_by_groups(network)
        training = build_training(run, images, network=network)
        if stop_at is not None and world.rank == min(1, world.size - 1):
            training.data = StopAt(training.data, run.stop, stop_at)  # type: ignore[assignment]
        try:
            fit(training)
        except Interrupted as reason:
            return {"interrupted": str(reason), "step": training.progress.step}
        tested = outcome.test(training)
        part = trained_part(training.model)
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        return {
            "test": {f"test_{name}": value for name, value in tested.metrics.items()},
            "step": training.progress.step,
            "bytes": sum(4 * parameter.numel() for parameter in trained),  # of the gradients
        }


SCENARIOS: dict[str, tuple[float, bool, tuple[str, ...]]] = {
    "exact": (0.3, False, EXACT),
    "chain": (0.3, False, EXACT),
    "fast": (0.3, False, ("data.augment.mixup=0.4",)),
    "plain": (0.0, True, ("train.accumulate=2", "model.unfreeze_epochs=1")),
    "frozen": (0.0, False, ("model.freeze=backbone", "model.cached_views=2")),
}


def main() -> None:
    here, names = current_world(), sys.argv[1:]
    settings.register()
    to_terminal()
    config = compose(BASE)
    here.share_config(config if here.is_main_process else None, Stop())
    with here.connected(60, Stop()):
        for name in names:
            scenario, _, rest = name.partition(":")  # NAME[:RUN[:STOP_AT]]
            run, _, stop_at = rest.partition(":")
            run = run or f"{scenario}-{here.size}"
            came = train(here, int(stop_at) if stop_at else None, scenario, f"name={run}")
            if here.is_main_process:
                Path("runs", run, f"outcome-{here.size}.json").write_text(json.dumps(came))


if __name__ == "__main__":
    main()
