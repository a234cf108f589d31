"""`python -m trainer.runs [DIR]`: list the runs in a table, or compare two."""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.common import sessions

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import

from trainer.common.arguments import typed_path
from trainer.common.command import guarded
from trainer.common.console import log, to_terminal
from trainer.results import index, runs
from trainer.results.runs import Comparison, Summary

SURE = 0.05  # p-value below which a difference counts

# Returns the runs in other places, for `runs.elsewhere`.
Elsewhere = Callable[[], Sequence[Mapping[str, Any]]]


def main(arguments: Sequence[str] | None = None, elsewhere: Elsewhere = list) -> int:
    """List or compare runs; return the exit code.

    arguments: None for those of the process. elsewhere: called if all runs are listed.
    """
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
    parser.add_argument(
        "--local", action="store_true", help="leave out the runs in the bucket on AWS"
    )
    options = parser.parse_args(arguments)
    if options.local:
        elsewhere = list
    if options.compare:
        return guarded(lambda: compare(*options.compare), log.log)
    if options.html:
        return guarded(lambda: write_page(options.folder, elsewhere), log.log)
    return guarded(lambda: show(options.folder, options.json, elsewhere), log.log)


def found_in(folder: Path, elsewhere: Elsewhere) -> list[Summary]:
    """Return the runs below a folder and those elsewhere, the newest first.

    Raise UserError if there is neither a run elsewhere nor such a folder.
    """
    others = [runs.elsewhere(told) for told in elsewhere()]
    if others and not folder.is_dir():
        return runs.together([], others)
    return runs.together(runs.find(folder), others)


def show(folder: Path, as_json: bool, elsewhere: Elsewhere = list) -> None:
    """Print the runs. Raise UserError where there is no such folder."""
    found = found_in(folder, elsewhere)
    if as_json:
        print(json.dumps([dataclasses.asdict(run) for run in found], default=str, indent=1))
    elif found:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(runs.table(found, width))
    else:
        print(f"{folder}: no run yet")


def write_page(folder: Path, elsewhere: Elsewhere = list) -> None:
    """Write index.html into a folder of runs. Raise UserError where there is no such folder."""
    path = folder / "index.html"
    found = found_in(folder, elsewhere)
    folder.mkdir(parents=True, exist_ok=True)
    index.write(found, path)
    print(path)


def compare(first: Path, second: Path) -> None:
    """Print the comparison of two runs. Raise UserError if they can't be compared."""
    result = runs.compare(first, second)
    print(told(first, second, result))


def told(first: Path, second: Path, result: Comparison) -> str:
    """Return the comparison of two runs in a sentence."""
    points = 100 * (result.second - result.first) / result.pictures
    alone = (
        f"{result.second} right that the other has wrong, {result.first} the other way round; "
        f"p = {result.p:.2g}"
    )
    if points == 0:
        return f"{second} and {first} are equally good on {result.pictures} pictures ({alone})"
    better, worse = (second, first) if points > 0 else (first, second)
    verdict = "chance alone rarely gives such a difference"
    if result.p > SURE:
        verdict = f"not distinguishable on {result.pictures} pictures"
    return f"{better} is better than {worse} by {abs(points):.1f} points: {verdict} ({alone})"


if __name__ == "__main__":
    sys.exit(main())
