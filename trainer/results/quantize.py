"""int8 for CPU endpoints: the ONNX network in 8 bits, calibrated on validation images.

It is refused if it costs too much accuracy.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.errors import UserError
from trainer.images.decode import Preprocessing
from trainer.images.folder import read_prepared

CALIBRATION = 200  # images whose activations give the ranges
CHECKED = 500  # images to compare accuracy on; not the same ones, if there are enough
BATCH = 8


@dataclass(frozen=True)
class Pictures:
    """Validation images as the network's input."""

    pixels: NDArray[np.uint8]  # [N, size, size, 3]
    labels: NDArray[np.int64]  # [N]


def choose(
    paths: Sequence[str], labels: NDArray[np.int64], preprocessing: Preprocessing
) -> Pictures:
    """Return the needed number of a split's images, evenly spread, since it is sorted by class."""
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), CALIBRATION + CHECKED)).astype(np.int64)
    return Pictures(
        np.stack([read_prepared(paths[index], preprocessing) for index in chosen]), labels[chosen]
    )


def int8(model: bytes, pictures: Pictures, max_drop: float) -> tuple[bytes, dict[str, float]]:
    """Return the quantized model, and its top-1 accuracy beside the float network's.

    model: ONNX. max_drop: of top-1 accuracy, 0 to 1. Raise UserError if more is lost.
    """
    order = np.random.default_rng(0).permutation(len(pictures.labels))
    calibration, checked = order[:CALIBRATION], order[CALIBRATION:]
    if len(checked) < CALIBRATION:
        checked = order
    quantized = _quantize(model, pictures.pixels[calibration])
    before, after = (
        _top1(network, pictures.pixels[checked], pictures.labels[checked])
        for network in (model, quantized)
    )
    if before - after > max_drop:
        raise UserError(
            f"package.int8=true: int8 has a top-1 accuracy of {after:.4f} on {len(checked)} "
            f"validation pictures, float32 {before:.4f}; package.max_drop allows "
            f"{max_drop:g} less; set package.int8=false, or allow more"
        )
    return quantized, {"int8_top1": after, "float_top1": before}


def _quantize(model: bytes, pixels: NDArray[np.uint8]) -> bytes:
    # imported here: slow, and needed by few.
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # imported here: too

    class Pixels(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = _batches(pixels)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(self._batches, None)
            if batch is None:
                return None
            return {"pixels": batch}

    import onnx  # imported here: too

    with tempfile.TemporaryDirectory(prefix="int8-") as directory:
        source, prepared, target = (
            Path(directory) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx")
        )
        source.write_bytes(model)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        # Unsigned activations with signed weights, a scale for each output channel: the fastest
        # form for ONNX Runtime on x86 with VNNI.
        quantize_static(
            prepared,
            target,
            Pixels(),
            QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_for_distance_alone(onnx.load(prepared)),
        )
        return target.read_bytes()


def _for_distance_alone(model: Any) -> list[str]:
    """Return the nodes of an ONNX model that only its distance needs, and not its logits.

    They stay in float: a cosine of 8-bit numbers is coarse, and they take little time.
    """
    makers = {output: node for node in model.graph.node for output in node.output}

    def behind(output: str) -> set[str]:
        names, waiting = set[str](), [output]
        while waiting:
            node = makers.get(waiting.pop())
            if node is not None and node.name not in names:
                names.add(node.name)
                waiting += node.input
        return names

    return sorted(behind("distance") - behind("logits"))


def scores(model: bytes, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return the network's outputs for pixels uint8 [N, size, size, 3], by ONNX Runtime.

    By name: logits [N, classes], and distance [N] if there is one.
    """
    import onnxruntime  # imported here: slow, and needed by few

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batches = [session.run(names, {"pixels": batch}) for batch in _batches(pixels)]
    return {
        name: np.concatenate(parts)
        for name, parts in zip(names, zip(*batches, strict=True), strict=True)
    }


def logits(model: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the logits of pixels uint8 [N, size, size, 3]: [N, classes]."""
    given: NDArray[np.float32] = scores(model, pixels)["logits"]
    return given


def _top1(model: bytes, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    return float((logits(model, pixels).argmax(1) == labels).mean())


def _batches(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
