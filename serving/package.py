"""Loads a model package, as `trainer/results/package.py` builds it, and proves it.

Every file must have its SHA-256, the network must fit the classes and the preprocessing, and the
golden images must give their recorded pixels exactly and their recorded logits within the package's
tolerance. That shows damage and train/serve skew; it does not show who built the package.
"""

import gzip
import hashlib
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray

from serving.backends import BACKENDS, Network, NetworkError, Scores
from trainer.common.errors import UserError, machine_fault
from trainer.images.decode import ImageError, Preprocessing, Room, prepare
from trainer.results.calibrate import Calibration

FORMAT = 1
MANIFEST = "package.json"
# What is recorded of the golden images besides their pixels, and what is said if it differs.
GOLDEN = {
    "logits": "its logits are off by",
    "distance": "its distances are off by",
    "probabilities": "its probabilities are off by",
}
# Bytes unpacked. An ONNX file ends at 2 GiB (protobuf's limit), and the weights lie there twice.
MAX_BYTES = 8 << 30


class PackageError(ValueError):
    """The package is damaged, incomplete, or does not reproduce: one line says which file."""


@dataclass(frozen=True)
class Package:
    """A package that has proven itself."""

    classes: tuple[str, ...]  # in the order of the logits
    preprocessing: Preprocessing
    metrics: dict[str, float]
    config: dict[str, Any]  # the trainer's settings by dotted key
    created: str  # UTC, ISO 8601
    revision: str | None  # of the trainer's git checkout
    digest: str  # SHA-256 of its manifest, which names those of its files
    golden: int  # how many golden images reproduced
    golden_scores: Scores  # what the network says of them here
    difference: float  # the largest of their logits from the recorded ones
    allowed: float  # the largest difference that would have passed
    network: Network  # takes pixels as `prepare` gives them
    calibration: Calibration  # how its logits become an answer

    def prepare(
        self, source: str | os.PathLike[str] | bytes | BinaryIO, room: Room | None = None
    ) -> NDArray[np.uint8]:
        """Return an image's path, bytes or open file as the network takes it.

        That is RGB, [size, size, 3]. room: of the pixels decoded at once. Raises ImageError.
        """
        return prepare(source, self.preprocessing, room)

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the logits [N, classes] of pixels [N, size, size, 3], from any thread."""
        return self.network(pixels).logits


def load_for_command(path: Path, threads: int | None = None, backend: str = "onnx") -> Package:
    """Return the package as `load` does. Raises UserError, which names the path."""
    try:
        return load(path, threads, backend)
    except PackageError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise UserError(machine_fault(error) or f"{path}: {error}") from error


def load(path: Path, threads: int | None = None, backend: str = "onnx") -> Package:
    """Return the package in a directory or a model.tar.gz, proven.

    threads: of the network on a CPU, one a core if not given. backend: a name of BACKENDS.
    Raises PackageError, and OSError where the machine is at fault.
    """
    if path.is_dir():
        return _prove(path, threads, backend)
    if not path.is_file():
        raise PackageError("there is no such file or directory")
    with tempfile.TemporaryDirectory(prefix="package-") as directory:
        _unpack(path, Path(directory))
        return _prove(Path(directory), threads, backend)


def _unpack(archive: Path, directory: Path) -> None:
    """Unpack files and folders, and nothing that could leave `directory` or fill the disk."""
    size = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                size += member.size
                _check_member(member, size)
                tar.extract(member, directory, filter="data")
    except PackageError:
        raise
    # ValueError: numbers in a forged header
    except (tarfile.TarError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PackageError(f"it is not a whole gzipped tar archive ({error})") from error


def _check_member(member: tarfile.TarInfo, size: int) -> None:
    """Raise PackageError for what may not be unpacked. size: bytes so far, with this member."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise PackageError(f"{member.name!r} would be unpacked outside the package's directory")
    if not (member.isreg() or member.isdir()):
        raise PackageError(
            f"{member.name!r} is a link or a device; a package holds files and folders only"
        )
    # tar's binary numbers have a sign, and a step backwards would be read for ever.
    if member.size < 0 or size > MAX_BYTES:
        raise PackageError(
            f"{member.name!r} brings what is unpacked to {size:,} bytes; "
            f"allowed: 0 to {MAX_BYTES:,}"
        )


