"""Loads a model package that `trainer/results/package.py` built, and verifies it.

Every file must have its SHA-256, the network must fit the classes and the preprocessing, and the
golden images must give their recorded pixels exactly and their recorded logits within the package's
tolerance. That finds damage and train/serve skew. The signature shows who built the package
(`serving/signature.py`); it is checked where a key is given.
"""

import errno
import gzip
import hashlib
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import source_from_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray

from serving import manifest as manifests
from serving import signature
from serving.backends import BACKENDS, Network, NetworkError, Scores
from serving.manifest import EXPECTED, MANIFEST, MODEL, PackageError
from trainer.common.errors import UserError, machine_fault
from trainer.images.decode import ImageError, Preprocessing, Room, prepare
from trainer.results.calibrate import Calibration

# What is recorded of the golden images besides their pixels, and the message where it differs.
GOLDEN = {
    "logits": "its logits are off by",
    "distance": "its distances are off by",
    "probabilities": "its probabilities are off by",
}
# Bytes unpacked. An ONNX file has at most 2 GiB (protobuf's limit), and a package has the weights
# twice.
MAX_BYTES = 8 << 30
MAX_MEMBERS = 10_000  # of an archive; a package has fifty
BESIDE = {MANIFEST, signature.SIGNATURE}  # files that the manifest doesn't list
MAX_EXAMPLE = 1 << 20  # bytes of a golden image that is kept in memory
MAX_EXPECTED = 1 << 30  # bytes of EXPECTED, unpacked
# The system's errors for a name that can't be unpacked.
NO_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL}


