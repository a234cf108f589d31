"""A linear probe: how well a frozen network's features tell the classes.

Logistic regression with an L2 penalty, solved to its optimum (it is convex: no learning rate, no
number of epochs), its strength chosen by stratified k-fold (Hastie, Tibshirani and Friedman 2009,
4.4 and 7.10). No random number is drawn but for the folds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainer.common import temperature
from trainer.common.randomness import Purpose, generator
from trainer.common.threads import one_thread_each

FOLDS = 5
# Penalties per squared weight, for features of mean squared length 1, the weakest last. The search
# ends where the loss rises again.
PENALTIES = tuple(10 ** (-exponent / 2) for exponent in range(3, 14))  # 10**-1.5 to 10**-6.5
ITERATIONS = 500
SMALL = 100_000_000  # multiplications in a product
# Of the gradient's largest entry, and of the loss's change: beyond them no decision is another.
TOLERANCE, CHANGE = 1e-6, 1e-9
ROUGH_CHANGE = 1e-6  # for the folds: their losses are compared, their weights are not kept


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
    is judged. check: called at each look at the images; what it raises ends the work.

    The numbers don't depend on how many threads there are. Of features that aren't all finite come
    weights and logits that aren't numbers.
    """
    if not np.isfinite(features).all():
        nothing = partial(torch.full, fill_value=math.nan)
        weight, logits = nothing((classes, features.shape[-1])), nothing((len(labels), classes))
        return Probe(weight, nothing((classes,)), PENALTIES[0], logits)
    # Small problems are done before a second thread has had its turn.
    workers = 1 if features.size * classes < SMALL else min(torch.get_num_threads(), FOLDS)
    with one_thread_each(), ThreadPoolExecutor(workers, "probe") as pool:
        return _fit(features, labels, classes, seed, check, pool)


def _fit(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    seed: int,
    check: Callable[[], None],
    pool: Executor,
) -> Probe:
    parts = folds(labels, FOLDS, seed)
    order = np.concatenate(parts)
    views = torch.from_numpy(features.reshape(len(labels), -1, features.shape[-1])[order]).double()
    centre = views.mean(dim=(0, 1))
    views -= centre
    scale = views.square().sum(dim=-1).mean().sqrt().clamp(min=1e-12)
    views /= scale
    inputs, basis = _reduced(views)
    exact = _parts(inputs, labels[order], [len(part) for part in parts])
    search = _Search([part.rounded() for part in exact], classes, check, pool)
    penalty, logits, start = search.least()
    solution = _solve(exact, penalty, start, CHANGE, check, pool.map)
    weight = solution[:, :-1] @ basis.T / scale
    bias = solution[:, -1] - weight @ centre
    return Probe(weight.float(), bias.float(), penalty, logits[np.argsort(order)])


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


@dataclass(frozen=True)
class _Part:
    """Images of a fold. inputs: [images, views, width]. target: int64 [images], their labels."""

    inputs: Tensor
    target: Tensor

    def rounded(self) -> "_Part":
        """Return it in float32."""
        return _Part(self.inputs.float(), self.target)

    def logits(self, solution: Tensor) -> Tensor:
        """Return the logits of the first views: [images, classes]."""
        return _logits(self.inputs[:, 0], solution)

    def curvature(self, solution: Tensor) -> float:
        """Return the summed second derivative of the views' losses by a logit, mean of all."""
        shares = _logits(self.inputs.flatten(end_dim=1), solution).softmax(dim=1)
        return (shares * (1 - shares)).mean(dim=1).sum().item()

    def loss_and_slope(self, solution: Tensor) -> tuple[float, Tensor]:
        """Return the views' summed cross-entropy, and its gradient float64 [classes, width + 1].

        The gradient by hand: for small problems PyTorch's own takes most of the time.
        """
        flat = self.inputs.flatten(end_dim=1)
        truth = self.target.repeat_interleave(self.inputs.shape[1])[:, None]
        logs = _logits(flat, solution).log_softmax(dim=1)
        loss = -logs.gather(1, truth).double().sum().item()
        error = logs.exp_()
        error.scatter_add_(1, truth, torch.full_like(truth, -1, dtype=error.dtype))
        return loss, torch.cat([error.T @ flat, error.sum(dim=0)[:, None]], dim=1).double()


