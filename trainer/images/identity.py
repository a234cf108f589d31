"""What a picture, a data set and a weights file are: their content.

Not their name, their place or their time: moved or touched they stay the same, replaced in place
they are others. The run's identity, resuming, both caches, the package and the upload ask here.
"""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common import files, journal
from trainer.common.console import ProgressBar, log
from trainer.common.cpu import cores

if TYPE_CHECKING:
    from torch import nn

    from trainer.images.folder import ImageFolder

# File times advance with the kernel's timer, every 10 ms at the slowest: a file that has just
# changed may change again and look the same.
TICK = 20_000_000  # nanoseconds
DIRECTORY = "digests"  # below platform.cache
INDEX = "pictures.index"  # where the pictures of a run or sweep are noted, to name changed ones
SHOWN = 3  # changed files that a message names

# (split, class, SHA-256, path below the folder that holds all): a picture of a data set.
Sample = tuple[str, str, str, str]


# --- a picture ---


def of_bytes(data: bytes) -> str:
    """Return what a picture of these bytes is: their SHA-256 (hex)."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file. Raise Unreadable."""

    def digest() -> str:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return files.patiently(path, digest)


def signature(status: os.stat_result) -> list[int] | None:
    """Return what tells a file from a changed one, ctime included: copying tools set mtime back.

    Size, mtime_ns and ctime_ns. None where the file is so young that it may change without its
    times changing.
    """
    if time.time_ns() - status.st_ctime_ns < TICK:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class Digests:
    """The SHA-256 of files, by path. Those that look unchanged aren't read again.

    They are kept in a file below `directory`, one for each data set; None: nowhere. It is a memo:
    where it can't be read or written, that costs time.
    """

    def __init__(self, directory: Path | None, paths: Iterable[str]) -> None:
        self._absolute = {path: str(Path(path).absolute()) for path in paths}
        self._index: Path | None = None
        lines: list[Any] = []
        self._whole = True
        if directory is not None and self._absolute:
            place = os.fsencode(os.path.commonpath(self._absolute.values()))
            self._index = directory / f"{of_bytes(place)[:16]}.index"
            lines, self._whole = _read(self._index)
        self._lines = len(lines)
        self._kept = {path: (status, digest) for path, status, digest in lines}
        self._new: dict[str, tuple[list[int], str]] = {}

    def known(self, path: str) -> str | None:
        """Return the digest of a file that is the one noted, as far as its status tells."""
        absolute = self._absolute[path]
        status, digest = self._new.get(absolute) or self._kept.get(absolute) or (None, None)
        if status is None:
            return None
        try:
            if status != signature(Path(path).stat()):
                return None
        except OSError:
            return None
        return digest

    def note(self, path: str, status: os.stat_result, digest: str) -> None:
        """Remember the digest of a file whose status, before it was read, was this."""
        looks = signature(status)
        if looks is not None:
            self._new[self._absolute[path]] = (looks, digest)

    def of_read(self, path: str, data: bytes, status: os.stat_result, before: str | None) -> str:
        """Return the digest of a file that was read, and remember it.

        Where it looks as it was noted both before and after it was read, it isn't computed once
        more. data, status: of the read. before: what was `known` before it.
        """
        if before is not None and self.known(path) == before:
            return before
        digest = of_bytes(data)
        self.note(path, status, digest)
        return digest

    def save(self) -> None:
        """Write what is new down. Another process that does the same now goes first."""
        new = self._new.copy()  # threads that end with an interrupted run may still note more
        known = self._kept | new
        used = [path for path in self._absolute.values() if path in known]
        anew = not self._whole or self._lines + len(new) > 8 * len(used)
        if self._index is None or not (new or anew):
            return
        try:
            self._index.parent.mkdir(parents=True, exist_ok=True)
            with files.locked(self._index.parent) as mine:
                if mine and anew:
                    files.write(self._index, _lines(used, known))
                elif mine:
                    with self._index.open("ab") as file:
                        file.write(_lines(new, known))
        except OSError as error:
            log.info(
                "%s: can't be written (%s): the next run reads the pictures again",
                self._index,
                error.strerror,
            )


def _read(index: Path) -> tuple[list[Any], bool]:
    try:
        return journal.parse(index.read_bytes(), str, list, str)
    except FileNotFoundError:
        return [], True
    except OSError:
        return [], False


def _lines(paths: Iterable[str], known: Mapping[str, tuple[list[int], str]]) -> bytes:
    return journal.lines((path, *known[path]) for path in paths)


