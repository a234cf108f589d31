import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    InterpolationMode,
    RandAugment,
    RandomResizedCrop,
    TrivialAugmentWide,
    autoaugment,
    v2,
)
from torchvision.transforms.v2 import functional as reference

from trainer.common.randomness import Purpose, generator
from trainer.images.augment import (
    OPERATIONS,
    STRENGTHS,
    Augmentation,
    erase,
    jitter,
    jitter_factors,
    mirror,
    rand_augment,
    rand_augment_limit,
    random_box,
    random_view,
    trivial_augment,
)
from trainer.images.decode import FILTERS

SCALE, RATIO = (0.25, 1.0), (0.75, 1.3333)
PLAIN = Augmentation(scale=SCALE, ratio=RATIO, flip=False, trivial=False)
ALL = Augmentation(
    SCALE, RATIO, flip=True, trivial=True, vertical_flip=True, rotation=20,
    jitter=(0.4, 0.4, 0.4, 0.1), randaugment=2, erasing=0.5,
)  # fmt: skip
WHOLE = Augmentation((1.0, 1.0), (80 / 60, 80 / 60), flip=False, trivial=False)


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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 3), (300, 224, 3), (2, 20000, 3)])
def test_mirroring_exchanges_left_and_right(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    random = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(mirror(random), random[:, ::-1])


def test_the_picture_itself_is_not_changed(pixels):
    before = pixels.copy()
    for sample in range(50):
        random_view(pixels, 32, "bilinear", ALL, rng(sample))[:] = 0
    assert np.array_equal(pixels, before)


def test_half_of_the_views_are_mirrored(pixels):
    straight = whole_view(pixels)
    views = [whole_view(pixels, sample, flip=True) for sample in range(400)]
    mirrored = [np.array_equal(view, straight[:, ::-1]) for view in views]
    assert all(
        np.array_equal(view, straight)
        for view, is_mirrored in zip(views, mirrored, strict=True)
        if not is_mirrored
    )
    assert 160 < sum(mirrored) < 240  # 4 standard deviations


def whole_view(pixels, sample=0, **changes):
    """A view of all of the picture, which differs by `changes` alone."""
    return random_view(pixels, 60, "bilinear", replace(WHOLE, **changes), rng(sample))


def test_half_of_the_views_are_upside_down(pixels):
    straight = whole_view(pixels)
    views = [whole_view(pixels, sample, vertical_flip=True) for sample in range(400)]
    turned = [np.array_equal(view, straight[::-1]) for view in views]
    assert sum(turned) + sum(np.array_equal(view, straight) for view in views) == 400
    assert 160 < sum(turned) < 240  # 4 standard deviations


def drawn(sample=0):
    """The generator of a whole view after its box and before what changes it."""
    random = rng(sample)
    random_box(60, 80, WHOLE.scale, WHOLE.ratio, random)
    return random


def test_a_view_is_turned_as_torchvision_turns_it(pixels):
    angles = []
    for sample in range(50):
        angles.append(drawn(sample).uniform(-30, 30))
        expected = reference.rotate(
            Image.fromarray(whole_view(pixels)), angles[-1], InterpolationMode.BILINEAR
        )
        view = whole_view(pixels, sample, rotation=30)
        assert np.array_equal(view, np.asarray(expected)), angles[-1]
    assert min(angles) < -20 and max(angles) > 20


@pytest.mark.parametrize("strengths", [(0.4, 0.3, 0.2, 0.1), (0, 0, 0, 0.5), (1, 0, 0, 0)])
def test_colours_change_as_torchvision_changes_them(pixels, strengths):
    theirs = v2.ColorJitter(*strengths)
    image, orders = Image.fromarray(whole_view(pixels)), set()
    for sample in range(50):
        order, factors = jitter_factors(strengths, drawn(sample))
        names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
        expected = theirs.transform(
            image, {"fn_idx": torch.tensor(order), **dict(zip(names, factors, strict=True))}
        )
        assert np.array_equal(np.asarray(jitter(image, order, factors)), np.asarray(expected))
        assert np.array_equal(whole_view(pixels, sample, jitter=strengths), np.asarray(expected))
        for factor, strength, middle in zip(factors, strengths, (1, 1, 1, 0), strict=True):
            assert (factor is None) == (strength == 0)
            assert factor is None or abs(factor - middle) <= strength
        orders.add(tuple(order))
    assert len(orders) > 15  # of 24


def test_some_views_get_a_rectangle_of_noise(pixels):
    straight = whole_view(pixels)
    views = [whole_view(pixels, sample, erasing=0.25) for sample in range(400)]
    assert 65 < sum(not np.array_equal(view, straight) for view in views) < 135
    for sample in range(20):
        random = rng(sample)
        box = random_box(60, 60, (0.02, 0.33), (0.3, 3.3), random)
        noise = random.integers(0, 256, (*box[2:], 3), np.uint8)
        image, value = (torch.from_numpy(each).permute(2, 0, 1) for each in (straight, noise))
        expected = reference.erase(image, *box, value)
        assert np.array_equal(erase(straight, rng(sample)), expected.permute(1, 2, 0))
        assert noise.std() > 60


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


def test_erased_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    picture, theirs, random, count = torch.zeros(3, 200, 200), v2.RandomErasing(), rng(), 3000
    ours = [random_box(200, 200, (0.02, 0.33), (0.3, 3.3), random) for _ in range(count)]
    params = [theirs.make_params([picture]) for _ in range(count)]
    boxes = [[each[key] for key in "ijhw"] for each in params]
    both = zip(features(np.array(ours, float)), features(np.array(boxes, float)), strict=True)
    for ours_of, theirs_of in both:
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


# --- RandAugment: the same operations, which the tests above compare ---


@pytest.mark.parametrize("number", range(14), ids=NAMES)
def test_limits_of_randaugment_are_torchvisions(pixels, number):
    image = Image.fromarray(pixels)
    space = RandAugment()._augmentation_space(STRENGTHS, (image.height, image.width))
    magnitudes, signed = space[NAMES[number]]
    changeless = {"Posterize": 8, "Solarize": 255}.get(NAMES[number], 0)
    theirs = np.abs(magnitudes.numpy() - changeless).reshape(-1).astype(float)
    limit = rand_augment_limit(number, image.size)
    ours = np.linspace(0, limit, STRENGTHS) if limit else np.zeros(1)
    if NAMES[number] == "Posterize":
        ours = np.round(ours)
    assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    assert signed == OPERATIONS[number][2]


def test_operations_of_randaugment_are_drawn_alike_at_one_strength(monkeypatch):
    drawn = []
    spies = [
        (lambda image, strength, number=number: drawn.append((number, strength)), 0, signed)
        for number, (_, _, signed) in enumerate(OPERATIONS)
    ]
    monkeypatch.setattr("trainer.images.augment.OPERATIONS", tuple(spies))
    random, image = rng(), Image.new("RGB", (80, 60))
    for _ in range(14000):
        rand_augment(image, 9, random)
    numbers, strengths = np.array(drawn).T
    assert np.abs(np.bincount(numbers.astype(int)) - 1000).max() < 130  # 4 standard deviations
    for number in range(14):
        strength = 0.3 * rand_augment_limit(number, image.size)
        assert set(np.abs(strengths[numbers == number]).round(6)) == {round(strength, 6)}
        negative = (strengths[numbers == number] < 0).mean()
        assert abs(negative - 0.5) < 0.07 if spies[number][2] and strength else negative == 0
