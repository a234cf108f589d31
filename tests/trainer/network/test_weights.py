"""What isn't given follows from the weights and the pictures: by the libraries' own word, and so
that a pretrained network keeps what it knows.
"""

import json
import tarfile
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load, load_file, save_file

from tests.conftest import make_pictures, run_trainer
from trainer.common.errors import OK, UserError
from trainer.images.datasets import find_images, materialize
from trainer.images.decode import Preprocessing, prepare
from trainer.network import build as model
from trainer.network import weights
from trainer.settings.config import Config, norm_stats_for, run_name, warmup_for

OFFLINE = {
    "TORCH_HOME": "torch",
    "https_proxy": "http://127.0.0.1:9",
}  # port 9: nobody answers there


@pytest.fixture
def resolved(configure, pictures):
    """The settings as a run on the test pictures has them."""

    def resolved(*overrides: str) -> Config:
        config = configure("data=folder", f"data.root={pictures}", *overrides)
        return weights.resolve(config, find_images(config))

    return resolved


@pytest.fixture
def with_weights(configure, pictures):
    """As `resolved`, of a network and its weights by name; composed once, since there are many."""
    base = configure(
        "data=folder", f"data.root={pictures}", "model=torchvision", "model.name=resnet18"
    )
    found = find_images(base)

    def with_weights(name: str, member: str) -> Config:
        base.model.name, base.model.weights = name, member
        return weights.resolve(base, found)

    return with_weights


# --- what weights expect ---


@cache
def scene() -> Image.Image:
    """A smooth square picture, larger than any network's: its pixels tell the crop, the channels'
    order and the normalisation.
    """
    rows, columns = np.mgrid[0:700, 0:700] / 700
    channels = (np.sin(5 * rows) * 0.5 + 0.5, np.cos(4 * columns) * 0.5 + 0.5, rows * columns)
    return Image.fromarray((255 * np.stack(channels, 2)).astype(np.uint8))


@cache
def ours(resize: int, size: int, interpolation: str) -> torch.Tensor:
    file = BytesIO()
    scene().save(file, "PNG")
    pixels = prepare(file.getvalue(), Preprocessing(resize, size, interpolation))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def check_as_theirs(config: Config, theirs: torch.Tensor) -> None:
    """Our pixels, normalised, are those of the library's own transform; a pixel's shift, by
    rounding, hardly shows in the scene.
    """
    data = config.data
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (config.model.mean, config.model.std)
    )
    normalised = (ours(data.resize, data.size, data.interpolation) - mean) / std
    assert normalised.shape == theirs.shape
    assert ((normalised - theirs) * std).abs().mean() < 0.01  # of a scale of 1


def of_torchvision() -> list[tuple[str, str]]:
    names = torchvision.models.list_models(module=torchvision.models)
    return [
        (name, member.name)
        for name in names
        for member in torchvision.models.get_model_weights(name)
    ]


def test_every_weights_of_torchvision_get_what_their_own_transform_does(with_weights):
    pairs = of_torchvision()
    assert len(pairs) >= 115
    seen = {}
    for name, member in pairs:
        transform = torchvision.models.get_model_weights(name)[member].transforms()
        config = with_weights(name, member)
        data = config.data
        assert (data.resize, data.size) == (transform.resize_size[0], transform.crop_size[0]), (
            name,
            member,
        )
        assert data.interpolation == transform.interpolation.value, (name, member)
        assert (config.model.mean, config.model.std) == (
            list(transform.mean),
            list(transform.std),
        ), (name, member)
        seen[str(transform)] = (config, transform)
    assert len(seen) > 20
    for config, transform in seen.values():
        check_as_theirs(config, transform(scene()))


def test_weights_of_timm_get_what_their_own_transform_does(with_weights):
    timm = pytest.importorskip("timm")
    names = timm.list_pretrained()[::9]
    assert len(names) > 150
    seen, other = {}, 0
    for name in names:
        wanted = timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
        )
        config = with_weights(f"timm/{name}", "DEFAULT")
        data = config.data
        assert (config.model.mean, config.model.std) == (
            list(wanted["mean"]),
            list(wanted["std"]),
        ), name
        assert data.size == min(wanted["input_size"][1:]), name
        assert data.interpolation == wanted["interpolation"], name
        other += data.size != 224 or config.model.mean[0] != 0.485
        if wanted["crop_mode"] == "center" and wanted["crop_pct"] <= 1:
            seen[str(wanted)] = (config, wanted)
    assert len(seen) > 30 and other > 60
    for config, wanted in seen.values():
        check_as_theirs(config, timm.data.create_transform(**wanted)(scene()))


