"""A run that looks at its images: what it tells, what it changes (nothing), and its two figures."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.scenes import write_scenes
from tests.trainer.trainings import make_run, outcome
from trainer.common.errors import UserError
from trainer.images.datasets import find_images
from trainer.network import doubts
from trainer.results import outcome as results
from trainer.results.report import Report
from trainer.training import care
from trainer.training.loop import fit
from trainer.training.training import Training, build_training

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With one file of train in test, one in valid, and one twice in train."""
    root = write_scenes(tmp_path / "data", {"train": 6, "valid": 3, "test": 3}, CLASSES)
    shutil.copy(root / "train/dog/1.jpg", root / "test/dog/9.jpg")
    shutil.copy(root / "train/dog/2.jpg", root / "valid/dog/9.jpg")
    shutil.copy(root / "train/owl/3.jpg", root / "train/owl/9.jpg")
    return root


@pytest.fixture
def train(tmp_path: Path, root: Path, configure):
    def train(name: str, *overrides: str, looks: bool = True) -> Training:
        config = configure(
            "data=folder", f"data.root={root}", "model=small_cnn", "data.size=32", "data.resize=36",
            "train.epochs=2", "train.batch_size=8", "data.workers=0",
            f"platform.cache={tmp_path}/cache", *overrides,
        )  # fmt: skip
        images = find_images(config)
        run = make_run(tmp_path / name, config).resolved(images)
        training = build_training(dataclasses.replace(run, looks=looks), images)
        fit(training)
        return training

    return train


def test_the_test_figure_is_given_with_and_without_leaks(train, tmp_path, monkeypatch):
    training = train("warn")
    assert sorted(finding.kind for finding in training.findings.all) == ["copy", "leak", "leak"]
    assert (tmp_path / "warn/care.csv").read_text().count("leak") == 4
    tested = results.test(training)
    result = results.result(training, tested)
    assert result["pictures"] == 10 and result["without_leaks"]["pictures"] == 9
    assert len(tested.paths) == len(tested.labels) == 10

    dropping = train("drop", "data.leaks=drop")
    assert dropping.loader.folder.count("valid") == 9
    # What is dropped is part of what the pictures are: the run, started again, finds them the same.
    assert dropping.facts["identity"]["pictures"] == training.facts["identity"]["pictures"]
    dropped = results.test(dropping)
    result = results.result(dropping, dropped)
    assert result["pictures"] == 9 and result["with_leaks"]["pictures"] == 10
    assert len(dropped.paths) == len(dropped.labels) == len(dropped.probabilities) == 9
    assert not set(dropped.paths) & training.findings.leaked.keys()

    written: list[Report] = []
    monkeypatch.setattr(results.report, "write", lambda report, *rest: written.append(report))
    results.write_report(dropping, dropped)
    assert written[0].findings is dropping.findings and written[0].other is dropped.other


def test_the_figure_without_leaks_is_that_of_the_other_pictures(train):
    training = train("warn")
    tested = results.test(training)
    clean = [path not in training.findings.leaked for path in tested.paths]
    right = tested.probabilities.argmax(axis=1) == tested.labels
    assert tested.metrics["top1"] == pytest.approx(right.mean(), abs=1e-6)
    assert tested.other.metrics["top1"] == pytest.approx(right[clean].mean(), abs=1e-6)


def test_to_look_changes_no_bit(train):
    one, other = outcome(train("one")), outcome(train("other", looks=False))
    assert one.pop("facts") == other.pop("facts")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_who_does_not_look_still_drops(train, tmp_path):
    training = train("trial", "data.leaks=drop", looks=False)
    assert training.loader.folder.count("valid") == 9
    assert not (tmp_path / "trial/care.csv").exists()


def test_leaks_stop_a_run_before_it_trains(train, tmp_path):
    with pytest.raises(UserError, match=r"data\.leaks=stop: 2 of the pictures"):
        train("stop", "data.leaks=stop")
    assert not (tmp_path / "stop/metrics.jsonl").exists()


def test_near_leaks_are_dropped_without_packed_pixels_too(train, root):
    from PIL import Image

    with Image.open(root / "train/cat/1.jpg") as image:
        image.save(root / "test/cat/9.jpg", quality=50)
    plain = train("plain", "data.cache=none")
    assert len(plain.findings.leaked) == 2 and "near duplicates" in plain.findings.unseen[0]
    dropping = train("drop", "data.cache=none", "data.leaks=drop")
    assert len(dropping.findings.leaked) == 3


def test_features_of_a_pretrained_backbone_judge_the_labels(train, tmp_path, monkeypatch):
    network = train("first").network
    torch.save(network.backbone.state_dict(), tmp_path / "weights.pth")
    asked: list[tuple[int, ...]] = []
    judge = doubts.judge

    def judged(features, labels, device):
        asked.append(features.shape)
        return dataclasses.replace(judge(features, labels, device), right=1.0, wrong=wrong)

    wrong = np.zeros(29)
    wrong[4] = 0.9
    monkeypatch.setattr(doubts, "judge", judged)
    frozen = ("model.freeze=backbone", "model.cached_views=2")
    random = train("random", *frozen)
    assert asked == [] and not random.findings.of("doubt")
    training = train("frozen", *frozen, f"model.weights={tmp_path}/weights.pth")
    assert asked == [(29, network.features_width)]  # 19 of train, 10 of valid
    (finding,) = training.findings.of("doubt")
    assert finding.pictures[0].path == training.loader.folder.splits["train"].paths[4]
    assert "90%" in finding.note


def test_features_that_can_not_be_judged_end_no_run(train, monkeypatch):
    training = train("run")
    features = {"train": lambda: np.full((19, 4), np.nan, np.float32)}
    care.judge(training.findings, training.loader.folder, features, torch.device("cpu"))
    assert "not all finite" in training.findings.unseen[-1]
