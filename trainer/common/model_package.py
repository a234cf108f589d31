"""Read weights from our own model packages, without PyTorch.

`trainer/results/package.py` writes them. For a run without one, read its newest checkpoint's best
weights (`trainer/training/checkpoint.py`).
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
from trainer.common.paths import ARCHIVE

MANIFEST = "package.json"
TENSORS = "model.safetensors"
SETTINGS = "config.yaml"  # of a run, beside the archive
FORMAT = 1  # of the manifest
# A checkpoint's files: the state, and the best weights so far (absent before the first evaluation).
STATE = ("state.json", "tensors.safetensors")
BEST = ("best.json", "best.safetensors")
TENSOR = "tensor:"  # prefix of a JSON string that stands for a tensor
# The same for a tensor kept as [N, H, W, C], its order in memory: reordering would take several
# times as long as the copy.
CHANNELS_LAST = "channels_last:"
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError)


def is_package(weights: str) -> bool:
    """Return whether a path names a package: an archive, its directory, or that of a run."""
    if weights.endswith((".tar.gz", ".tgz")):
        return True
    path = Path(weights)
    here = (path / file for file in (MANIFEST, ARCHIVE, SETTINGS))
    return path.is_dir() and (os.sep in weights or any(file.is_file() for file in here))


def manifest(weights: str) -> dict[str, Any]:
    """Return a package's manifest.

    weights: the archive, a directory that holds the same files, or a run's directory, which holds
    the archive. Raise UserError, Unreadable.
    """
    place = _place(weights)
    status = files.patiently(place, place.stat)
    return _manifest(weights, place, status.st_mtime_ns, status.st_size)


def tensors(weights: str) -> bytes:
    """Return the float weights of a package as a safetensors file, checked by its SHA-256.

    They are the whole network's, even if the package serves an int8 one. Raise as `manifest`.
    """
    place = _place(weights)
    name = BEST[1] if _is_checkpoint(place) else TENSORS
    data = _read(weights, place, name)
    if hashlib.sha256(data).hexdigest() != manifest(weights)["files"].get(name):
        raise UserError(f"model.weights={weights}: {name} was changed after it was written")
    return data


def network(weights: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the network's state dict from the loaded result of `tensors`, of any library.

    Raise as `manifest`.
    """
    place = _place(weights)
    if not _is_checkpoint(place):
        return arrays
    state: dict[str, Any] = join(json.loads(_read(weights, place, BEST[0])), arrays)["network"]
    return state


def join(node: Any, arrays: dict[str, Any]) -> Any:
    """Return a checkpoint's nested state with its tensors in their places."""
    if isinstance(node, str) and node.startswith(TENSOR):
        return arrays[node.removeprefix(TENSOR)]
    if isinstance(node, str) and node.startswith(CHANNELS_LAST):
        kept = arrays[node.removeprefix(CHANNELS_LAST)]
        return kept.swapaxes(2, 3).swapaxes(1, 2)  # PyTorch's tensors and NumPy's arrays have it
    if isinstance(node, dict):
        return {key: join(value, arrays) for key, value in node.items()}
    if isinstance(node, list):
        return [join(value, arrays) for value in node]
    return node


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
    steps = [path, *_newest_first(path), *_newest_first(path / "checkpoints")]
    best = next(filter(_is_checkpoint, steps), None)
    if best is None:
        raise UserError(
            f"model.weights={weights}: a directory without a model package ({ARCHIVE}, which "
            "a run writes at its end) or checkpoints; finish that run first, or give a file "
            "of weights"
        )
    return best


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), reverse=True)


def _is_checkpoint(place: Path) -> bool:
    """Return whether a directory is a checkpoint with best weights."""
    return place.is_dir() and (place / BEST[0]).is_file()


@functools.lru_cache(maxsize=8)
def _manifest(weights: str, place: Path, changed: int, size: int) -> dict[str, Any]:
    """Return the manifest; `changed` and `size` (for the cache) identify the file."""
    if _is_checkpoint(place):
        return _of_checkpoint(weights, place)
    data = _read(weights, place, MANIFEST)
    try:
        said = json.loads(data)
        written = said.get("format")
        name, classes = said["config"]["model.name"], said["classes"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.weights={weights}: its {MANIFEST} is damaged") from error
    if written != FORMAT or not isinstance(name, str) or not isinstance(classes, list):
        raise UserError(
            f"model.weights={weights}: its {MANIFEST} has format {written!r}, this version "
            f"reads {FORMAT}; give a package that this version wrote"
        )
    assert isinstance(said, dict)
    return said


def _of_checkpoint(weights: str, place: Path) -> dict[str, Any]:
    """Return what the manifest of a package from this checkpoint would say."""
    try:
        facts = json.loads(_read(weights, place, STATE[0]))["facts"]
        listed = json.loads(_read(weights, place, "manifest.json"))["files"]
        settings = facts["identity"]
        source = "from scratch" if settings.get("model.weights", "") is None else None
        return {
            "classes": facts["classes"],
            "config": settings,
            "preprocessing": {
                key: settings[f"data.{key}"] for key in ("resize", "size", "interpolation")
            },
            "weights": {"source": source, "licence": None},
            "files": {name: entry["sha256"] for name, entry in listed.items()},
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.weights={weights}: {place} is damaged") from error


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
        raise UserError(
            f"model.weights={weights} holds no {name}: it is not a Packhorse model package"
        )
    return data
