"""A zip or tar of a folder in the place of the folder: unpacked once, below the cache."""

import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from trainer.common import files
from trainer.common.console import ProgressBar, log
from trainer.common.errors import MachineFault, UserError
from trainer.common.objects import parsed
from trainer.images import identity
from trainer.images.names import SPLITS, is_system

CHUNK = 1 << 20  # bytes
CONTENTS = ".contents.json"  # of an unpacked archive: each file's size
# Bytes that are unpacked, at most: pictures hardly shrink in an archive, blank ones a hundredfold.
MAX_RATIO = 100
ALLOWED = 1 << 28  # whatever the ratio
SPARE = 1 << 28  # left free on the disk

DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,  # numbers in a forged header
    NotImplementedError,  # a way to compress that Python does not know
)


@dataclass(frozen=True)
class Member:
    """A file or an empty folder of an archive. size: unpacked bytes. open: None of a folder."""

    name: str
    size: int
    open: Callable[[], IO[bytes]] | None


def unpacked(archive: Path, cache: Path, check: Callable[[], None]) -> Path:
    """Return the folder that a zip or tar archive holds, unpacked below `cache`.

    It is known by its content, unpacked by one process at a time, and there whole or not at all.
    Where all lies in one folder, that is it. check: called again and again; it may raise, to give
    up. Raise UserError for what is no archive, damaged, larger than the disk or than pictures can
    be, or would be unpacked elsewhere.
    """
    place = cache / "archives"
    place.mkdir(parents=True, exist_ok=True)
    target = place / _content(archive, cache, check)[:16]
    with files.locked(place, check):
        if not _is_whole(target):
            files.sweep(place)
            files.remove(target)
            partial = place / f"{files.TEMPORARY}{target.name}"
            log.info("unpacking %s to %s", archive, target)
            try:
                partial.mkdir()
                sizes = _unpack(archive, partial, check)
                files.write(partial / CONTENTS, json.dumps(sizes))
                os.sync()  # all at once: thousands of files, one by one, take minutes
                partial.rename(target)
                files.flush_directory(place)
            finally:
                files.remove(partial)
    return _innermost(target)


def _content(archive: Path, cache: Path, check: Callable[[], None]) -> str:
    """Return the SHA-256 of the archive, which is read again only where it looks changed."""
    path = str(archive)
    kept = identity.Digests(cache / identity.DIRECTORY, [path])
    content = kept.known(path)
    if content is None:
        status = archive.stat()
        content = _digest(archive, check)
        kept.note(path, status, content)
        kept.save()
    return content


def _digest(archive: Path, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    size = archive.stat().st_size
    with archive.open("rb") as file, ProgressBar(f"reading {archive} (MB)", size >> 20) as progress:
        while block := file.read(CHUNK):
            digest.update(block)
            progress.advance((file.tell() >> 20) - progress.done)
            check()
    return digest.hexdigest()


def _is_whole(target: Path) -> bool:
    """Return whether all that was unpacked is there."""
    try:
        sizes = parsed((target / CONTENTS).read_bytes())
        if sizes is None:
            return False
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def _innermost(folder: Path) -> Path:
    while True:
        inside = [path for path in folder.iterdir() if not is_system(path.name)]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name.casefold() in SPLITS:
            return folder
        folder = inside[0]


def _unpack(archive: Path, target: Path, check: Callable[[], None]) -> dict[str, int]:
    """Unpack all but what a system put there; return the files' sizes by name."""
    packed = archive.stat().st_size
    room = shutil.disk_usage(target).free - SPARE
    sizes: dict[str, int] = {}
    spelled: dict[str, str] = {}
    total = 0
    try:
        with (
            archive.open("rb") as file,
            ProgressBar(f"unpacking {archive} (MB)", packed >> 20) as progress,
        ):
            for member in _members(file):
                check()
                parts = _safe_parts(archive, member.name)
                total += member.size
                _check_size(archive, total, MAX_RATIO * packed + ALLOWED, room)
                if any(map(is_system, parts)) or not parts:
                    continue
                _check_spelling(target, parts, spelled)
                path = target.joinpath(*parts)
                if member.open is None:
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy, CHUNK)
                sizes["/".join(parts)] = path.stat().st_size
                progress.advance((file.tell() >> 20) - progress.done)
    except UserError as error:
        raise type(error)(f"{archive}: {error}") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        name = os.path.relpath(error.filename, target)
        raise UserError(f"{archive}: {name} is both a file and a folder; pack it again") from error
    except DAMAGED as error:
        raise UserError(_damaged(archive, error)) from error
    except OSError as error:
        if error.errno is None:  # of gzip and bz2
            raise UserError(_damaged(archive, error)) from error
        raise
    return sizes


