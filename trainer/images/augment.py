"""Random views of an image: pure functions of it and a generator.

trainer/common/randomness.py makes the generator from (seed, epoch, sample).
"""

import math
from collections.abc import Callable, Sequence
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
    height, before it becomes a square. flip, vertical_flip: mirror half of the views, left to right
    or top to bottom. rotation: degrees by which a view is turned at most, either way. jitter: see
    `jitter_factors`. randaugment: operations of RandAugment a view, of strength magnitude, see
    `rand_augment`. trivial: TrivialAugmentWide, see `trivial_augment`. erasing: share of the views
    that get a rectangle of noise, see `erase`.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    trivial: bool
    vertical_flip: bool = False
    rotation: float = 0.0
    jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    randaugment: int = 0
    magnitude: int = 9
    erasing: float = 0.0

    @property
    def changes_image(self) -> bool:
        """Return whether a view, once it has its size, goes through Pillow."""
        return self.rotation > 0 or any(self.jitter) or self.randaugment > 0 or self.trivial


def random_view(
    pixels: NDArray[np.uint8],
    size: int,
    interpolation: str,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Return a random part of pixels uint8 [H, W, 3], resized to [size, size, 3].

    It is perhaps mirrored, and changed at random, as augmentation says.
    """
    height, width = pixels.shape[:2]
    top, left, height, width = random_box(
        height, width, augmentation.scale, augmentation.ratio, rng
    )
    view = resize(pixels[top : top + height, left : left + width], size, interpolation)
    if augmentation.flip and rng.random() < 0.5:
        view = mirror(view)
    if augmentation.vertical_flip and rng.random() < 0.5:
        view = view[::-1].copy()
    if augmentation.changes_image:
        view = np.array(_changed(Image.fromarray(view), augmentation, rng))
    if augmentation.erasing and rng.random() < augmentation.erasing:
        view = erase(view, rng)
    return view


def _changed(
    image: Image.Image, augmentation: Augmentation, rng: np.random.Generator
) -> Image.Image:
    if augmentation.rotation:
        degrees = rng.uniform(-augmentation.rotation, augmentation.rotation)
        image = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0))
    if any(augmentation.jitter):
        image = jitter(image, *jitter_factors(augmentation.jitter, rng))
    for _ in range(augmentation.randaugment):
        image = rand_augment(image, augmentation.magnitude, rng)
    if augmentation.trivial:
        image = trivial_augment(image, rng)
    return image


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
    image = torch.from_numpy(pixels)
    if torch.get_num_threads() == 1:
        mirrored: NDArray[np.uint8] = image.flip(1).numpy()
        return mirrored
    # In strips so small that PyTorch does each in this thread, and does not wait for others.
    rows = max(1, (GRAIN - 1) // pixels[0].size)
    return torch.cat([strip.flip(1) for strip in torch.split(image, rows)]).numpy()


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


# --- random erasing (Zhong et al. 2020, arXiv:1708.04896) ---

ERASED = (0.02, 0.33), (0.3, 3.3)  # share of the area, and ratio of the sides: the paper's


def erase(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return pixels uint8 [H, W, 3] with a random box of noise, the paper's best of its fillings.

    The box is one of those that torchvision.transforms.RandomErasing takes.
    """
    height, width = pixels.shape[:2]
    top, left, height, width = random_box(height, width, *ERASED, rng)
    erased = pixels.copy()
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    erased[top : top + height, left : left + width] = noise
    return erased


# --- colour jitter, as torchvision.transforms.ColorJitter has it ---


def jitter_factors(
    strengths: Sequence[float], rng: np.random.Generator
) -> tuple[list[int], list[float | None]]:
    """Return an order of the four changes, and the factor of each; None: it is left out.

    strengths: of brightness, contrast, saturation and hue, whose factors are uniform in
    1 - strength..1 + strength, and in -strength..strength for hue (0.5 is once around).
    """
    order = rng.permutation(4).tolist()
    factors: list[float | None] = []
    for change, strength in enumerate(strengths):
        middle = 0.0 if change == HUE else 1.0
        factor = rng.uniform(middle - strength, middle + strength)
        factors.append(factor if strength else None)
    return order, factors


def jitter(image: Image.Image, order: list[int], factors: list[float | None]) -> Image.Image:
    """Return the image after the changes that `jitter_factors` chose."""
    for change in order:
        factor = factors[change]
        if factor is not None:
            image = CHANGES[change](image, factor)
    return image


def _turn_hue(image: Image.Image, factor: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(int(factor * 255) % 256))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


HUE = 3
CHANGES: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _turn_hue,
)


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


def rand_augment(image: Image.Image, magnitude: int, rng: np.random.Generator) -> Image.Image:
    """Return the image after one operation of RandAugment (Cubuk et al. 2020, arXiv:1909.13719).

    It is one of TrivialAugmentWide's, with weaker limits. magnitude: of its strength, in
    0..STRENGTHS - 1. As torchvision.transforms.RandAugment(num_ops=1) has it.
    """
    number = int(rng.integers(len(OPERATIONS)))
    operation, _, signed = OPERATIONS[number]
    strength = rand_augment_limit(number, image.size) * magnitude / (STRENGTHS - 1)
    if signed and rng.random() < 0.5:
        strength = -strength
    return operation(image, strength)


def rand_augment_limit(number: int, size: tuple[int, int]) -> float:
    """Return the largest strength of an operation in an image of size (width, height)."""
    limit = RAND_AUGMENT_LIMITS[number]
    if number in TRANSLATIONS:
        return limit * size[TRANSLATIONS.index(number)]
    return limit


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

# RandAugment's, in the order of OPERATIONS; of the translations as a share of width and height.
TRANSLATIONS = (3, 4)
RAND_AUGMENT_LIMITS = (
    *(0.0, 0.3, 0.3, 150 / 331, 150 / 331, 30.0, 0.9, 0.9, 0.9, 0.9),
    *(4.0, 255.0, 0.0, 0.0),
)
