import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    InterpolationMode,
    RandomResizedCrop,
    TrivialAugmentWide,
    autoaugment,
)
from torchvision.transforms.v2 import functional as reference

from trainer.common.randomness import Purpose, generator
from trainer.images.augment import (
    OPERATIONS,
    STRENGTHS,
    Augmentation,
    mirror,
    random_box,
    random_view,
    trivial_augment,
)
from trainer.images.decode import FILTERS

SCALE, RATIO = (0.25, 1.0), (0.75, 1.3333)
PLAIN = Augmentation(scale=SCALE, ratio=RATIO, flip=False, trivial=False)
ALL = Augmentation(scale=SCALE, ratio=RATIO, flip=True, trivial=True)


@pytest.fixture(scope="module")
def pixels():
    """Smooth colours under noise, [60, 80, 3]: so that every operation has something to change."""
    y, x = np.mgrid[:60, :80]
    smooth = np.stack([3 * x, 4 * y, 2 * x + y], 2)
    return np.clip(
        smooth + np.random.default_rng(0).integers(-20, 20, smooth.shape), 5, 235
    ).astype(np.uint8)


def rng(sample=0, epoch=0, seed=0):
    return generator(Purpose.VIEW, seed, epoch, sample)


# --- views ---


def test_a_view_depends_on_its_generator_alone(pixels):
    views = [random_view(pixels, 32, "bilinear", ALL, rng(sample)) for sample in range(20)]
    again = [
        random_view(pixels, 32, "bilinear", ALL, rng(sample)) for sample in reversed(range(20))
    ]
    assert np.array_equal(views, again[::-1])
    assert len({view.tobytes() for view in views}) == 20
    assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in views)


def test_seed_epoch_and_sample_each_change_the_view(pixels):
    one = random_view(pixels, 32, "bilinear", PLAIN, rng())
    for other in (rng(sample=1), rng(epoch=1), rng(seed=1)):
        assert not np.array_equal(random_view(pixels, 32, "bilinear", PLAIN, other), one)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box"])
def test_a_view_equals_torchvisions_crop_of_the_same_box(pixels, interpolation):
    tensors = interpolation in (
        "bilinear",
        "bicubic",
    )  # the filters that torchvision has for tensors
    source = torch.from_numpy(pixels).permute(2, 0, 1) if tensors else Image.fromarray(pixels)
    for sample in range(20):
        box = random_box(60, 80, SCALE, RATIO, rng(sample))
        expected = reference.resized_crop(source, *box, [32, 32], InterpolationMode(interpolation))
        expected = expected.permute(1, 2, 0) if tensors else expected
        assert np.array_equal(
            random_view(pixels, 32, interpolation, PLAIN, rng(sample)), np.asarray(expected)
        )


@pytest.mark.parametrize(("interpolation", "levels"), [("bilinear", 1), ("bicubic", 2)])
@pytest.mark.parametrize("size", [16, 50, 200])
def test_a_view_is_pillows_but_for_rounding(pixels, interpolation, levels, size):
    for sample in range(20):
        top, left, height, width = random_box(60, 80, SCALE, RATIO, rng(sample))
        expected = Image.fromarray(pixels[top : top + height, left : left + width]).resize(
            (size, size), FILTERS[interpolation]
        )
        view = random_view(pixels, size, interpolation, PLAIN, rng(sample))
        assert np.abs(view.astype(int) - np.asarray(expected)).max() <= levels


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 3), (300, 224, 3), (2, 20000, 3)])
def test_mirroring_exchanges_left_and_right(shape):
    random = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(mirror(random), random[:, ::-1])


def test_the_picture_itself_is_not_changed(pixels):
    before = pixels.copy()
    for sample in range(50):
        random_view(pixels, 32, "bilinear", ALL, rng(sample))[:] = 0
    assert np.array_equal(pixels, before)


def test_half_of_the_views_are_mirrored(pixels):
    whole = {"scale": (1.0, 1.0), "ratio": (80 / 60, 80 / 60), "trivial": False}
    straight = random_view(pixels, 60, "bilinear", Augmentation(flip=False, **whole), rng())
    views = [
        random_view(pixels, 60, "bilinear", Augmentation(flip=True, **whole), rng(sample))
        for sample in range(400)
    ]
    mirrored = [np.array_equal(view, straight[:, ::-1]) for view in views]
    assert all(
        np.array_equal(view, straight)
        for view, is_mirrored in zip(views, mirrored, strict=True)
        if not is_mirrored
    )
    assert 160 < sum(mirrored) < 240  # 4 standard deviations


# --- boxes ---


@pytest.mark.parametrize(
    ("height", "width"), [(256, 341), (341, 256), (256, 1024), (28, 28), (1, 1), (1, 7)]
)
def test_boxes_lie_inside_the_picture(height, width):
    random = rng()
    for _ in range(500):
        top, left, box_height, box_width = random_box(height, width, SCALE, RATIO, random)
        assert 0 <= top <= top + box_height <= height and 0 <= left <= left + box_width <= width
        assert box_height > 0 and box_width > 0


