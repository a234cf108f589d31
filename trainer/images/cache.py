"""Packed pixels: every image decoded and shrunk once, then read from a memory-mapped file.

It is a memo of `decode.shrink`, so its pixels are those of the uncached path by construction;
filling it also finds the broken images. A store is the directory of one preprocessing, shared by
all runs and data sets. It holds `N.pixels`, to which images are appended, and `N.index`, a JSON
line for each path. The index mentions only pixels that are on the disk: after a kill or a power
cut the next run goes on there.
"""

import hashlib
import json
import mmap
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from trainer.common import files
from trainer.common.errors import UserError
from trainer.images import bounds, decode
from trainer.images.decode import MAX_ASPECT, ImageError, shrink
from trainer.images.folder import read

FORMAT = 1  # of a store's files
# Images between two flushes to the disk: what a kill may cost; about 70 MB at 256 pixels.
COMMIT_EVERY = 256
AHEAD = 16  # images in the making for each thread: a reserve for the time of a flush
SAMPLE = 32  # images decoded to estimate the size of all, where it is in doubt whether they fit
# File times advance with the kernel's timer, every 10 ms at the slowest: a file that has just
# changed may change again and look the same.
TICK = 20_000_000  # nanoseconds


class TooLarge(UserError):
    """The packed pixels would not fit onto the disk, or into their limit."""


class Packed:
    """The shrunk images, by path. broken: path to reason of those that can't be used."""

    def __init__(
        self,
        memory: mmap.mmap | bytes,
        places: Mapping[str, tuple[int, tuple[int, int, int]]],
        broken: Mapping[str, str],
    ) -> None:
        self.broken = broken
        self._memory, self._places = memory, places  # a place: the offset in memory and the shape

    def __call__(self, path: str) -> NDArray[np.uint8]:
        """Return what `shrink` made of the image: uint8 [H, W, 3], a read-only view into the file.

        Raise ImageError for a broken one.
        """
        if path in self.broken:
            raise ImageError(self.broken[path])
        offset, shape = self._places[path]
        return np.ndarray(shape, np.uint8, self._memory, offset)


