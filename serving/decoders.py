"""The threads that decode images, and room for the pixels that they hold.

A thread can't be ended while it decodes. What could keep it busy for ever is refused before
(`trainer/images/bounds.py`), so a large picture takes seconds at most; but pictures that take 10 ms
should not wait for it. So a thread that is busy for longer, while others wait, is replaced: it
finishes its picture at a lower priority, and ends.
"""

import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray

from serving.work import Abandoned, Work
from trainer.images.decode import ImageError, Room

Pixels = NDArray[np.uint8]  # [size, size, 3]
Task = Callable[[], Pixels]

PATIENCE = 0.25  # seconds that others wait for a picture before its thread is replaced
REPLACED = 2  # threads that may be replaced at once, for each that decodes
NICENESS = 10  # of a replaced thread: a tenth of the processor that others get (sched(7))
SMALL = 1 << 20  # pixels that need no room: there are no more such pictures at once than threads


class Decoders:
    """Threads that decode, so many at once."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # First the first pictures of all requests, then the second ones: a request of many
        # pictures holds up none of one.
        self._waiting: queue.PriorityQueue[tuple[int, int, Task, Future[Pixels]]] = (
            queue.PriorityQueue()
        )
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._since: dict[threading.Thread, float] = {}  # the busy ones
        self._replaced: set[threading.Thread] = set()
        for _ in range(threads):
            self._start()

    def submit(self, number: int, task: Task) -> "Future[Pixels]":
        """Have a picture decoded, and return what will have its pixels.

        number: of the picture in its request, from 0.
        """
        future: Future[Pixels] = Future()
        self._waiting.put((number, next(self._order), task, future))
        return future

    def relieve(self) -> None:
        """Replace the threads that have been busy for long, where pictures wait."""
        if self._waiting.empty():
            return
        before = time.monotonic() - PATIENCE
        with self._lock:
            slow = [thread for thread, since in self._since.items() if since < before]
            for thread in slow:
                if thread in self._replaced or self._no_more():
                    continue
                self._replaced.add(thread)
                _lower(thread)
                self._start()

    def hang(self, seconds: float) -> bool:
        """Return whether nothing is decoded: each thread is busy with a picture for so long."""
        before = time.monotonic() - seconds
        with self._lock:
            active = [since for thread, since in self._since.items() if self._is_active(thread)]
            return len(active) == self._threads and max(active) < before and self._no_more()

    def _is_active(self, thread: threading.Thread) -> bool:
        return thread not in self._replaced

    def _no_more(self) -> bool:
        return len(self._replaced) >= REPLACED * self._threads

    def _start(self) -> None:
        threading.Thread(target=self._run, name="decode", daemon=True).start()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            self._decode_next(me)
            with self._lock:
                if me in self._replaced:
                    self._replaced.remove(me)
                    return

    def _decode_next(self, me: threading.Thread) -> None:
        _, _, task, future = self._waiting.get()
        if not future.set_running_or_notify_cancel():
            return
        with self._lock:
            self._since[me] = time.monotonic()
        try:
            pixels = task()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(pixels)
        finally:
            with self._lock:
                del self._since[me]


def _lower(thread: threading.Thread) -> None:
    """Lower a thread's priority. On Linux each has its own; it can't be raised again."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, thread.native_id or 0, NICENESS)


class Unwanted(BaseException):
    """Nobody wants what was to be decoded. Decoding turns any Exception into one of the picture."""


class Rooms:
    """Room for the pixels of large pictures that are decoded at once; who came first is first."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._left = pixels
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def of(self, work: Work) -> Room:
        """Return the room that a request's pictures take."""
        return _Share(self, work)

    def take(self, pixels: int, work: Work) -> None:
        """Wait for so much of it. Raise Unwanted where the work ends before."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or pixels > self._left:
                    self._changed.wait(min(_left(work), PATIENCE))
                self._left -= pixels
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def give_back(self, pixels: int) -> None:
        """Give so much back."""
        with self._changed:
            self._left += pixels
            self._changed.notify_all()


class _Share(Room):
    """A request's part of the room."""

    def __init__(self, rooms: Rooms, work: Work) -> None:
        super().__init__(rooms.pixels)
        self._rooms, self._work = rooms, work

    @contextmanager
    def taken(self, pixels: int, image: str) -> Iterator[None]:
        if pixels > self.pixels:
            raise ImageError(
                f"{image} are too many (a decompression bomb?); allowed: {self.pixels:,} decoded"
            )
        _left(self._work)
        if pixels <= SMALL:
            yield
            return
        self._rooms.take(pixels, self._work)
        try:
            yield
        finally:
            self._rooms.give_back(pixels)


def _left(work: Work) -> float:
    try:
        return work.left()
    except (TimeoutError, Abandoned) as error:
        raise Unwanted from error
