"""What a second process brings, what a step sends, and what that comes to on other machines."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from tests.benchmarks.loop import (
    CLASSES,
    InMemory,
    compose_settings,
    make_batches,
    open_in_memory,
    train_epoch_again,
)
from tests.benchmarks.measure import Work, paired, ratio, short
from tests.benchmarks.table import Row, Table
from tests.ports import free_port
from tests.trainer.distributed.together import rank_environment
from tests.trainer.trainings import make_run
from trainer.distributed.world import World, current_world
from trainer.images.sampler import Share
from trainer.network import build as model
from trainer.network.ema import trained_part

TITLE = "Scaling"
PROJECT = Path(__file__).parents[2]
SIZE, BATCH, STEPS = 96, 16, 3  # pixels; pictures of each process in a step; steps of a turn
NOTE = f"""Two processes of one thread each, as one job in fast mode over gloo on this machine:
against two that know nothing of each other and do the same work, which is what the machine itself
makes of two processes (the target is for this), and against one alone. ResNet-50, {SIZE} px,
{BATCH} pictures a process and step, {STEPS} steps a turn, from memory, SGD.

Each process sends 2 (n - 1) / n times the gradients in a step (ring all-reduce), n: processes. The
estimates are computed, not measured: efficiency = step / (step + sent / bandwidth), without any
overlap of computing and sending, of which DDP has some. A step of 32 pictures of 224 px takes an
m5.2xlarge about 2.9 s; 10 Gbit/s is the most that it sends, 5 the limit of one flow, 2.5 its
baseline. 8 x T4: 64 pictures a step and GPU, 250 pictures/s and 6 GB/s between GPUs (both
assumed)."""


def measure(scratch: Path, rounds: int) -> Table:
    rows = []
    for name, freeze, target in (
        ("all trained", "none", 0.85),
        ("frozen backbone", "backbone", 0.95),
    ):
        with (
            workers(scratch, freeze, 1, 1) as alone,
            workers(scratch, freeze, 2, 1) as apart,
            workers(scratch, freeze, 1, 2) as job,
        ):
            costs = paired(
                {"one process": alone, "two on their own": apart, "two as one job": job}, rounds
            )
        walls = {contender: [cost.wall for cost in values] for contender, values in costs.items()}
        for contender, count in (
            ("one process", 1),
            ("two on their own", 2),
            ("two as one job", 2),
        ):
            beside = ratio(walls["two on their own"], walls[contender])
            efficiency = ratio([wall / count for wall in walls["one process"]], walls[contender])
            met = beside.median >= target if contender == "two as one job" else None
            cells = (
                str(beside) if count == 2 else "",
                str(efficiency),
                short(1 / median(walls[contender])),
            )
            rows.append(
                Row(f"{name}: {contender}", cells, str(target) if met is not None else "", met)
            )
    rows += [*sizes(), *estimates()]
    return Table(
        TITLE, NOTE, ("efficiency against two on their own", "against one alone", "images/s"), rows
    )


# --- on this machine ---


@contextmanager
def workers(scratch: Path, freeze: str, jobs: int, size: int) -> Iterator[Work]:
    """Return work for `paired`: `jobs` jobs of `size` processes each take their steps at once."""
    started = [
        start(scratch, freeze, rank, size, port)
        for port in (free_port() for _ in range(jobs))
        for rank in range(size)
    ]

    def turn() -> int:
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "done\n"
        return jobs * size * BATCH * STEPS

    try:
        yield turn
    finally:
        for process in started:
            process.communicate()


def start(scratch: Path, freeze: str, rank: int, size: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", str(scratch), freeze]
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        env=rank_environment(scratch, rank, size, port) | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def work(world: World, scratch: Path, freeze: str) -> None:
    """A turn for each line of the standard input."""
    # Nothing is saved meanwhile: two jobs use one directory.
    config = compose_settings("train.threads=1", "checkpoint.minutes=1000000")
    run = replace(make_run(scratch, config), world=world)
    with world.connected(600, run.stop):
        torch.manual_seed(0)
        network = model.build("resnet50", CLASSES, freeze=freeze)
        share = Share(world.rank, world.size, world.size)
        data = InMemory(make_batches(SIZE, BATCH, STEPS), share)
        training = open_in_memory(run, network, data)
        for _ in sys.stdin:
            train_epoch_again(training)
            print("done", flush=True)


# --- on paper ---


def gradient_bytes(freeze: str) -> int:
    """Bytes of the reference job's gradients (conf/experiment/dog_breeds.yaml)."""
    network = model.build("resnet50", 133, freeze=freeze, head_hidden=128)
    return sum(
        4 * parameter.numel()
        for parameter in trained_part(network).parameters()
        if parameter.requires_grad
    )


def sent(size: int, processes: int) -> float:
    """Bytes that each process sends in a step: a ring all-reduce."""
    return 2 * (processes - 1) / processes * size


def sizes() -> list[Row]:
    rows = []
    for name, freeze in (("full fine-tuning", "none"), ("head only", "backbone")):
        size = gradient_bytes(freeze)
        each = ", ".join(
            f"{sent(size, count) / 1e6:.3g} MB sent by each of {count}" for count in (2, 4, 8)
        )
        rows.append(
            Row(f"reference job, {name}: {size / 1e6:.3g} MB of gradients, {each}", ("", "", ""))
        )
    return rows


def estimates() -> list[Row]:
    rows = []
    for name, freeze in (("full fine-tuning", "none"), ("head only", "backbone")):
        for where, count, step, bandwidth in (
            ("4 x m5.2xlarge, 10 Gbit/s", 4, 2.9, 10e9 / 8),
            ("4 x m5.2xlarge, 5 Gbit/s", 4, 2.9, 5e9 / 8),
            ("4 x m5.2xlarge, 2.5 Gbit/s", 4, 2.9, 2.5e9 / 8),
            ("8 x T4, 6 GB/s", 8, 64 / 250, 6e9),
        ):
            seconds = sent(gradient_bytes(freeze), count) / bandwidth
            rows.append(
                Row(
                    f"estimate, {name}: {where}",
                    (
                        "",
                        f"{step / (step + seconds):.3f}",
                        short(count * (32 if count == 4 else 64) / (step + seconds)),
                    ),
                )
            )
    return rows


if __name__ == "__main__":
    work(current_world(), Path(sys.argv[1]), sys.argv[2])
