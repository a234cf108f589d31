"""Packed pixels: every image decoded and shrunk once, then read from a file.

It is a memo of `decode.shrink`, so its pixels are those of the uncached path by construction;
filling it also finds the broken images. A store is the directory of one preprocessing, shared by
all runs and data sets. It holds `N.pixels`, to which images are appended, and `N.index`, a line
for each content: which file a path leads to is `identity.Digests`' to say. The index mentions only
pixels that are on the disk: after a kill or a power cut the next run goes on there.

Nothing in a store is believed. Each line and each image has its checksum, which is compared when
it is first used; what is damaged, cut off or gone is decoded anew.
"""

import hashlib
import json
import os
import shutil
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, get_type_hints

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from trainer.common import files, journal
from trainer.common.collector import resting
from trainer.common.console import log
from trainer.common.errors import Unreadable, UserError
from trainer.common.text import amount
from trainer.images import apart, bounds, decode, identity
from trainer.images.decode import MAX_ASPECT, ImageError, shrink
from trainer.images.folder import read

FORMAT = 2  # of a store's files; 1 knew images by path
# Images between two flushes to the disk: twice as many a kill may cost; about 70 MB at 256 pixels.
COMMIT_EVERY = 256
AHEAD = 16  # images in the making for each thread: a reserve for the time of a flush
SAMPLE = 32  # images decoded to estimate the size of all, where it is in doubt whether they fit


class TooLarge(UserError):
    """The packed pixels would not fit onto the disk, or into their limit."""


class Changed(Unreadable):
    """An image is no longer the one that the run began with: that one can't be read now."""


class Entry(NamedTuple):
    """What an image's content gives: a line of the index."""

    content: str  # SHA-256 of the file; empty where it isn't to be remembered
    path: str  # absolute, where it was seen
    reason: str | None = None  # why it can't be used, if so
    height: int = 0  # 0: its pixels aren't kept
    width: int = 0
    checksum: int = 0  # CRC-32 of the pixels
    offset: int = 0  # of the pixels

    @property
    def size(self) -> int:
        """Return the bytes of the pixels."""
        return self.height * self.width * 3


Examined = tuple[Entry, NDArray[np.uint8] | None]


