"""Files of weights: which a folder holds, and what the note beside a file says.

Imports no torch and reads no tensor, so it is quick.
"""

import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common import files, model_package
from trainer.common.errors import UserError
from trainer.settings import config as settings

# In order of preference, where a name has several: .safetensors can't hold code.
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
TIMM = "timm/"
NOTE = ".json"  # the suffix of the note beside a file

# Keys of a note, each with the setting of the same meaning, whose limits hold.
LIMITS = {
    "mean": "model.mean",
    "std": "model.std",
    "size": "data.size",
    "resize": "data.resize",
    "interpolation": "data.interpolation",
}
TEXTS = ("licence", "source", "name")
KEYS = (*LIMITS, "crop", *TEXTS)


def is_file(weights: str) -> bool:
    """Return whether model.weights names a file, and not weights that a library downloads.

    Our own packages and run directories count as files.
    """
    return (
        os.sep in weights
        or Path(weights).suffix in SUFFIXES
        or Path(weights).is_file()
        or model_package.is_package(weights)
    )


# --- the note beside a file ---


@dataclass(frozen=True)
class Note:
    """What NAME.json beside a file of weights says; None where it doesn't say."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    resize: int | None = None
    crop: float | None = None  # size / resize
    interpolation: str | None = None
    licence: str | None = None
    source: str | None = None
    name: str | None = None  # of the network, as model.name has it


def note_of(weights: str | Path) -> Note:
    """Return what the note beside a file of weights says.

    Raise UserError for an unknown key or a value that is not allowed; Unreadable.
    """
    path = Path(weights).with_suffix(NOTE)
    if Path(weights).is_dir() or not path.is_file():
        return Note()
    try:
        said = json.loads(files.patiently(path, path.read_bytes))
    except ValueError as error:
        raise UserError(f"{path}: it is not JSON ({error})") from error
    if not isinstance(said, dict):
        raise UserError(f"{path}: it holds no keys with values; allowed: {', '.join(KEYS)}")
    for key, value in said.items():
        _check(path, key, value)
    if "crop" in said and "resize" in said:
        raise UserError(f"{path}: crop and resize mean the same; allowed: one of them")
    size, resize = said.get("size"), said.get("resize")
    if size is not None and resize is not None and resize < size:
        raise UserError(f"{path}: resize={resize} is not allowed; allowed: at least size={size}")
    for key in ("mean", "std"):
        if key in said:
            said[key] = tuple(map(float, said[key]))
    return Note(**said)


def _check(path: Path, key: str, value: Any) -> None:
    """Raise UserError for an unknown key of a note, or a value that is not allowed."""
    if key not in KEYS:
        raise UserError(f"{path}: {key} is not a known key; allowed: {', '.join(KEYS)}")
    numbers = list(value) if isinstance(value, list) else [value]
    is_number = all(type(number) in (int, float) for number in numbers)
    wrong = f"{path}: {key}={json.dumps(value)} is not allowed; allowed: "
    if key in ("mean", "std") and not (isinstance(value, list) and is_number):
        raise UserError(f"{wrong}a list of three numbers")
    if key in ("size", "resize") and type(value) is not int:
        raise UserError(f"{wrong}a whole number of pixels")
    if key == "crop" and not (type(value) in (int, float) and 0 < value <= 1):
        raise UserError(f"{wrong}size / resize, above 0 and at most 1")
    if key in (*TEXTS, "interpolation") and not (
        isinstance(value, str) and value.strip() and value.isprintable()
    ):
        raise UserError(f"{wrong}a line of text")
    if key in LIMITS:
        try:
            settings.check(key, value, settings.schema()[LIMITS[key]].metadata)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


# --- a folder of them ---


@functools.cache
def known_names() -> frozenset[str]:
    """Return the names of all networks that the installed libraries have, as model.name has them.

    timm's with and without the tags of their weights. They are read from the libraries' source:
    imports would take seconds.
    """
    names = {settings.TOY}
    for library, prefix in (("torchvision", ""), ("timm", TIMM)):
        found = importlib.util.find_spec(library)
        if found is None or found.origin is None:
            continue
        modules = Path(found.origin).parent.joinpath("models").glob("*.py")
        text = "\n".join(path.read_text(encoding="utf-8") for path in modules)
        registered = re.findall(r"^@register_model\b.*\n(?:[@) ].*\n)*def (\w+)", text, re.M)
        tagged = re.findall(r"^ +['\"](\w+)\.(\w[\w.]*)['\"]:", text, re.M)
        names |= {prefix + name for name in registered}
        names |= {f"{prefix}{name}.{tag}" for name, tag in tagged if name in registered}
    return frozenset(names)


def is_known(name: str) -> bool:
    """Return whether a network of this name exists.

    Without timm, any name that begins with timm/ counts: building the network says what is missing.
    """
    unknown = name.startswith(TIMM) and importlib.util.find_spec("timm") is None
    return unknown or name in known_names()


def architecture(name: str) -> str:
    """Return a network's name without the tag of its weights, which timm's may have."""
    if name.startswith(TIMM):
        return name.split(".")[0]
    return name


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and the network that it is for."""

    name: str  # as model.name has it; timm's with the tag, where the file says it
    path: Path
    exact: bool  # False: the file's name only begins with the network's name


