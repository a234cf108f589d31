"""An image folder: train/ valid/ test/, in each a folder for every class.

Which images they hold, and which of them can't be used.
"""

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.common import files
from trainer.common.collector import resting
from trainer.common.errors import UserError
from trainer.common.text import listed
from trainer.images import identity
from trainer.images.decode import MAX_PIXELS, ImageError, Preprocessing, center_crop, shrink
from trainer.images.names import (
    LOOSE,
    OF_SYSTEM,
    SPLIT_NAMES,
    SPLITS,
    alike,
    as_text,
    class_name,
    counted,
    is_system,
    kind_of,
    picture_suffixes,
)

# Bytes: the largest uncompressed image (RGBA of 16 bits) and its header; no longer file is read.
MAX_FILE = 8 * MAX_PIXELS + 2**20
# Where a link may lead.
NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
LAYOUT = "expected: a folder for each class, with its pictures in it, as in train/beagle/1.jpg"


@dataclass(frozen=True)
class File:
    """A file of a split.

    label: its class; -1: none. name: relative to the split's folder, as `as_text` gives it.
    reason: why it can't be used, if so. kind: where it is no image, of what kind it is.
    """

    label: int
    name: str
    path: str
    reason: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Split:
    """Some images and their classes.

    paths: by class, then by name. labels: int64 [N], each one's place in `ImageFolder.classes`.
    """

    paths: tuple[str, ...]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ImageFolder:
    """A data set of images.

    classes: train's folder names, sorted as text ("0", "1", "10", "2"). splits: "train", "valid"
    and, where there is one, "test". broken: (path, reason) of each picture that can't be used.
    left_out: (path, kind) of what else lies there: by its name or place, it is no picture. digests:
    the SHA-256 of images, by path: of all, once those that can't be used are left out. split_off:
    whether valid is a part of train, for want of a folder or rows of its own. dropped: by split,
    usable images that the run doesn't take: data.leaks. They are part of what the data set is.
    """

    classes: tuple[str, ...]
    splits: dict[str, Split]
    broken: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    split_off: bool = False
    dropped: Mapping[str, Split] = field(default_factory=dict)

    def count(self, split: str) -> int:
        """Return how many images a split has."""
        return len(self.splits[split].paths)


