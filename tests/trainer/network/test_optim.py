from itertools import pairwise

import pytest
import torch

from trainer.network import build as model
from trainer.network import optim


def factors(schedule, **settings):
    schedule = optim.Schedule(schedule, **settings)
    return [schedule.factor(step, 10, 5) for step in range(50)]


def test_cosine_rises_linearly_and_falls_to_zero():
    rates = factors(schedule="cosine", warmup_epochs=1)
    rising = [after - before for before, after in pairwise(rates[:10])]
    assert rising == pytest.approx([rising[0]] * 9) and rising[0] > 0
    assert rates[10] == 1 and max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[30] == pytest.approx(0.5) and 0 < rates[-1] < 0.01


def test_cosine_agrees_with_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for rate in factors(schedule="cosine", warmup_epochs=0):
        assert rate == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_step_and_constant():
    rates = factors(schedule="step", warmup_epochs=0, step_epochs=2, step_factor=0.1)
    assert (
        rates[0] == rates[19] == 1
        and rates[20] == pytest.approx(0.1)
        and rates[40] == pytest.approx(0.01)
    )
    assert factors(schedule="constant", warmup_epochs=0) == [1.0] * 50


def test_a_warm_up_longer_than_the_run_still_reaches_the_peak():
    assert max(factors(schedule="cosine", warmup_epochs=100)) == 1


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups_hold_every_trainable_parameter_once_and_decay_weights_only(name):
    network = model.build("small_cnn", 5)
    optimizer = optim.build(network, name, lr=0.1, head_lr=1.0, weight_decay=0.01, momentum=0.9)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, network.parameters()))
    for group in optimizer.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
    assert optim.set_lr(optimizer, 0.5) == 0.5
    assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.5}


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("vit_b_16", ["class_token", "pos_embedding"]),
        ("swin_v2_t", ["logit_scale", "norm.weight"]),
        ("swin_t", ["relative_position_bias_table"]),
        ("convnext_tiny", ["layer_scale"]),
        ("timm/deit_tiny_distilled_patch16_224", ["cls_token", "dist_token", "pos_embed"]),
        ("timm/swinv2_tiny_window8_256", ["cpb_mlp.0.weight"]),  # of two dimensions: timm says so
        ("timm/xcit_nano_12_p16_224", ["temperature", "pos_embed.token_projection.weight"]),
    ],
)
def test_decay_is_for_weights_alone(name, spared):
    with torch.device("meta"):
        network = model.build(name, 3)
    named = dict(network.backbone.named_parameters())
    decayed = optim.decayed_names(network.backbone)
    for end in spared:
        assert not [each for each in decayed if each.endswith(end)]
        assert [each for each in named if each.endswith(end)]
    # All else of two dimensions or more: the matrices and the filters.
    others = {each for each in named if named[each].ndim >= 2} - decayed
    assert all(not each.endswith(("qkv.weight", "conv.weight", "fc1.weight")) for each in others)
    assert len(decayed) > 20


def test_a_frozen_backbone_is_not_optimized():
    network = model.build("small_cnn", 5, freeze="backbone")
    optimizer = optim.build(network, "adamw", lr=0.1, head_lr=None, weight_decay=0.01, momentum=0.9)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


# Each with its first and last layer, by parameters of theirs.
LAYERS = {
    "small_cnn": (4, "0.weight", "11.weight"),
    "resnet18": (9, "bn1.weight", "layer4.1.bn2.bias"),
    "mobilenet_v3_small": (14, "features.0.1.weight", "classifier.0.bias"),
    "regnet_y_400mf": (17, "stem.0.weight", "trunk_output.block4.block4-5.f.c.0.weight"),
    "densenet121": (62, "features.norm0.bias", "features.norm5.weight"),
    "squeezenet1_1": (9, "features.0.weight", "features.12.squeeze.weight"),
    "swin_t": (16, "features.0.2.weight", "norm.weight"),
    "vit_b_16": (13, "encoder.pos_embedding", "encoder.ln.weight"),
    "convnext_tiny": (22, "features.0.1.weight", "features.7.2.layer_scale"),
    "timm/deit_tiny_patch16_224": (13, "cls_token", "norm.weight"),
    "timm/resnet18": (9, "bn1.weight", "layer4.1.bn2.weight"),
    "timm/pit_ti_224": (8, "pos_embed", "norm.weight"),  # says nothing of its layers
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_learns_at_a_share_of_the_rate_of_the_layer_behind_it(name):
    network = model.build(name, 3) if name.startswith("regnet") else on_meta(name)
    count, first, last = LAYERS[name]
    optimizer = optim.build(
        network, "adamw", lr=0.1, head_lr=1.0, weight_decay=0.01, momentum=0.9, layer_decay=0.5
    )
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, network.parameters()))
    rates = {
        id(parameter): group["peak_lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {rates[id(each)] for each in network.head.parameters()} == {1.0}
    named = {name: rates[id(each)] for name, each in network.backbone.named_parameters()}
    expected = [0.1 * 0.5**depth for depth in range(count)]
    assert sorted(set(named.values()), reverse=True) == pytest.approx(expected)
    assert named[last] == expected[0] and named[first] == min(named.values())
    # The layers come one after the other, as their parameters were made.
    order = [rate for each, rate in named.items() if not each.endswith(("token", "embed"))]
    if not name.startswith("timm/"):
        assert order == sorted(order)
    assert optimizer.param_groups[-1]["peak_lr"] == 1.0  # what is told as the learning rate


def on_meta(name):
    with torch.device("meta"):
        return model.build(name, 3)


def test_without_layer_decay_there_is_one_rate_for_all_layers():
    network = on_meta("small_cnn")
    assert [
        (group["lr"], group["weight_decay"], len(group["params"]))
        for group in optim.parameter_groups(network, 0.1, 1.0, 0.01)
    ] == [(0.1, 0.01, 4), (0.1, 0.0, 8), (1.0, 0.01, 1), (1.0, 0.0, 1)]
