"""Labels that the features of a pretrained network contradict, and images unlike all others.

A linear probe that was fitted without an image judges its label: ridge regression on the classes,
whose leave-one-out predictions follow in closed form from one fit. The probe's temperature and the
share of wrong labels are those under which the given labels are most likely. As in confident
learning (Northcutt et al., JAIR 2021), the probabilities are out of sample, and the labels' noise
is estimated. Here the noise is one number: a matrix of class pairs needs more images than most
classes have (docs/decisions).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# The grids that the ridge, the temperature and the share of wrong labels are chosen from.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TEMPERATURES = tuple(math.exp(step / 6) for step in range(4, 33))  # 2 to 200
NOISE = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
# A label with this probability of being wrong is doubtful: here precision and recall are in balance
# (docs/benchmarks.md).
DOUBT = 1 / 3
KNOWN = 0.5  # share of the labels that the probe must predict: a worse one judges no label
FEWEST = 4  # images of a class: with fewer, the others say too little about one of them
LIMIT = 50_000  # judge at most so many images: the fit holds all their features
NEAREST = 5  # neighbours whose mean similarity tells whether an image is like any other
BLOCK = 1024  # images compared with all others at a time
# Robust standard deviations below the usual similarity. The most unlike of 370 pets has 2.9; texts,
# moons and textures that were put among them have 3.4 to 4.0.
UNLIKE = 3.2


@dataclass(frozen=True)
class Doubts:
    """What the features say about N images.

    wrong: probability that the label is wrong, float [N], 0 where it isn't judged. rather: int [N],
    the class that the probe predicts. unlike: robust standard deviations below the usual
    similarity, float [N]. right: share of the labels that the probe predicts too.
    """

    wrong: NDArray[np.float64]
    rather: NDArray[np.int64]
    unlike: NDArray[np.float64]
    right: float


def judge(features: NDArray[np.float32], labels: NDArray[np.int64], device: torch.device) -> Doubts:
    """Judge the labels int64 [N] by the features [N, width], without random numbers.

    Raise RuntimeError for features that are not finite, and where a GPU's memory is full.
    """
    if not np.isfinite(features).all():
        raise RuntimeError("the features are not all finite numbers")
    counts = np.bincount(labels)
    target = torch.from_numpy(labels).to(device)
    directions = unit(torch.from_numpy(features).to(device))
    scores = leave_one_out(directions, target)
    wrong = noise_posterior(scores, target).double().cpu().numpy()
    rather = scores.argmax(dim=1).cpu().numpy()
    right = float(np.mean(rather == labels))
    wrong[(counts[labels] < FEWEST) | (rather == labels) | (right < KNOWN)] = 0
    return Doubts(wrong, rather, unlikeness(directions), right)


def unit(features: Tensor) -> Tensor:
    """Return the features [N, width], centred, each row of length 1."""
    centred = features - features.mean(dim=0)
    lengths: Tensor = centred.norm(dim=1, keepdim=True)
    return centred / lengths.clamp(min=1e-6)


@torch.inference_mode()
def unlikeness(directions: Tensor) -> NDArray[np.float64]:
    """Return how far each image's similarity to its nearest lies below the usual one, float [N].

    In robust standard deviations.
    """
    count = len(directions)
    nearest = min(NEAREST, count - 1)
    best = directions.new_full((count, nearest), -1)
    for start in range(0, count, BLOCK):
        # With itself and those after it; the others have met it already.
        block = directions[start : start + BLOCK] @ directions[start:].T
        block.diagonal().fill_(-1)  # itself
        _keep_best(best[start : start + BLOCK], block)
        _keep_best(best[start + BLOCK :], block[:, BLOCK:].T)
    similarity = best.mean(dim=1).double().cpu().numpy()
    usual = np.median(similarity)
    spread = 1.4826 * float(np.median(np.abs(similarity - usual)))
    unlike: NDArray[np.float64] = (usual - similarity) / max(spread, 1e-6)
    return unlike


def _keep_best(best: Tensor, more: Tensor) -> None:
    """Let each row of `best` hold the largest of its own and of the row of `more`."""
    most = best.shape[1]
    found = more.topk(min(most, more.shape[1]), dim=1).values
    best[:] = torch.cat((best, found), dim=1).topk(most, dim=1).values


@torch.inference_mode()
def leave_one_out(directions: Tensor, target: Tensor) -> Tensor:
    """Return the scores [N, classes] of each image by a probe that was fitted without it.

    directions: features [N, width], from `unit`; target: int64 [N]. With H the hat matrix, which
    maps labels to predictions, the prediction p_i for image i without it is
    (p_i - H_ii y_i) / (1 - H_ii). H and its diagonal come from one eigendecomposition of the
    smaller Gram matrix. The ridge is the one with the least squared error.
    """
    centred = directions - directions.mean(dim=0)
    if len(centred) > centred.shape[1]:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        values = values.clamp(min=1e-6)
        basis = centred @ (vectors / values.sqrt())
    else:
        values, basis = torch.linalg.eigh(centred @ centred.T)
        values = values.clamp(min=0)
    truth = functional.one_hot(target).to(centred.dtype)
    mean = truth.mean(dim=0)
    known, squares = basis.T @ (truth - mean), basis.square()
    least, scores = math.inf, truth
    for ridge in RIDGES:
        kept = values / (values + ridge)
        own = (squares @ kept + 1 / len(centred))[:, None]
        predicted = basis @ (kept[:, None] * known) + mean
        left_out = (predicted - own * truth) / (1 - own).clamp(min=1e-6)
        error = (left_out - truth).square().mean().item()
        if error < least:
            least, scores = error, left_out
    return scores


@torch.inference_mode()
def noise_posterior(scores: Tensor, target: Tensor) -> Tensor:
    """Return the probability [N] that each label is wrong, by out-of-sample scores [N, classes].

    The model: a label is right with probability 1 - noise, and else each other class is equally
    likely. The temperature of the scores and the noise maximise the likelihood of the given labels.
    """
    others = max(scores.shape[1] - 1, 1)
    most, posterior = -math.inf, torch.zeros(len(target), device=target.device)
    for temperature in TEMPERATURES:
        logits = scores * temperature
        own = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)
        right = own.exp()
        for noise in NOISE:
            mistaken = noise * (1 - right) / others
            given = (1 - noise) * right + mistaken
            likelihood = given.log().mean().item()
            if likelihood > most:
                most, posterior = likelihood, mistaken / given
    return posterior
