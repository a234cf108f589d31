"""Builds the model package: everything that serving needs, in one archive.

A separate process checks it before it gets its name. It holds the weights, the same network as
ONNX, class names, preprocessing, metrics, golden images and the code that serves them.
`serving/package.py` is the reader; the two share this layout, and the code that turns logits into
an answer (`trainer/results/calibrate.py`).
"""

import copy
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import torch as safetensors
from torch import nn

from trainer.common import files, sessions
from trainer.common.console import ProgressBar
from trainer.common.errors import OK, UserError
from trainer.common.model_package import FORMAT, MANIFEST, TENSORS
from trainer.common.serving_code import FOR_AVIF, FOR_HEIC, REQUIREMENTS, SERVING_CODE
from trainer.images.decode import ImageError, Preprocessing, prepare
from trainer.images.names import AVIF, HEIC
from trainer.network.build import Classifier
from trainer.network.distance import WithDistance
from trainer.results import bom, calibrate, quantize
from trainer.results.calibrate import Calibration
from trainer.results.graph import to_onnx

MEANS = "distance.safetensors"  # the classes' mean features, for PyTorch; ONNX holds them too
CARD = "README.md"
PROJECT = Path(__file__).resolve().parents[2]

# The files of code/, and their paths here.
CODE = {
    "inference.py": "serving/adapters/toolkit.py",
    "serving/ray_app.py": "serving/adapters/ray.py",
    **{name: name for name in SERVING_CODE},
}

# Largest difference between serving's and the trained network's logits: absolute + relative * the
# largest logit of the golden images. Measured on ResNet-18 and MobileNetV2, relative to that
# largest logit: PyTorch (AVX-512, AVX2 and plain kernels) against ONNX Runtime 1.32 at each of its
# optimisation levels, at most 9e-6. So 1e-3 leaves a factor of a hundred for other processors, and
# is still far below the effect of a wrong image or network. The absolute part is for networks whose
# logits are all about 0.
TOLERANCE = {"absolute": 1e-5, "relative": 1e-3}

# The same for int8, against the int8 network on the machine that built it: where a sum of products
# is near the border between two steps, another processor's order of adding may round it the other
# way.
INT8_TOLERANCE = {"absolute": 1e-5, "relative": 5e-2}


@dataclass(frozen=True)
class Contents:
    """The content of a package besides the network."""

    classes: Sequence[str]  # in the order of the logits
    preprocessing: Preprocessing
    metrics: dict[str, float]
    config: dict[str, Any]  # resolved settings by dotted key
    revision: str | None  # of git
    golden: Sequence[str]  # paths of a few images, which are packaged too
    # The identity of the pictures and the initial weights: SHA-256 and versions, by name.
    identity: dict[str, str] = field(default_factory=dict)
    # Source and licence of the initial weights.
    weights: dict[str, str | None] = field(default_factory=dict)
    data: str = "pictures"  # the data set's name
    calibration: Calibration | None = None  # None: plain softmax
    # The classes' mean features [classes, width]; None: the network gives no distance.
    means: torch.Tensor | None = None
    # To find int8's ranges and to compare accuracy on; None: the network stays in float32.
    int8: quantize.Pictures | None = None
    max_drop: float = 0.0  # of top-1 accuracy, that int8 may cost
    suffixes: frozenset[str] = frozenset()  # that the trained pictures' names end in
    tolerance: dict[str, float] = field(default_factory=lambda: TOLERANCE)  # of float32's logits
    card: str | None = None  # README.md of the package
    created: datetime | None = None  # None: now
    graph: Path | None = None  # file of the network's graph; None: don't cache it


class SelfTestFailed(UserError):
    """Serving could not load the package. The message says why, in one line."""


def build(
    network: nn.Module,
    contents: Contents,
    target: Path,
    *,
    archive: bool = True,
    temporary: str = files.TEMPORARY,
) -> None:
    """Write `target`: an archive (model.tar.gz), or with archive=False a directory.

    The directory may exist already, as SageMaker's does. network: maps pixels uint8
    [N, size, size, 3] to logits [N, classes]; it isn't changed. temporary: prefix of the names of
    incomplete files. Equal inputs give equal bytes. The package is complete and checked, or absent.
    Raise UserError for images or a network that can't be packaged, OSError (a full disk, say), and
    SelfTestFailed.
    """
    place = target
    if archive:
        place = target.parent
    place.mkdir(parents=True, exist_ok=True)
    try:
        # Below `place`, since a rename stays within a file system, and SageMaker's model directory
        # may be one of its own.
        with tempfile.TemporaryDirectory(prefix=temporary, dir=place) as scratch:
            staged = Path(scratch) / "package"
            trained = copy.deepcopy(network).cpu().float().eval()
            _stage(trained, contents, staged)
            if archive:
                with ProgressBar("model package: packing", 1):
                    _archive(staged, Path(scratch) / target.name)
                (Path(scratch) / target.name).replace(target)
            else:
                _move(staged, target)
        files.flush_directory(place)
    except OSError as error:
        error.filename = str(target)
        raise


