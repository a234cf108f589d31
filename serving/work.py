"""The work for one request. It ends with its answer, its deadline, or when nobody wants it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


class Heavy(BaseException):
    """The request takes long: it is for the process that prepares requests (`worker.py`).

    No Exception: decoding would turn it into ImageError.
    """


class Work:
    """The work for one request: code that does it asks now and then how much time is left."""

    def __init__(self, seconds: float) -> None:
        self.began = time.monotonic()
        self.end = self.began + seconds
        self._abandoned = False
        self._steps: list[Future[Any]] = []
        self._lock = threading.Lock()

    def left(self) -> float:
        """Return the seconds that are left. Raise TimeoutError or Abandoned where none are.

        Safe from any thread.
        """
        if self._abandoned:
            raise Abandoned
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def abandon(self) -> None:
        """End the work: nobody waits for the answer. Safe from any thread."""
        with self._lock:
            self._abandoned = True
            steps = self._steps
            self._steps = []
        for step in steps:
            step.cancel()

    def add(self, step: "Future[Any]") -> None:
        """Add a step, which `abandon` cancels."""
        with self._lock:
            if not self._abandoned:
                self._steps.append(step)
                return
        step.cancel()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Mark the block in which the work waits for other machines. A subclass may refuse it."""
        yield
