"""Our own model packages as a start: what a run's result holds, read without PyTorch.

`trainer/results/package.py` writes them.
"""

import functools
import gzip
import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

from trainer.common import files
from trainer.common.errors import UserError

MANIFEST = "package.json"
TENSORS = "model.safetensors"
ARCHIVE = "model.tar.gz"
SETTINGS = "config.yaml"  # of a run, beside the archive
FORMAT = 1  # of the manifest
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError)


def is_package(weights: str) -> bool:
    """Return whether a path names a package: an archive, its directory, or that of a run."""
    if weights.endswith((".tar.gz", ".tgz")):
        return True
    path = Path(weights)
    here = (path / file for file in (MANIFEST, ARCHIVE, SETTINGS))
    return path.is_dir() and (os.sep in weights or any(file.is_file() for file in here))


def manifest(weights: str) -> dict[str, Any]:
    """Return what a package says of itself.

    weights: the archive, a directory that holds the same files, or a run's directory, which holds
    the archive. Raise UserError, Unreadable.
    """
    place = _place(weights)
    status = files.patiently(place, place.stat)
    return _manifest(weights, place, status.st_mtime_ns, status.st_size)


def tensors(weights: str) -> bytes:
    """Return the float weights of a package as a safetensors file, held against its SHA-256.

    They are of the whole network, also where the package serves an int8 one. Raise as `manifest`.
    """
    data = _read(weights, _place(weights), TENSORS)
    if hashlib.sha256(data).hexdigest() != manifest(weights)["files"].get(TENSORS):
        raise UserError(f"model.weights={weights}: {TENSORS} was changed after it was packaged")
    return data


def _place(weights: str) -> Path:
    """Return the archive, or the directory with the manifest. Raise UserError."""
    path = Path(weights)
    if not path.is_dir():
        if not files.patiently(path, path.is_file):
            raise UserError(f"model.weights={weights}: there is no such file")
        return path
    if (path / MANIFEST).is_file():
        return path
    if (path / ARCHIVE).is_file():
        return path / ARCHIVE
    raise UserError(
        f"model.weights={weights}: a directory without a model package ({ARCHIVE}, which a run "
        "writes when it is complete); go on with that run first, or give a file of weights"
    )


@functools.lru_cache(maxsize=8)
def _manifest(weights: str, place: Path, changed: int, size: int) -> dict[str, Any]:
    """Return the manifest; `changed` and `size` tell a file from the one that was there before."""
    data = _read(weights, place, MANIFEST)
    try:
        said = json.loads(data)
        written = said.get("format")
        name, classes = said["config"]["model.name"], said["classes"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.weights={weights}: its {MANIFEST} is damaged") from error
    if written != FORMAT or not isinstance(name, str) or not isinstance(classes, list):
        raise UserError(
            f"model.weights={weights}: its {MANIFEST} has format {written!r}, this version reads "
            f"{FORMAT}; give the package of a run of this version"
        )
    assert isinstance(said, dict)
    return said


def _read(weights: str, place: Path, name: str) -> bytes:
    """Return a file of the package. Raise UserError, Unreadable."""
    if place.is_dir():
        return files.patiently(place / name, (place / name).read_bytes)

    def search() -> bytes | None:
        try:
            with tarfile.open(place, "r:gz") as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    if file is not None and member.name.removeprefix("./") == name:
                        return file.read()
        except DAMAGE as error:
            raise UserError(
                f"model.weights={weights} is damaged: not a whole gzipped tar archive ({error})"
            ) from error
        return None

    data = files.patiently(place, search)
    if data is None:
        raise UserError(f"model.weights={weights} holds no {name}: it is no model package of ours")
    return data
