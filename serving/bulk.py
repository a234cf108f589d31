"""Many pictures through a model, on all cores, in their order."""

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
THREADS = 1  # of the network of one picture: see `each`


def each(
    package: Package, pictures: Iterable[Source], work: Callable[[Source, bytes, Scores], T]
) -> Iterator[tuple[Source, T | ImageError | Unreadable]]:
    """Yield, for each picture, what `work` returns of it, its file and the network's scores.

    Or why there is none: it is broken (ImageError), or can't be read now (Unreadable). One thread
    decodes a picture and computes its network, of a package that was loaded with THREADS: with more
    pictures than cores, no core is idle.
    """
    room = Room(MAX_PIXELS)
    threads = cores()

    def outcome(picture: Source) -> T | ImageError | Unreadable:
        try:
            data = picture.read()
            scores = package.network(package.prepare(data, room)[None])
        except (ImageError, Unreadable) as error:
            return error
        except RequestError as error:  # of S3
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
