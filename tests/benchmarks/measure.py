"""Costs in paired rounds: the contenders take turns in one process.

So what else the machine does falls on all of them.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cost:
    """Of one unit of work (a picture, a step, a start), in seconds."""

    wall: float
    cpu: float  # user and system time of this process and of those that it waited for


Work = Callable[[], int]  # does some work and returns how many units it was


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cpu_of(work: Callable[[], object]) -> float:
    """The CPU seconds that some work takes."""
    before = cpu_seconds()
    work()
    return cpu_seconds() - before


def cost(work: Work) -> Cost:
    wall, cpu = time.perf_counter(), cpu_seconds()
    units = work()
    return Cost((time.perf_counter() - wall) / units, (cpu_seconds() - cpu) / units)


def paired(
    contenders: Mapping[str, Work], rounds: int, warm_up: bool = True
) -> dict[str, list[Cost]]:
    """Return each contender's cost in every round.

    warm_up: one more round before, which does not count.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        print(
            f"\r  round {number + 1}/{rounds} of {', '.join(contenders)}",
            end="",
            file=sys.stderr,
            flush=True,
        )
        for name, work in contenders.items():
            one = cost(work)
            if number >= 0:
                costs[name].append(one)
    print(file=sys.stderr)
    return costs


def run_trainer(place: Path, *words: str, project: Path = PROJECT) -> None:
    """Run `python -m trainer` of a project from nothing. Its run is `place`/runs/run.

    Raise RuntimeError with what it said, where it fails.
    """
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "trainer", *words, "platform=local", "name=run"]
    command += [f"platform.runs={place}/runs", f"platform.cache={place}/cache"]
    path = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        cwd=place,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def apart(make: Callable[..., Work], *arguments: Any) -> Cost:
    """The cost of a second call of make(*arguments), in a process of its own: what one contender
    does to the heap, and where its tensors happen to lie, is not the other's luck.
    """
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_second, (make, *arguments))


def _second(make: Callable[..., Work], *arguments: Any) -> Cost:
    work = make(*arguments)
    work()
    return cost(work)


@dataclass(frozen=True)
class Ratio:
    """How many times better one contender was than another, round by round."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        least, most = short(min(self.values)), short(max(self.values))
        return f"{short(self.median)} (n={len(self.values)}, {least} to {most})"


def ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """base / other in each round: above 1 where the other costs less."""
    return Ratio([b / o for b, o in zip(base, other, strict=True)])


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
