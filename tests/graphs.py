"""The ONNX graphs of a test run, each traced once: the next network like it gets its weights in it.

Tracing takes most of a short run's processor time, and what differs between the tests' runs is the
weights. What comes after is done each time: the weights are put in, the exporter's own optimizer
folds them, and the package's self-test compares what comes out with the network.
tests/test_graphs.py shows that the bytes are those of a whole export.
"""

import hashlib
import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript._framework_apis.torch_2_9 import optimize
from torch import Tensor, nn

from tests.shared import GRAPHS

whole = torch.onnx.export


def share() -> None:
    """Let this process, and what is forked from it, export so."""
    torch.onnx.export = export


def export(network: nn.Module, example: tuple[Tensor, ...], **options: Any) -> Any:
    """Do what torch.onnx.export does; what it returns has a `model_proto` alone."""
    folder = os.environ.get(GRAPHS)
    if not folder:
        return whole(network, example, **options)
    weights = dict(network.named_parameters()) | dict(network.named_buffers())
    try:
        path = Path(folder, f"{_digest(network, weights, example, options)}.onnx")
    except (pickle.PicklingError, AttributeError, TypeError):  # a class of a test's own, say
        return whole(network, example, **options)
    if path.exists():
        traced = onnx.ModelProto.FromString(path.read_bytes())
        for tensor in traced.graph.initializer:
            if tensor.name in weights:
                tensor.raw_data = _bytes(weights[tensor.name])
    else:
        traced = whole(network, example, optimize=False, **options).model_proto
        if _holds(traced, weights):
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_suffix(f".{os.getpid()}")  # others may trace the same
            own.write_bytes(traced.SerializeToString())
            own.replace(path)
    return SimpleNamespace(model_proto=onnx_ir.to_proto(optimize(onnx_ir.from_proto(traced))))


def _digest(
    network: nn.Module, weights: dict[str, Tensor], example: tuple[Tensor, ...], options: Any
) -> str:
    """Return what a graph depends on: all that the network is, but the values of its weights."""
    names = {id(tensor): name for name, tensor in weights.items()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, given: Any) -> Any:
            if not isinstance(given, Tensor):
                return None
            about = (tuple(given.shape), str(given.dtype))
            if id(given) in names:
                return (names[id(given)], *about)
            return (_bytes(given), *about)  # a constant

    told = io.BytesIO()
    Pickler(told).dump(network)
    shapes = [tuple(each.shape) for each in example]
    return hashlib.sha256(told.getvalue() + repr((shapes, options)).encode()).hexdigest()


def _holds(traced: onnx.ModelProto, weights: dict[str, Tensor]) -> bool:
    """Return whether each weight lies in the graph as it is, under its name."""
    held = {tensor.name: tensor.raw_data for tensor in traced.graph.initializer}
    return all(
        held.get(name) == _bytes(tensor)
        for name, tensor in weights.items()
        if tensor.is_floating_point()
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