def _stage(network: nn.Module, contents: Contents, staged: Path) -> None:
    """Write the package's files and have them checked."""
    graph_was_there = contents.graph is not None and contents.graph.exists()
    try:
        with ProgressBar("model package: exporting the network", 1):
            _write_manifest(_write_contents(network, contents, staged), staged)
        with ProgressBar("model package: checking it as a server does", 1):
            _self_test(staged)
    except SelfTestFailed:
        if not graph_was_there:
            raise
        assert contents.graph is not None
        # It may be another network's, or of code that has changed since.
        contents.graph.unlink(missing_ok=True)
        shutil.rmtree(staged)
        _stage(network, contents, staged)


def _write_contents(network: nn.Module, contents: Contents, package: Path) -> Contents:
    """Write all files but the manifest; return the contents, with int8's measurements."""
    assert contents.golden, "without a golden picture the package can't be checked"
    golden = [_read_image(path, contents.preprocessing) for path in contents.golden]
    pixels = np.stack([pixels for _, pixels in golden])
    served = network
    if contents.means is not None:
        assert isinstance(network, Classifier)
        served = WithDistance(network, contents.means)
        _write(package / MEANS, safetensors.save({"means": contents.means}))
    scores = _scores(served, pixels)
    assert scores["logits"].shape == (len(golden), len(contents.classes)), scores["logits"].shape
    model = to_onnx(served, pixels, _outputs(served), contents.graph)
    if contents.int8:
        model, measured = quantize.int8(model, contents.int8, contents.max_drop)
        scores = quantize.scores(model, pixels)
        contents = replace(contents, metrics=contents.metrics | measured)
        if contents.calibration:
            contents = replace(contents, calibration=_calibrated(model, contents))
    if contents.calibration:
        scores["probabilities"] = contents.calibration.probabilities(scores["logits"])

    expected = io.BytesIO()
    np.savez(expected, allow_pickle=False, pixels=pixels, **scores)
    _write(package / "golden/expected.npz", expected.getvalue())
    for name, (data, _) in zip(_golden_names(contents), golden, strict=True):
        _write(package / name, data)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    _write(package / TENSORS, safetensors.save(weights))
    _write(package / "model.onnx", model)
    if contents.card is not None:
        _write(package / CARD, contents.card.encode(errors="replace"))
    requirements = _requirements(contents.suffixes)
    lines = "".join(f"{requirement}\n" for requirement in requirements.values())
    _write(package / "code/requirements.txt", lines.encode())
    _write(package / bom.BOM, _bill(contents, package, requirements).encode())
    for name, source in CODE.items():
        _write(package / "code" / name, (PROJECT / source).read_bytes())
    return contents


def _calibrated(model: bytes, contents: Contents) -> Calibration:
    """Return the calibration of the int8 network, whose logits differ."""
    assert contents.int8 is not None
    scores = quantize.scores(model, contents.int8.pixels)
    fitted, _ = calibrate.fit(scores["logits"], contents.int8.labels, scores.get("distance"))
    return fitted


def _bill(contents: Contents, package: Path, libraries: Iterable[str]) -> str:
    """Return the bill of materials. libraries: the names of those that serving needs."""
    return bom.Materials(
        network=str(contents.config["model.name"]),
        data=contents.data,
        classes=contents.classes,
        files={name: _sha256(package / name) for name in (TENSORS, "model.onnx")},
        identity=contents.identity,
        weights=contents.weights,
        libraries={name: version(name) for name in libraries},
        metrics=contents.metrics,
    ).text()


def _requirements(suffixes: frozenset[str]) -> dict[str, str]:
    """Return the libraries that serving needs to read the trained kinds of pictures."""
    needed = dict(REQUIREMENTS)
    if suffixes & AVIF:
        needed |= FOR_AVIF
    if suffixes & HEIC:
        needed |= FOR_HEIC
    return needed