def _prove(directory: Path, threads: int | None, backend: str) -> Package:
    manifest = _read_manifest(directory)
    _check_files(directory, manifest["files"])
    try:
        network = BACKENDS[backend](directory, manifest, threads)
    except NetworkError as error:
        raise PackageError(str(error)) from error
    preprocessing = Preprocessing(**manifest["preprocessing"])
    # Packages of old have none: softmax alone, and no sets.
    calibration = Calibration(**manifest.get("calibration", {}))
    scores, difference, allowed = _check_golden(
        directory, manifest, preprocessing, network, calibration
    )
    return Package(
        classes=tuple(manifest["classes"]),
        preprocessing=preprocessing,
        metrics=manifest["metrics"],
        config=manifest["config"],
        created=manifest["created"],
        revision=manifest["revision"],
        digest=manifest["sha256"],
        golden=len(manifest["golden"]),
        golden_scores=scores,
        difference=difference,
        allowed=allowed,
        network=network,
        calibration=calibration,
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise PackageError(
            f"{MANIFEST} is missing at the top level: this is no model package, "
            "or it was not written to its end"
        ) from error
    except ValueError as error:
        raise PackageError(f"{MANIFEST} is not JSON ({error})") from error
    written_as = None
    if isinstance(manifest, dict):
        written_as = manifest.get("format")
    if written_as != FORMAT:
        raise PackageError(
            f"{MANIFEST}: its format is {written_as!r}, and this version reads {FORMAT}; "
            "serve it with the version that built it"
        )
    digest = manifest.pop("sha256", None)
    if digest != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
        raise PackageError(f"{MANIFEST} was changed after it was built: its SHA-256 differs")
    assert isinstance(manifest, dict)
    return manifest | {"sha256": digest}


def _check_files(directory: Path, listed: dict[str, str]) -> None:
    """Raise PackageError unless each file has its SHA-256, and code/ holds no other."""
    for name, digest in listed.items():
        path = directory / name
        if not path.is_file():
            raise PackageError(f"{name} is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise PackageError(
                    f"{name} was changed after the package was built: its SHA-256 differs"
                )
    # Elsewhere nothing reads an unlisted file, and toolkits add their own (TorchServe its MAR-INF).
    # But code/ is on Python's path, where a file could take the place of a module; only the caches
    # that Python itself writes there may be new.
    for path in sorted((directory / "code").rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and path.parent.name != "__pycache__" and name not in listed:
            raise PackageError(
                f"{name} does not belong to the package: {MANIFEST} does not list it"
            )


def _check_golden(
    directory: Path,
    manifest: dict[str, Any],
    preprocessing: Preprocessing,
    network: Network,
    calibration: Calibration,
) -> tuple[Scores, float, float]:
    """Return the golden images' scores, how far their logits are off, and how far they may be.

    Raises PackageError where logits, distances or probabilities are farther from the recorded ones,
    or pixels differ at all.
    """
    names = manifest["golden"]
    with np.load(directory / "golden/expected.npz", allow_pickle=False) as expected:
        recorded = dict(expected)
    for name, golden in zip(names, recorded["pixels"], strict=True):
        try:
            prepared = prepare(directory / name, preprocessing)
        except (ImageError, OSError) as error:
            raise PackageError(
                f"{name} can't be read as a picture on this machine ({error})"
            ) from error
        _check_pixels(name, prepared, golden)
    scores = network(recorded["pixels"])
    given = scores._asdict() | {"probabilities": calibration.probabilities(scores.logits)}
    tolerance = manifest["tolerance"]
    differences: dict[str, tuple[float, float]] = {}
    for what, said in GOLDEN.items():
        if what not in recorded:  # by a package of old, or one without calibration
            continue
        size, scale = np.abs(recorded[what]).max(), 1.0
        if what == "probabilities":
            # They move less than the logits, and the more the lower the temperature.
            size, scale = np.abs(recorded["logits"]).max(), calibration.temperature
        allowed = float(tolerance["absolute"] + tolerance["relative"] * size) / scale
        if given[what] is None:
            raise PackageError(f"the network gives no {what}, and the package was built with it")
        off = _compare(names, said, given[what], recorded[what], allowed)
        differences[what] = off, allowed
    return scores, *differences["logits"]


def _compare(
    names: Sequence[str],
    said: str,
    computed: NDArray[np.floating[Any]],
    recorded: NDArray[np.floating[Any]],
    allowed: float,
) -> float:
    """Return how far computed values [N, ...] lie from the recorded ones.

    Raises PackageError, whose message begins with `said`, where it is more than allowed. names: of
    the N golden images.
    """
    differences = np.abs(computed - recorded).reshape(len(names), -1).max(axis=1)
    worst = int(differences.argmax())  # NaN counts as the largest
    if not differences[worst] <= allowed:
        raise PackageError(
            f"{names[worst]}: {said} {differences[worst]:.3g} from the recorded "
            f"ones, allowed: {allowed:.3g}; "
            "the network on this machine does not compute the network that was trained"
        )
    return float(differences[worst])


def _check_pixels(name: str, pixels: NDArray[np.uint8], recorded: NDArray[np.uint8]) -> None:
    different = np.abs(pixels.astype(int) - recorded)
    if different.any():
        raise PackageError(
            f"{name}: {np.count_nonzero(different)} of its {different.size} pixel values are off, "
            f"by up to {different.max()}; the preprocessing, or Pillow {PIL.__version__} on this "
            "machine, does not prepare pictures as the trainer did"
        )
