"""Detects hangs: work that should continue without a pause, and shows no progress.

Standard library only. A network disk that is gone, a hanging driver and a lock that is never
released raise no error: the process would wait for ever, on a machine that costs money.
"""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW = 6.0  # times the usual pause, for work that shows no progress in between


class Watch:
    """The work that should continue without a pause, and its signs of life."""

    def __init__(self) -> None:
        self.signs = 0
        self._allowed: list[float] = []  # of the work that runs, the innermost last

    def sign(self) -> None:
        """Record progress."""
        self.signs += 1

    @contextmanager
    def over(self, allowed: float = 1.0) -> Iterator[None]:
        """Expect signs of life while the context lasts. allowed: times the usual pause."""
        self._allowed.append(allowed)
        self.sign()
        try:
            yield
        finally:
            self._allowed.pop()
            self.sign()

    @property
    def allowed(self) -> float | None:
        """Return how many times the usual pause is allowed now; None: any, nothing is watched."""
        return self._allowed[-1] if self._allowed else None


watch = Watch()  # of this process


class Idle:
    """The time without progress, counted only while this process was awake.

    Clocks continue while a laptop sleeps, a virtual machine is moved or a process is stopped, and
    on a busy machine nothing may run for a while. All of these delay the watching thread as well.
    """

    def __init__(self, watched: Watch, seconds: float) -> None:
        self.seconds = 0.0
        self._watched, self._limit, self._signs = watched, seconds, watched.signs
        self.tick = min(1.0, seconds / 10)  # seconds between two checks

    def looked(self, since: float) -> bool:
        """Return whether it is too long, at one check. since: seconds since the last check."""
        allowed = self._watched.allowed
        if allowed is None or self._watched.signs != self._signs:
            self._signs, self.seconds = self._watched.signs, 0.0
            return False
        self.seconds += min(since, 2 * self.tick)
        return self.seconds >= self._limit * allowed


@contextmanager
def on_stall(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, from a thread, after so many seconds without a sign of life.

    seconds: 0: never.
    """
    if not seconds:
        yield
        return
    ended, idle = threading.Event(), Idle(watch, seconds)

    def look() -> None:
        before = time.monotonic()
        while not ended.wait(idle.tick):
            now = time.monotonic()
            if idle.looked(now - before):
                act()
                return
            before = now

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def stacks() -> str:
    """Return where each thread of this process stands, the main one last."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace").rstrip()
