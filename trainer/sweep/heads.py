"""Heads on the same cached features, trained together: `python -m trainer.sweep.heads SWEEP NUMBER...`, as the sweep's driver starts it.

Trials that differ in nothing but `optim.*` see the same views in the same order, so one matrix product serves all of their heads, forwards and
backwards. Each head has its own optimizer, learning rate and gradient scaler, so its weights are those that it gets when it is trained alone, up to
the rounding of the matrix products. Other trials (another seed, another batch size) make another group, trained after it in the same process.
"""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional

from trainer.__main__ import guarded
from trainer.common import files
from trainer.common.console import log, to_terminal
from trainer.common.interrupt import Stop, on_signals
from trainer.images.datasets import find_images
from trainer.images.loader import Batches
from trainer.network import optim, weights
from trainer.network.build import Classifier
from trainer.network.ema import ModelEma
from trainer.settings import config as settings
from trainer.settings.config import Config, identity, metric_line
from trainer.sweep.driver import locked
from trainer.training import checkpoint, metrics, stages
from trainer.training.loop import autocast, lr_factor
from trainer.training.run import Run, check_identity


class Heads(nn.Module):
    """K heads with the layers of `head` (linear ones, with ReLU between them), their weights in one tensor a layer. All begin as `head` is."""

    def __init__(self, head: nn.Module, count: int) -> None:
        super().__init__()
        self.count = count
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        self.weights = nn.ParameterList(
            layer.weight.detach().expand(count, -1, -1).clone() for layer in layers
        )  # [K, out, in]
        self.biases = nn.ParameterList(
            layer.bias.detach().expand(count, -1).clone() for layer in layers
        )  # [K, out]

    def forward(self, features: Tensor) -> Tensor:
        """[N, features] to logits [N, K, classes]."""
        # All heads take the same input, so their first layers are one; those after it are a batch of products.
        hidden: Tensor = functional.linear(
            features, self.weights[0].flatten(0, 1), self.biases[0].flatten()
        )
        hidden = hidden.view(len(features), self.count, -1)
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            inputs = hidden.relu().transpose(0, 1)
            hidden = torch.baddbmm(
                bias[:, None].to(inputs.dtype), inputs, weight.transpose(1, 2)
            ).transpose(0, 1)
        return hidden

    def one(self, network: Classifier, number: int) -> Classifier:
        """The network with head `number`, whose parameters are the memory of these."""
        single = copy.deepcopy(network, {id(network.backbone): network.backbone})
        layers = [layer for layer in single.head.modules() if isinstance(layer, nn.Linear)]
        for layer, weight, bias in zip(layers, self.weights, self.biases, strict=True):
            layer.weight.data, layer.bias.data = weight.data[number], bias.data[number]
        return single


@dataclass
class Member:
    """One trial of a group."""

    number: int
    config: Config
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    parameters: list[Tensor]  # of its head, in the order of `Heads.parameters`
    ledger: metrics.Ledger
    best: dict[str, Any] | None = None  # epoch and value by train.monitor
    failed: str = ""

    def active(self, epoch: int) -> bool:
        """Whether it is still being trained after `epoch` epochs."""
        patience = self.config.train.patience
        return not self.failed and not (
            patience and epoch - (self.best["epoch"] if self.best else 0) >= patience
        )


