"""The engine behind every door: decodes pictures and runs the network, on as many threads as the machine has cores for it.

On a CPU each picture is run alone: batches gained nothing there. A GPU wants batches: the engine then waits up to `delay` for more pictures.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from serving.package import Package
from trainer.images.decode import ImageError


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Engine:
    """Pictures to logits. Safe to call from any number of threads; whoever waits has an end to it."""

    def __init__(
        self,
        package: Package,
        *,
        max_pixels: int,
        workers: int = 1,
        batch: int = 1,
        delay: float = 0.0,
    ) -> None:
        """max_pixels: of a picture as stored. workers: pictures decoded at once, and, with batch=1, networks run at once.

        batch: most pictures in one run of the network. delay: seconds that a run may wait for its batch to fill.
        """
        self.package = package
        self.observe: Callable[[int], object] = lambda size: (
            None
        )  # called with the size of each batch
        self._max_pixels = max_pixels
        self._workers = workers
        self._decoders = ThreadPoolExecutor(workers, "decode")
        self._began: dict[int, float] = {}  # when each thread that decodes began its picture
        self._waiting: queue.SimpleQueue[tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]] = (
            queue.SimpleQueue()
        )
        for _ in range(workers if batch == 1 else 1):
            threading.Thread(
                target=self._run, args=(batch, delay), name="predict", daemon=True
            ).start()

    def logits(self, pictures: Sequence[bytes], end: float) -> NDArray[np.float32]:
        """Logits [N, classes] of N pictures' files. end: on time.monotonic(). Raises ImageError, and TimeoutError where `end` comes first."""
        decoding = [self._decoders.submit(self._decode, picture) for picture in pictures]
        running: list[Future[NDArray[np.float32]]] = []
        try:
            for number, future in enumerate(decoding, 1):
                try:
                    running.append(self._submit(future.result(end - time.monotonic())))
                except ImageError as error:
                    raise ImageError(
                        f"picture {number} of {len(pictures)}: {error}"
                        if len(pictures) > 1
                        else str(error)
                    ) from error
            return np.stack([future.result(end - time.monotonic()) for future in running])
        finally:
            for decoded in decoding:
                decoded.cancel()
            for run in running:
                run.cancel()

    def hangs(self, seconds: float) -> bool:
        """Whether each decoder has been busy with one picture for more than `seconds`."""
        began = list(self._began.values())
        return len(began) == self._workers and max(began) < time.monotonic() - seconds

    def _decode(self, picture: bytes) -> NDArray[np.uint8]:
        thread = threading.get_ident()
        self._began[thread] = time.monotonic()
        try:
            return self.package.prepare(picture, self._max_pixels)
        finally:
            del self._began[thread]

    def _submit(self, pixels: NDArray[np.uint8]) -> Future[NDArray[np.float32]]:
        future: Future[NDArray[np.float32]] = Future()
        self._waiting.put((pixels, future))
        return future

    def _run(self, size: int, delay: float) -> None:
        while True:
            batch = [self._waiting.get()]
            full_by = time.monotonic() + delay
            with suppress(queue.Empty):
                while len(batch) < size:
                    batch.append(self._waiting.get(timeout=max(0.0, full_by - time.monotonic())))
            wanted = [
                (pixels, future)
                for pixels, future in batch
                if future.set_running_or_notify_cancel()
            ]
            if not wanted:
                continue
            self.observe(len(wanted))
            try:
                logits = self.package.predict(np.stack([pixels for pixels, _ in wanted]))
            except Exception as error:
                for _, future in wanted:
                    future.set_exception(error)
            else:
                for row, (_, future) in zip(logits, wanted, strict=True):
                    future.set_result(row)