def _write_manifest(contents: Contents, package: Path) -> None:
    created = contents.created or datetime.now(UTC)
    tolerance = contents.tolerance
    if contents.int8:
        tolerance = INT8_TOLERANCE
    calibration = {}
    if contents.calibration:
        calibration = {"calibration": asdict(contents.calibration)}
    manifest = {
        "format": FORMAT,
        "created": created.astimezone(UTC).isoformat(timespec="seconds"),
        "classes": list(contents.classes),
        "preprocessing": asdict(contents.preprocessing),
        "metrics": contents.metrics,
        "config": contents.config,
        "revision": contents.revision,
        "identity": contents.identity,
        "weights": contents.weights,
        "tolerance": tolerance,
        **calibration,
        "golden": _golden_names(contents),
        "versions": versions(),
        "files": {path.relative_to(package).as_posix(): _sha256(path) for path in _files(package)},
    }
    # The digest of the rest of the manifest as canonical JSON: it reveals a class renamed by hand.
    # It shows integrity, not the author.
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    _write(package / MANIFEST, json.dumps(manifest | {"sha256": digest}, indent=1).encode())


def versions() -> dict[str, str]:
    """Return the versions of the libraries that make a package, and of those that load it."""
    libraries = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")
    return {name: version(name) for name in libraries}


def sources() -> list[Path]:
    """Return the files of ours that make a package, and those that load it."""
    names = ("network/build", "network/distance", "results/bom", "results/graph", "results/package")
    return [PROJECT / "trainer" / f"{name}.py" for name in names] + [
        PROJECT / source for source in CODE.values()
    ]


def _read_image(path: str, preprocessing: Preprocessing) -> tuple[bytes, NDArray[np.uint8]]:
    """Return the file's bytes, and the pixels that the network gets."""
    data = files.patiently(path, Path(path).read_bytes)
    try:
        pixels = prepare(data, preprocessing)
    except ImageError as error:
        raise UserError(
            f"{path}: the model package needs this picture, but: {error}; fix it and run again"
        ) from error
    return data, pixels


def _golden_names(contents: Contents) -> list[str]:
    return [
        f"golden/{number}{Path(path).suffix.lower()}" for number, path in enumerate(contents.golden)
    ]


def _outputs(network: nn.Module) -> list[str]:
    if isinstance(network, WithDistance):
        return ["logits", "distance"]
    return ["logits"]


def _scores(network: nn.Module, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return the network's outputs, by name."""
    with torch.inference_mode():
        given = network(torch.from_numpy(pixels))
    if isinstance(given, torch.Tensor):
        given = (given,)
    scores = {name: each.numpy() for name, each in zip(_outputs(network), given, strict=True)}
    if not np.isfinite(scores["logits"]).all():
        raise UserError(
            "the network's logits are not finite numbers: the training diverged; "
            "lower optim.lr or set train.clip_norm"
        )
    return scores


def _self_test(package: Path) -> None:
    """Have serving load the package in a process without torch. Raise SelfTestFailed."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    command = [*sessions.python(), "-m", "serving", "check", str(package)]
    environment = os.environ | {"PYTHONPATH": path}
    environment.pop("HYDRA_FULL_ERROR", None)  # its last line says what is wrong
    for _ in range(2):  # again where a disk failed once
        result = sessions.run(command, env=environment)
        if result.returncode == OK:
            return
    said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    raise SelfTestFailed(
        f"the model package failed its self-test: {said[-1].removeprefix('error: ')}"
    )


def _archive(package: Path, archive: Path) -> None:
    """Pack the files so that equal files give equal bytes.

    They are sorted, and have no owners or times of this machine.
    """
    with archive.open("wb") as file:
        # Level 1, because weights hardly compress at any level.
        with (
            gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w") as tar,
        ):
            for path in _files(package):
                entry = tarfile.TarInfo(path.relative_to(package).as_posix())
                entry.size = path.stat().st_size
                with path.open("rb") as source:
                    tar.addfile(entry, source)
        file.flush()
        files.sync(file.fileno())


def _move(package: Path, target: Path) -> None:
    """Move the files into `target`, the manifest last: without one there is no package."""
    (target / MANIFEST).unlink(missing_ok=True)
    for path in sorted(package.iterdir(), key=lambda path: path.name == MANIFEST):
        old = target / path.name
        if old.is_dir():
            shutil.rmtree(old)
        path.replace(old)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*") if path.is_file())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.flush(path, data)
