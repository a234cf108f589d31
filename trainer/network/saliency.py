"""Where in a picture a network sees a class: gradient times activation, at the last grid there is.

HiResCAM (Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of
convolutional neural networks", 2020). Where an average over the positions and a linear head follow,
as in most convolutional networks, it is Grad-CAM (Selvaraju et al. 2017) and shows what each place
added to the logit. Of a transformer the grid is that of the patches before its last attention: what
comes behind it no longer touches the class token.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.network.build import Classifier

PREFIX = 8  # tokens before those of the patches at most: the class's, and registers


def where(network: Classifier, pixels: NDArray[np.uint8], label: int) -> NDArray[np.float32] | None:
    """Return [h, w] in 0..1: how much each place speaks for a class.

    pixels: uint8 [size, size, 3], as the network sees them. None where no layer has places, or
    none speaks for it.
    """
    network.eval()
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and _places(output) is not None:
            kept.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.backbone.modules()]
    try:
        with torch.enable_grad():
            image = torch.from_numpy(pixels)[None].to(network.mean).requires_grad_()
            logits = network.head(network.features(image))
            gradients = torch.autograd.grad(logits[0, label], kept, allow_unused=True)
    except RuntimeError:  # a layer that has no gradient, or changed its output in place
        return None
    finally:
        for hook in hooks:
            hook.remove()
    for output, gradient in zip(reversed(kept), reversed(gradients), strict=True):
        # Of the width that the last of them has: between two of these a layer may have its own.
        if gradient is None or _width(output) != _width(kept[-1]):
            continue
        slopes, values = _places(gradient), _places(output)
        if slopes is not None and values is not None and slopes.abs().sum() > 0:
            return _share((slopes * values).sum(-1))
    return None


def _share(evidence: Tensor) -> NDArray[np.float32] | None:
    """Return what speaks for the class, as shares of the most; None where nothing does."""
    positive = evidence.detach().float().clamp(min=0)
    most = positive.max()
    if not most > 0:  # nor where it is NaN
        return None
    shares: NDArray[np.float32] = (positive / most).cpu().numpy()
    return shares


def _places(output: Tensor) -> Tensor | None:
    """Return [h, w, channels] of a layer's output of one image; None where it has no places."""
    if output.ndim == 4:
        _, first, second, third = output.shape
        if second == third > 1:  # [1, channels, h, w]
            return output[0].permute(1, 2, 0)
        if first == second > 1:  # [1, h, w, channels]
            return output[0]
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        prefix = output.shape[1] - side**2
        if side > 1 and prefix <= PREFIX:  # [1, tokens, channels]
            return output[0, prefix:].reshape(side, side, -1)
    return None


def _width(output: Tensor) -> int:
    places = _places(output)
    assert places is not None
    return places.shape[-1]
