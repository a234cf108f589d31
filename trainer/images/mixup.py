"""Mixup and CutMix: two images of a batch in one, and their classes in proportion."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Mixing:
    """How images are mixed: mixup (Zhang et al. 2018), cutmix (Yun et al. 2019).

    Each is the parameter a of Beta(a, a), 0: off; with both on, a coin takes one.
    """

    mixup: float
    cutmix: float


def mix(
    pixels: Tensor, labels: Tensor, classes: int, mixing: Mixing, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image with its mirror place in the batch.

    pixels [N, height, width, 3], labels int64 [N] -> float pixels of the same shape, and target
    probabilities [N, classes].
    """
    cut = mixing.cutmix > 0 and (mixing.mixup == 0 or rng.random() < 0.5)
    alpha = mixing.mixup
    if cut:
        alpha = mixing.cutmix
    share = float(rng.beta(alpha, alpha))
    pixels, other = pixels.float(), pixels.flip(0).float()
    if cut:
        height, width = pixels.shape[1:3]
        cut_height = round(height * (1 - share) ** 0.5)
        cut_width = round(width * (1 - share) ** 0.5)
        top = int(rng.integers(height - cut_height + 1))
        left = int(rng.integers(width - cut_width + 1))
        box = slice(None), slice(top, top + cut_height), slice(left, left + cut_width)
        pixels[box] = other[box]
        share = 1 - cut_height * cut_width / (height * width)  # the true share, after rounding
    else:
        pixels = pixels.mul_(share).add_(other, alpha=1 - share)
    targets = functional.one_hot(labels, classes).float()
    return pixels, targets * share + targets.flip(0) * (1 - share)
