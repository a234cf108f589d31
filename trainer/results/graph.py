"""A network as an ONNX model: a graph that is exported once, and the weights put into it.

PyTorch needs some 10 s for the graph of a MobileNetV2, and the graph doesn't depend on the weights.
So it is cached without them when the package is tried before training (`early.py`). The end of that
run and later runs only insert their weights. The package's self-test shows whether a cached graph
is still right.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.common import files
from trainer.common.errors import UserError

# ONNX Runtime 1.17 and later read it; fixed, so that a new default of PyTorch doesn't change what
# serving requires.
OPSET = 20
COLOUR = "\x1b"  # starts a terminal colour, as PyTorch's advice after the reason does
DIGEST = hashlib.sha256().digest_size  # bytes of a cached graph's checksum, at its beginning


def to_onnx(
    network: nn.Module,
    pixels: NDArray[np.uint8],
    outputs: Sequence[str],
    kept: Path | None = None,
) -> bytes:
    """Return the network as an ONNX model, for any batch.

    Its input is `pixels`, uint8 [batch, size, size, 3]; its outputs have the network's names. The
    same network and weights give the same bytes, with a cached graph or without. kept: the file of
    its graph; None: don't cache. Raise UserError for a network that can't be exported.
    """
    whole = _Whole(network)
    graph = None
    if kept is not None:
        graph = _read(kept)
    if graph is None or not _put(whole, graph):
        graph = _find(whole, pixels, outputs)
        if kept is not None:
            _keep(kept, graph, whole)
    with _silence():
        model = _optimized(graph)
    _forget_sources(model)
    return bytes(model.SerializeToString())


class _Whole(nn.Module):
    """A wrapper that puts a dot into the parameters' names; computed values have none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> Any:
        """Return the network's outputs."""
        return self.network(pixels)


def _find(network: nn.Module, pixels: NDArray[np.uint8], outputs: Sequence[str]) -> onnx.ModelProto:
    """Export the network; its parameters keep their names."""
    # A batch of two: the exporter takes a dimension of 1 for a constant.
    example = torch.from_numpy(pixels[:1]).repeat(2, 1, 1, 1)
    try:
        with _silence():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["pixels"],
                output_names=list(outputs),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0].split(COLOUR)[0].strip()
        raise UserError(
            f"PyTorch can't export this network as ONNX ({reason}); choose another model.name"
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _forget_sources(model)
    return model


def _put(network: nn.Module, graph: onnx.ModelProto) -> bool:
    """Insert the network's weights into the graph; return whether they are the missing ones."""
    weights = network.state_dict()
    for part in graph.graph.initializer:
        if part.HasField("raw_data"):
            continue
        tensor = weights.get(part.name)
        if tensor is None or list(tensor.shape) != list(part.dims):
            return False
        part.raw_data = _bytes(tensor)
    return True


def _keep(path: Path, graph: onnx.ModelProto, network: nn.Module) -> None:
    """Write the graph without the weights, unless one of them isn't in it unchanged."""
    weights = network.state_dict()
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    for part in bare.graph.initializer:
        if part.name not in weights:
            continue
        if part.raw_data != _bytes(weights[part.name]):
            return
        part.ClearField("raw_data")
    data = bytes(bare.SerializeToString())
    files.keep(path, hashlib.sha256(data).digest() + data)


def _read(path: Path) -> onnx.ModelProto | None:
    """Return a cached graph; None if there is none, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, data = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(data).digest() != checksum:
        return None
    return onnx.load_model_from_string(data)


def _optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with BatchNorm as part of the convolutions, constants folded, and so on."""
    # imported here: slow, and needed by a run that ends.
    from onnxscript import optimizer

    optimized: onnx.ModelProto = optimizer.optimize(model)
    return optimized


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _forget_sources(model: onnx.ModelProto) -> None:
    """Remove the source lines that the exporter records.

    They are half of a small model, and contain this machine's paths.
    """
    for part in (
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        del part.metadata_props[:]


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the exporter's logs and warnings: the user can't act on them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
