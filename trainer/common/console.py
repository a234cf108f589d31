"""What a person sees of a run: the log, on the terminal and in a file, and progress."""

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, Self

from tqdm import tqdm

from trainer.common import streams
from trainer.common.watch import SLOW, watch

log = logging.getLogger("packhorse")

LINE_EVERY = 15.0  # seconds between two plain progress lines where no terminal shows a bar


class _Terminal(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def to_terminal(expendable: bool = False) -> None:
    """Send the log to standard output, once however often it is called.

    A terminal or a pipe that goes away ends nothing.

    expendable: whether what a full disk does not take may be lost too.
    """
    streams.outlive(expendable)
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        handler = _Terminal()
        handler.setFormatter(_Plain())
        log.addHandler(handler)


class _File(logging.Handler):
    """Appends to a file, and raises what goes wrong (a full disk, say).

    logging's own handler prints a traceback and goes on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        # Unbuffered: a buffer would try again to write, and fail again, when it is closed.
        self._file = path.open("ab", buffering=0)

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
        if record.levelno <= logging.INFO:
            return message
        return f"{record.levelname.lower()}: {message}"


@contextmanager
def also_to_file(path: Path) -> Iterator[None]:
    """Append the log to `path` too, each line with its time, while the context lasts."""
    handler = _File(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        # Whoever catches it shows it on the terminal, when this file is closed.
        text = f"{type(error).__name__}: {error}"
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log to errors while the context lasts."""
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def command(module: str, *words: object) -> str:
    """Return `python -m MODULE WORDS` as a person types it: a shown command must run as it stands.

    Python is the one that runs this. What is special to a shell is quoted.
    """
    return shlex.join([_python(), "-m", module, *map(str, words)])


def _python() -> str:
    if shutil.which("python") == sys.executable:
        return "python"
    relative = os.path.relpath(sys.executable)
    if relative.startswith(".."):
        return sys.executable
    return relative


class ProgressBar:
    """Counts long work: a tqdm bar on a terminal, elsewhere a line every LINE_EVERY seconds."""

    def __init__(
        self, what: str, total: int, done: int = 0, more: Callable[[], str] | None = None
    ) -> None:
        """more: what each of the lines says at its end."""
        self.what, self.total, self.done, self._more = what, total, done, more
        self._watched = ExitStack()
        # A single piece of work gives no sign before it is done.
        self._watched.enter_context(watch.over(1.0 if total > 1 else SLOW))
        self._bar: tqdm[NoReturn] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, leave=False, dynamic_ncols=True)
        self._line_at = time.monotonic() + LINE_EVERY

    def advance(self, count: int = 1) -> None:
        """Count that much more work as done, and show it."""
        self.done += count
        watch.sign()
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY
            more = ""
            if self._more is not None and log.isEnabledFor(logging.INFO):
                more = self._more()
            told = f" ({more})" if more else ""
            log.info("%s: %d of %d%s", self.what, self.done, self.total, told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        self._watched.close()
        if self._bar is not None:
            self._bar.close()