@dataclass(frozen=True)
class PixelCache:
    """Where the shrunk images of one preprocessing are kept.

    root: holds the stores of all preprocessings. resize, interpolation: as in `Preprocessing`.
    max_bytes: limit of this store's pixels; None: none but the disk's.
    """

    root: Path
    resize: int
    interpolation: str
    max_bytes: int | None = None

    @property
    def directory(self) -> Path:
        """The store: whatever may change a pixel is part of its name.

        That is the settings, the code, and the libraries that decode.
        """
        code = [
            hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            for module in (decode, bounds)
        ]
        decoders = [features.version("libjpeg_turbo"), decode.optional_decoders()]
        facts = [FORMAT, code, PIL.__version__, decoders, self.resize, self.interpolation]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return self.root / f"{self.resize}-{self.interpolation}-{digest[:16]}"

    def pack(
        self, paths: Sequence[str], workers: int, on_progress: Callable[[int, int], None]
    ) -> Packed:
        """Decode and shrink those of the images that the store lacks; return them all.

        workers: threads that decode; 0: the caller's own does. on_progress(done, total): called in
        the caller's own thread, also while another run packs here and this one waits. It may
        raise, to end the work early: what is packed so far stays. Raise TooLarge before anything
        is added, Unreadable for an image that can't be read now, and OSError naming the store if
        its disk fails.
        """
        absolute = {path: str(Path(path).absolute()) for path in paths}
        total, done = len(absolute), 0

        def step(more: int = 0) -> None:
            nonlocal done
            done += more
            on_progress(done, total)

        directory = self.directory
        directory.mkdir(parents=True, exist_ok=True)
        with files.locked(directory, step), _threads(workers) as in_order:
            store = _Store(directory, step)
            unknown = [path for path in absolute.values() if not store.knows(path)]
            step(total - len(unknown))
            unreadable: dict[str, str] = {}
            if unknown:

                def examine(path: str) -> Examined:
                    return files.patiently(path, partial(self._examine, path, store.contents))

                self._check_room(store, unknown, partial(in_order, examine), step)
                unreadable = store.add(in_order(examine, unknown), step)
                store.tidy(set(absolute.values()), step)
            places, broken = {}, {}
            for path, where in absolute.items():
                reason = unreadable.get(where)
                if reason is None:
                    reason = store.entries[where].reason
                if reason is None:
                    places[path] = store.entries[where].place
                else:
                    broken[path] = reason
            return Packed(store.mapped(), places, broken)

    def _examine(self, path: str, contents: Container[str]) -> "Examined":
        """Return what lies at `path`, with its pixels where its content is new and good.

        No content: nothing to remember, next time it may be otherwise. Raise OSError and
        MemoryError.
        """
        try:
            # The status is from before the only read: pixels and hash are of the same bytes, and
            # whatever changes later is noticed next time.
            data, status = read(path)
        except ImageError as error:
            return Entry(path, None, "", str(error)), None
        entry = Entry(path, _signature(status), hashlib.sha256(data).hexdigest())
        if entry.content in contents:
            return entry, None
        try:
            pixels = shrink(data, self.resize, self.interpolation)
        except ImageError as error:
            return entry._replace(reason=str(error)), None
        height, width = pixels.shape[:2]
        checksum = zlib.crc32(pixels.data)
        return entry._replace(height=height, width=width, checksum=checksum), pixels

    def _check_room(
        self,
        store: "_Store",
        paths: Sequence[str],
        examine: Callable[[Sequence[str]], Iterator["Examined"]],
        step: Callable[[], None],
    ) -> None:
        """Raise TooLarge where so many more images do not fit; in doubt, some are decoded."""
        room = shutil.disk_usage(store.directory).free
        left = f"{_gigabytes(room)} are free"
        if self.max_bytes is not None and self.max_bytes - store.end < room:
            room = self.max_bytes - store.end
            used, allowed = _gigabytes(store.end), _gigabytes(self.max_bytes)
            left = f"{used} of the {allowed} allowed are used"
        count = len(paths)
        if count * MAX_ASPECT * self.resize**2 * 3 <= room:
            return
        sizes = []
        for _, pixels in examine(paths[:: -(-count // SAMPLE)]):
            size = 0
            if pixels is not None:
                size = pixels.nbytes
            sizes.append(size)
            step()
        # The rest may be somewhat larger than the sample.
        needed = round(1.1 * count * sum(sizes) / len(sizes))
        if needed > room:
            raise TooLarge(
                f"{store.directory}: the packed pixels of {count} pictures need about "
                f"{_gigabytes(needed)}, and {left}; give data.cache=none, "
                "or platform.cache=DIR on a larger disk, "
                f"or remove what you no longer need of {store.directory.parent}"
            )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


# --- examining images ---


class Entry(NamedTuple):
    """What lies at a path: a line of the index.

    signature: size, mtime_ns and ctime_ns of the file; while they stay, it isn't read again.
    content: SHA-256 of the file. It decides where the signature differs, so an image that was
    moved or touched isn't decoded again.
    """

    path: str  # absolute
    signature: list[int] | None
    content: str
    reason: str | None = None  # why it can't be used, if so
    height: int = 0
    width: int = 0
    checksum: int = 0  # CRC-32 of the pixels
    offset: int = 0  # of the pixels

    @property
    def place(self) -> tuple[int, tuple[int, int, int]]:
        return self.offset, (self.height, self.width, 3)

    @property
    def end(self) -> int:
        return self.offset + self.height * self.width * 3


Examined = tuple[Entry, NDArray[np.uint8] | None]


def _signature(status: os.stat_result) -> list[int] | None:
    """Return what tells a file from a changed one, ctime included: copying tools set mtime back.

    None where the file is so young that it may change without its times changing.
    """
    if time.time_ns() - status.st_ctime_ns < TICK:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextmanager
def _threads(
    workers: int,
) -> Iterator[Callable[[Callable[[str], Examined], Sequence[str]], Iterator[Examined]]]:
    """Give in_order(function, items): the results in the items' order.

    They are computed by threads that end with the context.
    """
    if workers == 0:
        yield map
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")

    def in_order(function: Callable[[str], Examined], items: Sequence[str]) -> Iterator[Examined]:
        pending: deque[Future[Examined]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield in_order
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- the files ---


class _Store:
    """A store's files, for the process that has it locked.

    entries: by path, what lay there last. contents: an entry of each content. end: of the pixels,
    in bytes. lines: in the index. Other processes read on while files change here: pixels that the
    index mentions are never overwritten or cut off. To drop some, the next generation of files is
    made without them; who has the old ones mapped keeps them, though they have no name any more.
    """

    def __init__(self, directory: Path, step: Callable[[], None]) -> None:
        self.directory = directory
        files.sweep(directory)
        self.generation = self._remove_others()
        self._reset([])
        if self.generation:
            self._load(step)
        else:
            self._rewrite([], step)

    @property
    def index(self) -> Path:
        return self.directory / f"{self.generation}.index"

    @property
    def pixels(self) -> Path:
        return self.directory / f"{self.generation}.pixels"

    def knows(self, path: str) -> bool:
        """Return whether the file at `path` is the examined one, as far as its status tells."""
        entry = self.entries.get(path)
        if entry is None or entry.signature is None:
            return False
        try:
            return entry.signature == _signature(Path(path).stat())
        except OSError:
            return False

    def add(self, examined: Iterable[Examined], step: Callable[[int], None]) -> dict[str, str]:
        """Append what is new, and call step(1) after each.

        Return path to reason of those that are not to be remembered.
        """
        unreadable: dict[str, str] = {}
        pending: list[Entry] = []
        with FileIO(self.pixels, "a") as pixels_file, FileIO(self.index, "a") as index_file:

            def commit() -> None:
                lines = _lines(pending)
                pending.clear()
                _write(pixels_file, b"", flush=True)
                _write(index_file, lines, flush=True)

            try:
                for entry, pixels in examined:
                    if not entry.content:
                        unreadable[entry.path] = str(entry.reason)
                    else:
                        # Also of a duplicate that was decoded at the same time.
                        known = self.contents.get(entry.content)
                        if known is not None:
                            entry = known._replace(path=entry.path, signature=entry.signature)
                        elif pixels is not None:
                            entry = entry._replace(offset=self.end)
                            _write(pixels_file, pixels.data)
                        self._remember(entry)
                        pending.append(entry)
                    if len(pending) == COMMIT_EVERY:
                        commit()
                    step(1)
            finally:
                commit()
        return unreadable

    def tidy(self, used: Container[str], step: Callable[[], None]) -> None:
        """Drop what no path leads to, once that is half of the pixels, or most of the index."""
        live = [entry for path, entry in self.entries.items() if path in used or _exists(path)]
        size = sum({entry.content: entry.end - entry.offset for entry in live}.values())
        worth_it = 2 * size < self.end or 8 * len(live) < self.lines
        if worth_it and size < shutil.disk_usage(self.directory).free:
            self._rewrite(live, step)

    def mapped(self) -> mmap.mmap | bytes:
        """Return the pixels, read-only."""
        length = min(self.end, self._size())
        if length == 0:
            return b""  # mmap refuses it
        with self.pixels.open("rb") as file:
            return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)

    def _size(self) -> int:
        try:
            return self.pixels.stat().st_size
        except FileNotFoundError:
            return 0

    def _load(self, step: Callable[[], None]) -> None:
        data = self.index.read_bytes()
        *lines, torn = data.split(b"\n")
        entries = list(_parsed(lines))
        self._reset(entries)
        if not torn and len(entries) == len(lines) and self._size() == self.end:
            return
        # The last build did not end by itself. Every image's checksum is compared now, and only
        # now: it means reading all pixels.
        memory, damaged = self.mapped(), set()
        for entry in self.contents.values():
            if zlib.crc32(memory[entry.offset : entry.end]) != entry.checksum:
                damaged.add(entry.content)
            step()
        if damaged or len(entries) < len(lines):
            self._rewrite([entry for entry in entries if entry.content not in damaged], step)
        else:
            # A kill between two commits: nobody was told of what follows the last one.
            os.truncate(self.index, len(data) - len(torn))
            os.truncate(self.pixels, self.end)

    def _rewrite(self, entries: Sequence[Entry], step: Callable[[], None]) -> None:
        """Make the next generation of files, with these entries and their pixels only."""
        memory, offsets, end = self.mapped(), dict[str, int](), 0
        self.generation += 1
        try:
            with FileIO(self.pixels, "w") as file:
                for entry in entries:
                    if entry.content not in offsets:
                        offsets[entry.content] = end
                        end += entry.end - entry.offset
                        _write(file, memory[entry.offset : entry.end])
                        step()
                _write(file, b"", flush=True)
            entries = [entry._replace(offset=offsets[entry.content]) for entry in entries]
            # From here on, the new generation is the one that counts.
            files.write(self.index, _lines(entries))
        finally:
            self._remove_others()
        self._reset(entries)

    def _remove_others(self) -> int:
        """Remove all generations but the newest that has an index; return its number, or 0."""
        newest = max((int(path.stem) for path in self.directory.glob("*.index")), default=0)
        for path in [*self.directory.glob("*.index"), *self.directory.glob("*.pixels")]:
            if path.stem != str(newest):
                path.unlink()
        return newest

    def _reset(self, entries: Iterable[Entry]) -> None:
        self.entries: dict[str, Entry] = {}
        self.contents: dict[str, Entry] = {}
        self.end = self.lines = 0
        for entry in entries:
            self._remember(entry)

    def _remember(self, entry: Entry) -> None:
        self.entries[entry.path] = self.contents[entry.content] = entry
        self.end = max(self.end, entry.end)
        self.lines += 1


def _lines(entries: Iterable[Entry]) -> bytes:
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()


def _parsed(lines: Iterable[bytes]) -> Iterator[Entry]:
    """Yield the entries up to the first line that is none."""
    for line in lines:
        try:
            yield Entry(*json.loads(line))
        except (ValueError, TypeError):
            return


def _write(file: FileIO, data: bytes | memoryview, flush: bool = False) -> None:
    """Append all of `data`, unbuffered: what fails on a full disk fails here, and once."""
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]
        if flush:
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(file.name)
        raise


def _exists(path: str) -> bool:
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # not for us to see
        return True
    return True
