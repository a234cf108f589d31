"""Random views of an image: pure functions of it and a generator.

trainer/common/randomness.py makes the generator from (seed, epoch, sample).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional

from trainer.images.decode import FILTERS

# Elements from which PyTorch shares an operation out among threads (at::internal::GRAIN_SIZE).
GRAIN = 32768


@dataclass(frozen=True)
class Augmentation:
    """How random views differ.

    scale: bounds of the view's share of the image's area. ratio: bounds of its width to its
    height, before it becomes a square. flip: mirror half of the views. trivial: TrivialAugmentWide,
    see `trivial_augment`.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    trivial: bool


def random_view(
    pixels: NDArray[np.uint8],
    size: int,
    interpolation: str,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Return a random part of pixels uint8 [H, W, 3], resized to [size, size, 3].

    It is perhaps mirrored, perhaps changed by one random operation.
    """
    height, width = pixels.shape[:2]
    top, left, height, width = random_box(
        height, width, augmentation.scale, augmentation.ratio, rng
    )
    view = resize(pixels[top : top + height, left : left + width], size, interpolation)
    if augmentation.flip and rng.random() < 0.5:
        view = mirror(view)
    if augmentation.trivial:
        view = np.array(trivial_augment(Image.fromarray(view), rng))
    return view


def resize(pixels: NDArray[np.uint8], size: int, interpolation: str) -> NDArray[np.uint8]:
    """Return pixels uint8 [H, W, 3] as [size, size, 3], antialiased.

    Bilinear and bicubic by PyTorch: five times as fast as Pillow, and within 1 of each of its
    values (bicubic: 2).
    """
    if interpolation not in ("bilinear", "bicubic"):
        return np.array(Image.fromarray(pixels).resize((size, size), FILTERS[interpolation]))
    # The kernel for bytes, which takes one thread only, wants them close together: it would make
    # this copy itself.
    image = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
    resized: NDArray[np.uint8] = (
        functional.interpolate(image, (size, size), mode=interpolation, antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    return resized


def mirror(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels uint8 [H, W, 3] mirrored, which NumPy would do pixel by pixel."""
    # In strips so small that PyTorch does each in this thread: one that loads images should start
    # no others.
    rows = max(1, (GRAIN - 1) // pixels[0].size)
    return torch.cat(
        [strip.flip(1) for strip in torch.split(torch.from_numpy(pixels), rows)]
    ).numpy()


def random_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random box in an image of height x width.

    It is sampled as torchvision.transforms.RandomResizedCrop.get_params does: area and log ratio
    are uniform; after ten boxes that do not fit, the largest centred one with an allowed ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


# --- TrivialAugmentWide (Müller and Hutter 2021, arXiv:2103.10158) ---
# Operation by operation as torchvision.transforms.TrivialAugmentWide has it.

STRENGTHS = 31  # equal steps from none to the operation's largest strength


def trivial_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the image after one operation out of fourteen, at one of 31 strengths.

    Its sign is random where it has one. The area that it leaves empty becomes black.
    """
    operation, strongest, signed = OPERATIONS[rng.integers(len(OPERATIONS))]
    strength = strongest * rng.integers(STRENGTHS) / (STRENGTHS - 1)
    if signed and rng.random() < 0.5:
        strength = -strength
    return operation(image, float(strength))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Return the image whose pixel (x, y) comes from (a x + b y + c, d x + e y + f).

    matrix: a, b, c, d, e, f.
    """
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(0, 0, 0))


# (operation on an image with a strength, largest strength, whether it also has a negative side)
OPERATIONS: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, bool], ...] = (
    (lambda image, _: image, 0.0, False),  # identity
    (lambda image, slope: _affine(image, (1, slope, 0, 0, 1, 0)), 0.99, True),  # shear
    (lambda image, slope: _affine(image, (1, 0, 0, slope, 1, 0)), 0.99, True),
    (lambda image, far: _affine(image, (1, 0, -int(far), 0, 1, 0)), 32.0, True),  # translate
    (lambda image, far: _affine(image, (1, 0, 0, 0, 1, -int(far))), 32.0, True),
    (lambda image, degrees: image.rotate(degrees, fillcolor=(0, 0, 0)), 135.0, True),
    (lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change), 0.99, True),
    (lambda image, change: ImageEnhance.Color(image).enhance(1 + change), 0.99, True),
    (lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change), 0.99, True),
    (lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change), 0.99, True),
    (lambda image, bits: ImageOps.posterize(image, 8 - round(bits)), 6.0, False),
    # Inverts the values from 255 - strength on.
    (lambda image, span: ImageOps.solarize(image, math.ceil(255 - span)), 255.0, False),
    (lambda image, _: ImageOps.autocontrast(image), 0.0, False),
    (lambda image, _: ImageOps.equalize(image), 0.0, False),
)
