"""The CPU time from a process's start to its first training step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from tests.benchmarks.measure import Work, paired, ratio, short
from tests.benchmarks.table import Row, Table

TITLE = "Start"
PROJECT = Path(__file__).parents[2]
PICTURES = 64  # of train, and of valid
NOTE = """CPU time of a process from its start to the end of its first optimizer step, on 8 pictures
of 28 px. The bare script imports torch and torchvision, builds the network and steps once, on
random numbers. Ours is `python -m trainer` with everything that it does before: settings, the scan
of the class folders, the packed pixels (built before), a trial of the network, the run's directory
and its log. "Resumed" goes on from the checkpoint of a run that was killed in its second epoch, and
is held against a new run."""

BARE = """
import torch, torchvision
network = {network}
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
logits = network(torch.randn(8, 3, 28, 28))
torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).backward()
optimizer.step()
"""
SMALL = (
    "torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), "
    "torch.nn.Flatten(), torch.nn.Linear(32 * 26 * 26, 10))"
)

OURS = """
import os, runpy, sys
from trainer.training import loop

step, left = loop.train_one_step, {steps}

def last(*arguments, **keywords):
    global left
    step(*arguments, **keywords)
    left -= 1
    if not left:
        os._exit(0)

loop.train_one_step = last
sys.argv = ["trainer", *{overrides}]
runpy.run_module("trainer", run_name="__main__")
sys.exit("there was no step")
"""


def measure(scratch: Path, rounds: int) -> Table:
    write_pictures(scratch / "pictures")
    shared = [
        "data=folder",
        f"data.root={scratch / 'pictures'}",
        "data.resize=28",
        "data.size=28",
        "train.batch_size=8",
        "optim=sgd",
    ]
    shared += [f"platform.runs={scratch / 'runs'}", f"platform.cache={scratch / 'cache'}"]

    def ours(number: list[int], *overrides: str) -> Work:
        def work() -> int:
            number[0] += 1  # a new run each time
            start([*shared, *overrides, f"seed={number[0]}"])
            return 1

        return work

    killed, network = scratch / "killed", ("model=small_cnn", f"platform.runs={scratch / 'again'}")
    start([*shared, *network, "name=killed"], steps=PICTURES // 8 + 1)
    (scratch / "again" / "killed").rename(killed)

    def resumed() -> int:
        shutil.rmtree(scratch / "again")
        shutil.copytree(killed, scratch / "again" / "killed")
        start([*shared, *network, "name=killed"])
        return 1

    numbers = [0]
    contenders = {
        "bare script, small network": lambda: run(BARE.format(network=SMALL)),
        "ours, small_cnn": ours(numbers, "model=small_cnn"),
        "ours, small_cnn, resumed": resumed,
        "bare script, ResNet-18": lambda: run(
            BARE.format(network="torchvision.models.resnet18(num_classes=10)")
        ),
        "ours, resnet18": ours(
            numbers, "model=torchvision", "model.name=resnet18", "model.weights=null"
        ),
    }
    costs = {
        name: [cost.cpu for cost in values] for name, values in paired(contenders, rounds).items()
    }
    rows = []
    for base, name, most in (
        ("bare script, small network", "ours, small_cnn", 0.75),
        ("ours, small_cnn", "ours, small_cnn, resumed", 1.1),
        ("bare script, ResNet-18", "ours, resnet18", 1.05),
    ):
        share = ratio(costs[name], costs[base])
        if base.startswith("bare"):
            rows.append(Row(base, ("1", short(median(costs[base])))))
        rows += [
            Row(
                name,
                (str(share), short(median(costs[name]))),
                f"at most {most}",
                share.median <= most,
            ),
        ]
    return Table(
        TITLE,
        NOTE + " Here a ratio below 1 is better.",
        ("CPU time", "CPU s"),
        rows,
        ("hydra-core",),
    )


def start(overrides: list[str], steps: int = 1) -> None:
    """Begin a run of ours, or go on with it, and end its process after so many steps."""
    run(OURS.format(overrides=overrides, steps=steps))


def run(code: str) -> int:
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        check=True,
        capture_output=True,
    )
    return 1


def write_pictures(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        for number in range(PICTURES):
            folder = root / split / f"class{number % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(
                folder / f"{number}.png"
            )