NOTES = {
    "timm/coat_lite_medium_384.in1k": "timm squeezes a picture into the square",
    "timm/deepseek_vit_412m.deepseek_v4_1_flash": "timm pads a picture to the square",
    "timm/volo_d5_448.sail_in1k": "timm pads pictures of 389 px to 448",
    "timm/vit_base_patch16_sapiens2.fb": "trained on 768 x 1024 px, here squares of 768",
}


@pytest.mark.parametrize("name", NOTES)
def test_what_timm_does_otherwise_is_said(resolved, name, caplog):
    pytest.importorskip("timm")
    config = resolved("model=torchvision", f"model.name={name}")
    assert config.data.size <= config.data.resize
    assert NOTES[name] in caplog.text


def test_a_tag_that_timm_has_not_is_one_line(resolved):
    pytest.importorskip("timm")
    with pytest.raises(
        UserError,
        match=r"model.name=timm/resnet50.nope: timm has no such weights.*resnet50.a1_in1k",
    ):
        resolved("model=torchvision", "model.name=timm/resnet50.nope")


# --- what is set against it ---


def test_what_a_person_sets_against_the_weights_is_kept_and_said_in_one_line(
    pictures, tmp_path, resolved
):
    given = ("data.size=96", "data.interpolation=bicubic", "model.mean=[0.5,0.5,0.5]")
    code, output = run_trainer(
        tmp_path,
        "data=folder",
        f"data.root={pictures}",
        "model=torchvision",
        "model.name=resnet18",
        "name=run",
        *given,
        **OFFLINE,
    )
    assert code != OK and "could not be downloaded" in output  # what is asked here was said before
    (line,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    for said in (
        "resnet18",
        "data.size=96, they were trained for 224",
        "bicubic, they expect bilinear",
        "mean=[0.5,0.5,0.5], they expect [0.485",
    ):
        assert said in line, line
    assert "resize" not in line and "std" not in line
    config = resolved("model=torchvision", "model.name=resnet18", *given)
    assert (config.data.resize, config.data.size) == (110, 96)
    assert config.model.mean == [0.5, 0.5, 0.5]


def test_what_the_weights_expect_may_be_given_without_a_word(resolved, caplog):
    resolved(
        "model=resnet50",
        "data.size=224",
        "data.resize=232",
        "data.interpolation=bilinear",
        "model.std=[0.229,0.224,0.225]",
    )
    assert not caplog.records or "weights of" not in caplog.text
    resolved("model=resnet50", "data.resize=256")
    assert "data.resize=256, they expect 232 with data.size=224" in caplog.text


def test_of_a_file_it_is_said_what_is_assumed(resolved, caplog):
    config = resolved(
        "model=mobilenet_v2",
        "model.weights=mine.pth",
        "model.mean=[0.5,0.5,0.5]",
        "model.std=[0.5,0.5,0.5]",
    )
    assert (config.data.resize, config.data.size, config.model.mean) == (232, 224, [0.5, 0.5, 0.5])
    assert "assumed: data.size=224, data.resize=232, data.interpolation=bilinear" in caplog.text
    assert "they expect" not in caplog.text and "assumed: model" not in caplog.text


# --- resize follows size ---


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (("model=small_cnn", "data.size=96"), (110, 96)),
        (("model=small_cnn", "data.size=96", "data.resize=100"), (100, 96)),
        (("model=small_cnn", "data.resize=300"), (300, 224)),
        (("model=resnet50", "data.size=112"), (116, 112)),  # 232 to 224
        (
            ("model=resnet50", "model.weights=IMAGENET1K_V1", "data.size=112"),
            (128, 112),
        ),  # 256 to 224
        (
            ("model=torchvision", "model.name=vit_b_16", "model.weights=IMAGENET1K_SWAG_E2E_V1"),
            (384, 384),
        ),
        (("data=fashion_mnist", "data.size=24"), (24, 24)),
        (("data=fashion_mnist",), (28, 28)),
    ],
)
def test_resize_follows_size_by_the_crop_that_the_weights_expect(resolved, overrides, expected):
    data = resolved(*overrides).data
    assert (data.resize, data.size) == expected


def test_a_square_larger_than_the_picture_is_one_line(resolved):
    for overrides in (
        ("model=small_cnn", "data.resize=100"),
        ("model=resnet50", "data.resize=100"),
    ):
        with pytest.raises(
            UserError, match=r"data.size=224 is larger than data.resize=100.*data.resize=null"
        ):
            resolved(*overrides)


