"""What spares a run the import of PyTorch's compiler before its first step.

The compiler is torch._dynamo, with SymPy.

Measured on two cores with torch 2.14.1 (2026-11-25): the small network's first step comes 1.0 CPU
second, 1.3 seconds of wall time, earlier; a network of torchvision brings the compiler by itself
and gains nothing. Remove this file when PyTorch's optimizers no longer import it
(`tests/test_walls.py` looks), or when it costs under 0.3 seconds.
"""

import inspect
from types import MethodType

import torch


def set_deterministic(strict: bool = True, warns: bool = True) -> None:
    """Do what torch.use_deterministic_algorithms(strict, warn_only=warns) does, less its import."""
    torch._C._set_deterministic_algorithms(strict, warn_only=warns)


def spare_optimizer_methods() -> None:
    """Let the optimizers' methods be themselves; call before one is made.

    At their first call they wrap themselves in what keeps torch.compile out of them, and remember
    the result in an attribute. Ours are never compiled, so each may remember itself. Where a later
    PyTorch has other wrappers, they do as they like: only time is lost.
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
