"""The user's own network, loss and metric: functions in the code that model.code names.

    def network(size): return a backbone and its width: images float [N, 3, size, size], normalised,
        to features [N, width]; Packhorse adds the head. Used with model=own.
    def loss(output, target): return the sum over the images, a scalar: output float32 [N, classes];
        target int64 [N], or with mixed images probabilities [N, classes].
    def metric(output, target): return figures by name, float: of all images of valid, or of test.

One of them is enough. They are in a file, in a module, or attributes of an object in a module
(trainer/common/own_code.py). The SHA-256 of that code is part of a run's identity. A model package
doesn't need the code: it holds the exported network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.common import own_code
from trainer.common.errors import UserError
from trainer.common.own_code import OwnCode
from trainer.common.text import noted
from trainer.network.device import counting

NAMES = ("network", "loss", "metric")
OURS = {"loss", "refinement", "top1", "top5", "f1"}  # names that our own metrics have


@dataclass(frozen=True)
class Own:
    """The functions that the code defines; None: Packhorse's is used. code: None without any."""

    code: OwnCode | None
    network: Callable[[int], tuple[nn.Module, int]] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    metric: Callable[[Tensor, Tensor], Mapping[str, float]] | None = None

    def backbone(self, size: int) -> tuple[nn.Module, int]:
        """Return the backbone and how many features it gives. Raise UserError."""
        if self.network is None:
            raise self._wrong("model=own needs a function network(size) in it")
        with self._told("network"):
            made = self.network(size)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise self._wrong("network(size) must return (nn.Module, width)")
        backbone, width = made
        training = backbone.training
        with self._told("the network"), torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, size, size))
        backbone.train(training)
        if not torch.is_tensor(features) or features.shape != (2, width):
            shape = list(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise self._wrong(
                f"for 2 images of {size} px the network returns {shape}; expected [2, "
                f"{width}]: features of the width that network(size) returns"
            )
        return backbone, width

    def check_loss(self, classes: int, mixes: bool) -> None:
        """Raise UserError where the loss isn't a scalar that sums over the images."""
        if self.loss is None:
            return
        output = torch.linspace(-1, 2, 2 * classes).reshape(2, classes).requires_grad_()
        target = torch.tensor([0, classes - 1])
        if mixes:
            target = torch.full((2, classes), 1 / classes)
        with self._told("loss"):
            both = self.loss(output, target)
            alone = [self.loss(output[i : i + 1], target[i : i + 1]) for i in (0, 1)]
        for each in (both, *alone):
            if not torch.is_tensor(each) or each.ndim or not each.requires_grad:
                raise self._wrong("loss(output, target) must return a scalar with a gradient")
        if not torch.allclose(both, alone[0] + alone[1], rtol=1e-3, atol=1e-5):
            raise self._wrong(
                f"loss(output, target) must be the sum over the images: of two it is "
                f"{both.item():.4g}, of each alone {alone[0].item():.4g} and {alone[1].item():.4g}"
            )

    def figures(self, output: Tensor, target: Tensor, prefix: str) -> dict[str, float]:
        """Return the metric's figures of a split, by names such as valid_NAME. Raise UserError."""
        if self.metric is None:
            return {}
        with self._told("metric"), counting():
            said = self.metric(output, target)
            values = {name: noted(float(value)) for name, value in said.items()}
        for name in values:
            if not name.isidentifier() or name in OURS:
                raise self._wrong(
                    f"metric returns a figure named {name!r}; allowed: a Python name, but "
                    f"none of {', '.join(sorted(OURS))}"
                )
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def _told(self, function: str) -> own_code.told:
        assert self.code is not None
        return own_code.told(self.code.setting, function, *self.code.files.values())

    def _wrong(self, what: str) -> UserError:
        assert self.code is not None
        return UserError(f"{self.code.setting}: {what}")


SETTING = "model.code"


def digest(said: str) -> str:
    """Return the SHA-256 of the code. Raise UserError where there is none."""
    return own_code.find(SETTING, said).digest


def load(said: str | None) -> Own:
    """Return the functions of the code; None: of no code. Raise UserError."""
    if said is None:
        return Own(None)
    code = own_code.find(SETTING, said)
    module = own_code.load(code)
    found = {each: getattr(module, each) for each in NAMES if callable(getattr(module, each, None))}
    if not found:
        raise UserError(
            f"{code.setting}: it defines none of {', '.join(NAMES)}; docs/python.md says what "
            "they take and return"
        )
    return Own(code, **found)
