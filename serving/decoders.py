"""The threads that decode images, and the memory that they may use.

A thread can't be stopped while it decodes. `trainer/images/bounds.py` refuses files that could keep
it busy for ever, so a large picture takes seconds at most. But pictures that take 10 ms should not
wait for it. So large pictures have their own threads, or go to another process (`worker.py`). And a
thread that takes long for a small picture, while others wait, is replaced: it finishes its picture,
and ends. All threads have the same priority: one with a lower priority would hold Python's lock
while it waits for a processor, and all others would wait with it.
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
Task = Callable[[bool], Pixels]  # its argument: whether the picture may be large; raises Heavy

PATIENCE = 0.25  # seconds for a picture that others wait for; then its thread is replaced
REPLACED = 2  # replaced threads that may still be busy, for each that decodes
SMALL = 1 << 20  # pixels that reserve no memory: no more such pictures at once than threads
MEMORY = 448 << 20  # bytes: a photo of 48 megapixels takes 300 MB as a JPEG, 440 MB as HEIC or PNG
# Most bytes of memory per decoded pixel: measured with 48 megapixels and Pillow 13.
JPEG, RGB, TRANSPARENT, LOSSY_WEBP, HEIC, AVIF = 6.5, 9.0, 13.0, 17.0, 9.4, 11.0
PNG_PLAIN = {0, 2, 3}  # colour types without transparency


class Decoders:
    """Threads that decode, and as many again for large pictures.

    A thread for small pictures reads a picture's header, and hands a large one on.
    """

    def __init__(self, threads: int, large: bool = True) -> None:
        """Start the threads. large: whether to decode large pictures; else they raise Heavy."""
        handed_on = None
        if large:
            handed_on = _Lane(threads, may_be_large=True)
        self._small = _Lane(threads, large=handed_on)

    def submit(self, number: int, task: Task) -> "Future[Pixels]":
        """Queue a picture, and return the future of its pixels.

        number: of the picture in its request, from 0.
        """
        future: Future[Pixels] = Future()
        self._small.add(number, task, future)
        return future

    def relieve(self) -> None:
        """Replace threads that have taken long for a small picture, where more pictures wait."""
        self._small.relieve()

    def hang(self, seconds: float) -> bool:
        """Return whether no small picture has been decoded for `seconds`.

        Large ones don't count: they may take that long on a busy machine.
        """
        return self._small.hang(seconds)


class _Lane:
    """Threads for pictures of one kind."""

    def __init__(
        self, threads: int, *, may_be_large: bool = False, large: "_Lane | None" = None
    ) -> None:
        """Start so many. large: the threads that get large pictures, if any."""
        self._threads, self._may_be_large, self._large = threads, may_be_large, large
        # First the first pictures of all requests, then the second ones, so that a request with
        # many pictures doesn't hold up a request with one. The queue has a token for each picture:
        # waiting for it doesn't need Python's lock.
        self._heap: list[tuple[int, int, Task, Future[Pixels]]] = []
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._since: dict[threading.Thread, float] = {}  # the busy ones
        self._replaced: set[threading.Thread] = set()
        for _ in range(threads):
            self._start()

    def add(self, number: int, task: Task, future: "Future[Pixels]") -> None:
        """Queue a picture."""
        with self._lock:
            heapq.heappush(self._heap, (number, next(self._order), task, future))
        self._tokens.put(None)

    def relieve(self) -> None:
        """Replace threads that have been busy for long, where pictures wait."""
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
        """Return whether each thread has been busy with one picture for `seconds`."""
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
        # A picture that was handed on is marked as running already.
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
    """Nobody wants the picture any more. No Exception: decoding would turn it into ImageError."""


class Rooms:
    """Memory for large pictures that are decoded at once; first come, first served."""

    def __init__(self, pixels: int, memory: int = MEMORY, *, large: bool = True) -> None:
        """pixels: of one picture, at most. memory: bytes, for all pictures.

        large: whether large pictures are decoded here; else they raise Heavy.
        """
        self.pixels, self.memory, self.large = pixels, memory, large
        self._left = memory
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def of(self, image: bytes, work: Work, may_be_large: bool) -> Room:
        """Return the room for a request's picture. It raises Heavy where it may not be large."""
        return _Share(self, bytes_a_pixel(image), work, may_be_large)

    def take(self, size: int, work: Work) -> None:
        """Wait for `size` bytes. Raise Unwanted where the work ends first."""
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
        """Give `size` bytes back."""
        with self._changed:
            self._left += size
            self._changed.notify_all()


class _Share(Room):
    """The memory of one picture."""

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
    """Return how many bytes of memory decoding takes per pixel, by the format of the file."""
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
    """Turns images' files into the network's pixels, for callers on any number of threads."""

    def __init__(self, preprocessing: Preprocessing, rooms: Rooms, threads: int) -> None:
        """Start so many threads."""
        self._preprocessing, self._rooms = preprocessing, rooms
        self._decoders = Decoders(threads, rooms.large)

    def pixels(self, images: Sequence[bytes], work: Work) -> Iterator[Pixels]:
        """Yield the pixels of each file in order, while the others are decoded.

        Raises ImageError, TimeoutError at the deadline, Abandoned, and Heavy.
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
        """Return whether no small picture has been decoded for `seconds`: every thread hangs."""
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
                if step.done():  # it has ended just now, or raised this error itself
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
            # AVIF and HEIC are decoded in a process whose memory is limited by their headers.
            raise ImageError("decoding it takes more memory than its size allows") from error
