"""Each line that is told of a data set, on tiny folders."""

import csv
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.scenes import scene, write_scenes
from trainer.common.errors import Interrupted, UserError
from trainer.images import care
from trainer.images.care import Findings, keep_or_stop
from trainer.images.folder import ImageFolder, read_shrunk, scan

CLASSES = ("cat", "dog")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "data", {"train": 4, "valid": 3, "test": 3}, CLASSES)


def scanned(root: Path) -> ImageFolder:
    return scan({split: str(root / split) for split in ("train", "valid", "test")}, 0.2)


def read(path: str) -> np.ndarray:
    return read_shrunk(path, 64, "bilinear")


def look(root: Path, **instead: object) -> Findings:
    options = {"read": read, "side": 48, "workers": 0, "on_progress": lambda done, total: None}
    return care.look(scanned(root), **(options | instead))


def told(findings: Findings) -> dict[str, set[tuple[str, ...]]]:
    """The images of each kind of finding, by their last two names."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for finding in findings.all:
        names = sorted(
            f"{each.split}/{each.label}/{Path(each.path).name}" for each in finding.pictures
        )
        kinds.setdefault(finding.kind, set()).add(tuple(names))
    return kinds


def test_nothing_is_said_of_good_pictures(root: Path):
    findings = look(root)
    assert findings.all == [] and list(findings.lines()) == []


def test_a_file_of_train_in_test_is_a_leak(root: Path):
    shutil.copy(root / "train/dog/1.jpg", root / "test/dog/9.jpg")
    findings = look(root)
    assert told(findings) == {"leak": {("test/dog/9.jpg", "train/dog/1.jpg")}}
    assert findings.leaked == {str(root / "test/dog/9.jpg"): True}
    (line, spoils), *more = findings.lines()
    assert line == (
        "pictures in train, and in valid or test too: 1 the same file, 0 nearly: "
        "train/dog/1.jpg = test/dog/9.jpg; data.leaks=drop leaves them out of the figures"
    )
    assert spoils and not more


def test_so_is_one_that_was_saved_again(root: Path):
    with Image.open(root / "train/dog/1.jpg") as image:
        image.resize((120, 90)).save(root / "valid/dog/9.jpg", quality=60)
    findings = look(root)
    assert told(findings) == {"leak": {("train/dog/1.jpg", "valid/dog/9.jpg")}}
    assert findings.leaked == {str(root / "valid/dog/9.jpg"): False}


def test_equal_bytes_are_told_without_any_pixels(root: Path):
    shutil.copy(root / "train/dog/1.jpg", root / "test/dog/9.jpg")
    shutil.copy(root / "train/dog/2.jpg", root / "train/dog/8.jpg")
    Image.new("RGB", (90, 90)).save(root / "train/dog/7.jpg")
    findings = look(root, read=None)
    assert told(findings).keys() == {"leak", "copy"}
    assert "near duplicates" in findings.unseen[0]


def test_what_is_too_small_to_compare_is_said_alike_by_each_attempt_packed_or_not(root: Path):
    assert look(root, side=16, read=None).unseen == look(root, side=16).unseen != []


def test_a_copy_within_a_split_is_no_leak(root: Path):
    shutil.copy(root / "train/dog/1.jpg", root / "train/dog/9.jpg")
    shutil.copy(root / "test/dog/1.jpg", root / "valid/dog/9.jpg")
    findings = look(root)
    assert told(findings) == {
        "copy": {("train/dog/1.jpg", "train/dog/9.jpg"), ("test/dog/1.jpg", "valid/dog/9.jpg")}
    }
    assert findings.leaked == {}


def test_one_picture_in_two_classes(root: Path):
    shutil.copy(root / "train/dog/1.jpg", root / "train/cat/9.jpg")
    shutil.copy(root / "train/dog/2.jpg", root / "test/cat/9.jpg")
    assert told(look(root)) == {
        "labels": {("train/cat/9.jpg", "train/dog/1.jpg"), ("test/cat/9.jpg", "train/dog/2.jpg")},
        "leak": {("test/cat/9.jpg", "train/dog/2.jpg")},
    }


def test_dark_blank_and_small_ones(root: Path):
    Image.new("RGB", (90, 80), (9, 3, 12)).save(root / "train/dog/7.jpg")
    Image.new("RGB", (90, 80), (200, 10, 90)).save(root / "train/dog/8.jpg")
    scene(99).resize((20, 11)).save(root / "train/dog/9.png")
    findings = look(root)
    assert told(findings) == {
        "dark": {("train/dog/7.jpg",)},
        "blank": {("train/dog/8.jpg",)},
        "small": {("train/dog/9.png",)},
    }
    assert "pictures much smaller than the network sees: 1: train/dog/9.png (20 x 11 pixels)" in {
        line for line, _ in findings.lines()
    }


def test_classes_of_very_different_sizes(root: Path):
    for number in range(40):
        scene(100 + number, 40, 30).save(root / f"train/cat/more-{number}.jpg")
    lines = [line for line, _ in look(root).lines()]
    assert lines == [
        "pictures in classes of very different sizes: train has 44 of class cat and 4 of "
        "class dog; train.imbalance=sampler or logits makes all classes count alike"
    ]
    findings = replace(look(root), balanced=True)
    assert [line for line, _ in findings.lines()] == [lines[0].split(";")[0]]


def test_the_csv_holds_all_of_it_whatever_a_file_is_called(root: Path):
    shutil.copy(root / "train/dog/1.jpg", root / 'train/dog/9, "ä"\n.jpg')
    rows = list(csv.DictReader(io.StringIO(look(root).csv())))
    assert [(row["number"], row["kind"], row["split"]) for row in rows] == [
        ("1", "copy", "train"),
        ("1", "copy", "train"),
    ]
    assert rows[1]["path"].endswith('9, "ä"\n.jpg')


def test_leaks_warn_drop_or_stop(root: Path):
    shutil.copy(root / "train/dog/1.jpg", root / "valid/dog/9.jpg")
    shutil.copy(root / "train/dog/2.jpg", root / "test/dog/9.jpg")
    images, findings = scanned(root), look(root)
    assert keep_or_stop(images, findings, "warn") is images
    kept = keep_or_stop(images, findings, "drop")
    assert kept.count("train") == 8 and kept.count("valid") == 6
    assert kept.count("test") == 7  # its figure is given with and without them
    assert str(root / "valid/dog/9.jpg") not in kept.splits["valid"].paths
    with pytest.raises(UserError, match=r"2 of the pictures of valid and test .*data\.leaks=drop"):
        keep_or_stop(images, findings, "stop")
    assert keep_or_stop(images, Findings(), "stop") is images


def test_a_split_of_nothing_but_leaks_is_not_dropped_without_a_word(root: Path):
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    with pytest.raises(UserError, match="all pictures of test are in train too"):
        keep_or_stop(scanned(root), look(root), "drop")


def test_it_counts_and_can_be_stopped(root: Path):
    steps: list[tuple[int, int]] = []
    look(root, workers=2, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps) and steps[-1] == (40, 40)

    def stop(done: int, total: int) -> None:
        raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        look(root, workers=2, on_progress=stop)