def find_splits(root: str, given: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """Return the folder of each split, and root's other folders that hold images, used by nobody.

    given: the folder of a split that is not to be looked for. A split that root has not gets
    root/NAME all the same. Raise UserError where root has two folders for one split.
    """
    with _readable():
        folders: list[str] = []
        if Path(root).is_dir():
            folders = _class_folders(root)
        directories = {}
        for split, names in SPLIT_NAMES.items():
            named = [name for name in folders if name.casefold() in names]
            if len(named) > 1 and not given[split]:
                raise UserError(
                    f"{root} has two folders for {split}, {' and '.join(named)}: "
                    f"remove one, or give {shlex.quote(f'data.{split}={root}/{named[0]}')}"
                )
            directories[split] = given[split] or str(Path(root, *(named or [split])))
        used = {os.path.realpath(path) for path in directories.values()}
        if given["train"]:  # root's other folders may be its classes
            return directories, []
        others = [
            name
            for name in folders
            if os.path.realpath(Path(root) / name) not in used and name.casefold() not in SPLITS
        ]
        return directories, [name for name in others if _holds_pictures(Path(root), name)]


def scan(
    directories: Mapping[str, str], valid_fraction: float, index: Path | None = None
) -> ImageFolder:
    """List the images, without decoding them.

    What is hidden, put there by a system, or not named like an image is left out. directories: the
    folders of "train", "valid" and "test"; the last two need not exist. valid_fraction: the share
    of each class that becomes valid, where there is no such folder. index: the directory of
    `identity.Digests`, where such a split finds what it knows of files. Raise UserError for a
    folder that can't be trained on, and Unreadable.
    """
    with _readable(), resting():
        classes = _classes(directories["train"])
        held = {
            name: _files(name, path, classes)
            for name, path in directories.items()
            if name == "train" or _exists(path)
        }
        return assemble(classes, held, directories, valid_fraction, index)


def assemble(
    classes: tuple[str, ...],
    held: Mapping[str, list[File]],
    places: Mapping[str, str],
    valid_fraction: float,
    index: Path | None = None,
) -> ImageFolder:
    """Return the data set of these files, by split; without a "valid", it is split off "train".

    places: where each split comes from, for messages. index: as in `scan`. Raise UserError where
    one has no images.
    """
    _check_classes(places["train"], classes, held["train"])
    left_out = sorted((file.path, file.kind) for name in held for file in held[name] if file.kind)
    images = {name: [file for file in held[name] if not file.kind] for name in held}
    digests: dict[str, str] = {}
    if "valid" not in images:
        listed = [file.path for name in images for file in images[name] if not file.reason]
        digests = identity.digests(listed, index)
        images["train"], images["valid"] = _split(images["train"], digests, valid_fraction)
    images = {name: images[name] for name in ("train", "valid", "test") if name in images}
    broken = tuple(
        (file.path, file.reason) for name in images for file in images[name] if file.reason
    )
    usable = {name: [file for file in images[name] if not file.reason] for name in images}
    _check_filled(places, held, usable)
    splits = {
        name: Split(
            tuple(file.path for file in usable[name]),
            np.array([file.label for file in usable[name]], np.int64),
        )
        for name in usable
    }
    return ImageFolder(classes, splits, broken, tuple(left_out), digests, "valid" not in held)


def below(root: str) -> list[File]:
    """Return all files in a folder and its folders, images or not, by name. Raise Unreadable."""
    with _readable():
        return sorted(_walk(-1, Path(root), ""), key=lambda file: file.name)


def by_class(directory: str) -> dict[str, list[File]]:
    """Return the files of each class folder in a directory, by name; what lies in none under "".

    Raise Unreadable, and UserError for a class that can't be written everywhere.
    """
    with _readable():
        root = Path(directory)
        found = {
            name: sorted(
                (file for each in beside for file in _walk(-1, root, each)),
                key=lambda file: file.name,
            )
            for name, beside in _by_class(directory).items()
        }
        found[""] = _in_no_class(directory)
        return found


def read(path: str) -> tuple[bytes, os.stat_result]:
    """Return the bytes of an image's file, all from one read, and its status before that.

    Raise ImageError for one that is too long, and OSError.
    """
    with Path(path).open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size > MAX_FILE:
            raise ImageError(f"the file has {status.st_size:,} bytes; allowed: {MAX_FILE:,}")
        return file.read(), status


def read_shrunk(path: str, resize: int, interpolation: str) -> NDArray[np.uint8]:
    """Return the image as `decode.shrink` makes it. Raise ImageError and Unreadable."""
    return files.patiently(path, lambda: shrink(read(path)[0], resize, interpolation))


def read_prepared(path: str, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the image as `decode.prepare` makes it. Raise ImageError and Unreadable."""
    small = read_shrunk(path, preprocessing.resize, preprocessing.interpolation)
    return center_crop(small, preprocessing.size)


def quarantine(
    folder: ImageFolder,
    check: Callable[[str], None],
    workers: int,
    max_broken: float,
    on_progress: Callable[[int, int], None],
) -> ImageFolder:
    """Return the folder without the images that `check(path)` refuses by an ImageError.

    They move to `broken`. workers: threads that call `check`; 0: the caller's own does. max_broken:
    the largest share of all files that may be broken. on_progress(done, total): called in the
    caller's own thread; it may raise, to end the work early. Raise UserError where more are broken,
    or where a class has no image left to train on.
    """
    paths = list(dict.fromkeys(path for split in folder.splits.values() for path in split.paths))

    def reason(path: str) -> str | None:
        try:
            check(path)
        except ImageError as error:
            return str(error)
        return None

    reasons: list[str | None] = []
    threads = max(workers, 1)
    # Images between two calls of on_progress: so many that threads seldom wait for the last one.
    window = 16 * threads
    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        apply: Callable[..., Iterator[str | None]] = pool.map
        if workers == 0:
            apply = map
        for start in range(0, len(paths), window):
            reasons += apply(reason, paths[start : start + window])
            on_progress(len(reasons), len(paths))
    refused = {path: why for path, why in zip(paths, reasons, strict=True) if why is not None}
    broken = folder.broken + tuple(refused.items())
    total = len(paths) + len(folder.broken)
    if len(broken) > max_broken * total:
        raise UserError(
            f"{len(broken)} of {total} pictures can't be used, more than "
            f"data.max_broken={max_broken:g} allows: {_listed(broken)}; fix or remove them, "
            "or allow more"
        )
    splits = {name: _without(split, refused) for name, split in folder.splits.items()}
    for label, name in enumerate(folder.classes):
        if label not in splits["train"].labels:
            train = folder.splits["train"]
            lost = [
                (path, refused[path])
                for path, other in zip(train.paths, train.labels, strict=True)
                if other == label
            ]
            raise UserError(
                f"class {name}: none of its training pictures can be used: {_listed(lost)}; "
                "fix them or add others"
            )
    for name, split in splits.items():
        if not split.paths:
            raise UserError(
                f"data.{name}: none of its pictures can be used: {_listed(broken)}; fix them "
                "or add others"
            )
    return replace(folder, splits=splits, broken=broken)


def _without(split: Split, refused: Mapping[str, str]) -> Split:
    keep = [path not in refused for path in split.paths]
    return Split(tuple(path for path in split.paths if path not in refused), split.labels[keep])


def _listed(broken: Iterable[tuple[str, str]]) -> str:
    return listed(f"{path} ({reason})" for path, reason in broken)


# --- finding the files ---


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: permission denied; give this user read access to the folder, "
            "or run as a user who has it"
        ) from error


def _classes(train: str) -> tuple[str, ...]:
    """Return the class list: train's folders."""
    path = Path(train)
    if not _exists(path):
        beside: list[str] = []
        if path.parent.is_dir():
            beside = [
                name
                for name in _class_folders(str(path.parent))
                if name.casefold() not in SPLITS and _holds_pictures(path.parent, name)
            ]
        if beside:
            raise UserError(
                f"{train}: there is no such folder, but {path.parent} itself has class folders "
                f"({listed(beside)}): give {shlex.quote(f'data.train={path.parent}')}, "
                f"or move them into {train}"
            )
        raise UserError(
            f"{train}: there is no such folder; data.root must hold train, valid and test "
            f"(the last two may be missing); {LAYOUT}"
        )
    if not path.is_dir():
        raise UserError(f"{train}: not a folder; {LAYOUT}")
    classes = list(_by_class(train))
    if len(classes) < 2:
        what = "no class folder"
        if classes:
            what = f"only one class folder, {classes[0]}"
        raise UserError(f"{train}: there is {what}; training needs at least two; {LAYOUT}")
    return tuple(classes)


def _files(split: str, directory: str, classes: tuple[str, ...]) -> list[File]:
    """Return the files of a split, by class, then by name."""
    if not Path(directory).is_dir():
        raise UserError(
            f"{directory}: data.{split} is not a folder; "
            "expected: a folder for each class, with its pictures in it"
        )
    folders = _by_class(directory)
    foreign = [_compared(name, classes) for name in folders if name not in classes]
    if foreign:
        raise UserError(
            f"{directory}: train has no class {listed(foreign)}; "
            "add such pictures to train too, or remove them here"
        )
    root = Path(directory).resolve()
    above = frozenset(map(_identity, (root, *root.parents)))
    files = [
        file
        for name, beside in folders.items()
        for folder in beside
        for file in _walk(classes.index(name), Path(directory), folder, above)
    ]
    files += _in_no_class(directory)
    return sorted(files, key=lambda file: (file.label, file.name))


def _in_no_class(directory: str) -> list[File]:
    return [
        File(-1, as_text(entry.name), entry.path, kind=_loose(entry.name))
        for entry in _entries(Path(directory))
        if is_system(entry.name) or not _is_folder(entry)
    ]


def _compared(name: str, classes: Iterable[str]) -> str:
    other = alike(name, classes)
    if other is None:
        return name
    return f"{name} (but {other}, which is spelt differently)"


def _loose(name: str) -> str:
    if is_system(name):
        return OF_SYSTEM
    return LOOSE


def _class_folders(directory: str) -> list[str]:
    return sorted(
        entry.name
        for entry in _entries(Path(directory))
        if not is_system(entry.name) and _is_folder(entry)
    )


def _by_class(directory: str) -> dict[str, list[str]]:
    """Return the class folders, by the class that they are of, sorted."""
    folders: dict[str, list[str]] = {}
    for name in _class_folders(directory):
        folders.setdefault(class_name(as_text(name), directory), []).append(name)
    return dict(sorted(folders.items()))


def _holds_pictures(root: Path, name: str) -> bool:
    return any(not file.kind for file in _walk(0, root, name))


def _walk(
    label: int, root: Path, name: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[File]:
    """Yield the files below root/name.

    Links are followed, but not to a folder that they lie in: one of `above`. What a system put
    there is not looked into.
    """
    here = _identity(root / name)
    if here in above:
        return
    for entry in _entries(root / name):
        inner = f"{name}/{entry.name}".removeprefix("/")
        if not is_system(entry.name) and _is_folder(entry):
            yield from _walk(label, root, inner, above | {here})
        else:
            yield _file(label, as_text(inner), entry)


def _identity(directory: Path) -> tuple[int, int]:
    status = files.patiently(directory, directory.stat)
    return status.st_dev, status.st_ino


def _file(label: int, name: str, entry: os.DirEntry[str]) -> File:
    kind = kind_of(entry.name)
    if kind:
        return File(label, name, entry.path, kind=kind)
    try:
        status = entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in NOWHERE:
            return File(label, name, entry.path, (error.strerror or str(error)).lower())
        status = files.patiently(entry.path, entry.stat)
    # Opening a FIFO would wait for ever, and a device may do anything: neither is ever opened.
    reason = None
    if not stat.S_ISREG(status.st_mode):
        reason = "not a regular file"
    return File(label, name, entry.path, reason)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    def held() -> list[os.DirEntry[str]]:
        with os.scandir(directory) as entries:
            return list(entries)

    return files.patiently(directory, held)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in NOWHERE:  # a link to itself, say
            return False
        return files.patiently(entry.path, entry.is_dir)


def _exists(path: str | Path) -> bool:
    def exists() -> bool:
        try:
            Path(path).stat()
        except OSError as error:
            if error.errno in NOWHERE:
                return False
            raise
        return True

    return files.patiently(path, exists)


# --- the split of train, where there is no valid ---


def _split(
    files: list[File], digests: Mapping[str, str], valid_fraction: float
) -> tuple[list[File], list[File]]:
    """Return (train, valid).

    Of each class, the images with the smallest SHA-256 of their bytes become valid, so the choice
    is the same on every machine and under any file name, and equal images stay together. A class of
    two or more different images is on both sides.
    """
    contents: dict[int, set[str]] = {}
    for file in files:
        if not file.reason:
            contents.setdefault(file.label, set()).add(digests[file.path])
    chosen = {label: _smallest(held, valid_fraction) for label, held in contents.items()}
    train, valid = [], []
    for file in files:
        if not file.reason and digests[file.path] in chosen[file.label]:
            valid.append(file)
        else:
            train.append(file)
    return train, valid


def _smallest(digests: set[str], fraction: float) -> set[str]:
    count = min(max(round(fraction * len(digests)), 1), len(digests) - 1)
    return set(sorted(digests)[:count])


def _check_classes(place: str, classes: tuple[str, ...], train: Iterable[File]) -> None:
    """Raise UserError where a class has no image to train on."""
    held: dict[int, list[File]] = {}
    for file in train:
        held.setdefault(file.label, []).append(file)
    for label, name in enumerate(classes):
        of_class = held.get(label, [])
        if not any(not file.kind and not file.reason for file in of_class):
            raise UserError(
                f"{place}: no picture in the class folder {name}{_instead(of_class)}; "
                f"add some ({', '.join(sorted(picture_suffixes()))}), or remove it"
            )


def _check_filled(
    places: Mapping[str, str],
    held: Mapping[str, list[File]],
    usable: Mapping[str, list[File]],
) -> None:
    for name, pictures in usable.items():
        if not pictures and name in held:
            raise UserError(
                f"{places[name]}: no picture in data.{name}{_instead(held[name])}; "
                "add some, or remove the folder"
            )
        if not pictures:
            raise UserError(
                f"{places['train']}: no class has two different pictures, "
                "so none can become valid; add pictures, or give data.valid"
            )


def _instead(files: Iterable[File]) -> str:
    """Return what there is in the place of images, for a message."""
    kinds = [file.kind or str(file.reason) for file in files]
    if not kinds:
        return ""
    return f" (it holds {counted(kinds)})"
