"""A person's own network, loss and metric: functions in one Python file, model.code=FILE.

    def network(size): return a backbone and its width: images float [N, 3, size, size], normalised,
        to features [N, width]; the head is ours. Used with model=own.
    def loss(output, target): return the sum over the images, a scalar: output float32 [N, classes];
        target int64 [N], or with mixed images probabilities [N, classes].
    def metric(output, target): return figures by name, float: of all images of valid, or of test.

One of them is enough. The file travels by its content: its SHA-256 is part of what a run is, and a
model package needs it no more, since the network is exported.
"""

import hashlib
import importlib.util
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from trainer.common import files
from trainer.common.errors import UserError
from trainer.common.text import noted

NAMES = ("network", "loss", "metric")
OURS = {"loss", "refinement", "top1", "top5", "f1"}  # figures that have their meaning


@dataclass(frozen=True)
class Own:
    """What a file defines; None: what everybody has."""

    path: str
    network: Callable[[int], tuple[nn.Module, int]] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    metric: Callable[[Tensor, Tensor], Mapping[str, float]] | None = None

    def backbone(self, size: int) -> tuple[nn.Module, int]:
        """Return the backbone and how many features it gives. Raise UserError."""
        if self.network is None:
            raise self._wrong("model=own needs a function network(size) in it")
        with _Told(self.path, "network"):
            made = self.network(size)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise self._wrong("network(size) must return (nn.Module, width)")
        backbone, width = made
        training = backbone.training
        with _Told(self.path, "the network"), torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, size, size))
        backbone.train(training)
        if not torch.is_tensor(features) or features.shape != (2, width):
            shape = list(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise self._wrong(
                f"the network gives {shape} of 2 images of {size} px, and not [2, {width}], "
                "features of the width that network(size) returns"
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
        with _Told(self.path, "loss"):
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
        """Return the own figures of a split, by names such as valid_NAME. Raise UserError."""
        if self.metric is None:
            return {}
        with _Told(self.path, "metric"):
            said = self.metric(output, target)
            values = {name: noted(float(value)) for name, value in said.items()}
        for name in values:
            if not name.isidentifier() or name in OURS:
                raise self._wrong(
                    f"metric names a figure {name!r}; allowed: a name as Python's, but none of "
                    f"{', '.join(sorted(OURS))}"
                )
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def _wrong(self, what: str) -> UserError:
        return UserError(f"model.code={self.path}: {what}")


class _Told:
    """Turn what a person's own function raises into one line, with the line of their file."""

    def __init__(self, path: str, function: str) -> None:
        self._path, self._function = path, function

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == self._path]
        place = f", line {lines[-1]}" if lines else ""
        if isinstance(error, SyntaxError) and error.filename == self._path:
            place = f", line {error.lineno}"
        reason = (str(error) or "no reason given").splitlines()[0]
        raise UserError(
            f"model.code={self._path}{place}: {self._function}: {type(error).__name__}: {reason}"
        ) from error


def digest(path: str) -> str:
    """Return the SHA-256 of the file. Raise UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"model.code={path}: there is no such file")
    return hashlib.sha256(files.patiently(path, Path(path).read_bytes)).hexdigest()


def load(path: str | None) -> Own:
    """Return what the file defines. None: nothing. Raise UserError."""
    if path is None:
        return Own("")
    return _load(path, digest(path))


@cache
def _load(path: str, content: str) -> Own:
    name = f"packhorse_own_{content[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"model.code={path}: it is no Python file: its name must end with .py")
    module: ModuleType = importlib.util.module_from_spec(spec)
    with _Told(path, "import"):
        spec.loader.exec_module(module)
    found = {each: getattr(module, each) for each in NAMES if callable(getattr(module, each, None))}
    if not found:
        raise UserError(
            f"model.code={path}: it defines none of {', '.join(NAMES)}; docs/python.md says what "
            "they take and return"
        )
    return Own(path, **found)
