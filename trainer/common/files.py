"""Files that are complete or absent, also after a power cut.

They are written under a temporary name, flushed to the disk, and renamed.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from trainer.common import owner
from trainer.common.console import log
from trainer.common.errors import AGAIN, MEMORY_FULL, TRANSIENT, Unreadable, machine_fault, naming

T = TypeVar("T")

OWNER = "-owner"  # suffix of a lock's name: the file that names its owner
TEMPORARY = ".writing-"  # prefix of the name of whatever is not complete yet
# Seconds before the next tries to read a file: a network file system often recovers.
PAUSES = (0.1, 0.3, 1.0)
LOOKING = 0.5  # seconds for which `is_locked` of another process may hold a lock, on a busy machine
# Errors of a file system that lacks an operation: flock, or fsync of a directory.
UNSUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.ENOTTY}
)


def keep(path: Path, data: bytes | str) -> None:
    """Write what only saves time, and make its folder; where that can't be, it isn't kept."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, data)


def write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`, text as UTF-8.

    Raise OSError with `path` as its file name; then the old file stays.
    """
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    temporary = path.with_name(TEMPORARY + path.name)

    def replace() -> None:
        flush(temporary, content)
        temporary.replace(path)
        flush_directory(path.parent)

    try:
        with naming(path):
            persistently(replace)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def persistently(work: Callable[[], T]) -> T:
    """Return what `work` returns; it may be called several times.

    After an error that may be gone next time, try again after each of PAUSES.
    """
    for pause in PAUSES:
        try:
            return work()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(pause)
    return work()


def patiently(path: str | Path, read: Callable[[], T]) -> T:
    """Return what `read` returns, which reads `path` or its metadata.

    After an error, try again after each of PAUSES. Raise Unreadable, which names the file and the
    reason.
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
    reason = f"{path}: it can't be read ({error.strerror or error}): fix that, {AGAIN}"
    return machine_fault(error) or reason


def sweep(directory: Path, prefix: str = TEMPORARY) -> None:
    """Remove what killed writers left in `directory`. No other process may write there.

    prefix: of the names to remove: those of one writer, if there are others. Log what can't be
    removed, and leave it.
    """
    for path in directory.glob(f"{prefix}*"):
        try:
            remove(path)
        except OSError as error:
            log.warning("%s: can't remove what a killed run left (%s)", path, error.strerror)


def remove(path: Path) -> None:
    """Delete a file, or a directory with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(
    directory: Path, waiting: Callable[[], None] | None = None, name: str = ".lock"
) -> Iterator[bool]:
    """Hold the lock of `directory` while the context lasts. A dead process's lock is free.

    Yield whether this process has it; always true if `waiting` is given. The lock is the kernel's;
    where the kernel has none, or one that holds on one machine only, it is a file that names the
    owner (`owner`).

    waiting: called again and again while this process waits; it may raise, to give up. None: don't
    wait, except for a process that only looks (`is_locked`), and until it is known whether an owner
    on another machine lives.
    """
    claim = owner.Claim(directory / f"{name}{OWNER}")
    alone = not owner.kernel_knows(directory)
    with persistently(partial((directory / name).open, "w")) as file:

        def take() -> bool:
            held = persistently(partial(try_lock, file))
            if held is False and waiting is None:
                held = persistently(partial(_take_after_looks, file))
            if held is None or (held and alone):
                return persistently(claim.take)
            return held

        try:
            mine = take()
            if not mine and waiting is not None:
                log.info("%s: waiting for another process that is writing there", directory)
            elif claim.undecided:
                log.info(
                    "%s: checking whether its owner%s is still alive, for up to %.0f s",
                    directory,
                    owner_of(directory, name),
                    owner.DEAD_AFTER,
                )
            while not mine and (waiting is not None or claim.undecided):
                if waiting is not None:
                    waiting()
                time.sleep(0.1)
                mine = take()
            yield mine
        finally:
            claim.release()


def _take_after_looks(file: IO[Any]) -> bool | None:
    """Try to take the kernel's lock, for as long as another process may hold it in `is_locked`."""
    until = time.monotonic() + LOOKING
    while (held := try_lock(file)) is False and time.monotonic() < until:
        time.sleep(0.02)
    return held


def is_locked(directory: Path, name: str = ".lock") -> bool:
    """Return whether a process has the lock, without keeping others from it. Raise OSError."""
    try:
        with (directory / name).open("rb") as file:
            shared = persistently(partial(try_lock, file, fcntl.LOCK_SH))
    except FileNotFoundError:
        return False
    if shared is False:
        return True
    return owner.lives(directory / f"{name}{OWNER}")


def owner_of(directory: Path, name: str = ".lock") -> str:
    """Return who has the lock, in words, if a file says: " (process 7 on box)"."""
    return owner.named(directory / f"{name}{OWNER}")


def try_lock(file: IO[Any], kind: int = fcntl.LOCK_EX) -> bool | None:
    """Try to take the kernel's lock; return whether that worked. None: the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        error.filename = file.name
        raise
    return True


def flush(path: Path, *parts: bytes | memoryview) -> None:
    """Flush a new file to the disk itself."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        sync(file.fileno())


def sync(handle: int) -> None:
    """Flush a descriptor to the disk itself, where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_at(
    handle: int, data: bytes | memoryview, offset: int, path: Path, flush: bool = False
) -> None:
    """Write all of `data` at `offset` of a file that is not opened to append.

    Unbuffered: a full disk fails here, and only once. Raise OSError with `path` as its
    file name.
    """
    with naming(path):
        rest = memoryview(data).cast("B")
        while rest:
            written = os.pwrite(handle, rest, offset)
            rest, offset = rest[written:], offset + written
        if flush:
            sync(handle)


def flush_directory(path: Path) -> None:
    """Make the names in a directory durable: only then is a rename safe on disk (fsync(2)).

    Some file systems don't open directories, or don't flush them; then do nothing.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        sync(handle)
    finally:
        os.close(handle)
