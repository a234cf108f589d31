"""Data sets known by name, written once as class folders.

So they take the very path of a user's own images.
"""

import contextlib
import errno
import glob
import http.client
import importlib.util
import os
import shutil
import socket
import urllib.error
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.common.console import log
from trainer.common.errors import UserError, install_command
from trainer.common.interrupt import Stop
from trainer.common.text import listed
from trainer.images import archive, identity, table
from trainer.images.folder import ImageFolder, find_splits, scan
from trainer.images.names import SPLIT_NAMES
from trainer.settings.config import Config
from trainer.settings.words import key_of

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion_mnist_mini.npz"


def find_images(config: Config, stop: Stop | None = None, words: Iterable[str] = ()) -> ImageFolder:
    """List the images, and tell how many there are and what of them or of `words` is not used.

    words: what was typed, as "key=value". See `list_images`.
    """
    images, unused = _listed(config, stop)
    if unused:
        log.warning(
            "not used: %s in %s; pictures are taken from train, valid (or val) and test, "
            "and from where data.valid=DIR and data.test=DIR say",
            listed(unused),
            config.data.root,
        )
    sizes = ", ".join(f"{len(split.paths)} {name}" for name, split in images.splits.items())
    log.info("pictures: %s; %d classes", sizes, len(images.classes))
    if not images.split_off and "data.valid_fraction" in map(key_of, words):
        log.warning(
            "data.valid_fraction=%s has no effect: valid has pictures of its own, and none is "
            "split off train",
            config.data.valid_fraction,
        )
    if "test" not in images.splits:
        log.warning(
            "there is no test folder: the final figures come from valid, which also chose "
            "the best epoch, so they are optimistic"
        )
    return images


def list_images(config: Config, stop: Stop | None = None) -> ImageFolder:
    """List the images; a named data set is first written as class folders.

    An archive in the place of a folder is unpacked into the cache. Raise UserError, Unreadable, and
    Interrupted where `stop` asks for it.
    """
    return _listed(config, stop)[0]


def _listed(config: Config, stop: Stop | None) -> tuple[ImageFolder, list[str]]:
    """Return the images, and the folders that hold others, which nobody uses."""
    data = config.data
    materialize(data.source, Path(data.root))
    cache, check = Path(config.platform.cache), (stop or Stop()).check
    root = _folder(data.root, cache, check)
    given = {name: getattr(data, name) for name in SPLIT_NAMES}
    if given["train"] is None and not Path(root).exists():
        raise UserError(
            f"data.root={root}: there is no such folder; "
            "give the one that holds train, valid and test (the last two may be missing)"
        )
    for split in ("valid", "test"):
        if given[split] is not None and not Path(given[split]).exists():
            raise UserError(
                f"data.{split}={given[split]}: there is no such folder; "
                "give another, or null for the one in data.root"
            )
    index = cache / identity.DIRECTORY
    if data.labels is not None and data.source == "folder":
        place = table_path(data.labels, root, given)
        return table.scan(place, root, data.valid_fraction, index), []
    given = {name: path and _folder(path, cache, check) for name, path in given.items()}
    directories, unused = find_splits(root, given)
    return scan(directories, data.valid_fraction, index), unused


def table_path(labels: str, root: str, given: Mapping[str, str | None]) -> Path:
    """Return where the table of labels lies: at its path, or at that in root.

    given: the folders of splits, of which there may be none. Raise UserError.
    """
    for split, path in given.items():
        if path is not None:
            raise UserError(
                f"data.labels={labels} with data.{split}={path}: the table says which pictures are "
                "of which split (column split); give one of the two"
            )
    for place in (Path(labels), Path(root, labels)):
        if place.is_file():
            return place
    if table.is_code(labels) and not labels.endswith(".py"):  # imported by its name
        return Path(labels)
    raise UserError(
        f"data.labels={labels}: there is no such file, nor in {root}; "
        "give a CSV file with the columns path, label and optionally split, or a Python file that "
        "defines pictures(root)"
    )


