"""Loads a model package, as `trainer/results/package.py` builds it, and proves it before it answers.

Every file must have its SHA-256, the network must fit the classes and the preprocessing, and the golden pictures must give their recorded pixels
exactly and their recorded logits within the package's tolerance. That shows damage and train/serve skew; it does not show who built the package.
"""

import gzip
import hashlib
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray

from trainer.images.decode import MAX_PIXELS, ImageError, Preprocessing, prepare

if TYPE_CHECKING:
    import onnxruntime

Network = Callable[
    [NDArray[np.uint8]], NDArray[np.float32]
]  # pixels [N, size, size, 3] to logits [N, classes], from any thread

FORMAT = 1
MANIFEST = "package.json"
MAX_BYTES = (
    8 << 30
)  # unpacked; an ONNX file ends at 2 GiB (protobuf's limit), and the weights are there a second time


class PackageError(ValueError):
    """The package is damaged, incomplete, or does not reproduce. The message is one line: which file, and what is wrong with it."""


@dataclass(frozen=True)
class Package:
    classes: tuple[str, ...]  # in the order of the logits
    preprocessing: Preprocessing
    metrics: dict[str, float]
    config: dict[str, Any]  # the trainer's settings by dotted key
    created: str  # UTC, ISO 8601
    revision: str | None  # of the trainer's git checkout
    golden: int  # how many golden pictures reproduced
    difference: float  # the largest of their logits from the recorded ones
    allowed: float  # the largest difference that would have passed
    network: Network

    def prepare(
        self, source: str | os.PathLike[str] | bytes | BinaryIO, max_pixels: int = MAX_PIXELS
    ) -> NDArray[np.uint8]:
        """A picture's path, bytes or open file as the network takes it: RGB, [size, size, 3]. Raises ImageError."""
        return prepare(source, self.preprocessing, max_pixels)

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels [N, size, size, 3], as `prepare` gives them, to logits [N, classes]. Safe to call from several threads at once."""
        return self.network(pixels)


def load(path: Path, threads: int | None = None, backend: str = "onnx") -> Package:
    """The package in a directory or a model.tar.gz, proven. threads: of the network on a CPU, one a core if not given. backend: of BACKENDS.

    Raises PackageError, and OSError where the machine is at fault.
    """
    with open_directory(path) as directory:
        return _load(directory, threads, backend)


@contextmanager
def open_directory(path: Path) -> Iterator[Path]:
    """The directory of a package's files: `path` itself, or where the archive at `path` lies unpacked meanwhile. Nothing in it is checked yet."""
    if path.is_dir():
        yield path
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="package-") as directory:
            _unpack(path, Path(directory))
            yield Path(directory)
    else:
        raise PackageError("there is no such file or directory")


def _unpack(archive: Path, directory: Path) -> None:
    """Unpacks files and folders, and nothing that could reach outside `directory` or fill the disk."""
    size = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                size += member.size
                _check_member(member, size)
                tar.extract(member, directory, filter="data")
    except PackageError:
        raise
    except (
        tarfile.TarError,
        ValueError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
    ) as error:  # ValueError: numbers in a forged header
        raise PackageError(f"it is not a whole gzipped tar archive ({error})") from error


def _check_member(member: tarfile.TarInfo, size: int) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise PackageError(f"{member.name!r} would be unpacked outside the package's directory")
    if not (member.isreg() or member.isdir()):
        raise PackageError(
            f"{member.name!r} is a link or a device; a package holds files and folders only"
        )
    if (
        member.size < 0 or size > MAX_BYTES
    ):  # tar's binary numbers have a sign, and a step backwards would be read for ever
        raise PackageError(
            f"{member.name!r} brings what is unpacked to {size:,} bytes; allowed: 0 to {MAX_BYTES:,}"
        )


