"""The threads that decode images, and room for the pixels that they hold.

A thread can't be ended while it decodes. What could keep it busy for ever is refused before
(`trainer/images/bounds.py`), so a large picture takes seconds at most; but pictures that take 10 ms
should not wait for it. So large pictures have threads of their own, or are left to another process
(`worker.py`); and a thread that is busy for long with a small one, while others wait, is replaced:
it finishes its picture, and ends. No thread has a lower priority than another: it would hold
Python's lock while it waits for a processor, and all others would wait with it.
"""

import heapq
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from serving.work import Abandoned, Heavy, Work
from trainer.images.decode import (
    AVIF_BRANDS,
    BYTES_A_PIXEL,
    ImageError,
    Preprocessing,
    Room,
    prepare,
)

Pixels = NDArray[np.uint8]  # [size, size, 3]
Task = Callable[[bool], Pixels]  # told whether the picture may be large; raises Heavy

PATIENCE = 0.25  # seconds that others wait for a picture before its thread is replaced
REPLACED = 2  # threads that may be replaced at once, for each that decodes
SMALL = 1 << 20  # pixels that need no room: there are no more such pictures at once than threads
MEMORY = 448 << 20  # bytes: a photo of 48 megapixels takes 300 MB as a JPEG, 440 MB as HEIC or PNG
# Of memory, for each pixel that is decoded, at most: measured with 48 megapixels and Pillow 13.
JPEG, RGB, TRANSPARENT, LOSSY_WEBP, HEIC, AVIF = 6.5, 9.0, 13.0, 17.0, 9.4, 11.0
PNG_PLAIN = {0, 2, 3}  # colour types without transparency


class Decoders:
    """Threads that decode, so many at once, and as many again for large pictures.

    What a picture is, its head tells: a thread for small ones reads it, and hands large ones on.
    """

    def __init__(self, threads: int, large: bool = True) -> None:
        """Start them. large: whether large pictures are decoded; else they raise Heavy."""
        handed_on = None
        if large:
            handed_on = _Lane(threads, may_be_large=True)
        self._small = _Lane(threads, large=handed_on)

    def submit(self, number: int, task: Task) -> "Future[Pixels]":
        """Have a picture decoded, and return what will have its pixels.

        number: of the picture in its request, from 0.
        """
        future: Future[Pixels] = Future()
        self._small.add(number, task, future)
        return future

    def relieve(self) -> None:
        """Replace the threads that have been busy for long with small pictures, where more wait."""
        self._small.relieve()

    def hang(self, seconds: float) -> bool:
        """Return whether no small picture is decoded, and hasn't been for `seconds`.

        Large ones may take as long on a busy machine.
        """
        return self._small.hang(seconds)


class _Lane:
    """Threads for pictures of one kind."""

    def __init__(
        self, threads: int, *, may_be_large: bool = False, large: "_Lane | None" = None
    ) -> None:
        """Start so many. large: the threads that large pictures are handed on to, if any."""
        self._threads, self._may_be_large, self._large = threads, may_be_large, large
        # First the first pictures of all requests, then the second ones: a request of many
        # pictures holds up none of one. One token in the queue for each: it waits without Python.
        self._heap: list[tuple[int, int, Task, Future[Pixels]]] = []
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._since: dict[threading.Thread, float] = {}  # the busy ones
        self._replaced: set[threading.Thread] = set()
        for _ in range(threads):
            self._start()

    def add(self, number: int, task: Task, future: "Future[Pixels]") -> None:
        """Have a picture decoded."""
        with self._lock:
            heapq.heappush(self._heap, (number, next(self._order), task, future))
        self._tokens.put(None)

    def relieve(self) -> None:
        """Replace the threads that have been busy for long, where pictures wait."""
        if not self._heap:
            return
        before = time.monotonic() - PATIENCE
        with self._lock:
            slow = [thread for thread, since in self._since.items() if since < before]
            for thread in slow:
                if thread in self._replaced or self._no_more():
                    continue
                self._replaced.add(thread)
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
        self._tokens.get()
        with self._lock:
            number, _, task, future = heapq.heappop(self._heap)
        # One that was handed on is running.
        if not future.running() and not future.set_running_or_notify_cancel():
            return
        with self._lock:
            self._since[me] = time.monotonic()
        try:
            pixels = task(self._may_be_large)
        except Heavy as error:
            if self._large is None:
                future.set_exception(error)
            else:
                self._large.add(number, task, future)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(pixels)
        finally:
            with self._lock:
                del self._since[me]


class Unwanted(BaseException):
    """Nobody wants what was to be decoded. Decoding turns any Exception into one of the picture."""


