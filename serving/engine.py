"""The engine behind every adapter: decodes images and runs the network, on a thread a core.

On a CPU each image is run alone: batches gained nothing there. A GPU wants batches: the engine then
waits up to `delay` for more images.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.backends import Scores
from serving.package import Package
from trainer.images.decode import ImageError, Room

One = Future[Scores]  # of one image


class Engine:
    """Images to scores, for callers on any number of threads, each of which sets a deadline."""

    def __init__(
        self,
        package: Package,
        *,
        max_pixels: int,
        workers: int = 1,
        batch: int = 1,
        delay: float = 0.0,
    ) -> None:
        """Start the engine's threads.

        max_pixels: decoded at once, of all images together. workers: images decoded at once, and,
        with batch=1, networks run at once. batch: most images in one run of the network. delay:
        seconds that a run may wait for its batch to fill.
        """
        self.package = package
        self.observe: Callable[[int], object] = lambda size: None  # called with each batch's size
        self._room = Room(max_pixels)
        self._workers = workers
        self._decoders = ThreadPoolExecutor(workers, "decode")
        self._decoding_since: dict[int, float] = {}  # by thread
        self._waiting: queue.SimpleQueue[tuple[NDArray[np.uint8], One]] = queue.SimpleQueue()
        runners = 1
        if batch == 1:
            runners = workers
        for _ in range(runners):
            threading.Thread(
                target=self._run, args=(batch, delay), name="predict", daemon=True
            ).start()

    def scores(self, images: Sequence[bytes], end: float) -> Scores:
        """Return what the network says of N images' files.

        end: on time.monotonic(). Raises ImageError, and TimeoutError where `end` comes first.
        """
        decoding = [self._decoders.submit(self._decode, image) for image in images]
        running: list[One] = []
        try:
            for number, future in enumerate(decoding, 1):
                try:
                    running.append(self._submit(future.result(end - time.monotonic())))
                except ImageError as error:
                    if len(images) == 1:
                        raise
                    raise ImageError(f"picture {number} of {len(images)}: {error}") from error
            results = [future.result(end - time.monotonic()) for future in running]
            return Scores.joined(results)
        finally:
            unfinished: list[Future[Any]] = [*decoding, *running]
            for each in unfinished:
                each.cancel()

    def hangs(self, seconds: float) -> bool:
        """Return whether each decoder has been busy with one image for more than `seconds`."""
        since = list(self._decoding_since.values())
        return len(since) == self._workers and max(since) < time.monotonic() - seconds

    def _decode(self, image: bytes) -> NDArray[np.uint8]:
        thread = threading.get_ident()
        self._decoding_since[thread] = time.monotonic()
        try:
            return self.package.prepare(image, self._room)
        finally:
            del self._decoding_since[thread]

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
            # Those whose callers have given up are left out.
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