def _load(directory: Path, threads: int | None, backend: str) -> Package:
    manifest = _read_manifest(directory)
    _check_files(directory, manifest["files"])
    preprocessing = Preprocessing(**manifest["preprocessing"])
    network = BACKENDS[backend](directory, manifest, threads)
    difference, allowed = _check_golden(directory, manifest, preprocessing, network)
    return Package(
        classes=tuple(manifest["classes"]),
        preprocessing=preprocessing,
        metrics=manifest["metrics"],
        config=manifest["config"],
        created=manifest["created"],
        revision=manifest["revision"],
        golden=len(manifest["golden"]),
        difference=difference,
        allowed=allowed,
        network=network,
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise PackageError(
            f"{MANIFEST} is missing at the top level: this is no model package, or it was not written to its end"
        ) from error
    except ValueError as error:
        raise PackageError(f"{MANIFEST} is not JSON ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise PackageError(
            f"{MANIFEST}: its format is {found!r}, and this version reads {FORMAT}; serve it with the version that built it"
        )
    digest = manifest.pop("sha256", None)
    if digest != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
        raise PackageError(f"{MANIFEST} was changed after it was built: its SHA-256 differs")
    assert isinstance(manifest, dict)
    return manifest


def _check_files(directory: Path, listed: dict[str, str]) -> None:
    for name, digest in listed.items():
        path = directory / name
        if not path.is_file():
            raise PackageError(f"{name} is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise PackageError(
                    f"{name} was changed after the package was built: its SHA-256 differs"
                )
    # Elsewhere nothing reads an unlisted file, and toolkits add their own (TorchServe its MAR-INF). But code/ is on Python's path,
    # where a file could take the place of a module; only the caches that Python itself writes there may be new.
    for path in sorted((directory / "code").rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and path.parent.name != "__pycache__" and name not in listed:
            raise PackageError(
                f"{name} does not belong to the package: {MANIFEST} does not list it"
            )


def _open_onnx(directory: Path, manifest: dict[str, Any], threads: int | None) -> Network:
    import onnxruntime  # here, because it is half of the start-up time of a command that needs no network

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one a core
    # Threads that spin while they wait take the cores from those that decode and answer: half the throughput on a machine that is shared.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # fatal: it would print, besides raising them, its errors
    model = directory / "model.onnx"
    try:
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
    except (
        Exception
    ) as error:  # the classes of ONNX Runtime's exceptions have nothing else in common
        reason = " ".join(str(error).split())
        raise PackageError(
            f"{model.name} can't be opened by ONNX Runtime {onnxruntime.__version__} ({reason})"
        ) from error
    _check_shapes(session, manifest["preprocessing"]["size"], len(manifest["classes"]))

    def network(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"pixels": pixels})[0]
        return logits

    return network


def _open_torch(directory: Path, manifest: dict[str, Any], threads: int | None) -> Network:
    from serving import torch_backend

    return torch_backend.open_network(directory, manifest, threads)


BACKENDS = {"onnx": _open_onnx, "torch": _open_torch}


def _check_shapes(session: "onnxruntime.InferenceSession", size: int, classes: int) -> None:
    """The network's one input and one output: name, type, and shape behind the batch dimension, which must be free."""
    found = [
        (value.name, value.type, value.shape[1:])
        for value in (*session.get_inputs(), *session.get_outputs())
        if isinstance(value.shape[0], str)
    ]
    wanted = [("pixels", "tensor(uint8)", [size, size, 3]), ("logits", "tensor(float)", [classes])]
    if found != wanted:
        raise PackageError(
            f"model.onnx does not fit {MANIFEST}: it has {found}; its size and classes need {wanted}"
        )


def _check_golden(
    directory: Path, manifest: dict[str, Any], preprocessing: Preprocessing, network: Network
) -> tuple[float, float]:
    """How far the golden pictures' logits lie from the recorded ones, and how far they may. Raises PackageError where it is farther."""
    names = manifest["golden"]
    with np.load(directory / "golden/expected.npz", allow_pickle=False) as expected:
        pixels, logits = expected["pixels"], expected["logits"]
    for name, recorded in zip(names, pixels, strict=True):
        _check_pixels(name, _prepare(directory, name, preprocessing), recorded)
    differences = np.abs(network(pixels) - logits).max(axis=1)
    worst = int(differences.argmax())  # NaN counts as the largest
    allowed = float(
        manifest["tolerance"]["absolute"] + manifest["tolerance"]["relative"] * np.abs(logits).max()
    )
    if not differences[worst] <= allowed:
        raise PackageError(
            f"{names[worst]}: its logits are off by {differences[worst]:.3g} from the recorded ones, allowed: {allowed:.3g}; "
            "the network on this machine does not compute the network that was trained"
        )
    return float(differences[worst]), allowed


def _check_pixels(name: str, pixels: NDArray[np.uint8], recorded: NDArray[np.uint8]) -> None:
    different = np.abs(pixels.astype(int) - recorded)
    if different.any():
        raise PackageError(
            f"{name}: {np.count_nonzero(different)} of its {different.size} pixel values are off, by up to {different.max()}; "
            f"the preprocessing, or Pillow {PIL.__version__} on this machine, does not prepare pictures as the trainer did"
        )


def _prepare(directory: Path, name: str, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    try:
        return prepare(directory / name, preprocessing)
    except (ImageError, OSError) as error:
        raise PackageError(
            f"{name} can't be read as a picture on this machine ({error})"
        ) from error