@dataclass
class Progress:
    """Where a group is."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    members: dict[str, Any] = field(default_factory=dict)


class Group:
    """Trials that are trained in one pass, with what a checkpoint of theirs holds."""

    def __init__(
        self, configs: dict[int, Config], directory: Path, network: Classifier, machine: Any
    ) -> None:
        first = next(iter(configs.values()))
        self.train, self.device, self.precision = first.train, machine.device, machine.precision
        self.heads = Heads(network.head, len(configs)).to(machine.device)
        self.average = (
            ModelEma(self.heads, self.train.ema_decay) if self.train.ema_decay is not None else None
        )
        self.members = []
        for place, (number, config) in enumerate(configs.items()):
            single, choice = self.heads.one(network, place), config.optim
            assert choice.lr is not None
            optimizer = optim.build(
                single,
                choice.name,
                lr=choice.lr,
                head_lr=choice.head_lr,
                weight_decay=choice.weight_decay,
                momentum=choice.momentum,
            )
            layers = [layer for layer in single.head.modules() if isinstance(layer, nn.Linear)]
            parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]
            scaler = torch.amp.GradScaler(
                machine.device.type, enabled=machine.precision == torch.float16
            )
            ledger = metrics.Ledger(directory / f"{number:04d}" / "metrics.jsonl")
            self.members.append(Member(number, config, optimizer, scaler, parameters, ledger))
        self.progress = Progress()
        self.set_sums(None)

    def set_sums(self, saved: dict[str, Tensor] | None) -> None:
        """Of the running epoch: each head's summed loss and right pictures, and how many pictures there were."""
        zeros = torch.zeros(len(self.members), dtype=torch.float64)
        self.loss_sum, self.right = (
            saved[name] if saved else zeros.clone() for name in ("loss_sum", "right")
        )
        self.loss_sum, self.right = self.loss_sum.to(self.device), self.right.to(self.device)
        self.pictures = int(saved["pictures"]) if saved else 0

    def state(self) -> dict[str, Any]:
        self.progress.members = {
            str(member.number): {
                "rows": member.ledger.rows,
                "best": member.best,
                "failed": member.failed,
            }
            for member in self.members
        }
        return {
            "progress": dataclasses.asdict(self.progress),
            "sums": {
                "loss_sum": self.loss_sum,
                "right": self.right,
                "pictures": torch.tensor(self.pictures),
            },
            "heads": self.heads.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "members": {
                str(member.number): {
                    "optimizer": {
                        str(key): value
                        for key, value in member.optimizer.state_dict()["state"].items()
                    },
                    "scaler": member.scaler.state_dict(),
                }
                for member in self.members
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.set_sums(state["sums"])
        self.heads.load_state_dict(state["heads"])
        if self.average:
            self.average.network.load_state_dict(state["average"])
        for member in self.members:
            saved, known = (
                state["members"][str(member.number)],
                self.progress.members[str(member.number)],
            )
            groups = member.optimizer.state_dict()["param_groups"]
            member.optimizer.load_state_dict(
                {
                    "state": {int(key): value for key, value in saved["optimizer"].items()},
                    "param_groups": groups,
                }
            )
            member.scaler.load_state_dict(saved["scaler"])
            member.best, member.failed = known["best"], known["failed"]


def train_step(group: Group, features: Tensor, labels: Tensor, steps_per_epoch: int) -> None:
    """One step of every head on one batch: features [N, features], labels [N]. What `loop.train_step` does for one network."""
    count, train = len(labels), group.train
    with autocast(group.device, group.precision):
        logits = group.heads(features).float()
    repeated = labels[:, None].expand(-1, len(group.members))
    losses = functional.cross_entropy(
        logits.flatten(0, 1),
        repeated.flatten(),
        label_smoothing=train.label_smoothing,
        reduction="none",
    )
    losses = losses.view_as(repeated).sum(0)
    # Each head's gradient depends on its own loss alone, so one backward pass through their sum gives them all.
    scaled = torch.stack(
        [
            member.scaler.scale(loss / count)
            for member, loss in zip(group.members, losses, strict=True)
        ]
    )
    # Contiguous: a hidden layer's comes transposed, and the fused optimizers pair it with the weights element by element as they lie in memory.
    gradients = [
        gradient.contiguous()
        for gradient in torch.autograd.grad(scaled.sum(), list(group.heads.parameters()))
    ]
    for parts, *parameters in zip(
        map(torch.unbind, gradients), *(member.parameters for member in group.members), strict=True
    ):
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part
    for member in group.members:
        optim.set_lr(
            member.optimizer, lr_factor(member.config, group.progress.step, steps_per_epoch)
        )
        if train.clip_norm is not None:
            member.scaler.unscale_(member.optimizer)
            nn.utils.clip_grad_norm_(member.parameters, train.clip_norm)
        member.scaler.step(member.optimizer)
        member.scaler.update()
    group.loss_sum += losses.detach()
    group.right += (logits.detach().argmax(2) == repeated).sum(0)
    group.pictures += count
    group.progress.batch += 1
    group.progress.step += 1
    if group.average:
        group.average.update(group.progress.step)


def train_epoch(group: Group, batches: Batches, stop: Stop) -> None:
    """The rest of the epoch that runs; ends early when asked to stop."""
    for features, labels in batches.train_batches(group.progress.epoch, group.progress.batch):
        if stop.reason:
            return
        train_step(
            group, features.to(group.device), labels.to(group.device), batches.steps_per_epoch
        )


@torch.inference_mode()
def evaluate(group: Group, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits [N, K, classes] and labels [N] of valid, on the CPU."""
    heads = group.average.network if group.average else group.heads
    logits, labels = [], []
    for features, wanted in batches.eval_batches("valid"):
        with autocast(group.device, group.precision):
            logits.append(heads(features.to(group.device)).float())
        labels.append(wanted)
    return torch.cat(logits).cpu(), torch.cat(labels)


def end_epoch(group: Group, batches: Batches) -> None:
    """A row for each trial that is still being trained; one whose loss is no longer finite has failed."""
    progress, epoch = group.progress, group.progress.epoch + 1
    logits, labels = evaluate(group, batches)
    for place, member in enumerate(group.members):
        if not member.active(progress.epoch):
            continue
        loss = group.loss_sum[place].item()
        if not math.isfinite(loss):
            lr = member.config.optim.lr
            member.failed = f"the loss is {loss} in epoch {epoch}: training diverged; lower optim.lr (now {lr}), or set train.clip_norm=1"
            continue
        row = {
            "epoch": epoch,
            "step": progress.step,
            "lr": member.optimizer.param_groups[-1]["lr"],
            "train_loss": loss / group.pictures,
            "train_top1": group.right[place].item() / group.pictures,
            **metrics.classification(logits[:, place], labels, "valid"),
        }
        member.ledger.append(row)
        monitor = group.train.monitor
        if metrics.better(row[monitor], member.best["value"] if member.best else None, monitor):
            member.best = {"epoch": epoch, "value": row[monitor]}
        log.info("trial %d %s", member.number, metric_line(row))
    progress.epoch, progress.batch = epoch, 0
    group.set_sums(None)


def train_group(
    group: Group, batches: Batches, root: Path, fingerprint: str, stop: Stop
) -> dict[int, dict[str, Any]]:
    """Train the group from its newest checkpoint in `root` to the end; return each trial's outcome.

    fingerprint: of the pictures. Raises Interrupted, with the state saved, and UserError where the
    checkpoint is one of other settings or pictures.
    """
    facts = {
        str(member.number): identity(member.config) | {"pictures": fingerprint}
        for member in group.members
    }
    cadence = checkpoint.Cadence(
        group.members[0].config.checkpoint.minutes, group.members[0].config.checkpoint.max_cost
    )
    good: set[str] = set()

    def save() -> None:
        began = time.monotonic()
        name = checkpoint.step_name(group.progress.step, evaluated=group.progress.batch == 0)
        checkpoint.save(root, name, {"facts": facts} | group.state())
        good.add(name)
        checkpoint.prune(root, 2, good)
        cadence.saved(time.monotonic() - began)

    if newest := checkpoint.newest(root):
        path, state = newest
        for member in group.members:
            check_identity(state["facts"][str(member.number)], member.config, fingerprint, root)
        group.restore(state)
        log.info("resumed from %s", path)
    for member in group.members:
        known = group.progress.members.get(str(member.number), {"rows": []})
        member.ledger.restore(known["rows"])
    assert group.train.epochs is not None
    while group.progress.epoch < group.train.epochs and any(
        member.active(group.progress.epoch) for member in group.members
    ):
        train_epoch(group, batches, stop)
        if stop.reason:
            save()
            stop.check()
        end_epoch(group, batches)
        if cadence.due(epoch_ends=True):
            save()
    return {
        member.number: {"failed": member.failed}
        if member.failed
        else {"best_epoch": member.best["epoch"] if member.best else 0}
        for member in group.members
    }


def groups(configs: dict[int, Config]) -> Iterator[dict[int, Config]]:
    """Those trials together whose settings differ in `optim.*` alone, its name temporary."""
    found: dict[str, dict[int, Config]] = {}
    for number, config in configs.items():
        kept = {
            key: value
            for key, value, _ in settings.walk(config)
            if key == "optim.name"
            or key.split(".")[0] not in ("name", "optim", "sweep", "platform")
        }
        found.setdefault(json.dumps(kept), {})[number] = config
    yield from found.values()


def load(path: Path) -> Config:
    """The settings that a run's config.yaml holds."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return settings.from_dict(values)


def train(directory: Path, numbers: list[int]) -> None:
    places = {number: directory / f"{number:04d}" for number in numbers}
    outcomes: dict[int, dict[str, Any]] = {}
    roots = []  # of the groups' checkpoints
    with on_signals() as stop, ExitStack() as locks:
        for place in places.values():
            mine = locks.enter_context(locked(place))
            assert mine, place
        for configs in groups(
            {number: load(place / "config.yaml") for number, place in places.items()}
        ):
            config = next(iter(configs.values()))
            root = (
                directory
                / "together"
                / hashlib.sha256(json.dumps([*configs]).encode()).hexdigest()[:16]
            )
            root.mkdir(parents=True, exist_ok=True)
            roots.append(root)
            found = find_images(config)
            config = weights.resolve(config, found)
            # They differ in optim.* alone, which depends neither on the pictures nor on the weights.
            configs = {
                number: dataclasses.replace(
                    one, data=config.data, model=config.model, train=config.train
                )
                for number, one in configs.items()
            }
            machine = stages.prepare_machine(config)
            network = stages.make_network(config, found, machine)
            found, read = stages.read_pictures(
                config, found, Run(root.name, root, root, root), stop
            )
            feed = stages.make_loader(config, found, read, machine)
            batches = stages.cache_features(config, network, feed, machine, stop)
            log.info("training %d heads together", len(configs))
            group = Group(configs, directory, network, machine)
            outcomes |= train_group(group, batches, root, found.fingerprint, stop)
    files.write(directory / f"outcomes-{numbers[0]:04d}.json", json.dumps(outcomes))
    for root in roots:
        shutil.rmtree(root)


def main() -> int:
    directory, *numbers = sys.argv[1:]
    to_terminal(expendable=True)
    return guarded(lambda: train(Path(directory), [int(number) for number in numbers]))


if __name__ == "__main__":
    sys.exit(main())