class Packed:
    """The shrunk images, by path. broken: path to reason of those that can't be used.

    digests: path to SHA-256 of the others. kept: on the disk; else each is decoded when asked for.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        handle: int | None,
        shrink: Callable[[bytes], NDArray[np.uint8]],
    ) -> None:
        usable = {path: entry for path, entry in entries.items() if entry.reason is None}
        self.digests = {path: entry.content for path, entry in usable.items()}
        self.broken = {path: str(entries[path].reason) for path in entries.keys() - usable.keys()}
        self.kept = handle is not None and all(entry.size for entry in usable.values())
        self._entries, self._handle, self._shrink = usable, handle, shrink
        self._verified: set[str] = set()
        self._mends = False
        if handle is not None:
            weakref.finalize(self, os.close, handle)

    def __call__(self, path: str) -> NDArray[np.uint8]:
        """Return what `shrink` makes of the image: uint8 [H, W, 3], read-only.

        Raise ImageError for a broken one, Changed where it has to be read again and is another,
        and Unreadable.
        """
        if path in self.broken:
            raise ImageError(self.broken[path])
        entry = self._entries[path]
        if self._handle is None or not entry.size:
            return self._decoded(path, entry)
        pixels = self._stored(self._handle, entry)
        if pixels is None:
            pixels = self._decoded(path, entry)
            self._mend(self._handle, entry, pixels)
        return pixels

    def _stored(self, handle: int, entry: Entry) -> NDArray[np.uint8] | None:
        """Return the pixels as they are on the disk; None where they aren't as they were written.

        Read and not mapped: a mapped file that is cut off, or whose disk fails, ends the process.
        """
        try:
            data = os.pread(handle, entry.size, entry.offset)
        except OSError:
            return None
        if len(data) != entry.size:
            return None
        if entry.content not in self._verified:
            if zlib.crc32(data) != entry.checksum:
                return None
            self._verified.add(entry.content)
        return np.frombuffer(data, np.uint8).reshape(entry.height, entry.width, 3)

    def _decoded(self, path: str, entry: Entry) -> NDArray[np.uint8]:
        data, _ = files.patiently(path, lambda: read(path))
        if identity.of_bytes(data) != entry.content:
            raise Changed(
                f"{path}: the picture has changed since the run began; restore the original, "
                "or start a new run with another name=..."
            )
        pixels = files.patiently(path, lambda: self._shrink(data))
        pixels.flags.writeable = False
        return pixels

    def _mend(self, handle: int, entry: Entry, pixels: NDArray[np.uint8]) -> None:
        if not self._mends:
            log.warning("packed pixels are damaged: the pictures are decoded again")
        self._mends = True
        if zlib.crc32(pixels.data) == entry.checksum:
            with suppress(OSError):
                os.pwrite(handle, pixels.data, entry.offset)


@dataclass(frozen=True)
class PixelCache:
    """Where the shrunk images of one preprocessing are kept.

    root: holds the stores of all preprocessings. resize, interpolation: as in `Preprocessing`.
    max_bytes: limit of this store's pixels; None: none but the disk's. digests: the directory of
    `identity.Digests`; None: each image is read each time.
    """

    root: Path
    resize: int
    interpolation: str
    max_bytes: int | None = None
    digests: Path | None = None

    @property
    def directory(self) -> Path:
        """The store: whatever may change a pixel is part of its name."""
        facts = [FORMAT, decoding(), self.resize, self.interpolation]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return self.root / f"{self.resize}-{self.interpolation}-{digest[:16]}"

    def pack(
        self,
        paths: Sequence[str],
        workers: int,
        on_progress: Callable[[int, int], None],
        keep: bool = True,
    ) -> Packed:
        """Decode and shrink those of the images that the store lacks; return them all.

        workers: threads that decode; 0: the caller's own does. on_progress(done, total): called in
        the caller's own thread, also while another run packs here and this one waits. It may
        raise, to end the work early: what is packed so far stays. keep: False: the store remembers
        which images can be used, and their pixels are decoded whenever they are asked for. Raise
        TooLarge before anything is added, Unreadable for an image that can't be read now, and
        OSError naming the store if its disk fails.
        """
        step = _counter(on_progress, len(set(paths)))
        directory = self.directory
        directory.mkdir(parents=True, exist_ok=True)
        with files.locked(directory, step), _threads(workers) as in_order:
            store = _Store(directory, step)
            try:
                entries = self._examined(paths, store, in_order, step, keep)
                return Packed(entries, store.detach(), self._shrink)
            finally:
                store.close()

    def check(
        self, paths: Sequence[str], workers: int, on_progress: Callable[[int, int], None]
    ) -> Packed:
        """Return the images, with nothing kept on the disk: each is decoded when it is asked for.

        Parameters and errors are those of `pack`.
        """
        step = _counter(on_progress, len(set(paths)))
        with _threads(workers) as in_order:
            entries = self._examined(paths, _Nowhere(), in_order, step, keep=False)
        return Packed(entries, None, self._shrink)

    def _examined(
        self,
        paths: Sequence[str],
        store: "_Store | _Nowhere",
        in_order: "InOrder",
        step: "Step",
        keep: bool,
    ) -> dict[str, Entry]:
        """Return what each path leads to. What the store lacks is examined, and added to it."""
        with resting():
            digests = identity.Digests(self.digests, paths)
            entries = {path: store.find(digests.known(path), keep) for path in dict.fromkeys(paths)}
        unknown = [path for path, entry in entries.items() if entry is None]
        step(len(entries) - len(unknown))

        def examine(path: str) -> Examined:
            return files.patiently(path, partial(self._examine, path, store, digests, keep))

        if keep and unknown:
            self._check_room(store, unknown, partial(in_order, examine), step)
        try:
            for path, examined in zip(unknown, in_order(examine, unknown), strict=True):
                entries[path] = store.add(*examined)
                step(1)
        finally:
            store.commit()
            digests.save()
        known = {path: entry for path, entry in entries.items() if entry is not None}
        if unknown:
            store.tidy({entry.content for entry in known.values()}, step)
        return {path: store.find(entry.content, keep) or entry for path, entry in known.items()}

    def _examine(
        self, path: str, store: "_Store | _Nowhere", digests: identity.Digests, keep: bool
    ) -> Examined:
        """Return what lies at `path`, with its pixels where they are to be kept and new.

        No content: nothing to remember, next time it may be otherwise. Raise OSError and
        MemoryError.
        """
        before = digests.known(path)
        try:
            # The status is from before the read: pixels and hash are of the same bytes, and
            # whatever changes later is noticed next time.
            data, status = read(path)
        except ImageError as error:
            return Entry("", path, str(error)), None
        entry = Entry(digests.of_read(path, data, status, before), str(Path(path).absolute()))
        known = store.find(entry.content, keep)
        if known is not None:
            return known, None
        try:
            pixels = self._shrink(data)
        except ImageError as error:
            return entry._replace(reason=str(error)), None
        if not keep:
            return entry, None
        height, width = pixels.shape[:2]
        checksum = zlib.crc32(pixels.data)
        return entry._replace(height=height, width=width, checksum=checksum), pixels

    def _shrink(self, data: bytes) -> NDArray[np.uint8]:
        return shrink(data, self.resize, self.interpolation)

    def _check_room(
        self,
        store: "_Store | _Nowhere",
        paths: Sequence[str],
        examine: Callable[[Sequence[str]], Iterator[Examined]],
        step: "Step",
    ) -> None:
        """Raise TooLarge where so many more images do not fit; in doubt, some are decoded."""
        room = shutil.disk_usage(self.directory).free
        left = f"{amount(room)} are free"
        if self.max_bytes is not None and self.max_bytes - store.end < room:
            room = self.max_bytes - store.end
            used, allowed = amount(store.end), amount(self.max_bytes)
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
                f"{self.directory}: the packed pixels of {count} pictures need about "
                f"{amount(needed)}, and {left}; give data.cache=none, or platform.cache=DIR "
                f"on a larger disk, or delete what you no longer need in {self.root}"
            )


Step = Callable[..., None]  # step(more=0) counts so many images more as done


def _counter(on_progress: Callable[[int, int], None], total: int) -> Step:
    done = 0

    def step(more: int = 0) -> None:
        nonlocal done
        done += more
        on_progress(done, total)

    return step


# --- examining images ---

InOrder = Callable[[Callable[[str], Examined], Sequence[str]], Iterator[Examined]]


@contextmanager
def _threads(workers: int) -> Iterator[InOrder]:
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


def decoding() -> list[str]:
    """Return what pixels are a function of, besides an image and the settings.

    The code, and the libraries that decode.
    """
    code = [code_of(module) for module in (apart, bounds, decode)]
    optional = [f"{name} {version}" for name, version in decode.optional_decoders().items()]
    return [*code, PIL.__version__, str(features.version("libjpeg_turbo")), *optional]


def code_of(module: ModuleType) -> str:
    """Return the SHA-256 of a module's source."""
    return identity.of_bytes(Path(str(module.__file__)).read_bytes())


