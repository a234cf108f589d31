"""A model package's manifest: read, and checked against its schema, before the package is used.

`trainer/results/package.py` writes it. Code that uses a manifest that passed need not check it
again.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.images.decode import FILTERS

FORMAT = 1
MANIFEST = "package.json"
MAX_BYTES = 32 << 20  # of the manifest; one with 20,000 classes has 1 MB
MAX_SIDE = 16_384  # pixels of the network's input, as in training
MODEL, EXPECTED = "model.onnx", "golden/expected.npz"


class PackageError(ValueError):
    """The package is damaged, incomplete, or does not reproduce. One line names the file."""


def read(directory: Path) -> dict[str, Any]:
    """Return the manifest of the package in a directory. Raises PackageError."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PackageError(f"{MANIFEST} has more than {MAX_BYTES:,} bytes")
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PackageError(
            f"{MANIFEST} is missing at the top level: this is no model package, "
            "or it was not written to its end"
        ) from error
    except IsADirectoryError as error:
        raise PackageError(f"{MANIFEST} is a folder") from error
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{MANIFEST} is not JSON ({error})") from error
    written_as = None
    if isinstance(manifest, dict):
        written_as = manifest.get("format")
    if type(written_as) is not int or written_as != FORMAT:
        raise PackageError(
            f"{MANIFEST}: its format is {str(written_as)[:20]!r}, and this version reads {FORMAT}; "
            "serve it with the version that built it"
        )
    assert isinstance(manifest, dict)
    digest = manifest.pop("sha256", None)
    if digest != _digest(manifest):
        raise PackageError(f"{MANIFEST} was changed after it was built: its SHA-256 differs")
    check(manifest)
    return manifest | {"sha256": digest}


def _digest(manifest: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{MANIFEST} is nested too deep, or holds no numbers") from error


def check(manifest: dict[str, Any]) -> None:
    """Raise PackageError where a key is missing, or its value doesn't match the schema."""
    for key, (is_right, right) in SCHEMA.items():
        if key not in manifest:
            if key in OPTIONAL:
                continue
            raise PackageError(f"{MANIFEST}: {key} is missing; it must be {right}")
        if not is_right(manifest[key]):
            raise PackageError(f"{MANIFEST}: {key} must be {right}")
    listed = manifest["files"]
    for name in (MODEL, EXPECTED, *manifest["golden"]):
        if name not in listed:
            raise PackageError(f"{MANIFEST}: files does not list {name}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, least: float = -math.inf) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value) and value >= least
    except OverflowError:  # a whole number too large for a float
        return False


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(type(each) in (int, float) for each in value.values())


def _is_classes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_preprocessing(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"resize", "size", "interpolation"}:
        return False
    resize, size, interpolation = value["resize"], value["size"], value["interpolation"]
    return (
        _is_whole(resize, 1, MAX_SIDE)
        and _is_whole(size, 1, resize)
        and _is_text(interpolation)
        and interpolation in FILTERS
    )


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("model.name"))


def _is_calibration(value: Any) -> bool:
    known = {"temperature", "pictures", "least_probability", "farthest"}
    if not isinstance(value, dict) or not value.keys() <= known:
        return False
    temperature, least = value.get("temperature", 1.0), value.get("least_probability")
    farthest = value.get("farthest")
    return (
        _is_number(temperature, 1e-6)
        and _is_whole(value.get("pictures", 0), 0, 1 << 40)
        and (least is None or (_is_number(least, 0) and least <= 1))
        and (farthest is None or _is_number(farthest, 0))
    )


def _is_tolerance(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"absolute", "relative"}:
        return False
    return all(_is_number(each, 0) for each in value.values())


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_name(name) and _is_text(digest) and len(digest) == 64 for name, digest in value.items()
    )


def _is_golden(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_name, value))


def _is_name(value: Any) -> bool:
    """Return whether a file's name stays in the package, and on one line of a message."""
    return (
        _is_text(value)
        and value.isprintable()
        and "\\" not in value
        and not {"", ".", ".."} & {*value.split("/")}
    )


SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "created": (_is_text, "a text"),
    "classes": (_is_classes, "a list of names"),
    "preprocessing": (
        _is_preprocessing,
        f"whole numbers, size <= resize <= {MAX_SIDE}, and interpolation, one of "
        f"{', '.join(FILTERS)}",
    ),
    "metrics": (_is_numbers, "numbers by name"),
    "config": (_is_config, "settings by name, model.name among them"),
    "revision": (lambda value: value is None or _is_text(value), "a text or null"),
    "tolerance": (_is_tolerance, "two numbers, absolute and relative"),
    "calibration": (_is_calibration, "the numbers that trainer/results/calibrate.py fits"),
    "golden": (_is_golden, "a list of files' names"),
    "files": (_is_files, "SHA-256 by file's name"),
}
OPTIONAL = {"calibration"}  # older packages have none: their answers are softmax, without sets
