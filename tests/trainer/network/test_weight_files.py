"""A file of weights loads in every form that training scripts write, or is refused with its true
reason.
"""

import argparse
import pathlib
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.network import build as model

State = dict[str, Tensor]
PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    torch.manual_seed(1)
    return torchvision.models.mobilenet_v2(num_classes=19).eval()


def check_filled(backbone: torch.nn.Module, expected: State) -> None:
    own = backbone.state_dict()
    assert own and all(torch.equal(value, expected[name]) for name, value in own.items())


PREFIXES = (
    "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.", "encoder.", "backbone.",
    "_orig_mod.module.model.backbone.",
)  # fmt: skip
WRAPPERS: dict[str, Callable[[State], object]] = {
    **{
        key: lambda state, key=key: {key: state, "epoch": 3}
        for key in ("model_state_dict", "state_dict", "net", "network", "model", "ema", "model_ema")
    },
    "average": lambda state: {
        "state_dict": {name: value + 1 for name, value in state.items()}, "state_dict_ema": state
    },
    "nested": lambda state: {"ema": {"decay": 0.9, "module": state}, "optimizer": {"state": {}}},
    "arguments": lambda state: {
        "model": state,
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("x"), sizes=[1, 2]),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    },
}  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_may_have_prefixes_in_any_nesting(trained, tmp_path, prefix):
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save(state, tmp_path / "file.pth")
    check_filled(
        model.build("mobilenet_v2", 3, weights=str(tmp_path / "file.pth")).backbone,
        trained.state_dict(),
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict_may_lie_in_what_a_script_saved(trained, tmp_path, wrapper, caplog):
    caplog.set_level("INFO", log.name)
    torch.save(WRAPPERS[wrapper](trained.state_dict()), tmp_path / "file.pth")
    check_filled(
        model.build("mobilenet_v2", 3, weights=str(tmp_path / "file.pth")).backbone,
        trained.state_dict(),
    )
    is_average = wrapper in ("ema", "model_ema", "average", "nested")
    assert ("moving average" in caplog.text) == is_average


def test_a_file_of_before_num_batches_tracked_fits(trained, tmp_path):
    state = {
        name: value
        for name, value in trained.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "file.pth")
    own = model.build("mobilenet_v2", 3, weights=str(tmp_path / "file.pth")).backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own if name in state)


def test_old_names_of_densenet_fit(tmp_path):
    """As in torchvision's own file, densenet121-a639ec97.pth."""
    torch.manual_seed(1)
    network = torchvision.models.densenet121()
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")
    old = {pattern.sub(r"\1.\2", name): value for name, value in network.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "file.pth")
    check_filled(
        model.build("densenet121", 3, weights=str(tmp_path / "file.pth")).backbone,
        network.state_dict(),
    )


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_torchvision_s_own_files_give_what_its_own_loading_does(tmp_path, name, monkeypatch):
    """Their auxiliary classifiers are left out, their own change of the normalisation is not."""
    torch.manual_seed(1)
    full = torchvision.models.get_model(name, aux_logits=True, init_weights=False).eval()
    torch.save(full.state_dict(), tmp_path / "file.pth")
    default = torchvision.models.get_model_weights(name).DEFAULT
    monkeypatch.setattr(
        type(default), "get_state_dict", lambda *arguments, **more: full.state_dict()
    )
    monkeypatch.setattr("trainer.network.hub.check", lambda url: None)  # nothing is downloaded
    theirs = torchvision.models.get_model(name, weights=default).eval()
    theirs.fc = torch.nn.Identity()
    assert theirs.transform_input
    transform = default.transforms()
    pixels = (255 * torch.rand(2, 96, 96, 3)).to(torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    with torch.no_grad():
        expected = theirs((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
        for weights in (str(tmp_path / "file.pth"), "DEFAULT"):
            ours = model.build(
                name, 3, weights=weights, mean=transform.mean, std=transform.std
            ).eval()
            assert torch.allclose(ours.features(pixels), expected, rtol=1e-4, atol=1e-5)


def test_efficientnet_pytorch_s_names_fit_timm_s_network(tmp_path):
    """The EfficientNet-Lites are published under them; the layers are listed in the same order."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    original = timm.create_model("efficientnet_b0", num_classes=5).state_dict()
    pieces = {
        "conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1",
        "classifier": "_fc", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand",
    }  # fmt: skip
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    others = {
        "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
        "conv_pwl": "_project_conv", "bn3": "_bn2",
    }  # fmt: skip
    blocks = list(dict.fromkeys(re.findall(r"blocks\.\d+\.\d+", " ".join(original))))
    theirs = {}
    for key, value in original.items():
        layer, _, parameter = key.rpartition(".")
        block = re.match(r"blocks\.\d+\.\d+", layer)
        if block is None:
            theirs[f"{pieces[layer]}.{parameter}"] = value
            continue
        number = blocks.index(block[0])
        names = {**pieces, **(others if number else first)}
        inner = names[layer.removeprefix(f"{block[0]}.")]
        theirs[f"_blocks.{number}.{inner}.{parameter}"] = value
    torch.save(theirs, tmp_path / "file.pth")
    network = model.build("timm/efficientnet_b0", 3, weights=str(tmp_path / "file.pth"), size=64)
    check_filled(network.backbone, original)


# --- what is refused ---


def save_program(path: pathlib.Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


REFUSED: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "a whole network": (
        lambda path: torch.save(torch.nn.Sequential(torch.nn.ReLU()), path),
        r"holds more than tensors \(torch.nn.modules.container.Sequential\).*would run code",
    ),
    "git's pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git's pointer to the weights.*git lfs pull",
    ),
    "half a file": (
        lambda path: (torch.save({"a": torch.zeros(99)}, path), path.write_bytes(
            path.read_bytes()[:300])),
        "is damaged, or holds more than tensors",
    ),
    "numbers": (lambda path: torch.save({"epoch": 3}, path), "holds no state dict"),
    "nothing": (lambda path: torch.save({}, path), "holds no state dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_loaded_is_refused_with_its_reason(tmp_path, kind):
    write, reason = REFUSED[kind]
    write(tmp_path / "file.pth")
    with pytest.raises(UserError, match=reason) as refused:
        model.build("mobilenet_v2", 3, weights=str(tmp_path / "file.pth"))
    assert str(refused.value).startswith(f"model.weights={tmp_path}/file.pth")
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_program_is_not_run(tmp_path):
    save_program(tmp_path / "file.pth")
    with pytest.raises(UserError, match="a program \\(TorchScript\\); it is refused"):
        model.build("mobilenet_v2", 3, weights=str(tmp_path / "file.pth"))


def test_safetensors_are_known_by_their_content(trained, tmp_path):
    from safetensors.torch import save_file

    save_file(trained.state_dict(), tmp_path / "file.bin")
    check_filled(
        model.build("mobilenet_v2", 3, weights=str(tmp_path / "file.bin")).backbone,
        trained.state_dict(),
    )
