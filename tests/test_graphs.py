"""A graph that is traced once and filled with other weights is what a whole export gives."""

import re

import numpy as np
import onnx
import pytest
import torch

from tests import graphs
from tests.shared import GRAPHS
from trainer.common.errors import UserError
from trainer.network.build import build
from trainer.network.distance import WithDistance
from trainer.results.package import to_onnx

PIXELS = np.zeros((1, 16, 16, 3), np.uint8)


def served(seed: int, classes: int = 3) -> WithDistance:
    torch.manual_seed(seed)
    network = build("small_cnn", classes).eval()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return WithDistance(network, torch.rand(classes, network.features_width))


def told(model: bytes) -> tuple[list[bytes], str]:
    """Its constants, and all else but the numbers in the names that the optimizer gives."""
    proto = onnx.ModelProto.FromString(model)
    constants = [tensor.raw_data for tensor in proto.graph.initializer]
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
    return constants, re.sub(r"\b(node_[A-Z][A-Za-z]*|val)_\d+", r"\1", str(proto))


def test_a_traced_graph_with_other_weights_is_what_a_whole_export_gives(tmp_path, monkeypatch):
    monkeypatch.setenv(GRAPHS, str(tmp_path))
    whole = to_onnx(served(2), PIXELS)
    monkeypatch.setattr(torch.onnx, "export", graphs.export)
    first, second = to_onnx(served(1), PIXELS), to_onnx(served(2), PIXELS)
    assert len(list(tmp_path.iterdir())) == 1 and first != second
    assert told(second) == told(whole)

    def refused(*arguments, **options):
        raise torch.onnx.OnnxExporterError("traced anew")

    # What is no weight makes another graph.
    monkeypatch.setattr(graphs, "whole", refused)
    assert to_onnx(served(1), PIXELS) == first
    epsilon, mode = served(1), served(1)
    next(each for each in epsilon.modules() if isinstance(each, torch.nn.BatchNorm2d)).eps = 0.1
    next(each for each in mode.modules() if isinstance(each, torch.nn.BatchNorm2d)).train()
    large = np.zeros((1, 20, 20, 3), np.uint8)
    for network, pixels in (
        (served(1, classes=4), PIXELS), (served(1), large), (epsilon, PIXELS), (mode, PIXELS),
    ):  # fmt: skip
        with pytest.raises(UserError, match="traced anew"):
            to_onnx(network, pixels)