def test_evaluation_and_package_and_run_see_the_resolved_numbers(tmp_path):
    make_pictures(tmp_path / "pictures", {"train": 8, "valid": 3, "test": 3}, size=64)
    code, output = run_trainer(
        tmp_path,
        "data=folder",
        "model=small_cnn",
        "data.root=pictures",
        "model=small_cnn",
        "data.size=14",
        "train.batch_size=8",
        "name=run",
    )
    assert code == OK, output
    with tarfile.open(tmp_path / "runs/run/model.tar.gz") as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("package.json")]
        packaged = json.load(archive.extractfile(name))
    assert packaged["preprocessing"] == {"resize": 16, "size": 14, "interpolation": "bilinear"}
    written = yaml.safe_load((tmp_path / "runs/run/config.yaml").read_text())
    identity = json.loads((tmp_path / "runs/run/result.json").read_text())["identity"]
    for section, key in (
        ("data", "resize"),
        ("data", "size"),
        ("model", "mean"),
        ("model", "freeze"),
        ("optim", "lr"),
        ("train", "epochs"),
    ):
        assert written[section][key] is not None
        assert identity[f"{section}.{key}"] == written[section][key]
    # 24 pictures, 3 steps an epoch: 16 epochs would be 48 steps.
    assert written["train"]["epochs"] == 67
    rows = [
        json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    ]
    assert max(row["step"] for row in rows) == 201
    code, output = run_trainer(
        tmp_path,
        "data=folder",
        "data.root=pictures",
        "model=small_cnn",
        "data.size=14",
        "data.resize=15",
        "train.batch_size=8",
        "name=run",
    )
    assert code != OK and "data.resize: 16 then, 15 now" in output


# --- what is trained, how fast, how long ---

PRETRAINED = ("model=resnet50", "data=folder", "data.root=x")


@pytest.mark.parametrize(
    "overrides, freeze, lr, head_lr",
    [
        ((), "none", 2e-3, None),
        (("optim=sgd",), "none", 0.05, None),
        (PRETRAINED, "backbone", 2e-3, None),
        ((*PRETRAINED, "optim=sgd"), "backbone", 0.05, None),
        ((*PRETRAINED, "model.weights=null"), "none", 2e-3, None),
        ((*PRETRAINED, "model.freeze=none"), "none", 2e-4, 2e-3),
        ((*PRETRAINED, "model.freeze=none", "optim=sgd"), "none", 5e-3, 0.05),
        ((*PRETRAINED, "model.freeze=none", "optim.name=sgd"), "none", 5e-3, 0.05),
        ((*PRETRAINED, "model.freeze=none", "optim.head_lr=1e-2"), "none", 2e-4, 1e-2),
        ((*PRETRAINED, "model.freeze=none", "optim.lr=1e-4"), "none", 1e-4, None),
        ((*PRETRAINED, "optim.lr=1e-2"), "backbone", 1e-2, None),
        (("model.weights=some/file.pth",), "backbone", 2e-3, None),
    ],
)
def test_what_is_trained_and_how_fast_follows_from_the_weights(
    configure, overrides, freeze, lr, head_lr
):
    config = configure(*overrides)
    assert (config.model.freeze, config.optim.lr, config.optim.head_lr) == (freeze, lr, head_lr)


def test_given_or_left_out_the_same_values_are_the_same_run(configure):
    assert run_name(configure(*PRETRAINED)) == run_name(
        configure(*PRETRAINED, "model.freeze=backbone", "optim.lr=2e-3")
    )
    assert run_name(configure(*PRETRAINED)) != run_name(configure(*PRETRAINED, "model.freeze=none"))


def test_mixed_pictures_and_pretrained_weights_go_together(resolved):
    config = resolved("model=resnet50", "data.augment.mixup=0.2")
    assert (config.model.freeze, config.model.cached_views) == ("backbone", None)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("model.freeze=none", "optim.lr=1e-3"), True),
        (("model.freeze=none", "optim.lr=0.05", "optim=sgd"), True),
        (("model.freeze=none", "optim.lr=3e-4"), False),
        (("model.freeze=none",), False),
        (("optim.lr=1e-2",), False),
        (("model.freeze=none", "optim.lr=1e-2", "model.weights=null"), False),
    ],
)
def test_a_learning_rate_that_ruins_pretrained_weights_is_said(resolved, caplog, overrides, said):
    resolved("model=resnet50", *overrides)
    assert ("forget" in caplog.text) == said


