"""Optimizers by name, their parameter groups, and learning-rate schedules as pure functions of the step."""

import inspect
import math
from types import MethodType
from typing import Any

import torch
from torch import nn

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
    """The optimizer over the trainable parameters. Each group keeps its peak learning rate as `peak_lr`; see `set_lr`."""
    groups = parameter_groups(network, lr, head_lr if head_lr is not None else lr, weight_decay)
    _spare_dynamo()
    optimizer = OPTIMIZERS[name](groups, lr, momentum)
    # The method itself, without the wrappers that import torch._dynamo: see `_spare_dynamo`.
    optimizer.step = MethodType(torch.no_grad()(inspect.unwrap(type(optimizer).step)), optimizer)  # type: ignore[method-assign]
    return optimizer


def _spare_dynamo() -> None:
    """Keeps torch.optim from importing torch._dynamo, SymPy and all, which takes longer than the rest of a small run's start.

    Its methods wrap themselves, at their first call, in what keeps torch.compile out of them, and remember the result in an attribute. Ours are
    never compiled, so each may remember itself. Where a later PyTorch has other wrappers, they do as they like: only time is lost.
    """
    for method in (
        torch.optim.Optimizer.add_param_group,
        torch.optim.Optimizer.zero_grad,
        torch.optim.Optimizer.state_dict,
    ):
        function = inspect.unwrap(method)
        function.__dict__.setdefault("__dynamo_disable", function)


def _adamw(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd}


def parameter_groups(
    network: Classifier, lr: float, head_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Backbone and head, each with and without decay.

    Biases and norms (fewer than 2 dimensions) are not decayed: shrinking them regularises nothing.
    """

    def group(part: nn.Module, part_lr: float, decayed: bool) -> dict[str, Any]:
        parameters = [
            parameter
            for parameter in part.parameters()
            if parameter.requires_grad and (parameter.ndim >= 2) == decayed
        ]
        return {
            "params": parameters,
            "lr": part_lr,
            "peak_lr": part_lr,
            "weight_decay": weight_decay if decayed else 0.0,
        }

    groups = [
        group(part, part_lr, decayed)
        for part, part_lr in ((network.backbone, lr), (network.head, head_lr))
        for decayed in (True, False)
    ]
    return [group for group in groups if group["params"]]


def lr_factor(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    *,
    schedule: str,
    warmup_epochs: float,
    step_epochs: float = 1.0,
    step_factor: float = 1.0,
) -> float:
    """The share of the peak learning rate at `step` (0-based): linear warm-up, then cosine (Loshchilov and Hutter 2017), step or constant."""
    total = steps_per_epoch * epochs
    # A warm-up that is as long as the run would leave nothing to fall from.
    warmup = min(warmup_epochs * steps_per_epoch, total / 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    if schedule == "step":
        return step_factor ** math.floor(step / steps_per_epoch / step_epochs)
    assert schedule == "constant", schedule
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group's learning rate to its share of the peak and returns the last group's, the head's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[-1]["lr"])