def digests(paths: Sequence[str], directory: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 (hex) of each file, by path.

    directory: of `Digests`; None: each is read. Raise Unreadable.
    """
    kept = Digests(directory, paths)

    def digest(path: str) -> str:
        known = kept.known(path)
        if known is None:
            status = files.patiently(path, Path(path).stat)
            known = of_file(path)
            kept.note(path, status, known)
        return known

    with (
        ThreadPoolExecutor(cores(), thread_name_prefix="digest") as pool,
        ProgressBar("reading pictures", len(paths)) as bar,
    ):
        result = {}
        for path, content in zip(paths, pool.map(digest, paths), strict=True):
            result[path] = content
            bar.advance()
    kept.save()
    return result


# --- a data set ---


def samples(images: "ImageFolder") -> list[Sample]:
    """Return the pictures of a data set, without those that are left out.

    A picture whose digest `images` doesn't have is read. Raise Unreadable.
    """
    splits = [*images.splits.items(), *images.dropped.items()]
    paths = [path for _, split in splits for path in split.paths]
    unknown = [path for path in dict.fromkeys(paths) if path not in images.digests]
    content = {**images.digests, **digests(unknown)}
    root = os.path.commonpath([Path(path).absolute() for path in paths])
    return [
        (name, images.classes[label], content[path], os.path.relpath(path, root))
        for name, split in splits
        for path, label in zip(split.paths, split.labels, strict=True)
    ]


def of_samples(chosen: Iterable[Sample]) -> str:
    """Return what a data set is: SHA-256 (hex) of each picture's split, class and content.

    Neither names nor order of its files are part of it.
    """
    whole = hashlib.sha256()
    for split, name, content, _ in sorted(chosen, key=lambda sample: sample[:3]):
        whole.update(os.fsencode(f"{content} {split}/{name}\0"))
    return whole.hexdigest()


def of_images(images: "ImageFolder") -> str:
    """Return what a data set is: see `samples`, `of_samples`."""
    return of_samples(samples(images))


def changes(then: Iterable[Sample], now: Iterable[Sample]) -> str:
    """Return what differs between two data sets, in words that name the first files."""
    gone, new = differences(then, now)
    replaced = {sample[3] for sample in gone} & {sample[3] for sample in new}
    kinds = {
        "changed": sorted(replaced),
        "missing": sorted({sample[3] for sample in gone} - replaced),
        "new": sorted({sample[3] for sample in new} - replaced),
    }
    return "; ".join(
        f"{len(paths)} {kind}: {', '.join(paths[:SHOWN])}{', ...' if paths[SHOWN:] else ''}"
        for kind, paths in kinds.items()
        if paths
    )


def differences(then: Iterable[Sample], now: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the pictures of the first data set alone, and those of the second alone."""
    before, after = list(then), list(now)
    return _without(before, after), _without(after, before)


def note(path: Path, chosen: Iterable[Sample]) -> None:
    """Write down which pictures a data set holds, to name those that change later."""
    lines = journal.lines(chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        files.remove(path)
    before = None
    with suppress(OSError):  # what can't be read is written anew
        before = path.read_bytes()
    if before != lines:
        files.write(path, lines)


def noted(path: Path) -> list[Sample] | None:
    """Return the pictures that were noted; None where they weren't, or not all can be read."""
    try:
        lines, whole = journal.parse(path.read_bytes(), str, str, str, str)
    except OSError:
        return None
    if not whole:
        return None
    return [(split, name, content, place) for split, name, content, place in lines]


def _without(some: Iterable[Sample], others: Iterable[Sample]) -> list[Sample]:
    """Return those of `some` whose split, class and content `others` don't have, as often."""
    left = Counter(sample[:3] for sample in others)
    rest = []
    for sample in some:
        if left[sample[:3]]:
            left[sample[:3]] -= 1
        else:
            rest.append(sample)
    return rest


# --- weights ---


def of_weights(network: "nn.Module", name: str, versions: Mapping[str, str]) -> dict[str, str]:
    """Return what the weights of a network are.

    Its tensors, its architecture, and the versions of the libraries that built it: equal tensors
    give other features where a padding or an epsilon differs. name: of the architecture.
    """
    # imported here: whoever asks about pictures alone needs no PyTorch.
    import torch

    tensors = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        tensors.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        tensors.update(content.numpy().data)
    built = [f"{library} {version}" for library, version in sorted(versions.items())]
    return {
        "weights.tensors": tensors.hexdigest(),
        "weights.architecture": f"{name} {of_bytes(structure(network).encode())[:16]}",
        "weights.versions": ", ".join(built) or "none",
    }


def structure(network: "nn.Module") -> str:
    """Return the layers of a network, as text."""
    # Some layers show a function of theirs, with its address.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(network))
