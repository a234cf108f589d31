"""Every family of timm's networks takes a new head and a file of its own weights.

The features are those that timm's own head would see.
"""

from pathlib import Path

import pytest
import torch

from serving.package import load
from tests.conftest import run_trainer
from trainer.common.errors import OK, UserError
from trainer.network import build as model

timm = pytest.importorskip("timm")
vision_transformer = pytest.importorskip("timm.models.vision_transformer")

# A layer behind the pooling, and heads of more than one layer.
QUICKLY = [
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "lcnet_035", "hardcorenas_a", "ghostnet_050",
    "efficientvit_b0", "hgnetv2_b0", "deit_tiny_distilled_patch16_224", "levit_128s",
    "efficientformer_l1", "test_vit", "test_convnext",
]  # fmt: skip
# The smallest of each module that is not larger than this.
PARAMETERS = 30e6


def families() -> list[str]:
    """The smallest network of each of timm's modules."""
    smallest = []
    for module in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    network = timm.create_model(name, num_classes=0)
            except (RuntimeError, NotImplementedError):  # it reads values while it is built
                continue
            sizes.append((sum(each.numel() for each in network.parameters()), name))
        smallest += [name for parameters, name in sorted(sizes)[:1] if parameters < PARAMETERS]
    return smallest


def check_family(name: str, folder: Path) -> None:
    """A file of timm's network fills ours, which then gives the same features."""
    torch.manual_seed(0)
    full = timm.create_model(name).eval()
    size = full.default_cfg["input_size"][1]
    path = folder / "file.pth"
    torch.save(full.state_dict(), path)
    network = model.build(f"timm/{name}", 3, weights=str(path), size=size).eval()
    pixels = torch.rand(1, 3, size, size)
    with torch.no_grad():
        theirs = full.forward_head(full.forward_features(pixels), pre_logits=True)
        ours = network.backbone(pixels)
    assert ours.shape == theirs.shape, name
    assert network.features_width == ours.shape[1]
    scale = theirs.abs().max().item()
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale), name
    model.check(network, f"timm/{name}", size, 2)


def test_a_transformer_is_trained_at_another_size_and_goes_on(pictures, tmp_path):
    """Its features are one token of many, its position embeddings those of the other size."""
    (tmp_path / "weights").mkdir()
    torch.manual_seed(0)
    original = timm.create_model("test_vit", num_classes=10)
    torch.save(original.state_dict(), tmp_path / "weights/timm--test_vit.pth")
    words = (f"data.root={pictures}", "train.epochs=1", "platform=local")
    code, said = run_trainer(
        tmp_path, *words, "model.name=timm/test_vit", "model.weights_dir=weights", "data.size=32",
        "name=first",
    )  # fmt: skip
    assert code == OK, said
    package = tmp_path / "runs/first/model.tar.gz"
    serving = load(package, backend="torch")
    assert serving.difference <= serving.allowed
    words += (f"model.weights={package}", "model.freeze=none", "data.size=48", "name=more")
    code, said = run_trainer(tmp_path, *words)
    assert code == OK, said
    assert "its head is kept too" in said and "data.size=48, they were trained for 32" in said


@pytest.mark.parametrize("name", QUICKLY)
def test_a_family_takes_a_new_head_and_its_own_file(tmp_path, name):
    check_family(name, tmp_path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_family_takes_a_new_head_and_its_own_file(tmp_path):
    names = families()
    assert len(names) > 75
    for name in names:
        check_family(name, tmp_path)


@pytest.mark.parametrize(
    "name, size", [("vit_small_patch14_dinov2", 70), ("deit_tiny_distilled_patch16_224", 96)]
)
def test_a_network_of_one_size_takes_another_as_timm_s_own_loading_does(tmp_path, name, size):
    torch.manual_seed(0)
    original = timm.create_model(name)
    torch.save(original.state_dict(), tmp_path / "file.pth")
    theirs = timm.create_model(name, img_size=size, num_classes=0).eval()
    state = vision_transformer.checkpoint_filter_fn(original.state_dict(), theirs)
    theirs.load_state_dict({key: state[key] for key in theirs.state_dict()})
    ours = model.build(f"timm/{name}", 3, weights=str(tmp_path / "file.pth"), size=size).eval()
    pixels = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(ours.backbone(pixels), theirs(pixels), atol=1e-5)


def test_weights_that_are_bound_to_a_size_are_one_line(tmp_path):
    torch.save(timm.create_model("levit_128s").state_dict(), tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"doesn't fit timm/levit_128s for .*data.size=96: leave"):
        model.build("timm/levit_128s", 3, weights=str(tmp_path / "file.pth"), size=96)
