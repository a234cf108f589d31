"""The images that can be used: every one is decoded once, and what fails is left out by name."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from trainer.common import files
from trainer.common.console import ProgressBar, log
from trainer.common.cpu import cores
from trainer.common.interrupt import Stop
from trainer.images import folder
from trainer.images.cache import Packed, PixelCache, TooLarge
from trainer.images.decode import ImageError, Preprocessing
from trainer.images.folder import ImageFolder
from trainer.images.loader import Reader
from trainer.images.names import OF_SYSTEM, counted
from trainer.settings.config import Config

WARNINGS = 10  # broken images that the log names


class Processes(Protocol):
    """What is needed of the processes of a run."""

    @property
    def local_size(self) -> int:
        """How many of them this host has."""

    def check_same(self, facts: dict[str, str], stop: Stop) -> None:
        """Raise UserError where the processes have different facts."""


def usable_images(
    config: Config, images: ImageFolder, stop: Stop, world: Processes
) -> tuple[ImageFolder, Reader | None]:
    """Return the folder without the images that can't be used, and a reader of packed pixels.

    Without a reader they weren't kept. The processes of a host share its cache: the first one
    packs, the others wait. Raise UserError where too many are broken, or differ between processes.
    """
    packed, spec = None, preprocessing(config)
    if reads_more_than_once(config):
        try:
            packed = _pack(config, images, stop, world)
        except TooLarge as error:
            if config.data.cache == "packed":
                raise
            log.info("pictures are decoded in each epoch: %s", error)

    def check(path: str) -> None:
        if packed is None:
            folder.read_shrunk(path, spec.resize, spec.interpolation)
        elif path in packed.broken:
            raise ImageError(packed.broken[path])

    threads = 0
    if packed is None:
        threads = workers(config, world)
    with interruptible("checking pictures", stop) as step:
        images = folder.quarantine(images, check, threads, config.data.max_broken, step)
    broken = sorted(Path(path).name for path, _ in images.broken)
    facts = {
        "pictures that can't be used": ", ".join(broken[:5]) or "none",
        "their number": str(len(broken)),
    }
    world.check_same(facts, stop)
    return images, packed


def report_left_out(images: ImageFolder, path: Path) -> None:
    """Write all that is left out, and why, to `path`; count it by kind in the log, in one line.

    The first of the images that can't be used are named before.
    """
    files.write(path, "".join(f"{name}\t{why}\n" for name, why in images.broken + images.left_out))
    for name, reason in images.broken[:WARNINGS]:
        log.warning("left out: %s (%s)", name, reason)
    kinds = ["that can't be used"] * len(images.broken) + [kind for _, kind in images.left_out]
    level = logging.WARNING
    if set(kinds) <= {OF_SYSTEM}:  # nobody misses these
        level = logging.INFO
    if kinds:
        log.log(level, "left out: %s; see %s", counted(kinds), path)


def preprocessing(config: Config) -> Preprocessing:
    """Return what becomes of an image, once `weights.resolve` has filled in what isn't given."""
    data = config.data
    assert data.resize and data.size and data.interpolation
    return Preprocessing(resize=data.resize, size=data.size, interpolation=data.interpolation)


def workers(config: Config, world: Processes) -> int:
    """Return how many threads read images: data.workers, or this process's share of the cores."""
    if config.data.workers is not None:
        return config.data.workers
    return max(cores() // world.local_size, 1)


def reads_more_than_once(config: Config) -> bool:
    """Return whether packed pixels are worth their disk: each is read more than once."""
    assert config.train.epochs is not None  # weights.resolve
    views = config.model.cached_views or config.train.epochs
    return config.data.cache == "packed" or (config.data.cache == "auto" and views > 1)


def _pack(config: Config, images: ImageFolder, stop: Stop, world: Processes) -> Packed:
    limit = None
    if config.data.cache_gb is not None:
        limit = round(config.data.cache_gb * 1e9)
    spec = preprocessing(config)
    root = Path(config.platform.cache) / "pixels"
    store = PixelCache(root, spec.resize, spec.interpolation, limit)
    paths = [path for split in images.splits.values() for path in split.paths]
    with interruptible("packing pictures", stop) as step:
        return store.pack(paths, workers(config, world), step)


@contextmanager
def interruptible(what: str, stop: Stop) -> Iterator[Callable[[int, int], None]]:
    """Give a progress callback(done, total) that raises Interrupted when asked to stop."""
    bar: ProgressBar | None = None

    def step(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or ProgressBar(what, total)
        bar.advance(done - bar.done)
        stop.check()

    try:
        yield step
    finally:
        if bar:
            bar.close()
