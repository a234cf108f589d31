"""Random views of a picture: pure functions of the picture and a generator, which trainer/common/randomness.py makes from (seed, epoch, sample)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional

from trainer.images.decode import FILTERS

GRAIN = 32768  # elements from which PyTorch shares an operation out among threads (at::internal::GRAIN_SIZE)


@dataclass(frozen=True)
class Augmentation:
    """scale: bounds of the view's share of the picture's area. ratio: bounds of its width to its height, before it becomes a square.
    flip: mirror half of the views. trivial: TrivialAugmentWide, see `trivial_augment`."""

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
    """A random part of pixels [H, W, 3], resized to [size, size, 3], perhaps mirrored, perhaps changed by one random operation."""
    height, width = pixels.shape[:2]
    top, left, box_height, box_width = random_box(
        height, width, augmentation.scale, augmentation.ratio, rng
    )
    view = resize(pixels[top : top + box_height, left : left + box_width], size, interpolation)
    if augmentation.flip and rng.random() < 0.5:
        view = mirror(view)
    if augmentation.trivial:
        view = np.array(trivial_augment(Image.fromarray(view), rng))
    return view


def resize(pixels: NDArray[np.uint8], size: int, interpolation: str) -> NDArray[np.uint8]:
    """pixels [H, W, 3] as [size, size, 3], antialiased.

    Bilinear and bicubic by PyTorch: five times as fast as Pillow, and within 1 of each of its values (bicubic: 2).
    """
    if interpolation not in ("bilinear", "bicubic"):
        return np.array(Image.fromarray(pixels).resize((size, size), FILTERS[interpolation]))
    # The kernel for bytes, which takes one thread only, wants them close together: it would make this copy itself.
    picture = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
    resized: NDArray[np.uint8] = (
        functional.interpolate(picture, (size, size), mode=interpolation, antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    return resized


def mirror(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """pixels [H, W, 3] with left and right exchanged, which NumPy would do pixel by pixel."""
    # In strips so small that PyTorch does each in this thread: one that loads pictures should start no others.
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
    """(top, left, height, width) of a random box, as torchvision.transforms.RandomResizedCrop.get_params samples it: area and log ratio are
    uniform; after ten boxes that do not fit, the largest centred one with an allowed ratio."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return (
                int(rng.integers(height - box_height + 1)),
                int(rng.integers(width - box_width + 1)),
                box_height,
                box_width,
            )
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


# --- TrivialAugmentWide (Müller and Hutter 2021, arXiv:2103.10158), operation by operation as torchvision.transforms.TrivialAugmentWide has it ---

STRENGTHS = 31  # equal steps from none to the operation's largest strength


def trivial_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One operation out of fourteen, at one of 31 strengths, of random sign where it has one. The area that it leaves empty becomes black."""
    operation, strongest, signed = OPERATIONS[rng.integers(len(OPERATIONS))]
    strength = strongest * rng.integers(STRENGTHS) / (STRENGTHS - 1)
    if signed and rng.random() < 0.5:
        strength = -strength
    return operation(image, float(strength))


def _affine(
    image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float
) -> Image.Image:
    """The output's pixel (x, y) comes from (a x + b y + c, d x + e y + f) of the input."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=(0, 0, 0)
    )


def _identity(image: Image.Image, _: float) -> Image.Image:
    return image


def _shear_x(image: Image.Image, slope: float) -> Image.Image:
    return _affine(image, 1, slope, 0, 0, 1, 0)


def _shear_y(image: Image.Image, slope: float) -> Image.Image:
    return _affine(image, 1, 0, 0, slope, 1, 0)


def _translate_x(image: Image.Image, distance: float) -> Image.Image:
    return _affine(image, 1, 0, -int(distance), 0, 1, 0)


def _translate_y(image: Image.Image, distance: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, -int(distance))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, fillcolor=(0, 0, 0))


def _brightness(image: Image.Image, change: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + change)


def _color(image: Image.Image, change: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 + change)


def _contrast(image: Image.Image, change: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 + change)


def _sharpness(image: Image.Image, change: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + change)


def _posterize(image: Image.Image, bits_lost: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(bits_lost))


def _solarize(image: Image.Image, below_white: float) -> Image.Image:
    """Inverts the values from 255 - below_white on."""
    return ImageOps.solarize(image, math.ceil(255 - below_white))


def _autocontrast(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.equalize(image)


# (operation, largest strength, whether it also has a negative side)
OPERATIONS: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, bool], ...] = (
    (_identity, 0.0, False),
    (_shear_x, 0.99, True),
    (_shear_y, 0.99, True),
    (_translate_x, 32.0, True),
    (_translate_y, 32.0, True),
    (_rotate, 135.0, True),
    (_brightness, 0.99, True),
    (_color, 0.99, True),
    (_contrast, 0.99, True),
    (_sharpness, 0.99, True),
    (_posterize, 6.0, False),
    (_solarize, 255.0, False),
    (_autocontrast, 0.0, False),
    (_equalize, 0.0, False),
)
