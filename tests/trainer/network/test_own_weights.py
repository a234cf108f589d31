"""One of our own packages, or a run, as a start: its network, its preprocessing, its head."""

import json
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import make_pictures, run_trainer
from tests.shared import made_once
from trainer.common import model_package
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.images.datasets import find_images
from trainer.network import build, weights

FIRST = (
    "model=small_cnn", "data.size=16", "data.resize=20", "data.interpolation=bicubic",
    "model.mean=[0.4,0.5,0.6]", "model.std=[0.2,0.3,0.4]", "model.head_hidden=8",
    "train.epochs=6", "train.batch_size=8", "platform=local", "name=first",
)  # fmt: skip


@pytest.fixture
def cwd(tmp_path, tmp_path_factory, pictures, monkeypatch) -> Path:
    """A working directory with a complete run; change what lies in it as you like."""

    def make(folder: Path) -> None:
        code, said = run_trainer(folder, f"data.root={pictures}", *FIRST)
        assert code == OK, said

    run = made_once(tmp_path_factory, "a run to start from", make) / "runs/first"
    shutil.copytree(run, tmp_path / "runs/first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def more(cwd: Path, pictures: Path, *words: str) -> tuple[int, str]:
    return run_trainer(
        cwd, f"data.root={pictures}", "train.batch_size=8", "platform=local", "name=more", *words
    )


def first_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["valid_loss"])


def test_ten_more_epochs(cwd, pictures):
    code, said = more(cwd, pictures, "model.weights=runs/first", "train.epochs=10")
    assert code == OK, said
    assert "model.name=small_cnn: the network of model.weights=runs/first" in said
    assert "no model was given" not in said and "starts from random" not in said
    assert "model.weights=runs/first has the same classes: its head is kept too" in said
    assert "model.freeze=none trains all layers on, as before" in said
    assert "weights from runs/first (from scratch)" in said and "assumed" not in said
    written = yaml.safe_load((cwd / "runs/more/config.yaml").read_text())
    before = yaml.safe_load((cwd / "runs/first/config.yaml").read_text())
    for key in ("size", "resize", "interpolation"):
        assert written["data"][key] == before["data"][key]
    for key in ("name", "mean", "std", "head_hidden"):
        assert written["model"][key] == before["model"][key]
    # It goes on from where the first one was.
    result = json.loads((cwd / "runs/first/metrics.jsonl").read_text().splitlines()[0])
    assert first_loss(cwd / "runs/more") < result["valid_loss"]
    # A package of a package knows where the weights are from.
    again = model_package.manifest("runs/more")["weights"]
    assert again["source"] == "runs/first (from scratch)"
    # Complete, and known by its content.
    (cwd / "runs/first").rename(cwd / "runs/moved")
    words = ("model.weights=runs/moved", "train.epochs=10")
    code, said = more(cwd, pictures, *words)
    assert code == OK and "this run is complete" in said, said


@pytest.mark.parametrize("form", ["runs/first", "runs/first/model.tar.gz", "unpacked"])
def test_a_package_in_each_form_gives_its_network_and_head(cwd, pictures, configure, form):
    with tarfile.open("runs/first/model.tar.gz") as archive:
        archive.extractall("unpacked", filter="data")
    config = configure(f"data.root={pictures}", f"model.weights={form}")
    assert config.model.name == "small_cnn"
    images = find_images(config)
    config = weights.resolve(config, images)
    assert (config.data.size, config.data.resize) == (16, 20)
    assert weights.keeps_head(config, images.classes)
    network = build.build(
        "small_cnn", 3, weights=form, keep_head=True, head_hidden=config.model.head_hidden,
        mean=config.model.mean, std=config.model.std,
    )  # fmt: skip
    packaged = load_file("unpacked/model.safetensors")
    own = network.state_dict()
    assert own.keys() == packaged.keys()
    assert all(torch.allclose(own[name], packaged[name], rtol=1e-6) for name in own)


