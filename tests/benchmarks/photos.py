"""JPEGs of realistic entropy: random crops of the photos of scikit-image or scikit-learn."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.common.errors import UserError

# Photographs, no drawings and no microscopy, in the packages' own folders.
SOURCES = {
    "skimage": [
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/rocket.jpg",
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
QUALITY = 90
CLASSES = 10


def write(root: Path, count: int, width: int, height: int) -> Path:
    """Write root/train/CLASS/*.jpg: pictures of about width x height pixels, up to 5 % smaller."""
    photos, rng = originals(), np.random.default_rng(0)
    for number in range(count):
        photo = photos[rng.integers(len(photos))]
        target = [round(side * rng.uniform(0.95, 1)) for side in (width, height)]
        # Where the photo is too small it is enlarged; most of what a camera's 12 megapixels hold is
        # smooth as well.
        scale = max(1.0, *(1.05 * side / own for side, own in zip(target, photo.size, strict=True)))
        part = [side / scale for side in target]
        left, upper = (
            rng.uniform(0, own - side) for own, side in zip(photo.size, part, strict=True)
        )
        crop = photo.resize(
            target, Image.Resampling.BICUBIC, (left, upper, left + part[0], upper + part[1])
        )
        folder = root / "train" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        crop.save(folder / f"{number:04d}.jpg", quality=QUALITY)
    return root


def given() -> Path | None:
    """The folder of train/CLASS/*.jpg, valid and test that `--photos` named."""
    named = os.environ.get("BENCH_PHOTOS")
    if not named:
        return None
    return Path(named)


def classified() -> Iterator[tuple[str, Image.Image]]:
    """Each photo with its class: those of `--photos`, or else some from packages, spread evenly."""
    root = given()
    if root is None:
        for number, photo in enumerate(originals()):
            yield f"class{number % 2}", photo
        return
    for path in sorted(root.glob("*/*/*.jpg")):
        with Image.open(path) as photo:
            yield path.parent.name, photo.convert("RGB")


def originals() -> list[Image.Image]:
    photos = []
    for package, names in SOURCES.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            photos += [Image.open(Path(spec.origin).parent / name).convert("RGB") for name in names]
    if not photos:
        raise UserError("the benchmarks need real photos: make setup EXTRA=bench")
    return photos
