"""`python -m trainer.care DIR`, in this process: the page, the list, and what isn't looked at."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.results.test_report import Page
from tests.trainer.scenes import write_scenes
from trainer import care
from trainer.network import build

CLASSES = ("cat", '"><b>dog')


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    root = write_scenes(tmp_path / "my pictures", {"train": 4, "valid": 2, "test": 2}, CLASSES)
    shutil.copy(root / "train/cat/1.jpg", root / "test/cat/9.jpg")
    shutil.copy(root / "train/cat/2.jpg", root / "train" / CLASSES[1] / "9.jpg")

    def look(*words: str) -> tuple[int, str]:
        small = ("data.size=16", "data.resize=24", f"platform.cache={tmp_path}/cache")
        target = f"--to={tmp_path}/out"
        monkeypatch.setattr("sys.argv", ["care", str(root), *small, target, *words])
        code = care.main()
        return code, capsys.readouterr().out

    return look


def test_it_writes_a_page_and_a_list(look, tmp_path: Path):
    code, said = look("model=small_cnn")
    assert code == 0, said
    assert "pictures in train, and in valid or test too: 1 the same file, 0 nearly: " in said
    assert "pictures in two classes: 1: train/" in said
    assert "not checked for wrong labels" in said and "a pretrained network is needed" in said
    rows = csv.DictReader((tmp_path / "out/care.csv").read_text().splitlines())
    assert {row["kind"] for row in rows} == {"leak", "labels"}
    page = Page((tmp_path / "out/care.html").read_text())
    assert len(page.attributes("img")) == 4
    assert all(image["src"].startswith("data:image/") for image in page.attributes("img"))
    assert {"script", "link", "b>dog"}.isdisjoint(tag for tag, _ in page.tags)
    assert "not checked" in page.text.lower() and CLASSES[1] in page.text


def test_it_says_that_nothing_was_noticed(look, tmp_path: Path):
    for copy in ("test/cat", f"train/{CLASSES[1]}"):
        (tmp_path / "my pictures" / copy / "9.jpg").unlink()
    code, said = look("model=small_cnn")
    assert code == 0 and "no problems found in the pictures\n" in said


def test_leaks_can_end_it_with_an_error(look, tmp_path: Path):
    code, said = look("model=small_cnn", "data.leaks=stop")
    assert code == 2 and "data.leaks=stop: 1 of the pictures of valid and test" in said
    assert (tmp_path / "out/care.html").exists()


def test_weights_that_can_not_be_had_leave_the_rest(look):
    code, said = look("model.name=resnet18", "model.weights=missing.pth")
    assert code == 0 and "model.weights=missing.pth: there is no such file" in said
    assert "in two classes: 1" in said


def test_pretrained_weights_judge_every_split(look, tmp_path: Path, monkeypatch):
    torch.manual_seed(0)
    network = build.build("small_cnn", 2)
    torch.save(network.backbone.state_dict(), tmp_path / "weights.pth")
    seen: dict[str, int] = {}
    monkeypatch.setattr(
        care.care,
        "judge",
        lambda findings, images, features, device: seen.update(
            {name: len(part()) for name, part in features.items()}
        ),
    )
    code, said = look("model=small_cnn", f"model.weights={tmp_path}/weights.pth")
    assert code == 0, said
    assert seen == {"train": 9, "valid": 4, "test": 5}


def test_a_folder_that_is_not_there_is_one_line(look, monkeypatch):
    monkeypatch.setattr("sys.argv", ["care", "/nowhere/at all"])
    assert care.main() == 2
