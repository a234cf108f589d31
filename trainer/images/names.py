"""What names say: which files are pictures, what a system put there, what a class is called."""

import importlib.util
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import PurePath

from trainer.common.errors import UserError, install_command
from trainer.common.text import listed

# What the folder of a split may be called, in any case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
SPLITS = frozenset(name for names in SPLIT_NAMES.values() for name in names)
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
)
AVIF = frozenset({".avif", ".avifs"})  # of Pillow 11.3 and later
HEIC = frozenset({".heic", ".heif", ".hif", ".heics", ".heifs"})  # of pillow-heif

# Folders and files that systems put beside people's own (in any case): Synology's thumbnails and
# bin, QNAP's, Windows's, macOS's, Linux's, those of NetApp, Picasa, chkdsk and Python.
SYSTEM = frozenset(
    {
        "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",
        "$recycle.bin", "system volume information", "found.000",
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini",
        "__macosx", "icon\r", "network trash folder", "temporary items",
        "lost+found", "~snapshot", "picasa.ini", "__pycache__",
    }
)  # fmt: skip

# Kinds of what is left out, beside the extensions.
OF_SYSTEM = "hidden, or made by an operating system"
LOOSE = "loose (in no class folder)"
NO_EXTENSION = "without extension"
UNLISTED = "not in the table of labels"
KINDS = 8  # of them that one line counts
EXTENSION = re.compile(r"\.[a-z0-9_~+-]{1,12}")


@cache
def picture_suffixes() -> frozenset[str]:
    """Return what the names of the pictures end in that can be read here, in lower case."""
    suffixes = SUFFIXES
    if importlib.util.find_spec("PIL._avif"):
        suffixes |= AVIF
    if importlib.util.find_spec("pillow_heif"):
        suffixes |= HEIC
    return suffixes


def suffix_of(name: str) -> str:
    """Return the extension in lower case, ".jpg" say; "" where there is none."""
    return PurePath(name).suffix.lower()


def is_system(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or put there by a system."""
    return name.startswith(".") or name.casefold() in SYSTEM


def kind_of(name: str) -> str:
    """Return of which kind a file is that is left out for its name; "" for a picture."""
    if is_system(name):
        return OF_SYSTEM
    suffix = suffix_of(name)
    if suffix in picture_suffixes():
        return ""
    if EXTENSION.fullmatch(suffix):
        return suffix
    return NO_EXTENSION  # or what stands behind the last point in a sentence


def counted(kinds: Iterable[str]) -> str:
    """Return how many there are of each kind, and what would read them, in one line.

    "37 .heic (install the extra heic: make setup EXTRA=heic), 3 without extension", say.
    """
    counts = Counter(kinds).most_common()
    return listed((f"{count} {kind}{_remedy(kind)}" for kind, count in counts), KINDS)


def _remedy(kind: str) -> str:
    if kind in HEIC:
        return f" (install the extra heic: {install_command('heic')})"
    if kind in AVIF:
        return " (install Pillow 11.3 or newer)"
    return ""


def as_text(name: str) -> str:
    """Return a file's name as all machines call it: its bytes as UTF-8, in normal form C.

    Neither the locale changes it nor the machine that wrote it: macOS may write e and its accent as
    two characters. What is no UTF-8 becomes lone surrogates.
    """
    return unicodedata.normalize("NFC", os.fsencode(name).decode(errors="surrogateescape"))


def as_shown(text: str) -> str:
    r"""Return a name for people: its bytes that are no UTF-8 as \xe4."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def class_name(name: str, where: str) -> str:
    """Return the name of a class as it is shown, packaged and compared: in normal form C.

    name: of a folder, as `as_text` gives it, or of a table. where: what holds it, for the message.
    Raise UserError for one that can't be written everywhere: in a package, a report, a terminal.
    """
    text = unicodedata.normalize("NFC", name)
    if as_shown(text) != text:
        raise UserError(
            f"{where}: the class {as_shown(text)} is not named in UTF-8, so no package can hold "
            "its name (an archive unpacked on another system?); rename it"
        )
    if not text.strip() or any(unicodedata.category(character) == "Cc" for character in text):
        raise UserError(
            f"{where}: the class {text!r} has control characters in its name, or only spaces; "
            "rename it"
        )
    return text


def alike(name: str, names: Iterable[str]) -> str | None:
    """Return which of the names differs from `name` only in case, spaces or the way of writing."""
    wanted = _folded(name)
    return next((other for other in names if _folded(other) == wanted), None)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
