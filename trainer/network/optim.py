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
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters, `adamw` or `sgd`.

    lr: peak learning rate of the backbone, and of the head unless head_lr is given. Each group
    keeps its peak as `peak_lr`; see `set_lr`. layer_decay: see `parameter_groups`.
    """
    groups = parameter_groups(network, lr, head_lr or lr, weight_decay, layer_decay)
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
    network: Classifier, lr: float, head_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return the groups of the backbone's layers and of the head, each with and without decay.

    layer_decay: each backbone layer's learning rate as a share of the next layer's (Clark et al.
    2020); the last layer has lr. 1: all have lr, in one group.
    """
    rates = {name: lr for name, _ in network.backbone.named_parameters()}
    if layer_decay < 1:
        depths = layer_depths(network.backbone)
        rates = {name: lr * layer_decay ** depths[name] for name in rates}
    return [
        *_groups(network.backbone, rates, weight_decay),
        *_groups(network.head, dict.fromkeys(network.head.state_dict(), head_lr), weight_decay),
    ]


def _groups(part: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return a group for each rate, those with decay first. rates: by the parameter's name."""
    chosen = decayed_names(part)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for decayed in (True, False):
        for name, parameter in part.named_parameters():
            if parameter.requires_grad and (name in chosen) == decayed:
                groups.setdefault((decayed, rates[name]), []).append(parameter)
    return [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay * decayed}
        for (decayed, rate), params in groups.items()
    ]


def layer_depths(backbone: nn.Module) -> dict[str, int]:
    """Return how many layers come after each parameter's, by its name: 0 in the last layer.

    timm's networks define their layers themselves.
    """
    layers = _layers(backbone)
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        # imported here: optional, and slow; such a network has loaded it already.
        from timm.models import group_parameters

        layers = group_parameters(backbone, matcher(coarse=False), reverse=True)
    last = max(layers.values(), default=0)
    return {name: last - layer for name, layer in layers.items()}


def _layers(backbone: nn.Module) -> dict[str, int]:
    """Return the number of each parameter's layer, by its name, in the order of definition.

    A module is one layer, unless it is a container or holds more than half of all weights: then
    each of its children is one. A module without a matrix or a filter (a norm, a token, a table of
    positions) belongs to the layer before it.
    """
    layers: dict[str, int] = {}
    half = sum(parameter.numel() for parameter in backbone.parameters()) / 2
    newest = -1

    def visit(module: nn.Module, prefix: str) -> None:
        nonlocal newest
        for name, _ in module.named_parameters(prefix, recurse=False):
            layers[name] = max(newest, 0)
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}".removeprefix(".")
            parameters = list(child.parameters())
            size = sum(parameter.numel() for parameter in parameters)
            contains = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
            if contains or (size > half and any(child.children())):
                visit(child, name)
                continue
            newest += any(parameter.ndim >= 2 for parameter in parameters)
            for inner, _ in child.named_parameters(name):
                layers[inner] = max(newest, 0)

    visit(backbone, "")
    return layers


def decayed_names(part: nn.Module) -> set[str]:
    """Return the names of the parameters that get weight decay: weights of a matrix or a filter.

    To shrink others regularises nothing: biases and norms (fewer than 2 dimensions); tokens,
    position embeddings, tables of relative positions, scales (they are not called weight); and what
    timm's networks list in `no_weight_decay()`, as names or patterns.
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

    warmup_epochs: of linear warm-up. For `step` alone: every step_epochs epochs the rate is
    multiplied by step_factor.
    """

    name: str
    warmup_epochs: float
    step_epochs: float = 1.0
    step_factor: float = 1.0

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Return the share of the peak learning rate at `step` (0-based) of a run of `epochs`."""
        total = steps_per_epoch * epochs
        # At most half of the run: after a warm-up as long as the run the rate would never fall.
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
    """Set each group's learning rate to `factor` of its peak; return the last one, the head's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[-1]["lr"])
