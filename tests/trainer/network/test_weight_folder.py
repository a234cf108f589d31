"""A folder of weights, looked in before any download, and the note beside each file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from tests.conftest import QUICK, run_trainer
from trainer.common import model_package
from trainer.common.console import log
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.images.datasets import find_images
from trainer.network import weight_folder, weights
from trainer.network.build import build
from trainer.settings.config import Config

OFFLINE = {"TORCH_HOME": "torch", "https_proxy": "http://127.0.0.1:9"}  # nobody answers there


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def resolved(configure, pictures, folder, caplog):
    """The settings as a run with this folder of weights has them."""
    caplog.set_level("INFO", log.name)

    def resolved(*overrides: str) -> Config:
        words = ("data=folder", f"data.root={pictures}", f"model.weights_dir={folder}", *overrides)
        config = configure(*words)
        return weights.resolve(config, find_images(config))

    return resolved


def put(folder: Path, *names: str, **note: object) -> None:
    """Files of these names, and a note beside the last."""
    for name in names:
        (folder / name).write_bytes(b"")
    if note:
        (folder / names[-1]).with_suffix(".json").write_text(json.dumps(note))


# --- which file is for which network ---


def test_the_names_in_the_libraries_source_are_those_that_they_register():
    timm = pytest.importorskip("timm")
    known = weight_folder.known_names()
    theirs = set(torchvision.models.list_models(module=torchvision.models))
    theirs |= {f"timm/{name}" for name in timm.list_models()}
    assert {name for name in known if "." not in name} == theirs | {"small_cnn"}
    assert len(known & {f"timm/{name}" for name in timm.list_pretrained()}) > 1700


def test_no_pytorch_is_needed_for_it(tmp_path):
    code = (
        "import sys; from trainer.network.weight_folder import candidates; "
        f"candidates({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_candidates_are_the_networks_that_a_folder_has_weights_for(folder):
    put(
        folder, "resnet18.pth", "mobilenet_v2_dogs19.pth", "vgg11_bn-mine.pt", "notes.txt", "x.pth",
        "timm--tf_efficientnet_lite0.safetensors", "timm--resnet50.a1_in1k.bin", "small_cnn.pt",
        "timm--vit_small_patch14_dinov2.mine.pth", "resnet34-b627a593.pth",
    )  # fmt: skip
    put(folder, "ours.pth", name="timm/convnext_atto")
    found = {
        each.path.name: (each.name, each.exact) for each in weight_folder.candidates(str(folder))
    }
    assert found == {
        "resnet18.pth": ("resnet18", True),
        "mobilenet_v2_dogs19.pth": ("mobilenet_v2", False),
        "vgg11_bn-mine.pt": ("vgg11_bn", False),
        "timm--tf_efficientnet_lite0.safetensors": ("timm/tf_efficientnet_lite0", True),
        "timm--resnet50.a1_in1k.bin": ("timm/resnet50.a1_in1k", True),
        "timm--vit_small_patch14_dinov2.mine.pth": ("timm/vit_small_patch14_dinov2", False),
        "resnet34-b627a593.pth": ("resnet34", True),
        "small_cnn.pt": ("small_cnn", True),
        "ours.pth": ("timm/convnext_atto", True),
    }


# Files, the model, its weights, and the file that is taken.
TAKEN = [
    (["resnet18.pth", "resnet18_mine.pth"], "resnet18", "DEFAULT", "resnet18.pth"),
    (["resnet18.pth", "resnet18.safetensors"], "resnet18", "DEFAULT", "resnet18.safetensors"),
    (["resnet18_mine.pth"], "resnet18", "DEFAULT", "resnet18_mine.pth"),
    (["vgg11_bn.pth"], "vgg11", "DEFAULT", None),
    (["resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"], "resnet50", "DEFAULT",
     "resnet50-11ad3fa6.pth"),
    (["resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"], "resnet50", "IMAGENET1K_V1",
     "resnet50-0676ba61.pth"),
    (["resnet50-11ad3fa6.pth"], "resnet50", "IMAGENET1K_V1", None),
    (["timm--resnet50.pth"], "timm/resnet50.a2_in1k", "DEFAULT", "timm--resnet50.pth"),
    (["timm--resnet50.a1_in1k.pth"], "timm/resnet50.a2_in1k", "DEFAULT", None),
    (["timm--resnet50.a2_in1k.pth"], "timm/resnet50", "DEFAULT", "timm--resnet50.a2_in1k.pth"),
    (["timm--resnet50.a2_in1k.pth", "timm--resnet50.pth"], "timm/resnet50", "DEFAULT",
     "timm--resnet50.pth"),
    (["resnet50.pth"], "timm/resnet50", "DEFAULT", None),
]  # fmt: skip


@pytest.mark.parametrize("names, model, wanted, taken", TAKEN)
def test_the_likeliest_file_is_taken(resolved, folder, caplog, names, model, wanted, taken):
    if model.startswith("timm/"):
        pytest.importorskip("timm")
    put(folder, *names)
    config = resolved("model=torchvision", f"model.name={model}", f"model.weights={wanted}")
    if taken is None:
        assert config.model.weights == wanted
        assert f"model.weights_dir={folder} holds no weights of {model} (looked for " in caplog.text
        return
    assert config.model.weights == str(folder / taken)
    assert f"using {folder / taken} for {model}" in caplog.text
    exact = "mine" not in taken
    assert ("by the beginning of its name" in caplog.text) == (not exact)


def test_the_tag_in_a_file_s_name_says_what_its_weights_expect(resolved, folder, caplog):
    timm = pytest.importorskip("timm")
    put(folder, "timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k.pth")
    config = resolved("model=torchvision", "model.name=timm/vit_tiny_patch16_224")
    expects = timm.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert config.model.mean == list(expects.mean) == [0.5, 0.5, 0.5]
    assert "assumed" not in caplog.text
    assert weights.provenance(config)["licence"] == "apache-2.0"


@pytest.mark.parametrize(
    "names, words, said",
    [
        (["resnet18_a.pth", "resnet18_b.pth"], (), "holds several files for resnet18 (resnet18_a"),
        ([], ("model.weights_dir=no/such",), "model.weights_dir=no/such: there is no such folder"),
        ([], ("model.weights=V7",), "resnet18 has no weights of that name"),
    ],
)
def test_what_can_not_be_chosen_is_one_line(resolved, folder, names, words, said):
    put(folder, *names)
    with pytest.raises(UserError, match=r"^model\.weights") as refused:
        resolved("model=torchvision", "model.name=resnet18", *words)
    assert said in str(refused.value)


def test_a_folder_without_effect_is_said(resolved, caplog, configure):
    resolved("model=torchvision", "model.name=resnet18", "model.weights=some/file.pth")
    assert "has no effect with model.weights=some/file.pth" in caplog.text


def test_where_it_holds_none_and_nothing_can_be_downloaded_that_is_one_line(pictures, tmp_path):
    (tmp_path / "weights").mkdir()
    code, said = run_trainer(
        tmp_path, f"data.root={pictures}", "model.name=resnet18", "model.weights_dir=weights",
        *QUICK, **OFFLINE,
    )  # fmt: skip
    assert code == MISTAKE
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "model.weights_dir=weights holds none (looked for resnet18 with .safetensors" in line
    assert "could not be downloaded" in line and "model.weights=FILE" in line


def test_a_run_with_it_names_the_file_its_source_and_its_licence(pictures, tmp_path, folder):
    torch.save(build("small_cnn", 3).backbone.state_dict(), folder / "small_cnn_mine.pth")
    note = {
        "mean": [0.4, 0.5, 0.6], "size": 16, "crop": 0.5, "licence": "MIT", "source": "a friend",
    }  # fmt: skip
    (folder / "small_cnn_mine.json").write_text(json.dumps(note))
    words = (
        f"data.root={pictures}", "model=small_cnn", "model.weights=DEFAULT",
        "model.weights_dir=weights", "train.epochs=1", "platform=local", "name=run",
    )  # fmt: skip
    code, said = run_trainer(tmp_path, *words)
    assert code == OK, said
    assert "; weights from a friend, licence MIT" in said
    assert "assumed: data.interpolation=bilinear, model.std=[0.5,0.5,0.5]\n" in said
    assert "small_cnn_mine.pth for small_cnn, by the beginning of its name" in said
    written = yaml.safe_load((tmp_path / "runs/run/config.yaml").read_text())
    assert written["model"]["weights"] == "weights/small_cnn_mine.pth"
    assert (written["data"]["size"], written["data"]["resize"]) == (16, 32)
    assert written["model"]["mean"] == [0.4, 0.5, 0.6]
    identity = json.loads((tmp_path / "runs/run/result.json").read_text())["identity"]
    assert "model.weights" not in identity and "weights.tensors" in identity
    packaged = model_package.manifest(str(tmp_path / "runs/run"))
    assert packaged["weights"] == {"source": "a friend", "licence": "MIT"}
    # The same file in another place is the same run; other content is not.
    folder.rename(tmp_path / "moved")
    moved = [word.replace("weights_dir=weights", "weights_dir=moved") for word in words]
    code, said = run_trainer(tmp_path, *moved)
    assert code == OK and "this run is complete" in said, said
    torch.save(build("small_cnn", 3).backbone.state_dict(), tmp_path / "moved/small_cnn_mine.pth")
    code, said = run_trainer(tmp_path, *moved)
    assert code == MISTAKE and "has changed since this run began" in said


# --- the note beside a file ---


def test_a_note_says_what_the_weights_expect(resolved, folder, caplog):
    put(
        folder, "resnet18.pth", mean=[0.5] * 3, std=[0.25] * 3, size=160, resize=180,
        interpolation="bicubic", licence="CC0", source="here",
    )  # fmt: skip
    config = resolved("model=torchvision", "model.name=resnet18")
    data = config.data
    assert (data.size, data.resize, data.interpolation) == (160, 180, "bicubic")
    assert (config.model.mean, config.model.std) == ([0.5] * 3, [0.25] * 3)
    assert "assumed" not in caplog.text and "they expect" not in caplog.text
    caplog.clear()
    config = resolved("model=torchvision", "model.name=resnet18", "model.mean=[0.1,0.2,0.3]")
    assert "model.mean=[0.1,0.2,0.3], they expect [0.5,0.5,0.5]" in caplog.text
    assert weights.expected("resnet18", str(folder / "resnet18.pth"))[0].size == 160


def test_what_a_note_does_not_say_is_assumed_and_said(resolved, folder, caplog):
    put(folder, "resnet18.pth", mean=[0.5] * 3)
    config = resolved("model=torchvision", "model.name=resnet18")
    assert config.data.size == 224 and config.model.mean == [0.5] * 3
    assert (
        "assumed: data.size=224, data.resize=256, data.interpolation=bilinear, "
        "model.std=[0.229,0.224,0.225]" in caplog.text
    )


NOTES: list[tuple[object, str]] = [
    ({"means": [0.5] * 3}, "means is not a known key; allowed: mean, std, size"),
    ({"license": "MIT"}, "license is not a known key"),
    ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\] holds 2 values; allowed: exactly 3"),
    ({"mean": 0.5}, "mean=0.5 is not allowed; allowed: a list of three numbers"),
    ({"mean": [127, 127, 127]}, "mean=.*allowed: at least 0 and at most 1"),
    ({"std": [0, 1, 1]}, "std=.*allowed: at least 0.001"),
    ({"std": [float("nan")] * 3}, "std=.*allowed: at least 0.001"),
    ({"size": 224.5}, "size=224.5 is not allowed; allowed: a whole number of pixels"),
    ({"size": True}, "size=true is not allowed"),
    ({"size": 0}, "size=0 is not allowed; allowed: at least 1"),
    ({"size": 224, "resize": 200}, "resize=200 is not allowed; allowed: at least size=224"),
    ({"resize": 200}, "the note beside it says resize=200, and no size"),
    ({"crop": 1.5}, "crop=1.5 is not allowed"),
    ({"crop": 0.9, "resize": 256}, "crop and resize mean the same"),
    ({"interpolation": "nearest"}, "interpolation=nearest is not allowed; allowed: bilinear"),
    ({"licence": ["MIT"]}, "licence=.*allowed: a line of text"),
    ({"source": "a\nb"}, "source=.*allowed: a line of text"),
    ({"name": "resnet17"}, "name=resnet17 is not a network"),
    ([1], "it holds no keys with values"),
    ("{", "it is not JSON"),
]


@pytest.mark.parametrize("note, said", NOTES)
def test_a_wrong_note_is_one_line(resolved, folder, note, said):
    put(folder, "resnet18.pth")
    text = note if isinstance(note, str) else json.dumps(note)
    (folder / "resnet18.json").write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        resolved("model=torchvision", "model.name=resnet18")
    assert str(refused.value).startswith(f"{folder}/resnet18.")
    assert "\n" not in str(refused.value)


# --- where weights are from ---


@pytest.mark.parametrize(
    "name, member, source, licence",
    [
        ("resnet50", "DEFAULT", "torchvision IMAGENET1K_V2 (resnet50-11ad3fa6.pth)", None),
        (
            "vit_b_16",
            "IMAGENET1K_SWAG_E2E_V1",
            "torchvision IMAGENET1K_SWAG_E2E_V1 (vit_b_16_swag-9ac1b537.pth)",
            "https://github.com/facebookresearch/SWAG/blob/main/LICENSE",
        ),
        (
            "timm/tf_efficientnet_lite0",
            "DEFAULT",
            "timm/tf_efficientnet_lite0.in1k",
            "apache-2.0",
        ),
        ("resnet18", "null", "from scratch", None),
    ],
)
def test_where_weights_are_from_and_their_licence(configure, name, member, source, licence):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    config = configure(
        "data=folder", "data.root=x", f"model.name={name}", f"model.weights={member}"
    )
    assert weights.provenance(config) == {"source": source, "licence": licence}


@pytest.mark.parametrize(
    "words, parameters, pictures, warned",
    [
        (("model=resnet50", "model.weights=null"), 23e6, 200, True),
        (("model=resnet50", "model.weights=null"), 23e6, 50_000, False),
        (("model=resnet50", "model.weights=null"), 5e5, 200, False),
        (("model=resnet50",), 23e6, 200, False),
        (("model=small_cnn", "model.head_hidden=4096"), 5e6, 200, False),
    ],
)
def test_a_large_network_from_scratch_on_few_pictures_is_one_warning(
    configure, caplog, words, parameters, pictures, warned
):
    config = configure("data=folder", "data.root=x", *words)
    weights.warn_of_scratch(config, int(parameters), pictures)
    assert len(caplog.records) == warned
    assert ("starts from random weights" in caplog.text) == warned


def test_timms_files_are_seen_where_timm_is_missing(tmp_path, monkeypatch):
    put(tmp_path, "timm--tf_efficientnet_lite0.pth")
    put(tmp_path, "mine.pth", name="timm/resnet18")
    put(tmp_path, "nothing.pth")
    real = weight_folder.importlib.util.find_spec
    monkeypatch.setattr(
        weight_folder.importlib.util,
        "find_spec",
        lambda name: None if name == "timm" else real(name),
    )
    weight_folder.known_names.cache_clear()
    try:
        found = [each.name for each in weight_folder.candidates(str(tmp_path))]
    finally:
        weight_folder.known_names.cache_clear()
    assert found == ["timm/resnet18", "timm/tf_efficientnet_lite0"]