def candidates(weights_dir: str) -> list[WeightsFile]:
    """Return the files of a folder whose name or note says which network they are for.

    By the network's name, exact ones first. Raise UserError for a missing folder or a wrong note.
    """
    folder = Path(weights_dir)
    if not files.patiently(folder, folder.is_dir):
        raise UserError(f"model.weights_dir={weights_dir}: there is no such folder")
    paths = files.patiently(folder, lambda: sorted(folder.iterdir()))
    found = [_candidate(path) for path in paths if path.suffix in SUFFIXES]
    return sorted(filter(None, found), key=_rank)


def _rank(each: WeightsFile) -> tuple[str, bool, int, str]:
    return each.name, not each.exact, SUFFIXES.index(each.path.suffix), each.path.name


def _candidate(path: Path) -> WeightsFile | None:
    """Return the network that a file is for, None where neither its note nor its name says."""
    said = note_of(path).name
    if said is not None:
        if not is_known(said):
            raise UserError(
                f"{path.with_suffix(NOTE)}: name={said} is not a network; allowed: what "
                "model.name takes"
            )
        return WeightsFile(said, path, exact=True)
    return named(path)


def _stem(path: Path) -> str:
    """Return what a file's name says, in the words of model.name."""
    return path.stem.replace("--", "/", 1)


def named(path: Path) -> WeightsFile | None:
    """Return the network that a file is for by its name, None where the name doesn't say.

    torchvision's own files (resnet18-f37072fd.pth) are exact.
    """
    stem = _stem(path)
    if is_known(stem):
        return WeightsFile(stem, path, exact=True)
    beginnings = [stem[: match.start()] for match in re.finditer(r"[_.-]", stem)]
    for name in reversed(beginnings):  # the longest: vgg11_bn is not vgg11
        if name in known_names():
            return WeightsFile(name, path, bool(re.fullmatch(r"-[0-9a-f]{8}", stem[len(name) :])))
    return None


def suits(candidate: WeightsFile, name: str) -> bool:
    """Return whether a file is for the network `name`; either may leave out timm's tag."""
    if architecture(candidate.name) != architecture(name):
        return False
    return name in (candidate.name, _stem(candidate.path)) or architecture(name) in (
        name,
        candidate.name,
    )


def looked_for(name: str) -> str:
    """Return in words the file names that a folder is searched for."""
    stems = dict.fromkeys([name, architecture(name)])
    shown = " or ".join(stem.replace("/", "--") for stem in stems)
    return f"{shown} with {', '.join(SUFFIXES)}"


def find(name: str, weights_dir: str) -> list[WeightsFile]:
    """Return a folder's files for a network, the likeliest first. Raise as `candidates`."""
    fitting = [each for each in candidates(weights_dir) if suits(each, name)]
    return sorted(fitting, key=lambda each: rank(each, name))


def rank(candidate: WeightsFile, name: str) -> tuple[bool, ...]:
    """Return a sort key for files that may be for the network `name`; the least is the likeliest.

    A file with the network's exact name comes before those whose names only begin with it.
    """
    return _stem(candidate.path) != name, not candidate.exact, candidate.name != name
