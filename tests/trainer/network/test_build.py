import copy
import errno
import os
import pickle
import socket
import urllib.request

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional

from trainer.common import files
from trainer.common.errors import Unreadable, UserError
from trainer.network import build as model
from trainer.network import hub

PIXELS = torch.randint(
    0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_takes_a_new_head(name):
    # RegNet reads values while it is built, which tensors without memory don't have.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        network = model.build(name, 7)
        pixels = torch.zeros(2, 224, 224, 3)
        assert network.eval()(pixels).shape == (2, 7)
        assert network.train()(
            torch.zeros(2, 299, 299, 3) if name == "inception_v3" else pixels
        ).shape == (2, 7)


def test_normalisation_is_part_of_the_network():
    network = model.build("small_cnn", 3, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3)).eval()
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(PIXELS)
    expected = torchvision.transforms.v2.functional.normalize(
        PIXELS.permute(0, 3, 1, 2) / 255, [0.2, 0.4, 0.6], [0.1, 0.2, 0.3]
    )
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_uint8_and_float_pixels_give_the_same():
    network = model.build("small_cnn", 3).eval()
    assert torch.equal(network(PIXELS), network(PIXELS.float()))


def test_the_head_may_have_a_hidden_layer():
    network = model.build("small_cnn", 133, head_hidden=64)
    assert [layer.weight.shape for layer in network.head if hasattr(layer, "weight")] == [
        (64, network.features_width),
        (133, 64),
    ]


def test_a_frozen_backbone_does_not_move_at_all():
    network = model.build("mobilenet_v2", 3, freeze="backbone").train()
    before = copy.deepcopy(network.backbone.state_dict())
    head = copy.deepcopy(network.head.state_dict())
    optimizer = torch.optim.SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad], lr=1.0
    )
    for _ in range(3):
        torch.nn.functional.cross_entropy(network(PIXELS), torch.tensor([0, 1])).backward()
        optimizer.step()
    after = network.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(head["weight"], network.head.state_dict()["weight"])


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/efficientnet_lite0"])
def test_statistics_that_are_kept_stay_while_all_weights_are_trained(name):
    network = model.build(name, 3)
    network.keeps_norm_stats = True
    network.train()
    before = copy.deepcopy(dict(network.backbone.named_buffers()))
    torch.nn.functional.cross_entropy(network(PIXELS), torch.tensor([0, 1])).backward()
    after = dict(network.backbone.named_buffers())
    assert len(before) > 20 and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.backbone.training and network.head.training


def test_in_eval_mode_the_logits_are_the_mean_of_a_picture_and_its_mirror_image():
    network = model.build("small_cnn", 3, head_hidden=5).eval()
    plain, other = network(PIXELS), network(PIXELS[:, :, torch.arange(63, -1, -1)])
    assert not torch.allclose(plain, other)
    trained = copy.deepcopy(network).train()(PIXELS)
    network.averages_flip = True
    torch.testing.assert_close(network(PIXELS), (plain + other) / 2)
    logits, features = network.with_features(PIXELS)
    assert torch.equal(logits, network(PIXELS))
    torch.testing.assert_close(features, network.features(PIXELS))
    assert torch.equal(network.train()(PIXELS), trained)


# --- weights ---


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    return torchvision.models.mobilenet_v2(num_classes=19)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_local_state_dict_fills_everything_but_the_head(trained, tmp_path, suffix, prefix):
    path = tmp_path / f"weights{suffix}"
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    network = model.build("mobilenet_v2", 3, weights=str(path))
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])


def test_weights_of_our_own_package_go_on(tmp_path):
    from safetensors.torch import save_file

    first = model.build("small_cnn", 3)
    save_file(
        {name: tensor.contiguous() for name, tensor in first.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    second = model.build("small_cnn", 9, weights=str(tmp_path / "model.safetensors"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            first.backbone.state_dict().values(), second.backbone.state_dict().values(), strict=True
        )
    )


def test_weights_that_do_not_fit_are_refused_by_name(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "mobilenet.pth")
    with pytest.raises(UserError, match=r"doesn't fit.*conv1.weight"):
        model.build("resnet18", 3, weights=str(tmp_path / "mobilenet.pth"))


def test_a_pickle_in_a_weights_file_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        model.build("resnet18", 3, weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "exploded").exists()


def test_unknown_names_say_what_is_allowed():
    with pytest.raises(UserError, match=r"model.name=resnet5.*resnet50"):
        model.build("resnet5", 3)
    with pytest.raises(UserError, match=r"model.weights=V3.*IMAGENET1K_V1, IMAGENET1K_V2"):
        model.build("resnet50", 3, weights="V3")
    with pytest.raises(UserError, match=r"no/such.pth: there is no such file"):
        model.build("resnet50", 3, weights="no/such.pth")


def test_weights_without_a_network_end_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(
        "https_proxy", "http://127.0.0.1:9"
    )  # the discard port: every download is refused at once
    with pytest.raises(UserError, match=r"could not be downloaded.*model.weights=FILE"):
        model.build("squeezenet1_1", 3, weights="DEFAULT")


def test_a_server_that_cannot_be_reached_is_asked_once_and_no_library_waits_for_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    asked = []

    def refuse(address, patience):
        asked.append(address)
        raise TimeoutError

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setattr(torchvision.models, "get_model", None)  # would fail in another way
    hub._reason.cache_clear()
    for _ in range(2):
        with pytest.raises(UserError, match=r"download.pytorch.org can't be reached: no answer"):
            model.build("squeezenet1_1", 3, weights="DEFAULT")
    assert asked == [("download.pytorch.org", 443)]
    hub._reason.cache_clear()


def test_a_server_that_answers_or_lies_behind_a_proxy_is_left_to_the_library(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub.check(f"http://127.0.0.1:{server.getsockname()[1]}/file")
    hub.check("file:///nowhere")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://127.0.0.1:9"})
    hub.check("https://no-such-host.invalid/file")


@pytest.mark.parametrize("times", [2, 100])
def test_a_disk_that_fails_is_no_missing_network(monkeypatch, times):
    """Of a downloaded file, say: it is tried again, from the same random numbers."""
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    torch.manual_seed(0)
    expected = model.build("squeezenet1_1", 3).state_dict()
    get_model, left = torchvision.models.get_model, [times]

    def failing(*arguments, **more):
        network = get_model(*arguments, **more)
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return network

    monkeypatch.setattr(torchvision.models, "get_model", failing)
    torch.manual_seed(0)
    if times > 2:
        with pytest.raises(Unreadable, match="input/output error"):
            model.build("squeezenet1_1", 3)
    else:
        state = model.build("squeezenet1_1", 3).state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


# --- a backbone from outside torchvision ---


def test_a_backbone_of_timm_can_be_plugged_in(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    original = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    network = model.build(
        "timm/tf_efficientnet_lite0", 3, weights=str(tmp_path / "weights.pth"), freeze="backbone"
    )
    assert network.eval()(PIXELS).shape == (2, 3)
    assert all(
        torch.equal(tensor, original.state_dict()[name])
        for name, tensor in network.backbone.state_dict().items()
    )
    with pytest.raises(UserError, match=r"timm/tf_efficientnet_light0: timm has no such model"):
        model.build("timm/tf_efficientnet_light0", 3)
