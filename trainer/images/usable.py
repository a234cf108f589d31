"""The images that can be used: every one is decoded once, and what fails is left out by name."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from trainer.common import files
from trainer.common.command import one_line
from trainer.common.console import ProgressBar, log
from trainer.common.cpu import cores
from trainer.common.interrupt import Stop
from trainer.images import folder, identity
from trainer.images.cache import Packed, PixelCache, TooLarge
from trainer.images.decode import ImageError, Preprocessing
from trainer.images.folder import ImageFolder, Split
from trainer.images.identity import Sample
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
) -> tuple[ImageFolder, Packed]:
    """Return the folder without the images that can't be used, and what reads their pixels.

    They are in the order of their content, so a file's name and place change nothing. The processes
    of a host share its cache: the first one packs, the others wait. Raise UserError where too many
    are broken, or differ between processes.
    """
    paths = [path for split in images.splits.values() for path in split.paths]
    with interruptible("packing pictures", stop) as step:
        packed = _packed(config, paths, workers(config, world), step)

    def check(path: str) -> None:
        if path in packed.broken:
            raise ImageError(packed.broken[path])

    images = folder.quarantine(images, check, 0, config.data.max_broken, lambda *_: stop.check())
    images = replace(images, digests=packed.digests)
    splits = {name: _by_content(split, packed.digests) for name, split in images.splits.items()}
    images = replace(images, splits=splits)
    broken = sorted(Path(path).name for path, _ in images.broken)
    facts = {
        "pictures that can't be used": ", ".join(broken[:5]) or "none",
        "their number": str(len(broken)),
        "the pictures": identity.of_images(images),
    }
    world.check_same(facts, stop)
    return images, packed


def are_those(config: Config, images: ImageFolder, before: Sequence[Sample], stop: Stop) -> bool:
    """Return whether the images that can be used are those that were noted as such.

    Those are not decoded once more, nor read where they look unchanged.
    """
    paths = [path for split in images.splits.values() for path in split.paths]
    memo = Path(config.platform.cache, identity.DIRECTORY)
    known = identity.digests(list(dict.fromkeys(paths)), memo)
    now = identity.samples(replace(images, digests=known))
    gone, new = identity.differences(before, now)
    if gone:
        return False
    place = dict(zip((sample[3] for sample in now), paths, strict=True))
    others = [place[sample[3]] for sample in new]
    if not others:
        return True
    with interruptible("packing pictures", stop) as step:
        return len(_packed(config, others, cores(), step).broken) == len(others)


def _packed(
    config: Config, paths: Sequence[str], threads: int, step: Callable[[int, int], None]
) -> Packed:
    """Return the images, from the disk where they are kept there.

    A cache that can't be written costs time, and not the run.
    """
    limit = None
    if config.data.cache_gb is not None:
        limit = round(config.data.cache_gb * 1e9)
    spec, root = preprocessing(config), Path(config.platform.cache)
    digests = root / identity.DIRECTORY
    store = PixelCache(root / "pixels", spec.resize, spec.interpolation, limit, digests)
    if reads_more_than_once(config):
        try:
            return store.pack(paths, threads, step)
        except (TooLarge, OSError) as error:
            if config.data.cache == "packed":
                raise
            log.warning("pictures are decoded in each epoch: %s", one_line(error) or error)
    try:
        return store.pack(paths, threads, step, keep=False)
    except OSError as error:
        log.info(
            "the next run checks the pictures again: the result can't be cached: %s",
            one_line(error) or error,
        )
    return store.check(paths, threads, step)


def _by_content(split: Split, digests: Mapping[str, str]) -> Split:
    """Return a split with its images by class, then by content."""
    order = sorted(
        range(len(split.paths)),
        key=lambda sample: (split.labels[sample], digests[split.paths[sample]]),
    )
    return Split(tuple(split.paths[sample] for sample in order), split.labels[order])


def report_left_out(images: ImageFolder, path: Path | None = None) -> None:
    """Count what is left out by kind in the log, in one line; write all of it, and why, to `path`.

    The first of the images that can't be used are named before.
    """
    listed_in = ""
    if path is not None:
        lines = (f"{name}\t{why}\n" for name, why in images.broken + images.left_out)
        files.write(path, "".join(lines))
        listed_in = f"; see {path}"
    for name, reason in images.broken[:WARNINGS]:
        log.warning("left out: %s (%s)", name, reason)
    kinds = ["that can't be used"] * len(images.broken) + [kind for _, kind in images.left_out]
    level = logging.WARNING
    if set(kinds) <= {OF_SYSTEM}:  # nobody misses these
        level = logging.INFO
    if kinds:
        log.log(level, "left out: %s%s", counted(kinds), listed_in)


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
