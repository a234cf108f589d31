import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from trainer.network.build import build
from trainer.network.distance import WithDistance
from trainer.results import graph
from trainer.results.graph import to_onnx

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    small = build("small_cnn", 3).eval()
    for part in small.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return WithDistance(small, torch.rand(3, small.features_width)).eval()


def exported(which: nn.Module, kept=None) -> bytes:
    return to_onnx(which, PIXELS, ["logits", "distance"], kept)


@pytest.fixture
def found(monkeypatch):
    """How often PyTorch was asked for a graph."""
    asked = []
    real = torch.onnx.export

    def export(*arguments, **options):
        asked.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    return asked


def test_a_kept_graph_gives_the_bytes_of_a_new_one_for_other_weights(tmp_path, found):
    kept = tmp_path / "exports/small.graph"
    exported(network(0), kept)
    other = network(1)
    model = exported(other, kept)
    assert len(found) == 1
    assert model == exported(other) and len(found) == 2
    session = onnxruntime.InferenceSession(model)
    logits, distance = session.run(None, {"pixels": PIXELS})
    with torch.inference_mode():
        expected = other(torch.from_numpy(PIXELS))
    assert np.allclose(logits, expected[0].numpy(), atol=1e-5)
    assert np.allclose(distance, expected[1].numpy(), atol=1e-5)
    assert kept.stat().st_size < len(model) / 2  # it holds no weights


@pytest.mark.parametrize("damage", ["cut", "flipped", "another's"])
def test_a_kept_graph_that_cant_be_used_is_found_again(tmp_path, damage, found):
    kept = tmp_path / "small.graph"
    which = network(0)
    expected = exported(which, kept)
    content = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(content[:-10])
    elif damage == "flipped":
        kept.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    else:
        to_onnx(build("small_cnn", 3).eval(), PIXELS, ["logits"], tmp_path / "other.graph")
        kept.write_bytes((tmp_path / "other.graph").read_bytes())
    found.clear()
    assert exported(which, kept) == expected
    assert len(found) == 1 and kept.read_bytes() == content


def test_a_graph_in_which_a_weight_is_not_as_it_is_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "_bytes", lambda tensor: b"other")
    exported(network(0), tmp_path / "small.graph")
    assert not list(tmp_path.iterdir())
