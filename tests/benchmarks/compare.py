"""`python -m tests.benchmarks.compare REVISION [NAME ...]`: another revision against this one.

The benchmarks of this revision measure both. With --own, each is measured by its own: that also
works for a revision whose code these don't know. They take turns, so what else the machine does
falls on both.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.__main__ import NAMES, QUICK
from tests.benchmarks.measure import PROJECT, ratio
from tests.benchmarks.table import markdown_table

NUMBER = re.compile(r"[\d,]+(\.\d+)?")
FORMER = {("Checkpoint stall", "ours"): "ours, each"}  # rows' names of other revisions

Cells = dict[tuple[str, str, str], float]  # of title, row and column


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compare",
        description="Measure another revision and this one in turns, and print the ratios.",
    )
    parser.add_argument("revision", help="what git knows it by: a tag, a branch, a commit")
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="default: the quick ones")
    parser.add_argument("--own", action="store_true", help="measure each by its own benchmarks")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    options = parser.parse_args()
    names = options.names or QUICK
    found: dict[str, list[Cells]] = {"other": [], "this": []}
    with checked_out(options.revision, options.own) as other:
        for number in range(options.rounds):
            for which, project in (("other", other), ("this", PROJECT)):
                print(f"round {number + 1} of {options.rounds}: {which}", file=sys.stderr)
                found[which].append(measured(project, names))
    print(compared(found["other"], found["this"], options.revision))


@contextmanager
def checked_out(revision: str, own: bool = False) -> Iterator[Path]:
    """Give a copy of the project at a revision, with the benchmarks of this one, or its own."""
    with tempfile.TemporaryDirectory(prefix="packhorse-compare-") as scratch:
        project = Path(scratch) / "project"
        git = ["git", "-C", str(PROJECT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", project, revision], check=True)
        try:
            if not own:
                shutil.rmtree(project / "tests/benchmarks", ignore_errors=True)
                shutil.copytree(PROJECT / "tests/benchmarks", project / "tests/benchmarks")
            yield project
        finally:
            subprocess.run([*git, "remove", "--force", project], check=True)


def measured(project: Path, names: list[str], threads: int = 1) -> Cells:
    """Measure once, by the benchmarks of a project. Return the numbers of its tables."""
    command = [sys.executable, "-P", "-m", "tests.benchmarks", *names, "--rounds=1"]
    command.append(f"--threads={threads}")
    if project == PROJECT:
        command.append("--no-page")  # a copy's page goes with it
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return numbers(done.stdout)


def numbers(page: str) -> Cells:
    """Return the numbers of the tables' cells that begin with one."""
    cells: Cells = {}
    title, columns = "", []
    for line in page.splitlines():
        if line.startswith("## "):
            title, columns = line.removeprefix("## "), []
        if not line.startswith("| "):
            continue
        name, *texts = [text.strip() for text in line.strip("|").split("|")]
        if not columns:
            columns = texts
        for column, text in zip(columns, texts, strict=True):
            number = NUMBER.match(text)
            if number and column != "target":
                place = title, FORMER.get((title, name), name), column
                cells[place] = float(number[0].replace(",", ""))
    return cells


def compared(other: list[Cells], this: list[Cells], revision: str) -> str:
    """Return a table of what both have: the median of each, and the ratio round by round."""
    values: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for theirs, ours in zip(other, this, strict=True):
        for place in theirs.keys() & ours.keys():
            if theirs[place] and ours[place]:
                values[place].append((theirs[place], ours[place]))
    head = ["", "", "", revision, "this", "this, as a multiple"]
    lines = [head, ["---"] * len(head)]
    for place in [place for place in this[0] if place in values]:
        pairs = values[place]
        theirs, ours = zip(*pairs, strict=True)
        middle = [f"{sorted(each)[len(each) // 2]:g}" for each in (theirs, ours)]
        lines.append([*place, *middle, str(ratio(ours, theirs))])
    return markdown_table(lines)


if __name__ == "__main__":
    main()
