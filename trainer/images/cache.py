"""Packed pixels: every picture decoded and shrunk once, then read from a memory-mapped file.

It is a memo of `preprocess.shrink`, so its pixels are those of the uncached path by construction; filling it also finds the broken pictures.
A store is the directory of one preprocessing, shared by all runs and data sets. It holds `N.pixels`, to which pictures are appended, and
`N.index`, a JSON line for each path. The index mentions only pixels that are on the disk: after a kill or a power cut the next run goes on there.
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
from trainer.images import bounds
from trainer.images import decode as preprocess
from trainer.images.decode import MAX_ASPECT, ImageError, shrink
from trainer.images.folder import read

FORMAT = 1  # of a store's files
COMMIT_EVERY = (
    256  # pictures between two flushes to the disk: what a kill may cost; about 70 MB at 256 pixels
)
AHEAD = 16  # pictures in the making for each thread: a reserve for the time of a flush
SAMPLE = 32  # pictures decoded to estimate the size of all, where it is in doubt whether they fit
# File times advance with the kernel's timer, every 10 ms at the slowest: a file that has just changed may change again and look the same.
TICK = 20_000_000  # nanoseconds


class TooLarge(UserError):
    """The packed pixels would not fit onto the disk, or into their limit."""


class Packed:
    """The shrunk pictures, by path. broken: path to reason of those that can't be used."""

    def __init__(
        self,
        memory: mmap.mmap | bytes,
        places: Mapping[str, tuple[int, tuple[int, int, int]]],
        broken: Mapping[str, str],
    ) -> None:
        self.broken = broken
        self._memory, self._places = memory, places  # a place: the offset in memory and the shape

    def __call__(self, path: str) -> NDArray[np.uint8]:
        """What `shrink` made of the picture: [H, W, 3], a read-only view into the file. Raises ImageError."""
        if path in self.broken:
            raise ImageError(self.broken[path])
        offset, shape = self._places[path]
        return np.ndarray(shape, np.uint8, self._memory, offset)


