"""`python -m serving predict MODEL PICTURES...`: what a model says of pictures, as a table.

Without PyTorch, on all cores. A table in a file is gone on with where it ends, so a kill loses
nothing and no picture is done twice.
"""

import argparse
import csv
import fcntl
import io
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from serving import sources
from serving.fetch import RequestError
from serving.package import Package, load_for_command
from serving.serve import package_of
from serving.sources import Source
from trainer.common import files
from trainer.common.arguments import typed_path, whole
from trainer.common.console import ProgressBar
from trainer.common.cpu import cores
from trainer.common.errors import MISTAKE, OK, Unreadable, UserError
from trainer.common.interrupt import Stop, on_signals
from trainer.common.paths import expanded
from trainer.images.decode import MAX_PIXELS, ImageError, Room
from trainer.results.prediction import Prediction, predictions

CACHE = Path(".cache")  # as platform.cache
STANDARD_OUTPUT = "-"
NAMED = 3  # pictures that a line names

Outcome = Prediction | ImageError | Unreadable


@dataclass(frozen=True)
class Tally:
    """What became of the pictures. unreadable: those to be tried again."""

    done: int
    unsure: int
    broken: int
    unreadable: list[Unreadable]


def main(arguments: Sequence[str]) -> int:
    """Predict what the command line names. arguments: the verb and its own. Raises UserError."""
    options = _parser().parse_args(arguments[1:])
    # Standard output is the table's.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    pictures, left_out = sources.find(options.pictures, CACHE)
    if left_out:
        _say(f"left out: {left_out}")
    package = load_for_command(package_of(options.model), 1)  # a picture a thread, see `_outcomes`
    top = min(options.top, len(package.classes))
    with on_signals() as stop, _table(options.csv, package, top) as table:
        waiting = [picture for picture in pictures if picture.name not in table.done]
        if len(waiting) < len(pictures):
            _say(f"{options.csv} has {len(pictures) - len(waiting)} of {len(pictures)} already")
        tally = _predict(package, waiting, table.add, options.images, stop)
    where = ""
    if options.csv not in (None, STANDARD_OUTPUT):
        where = f": {options.csv}"
    _say(_told(tally) + where)
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
        "or - for one of these a line of standard input",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write a table there, and go on with it where it ends; -: to standard output "
        "(default: a line a picture)",
    )
    parser.add_argument(
        "--top",
        type=whole(1, 1000),
        default=3,
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
    """Hand what is said of each picture to `add`, in order. Raises Interrupted when asked to."""
    unsure = broken = 0
    unreadable: list[Unreadable] = []
    with ProgressBar("pictures", len(pictures)) as bar:
        for picture, outcome in _outcomes(package, pictures, copies):
            stop.check()
            if isinstance(outcome, Unreadable):
                unreadable.append(outcome)
                continue
            add(picture.name, outcome)
            broken += isinstance(outcome, ImageError)
            unsure += isinstance(outcome, Prediction) and outcome.sure is False
            bar.advance()
    return Tally(len(pictures) - len(unreadable), unsure, broken, unreadable)


def _outcomes(
    package: Package, pictures: Iterable[Source], copies: Path | None
) -> Iterator[tuple[Source, Outcome]]:
    """Yield what is said of each picture, in their order.

    Each is decoded and computed by one thread, with one thread's network: where there is more than
    one picture a core, that leaves no core idle.
    """
    room = Room(MAX_PIXELS)
    threads = cores()

    def outcome(picture: Source) -> Outcome:
        try:
            data = picture.read()
            scores = package.network(package.prepare(data, room)[None])
        except (ImageError, Unreadable) as error:
            return error
        except RequestError as error:  # of S3
            return Unreadable(f"{picture.name}: {error}")
        [said] = predictions(package.calibration, package.classes, *scores)
        if copies is not None:
            _copy(data, copies / _folder_name(said.label) / picture.inner)
        return said

    with ThreadPoolExecutor(threads, "predict") as pool:
        pending: deque[tuple[Source, Future[Outcome]]] = deque()
        try:
            for picture in pictures:
                pending.append((picture, pool.submit(outcome, picture)))
                if len(pending) > 4 * threads:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _copy(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data)


def _folder_name(label: str) -> str:
    """Return a class's name as a folder may have it."""
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


def _say(line: str) -> None:
    print(line, file=sys.stderr)


# --- the table ---


class _Table:
    """Where the rows go. done: the names of the pictures that it has already."""

    def __init__(self) -> None:
        self.done: frozenset[str] = frozenset()

    def add(self, name: str, outcome: Prediction | ImageError) -> None:
        """Print a line for a person."""
        if isinstance(outcome, ImageError):
            print(f"{name}  can't be read: {outcome}", flush=True)
            return
        words = f"{name}  {outcome.label}  {100 * outcome.probability:.0f} %"
        if outcome.unlike:
            words += "  (unlike anything that was trained on)"
        elif outcome.sure is False and outcome.members is not None and len(outcome.members) > 1:
            words += f"  (not sure: {', '.join(outcome.members[:NAMED])})"
        print(words, flush=True)


class _Csv(_Table):
    """The table as CSV: RFC 4180, UTF-8, a row in one write."""

    def __init__(self, output: BinaryIO, package: Package, top: int) -> None:
        super().__init__()
        self._output, self._top, self._model = output, top, package.digest[:12]
        self._columns = ["path", "label", "probability", "sure", "set", "unlike"]
        for place in range(2, top + 1):
            self._columns += [f"label_{place}", f"probability_{place}"]
        self._columns += ["error", "model"]

    def begin(self) -> None:
        """Write the names of the columns."""
        self._write(self._columns)

    def resume(self, name: str) -> None:
        """Go on with the rows that a file has; a row that was cut off is taken away.

        Raises UserError for a table of another model, or no table of this kind.
        """
        rows, length = _whole_rows(self._output.read())
        self._output.truncate(length)
        self._output.seek(length)
        if not rows:
            self.begin()
            return
        if rows[0] != self._columns:
            raise UserError(
                f"{name}: it is no table of these columns ({', '.join(self._columns)}); "
                "give --top as it was written with, or another --csv"
            )
        others = {row[-1] for row in rows[1:]} - {self._model}
        if others:
            raise UserError(
                f"{name}: it is of another model ({others.pop()}, this is {self._model}); "
                "give another --csv, or delete it"
            )
        self.done = frozenset(row[0] for row in rows[1:])

    def add(self, name: str, outcome: Prediction | ImageError) -> None:
        """Write a picture's row."""
        width = len(self._columns)
        if isinstance(outcome, ImageError):
            cells = [name, *[""] * (width - 3), str(outcome), self._model]
        else:
            cells = [name, *_pair(outcome, 0), _flag(outcome.sure)]
            cells += [_joined(outcome.members), _flag(outcome.unlike)]
            for place in range(1, self._top):
                cells += _pair(outcome, place)
            cells += ["", self._model]
        self._write(cells)

    def _write(self, cells: Sequence[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._output.write(line.getvalue().encode())


def _pair(outcome: Prediction, place: int) -> list[str]:
    return [outcome.labels[place], f"{outcome.probabilities[place]:.6g}"]


def _flag(value: bool | None) -> str:
    return {None: "", True: "true", False: "false"}[value]


def _joined(names: Sequence[str] | None) -> str:
    r"""Return classes in one cell, as a|b; a | within one as \|."""
    if names is None:
        return ""
    return "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in names)


def _whole_rows(data: bytes) -> tuple[list[list[str]], int]:
    """Return the rows that end with their line break, and how many bytes they are."""
    length, rows, at = 0, [], 0
    lines = io.BytesIO(data)
    text: list[str] = []
    for line in lines:
        at += len(line)
        text.append(line.decode(errors="replace"))
        row = "".join(text)
        # A quoted cell may hold line breaks: the row ends where its quotes do.
        if row.endswith("\n") and row.count('"') % 2 == 0:
            rows += list(csv.reader([row]))
            length, text = at, []
    return rows, length


@contextmanager
def _table(name: str | None, package: Package, top: int) -> Iterator[_Table]:
    """Give where the rows go. name: the file's, - or None. Raises UserError."""
    if name is None:
        yield _Table()
        return
    if name == STANDARD_OUTPUT:
        table = _Csv(sys.stdout.buffer, package, top)
        table.begin()
        yield table
        sys.stdout.flush()
        return
    path = Path(expanded(name))
    # Unbuffered: a row is there whole, or cut off and done again.
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{name}: another process is writing it; wait for its end") from error
        file.seek(0)
        table = _Csv(file, package, top)
        table.resume(name)
        yield table
