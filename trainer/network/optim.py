"""Optimizers by name, their parameter groups, and schedules: pure functions of the step."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trainer.network import startup
from trainer.network.build import Classifier


def build(
    network: Classifier,
    name: str,
    *,
    lr: float,
    head_lr: float | None,
    weight_decay: float,
    momentum: float,
) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters, `adamw` or `sgd`.

    lr: peak learning rate of the backbone, and of the head unless head_lr is given. Each group
    keeps its own as `peak_lr`; see `set_lr`.
    """
    groups = parameter_groups(network, lr, head_lr or lr, weight_decay)
    startup.spare_optimizer_methods()
    if name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    else:
        assert name == "sgd", name
        nesterov = momentum > 0
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    startup.spare_step(optimizer)
    return optimizer


def parameter_groups(
    network: Classifier, lr: float, head_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of backbone and head, each with and without decay."""

    def group(part: nn.Module, part_lr: float, decayed: bool) -> dict[str, Any]:
        chosen = decayed_names(part)
        parameters = [
            parameter
            for name, parameter in part.named_parameters()
            if parameter.requires_grad and (name in chosen) == decayed
        ]
        return {
            "params": parameters,
            "lr": part_lr,
            "peak_lr": part_lr,
            "weight_decay": weight_decay * decayed,
        }

    groups = [
        group(part, part_lr, decayed)
        for part, part_lr in ((network.backbone, lr), (network.head, head_lr))
        for decayed in (True, False)
    ]
    return [group for group in groups if group["params"]]


def decayed_names(part: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay is for: weights of a matrix or a filter.

    Shrinking others regularises nothing: biases and norms (fewer than 2 dimensions); tokens,
    position embeddings, tables of relative positions, scales (they are not called weight); and what
    timm's networks name themselves in `no_weight_decay()`, as names or patterns.
    """
    spared = [
        f"{prefix}.{pattern}".removeprefix(".")
        for prefix, module in part.named_modules()
        if hasattr(module, "no_weight_decay")
        for pattern in module.no_weight_decay()
    ]
    return {
        name
        for name, parameter in part.named_parameters()
        if parameter.ndim >= 2
        and name.endswith("weight")
        and not any(fnmatchcase(name, pattern) for pattern in spared)
    }


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes: `cosine` (Loshchilov and Hutter 2017), `step` or `constant`.

    warmup_epochs: of linear warm-up. step_epochs, step_factor: every so many epochs, the rate is
    multiplied by so much; of `step` alone.
    """

    name: str
    warmup_epochs: float
    step_epochs: float = 1.0
    step_factor: float = 1.0

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Return the share of the peak learning rate at `step` (0-based) of a run of `epochs`."""
        total = steps_per_epoch * epochs
        # A warm-up that is as long as the run would leave nothing to fall from.
        warmup = min(self.warmup_epochs * steps_per_epoch, total / 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
        if self.name == "step":
            return self.step_factor ** math.floor(step / steps_per_epoch / self.step_epochs)
        assert self.name == "constant", self.name
        return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to its share of the peak; return the last, the head's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[-1]["lr"])
