"""Runs a model on many pictures, on all cores, and keeps their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from serving.backends import Scores
from serving.fetch import RequestError
from serving.package import Package
from serving.sources import Source
from trainer.common.cpu import cores
from trainer.common.errors import Unreadable
from trainer.images.decode import MAX_PIXELS, ImageError, Room

T = TypeVar("T")
THREADS = 1  # that run the network for one picture: see `each`


def each(
    package: Package, pictures: Iterable[Source], work: Callable[[Source, bytes, Scores], T]
) -> Iterator[tuple[Source, T | ImageError | Unreadable]]:
    """Yield each picture with the result of `work`, which gets it, its file and its scores.

    In place of a result the error: the picture is broken (ImageError), or can't be read now
    (Unreadable). One thread decodes a picture and runs the network on it, so the package must be
    loaded with THREADS. With more pictures than cores, no core is idle.
    """
    room = Room(MAX_PIXELS)
    threads = cores()

    def outcome(picture: Source) -> T | ImageError | Unreadable:
        try:
            data = picture.read()
            scores = package.network(package.prepare(data, room)[None])
        except (ImageError, Unreadable) as error:
            return error
        except RequestError as error:  # from S3
            return Unreadable(f"{picture.name}: {error}")
        return work(picture, data, scores)

    with ThreadPoolExecutor(threads, "picture") as pool:
        pending: deque[tuple[Source, Future[T | ImageError | Unreadable]]] = deque()
        try:
            for picture in pictures:
                pending.append((picture, pool.submit(outcome, picture)))
                if len(pending) > 4 * threads:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