# --- the files ---


class _Nowhere:
    """Has the methods of a store, and keeps nothing."""

    end = 0

    def find(self, content: str | None, keep: bool) -> Entry | None:
        return None

    def add(self, entry: Entry, pixels: NDArray[np.uint8] | None) -> Entry:
        return entry

    def commit(self) -> None:
        pass

    def tidy(self, used: Container[str], step: Step) -> None:
        pass


class _Store:
    """A store's files, for the process that has it locked.

    contents: an entry of each content. end: of the pixels, in bytes. Other processes read on while
    files change here, and may mend what they read: bytes that were ever written are not written
    again with others. To drop some, the next generation of files is made without them. All files
    stay open: who deletes the directory takes nothing away from those who use it.
    """

    def __init__(self, directory: Path, step: Step) -> None:
        self.directory = directory
        self.contents: dict[str, Entry] = {}
        self._pending: list[Entry] = []
        # Beside the decoding, which would stand still meanwhile.
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._index = self._pixels = -1
        try:
            self._open(step)
        except BaseException:
            self.close()
            raise

    def _open(self, step: Step) -> None:
        files.sweep(self.directory)
        self._generation = self._remove_others()
        if self._generation == 0:
            self._generation = 1
            files.write(self._path("index"), b"")
        index = self._path("index").read_bytes()
        with resting():
            values, whole = journal.parse(index, *get_type_hints(Entry).values())
            entries = [Entry(*value) for value in values]
        if not whole:
            files.write(self._path("index"), journal.lines(entries))
        self._index = os.open(self._path("index"), os.O_WRONLY)
        self._pixels = os.open(self._path("pixels"), os.O_RDWR | os.O_CREAT, 0o666)
        self.end = os.fstat(self._pixels).st_size
        self.contents = {entry.content: entry for entry in entries}
        cut_off = any(entry.offset + entry.size > self.end for entry in entries)
        if cut_off:
            self._rewrite(entries, step)

    def _path(self, kind: str) -> Path:
        return self.directory / f"{self._generation}.{kind}"

    def find(self, content: str | None, keep: bool) -> Entry | None:
        """Return what is known of a content. keep: None where its pixels are missing."""
        entry = self.contents.get(content or "")
        if entry is not None and keep and not (entry.size or entry.reason):
            return None
        return entry

    def add(self, entry: Entry, pixels: NDArray[np.uint8] | None) -> Entry:
        """Remember what is new, with its pixels; return it as it is remembered."""
        if not entry.content:
            return entry
        # Also of a duplicate that was decoded at the same time.
        known = self.find(entry.content, keep=pixels is not None)
        if known is not None:
            return known
        if pixels is not None:
            entry = entry._replace(offset=self.end)
            files.write_at(self._pixels, pixels.data, self.end, self._path("pixels"))
            self.end += entry.size
        self.contents[entry.content] = entry
        self._pending.append(entry)
        if len(self._pending) == COMMIT_EVERY:
            self._begin_to_commit()
        return entry

    def commit(self) -> None:
        """Bring what was added to the disk. Raise OSError, also of what was begun before."""
        self._begin_to_commit()
        self._wait()

    def _begin_to_commit(self) -> None:
        self._wait()
        lines = journal.lines(self._pending)
        if lines:
            self._pending.clear()
            self._flushing = self._flusher.submit(self._flush, lines)

    def _wait(self) -> None:
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()

    def _flush(self, lines: bytes) -> None:
        """Bring the pixels to the disk, and their lines of the index after them."""
        files.write_at(self._pixels, b"", 0, self._path("pixels"), flush=True)
        end = os.fstat(self._index).st_size
        files.write_at(self._index, lines, end, self._path("index"), flush=True)

    def tidy(self, used: Container[str], step: Step) -> None:
        """Drop what no file has any more, once that is half of the pixels."""
        newest = {entry.path: entry for entry in self.contents.values()}
        live = [
            entry
            for entry in self.contents.values()
            if entry.content in used or (newest[entry.path] is entry and _exists(entry.path))
        ]
        size = sum(entry.size for entry in live)
        worth_it = 2 * size < self.end or 8 * len(live) < len(self.contents)
        with suppress(OSError):
            if worth_it and size < shutil.disk_usage(self.directory).free:
                self._rewrite(live, step)

    def detach(self) -> int:
        """Return the handle of the pixels, which is the caller's from now on."""
        handle, self._pixels = self._pixels, -1
        return handle

    def close(self) -> None:
        """Close the files that are still the store's."""
        self._flusher.shutdown()
        self._close_files()

    def _close_files(self) -> None:
        for handle in (self._index, self._pixels):
            if handle >= 0:
                os.close(handle)

    def _rewrite(self, entries: Sequence[Entry], step: Step) -> None:
        """Make the next generation of files, with these entries and their pixels only."""
        generation, kept, end = self._generation + 1, [], 0
        path = self.directory / f"{generation}.pixels"
        index = path.with_suffix(".index")
        pixels = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for entry in entries:
                data = os.pread(self._pixels, entry.size, entry.offset)
                if len(data) == entry.size:
                    kept.append(entry._replace(offset=end))
                    files.write_at(pixels, data, end, path)
                    end += entry.size
                step()
            files.write_at(pixels, b"", end, path, flush=True)
            # From here on, the new generation is the one that counts.
            files.write(index, journal.lines(kept))
            handle = os.open(index, os.O_WRONLY)
        except BaseException:
            os.close(pixels)
            self._remove_others()
            raise
        self._close_files()
        self._generation, self._index, self._pixels = generation, handle, pixels
        self._remove_others()
        self.contents, self.end = {entry.content: entry for entry in kept}, end

    def _remove_others(self) -> int:
        """Remove all generations but the newest that has an index; return its number, or 0."""
        indexes = [path for path in self.directory.glob("*.index") if path.stem.isdecimal()]
        newest = max((int(path.stem) for path in indexes), default=0)
        for path in [*indexes, *self.directory.glob("*.pixels")]:
            if path.stem != str(newest):
                path.unlink()
        return newest


def _exists(path: str) -> bool:
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # not for us to see
        return True
    return True
