"""What is done for one request: until it is answered, its deadline comes, or nobody wants it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


class Heavy(BaseException):
    """What is asked takes long: it is for the process that prepares (`worker.py`).

    Decoding turns any Exception into one of the picture.
    """


class Work:
    """One request's: whoever does it asks now and then how much time it has left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._abandoned = False
        self._steps: list[Future[Any]] = []
        self._lock = threading.Lock()

    def left(self) -> float:
        """Return the seconds that it has left. Raise TimeoutError or Abandoned where it has none.

        From any thread.
        """
        if self._abandoned:
            raise Abandoned
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def abandon(self) -> None:
        """End it, from any thread: nobody waits for the answer."""
        with self._lock:
            self._abandoned = True
            steps = self._steps
            self._steps = []
        for step in steps:
            step.cancel()

    def add(self, step: "Future[Any]") -> None:
        """Add a step, which is cancelled when this is abandoned."""
        with self._lock:
            if not self._abandoned:
                self._steps.append(step)
                return
        step.cancel()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Say that until the block ends it waits for others. Raise RequestError where many do."""
        yield