def test_boxes_reach_every_place():
    random = rng()
    places = {random_box(3, 4, (0.3, 0.4), (1.0, 1.0), random) for _ in range(300)}
    assert places == {(top, left, 2, 2) for top in range(2) for left in range(3)}


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    picture, random, count = Image.new("RGB", (341, 256)), rng(), 4000
    ours = np.array([random_box(256, 341, SCALE, RATIO, random) for _ in range(count)], float)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(SCALE), list(RATIO)) for _ in range(count)],
        float,
    )
    for ours_of, theirs_of in zip(features(ours), features(theirs), strict=True):
        assert kolmogorov_smirnov(ours_of, theirs_of) < 1.95 * math.sqrt(2 / count)  # p = 0.001


def features(boxes):
    top, left, height, width = boxes.T
    return top, left, height, width, height * width, np.log(width / height)


def kolmogorov_smirnov(a, b):
    """The largest distance between the two samples' distribution functions."""
    points = np.concatenate([a, b])
    return np.abs(
        np.searchsorted(np.sort(a), points, "right") / len(a)
        - np.searchsorted(np.sort(b), points, "right") / len(b)
    ).max()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (100, 100)])
def test_where_no_box_fits_it_is_torchvisions_centre(height, width):
    impossible = [1.0, 1.0], [0.5, 0.6] if height == width else [0.9, 1.1]
    expected = RandomResizedCrop.get_params(Image.new("RGB", (width, height)), *impossible)
    assert random_box(height, width, *map(tuple, impossible), rng()) == expected


# --- TrivialAugmentWide ---

NAMES = [
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
]
NAMES += ["Solarize", "AutoContrast", "Equalize"]  # torchvision's, in the order of OPERATIONS


def their_strengths(number):
    """torchvision's magnitudes in our terms: 0 changes nothing (in float32, so rounded)."""
    magnitudes, signed = TrivialAugmentWide(STRENGTHS)._augmentation_space(STRENGTHS)[NAMES[number]]
    changeless = {"Posterize": 8, "Solarize": 255}.get(NAMES[number], 0)
    return np.abs(magnitudes.numpy() - changeless).reshape(-1).astype(float), changeless, signed


@pytest.mark.parametrize("number", range(14), ids=NAMES)
def test_strengths_and_signs_are_torchvisions(number):
    _, strongest, signed = OPERATIONS[number]
    theirs, _, their_signed = their_strengths(number)
    ours = np.linspace(0, strongest, STRENGTHS) if strongest else np.zeros(1)
    assert np.allclose(
        np.round(ours) if NAMES[number] == "Posterize" else ours, theirs, rtol=1e-5, atol=1e-4
    )
    assert signed == their_signed


@pytest.mark.parametrize("size", [(64, 64), (80, 60)])
@pytest.mark.parametrize("number", range(14), ids=NAMES)
def test_each_operation_equals_torchvisions_at_every_strength(pixels, number, size):
    operation = OPERATIONS[number][0]
    image = Image.fromarray(pixels).resize(size)
    strengths, changeless, signed = their_strengths(number)
    for strength in [*strengths, *(-strengths if signed else [])]:
        theirs = autoaugment._apply_op(
            image,
            NAMES[number],
            changeless - strength if changeless else strength,
            InterpolationMode.NEAREST,
            None,
        )
        assert np.array_equal(np.asarray(operation(image, strength)), np.asarray(theirs)), strength


def test_posterize_loses_whole_bits_like_torchvisions(pixels):
    image, bits = (
        Image.fromarray(pixels),
        TrivialAugmentWide(STRENGTHS)._augmentation_space(STRENGTHS)["Posterize"][0],
    )
    for step in range(STRENGTHS):
        operation, strongest, _ = OPERATIONS[NAMES.index("Posterize")]
        ours = operation(image, strongest * step / (STRENGTHS - 1))
        assert np.array_equal(
            np.asarray(ours), np.asarray(reference.posterize(image, int(bits[step])))
        )


def test_all_operations_strengths_and_signs_are_drawn_alike(monkeypatch):
    drawn = []
    spies = [
        (
            lambda image, strength, number=number: drawn.append((number, strength)),
            30.0,
            number % 2 == 0,
        )
        for number in range(14)
    ]
    monkeypatch.setattr("trainer.images.augment.OPERATIONS", tuple(spies))
    random = rng()
    for _ in range(14000):
        trivial_augment(None, random)
    numbers, strengths = np.array(drawn).T
    assert np.abs(np.bincount(numbers.astype(int)) - 1000).max() < 130  # 4 standard deviations
    signed = numbers % 2 == 0
    assert set(strengths[signed]) == set(range(-30, 31))
    assert set(strengths[~signed]) == set(range(31))
    assert np.abs(np.bincount(np.abs(strengths).astype(int)) - 14000 / 31).max() < 90
    assert abs((strengths[signed] > 0).mean() - (strengths[signed] < 0).mean()) < 0.05