@pytest.mark.parametrize("form", ["runs/first", "runs/first/checkpoints", "saved/step-00000018"])
def test_the_best_weights_of_checkpoints_are_a_start_too(cwd, pictures, configure, form):
    """Of a run that isn't complete: the same network, preprocessing and head."""
    with tarfile.open("runs/first/model.tar.gz") as archive:
        archive.extractall("unpacked", filter="data")
    Path("runs/first/model.tar.gz").unlink()
    newest = sorted(Path("runs/first/checkpoints").glob("step-*"))[-1]
    if form.startswith("saved"):
        shutil.copytree(newest, form)
    config = configure(f"data.root={pictures}", f"model.weights={form}")
    images = find_images(config)
    config = weights.resolve(config, images)
    assert (config.model.name, config.data.size, config.data.resize) == ("small_cnn", 16, 20)
    assert config.model.mean == [0.4, 0.5, 0.6] and weights.keeps_head(config, images.classes)
    assert weights.provenance(config)["source"] == f"{form} (from scratch)"
    network = build.build("small_cnn", 3, weights=form, keep_head=True, head_hidden=8)
    packaged, own = load_file("unpacked/model.safetensors"), network.state_dict()
    assert all(
        torch.equal(own[name], packaged[name]) for name in own if name not in ("mean", "std")
    )


def test_checkpoints_of_a_head_alone_are_one_line(cwd, pictures):
    words = ("model.weights=runs/first", "train.epochs=1")
    code, said = more(cwd, pictures, *words)
    assert code == OK, said
    (cwd / "runs/more/model.tar.gz").unlink()
    code, said = more(cwd, pictures, "model.weights=runs/more", "name=third")
    assert code == MISTAKE and "hold the head alone; finish that run" in said


def test_other_classes_get_a_new_head(cwd, pictures, configure, caplog):
    caplog.set_level("INFO", "packhorse")
    other = make_pictures(cwd / "other", {"train": 8, "valid": 3}, classes=("a", "b"))
    config = configure(f"data.root={other}", "model.weights=runs/first")
    images = find_images(config)
    config = weights.resolve(config, images)
    assert not weights.keeps_head(config, images.classes) and config.model.head_hidden is None
    assert "has other classes (3, here 2): the head is new" in caplog.text
    caplog.clear()
    config = configure(f"data.root={pictures}", "model.weights=runs/first", "model.head_hidden=4")
    config = weights.resolve(config, find_images(config))
    assert not weights.keeps_head(config, ["circle", "square", "stripe"])
    assert "model.head_hidden=8, here 4: the head is new" in caplog.text


def test_classes_are_the_same_however_their_accents_are_written():
    names = ["café", "ä"]
    decomposed = [unicodedata.normalize("NFD", name) for name in names]
    assert names != decomposed and weights.same_classes(names, decomposed)
    assert not weights.same_classes(["a", "b"], ["b", "a"])


def test_what_departs_from_a_package_is_said(cwd, pictures, configure, caplog):
    departing = ("data.size=32", "model.std=[1,1,1]")
    config = configure(f"data.root={pictures}", "model.weights=runs/first", *departing)
    weights.resolve(config, find_images(config))
    assert "data.size=32, they were trained for 16" in caplog.text
    assert "model.std=[1,1,1], they expect [0.2,0.3,0.4]" in caplog.text


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def other_archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.add("runs/first/config.yaml", "config.yaml")


def no_result(path: Path) -> None:
    path.unlink()
    shutil.rmtree(path.parent / "checkpoints")


WRONG = {
    "another model": (None, ("model=resnet50",), "holds small_cnn, and the model here is resnet50"),
    "an unfinished run": (no_result, (), "a directory without a model package"),
    "cut off": (cut_off, (), "is damaged: not a whole gzipped tar archive"),
    "something else": (
        other_archive,
        (),
        "holds no package.json: it is not a Packhorse model package",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_can_not_be_a_start_is_one_line(cwd, pictures, configure, kind):
    harm, words, said = WRONG[kind]
    if harm:
        harm(cwd / "runs/first/model.tar.gz")
    with pytest.raises(UserError, match=said) as refused:
        config = configure(f"data.root={pictures}", "model.weights=runs/first", *words)
        weights.resolve(config, find_images(config))
    assert str(refused.value).startswith("model.weights=runs/first")


def test_a_package_whose_tensors_were_changed_is_refused(cwd):
    with tarfile.open("runs/first/model.tar.gz") as archive:
        archive.extractall("unpacked", filter="data")
    path = cwd / "unpacked/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match="was changed after it was written"):
        model_package.tensors("unpacked")


def test_two_models_are_one_line(cwd, pictures):
    code, said = more(cwd, pictures, "model.weights=runs/first", "model.name=resnet18")
    assert code == MISTAKE
    assert "holds small_cnn, and the model here is resnet18" in said
