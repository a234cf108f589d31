"""Files that are there whole or not at all, also after a power cut: written temporary, flushed to the disk, renamed."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from trainer.common.console import log
from trainer.common.errors import MEMORY_FULL, Unreadable, machine_fault

T = TypeVar("T")

TEMPORARY = ".writing-"  # begins the name of whatever is not complete yet
PAUSES = (
    0.1,
    0.3,
    1.0,
)  # seconds before another try to read what could not be read: a network's file system often recovers


def write(path: Path, data: bytes | str) -> None:
    """Replaces `path` by `data`; text as UTF-8. Raises OSError with `path` as its file name, and then leaves what was there."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        flush(temporary, data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def patiently(path: str | Path, read: Callable[[], T]) -> T:
    """What `read` returns, which reads `path` or asks for it. Where it fails it is tried again after each of PAUSES.

    Raises Unreadable, which names the file and the reason.
    """
    for pause in PAUSES:
        with suppress(OSError, MemoryError):
            return read()
        time.sleep(pause)
    try:
        return read()
    except (OSError, MemoryError) as error:
        raise Unreadable(_reason(path, error)) from error


def _reason(path: str | Path, error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"{path}: {MEMORY_FULL}"
    error.filename = str(path)
    return (
        machine_fault(error)
        or f"{path}: it can't be read ({error.strerror or error}): mend that, then start the same command again"
    )


def sweep(directory: Path) -> None:
    """Removes what killed writers left in `directory`, which no other process may be writing to."""
    for path in directory.glob(f"{TEMPORARY}*"):
        remove(path)


def remove(path: Path) -> None:
    """Deletes a file, or a directory with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def try_lock(directory: Path, name: str = ".lock") -> Iterator[bool]:
    """Give whether this process got the lock, which it then has while the context lasts.

    The kernel frees the lock of a process that dies.
    """
    with (directory / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours


@contextmanager
def locked(directory: Path, waiting: Callable[[], None], name: str = ".lock") -> Iterator[None]:
    """While the context lasts, no other process that asks for the same lock has it. The kernel frees the lock of a process that dies.

    waiting: called again and again while another process has it; it may raise, to give up.
    """
    told = False
    while True:
        with try_lock(directory, name) as ours:
            if ours:
                yield
                return
        if not told:
            log.info("%s: waiting for another process that is writing there", directory)
            told = True
        waiting()
        time.sleep(0.1)


def flush(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a new file down to the disk itself."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Makes the names in a directory durable: a rename is only safe on disk after this (fsync(2))."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