def _parts(inputs: Tensor, labels: NDArray[np.int64], sizes: list[int]) -> list[_Part]:
    target = torch.from_numpy(labels)
    return [
        _Part(*part)
        for part in zip(torch.split(inputs, sizes), torch.split(target, sizes), strict=True)
    ]


class _Search:
    """The search for the penalty with the least loss of images that a probe didn't see."""

    def __init__(
        self, parts: list[_Part], classes: int, check: Callable[[], None], pool: Executor
    ) -> None:
        self.parts, self.check, self.pool = parts, check, pool
        width = parts[0].inputs.shape[-1]
        nothing = torch.zeros(classes, width + 1, dtype=torch.float64)
        # Of each fold: the solutions at the last two penalties.
        self.before = self.last = [nothing for _ in parts]

    def least(self) -> tuple[float, Tensor, Tensor]:
        """Return the penalty, the images' logits float32 [N, classes], and the mean solution."""
        target = torch.cat([part.target for part in self.parts])
        least, best = math.inf, (PENALTIES[0], torch.empty(0), torch.empty(0))
        for number, penalty in enumerate(PENALTIES):
            solve = partial(self.solve, penalty=penalty, ahead=number > 1)
            self.before, self.last = self.last, [*self.pool.map(solve, range(len(self.parts)))]
            pairs = zip(self.parts, self.last, strict=True)
            logits = torch.cat([part.logits(solution) for part, solution in pairs])
            loss = functional.cross_entropy(logits.double(), target).item()
            if loss >= least:
                break
            least, best = loss, (penalty, logits, torch.stack(self.last).mean(dim=0))
        return best

    def solve(self, fold: int, penalty: float, ahead: bool) -> Tensor:
        """Solve without the images of a fold. ahead: begin where the last two solutions lead.

        The weights grow about as the logarithm of the penalty falls.
        """
        start = self.last[fold]
        if ahead:
            start = 2 * start - self.before[fold]
        rest = self.parts[:fold] + self.parts[fold + 1 :]
        return _solve(rest, penalty, start, ROUGH_CHANGE, self.check, map)


def _logits(inputs: Tensor, solution: Tensor) -> Tensor:
    weights = solution.to(inputs.dtype)
    return inputs @ weights[:, :-1].T + weights[:, -1]


def _solve(
    parts: list[_Part],
    penalty: float,
    start: Tensor,
    change: float,
    check: Callable[[], None],
    each: Callable[..., Iterable[Any]],
) -> Tensor:
    """Return the weights and biases float64 [classes, width + 1] at the optimum.

    All views have the label of their image. change: of the loss, at which it ends. each: `map`, or
    another that works side by side.
    """
    count = sum(part.inputs.shape[0] * part.inputs.shape[1] for part in parts)

    def loss_and_slope(solution: Tensor) -> tuple[float, Tensor]:
        check()
        found = [*each(lambda part: part.loss_and_slope(solution), parts)]
        weights = solution[:, :-1]
        slope = torch.stack([slope for _, slope in found]).sum(dim=0) / count
        slope[:, :-1] += penalty * weights
        loss = sum(loss for loss, _ in found) / count
        return loss + penalty / 2 * weights.square().sum().item(), slope

    # In these units the loss curves by about 1: L-BFGS's first step has the right length.
    curvature = sum(each(lambda part: part.curvature(start), parts)) / count
    width = start.shape[1] - 1
    unit = torch.full((width + 1,), curvature / width + penalty, dtype=start.dtype)
    unit[-1] = curvature + penalty  # never 0, though the bias has no penalty
    unit = unit.rsqrt()
    solution = (start / unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=change,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, slope = loss_and_slope(solution.detach() * unit)
        solution.grad = slope * unit
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return solution.detach() * unit
