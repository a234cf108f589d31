"""`python -m serving predict MODEL PICTURES...`: a model's predictions for pictures, as a table.

Without PyTorch, on all cores. The same command continues a table in a file where it ends, so a kill
loses nothing and no picture is done twice.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from serving import bulk, sources
from serving.backends import Scores
from serving.locate import package_of
from serving.package import Package, load_for_command
from serving.sources import Source
from trainer.common import files
from trainer.common.arguments import typed_path, whole
from trainer.common.console import ProgressBar, command
from trainer.common.errors import MISTAKE, OK, Unreadable, UserError, naming
from trainer.common.interrupt import Stop, on_signals
from trainer.common.paths import expanded, user_cache
from trainer.images.decode import ImageError
from trainer.results.prediction import Prediction, predictions
from trainer.results.predictions import SHOWN, Columns, whole_rows

STANDARD_OUTPUT = "-"
NAMED = 3  # pictures that a line names


@dataclass(frozen=True)
class Tally:
    """How many pictures had which outcome. unreadable: pictures to try again."""

    done: int
    unsure: int
    broken: int
    unreadable: list[Unreadable]


def main(arguments: Sequence[str]) -> int:
    """Predict the pictures that are named. arguments: the verb and its own. Raises UserError."""
    options = _parser().parse_args(arguments[1:])
    # Standard output is for the table.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    pictures, left_out = sources.find(options.pictures, user_cache())
    if left_out:
        _say(f"left out: {left_out}")
    with ProgressBar("loading the model", 1):
        package = load_for_command(package_of(options.model), bulk.THREADS)
    columns = Columns(min(options.top, len(package.classes)), model=package.digest[:12])
    in_file = options.csv not in (None, STANDARD_OUTPUT)
    # Only a table in a file can be continued, so only then a signal is handled.
    asked = on_signals() if in_file else nullcontext(Stop())
    with asked as stop, _table(options.csv, columns) as table:
        waiting = [picture for picture in pictures if picture.name not in table.done]
        if len(waiting) < len(pictures):
            _say(f"{options.csv} has {len(pictures) - len(waiting)} of {len(pictures)} already")
        tally = _predict(package, waiting, table.add, options.images, stop)
    where = f": {options.csv}" if in_file else ""
    _say(_told(tally) + where)
    _say(_next(options.model, options.pictures, package.classes))
    if tally.unreadable:
        raise UserError(
            f"{len(tally.unreadable)} can't be read now, the first: {tally.unreadable[0]}"
        )
    return MISTAKE if tally.broken and tally.broken == len(pictures) else OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving predict",
        description="Say what pictures show, by a model of yours.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model.tar.gz, a run's directory, or newest"
    )
    parser.add_argument(
        "pictures",
        metavar="PICTURE",
        nargs="+",
        help="a file, a folder with all below it, 'a/**/*.jpg', a zip or tar, s3://bucket/prefix, "
        "or - to read such names from standard input, one per line",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write a table there, or continue it where it ends; -: to standard output "
        "(default: print a line per picture)",
    )
    parser.add_argument(
        "--top",
        type=whole(1, 1000),
        default=SHOWN,
        help="the most probable classes that the table has (default %(default)s)",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=typed_path,
        help="copy each picture to DIR/CLASS/ too, by its most probable class",
    )
    return parser


# --- the work ---


def _predict(
    package: Package,
    pictures: Sequence[Source],
    add: Callable[[str, Prediction | ImageError], None],
    copies: Path | None,
    stop: Stop,
) -> Tally:
    """Pass each picture's prediction to `add`, in order. Raises Interrupted when asked to stop."""

    def said_of(picture: Source, data: bytes, scores: Scores) -> Prediction:
        [said] = predictions(package.calibration, package.classes, *scores)
        if copies is not None:
            _copy(data, copies / _folder_name(said.label) / picture.inner)
        return said

    unsure = broken = 0
    unreadable: list[Unreadable] = []
    with ProgressBar("pictures", len(pictures)) as bar:
        for picture, outcome in bulk.each(package, pictures, said_of):
            stop.check()
            if isinstance(outcome, Unreadable):
                unreadable.append(outcome)
                continue
            add(picture.name, outcome)
            broken += isinstance(outcome, ImageError)
            unsure += isinstance(outcome, Prediction) and outcome.sure is False
            bar.advance()
    return Tally(len(pictures) - len(unreadable), unsure, broken, unreadable)