def pack(
    paths: Sequence[str],
    root: Path,
    resize: int,
    interpolation: str,
    workers: int,
    max_bytes: int | None,
    on_progress: Callable[[int, int], None],
) -> Packed:
    """Decodes and shrinks those of the pictures that the store below `root` lacks; returns them all.

    workers: threads that decode; 0: the caller's own does. max_bytes: limit of the store's pixels; None: none but the disk's.
    on_progress(done, total): called in the caller's own thread, also while another run packs here and this one waits. It may raise, to end
    the work early: what is packed so far stays. Raises TooLarge before it adds anything, Unreadable for a picture that can't be read now,
    and OSError naming the store if its disk fails.
    """
    absolute = {path: str(Path(path).absolute()) for path in paths}
    total, done = len(absolute), 0

    def step(more: int = 0) -> None:
        nonlocal done
        done += more
        on_progress(done, total)

    directory = store_directory(root, resize, interpolation)
    directory.mkdir(parents=True, exist_ok=True)
    with files.locked(directory, step), _threads(workers) as in_order:
        store = _Store(directory, step)
        unknown = [path for path in absolute.values() if not store.knows(path)]
        step(total - len(unknown))
        unreadable: dict[str, str] = {}
        if unknown:

            def examine(path: str) -> Examined:
                return files.patiently(
                    path, partial(_examine, path, store.contents, resize, interpolation)
                )

            sample = in_order(examine, unknown[:: -(-len(unknown) // SAMPLE)])
            _check_room(store, len(unknown), MAX_ASPECT * resize**2 * 3, sample, max_bytes, step)
            unreadable = store.add(in_order(examine, unknown), step)
            store.tidy(set(absolute.values()), step)
        places, broken = {}, {}
        for path, where in absolute.items():
            reason = unreadable[where] if where in unreadable else store.entries[where].reason
            if reason is None:
                places[path] = store.entries[where].place
            else:
                broken[path] = reason
        return Packed(store.mapped(), places, broken)


def store_directory(root: Path, resize: int, interpolation: str) -> Path:
    """The store of this preprocessing. Whatever may change a pixel is part of its name: the settings, the code, and the libraries that decode."""
    code = [
        hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
        for module in (preprocess, bounds)
    ]
    facts = [
        FORMAT,
        code,
        PIL.__version__,
        features.version("libjpeg_turbo"),
        resize,
        interpolation,
    ]
    return (
        root
        / f"{resize}-{interpolation}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    )


# --- examining pictures ---


class Entry(NamedTuple):
    """What was found at a path: a line of the index."""

    path: str  # absolute
    signature: (
        list[int] | None
    )  # size, mtime_ns and ctime_ns of the file; while they stay, it isn't read again
    content: str  # SHA-256 of the file: decides where the signature differs, so a picture that was moved or touched isn't decoded again
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


def _examine(path: str, contents: Container[str], resize: int, interpolation: str) -> Examined:
    """What lies at `path`, with its pixels where its content is new and good. No content: nothing to remember, next time it may be otherwise.

    Raises OSError and MemoryError.
    """
    try:
        # The status is from before the only read: pixels and hash are of the same bytes, and whatever changes later is noticed next time.
        data, status = read(path)
    except ImageError as error:
        return Entry(path, None, "", str(error)), None
    entry = Entry(path, _signature(status), hashlib.sha256(data).hexdigest())
    if entry.content in contents:
        return entry, None
    try:
        pixels = shrink(data, resize, interpolation)
    except ImageError as error:
        return entry._replace(reason=str(error)), None
    return entry._replace(
        height=pixels.shape[0], width=pixels.shape[1], checksum=zlib.crc32(pixels.data)
    ), pixels


def _signature(status: os.stat_result) -> list[int] | None:
    """None where the file is so young that it may change without its times changing. ctime is in it because copying tools set mtime back."""
    if time.time_ns() - status.st_ctime_ns < TICK:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextmanager
def _threads(
    workers: int,
) -> Iterator[Callable[[Callable[[str], Examined], Sequence[str]], Iterator[Examined]]]:
    """Gives in_order(function, items): the results in the items' order, computed by threads that end with the context."""
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


# --- room on the disk ---


def _check_room(
    store: "_Store",
    count: int,
    largest: int,
    sample: Iterable[Examined],
    max_bytes: int | None,
    step: Callable[[], None],
) -> None:
    """Raises TooLarge where `count` more pictures do not fit. largest: bytes of one at most. sample: some of them, decoded only in doubt."""
    free = shutil.disk_usage(store.directory).free
    room, left = free, f"{_gigabytes(free)} are free"
    if max_bytes is not None and max_bytes - store.end < free:
        room, left = (
            max_bytes - store.end,
            f"{_gigabytes(store.end)} of the {_gigabytes(max_bytes)} allowed are used",
        )
    if count * largest <= room:
        return
    sizes = []
    for _, pixels in sample:
        sizes.append(0 if pixels is None else pixels.nbytes)
        step()
    needed = round(
        1.1 * count * sum(sizes) / len(sizes)
    )  # the rest may be somewhat larger than the sample
    if needed > room:
        raise TooLarge(
            f"{store.directory}: the packed pixels of {count} pictures need about {_gigabytes(needed)}, and {left}; "
            f"give data.cache=none, or platform.cache=DIR on a larger disk, or remove what you no longer need of {store.directory.parent}"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


# --- the files ---


class _Store:
    """A store's files, for the process that has it locked.

    entries: by path, what was found there last. contents: an entry of each content. end: of the pixels, in bytes. lines: in the index.
    Other processes read on while files change here: pixels that the index mentions are never overwritten or cut off. To drop some, the
    next generation of files is made without them; who has the old ones mapped keeps them, though they have no name any more.
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
        """Whether the file at `path` is the one that was examined, as far as can be told without reading it."""
        entry = self.entries.get(path)
        try:
            return (
                entry is not None
                and entry.signature is not None
                and entry.signature == _signature(Path(path).stat())
            )
        except OSError:
            return False

    def add(self, examined: Iterable[Examined], step: Callable[[int], None]) -> dict[str, str]:
        """Appends what is new, and calls step(1) after each. Returns path to reason of those that are not to be remembered."""
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
                        if (
                            entry.content in self.contents
                        ):  # also of a duplicate that was decoded at the same time
                            entry = self.contents[entry.content]._replace(
                                path=entry.path, signature=entry.signature
                            )
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

    def tidy(self, wanted: Container[str], step: Callable[[], None]) -> None:
        """Drops what no path leads to any more, once that is more than half of the pixels, or most of the index."""
        live = [entry for path, entry in self.entries.items() if path in wanted or _exists(path)]
        size = sum({entry.content: entry.end - entry.offset for entry in live}.values())
        if (2 * size < self.end or 8 * len(live) < self.lines) and size < shutil.disk_usage(
            self.directory
        ).free:
            self._rewrite(live, step)

    def mapped(self) -> mmap.mmap | bytes:
        """The pixels, read-only."""
        length = min(self.end, self.pixels.stat().st_size) if self.pixels.exists() else 0
        if length == 0:
            return b""  # mmap refuses it
        with self.pixels.open("rb") as file:
            return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)

    def _load(self, step: Callable[[], None]) -> None:
        data = self.index.read_bytes()
        *lines, torn = data.split(b"\n")
        entries = list(_parsed(lines))
        self._reset(entries)
        size = self.pixels.stat().st_size if self.pixels.exists() else 0
        if not torn and len(entries) == len(lines) and size == self.end:
            return
        # The last build did not end by itself. Every picture's checksum is compared now, and only now: it means reading all pixels.
        memory, damaged = self.mapped(), set()
        for entry in self.contents.values():
            if zlib.crc32(memory[entry.offset : entry.end]) != entry.checksum:
                damaged.add(entry.content)
            step()
        if damaged or len(entries) < len(lines):
            self._rewrite([entry for entry in entries if entry.content not in damaged], step)
        else:  # a kill between two commits: what follows the last one was never mentioned to anybody
            os.truncate(self.index, len(data) - len(torn))
            os.truncate(self.pixels, self.end)

    def _rewrite(self, entries: Sequence[Entry], step: Callable[[], None]) -> None:
        """Makes the next generation of files, with these entries and their pixels only."""
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
            files.write(
                self.index, _lines(entries)
            )  # from here on, the new generation is the one that counts
        finally:
            self._remove_others()
        self._reset(entries)

    def _remove_others(self) -> int:
        """Removes the files of all generations but the newest whose index is there, and returns its number, or 0."""
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
    """The entries up to the first line that is none."""
    for line in lines:
        try:
            yield Entry(*json.loads(line))
        except (ValueError, TypeError):
            return


def _write(file: FileIO, data: bytes | memoryview, flush: bool = False) -> None:
    """Appends all of `data`. Unbuffered, so that what fails on a full disk fails here, and not once more on closing."""
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
