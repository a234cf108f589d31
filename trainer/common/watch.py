"""Sees a slow death: work that is to go on without a pause, and gives no sign of life.

Standard library only. A disk in the network that is gone, a driver that hangs, a lock that nobody
gives back raise no error: a process waits for ever, on a machine that is paid for.
"""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW = 6.0  # times as long a pause is allowed in what gives no sign in between


class Watch:
    """What is to go on without a pause, and its signs of life."""

    def __init__(self) -> None:
        self.signs = 0
        self._allowed: list[float] = []  # of what runs, the innermost last

    def sign(self) -> None:
        """Say that something was done."""
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
    """How long nothing was done, of the time in which this process was awake.

    The clocks go on while a laptop sleeps, a virtual machine is moved or a process is stopped, and
    a busy machine lets nobody run for a while. All that delays whoever looks as well.
    """

    def __init__(self, watched: Watch, seconds: float) -> None:
        self.seconds = 0.0
        self._watched, self._limit, self._signs = watched, seconds, watched.signs
        self.tick = min(1.0, seconds / 10)  # seconds between two looks

    def looked(self, since: float) -> bool:
        """Return whether that is too long, at a look. since: seconds since the look before."""
        allowed = self._watched.allowed
        if allowed is None or self._watched.signs != self._signs:
            self._signs, self.seconds = self._watched.signs, 0.0
            return False
        self.seconds += min(since, 2 * self.tick)
        return self.seconds >= self._limit * allowed


@contextmanager
def on_stall(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, from a thread, when what is watched gives no sign of life for so many seconds.

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
