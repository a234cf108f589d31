"""`python -m trainer.runs [DIR]`: the runs there, in a table; or two of them compared."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from trainer.common import sessions

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import

from trainer.common.arguments import typed_path
from trainer.common.command import guarded
from trainer.common.console import log, to_terminal
from trainer.results import index, runs
from trainer.results.runs import Comparison

SURE = 0.05  # a difference that chance gives more seldom is one


def main() -> int:
    """Show what the command line names; return the exit code."""
    sessions.end_when_asked(clear=True)
    to_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m trainer.runs", description="Lists runs, or compares two of them."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=typed_path,
        default=Path("runs"),
        metavar="DIR",
        help="that holds the runs (default %(default)s)",
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="write DIR/index.html: a table, curves, a Pareto picture",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON document")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=typed_path,
        metavar="RUN",
        help="say whether one is better than the other on the same test pictures",
    )
    options = parser.parse_args()
    if options.compare:
        return guarded(lambda: compare(*options.compare), log.log)
    if options.html:
        return guarded(lambda: write_page(options.folder), log.log)
    return guarded(lambda: show(options.folder, options.json), log.log)


def show(folder: Path, as_json: bool) -> None:
    """Print the runs below a folder. Raise UserError where there is no such folder."""
    found = runs.find(folder)
    if as_json:
        print(json.dumps([dataclasses.asdict(run) for run in found], default=str, indent=1))
    elif found:
        print(runs.table(found))
    else:
        print(f"{folder}: no run yet")


def write_page(folder: Path) -> None:
    """Write index.html into a folder of runs. Raise UserError where there is no such folder."""
    path = folder / "index.html"
    index.write(runs.find(folder), path)
    print(path)


def compare(first: Path, second: Path) -> None:
    """Print how two runs compare. Raise UserError where they can't be."""
    result = runs.compare(first, second)
    print(told(first, second, result))


def told(first: Path, second: Path, result: Comparison) -> str:
    """Return how two runs compare, in a sentence."""
    points = 100 * (result.second - result.first) / result.pictures
    alone = (
        f"{result.second} right that the other has wrong, {result.first} the other way round; "
        f"p = {result.p:.2g}"
    )
    if points == 0:
        return f"{second} and {first} are equally good on {result.pictures} pictures ({alone})"
    better, worse = (second, first) if points > 0 else (first, second)
    verdict = "a difference that chance seldom makes"
    if result.p > SURE:
        verdict = f"not distinguishable on {result.pictures} pictures"
    return f"{better} is better than {worse} by {abs(points):.1f} points: {verdict} ({alone})"


if __name__ == "__main__":
    sys.exit(main())