def _copy(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data)


def _folder_name(label: str) -> str:
    """Return a class's name in a form that a folder may have."""
    name = label.replace("/", "_")
    if name.startswith("."):
        return f"_{name[1:]}"
    return name


def _told(tally: Tally) -> str:
    words = f"{tally.done} pictures"
    if tally.unsure:
        words += f", {tally.unsure} of them not sure"
    if tally.broken:
        words += f", {tally.broken} broken (the column error says why)"
    return words


def _next(model: str, pictures: Sequence[str], classes: Sequence[str]) -> str:
    """Return the command that says how good the model is, on these pictures if they are labelled.

    Pictures count as labelled in a folder that has a folder named after a class, or has such in
    test/.
    """
    given = [Path(expanded(each)) for each in pictures]
    labelled = [
        folder
        for folder in given
        for inside in (folder, folder / "test")
        if any((inside / name).is_dir() for name in classes)
    ]
    if labelled:
        return f"next, how often it is right: {command('serving', 'evaluate', model, labelled[0])}"
    told = command("serving", "evaluate", model, "DIR")
    return f"next, on pictures in a folder for each class: {told}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)


# --- the table ---


class _Table:
    """The output, one line per picture. done: names of the pictures that it has already."""

    def __init__(self) -> None:
        self.done: frozenset[str] = frozenset()

    def add(self, name: str, outcome: Prediction | ImageError) -> None:
        """Print a line for people."""
        if isinstance(outcome, ImageError):
            print(f"{name}  can't be read: {outcome}", flush=True)
            return
        words = f"{name}  {outcome.label}  {outcome.probability:.0%}"
        if outcome.unlike:
            words += "  (unlike anything that was trained on)"
        elif outcome.sure is False and outcome.members is not None and len(outcome.members) > 1:
            words += f"  (not sure: {', '.join(outcome.members[:NAMED])})"
        print(words, flush=True)


class _Csv(_Table):
    """The table as CSV; each row is one write."""

    def __init__(self, output: BinaryIO, columns: Columns) -> None:
        super().__init__()
        self._output, self._columns = output, columns

    def begin(self) -> None:
        """Write the names of the columns."""
        self._output.write(self._columns.head().encode())

    def resume(self, name: str) -> None:
        """Continue after the rows that the file has; remove a row that was cut off.

        Raises UserError for a table of another model or with other columns.
        """
        rows, length = whole_rows(self._output.read())
        if rows and rows[0] != self._columns.names:
            raise UserError(
                f"{name}: it is no table of these columns ({', '.join(self._columns.names)}); "
                "give --top as it was written with, or another --csv"
            )
        others = {row[-1] for row in rows[1:]} - {self._columns.model}
        if others:
            raise UserError(
                f"{name}: it is of another model ({others.pop()}, this is {self._columns.model}); "
                "give another --csv, or delete it"
            )
        self._output.truncate(length)
        if not rows:
            self.begin()
        self.done = frozenset(row[0] for row in rows[1:])

    def add(self, name: str, outcome: Prediction | ImageError) -> None:
        """Write a picture's row."""
        self._output.write(self._columns.row(name, outcome).encode())


@contextmanager
def _table(name: str | None, columns: Columns) -> Iterator[_Table]:
    """Yield the output. name: a file's, - for standard output, or None. Raises UserError."""
    if name is None:
        yield _Table()
        return
    if name == STANDARD_OUTPUT:
        table = _Csv(sys.stdout.buffer, columns)
        table.begin()
        yield table
        sys.stdout.flush()
        return
    path = Path(expanded(name))
    # Unbuffered: a row is complete in the file, or cut off and then done again.
    with naming(path):
        opened = path.open("ab+", buffering=0)
    with opened as file:
        if files.try_lock(file) is False:
            raise UserError(f"{name}: another process is writing it; wait for its end")
        file.seek(0)
        table = _Csv(file, columns)
        table.resume(name)
        yield table
