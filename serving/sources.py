"""The pictures that a command line names: files, folders, patterns, archives, a list, S3."""

import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from serving import fetch, s3
from trainer.common import files
from trainer.common.errors import UserError, needed_by
from trainer.common.paths import expanded
from trainer.images import archive, folder
from trainer.images.names import as_shown, as_text, counted, kind_of

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
S3 = "s3://"
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Source:
    """A picture, not read yet.

    name: unique, as the table shows it. inner: its path in the folder that the user named, else its
    file name. read: returns its bytes; raises ImageError, Unreadable and FetchError.
    """

    name: str
    inner: str
    read: Callable[[], bytes]


def find(words: Sequence[str], cache: Path) -> tuple[list[Source], str]:
    """Return the pictures that the words name, each once, and what was left out of folders.

    words: files (with any name), folders with all below them, patterns with * and **, zip and tar
    archives, s3://bucket/prefix, or - to read such words from standard input, one per line. cache:
    the directory to unpack archives in. Raise UserError for a word that names nothing.
    """
    sources: dict[str, Source] = {}
    left_out: list[str] = []
    for word in _lines(words):
        for source in _of_word(word, cache, left_out):
            sources.setdefault(source.name, source)
    if not sources:
        reason = "there is no picture"
        if left_out:
            reason += f"; left out: {counted(left_out)}"
        raise UserError(f"{' '.join(words)}: {reason}")
    return _with_unique_inners(sources.values()), counted(left_out)


def _lines(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word != STANDARD_INPUT:
            yield word
            continue
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")


def _of_word(word: str, cache: Path, left_out: list[str]) -> Iterator[Source]:
    if word.startswith(S3):
        yield from _in_s3(word)
        return
    path = Path(expanded(word))
    if path.is_dir():
        yield from _in_folder(path, path, left_out)
    elif path.is_file() and path.name.lower().endswith(ARCHIVES):
        inside = archive.unpacked(path, cache, lambda: None)
        yield from _in_folder(inside, path, left_out)
    elif path.exists():
        yield _file(path)
    elif glob.has_magic(word):
        yield from _matching(str(path), left_out)
    else:
        raise UserError(f"{as_shown(word)}: there is no such file or folder")


def on_disk(path: str, name: str, inner: str) -> Source:
    """Return the picture in a file. name, inner: as in `Source`."""
    return Source(name, inner, partial(_read, path))


def _file(path: Path) -> Source:
    return on_disk(str(path), _shown(path), as_shown(as_text(path.name)))


def _matching(pattern: str, left_out: list[str]) -> Iterator[Source]:
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (it takes absolute ones too)
    if not names:
        raise UserError(f"{pattern}: no file matches this pattern")
    for name in names:
        path = Path(name)
        if path.is_dir():
            if "**" not in pattern:  # else the pattern matches its files too
                yield from _in_folder(path, path, left_out)
        elif kind := kind_of(path.name):
            left_out.append(kind)
        else:
            yield _file(path)


def _in_folder(root: Path, shown: Path, left_out: list[str]) -> Iterator[Source]:
    """Yield the pictures below `root`, named as if they lay below `shown`."""
    for file in folder.below(str(root)):
        if file.kind:
            left_out.append(file.kind)
        else:
            inner = as_shown(file.name)
            yield on_disk(file.path, f"{_shown(shown)}/{inner}", inner)


def _shown(path: Path) -> str:
    return as_shown(as_text(str(path)))


def _read(path: str) -> bytes:
    return files.patiently(path, lambda: folder.read(path)[0])


def _in_s3(uri: str) -> Iterator[Source]:
    with needed_by(S3, "aws"):
        names = s3.listed(uri)
    if not names:
        raise UserError(f"{uri}: there is no such object, and none below it")
    for name in names:
        if len(names) == 1 or not kind_of(PurePosixPath(name).name):
            inner = name.removeprefix(uri.rstrip("/")).lstrip("/") or PurePosixPath(name).name
            yield Source(name, inner, partial(_fetched, name))


def _fetched(uri: str) -> bytes:
    return s3.fetch(uri, max_bytes=folder.MAX_FILE, reserve=fetch.ByteLimit(folder.MAX_FILE))


def _with_unique_inners(sources: Iterable[Source]) -> list[Source]:
    """Return the sources; where two have the same name in their folders, the second is numbered."""
    taken: set[str] = set()
    unique: list[Source] = []
    for source in sources:
        inner, number = source.inner, 1
        while inner in taken:
            number += 1
            path = PurePosixPath(source.inner)
            inner = str(path.with_name(f"{path.stem} ({number}){path.suffix}"))
        taken.add(inner)
        unique.append(replace(source, inner=inner))
    return unique
