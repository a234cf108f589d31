"""Draw where in a picture a network saw a class. `network.saliency` computes it."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DARKEST = 0.25  # brightness of a pixel that did not count


def lit(pixels: NDArray[np.uint8], where: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels [H, W, 3], bright where they counted and dark elsewhere.

    where: [h, w], 0..1. Brightness, since any colour may be in the picture itself.
    """
    height, width = pixels.shape[:2]
    mask = Image.fromarray(where).resize((width, height), Image.Resampling.BICUBIC)
    light = DARKEST + (1 - DARKEST) * np.clip(np.asarray(mask), 0, 1)
    shown: NDArray[np.uint8] = (pixels * light[..., None]).round().astype(np.uint8)
    return shown
