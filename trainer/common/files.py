"""Files that are there whole or not at all, also after a power cut.

They are written under a temporary name, flushed to the disk, and renamed.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypeVar

from trainer.common.console import log
from trainer.common.errors import AGAIN, MEMORY_FULL, Unreadable, machine_fault

T = TypeVar("T")

TEMPORARY = ".writing-"  # begins the name of whatever is not complete yet
# Seconds before another try to read what could not be read: a network's file system often recovers.
PAUSES = (0.1, 0.3, 1.0)


def write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`, text as UTF-8.

    Raise OSError with `path` as its file name; what was there stays.
    """
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        flush(temporary, data)
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def patiently(path: str | Path, read: Callable[[], T]) -> T:
    """Return what `read` returns, which reads `path` or asks for it.

    Where it fails it is tried again after each of PAUSES. Raise Unreadable, which names the file
    and the reason.
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
    reason = f"{path}: it can't be read ({error.strerror or error}): mend that, {AGAIN}"
    return machine_fault(error) or reason


def sweep(directory: Path) -> None:
    """Remove what killed writers left in `directory`, which no other process may be writing to."""
    for path in directory.glob(f"{TEMPORARY}*"):
        remove(path)


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(
    directory: Path, waiting: Callable[[], None] | None = None, name: str = ".lock"
) -> Iterator[bool]:
    """Hold a lock of `directory` while the context lasts; the kernel frees that of a dead process.

    Give whether this process has it: always, where it waits for another one to leave it.

    waiting: called again and again meanwhile; it may raise, to give up. None: don't wait.
    """
    with (directory / name).open("w") as lock:
        mine = _try_lock(lock)
        if not mine and waiting is not None:
            log.info("%s: waiting for another process that is writing there", directory)
            while not mine:
                waiting()
                time.sleep(0.1)
                mine = _try_lock(lock)
        yield mine


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def flush(path: Path, *parts: bytes | memoryview) -> None:
    """Write a new file down to the disk itself."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def write_at(
    handle: int, data: bytes | memoryview, offset: int, path: Path, flush: bool = False
) -> None:
    """Write all of `data` at `offset` of a file that is not opened to append.

    Unbuffered: what fails on a full disk fails here, and once. Raise OSError with `path` as its
    file name.
    """
    try:
        rest = memoryview(data).cast("B")
        while rest:
            written = os.pwrite(handle, rest, offset)
            rest, offset = rest[written:], offset + written
        if flush:
            os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        raise


def flush_directory(path: Path) -> None:
    """Make the names in a directory durable: only then is a rename safe on disk (fsync(2))."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
