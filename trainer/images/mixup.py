"""Mixup and CutMix: two pictures of a batch in one, and their classes in proportion."""

import numpy as np
from torch import Tensor
from torch.nn import functional


def mix(
    pixels: Tensor,
    labels: Tensor,
    classes: int,
    *,
    mixup: float,
    cutmix: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Mixes each picture with its mirror place in the batch.

    pixels [N, height, width, 3], labels [N] -> float pixels of the same shape and target probabilities [N, classes].
    mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) are the parameters of Beta(a, a), 0: off; with both on, a coin takes one.
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    pixels, other = pixels.float(), pixels.flip(0).float()
    if cut:
        height, width = pixels.shape[1:3]
        cut_height, cut_width = (
            round(height * (1 - share) ** 0.5),
            round(width * (1 - share) ** 0.5),
        )
        top, left = (
            int(rng.integers(height - cut_height + 1)),
            int(rng.integers(width - cut_width + 1)),
        )
        pixels[:, top : top + cut_height, left : left + cut_width] = other[
            :, top : top + cut_height, left : left + cut_width
        ]
        share = 1 - cut_height * cut_width / (height * width)  # the true share, after rounding
    else:
        pixels = pixels.mul_(share).add_(other, alpha=1 - share)
    targets = functional.one_hot(labels, classes).float()
    return pixels, targets * share + targets.flip(0) * (1 - share)
