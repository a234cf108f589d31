"""A linear probe: how well a frozen network's features tell the classes.

Logistic regression with an L2 penalty, solved to its optimum (it is convex: no learning rate, no
number of epochs), its strength chosen by stratified k-fold (Hastie, Tibshirani and Friedman 2009,
4.4 and 7.10). No random number is drawn but for the folds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainer.common import temperature
from trainer.common.randomness import Purpose, generator

FOLDS = 5
# Penalties per squared weight, for features of mean squared length 1, the weakest last. The search
# ends where the loss rises again.
PENALTIES = tuple(10 ** (-exponent / 2) for exponent in range(3, 14))  # 10**-1.5 to 10**-6.5
ITERATIONS = 500
SMALL = 100_000_000  # multiplications in a product
# Of the gradient's largest entry, and of the loss's change: beyond them no decision is another.
TOLERANCE, CHANGE = 1e-6, 1e-9


@dataclass(frozen=True)
class Probe:
    """A solved probe.

    weight, bias: [classes, width] and [classes], float32 on the CPU: those of a linear head on the
    features themselves. penalty: of `PENALTIES`. logits: [N, classes], of each image by a probe
    that was fitted without it.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    logits: Tensor

    def of(self, features: NDArray[np.float32]) -> Tensor:
        """Return the logits [N, classes] of features [N, width]."""
        return torch.from_numpy(features) @ self.weight.T + self.bias


def fit(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Probe:
    """Fit a probe to features [N, width] and labels int64 [N], its strength by k-fold.

    Images in a row of features [N, views, width] are several views of one: all train, and the first
    is judged. check: called between two fits; what it raises ends the work.
    """
    with _few_threads(features.size * classes):
        return _fit(features, labels, classes, seed, check)


@contextmanager
def _few_threads(multiplications: int) -> Iterator[None]:
    """Compute small products in one thread: two would spend their time on waiting for each other.

    Measured on 222 images of width 1280 and 37 classes: 2.5 CPU s with one, 45 with two.
    """
    before = torch.get_num_threads()
    if multiplications < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    seed: int,
    check: Callable[[], None],
) -> Probe:
    views = torch.from_numpy(features.reshape(len(labels), -1, features.shape[-1])).double()
    target = torch.from_numpy(labels)
    centre = views.mean(dim=(0, 1))
    scale = (views - centre).square().sum(dim=-1).mean().sqrt().clamp(min=1e-12)
    inputs, basis = _reduced((views - centre) / scale)
    parts = folds(labels, FOLDS, seed)
    least, best, chosen = math.inf, PENALTIES[0], torch.empty(0)
    starts = [torch.zeros(classes, inputs.shape[-1] + 1, dtype=torch.float64) for _ in parts]
    for penalty in PENALTIES:
        logits = torch.zeros(len(labels), classes, dtype=torch.float64)
        for number, part in enumerate(parts):
            check()
            rest = np.setdiff1d(np.arange(len(labels)), part)
            starts[number] = _solve(inputs[rest], target[rest], penalty, starts[number])
            logits[part] = _logits(inputs[part, 0], starts[number])
        loss = functional.cross_entropy(logits, target).item()
        if loss >= least:
            break
        least, best, chosen = loss, penalty, logits
    check()
    solution = _solve(inputs, target, best, torch.stack(starts).mean(dim=0))
    weight = solution[:, :-1] @ basis.T / scale
    bias = solution[:, -1] - weight @ centre
    return Probe(weight.float(), bias.float(), best, chosen.float())


def folds(labels: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Divide samples into `count` folds with about equal shares of each class.

    Fewer where no class has as many images: then one of each. Each array holds sample numbers.
    """
    count = max(2, min(count, int(np.bincount(labels).max())))
    order = generator(Purpose.FOLDS, seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    # Dealt out one by one, class after class: no fold has two more of a class than another.
    return [np.sort(by_class[first::count]) for first in range(count)]


def correct(logits: Tensor, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each image's highest logit is its label's: bool [N]."""
    answers: NDArray[np.bool_] = logits.argmax(dim=1).numpy() == labels
    return answers


def calibrated_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image at the temperature of all: float32 [N].

    logits: float32 [N, classes], labels: int64 [N]. Losses of two networks can be compared so,
    however sure of themselves the two are. Logits that are no finite numbers are no better than
    infinitely bad.
    """
    if not logits.isfinite().all():
        return torch.full((len(logits),), math.inf)
    values, truth = logits.double().numpy(), labels.numpy()
    warmth = temperature.optimum(values, truth, caution=0.0)
    return torch.from_numpy(temperature.losses(values / warmth, truth)).float()


def error_of_share(correct: NDArray[np.bool_]) -> float:
    """Return the standard error of the share of correct ones of N.

    Of a share that is drawn to the middle by one of each kind: none of few wrong is no certainty.
    """
    share = (correct.sum() + 1) / (len(correct) + 2)
    return math.sqrt(share * (1 - share) / len(correct))


def standard_error(values: Sequence[float] | NDArray[np.float64] | NDArray[np.bool_]) -> float:
    """Return the standard error of the mean of N values; of fewer than 2: infinite."""
    if len(values) < 2:
        return math.inf
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / math.sqrt(len(values)))


def _reduced(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs [N, views, width] in a basis of the space that they span, and the basis.

    The solution lies in it, since what is orthogonal to all inputs only costs penalty.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    if len(flat) >= flat.shape[1]:
        return inputs, torch.eye(flat.shape[1], dtype=flat.dtype)
    _, _, basis = torch.linalg.svd(flat, full_matrices=False)
    return (flat @ basis.T).reshape(*inputs.shape[:2], -1), basis.T


def _logits(inputs: Tensor, solution: Tensor) -> Tensor:
    return inputs @ solution[:, :-1].T + solution[:, -1]


def _solve(inputs: Tensor, target: Tensor, penalty: float, start: Tensor) -> Tensor:
    """Return the weights and biases [classes, width + 1] at the optimum.

    inputs: [N, views, width], every view with the label of its image, target int64 [N].
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    truth = functional.one_hot(target.repeat_interleave(inputs.shape[1]), len(start)).to(flat.dtype)
    solution = start.clone()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=CHANGE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        logs = _logits(flat, solution).log_softmax(dim=1)
        weights = solution[:, :-1]
        # The gradient by hand: for small problems PyTorch's own takes most of the time.
        error = (logs.exp() - truth) / len(truth)
        slope = torch.cat([error.T @ flat + penalty * weights, error.sum(dim=0)[:, None]], dim=1)
        solution.grad = slope
        return -(logs * truth).sum() / len(truth) + penalty / 2 * weights.square().sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return solution
