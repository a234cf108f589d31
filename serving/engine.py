"""The engine behind every adapter: decodes images and runs the network, on a thread per core.

On a CPU the network runs on each image alone: batches gained nothing there. On a GPU batches pay:
the engine waits up to `delay` seconds for more images.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from serving.backends import Scores
from serving.decoders import PATIENCE, Preparation, Rooms
from serving.package import Package
from serving.work import Work

One = Future[Scores]  # of one image


class Engine:
    """Turns images into scores, for callers on any number of threads, each with a deadline."""

    def __init__(
        self,
        package: Package,
        rooms: Rooms,
        *,
        workers: int = 1,
        batch: int = 1,
        delay: float = 0.0,
    ) -> None:
        """Start the engine's threads.

        rooms: memory for the images that are decoded. workers: images decoded at once, and with
        batch=1 runs of the network at once. batch: most images in one run of the network. delay:
        seconds that a run may wait for its batch to fill.
        """
        self.package = package
        self.observe: Callable[[int], object] = lambda size: None  # called with each batch's size
        self._preparation = Preparation(package.preprocessing, rooms, workers)
        self._waiting: queue.SimpleQueue[tuple[NDArray[np.uint8], One]] = queue.SimpleQueue()
        runners = 1
        if batch == 1:
            runners = workers
        for _ in range(runners):
            threading.Thread(
                target=self._run, args=(batch, delay), name="predict", daemon=True
            ).start()

    def scores(self, images: Sequence[bytes], work: Work) -> Scores:
        """Return the scores of N images' files.

        Raises ImageError, TimeoutError at the deadline, Abandoned, and Heavy.
        """
        return self.run(self._preparation.pixels(images, work), work)

    def run(self, pixels: Iterable[NDArray[np.uint8]], work: Work) -> Scores:
        """Return the scores of N images, each [size, size, 3]. Raises as `scores`."""
        running: list[One] = []
        try:
            running += map(self._submit, pixels)
            return Scores.joined([self._result(step, work) for step in running])
        finally:
            for each in running:
                each.cancel()

    def hangs(self, seconds: float) -> bool:
        """Return whether no small picture has been decoded for `seconds`: every thread hangs."""
        return self._preparation.hangs(seconds)

    def _result(self, step: One, work: Work) -> Scores:
        """Wait for a step's result while the work is wanted."""
        while True:
            seconds = min(work.left(), PATIENCE)
            try:
                return step.result(seconds)
            except TimeoutError:
                if step.done():  # it has ended just now, or raised this error itself
                    return step.result()

    def _submit(self, pixels: NDArray[np.uint8]) -> One:
        future: One = Future()
        self._waiting.put((pixels, future))
        return future

    def _run(self, size: int, delay: float) -> None:
        """Run the network on batches of up to `size` images, for ever."""
        while True:
            batch = [self._waiting.get()]
            full_by = time.monotonic() + delay
            with suppress(queue.Empty):
                while len(batch) < size:
                    batch.append(self._waiting.get(timeout=max(0.0, full_by - time.monotonic())))
            # Leave out images whose callers have given up.
            batch = [pair for pair in batch if pair[1].set_running_or_notify_cancel()]
            if not batch:
                continue
            self.observe(len(batch))
            try:
                scores = self.package.network(np.stack([pixels for pixels, _ in batch]))
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
            else:
                for number, (_, future) in enumerate(batch):
                    future.set_result(scores.of(number))
