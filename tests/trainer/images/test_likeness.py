"""What is the same, what nearly, and what only looks alike."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.trainer.scenes import scene
from trainer.images import likeness
from trainer.images.datasets import EMBEDDED


def pairs(*images: Image.Image) -> set[tuple[int, int]]:
    squares = [likeness.square(np.asarray(image)) for image in images]
    return {(one, other) for one, other, _ in likeness.near(likeness.sketch(squares), print)}


def saved(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def shifted(image: Image.Image, down: int, right: int) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), (down, right), (0, 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: saved(image, 40),
        lambda image: image.resize((160, 120)),
        lambda image: image.resize((150, 150)),
        lambda image: shifted(image, 0, 3),
        lambda image: shifted(image, 3, -3),
        lambda image: image.crop((3, 3, *image.size)),
        lambda image: image.point(lambda value: value * 3 // 4),
        lambda image: image.convert("L").convert("RGB"),
        ImageOps.mirror,
        lambda image: saved(shifted(ImageOps.mirror(image), 3, -3), 40),
    ],
    ids=[
        "saved",
        "smaller",
        "squeezed",
        "shifted",
        "shifted twice",
        "cut",
        "darker",
        "grey",
        "mirrored",
        "mirrored, shifted and saved",
    ],
)
def test_what_was_made_of_an_image_is_nearly_the_same(change: Callable[..., Image.Image]):
    scenes = [scene(seed) for seed in range(6)]
    assert pairs(*scenes, change(scenes[2])) == {(2, 6)}


def test_it_is_found_among_many_of_which_each_is_compared_with_few(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(likeness, "CLUSTER", 6)
    monkeypatch.setattr(likeness, "NEAREST", 2)
    scenes = [scene(seed) for seed in range(90)]
    changes = (
        lambda image: saved(image, 40),
        lambda image: image.resize((160, 120)),
        lambda image: shifted(image, 3, -3),
        lambda image: saved(shifted(ImageOps.mirror(image), 3, -3), 40),
    )
    made = [change(scenes[20 * number]) for number, change in enumerate(changes)]
    assert pairs(*scenes, *made) == {(20 * number, 90 + number) for number in range(4)}


def test_an_image_is_compared_with_a_bounded_number_of_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likeness, "CLUSTER", 8)
    rng = np.random.default_rng(0)
    squares = [rng.integers(0, 256, (64, 64)).astype(np.uint8) for _ in range(400)]
    spectra = likeness.sketch(squares).spectra
    clusters = likeness._Clusters(spectra)
    searched = clusters.nearest(spectra, likeness.NEAREST)
    sizes = np.bincount(clusters.nearest(spectra, 1)[:, 0])
    assert len(sizes) == 50
    assert sizes[searched].sum(axis=1).max() <= 400 / 3


def test_another_image_is_not():
    assert pairs(*map(scene, range(40))) == set()


def test_an_images_own_two_halves_make_no_pair():
    image = scene(0)
    image.paste(
        ImageOps.mirror(image.crop((0, 0, image.width // 2, image.height))),
        (image.width - image.width // 2, 0),
    )
    assert pairs(image, *map(scene, range(1, 6))) == set()


def test_many_copies_of_one_all_belong_together():
    """Frames of a film: none stands out from the others, and still all are the same."""
    frames = [saved(scene(0), quality) for quality in range(50, 95, 3)]
    assert {number for pair in pairs(*frames) for number in pair} == set(range(len(frames)))


def test_what_all_have_in_common_makes_no_two_the_same(monkeypatch: pytest.MonkeyPatch):
    """Trousers on a black ground, 28 pixels wide: no two are one, and all are alike."""
    with np.load(EMBEDDED) as arrays:
        trousers = arrays["train_x"][
            arrays["train_y"] == arrays["classes"].tolist().index("trouser")
        ]
    things = [Image.fromarray(pixels).convert("RGB") for pixels in trousers]
    assert len(pairs(*things)) <= 5
    assert (3, len(things)) in pairs(*things, things[3])
    monkeypatch.setattr(likeness, "STANDS_OUT", 1)
    assert len(pairs(*things)) > 50


def test_empty_images_are_like_none_and_are_told():
    black, grey = Image.new("RGB", (60, 40), (9, 4, 0)), Image.new("RGB", (60, 40), (120, 130, 120))
    images = [black, black, grey, grey, scene(0)]
    assert pairs(*images) == set()
    sketches = likeness.sketch([likeness.square(np.asarray(image)) for image in images])
    assert sketches.dark.tolist() == [True, True, False, False, False]
    assert sketches.blank.tolist() == [True, True, True, True, False]