@pytest.mark.parametrize(
    "per_class, batch, epochs", [(8, 64, 200), (8, 8, 67), (8, 1, 16), (100, 8, 16)]
)
def test_few_pictures_are_passed_often_enough(configure, tmp_path, per_class, batch, epochs):
    config = configure(
        "data=folder",
        f"data.root={make_pictures(tmp_path, {'train': per_class, 'valid': 1})}",
        f"train.batch_size={batch}",
        "model=small_cnn",
    )
    assert weights.resolve(config, find_images(config)).train.epochs == epochs
    config.train.epochs = 3
    assert weights.resolve(config, find_images(config)).train.epochs == 3


@pytest.mark.parametrize(
    "pictures, words, stats",
    [
        (2499, "model=resnet50", "keep"),
        (2500, "model=resnet50", "update"),
        (2500, "model=resnet50 train.batch_size=15", "keep"),
        (2500, "model=resnet50 train.batch_size=16", "update"),
        (2500, "model=resnet50 train.accumulate=8", "keep"),
        (2500, "model=resnet50 train.exact_shards=8", "keep"),
        (2500, "model=resnet50 model.head=probe", "keep"),
        (9, "model=resnet50 model.norm_stats=update", "update"),
        (9000, "model=resnet50 model.norm_stats=keep", "keep"),
        (9, "model=small_cnn", "update"),
    ],
)
def test_statistics_of_pretrained_weights_are_kept_where_they_are_better(
    configure, pictures, words, stats
):
    assert norm_stats_for(configure(*words.split()), pictures) == stats


@pytest.mark.parametrize(
    ("words", "pictures", "epochs"),
    [
        ("", 185, 10), ("", 50, 20), ("", 64 * 20, 1), ("", 8000, 1),
        ("train.batch_size=8", 80, 2), ("optim.warmup_epochs=1", 185, 1),
        ("optim.warmup_epochs=0", 185, 0),
    ],
)  # fmt: skip
def test_a_warm_up_has_an_epoch_and_twenty_steps_at_least(configure, words, pictures, epochs):
    # Two steps left MobileNetV2 at chance on 185 photos: a new head, all layers.
    assert warmup_for(configure(*words.split()), pictures) == epochs


# --- a pretrained network keeps what it knows ---


def link_some(source: Path, target: Path, per_class: dict[str, int]) -> None:
    for split, count in per_class.items():
        for folder in (source / split).iterdir():
            (target / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                (target / split / folder.name / path.name).symlink_to(path)


def packaged_weights(run: Path) -> dict[str, torch.Tensor]:
    with tarfile.open(run / "model.tar.gz") as archive:
        return load(archive.extractfile("model.safetensors").read())


def probe(root: Path, weights_file: str) -> float:
    """Test accuracy of a logistic regression on the plain features of these weights."""
    network = model.build("small_cnn", 10, weights=weights_file).eval()

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        classes = sorted(folder.name for folder in (root / split).iterdir())
        paths = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((root / split / name).iterdir())
        ]
        pixels = np.stack([prepare(path, Preprocessing(28, 28, "bilinear")) for path, _ in paths])
        with torch.no_grad():
            return network.features(torch.from_numpy(pixels)), torch.tensor(
                [label for _, label in paths]
            )

    (inputs, targets), (test_inputs, test_targets) = features("train"), features("test")
    torch.manual_seed(0)
    head = torch.nn.Linear(inputs.shape[1], 10)
    optimizer = torch.optim.AdamW(head.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(inputs), targets).backward()
        optimizer.step()
    return (head(test_inputs).argmax(1) == test_targets).float().mean().item()


def test_the_defaults_do_not_ruin_a_pretrained_network(tmp_path):
    every = tmp_path / "data/fashion_mnist"
    materialize("fashion_mnist", every)
    code, output = run_trainer(tmp_path, "name=pretrained", "train.epochs=3")
    assert code == OK, output
    save_file(packaged_weights(tmp_path / "runs/pretrained"), tmp_path / "weights.safetensors")
    few = tmp_path / "few"
    link_some(every, few, {"train": 4, "valid": 4, "test": 25})
    code, output = run_trainer(
        tmp_path,
        "data=folder",
        "data.root=few",
        "model=small_cnn",
        "data.size=28",
        "data.resize=28",
        "model.weights=weights.safetensors",
        "name=run",
    )
    assert code == OK, output
    before, after = (
        load_file(tmp_path / "weights.safetensors"),
        packaged_weights(tmp_path / "runs/run"),
    )
    backbone = [name for name in before if name.startswith("backbone.")]
    assert backbone and all(torch.equal(before[name], after[name]) for name in backbone)
    reached = json.loads((tmp_path / "runs/run/result.json").read_text())["top1"]
    assert reached >= probe(few, str(tmp_path / "weights.safetensors")) - 0.06
