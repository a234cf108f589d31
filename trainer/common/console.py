"""What a person sees of a run: the log, on the terminal and in a file, and the progress of long work."""

import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from trainer.common import streams

log = logging.getLogger("packhorse")

LINE_EVERY = 15.0  # seconds between two plain progress lines where no terminal shows a bar


class _Terminal(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def to_terminal(expendable: bool = False) -> None:
    """Sends the log to standard output, once however often it is called. A terminal or a pipe that goes away ends nothing.

    expendable: whether what a full disk doesn't take may be lost too.
    """
    streams.outlive(expendable)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        handler = _Terminal()
        handler.setFormatter(_Plain())
        log.addHandler(handler)


class _File(logging.Handler):
    """Appends to a file. Unlike logging's own handler it raises what goes wrong (a full disk, say), where that one prints a traceback and goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = path.open(
            "ab", buffering=0
        )  # a buffer would try again to write, and fail again, when it is closed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        self._file.close()
        super().close()


class _Plain(logging.Formatter):
    """The message alone; a warning or an error says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return (
            message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"
        )


@contextmanager
def also_to_file(path: Path) -> Iterator[None]:
    """Appends the log to `path` too, each line with its time, while the context lasts."""
    handler = _File(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except (
        Exception
    ) as error:  # it is shown on the terminal by whoever catches it, after this file is closed
        handler.handle(
            log.makeRecord(
                log.name, logging.ERROR, __file__, 0, f"{type(error).__name__}: {error}", (), None
            )
        )
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def python() -> str:
    """This Python as a person types it: a command that is shown must run as it stands."""
    if shutil.which("python") == sys.executable:
        return "python"
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


class ProgressBar:
    """Counts long work: a tqdm bar on a terminal, a plain line every LINE_EVERY seconds elsewhere."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._bar = (
            tqdm(total=total, initial=done, desc=what, leave=False, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._line_at = time.monotonic() + LINE_EVERY

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY
            log.info("%s: %d of %d", self.what, self.done, self.total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
