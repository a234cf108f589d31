"""`python -m tests.trainer.settings.wiring SPECS FACTS`: tiny runs, and what each of them does.

In one process, since a start costs more than such a run. Each is the real one, from the words of
its command line to its result: all but the export of the package and the report's page, whose
contents are taken as they are handed over.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

from trainer.__main__ import train
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.distributed.world import World
from trainer.images import identity, loader
from trainer.images.augment import Augmentation
from trainer.results import early, outcome, package, report
from trainer.settings import config as settings
from trainer.settings.compose import resolve
from trainer.settings.config import Config
from trainer.training import checkpoint, loop
from trainer.training.checkpoints import Checkpoints
from trainer.training.metrics import MetricsFile
from trainer.training.run import Run
from trainer.training.training import Training

Facts = dict[str, Any]


def digest(*values: Any) -> str:
    """A few letters that tell arrays, tensors and plain values apart."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().float().numpy()
        if isinstance(value, np.ndarray):
            value = (str(value.shape), value.tobytes())
        total.update(repr(value).encode())
    return total.hexdigest()[:10]


def of_weights(network: nn.Module) -> str:
    """Tells parameters and BatchNorm's statistics apart; not what pixels are divided by."""
    state = network.state_dict().items()
    return digest(*(value for name, value in state if name not in ("mean", "std")))


def masked(text: str) -> str:
    """The text without its numbers and digests."""
    text = re.sub(r"[0-9a-f]{8,}", "*", text)
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)