def _folder(path: str, cache: Path, check: Callable[[], None]) -> str:
    """Return the folder at a path, or that which the archive there holds."""
    if not Path(path).is_file():
        return path
    return str(archive.unpacked(Path(path), cache, check))


def materialize(source: str, root: Path) -> None:
    """Write the data set `source` to root/{train,valid,test}/CLASS/ unless root exists.

    "folder" is the user's own and written by nobody. root is there whole or not at all, also when
    the process is killed or when two write at once. Raise UserError where a download fails.
    """
    if source == "folder" or root.exists():
        return
    write = {
        "fashion_mnist": _write_fashion_mnist,
        "flowers102": _write_flowers102,
        "pets": _write_pets,
    }[source]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{error.filename}: not a folder, so data.root={root} can't be created; give "
            "another data.root=DIR"
        ) from error
    _sweep(root)
    partial = root.with_name(f".{root.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        write(partial)
        _rename(partial, root)
    except OSError as error:
        error.filename = error.filename or str(root)  # a full disk names no file
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_fashion_mnist(root: Path) -> None:
    """Write 3,000 images of Fashion-MNIST, which come with this package: see data/LICENSE."""
    with np.load(EMBEDDED, allow_pickle=False) as arrays:
        classes = arrays["classes"].tolist()
        for split in ("train", "valid", "test"):
            for name in classes:
                (root / split / name).mkdir(parents=True)
            for number, (pixels, label) in enumerate(
                zip(arrays[f"{split}_x"], arrays[f"{split}_y"], strict=True)
            ):
                Image.fromarray(pixels).save(root / split / classes[label] / f"{number:05d}.png")


def _write_flowers102(root: Path) -> None:
    if importlib.util.find_spec("scipy") is None:  # torchvision would find out after the download
        raise UserError(
            "data=flowers102 needs scipy, which reads its list of labels: "
            f"{install_command('flowers102')}"
        )
    from torchvision.datasets import Flowers102  # imported here: slow, and needed by few

    with _download("flowers102", root) as downloads:
        for split, theirs in {"train": "train", "valid": "val", "test": "test"}.items():
            flowers = Flowers102(downloads, theirs, download=True)
            _move(
                flowers._image_files, [f"c{label:03d}" for label in flowers._labels], root / split
            )


def _write_pets(root: Path) -> None:
    from torchvision.datasets import OxfordIIITPet  # imported here: slow, and needed by few

    with _download("pets", root) as downloads:
        for split, theirs in {"train": "trainval", "test": "test"}.items():
            pets = OxfordIIITPet(downloads, theirs, download=True)
            _move(pets._images, [pets.classes[label] for label in pets._labels], root / split)


@contextlib.contextmanager
def _download(source: str, root: Path) -> Iterator[Path]:
    """Give a folder for torchvision to download to; it is removed at the end."""
    downloads = root / ".downloads"
    try:
        yield downloads
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        RuntimeError,
    ) as error:  # RuntimeError: a wrong checksum
        reason = " ".join(str(error).split())
        raise UserError(
            f"data={source}: the download failed ({reason}); try again, or, where there is no "
            "network, get the pictures elsewhere as train/CLASS/*.jpg "
            "and give data=folder data.root=DIR"
        ) from error
    shutil.rmtree(downloads)


def _move(pictures: Iterable[Path], classes: Iterable[str], split: Path) -> None:
    """Move the image files themselves: saving them again would change their pixels."""
    for path, name in zip(pictures, classes, strict=True):
        (split / name).mkdir(parents=True, exist_ok=True)
        path.rename(split / name / path.name)


def _rename(partial: Path, root: Path) -> None:
    try:
        partial.rename(root)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process was faster. What it wrote is the same.


def _sweep(root: Path) -> None:
    """Remove what killed processes of this machine left behind."""
    for partial in root.parent.glob(f".{glob.escape(root.name)}.{socket.gethostname()}.*.partial"):
        process = int(partial.name.split(".")[-2])
        if process == os.getpid() or not _is_running(process):
            shutil.rmtree(partial, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