def _damaged(archive: Path, error: Exception) -> str:
    reason = " ".join(str(error).split(":")[0].split())  # tarfile adds what each format says
    return (
        f"{archive}: neither a folder nor a whole zip or tar archive ({reason}); give a "
        "folder, or download or pack the archive again"
    )


def _safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    """Return the folders and the name of a member. Raise UserError where it leads elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{name!r} would be unpacked outside of its folder; pack it again")
    # As this machine's file system takes them: in some locales that is ASCII, and bytes.
    return tuple(os.fsdecode(part.encode(errors="surrogateescape")) for part in path.parts)


def _check_spelling(target: Path, parts: tuple[str, ...], spelled: dict[str, str]) -> None:
    """Raise UserError where the file system takes two names of the archive for one.

    Two classes, `Cat` and `cat`, would be one without a word (macOS, Windows, some network drives).
    spelled: the names until now, by themselves and folded.
    """
    for depth in range(1, len(parts) + 1):
        name = "/".join(parts[:depth])
        if name in spelled:
            continue
        first = spelled.setdefault(f"/{_folded(name)}", name)
        if first != name and _is_there(target / name):
            raise UserError(
                f"{first} and {name} are the same name to this file system, in "
                f"{target.parent}; rename one and pack it again, or give platform.cache=DIR "
                "on a disk that tells them apart"
            )
        spelled[name] = name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _check_size(archive: Path, total: int, allowed: int, room: int) -> None:
    if total > room:
        raise MachineFault(
            f"unpacked it takes at least {total / 1e9:.1f} GB, and the cache has "
            f"{max(room, 0) / 1e9:.1f} GB free; free some, or give platform.cache=DIR on a "
            "larger disk"
        )
    if total > allowed:
        raise UserError(
            f"unpacked it takes more than {allowed / 1e9:.1f} GB, far more than pictures "
            "packed into so few bytes do; unpack it yourself, and give the folder"
        )


# --- the two formats ---


def _members(file: IO[bytes]) -> Iterator[Member]:
    """Yield what an open archive holds. Raise UserError for links, devices and passwords."""
    start = file.read(4)
    file.seek(0)
    if start[:2] == b"PK":
        return _zip_members(file)
    return _tar_members(file)


def _zip_members(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = _zip_name(entry)
            mode = entry.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(_not_a_file(name))
            if entry.flag_bits & 1:
                raise UserError(f"{name} is encrypted; unpack it yourself, and give the folder")
            if entry.is_dir() or name.endswith("/"):
                yield Member(name, 0, None)
            else:
                yield Member(name, entry.file_size, partial(archive.open, entry))


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """Return a member's name, its folders separated by /.

    Where it isn't marked as UTF-8 it is UTF-8 all the same (macOS, Info-ZIP), or else code page 437
    by the standard.
    """
    name = entry.filename
    if not entry.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode()
        except UnicodeError:
            name = entry.filename
    return name.replace("\\", "/")  # of some programs on Windows


def _tar_members(file: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:*", encoding="utf-8") as archive:
        for entry in archive:
            if entry.isdir():
                yield Member(entry.name, 0, None)
            elif entry.isreg() and entry.size >= 0:
                yield Member(entry.name, entry.size, partial(_contents, archive, entry))
            else:
                raise UserError(_not_a_file(entry.name))


def _contents(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(entry)
    assert file is not None
    return file


def _not_a_file(name: str) -> str:
    return (
        f"{name} is a link or a device, which is not unpacked; pack what it leads to "
        "(tar --dereference, zip without -y)"
    )
