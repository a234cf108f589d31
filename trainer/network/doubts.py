"""Labels that the features of a pretrained network contradict, and images unlike all others.

Every image is judged by a linear probe that was fitted without it: ridge regression on the classes,
whose leave-one-out predictions follow in closed form from one fit. How far they can be trusted, and
how many labels are wrong, is what makes the labels that are given most likely. As in confident
learning (Northcutt et al., JAIR 2021) the probabilities come from outside the fit, and it is the
labels' noise that is estimated; here it is one number, since its matrix of class pairs needs more
images than most classes have (docs/decisions).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# What the ridge, the temperature and the share of wrong labels are chosen from.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TEMPERATURES = tuple(math.exp(step / 6) for step in range(4, 33))  # 2 to 200
NOISE = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
# Probability that the label is wrong; precision and recall are in balance (docs/benchmarks.md).
DOUBT = 1 / 3
KNOWN = 0.5  # share of the labels that the probe must give: one that knows less judges none
FEWEST = 4  # images of a class: with fewer, those left say too little about one of them
LIMIT = 50_000  # images that are judged at most: the fit holds all their features
NEAREST = 5  # neighbours whose mean similarity says whether an image is like any other
BLOCK = 1024  # images compared with all others at a time
# Robust standard deviations below the usual similarity. Of 370 pets the most unlike has 2.9; texts,
# moons and textures put among them have 3.4 to 4.0.
UNLIKE = 3.2


@dataclass(frozen=True)
class Doubts:
    """What the features say of N images.

    wrong: probability that the label is wrong, float [N], 0 where it isn't judged. rather: int [N],
    the class that the features say. unlike: robust standard deviations from the usual, float [N].
    right: share of the labels that the probe gives too.
    """

    wrong: NDArray[np.float64]
    rather: NDArray[np.int64]
    unlike: NDArray[np.float64]
    right: float


def judge(features: NDArray[np.float32], labels: NDArray[np.int64], device: torch.device) -> Doubts:
    """Judge the labels int64 [N] by the features [N, width]. No random number is drawn.

    Raise RuntimeError for features that are no finite numbers, and where a GPU's memory is full.
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
    """Return the features [N, width], centred, each image's of length 1."""
    centred = features - features.mean(dim=0)
    lengths: Tensor = centred.norm(dim=1, keepdim=True)
    return centred / lengths.clamp(min=1e-6)


@torch.inference_mode()
def unlikeness(directions: Tensor) -> NDArray[np.float64]:
    """Return how many robust standard deviations each image is less like its nearest than usual."""
    nearest = min(NEAREST, len(directions) - 1)
    similarity = np.empty(len(directions))
    for start in range(0, len(directions), BLOCK):
        block = directions[start : start + BLOCK] @ directions.T
        block.diagonal(start).fill_(-1)  # itself
        best = block.topk(nearest, dim=1).values.mean(dim=1)
        similarity[start : start + BLOCK] = best.double().cpu().numpy()
    usual = np.median(similarity)
    spread = 1.4826 * float(np.median(np.abs(similarity - usual)))
    unlike: NDArray[np.float64] = (usual - similarity) / max(spread, 1e-6)
    return unlike


@torch.inference_mode()
def leave_one_out(directions: Tensor, target: Tensor) -> Tensor:
    """Return scores [N, classes] of each image by a probe that was fitted without it.

    directions: features [N, width], as `unit` makes them; target: int64 [N]. With H the matrix
    that makes predictions of labels, the prediction of image i without it is
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
    """Return the probability [N] that each label is wrong, by scores [N, classes] from outside.

    Assumed: a label is right with 1 - noise, and else any other class alike. The temperature of the
    scores and the noise are those that make the given labels most likely.
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
