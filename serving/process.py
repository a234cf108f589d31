"""What the server's processes take of their machine, and where they log."""

import contextlib
import ctypes
import gc
import logging
import resource
import sys

FILES = 65_536  # open files that are asked for, where the system allows so many
# Of Python's lock, which a thread that computes gives to one that waits: an answer needs it several
# times. (Python's own: 5 ms.)
SWITCH_SECONDS = 0.0005
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
LARGE_BLOCK = 1 << 20  # bytes
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
    """Have memory given back at once, and waiting threads woken soon. Before threads start.

    glibc keeps what was freed in an arena a thread, and from a first large block on also large
    blocks: while one client sent requests of 16 URLs, the server held up to 419 MiB; with this,
    155 to 224 (2 cores, glibc 2.36).
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than with glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, ARENAS)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def spare_the_collector() -> None:
    """Have Python's garbage collector look only at what is made from now on. After the start.

    A full collection looks at every object, and stops all threads meanwhile.
    """
    gc.freeze()


def log_to_stdout() -> None:
    """Log a line each, as containers do."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout
    )