class Rooms:
    """Memory for large pictures that are decoded at once; who came first is first."""

    def __init__(self, pixels: int, memory: int = MEMORY, *, large: bool = True) -> None:
        """Make it. pixels: of one picture, at most. memory: bytes, for all.

        large: whether large pictures are decoded here; else they raise Heavy.
        """
        self.pixels, self.memory, self.large = pixels, memory, large
        self._left = memory
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def of(self, image: bytes, work: Work, may_be_large: bool) -> Room:
        """Return the room that a request's picture takes. It raises Heavy where it may not be."""
        return _Share(self, bytes_a_pixel(image), work, may_be_large)

    def take(self, size: int, work: Work) -> None:
        """Wait for so many bytes. Raise Unwanted where the work ends before."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or size > self._left:
                    self._changed.wait(min(_left(work), PATIENCE))
                self._left -= size
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def give_back(self, size: int) -> None:
        """Give so many back."""
        with self._changed:
            self._left += size
            self._changed.notify_all()


class _Share(Room):
    """What one picture takes of it."""

    def __init__(self, rooms: Rooms, each: float, work: Work, may_be_large: bool) -> None:
        super().__init__(rooms.pixels)
        self._rooms, self._each, self._work = rooms, each, work
        self._may_be_large = may_be_large

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
        size = int(pixels * self._each)
        if size > self._rooms.memory:
            raise ImageError(
                f"{image} take {size:,} bytes of memory; allowed: {self._rooms.memory:,}"
            )
        if not self._may_be_large:
            raise Heavy
        self._rooms.take(size, self._work)
        try:
            yield
        finally:
            self._rooms.give_back(size)


def bytes_a_pixel(image: bytes) -> float:
    """Return how much memory decoding takes for each pixel, by the kind of an image's file."""
    if image.startswith(b"\xff\xd8\xff"):
        return JPEG
    if image.startswith(b"\x89PNG") and len(image) > 25:
        depth, colours = image[24], image[25]
        if depth == 16 and colours:
            return BYTES_A_PIXEL
        if depth == 16 or colours not in PNG_PLAIN or b"tRNS" in image[: 1 << 16]:
            return TRANSPARENT
        return RGB
    if image[12:16] == b"VP8 ":
        return LOSSY_WEBP
    if image.startswith(b"BM"):
        return RGB
    if image[4:8] == b"ftyp":
        if image[8:12] in AVIF_BRANDS:
            return AVIF
        return HEIC
    if image[:4] in (b"GIF8", b"II*\0", b"MM\0*"):
        return TRANSPARENT
    return BYTES_A_PIXEL


def _left(work: Work) -> float:
    try:
        return work.left()
    except (TimeoutError, Abandoned) as error:
        raise Unwanted from error


class Preparation:
    """Images' files to the network's pixels, for callers on any number of threads."""

    def __init__(self, preprocessing: Preprocessing, rooms: Rooms, threads: int) -> None:
        """Start so many threads."""
        self._preprocessing, self._rooms = preprocessing, rooms
        self._decoders = Decoders(threads, rooms.large)

    def pixels(self, images: Sequence[bytes], work: Work) -> Iterator[Pixels]:
        """Yield those of each image's file, in order, while the others are decoded.

        Raises ImageError, TimeoutError where the deadline comes first, Abandoned, and Heavy.
        """
        decoding = [
            self._decoders.submit(number, partial(self._decode, image, work))
            for number, image in enumerate(images)
        ]
        try:
            for step in decoding:
                work.add(step)
            for number, step in enumerate(decoding, 1):
                try:
                    yield self._result(step, work)
                except ImageError as error:
                    if len(images) == 1:
                        raise
                    raise ImageError(f"picture {number} of {len(images)}: {error}") from error
        finally:
            for step in decoding:
                step.cancel()

    def hangs(self, seconds: float) -> bool:
        """Return whether nothing is decoded any more, and hasn't been for `seconds`."""
        return self._decoders.hang(seconds)

    def _result(self, step: "Future[Pixels]", work: Work) -> Pixels:
        """Wait for a step's result while the work is wanted."""
        while True:
            seconds = min(work.left(), PATIENCE)
            try:
                return step.result(seconds)
            except CancelledError as error:
                raise Abandoned from error
            except TimeoutError:
                if step.done():  # by then, or it is the step's own
                    return step.result()
                self._decoders.relieve()

    def _decode(self, image: bytes, work: Work, may_be_large: bool) -> Pixels:
        room = self._rooms.of(image, work, may_be_large)
        try:
            return prepare(image, self._preprocessing, room)
        except Unwanted as error:
            raise TimeoutError from error
        except MemoryError as error:
            if image[4:8] != b"ftyp":
                raise
            # AVIF and HEIC are decoded in a process that gets memory by what their headers say.
            raise ImageError("decoding it takes more memory than its size allows") from error
