"""Settings of the server's processes: open files, memory, threads and the log."""

import contextlib
import ctypes
import gc
import logging
import resource
import sys

FILES = 65_536  # open files to ask for, where the system allows so many
# After this time a computing thread passes Python's lock to a waiting one: an answer needs the lock
# several times. (Python's default: 5 ms.)
SWITCH_SECONDS = 0.0005
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGE_BLOCK = 1 << 20  # bytes; returned at once
KEPT = 8 << 20  # bytes of smaller blocks that each arena keeps
ARENAS = 2


def allow_files() -> int:
    """Raise the soft limit of open files, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return FILES
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def share_memory_and_threads() -> None:
    """Return large freed blocks to the system at once, and wake waiting threads soon.

    Call it before threads start. By default glibc keeps freed memory in an arena per thread, and
    large blocks too once one was freed: while one client sent requests of 16 URLs, the server held
    up to 419 MiB; with this, 155 to 224 (2 cores, glibc 2.36). To keep none of what a small picture
    takes costs 3 % of the throughput: the system clears it for each request.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, ARENAS)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def spare_the_collector() -> None:
    """Let Python's garbage collector ignore all objects made until now. Call it after the start.

    A full collection visits every object, and stops all threads meanwhile.
    """
    gc.freeze()


def log_to_stdout() -> None:
    """Log lines to standard output, as containers do."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout
    )
