"""Keeps PyTorch from importing its compiler (torch._dynamo, with SymPy) before a run's first step.

Measured on two cores with torch 2.14.1 (2026-11-25): the small network's first step comes 1.0 CPU
second, 1.3 seconds of wall time, earlier; torchvision's networks import the compiler themselves
and gain nothing. Remove this file when PyTorch's optimizers no longer import the compiler
(`tests/test_walls.py` checks), or when the import costs under 0.3 seconds.
"""

import inspect
from types import MethodType

import torch


def set_deterministic(strict: bool = True, warns: bool = True) -> None:
    """Act as torch.use_deterministic_algorithms(strict, warn_only=warns), without its import."""
    torch._C._set_deterministic_algorithms(strict, warn_only=warns)


def spare_optimizer_methods() -> None:
    """Keep the optimizers' methods unwrapped. Call it before the first optimizer is made.

    At its first call each method wraps itself, so that torch.compile skips it, and caches the
    wrapped method in an attribute. Ours are never compiled, so the cache may hold the plain method.
    Where a later PyTorch wraps them otherwise, only time is lost.
    """
    optimizer = torch.optim.Optimizer
    for method in (
        optimizer.add_param_group,
        optimizer.zero_grad,
        optimizer.state_dict,
        optimizer.load_state_dict,
    ):
        function = inspect.unwrap(method)
        function.__dict__.setdefault("__dynamo_disable", function)


def spare_step(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer its `step` without the wrappers that import the compiler."""
    step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
