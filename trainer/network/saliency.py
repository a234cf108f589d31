"""Where in a picture a network sees a class: gradient times activation, at the last grid of places.

HiResCAM (Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of
convolutional neural networks", 2020). Where an average over the positions and a linear head follow,
as in most convolutional networks, it is Grad-CAM (Selvaraju et al. 2017) and shows what each place
added to the logit. In a transformer the grid is that of the patches before the last attention:
later patches no longer influence the class token.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.network.build import Classifier

PREFIX = 8  # at most so many tokens come before the patches': the class token, and registers


class Saliency:
    """Finds where a network sees a class.

    It looks for the layer once, from the last one backwards. It computes no gradient of earlier
    layers, so a picture costs little more than a prediction.
    """

    def __init__(self, network: Classifier) -> None:
        self._network = network
        self._layer: nn.Module | None = None

    def where(self, pixels: NDArray[np.uint8], label: int) -> NDArray[np.float32] | None:
        """Return [h, w] in 0..1: how much each place speaks for a class.

        pixels: uint8 [size, size, 3], as the network sees them. None where no layer has places, or
        no place speaks for the class.
        """
        self._network.eval()
        image = torch.from_numpy(pixels)[None].to(self._network.mean.device)
        layers = [self._layer] if self._layer is not None else self._candidates(image)
        for layer in layers:
            try:
                places, slopes = self._slopes(layer, image, label)
            except RuntimeError:  # the layer has no gradient, or is used more than once
                continue
            if slopes.abs().sum() > 0:
                self._layer = layer
                return _share((slopes * places).sum(-1))
        return None

    def _candidates(self, image: Tensor) -> list[nn.Module]:
        """Return the layers whose output has places, the last first.

        Only those as wide as the last one: a layer between two of these may have another width.
        """
        seen: list[tuple[nn.Module, int]] = []

        def note(layer: nn.Module, _inputs: Any, output: Any) -> None:
            places = _places(output)
            if places is not None:
                seen.append((layer, places.shape[-1]))

        hooks = [layer.register_forward_hook(note) for layer in self._network.backbone.modules()]
        try:
            with torch.no_grad():
                self._network.features(image)
        finally:
            for hook in hooks:
                hook.remove()
        return [layer for layer, width in reversed(seen) if width == seen[-1][1]]

    def _slopes(self, layer: nn.Module, image: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Return [h, w, channels] of a layer's output, and the gradient of the logit by it."""
        kept: list[Tensor] = []

        def begin(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            kept.append(output.detach().requires_grad_())
            return kept[-1].clone()  # a copy: a later layer may change it in place

        hook = layer.register_forward_hook(begin)
        try:
            with torch.no_grad():
                logits = self._network.head(self._network.features(image))
                (gradient,) = torch.autograd.grad(logits[0, label], kept)
        finally:
            hook.remove()
        places, slopes = _places(kept[0].detach()), _places(gradient)
        assert places is not None and slopes is not None
        return places, slopes


def _share(evidence: Tensor) -> NDArray[np.float32] | None:
    """Return the positive evidence as shares of its maximum; None where there is none."""
    positive = evidence.detach().float().clamp(min=0)
    most = positive.max()
    if not most > 0:  # false for NaN too
        return None
    shares: NDArray[np.float32] = (positive / most).cpu().numpy()
    return shares


def _places(output: Any) -> Tensor | None:
    """Return [h, w, channels] of a layer's output of one image; None where it has no places."""
    if not isinstance(output, Tensor):
        return None
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
