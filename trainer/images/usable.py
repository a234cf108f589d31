"""Which images of a folder can be used, and the pixels of those, packed where it pays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.common.console import ProgressBar, log
from trainer.common.cpu import cores
from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.images import cache, folder
from trainer.images.decode import ImageError, Preprocessing
from trainer.images.folder import ImageFolder
from trainer.images.loader import Reader
from trainer.settings.config import Config


def usable_images(
    config: Config, images: ImageFolder, stop: Stop, world: World
) -> tuple[ImageFolder, Reader | None]:
    """Decode every image once; return the folder without those that fail, and what reads the packed pixels.

    The reader is None where they were not kept. The processes of a host share its cache: the first one
    packs, the others wait. Raises UserError where too many images fail, or other ones than at rank 0;
    Interrupted when asked to stop.
    """
    packed = None
    if reads_more_than_once(config):
        try:
            packed = _pack(config, images, stop, world)
        except cache.TooLarge as error:
            if config.data.cache == "packed":
                raise
            log.info("pictures are decoded in each epoch: %s", error)
    pixels = preprocessing(config)

    def check(path: str) -> None:
        if packed is None:
            folder.read_shrunk(path, pixels.resize, pixels.interpolation)
        elif path in packed.broken:
            raise ImageError(packed.broken[path])

    threads = 0 if packed else workers(config, world)
    with _counted("checking pictures", stop) as step:
        images = folder.quarantine(images, check, threads, config.data.max_broken, step)
    broken = sorted(Path(path).name for path, _ in images.broken)
    names = ", ".join(broken[:5]) or "none"
    world.check_same({"pictures that can't be used": names, "their number": str(len(broken))}, stop)
    return images, packed


def reads_more_than_once(config: Config) -> bool:
    """Whether packed pixels are worth their disk."""
    if config.data.cache == "auto":
        assert config.train.epochs is not None  # network.weights.resolve
        return (config.model.cached_views or config.train.epochs) > 1
    return config.data.cache == "packed"


def preprocessing(config: Config) -> Preprocessing:
    """Return how an image becomes the pixels that the network sees."""
    data = config.data
    # network.weights.resolve has filled them in
    assert data.resize is not None and data.size is not None and data.interpolation is not None
    return Preprocessing(resize=data.resize, size=data.size, interpolation=data.interpolation)


def workers(config: Config, world: World) -> int:
    """Return how many threads read images: data.workers, or this process's share of the host's cores."""
    if config.data.workers is not None:
        return config.data.workers
    return max(cores() // world.local_size, 1)


def _pack(config: Config, images: ImageFolder, stop: Stop, world: World) -> cache.Packed:
    paths = [path for split in images.splits.values() for path in split.paths]
    limit = None if config.data.cache_gb is None else round(config.data.cache_gb * 1e9)
    root, pixels = Path(config.platform.cache) / "pixels", preprocessing(config)
    with _counted("packing pictures", stop) as step:
        return cache.pack(
            paths, root, pixels.resize, pixels.interpolation, workers(config, world), limit, step
        )


@contextmanager
def _counted(what: str, stop: Stop) -> Iterator[Callable[[int, int], None]]:
    """Give a progress callback(done, total) that raises Interrupted when asked to stop."""
    bar: ProgressBar | None = None

    def step(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = ProgressBar(what, total)
        bar.advance(done - bar.done)
        stop.check()

    try:
        yield step
    finally:
        if bar is not None:
            bar.close()