@dataclass(frozen=True)
class Package:
    """A verified package."""

    classes: tuple[str, ...]  # in the order of the logits
    preprocessing: Preprocessing
    metrics: dict[str, float]
    config: dict[str, Any]  # the trainer's settings by dotted key
    created: str  # UTC, ISO 8601
    revision: str | None  # of the trainer's git checkout
    digest: str  # SHA-256 of its manifest, which names those of its files
    golden: int  # how many golden images reproduced
    golden_scores: Scores  # their scores on this machine
    difference: float  # the largest difference of their logits from the recorded ones
    allowed: float  # the largest difference that would have passed
    network: Network  # takes pixels as `prepare` returns them
    calibration: Calibration  # turns logits into an answer
    examples: tuple[tuple[str, bytes], ...] = ()  # name and bytes of the smaller golden images

    def prepare(
        self, source: str | os.PathLike[str] | bytes | BinaryIO, room: Room | None = None
    ) -> NDArray[np.uint8]:
        """Return an image as the network takes it: RGB, [size, size, 3].

        source: a path, bytes or an open file. room: for its decoded pixels. Raises ImageError.
        """
        return prepare(source, self.preprocessing, room)

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the logits [N, classes] of pixels [N, size, size, 3]. Safe from any thread."""
        return self.network(pixels).logits


def load_for_command(
    path: Path, threads: int | None = None, backend: str = "onnx", signed_by: str = ""
) -> Package:
    """Return the package as `load` does. Raises UserError, which names the path."""
    try:
        return load(path, threads, backend, signed_by)
    except PackageError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise UserError(machine_fault(error) or f"{path}: {error}") from error


def load(
    path: Path, threads: int | None = None, backend: str = "onnx", signed_by: str = ""
) -> Package:
    """Return the package in a directory or a model.tar.gz, verified.

    threads: of the network on a CPU; None: one per core. backend: a name of BACKENDS. signed_by:
    the public key that must have signed it (`signature.public_key`); "": no check. Raises
    PackageError, UserError for a text that is no key, and OSError where the machine is at fault.
    """
    if path.is_dir():
        _check_origin(path, signed_by, whole=False)
        return _prove(path, threads, backend)
    if not path.is_file():
        raise PackageError("there is no such file or directory")
    with tempfile.TemporaryDirectory(prefix="package-") as directory:
        _unpack(path, Path(directory))
        _check_origin(Path(directory), signed_by, whole=True)
        return _prove(Path(directory), threads, backend)


def _unpack(archive: Path, directory: Path) -> None:
    """Unpack files and folders. Refuse what could be outside `directory`, or fill the disk."""
    size = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for number, member in enumerate(tar):
                size += member.size
                if number == MAX_MEMBERS:
                    raise PackageError(f"it holds more than {MAX_MEMBERS:,} files")
                _check_member(member, size)
                tar.extract(member, directory, filter="data")
    except PackageError:
        raise
    # ValueError: numbers in a forged header; RecursionError: thousands of heads in a row
    except (tarfile.TarError, ValueError, EOFError, zlib.error, RecursionError) as error:
        raise PackageError(f"it is not a whole gzipped tar archive ({_line(error)})") from error
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise PackageError(f"it is not a whole gzipped tar archive ({_line(error)})") from error
        if error.errno in NO_NAME:
            raise PackageError(f"a file of it can't be unpacked ({_line(error)})") from error
        raise


def _line(error: Exception) -> str:
    """Return an exception's message in one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_member(member: tarfile.TarInfo, size: int) -> None:
    """Raise PackageError for a member that may not be unpacked. size: bytes so far, with it."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise PackageError(f"{member.name!r} would be unpacked outside the package's directory")
    if not (member.isreg() or member.isdir()):
        raise PackageError(
            f"{member.name!r} is a link or a device; a package holds files and folders only"
        )
    # tar's binary numbers have a sign: with a negative size the reader would go back, for ever.
    if member.size < 0 or size > MAX_BYTES:
        raise PackageError(
            f"{member.name!r} brings the unpacked size to {size:,} bytes; "
            f"allowed: 0 to {MAX_BYTES:,}"
        )


def _check_origin(directory: Path, signed_by: str, whole: bool) -> None:
    """Raise PackageError unless a package has the files that it was built from, signed by the key.

    signed_by: as in `load`. whole: whether other files are an error.
    """
    listed = manifests.read(directory)["files"]
    _check_files(directory, listed, whole)
    if signed_by:
        signature.check(directory, listed, signed_by)


def _prove(directory: Path, threads: int | None, backend: str) -> Package:
    """Return the package in a directory whose files are checked. Raise PackageError."""
    manifest = manifests.read(directory)
    try:
        network = BACKENDS[backend](directory, manifest, threads)
    except NetworkError as error:
        raise PackageError(str(error)) from error
    preprocessing = Preprocessing(**manifest["preprocessing"])
    # Older packages have none: their answers are softmax, without sets.
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
        examples=_examples(directory, manifest["golden"]),
    )


def _examples(directory: Path, names: Sequence[str]) -> tuple[tuple[str, bytes], ...]:
    """Return the golden images that are small enough to keep in memory, as examples to try."""
    paths = (directory / name for name in names)
    return tuple(
        (path.name, path.read_bytes()) for path in paths if path.stat().st_size <= MAX_EXAMPLE
    )


def _check_files(directory: Path, listed: dict[str, str], whole: bool) -> None:
    """Raise PackageError unless each file has its SHA-256, and there is no other file.

    whole: True for an unpacked archive, which holds only what was built. In a directory, toolkits
    may add their own files (TorchServe its MAR-INF), since nothing reads them; but not in code/: it
    is on Python's path, where a file could replace a module.
    """
    for name, digest in listed.items():
        path = directory / name
        if not path.is_file():
            raise PackageError(f"{name} is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise PackageError(
                    f"{name} was changed after the package was built: its SHA-256 differs"
                )
    place = directory / "code"
    if whole:
        place = directory
    for path in sorted(place.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name in listed or name in BESIDE or (path.is_dir() and not path.is_symlink()):
            continue
        if not _is_own_cache(path, directory, listed):
            raise PackageError(
                f"{name!r} does not belong to the package: {MANIFEST} does not list it; delete it"
            )


def _is_own_cache(path: Path, directory: Path, listed: dict[str, str]) -> bool:
    """Return whether a file is Python's compiled form of the package's code that runs now.

    Python wrote it when it imported that code, so its content has run already. Any other .pyc file
    would run in place of its source, whatever it holds.
    """
    runs_here = Path(__file__).resolve().is_relative_to((directory / "code").resolve())
    if not runs_here or path.suffix != ".pyc":
        return False
    try:
        source = Path(source_from_cache(str(path)))
    except ValueError:
        return False
    return source.relative_to(directory).as_posix() in listed


def _check_golden(
    directory: Path,
    manifest: dict[str, Any],
    preprocessing: Preprocessing,
    network: Network,
    calibration: Calibration,
) -> tuple[Scores, float, float]:
    """Return the golden images' scores, the largest difference of their logits, and its limit.

    Raises PackageError where logits, distances or probabilities differ too much from the recorded
    ones, or pixels differ at all.
    """
    names = manifest["golden"]
    recorded = _read_expected(directory, manifest)
    for name, golden in zip(names, recorded["pixels"], strict=True):
        try:
            prepared = prepare(directory / name, preprocessing)
        except (ImageError, OSError) as error:
            raise PackageError(
                f"{name} can't be read as a picture on this machine ({error})"
            ) from error
        _check_pixels(name, prepared, golden)
    try:
        scores = network(recorded["pixels"])
    except Exception as error:  # ONNX Runtime's exceptions have no other base class
        raise PackageError(
            f"{MODEL} can't be run on the golden pictures ({_line(error)})"
        ) from error
    given = scores._asdict() | {"probabilities": calibration.probabilities(scores.logits)}
    tolerance = manifest["tolerance"]
    differences: dict[str, tuple[float, float]] = {}
    for what, said in GOLDEN.items():
        if what not in recorded:  # an older package, or one without calibration
            continue
        size, scale = np.abs(recorded[what]).max(), 1.0
        if what == "probabilities":
            # Probabilities change less than logits, but more with a lower temperature.
            size, scale = np.abs(recorded["logits"]).max(), calibration.temperature
        # Python's floats: a forged tolerance may be too large for NumPy's float32.
        allowed = (tolerance["absolute"] + tolerance["relative"] * float(size)) / scale
        if given[what] is None:
            raise PackageError(f"the network gives no {what}, and the package was built with it")
        off = _compare(names, said, given[what], recorded[what], allowed)
        differences[what] = off, allowed
    return scores, *differences["logits"]


def _read_expected(directory: Path, manifest: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the recorded arrays of the golden images by name. Raise PackageError.

    Their types and shapes are checked.
    """
    count, classes = len(manifest["golden"]), len(manifest["classes"])
    size = manifest["preprocessing"]["size"]
    try:
        with zipfile.ZipFile(directory / EXPECTED) as file:
            if sum(each.file_size for each in file.infolist()) > MAX_EXPECTED:
                raise PackageError(f"{EXPECTED} has more than {MAX_EXPECTED:,} bytes")
        with np.load(directory / EXPECTED, allow_pickle=False) as expected:
            recorded = dict(expected)
    except PackageError:
        raise
    except Exception as error:  # zipfile, zlib, struct and NumPy raise many kinds for damage
        raise PackageError(f"{EXPECTED} can't be read ({_line(error)})") from error
    shapes = {
        "pixels": ("u", (count, size, size, 3)),
        "logits": ("f", (count, classes)),
        "distance": ("f", (count,)),
        "probabilities": ("f", (count, classes)),
    }
    for name, (kind, shape) in shapes.items():
        array = recorded.get(name)
        if array is None and name in ("pixels", "logits"):
            raise PackageError(f"{EXPECTED} holds no {name}")
        if array is not None and (array.dtype.kind, array.shape) != (kind, shape):
            raise PackageError(f"{EXPECTED}: {name} is {array.dtype} of {array.shape}, not {shape}")
    return recorded


def _compare(
    names: Sequence[str],
    said: str,
    computed: NDArray[np.floating[Any]],
    recorded: NDArray[np.floating[Any]],
    allowed: float,
) -> float:
    """Return the largest difference of computed values [N, ...] from the recorded ones.

    Raises PackageError, with `said` in its message, where it is more than `allowed`. names: of the
    N golden images.
    """
    differences = np.abs(computed - recorded).reshape(len(names), -1).max(axis=1)
    worst = int(differences.argmax())  # NaN counts as the largest
    difference = float(differences[worst])
    if not difference <= allowed:
        raise PackageError(
            f"{names[worst]}: {said} {difference:.3g} from the recorded "
            f"ones, allowed: {allowed:.3g}; "
            "the network on this machine does not compute the network that was trained"
        )
    return difference


def _check_pixels(name: str, pixels: NDArray[np.uint8], recorded: NDArray[np.uint8]) -> None:
    different = np.abs(pixels.astype(int) - recorded)
    if different.any():
        raise PackageError(
            f"{name}: {np.count_nonzero(different)} of its {different.size} pixel values are off, "
            f"by up to {different.max()}; the preprocessing, or Pillow {PIL.__version__} on this "
            "machine, does not prepare pictures as the trainer did"
        )
