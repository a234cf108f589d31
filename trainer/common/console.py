"""What a person sees of a run: the log, on the terminal and in a file, and progress."""

import gc
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, Self, TextIO

from tqdm import tqdm

from trainer.common import streams
from trainer.common.collector import resting
from trainer.common.errors import naming
from trainer.common.watch import SLOW, watch

log = logging.getLogger("packhorse")

LINE_EVERY = 15.0  # seconds between two plain progress lines where no terminal shows a bar
# What a bar shows, on a terminal.
SINGLE = "{desc} {elapsed}"
COUNTED = "{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}, {elapsed}, {remaining} left"
TICK = 0.5  # seconds between two signs of a single piece of work on a terminal

# The level of results, which -q shows too, and which are no warnings.
RESULT = logging.INFO + 5
logging.addLevelName(RESULT, "RESULT")
# What a terminal shows with -q, by default, and with -v.
QUIET, USUAL, VERBOSE = RESULT, logging.INFO, logging.DEBUG

COLOURS = {"red": 31, "green": 32, "yellow": 33, "soft": 2, "bold": 1}


class _Terminal(logging.Handler):
    """Writes log lines above a progress bar instead of through it.

    A record may have another text for a person at a terminal than for a program: `for_people`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        told = getattr(record, "for_people", None)
        if told is not None and self.level == USUAL and sys.stdout.isatty():
            text = told
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def to_terminal(expendable: bool = False, shown: int = USUAL) -> None:
    """Send the log to standard output, once however often it is called.

    The process survives a closed terminal or pipe.

    expendable: whether output may also be lost to a full disk. shown: the lowest level.
    """
    streams.outlive(expendable)
    log.setLevel(min(shown, logging.INFO))
    log.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        handler = _Terminal(shown)
        handler.setFormatter(_Plain())
        log.addHandler(handler)


def painted(text: str, *colours: str) -> str:
    """Return text in colour, where a terminal shows it and NO_COLOR (no-color.org) is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    codes = ";".join(str(COLOURS[colour]) for colour in colours)
    return f"\033[{codes}m{text}\033[0m"


def _is_quiet() -> bool:
    """Return whether progress is hidden: by -q, or while the log is kept to errors."""
    terminals = [handler.level for handler in log.handlers if isinstance(handler, _Terminal)]
    return log.level > logging.INFO or any(level > logging.INFO for level in terminals)


class _File(logging.Handler):
    """Append to a file, and raise errors (a full disk, say).

    logging's own handler prints a traceback and continues.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Before the handler is registered: at exit, logging would close what was never opened.
        # Unbuffered: closing a buffer would write, and fail, a second time.
        with naming(path):
            self._file = path.open("ab", buffering=0)
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        with naming(self._path):
            self._file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        self._file.close()
        super().close()


class _Plain(logging.Formatter):
    """The message alone, with its level if it is a warning or an error."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno <= RESULT:
            return message
        colour = "yellow" if record.levelno < logging.ERROR else "red"
        return f"{painted(f'{record.levelname.lower()}:', colour)} {message}"


@contextmanager
def also_to_file(path: Path) -> Iterator[None]:
    """Append the log to `path` too, each line with its time, while the context lasts."""
    handler = _File(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        # Its handler shows it on the terminal, after this file is closed.
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

    Python is the running one. Characters that a shell interprets are quoted.
    """
    return shlex.join([_python(), "-m", module, *map(str, words)])


def _python() -> str:
    found = shutil.which("python")  # beside the python3 with which `packhorse` was installed
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    relative = os.path.relpath(sys.executable)
    if relative.startswith(".."):
        return sys.executable
    return relative


def shows_bars(stream: TextIO) -> bool:
    """Return whether a person watches a progress bar: on a terminal, or in a notebook."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel.")


class ProgressBar:
    """Counts long work: a tqdm bar on a terminal, elsewhere a line every LINE_EVERY seconds.

    With a total of 1 it shows the seconds. A bar within another one isn't shown.
    """

    _pieces = 0  # single pieces that run

    def __init__(
        self, what: str, total: int, done: int = 0, more: Callable[[], str] | None = None
    ) -> None:
        """more: appended to each of the lines."""
        self.what, self.total, self.done, self._more = what, total, done, more
        self._watched = ExitStack()
        # Work in one piece gives no sign of life before it is done.
        self._watched.enter_context(watch.over(1.0 if total > 1 else SLOW))
        self._bar: tqdm[NoReturn] | None = None
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._line_at = self._began + LINE_EVERY
        self._single = total <= 1
        ProgressBar._pieces += self._single
        if self._single and ProgressBar._pieces > 1:
            return
        if shows_bars(sys.stderr) and not _is_quiet():
            form = SINGLE if self._single else COUNTED
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                leave=False,
                dynamic_ncols=True,
                bar_format=form,
                smoothing=0,  # by the mean rate: advance(0) would distort a moving one
            )
        self._ticks: threading.Thread | None = None
        if self._single or self._bar is not None:
            self._ticks = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticks.start()

    def _tick(self) -> None:
        """Show the seconds, from a thread, until the work is done.

        So a bar moves even before the first piece is done.
        """
        while not self._ended.wait(TICK):
            if self._bar is not None:
                self._bar.refresh()
            elif time.monotonic() >= self._line_at:
                self._line_at += LINE_EVERY
                log.info("%s: %.0f s", self.what, time.monotonic() - self._began)

    def advance(self, count: int = 1) -> None:
        """Count more work as done, and show it."""
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
        """Remove the bar."""
        self._watched.close()
        if self._ended.is_set():
            return
        self._ended.set()
        ProgressBar._pieces -= self._single
        if self._bar is not None:
            assert self._ticks is not None
            self._ticks.join()  # it would draw the bar once more
            self._bar.close()


@contextmanager
def loading(what: str = "loading PyTorch") -> Iterator[None]:
    """Show that modules are imported, and let Python's garbage collector rest meanwhile.

    What is imported stays. The collector would look at it again and again (of PyTorch and
    torchvision for 0.5 of 2.4 CPU seconds), and leaves it out from then on.
    """
    modules = len(sys.modules)
    with resting():
        try:
            with ProgressBar(what, 1):
                yield
        finally:
            if len(sys.modules) > modules:
                if gc.get_freeze_count():
                    gc.collect()  # or what has been thrown away since the last time would stay
                gc.freeze()