class Observer:
    """Sees what a run computes, at the places where it computes it, and changes nothing."""

    def __init__(self) -> None:
        self.facts: Facts = {}
        self.run: Training | None = None  # that takes steps
        self.image = torch.empty(0)  # of the last step

    def add(self, name: str, value: Any) -> None:
        self.facts.setdefault(name, []).append(value)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look on while the context lasts."""
        step = torch.nn.modules.module
        with ExitStack() as stack:
            seen: list[tuple[Any, str, Callable[..., None]]] = [
                (World, "connected", self.see_world),
                (loader, "load", self.see_reading),
                (loader, "random_view", self.see_view),
                (Training, "resume", self.see_start),
                (loop, "train_one_step", self.see_step),
                (loop, "seed_dropout", self.see_shard),
                (torch.amp.GradScaler, "step", self.see_optimizer),
                (checkpoint.Cadence, "__init__", self.see_cadence),
                (outcome, "load_best", self.see_end),
                (MetricsFile, "append", self.see_row),
            ]
            for owner, name, see in seen:
                stack.enter_context(mock.patch.object(owner, name, before(owner, name, see)))
            instead: list[tuple[Any, str, Callable[..., object]]] = [
                (package, "build", self.see_package),
                (report, "write", self.see_report),
                (early, "check_package", lambda *given: None),
                (outcome, "revision", lambda: None),
                (Run, "write_settings", lambda run: None),
                (Checkpoints, "due", lambda self, epoch_ends=False: epoch_ends),
                (os, "fsync", lambda file: None),
            ]
            for owner, name, other in instead:
                stack.enter_context(mock.patch.object(owner, name, other))
            for hook in (
                step.register_module_forward_pre_hook(self.see_inputs),
                step.register_module_forward_hook(self.see_outputs),
            ):
                stack.callback(hook.remove)
            yield

    def see_world(self, world: World, timeout: float, stop: object) -> None:
        self.facts["patience with others"] = timeout

    def see_reading(
        self, view: Any, target: Any, batches: Any, size: int, workers: int, *_: Any
    ) -> None:
        self.facts["reading threads"] = workers

    def see_view(
        self, pixels: Any, size: int, how: str, augmentation: Augmentation, rng: object
    ) -> None:
        self.facts |= {f"view's {name}": value for name, value in vars(augmentation).items()}

    def see_cadence(self, cadence: object, minutes: float, max_cost: float) -> None:
        self.facts["minutes between checkpoints"] = minutes
        self.facts["checkpoints' cost"] = max_cost

    def see_start(self, run: Training) -> None:
        network = run.network
        convolution = next(each for each in network.modules() if isinstance(each, nn.Conv2d))
        self.facts |= {
            "pictures": {name: len(each.paths) for name, each in run.loader.folder.splits.items()},
            "first weights": of_weights(network),
            "blended": False,  # pixels of two pictures
            "head": [list(each.shape) for each in network.head.parameters()],
            "mean": (network.mean / 255).flatten().tolist(),
            "std": (network.std / 255).flatten().tolist(),
            "memory order": convolution.weight.stride(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def see_step(self, run: Training, image: torch.Tensor, target: torch.Tensor) -> None:
        self.run, self.image = run, image
        self.add("views", digest(image))
        self.add("order", target.tolist())

    def see_shard(self, device: object, seed: int, step: int, shard: int) -> None:
        self.facts["dropout's seed"] = seed
        self.facts.setdefault("shards", set()).add(shard)

    def see_inputs(self, module: nn.Module, inputs: Any) -> None:
        if self.run is None or module is not self.run.model or not module.training:
            return
        self.add("inputs", digest(inputs[0]))
        self.facts.setdefault("microbatches", set()).add(len(inputs[0]))
        if len(inputs[0]) == len(self.image):
            plain, other = self.image, self.image.flip(0)
            copied = (inputs[0] == plain) | (inputs[0] == other)
            self.facts["blended"] |= not copied.all().item()

    def see_outputs(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if self.run is not None and module is self.run.model and module.training:
            self.facts["precision"] = str(output.dtype)

    def see_optimizer(self, scaler: object, optimizer: torch.optim.Optimizer) -> None:
        assert self.run is not None
        groups = optimizer.param_groups
        self.facts["optimizer"] = type(optimizer).__name__
        self.facts["momentum"] = sorted({group.get("momentum") for group in groups}, key=str)
        self.facts["decay"] = sorted({group["weight_decay"] for group in groups})
        given = [each.grad for each in self.run.parameters() if each.grad is not None]
        norms = torch.stack([each.norm() for each in given])
        self.add("gradients", torch.linalg.vector_norm(norms).item())
        head = {id(each) for each in self.run.network.head.parameters()}
        moved = [group for group in groups if group["params"][0].requires_grad]
        for name, of_head in (("head's rates", True), ("rates", False)):
            rates = {group["lr"] for group in moved if (id(group["params"][0]) in head) == of_head}
            self.add(name, sorted(rates))

    def see_row(self, file: object, row: Facts) -> None:
        for split in ("train", "valid", "test"):
            names = [name for name in row if name.startswith(f"{split}_")]
            if names:
                self.add(f"{split}'s figures", {name: row[name] for name in names})

    def see_end(self, run: Training) -> None:
        self.facts["trained weights"] = of_weights(run.network)
        self.facts["best epoch"] = run.progress.best and run.progress.best["epoch"]
        self.facts["epochs"] = run.progress.epoch

    def see_package(
        self, network: nn.Module, contents: package.Contents, target: Path, **how: Any
    ) -> None:
        self.facts |= {
            "packaged weights": of_weights(network),
            "mirrored too": network.averages_flip,
            "preprocessing": dataclasses.asdict(contents.preprocessing),
            "calibration": contents.calibration and dataclasses.asdict(contents.calibration),
            "means": digest(contents.means),
            "pictures for int8": contents.int8 and len(contents.int8.labels),
            "int8's limit": contents.max_drop,
        }
        target.write_text("package")

    def see_report(self, contents: report.Report, path: Path, *how: Any) -> None:
        self.facts["reported"] = digest(contents.probabilities)
        self.facts["price"] = contents.dollars_hour
        path.write_text("report")


def before(owner: object, name: str, see: Callable[..., None]) -> Callable[..., Any]:
    """The function of that name, after `see` has seen what it is given."""
    function: Callable[..., Any] = getattr(owner, name)

    def seen(*given: Any, **named: Any) -> Any:
        see(*given, **named)
        return function(*given, **named)

    return seen


def observe(config: Config) -> Facts:
    """What a run of these settings does, in the directory where we are."""
    observer, lines, ends = Observer(), [], ""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    with (
        observer.watching(),
        mock.patch.object(log, "handle", lambda record: lines.append(record.getMessage())),
    ):
        try:
            train(config, World())
        except UserError as error:
            ends = str(error)
    made = [path for path in Path().rglob("*") if path.is_file() and not path.is_symlink()]
    steps = sorted({path.parent for path in made if path.parent.name.startswith("step-")})
    places = {
        "run's place": {str(path.parent) for path in made if path.name == "log.txt"},
        "checkpoints' place": {str(path.parent) for path in steps},
        "package's place": {str(path.parent) for path in made if path.name == "model.tar.gz"},
        "cache's place": {
            str(path.parent) for path in made if path.parent.name == identity.DIRECTORY
        },
        "pixels kept": any(path.stat().st_size for path in made if path.suffix == ".pixels"),
    }
    return (
        observer.facts
        | places
        | {
            "ends": ends,
            "said": {masked(line) for line in lines},
            "checkpoints": [path.name for path in steps],
            "files": {masked(path.name) for path in made if path.parent not in steps},
        }
    )


class Commands:
    """Settings of command lines that begin alike: Hydra composes their beginning once."""

    def __init__(self, begin: Sequence[str]) -> None:
        self._composed = resolve(begin).composed
        self._parser = OverridesParser.create()

    def settings(self, words: list[str]) -> Config:
        """The settings of a command line: the beginning, and these words, in Hydra's grammar."""
        composed = copy.deepcopy(self._composed)
        for each in self._parser.parse_overrides(words):
            OmegaConf.update(composed, each.key_or_group, each.value())
        return settings.load(composed)


def main() -> None:
    """Observe runs. SPECS: of all a folder with what they need, and how they begin; of each more
    words.
    """
    fixtures, begin, runs = json.loads(Path(sys.argv[1]).read_text())
    target = Path(sys.argv[2]).absolute()
    sys.argv[1:] = []
    settings.register()
    log.setLevel(logging.INFO)
    everything, commands = [], Commands(begin)
    for number, words in enumerate(runs):
        here = Path(f"{number:03d}").absolute()
        here.mkdir()
        for each in Path(fixtures).iterdir():
            (here / each.name).symlink_to(each)
        os.environ["HOME"] = str(here)
        with in_directory(here):
            everything.append(observe(commands.settings(words)))
    target.write_text(json.dumps(everything, indent=1, default=sorted))


@contextmanager
def in_directory(path: Path) -> Iterator[None]:
    back = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(back)


if __name__ == "__main__":
    main()
