import dataclasses
import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import QUICK
from tests.trainer.trainings import make_loader, open_training
from trainer.common import journal
from trainer.common.console import log
from trainer.common.errors import Interrupted
from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.images.loader import PLAIN, ImageLoader
from trainer.network import build as model
from trainer.network import features
from trainer.network.device import Machine
from trainer.network.features import FeatureCache, FeatureLoader
from trainer.results import outcome
from trainer.results.outcome import mean_features
from trainer.training.loop import fit

MACHINE = Machine(torch.device("cpu"), torch.float32)


def extract(
    network: model.Classifier, feed: ImageLoader, cache: Path, stop: Stop | None = None
) -> FeatureLoader:
    return FeatureCache(network, feed, MACHINE, cache).extract(stop or Stop(), World())


@pytest.fixture
def feed(pictures):
    return make_views(pictures)


def frozen_network(seed: int = 0) -> model.Classifier:
    torch.manual_seed(seed)
    return model.build("small_cnn", 3, freeze="backbone")


@pytest.mark.parametrize("flip", [False, True])
def test_training_on_features_is_training_on_the_same_views(tmp_path, feed, configure, flip):
    config = configure(
        "model=small_cnn", "optim=sgd", "optim.lr=0.02", "optim.weight_decay=1e-4",
        "train.epochs=5",
        "train.batch_size=8", "train.ema_decay=0.9", "model.freeze=backbone", "data.size=16",
    )  # fmt: skip
    whole, cached = frozen_network(), frozen_network()
    whole.averages_flip = cached.averages_flip = flip
    on_pixels = open_training(tmp_path / "pixels", config, feed, whole, data=feed)
    data = extract(cached, feed, tmp_path / "cache")
    on_features = open_training(tmp_path / "features", config, feed, cached, data=data)
    fit(on_pixels)
    fit(on_features)
    torch.testing.assert_close(
        whole.head.state_dict(), cached.head.state_dict(), rtol=1e-4, atol=1e-5
    )
    rows = zip(on_pixels.metrics_file.rows, on_features.metrics_file.rows, strict=True)
    for row, other in rows:
        assert row["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-4)
        assert row["valid_top1"] == other["valid_top1"]
    cached.averages_flip = False
    without = extract(cached, feed, tmp_path / "cache")  # the same files, whatever is averaged
    assert without.mirrored is None and np.array_equal(without.valid, data.valid)
    on_plain = open_training(tmp_path / "plain", config, feed, frozen_network(), data=without)
    fit(on_plain)
    last = on_plain.metrics_file.rows[-1]["valid_loss"]
    assert (last == pytest.approx(on_features.metrics_file.rows[-1]["valid_loss"])) != flip
    start = frozen_network().head.state_dict()
    assert not torch.equal(start["weight"], whole.head.state_dict()["weight"])


def test_the_views_differ_and_the_epochs_take_them_in_turn(tmp_path, feed):
    extracted = extract(frozen_network(), feed, tmp_path)
    assert not np.array_equal(extracted.views[0], extracted.views[1])
    shown = [next(extracted.train_batches(epoch)).image for epoch in range(4)]
    for epoch in range(4):
        first = feed.epoch(epoch)[0]
        assert np.array_equal(shown[epoch].numpy(), extracted.views[epoch % 2][first])


def test_the_classes_means_are_of_the_features_that_a_head_was_solved_on(
    tmp_path, feed, configure, monkeypatch
):
    monkeypatch.setattr(outcome, "FOR_MEANS", 2)  # of each class
    config = configure("model=small_cnn", f"platform.cache={tmp_path}/cache", *QUICK)
    network = frozen_network()
    data = extract(network, feed, tmp_path / "cache")
    training = open_training(tmp_path / "run", config, feed, network, data=data)
    by_pixels = mean_features(training)
    training.feature_cache.of("train", PLAIN, Stop())
    config.model.head = "probe"
    monkeypatch.setattr(ImageLoader, "eval_batches", None)  # no pixel is looked at again
    torch.testing.assert_close(mean_features(training), by_pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("most", "rounded"), [(1.0, True), (0.0, False)])
def test_train_alone_is_rounded_and_only_where_that_changes_little(
    tmp_path, feed, monkeypatch, caplog, most, rounded
):
    caplog.set_level("INFO", log.name)
    monkeypatch.setattr(features, "ROUNDING", most)
    exact = extract(frozen_network(), feed, tmp_path / "exact")
    machine = dataclasses.replace(MACHINE, frozen=torch.bfloat16)
    cache = FeatureCache(frozen_network(), feed, machine, tmp_path / "cache")
    both = cache.extract(Stop(), World())
    cache.tell()
    assert np.array_equal(both.valid, exact.valid)
    for view, other in zip(both.views, exact.views, strict=True):
        assert np.array_equal(view, other) != rounded
        assert np.abs(view - other).max() < 0.05 * np.abs(other).max()
    words = "bfloat16" if rounded else "float32"
    assert f"features of train: in {words}; rounding to bfloat16 is 0." in caplog.text
    # What was found isn't computed again, for other pictures of the same network neither.
    monkeypatch.setattr(features, "compute", None)
    again = FeatureCache(frozen_network(), feed, machine, tmp_path / "cache")
    assert equal(again.extract(Stop(), World()), both)
    assert again.of_other(feed).of("train", 0, Stop()).shape == both.views[0].shape


def test_an_epoch_goes_on_from_any_batch(tmp_path, feed):
    extracted = extract(frozen_network(), feed, tmp_path)
    all_of_them = [*extracted.train_batches(1)]
    for first in range(len(all_of_them)):
        rest = [*extracted.train_batches(1, first)]
        for batch, other in zip(rest, all_of_them[first:], strict=True):
            assert torch.equal(batch.image, other.image)
            assert torch.equal(batch.target, other.target)


def test_what_is_cached_is_not_computed_again(tmp_path, feed):
    network = frozen_network()
    before = extract(network, feed, tmp_path)

    def fail(*arguments):
        raise AssertionError("computed again")

    network.backbone.register_forward_pre_hook(fail)
    after = extract(network, feed, tmp_path)
    assert all(
        np.array_equal(one, other) for one, other in zip(before.views, after.views, strict=True)
    )
    assert np.array_equal(before.valid, after.valid)


@pytest.mark.parametrize("at", range(6))
def test_an_interrupted_extraction_goes_on_to_the_same_features(tmp_path, feed, at, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 8)
    whole = extract(frozen_network(), feed, tmp_path / "whole")
    network, stop, seen = frozen_network(), Stop(), []

    def count(*arguments):
        seen.append(1)
        if len(seen) == at + 1:
            stop.ask("the test")

    network.backbone.register_forward_pre_hook(count)
    with pytest.raises(Interrupted):
        extract(network, feed, tmp_path / "cut", stop)
    cut = extract(network, feed, tmp_path / "cut")
    assert len(seen) == 3 + 3 + 2  # 24, 24 and 9 pictures in batches of 8, none of them twice
    assert all(
        np.array_equal(one, other)
        for one, other in zip((*whole.views, whole.valid), (*cut.views, cut.valid), strict=True)
    )


def test_blocks_that_were_not_safe_on_disk_are_computed_again(tmp_path, feed, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 8)
    whole = extract(frozen_network(), feed, tmp_path)
    (sums,) = tmp_path.rglob("train-0.sums")
    data = sums.with_suffix(".f32")
    # As after a power cut: the file has its length, but only its beginning is said to be safe.
    sums.write_bytes(sums.read_bytes().splitlines(keepends=True)[0])
    length = data.stat().st_size
    data.write_bytes(data.read_bytes()[: length // 2].ljust(length, b"\0"))
    assert equal(extract(frozen_network(), feed, tmp_path), whole)


def make_views(pictures: Path) -> ImageLoader:
    return dataclasses.replace(make_loader(pictures), views=2)


def key(network, feed, precision=torch.float32, view=0) -> str:
    facts = features._facts(network, feed, precision, view)
    return features._key(facts | {"weights": model.identity(network)})


def test_whatever_the_features_depend_on_is_in_their_key(tmp_path, feed):
    usual = key(frozen_network(), feed)
    assert usual == key(frozen_network(), feed)
    others = [
        key(frozen_network(seed=1), feed),
        key(frozen_network(), feed, torch.bfloat16),
        key(frozen_network(), dataclasses.replace(feed, seed=8)),
        key(
            frozen_network(),
            dataclasses.replace(
                feed, augmentation=dataclasses.replace(feed.augmentation, flip=False)
            ),
        ),
        key(
            frozen_network(),
            dataclasses.replace(
                feed, preprocessing=dataclasses.replace(feed.preprocessing, size=12)
            ),
        ),
        key(other_padding(), feed),
        key(other_version(), feed),
    ]
    assert len({usual, *others}) == 8
    assert usual == key(frozen_network(), dataclasses.replace(feed, batch_size=16, workers=3))


def other_padding() -> model.Classifier:
    """Equal tensors, as efficientnet_b0's and tf_efficientnet_b0's: another architecture."""
    network = frozen_network()
    network.backbone[0].padding = (2, 2)
    return network


def other_version() -> model.Classifier:
    network = frozen_network()
    network.name = "timm/small_cnn"
    return network


def test_the_key_follows_the_content_of_the_pictures_and_not_their_place(tmp_path, feed, pictures):
    usual = key(frozen_network(), feed)
    shutil.copytree(pictures, tmp_path / "moved")
    assert key(frozen_network(), make_views(tmp_path / "moved")) == usual
    path = tmp_path / "moved/train/circle/000.png"
    status = path.stat()
    swapped = tmp_path / "moved/train/circle/001.png"
    data, other = path.read_bytes(), swapped.read_bytes()
    path.write_bytes(other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key(frozen_network(), make_views(tmp_path / "moved")) != usual
    path.write_bytes(data)
    assert key(frozen_network(), make_views(tmp_path / "moved")) == usual


# --- a cache that isn't what was written ---


def equal(one: FeatureLoader, other: FeatureLoader) -> bool:
    pairs = zip((*one.views, one.valid), (*other.views, other.valid), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS = {
    "flipped": flip_a_bit,
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 5),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "another's": lambda path: path.write_bytes(journal.lines([("a", "b", 1), ("a", [])])),
}


@pytest.mark.parametrize("name", ["train-0.f32", "train-0.sums", "valid-plain.f32"])
@pytest.mark.parametrize("harm", HARMS)
def test_damaged_features_are_computed_again(tmp_path, feed, monkeypatch, name, harm):
    monkeypatch.setattr(features, "BATCH", 8)
    whole = extract(frozen_network(), feed, tmp_path)
    (path,) = tmp_path.rglob(name)
    HARMS[harm](path)
    network, seen = frozen_network(), []
    network.backbone.register_forward_pre_hook(lambda *arguments: seen.append(1))
    assert equal(extract(network, feed, tmp_path), whole)
    assert len(seen) <= 3
    if harm in ("flipped", "cut off"):
        assert len(seen) == 1
    seen.clear()
    assert equal(extract(network, feed, tmp_path), whole)
    assert not seen


def test_a_cache_folder_that_vanishes_or_can_not_be_written_costs_time_alone(
    tmp_path, feed, caplog
):
    whole = extract(frozen_network(), feed, tmp_path / "good")
    (tmp_path / "file").write_text("where the folder should be")
    assert equal(extract(frozen_network(), feed, tmp_path / "file"), whole)
    assert "kept in memory only" in caplog.text
    network = frozen_network()
    network.backbone.register_forward_pre_hook(
        lambda *_: shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    )
    result = extract(network, feed, tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    assert equal(result, whole)


def test_a_second_run_waits_for_the_first_and_can_be_stopped_meanwhile(tmp_path, feed):
    network = frozen_network()
    directory = tmp_path / "features" / key(network, feed)
    directory.mkdir(parents=True)
    with (directory / ".lock-train-0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop = Stop()
        stop.ask("the test")
        with pytest.raises(Interrupted):
            extract(network, feed, tmp_path, stop)
    assert extract(network, feed, tmp_path).valid.shape == (
        9,
        network.features_width,
    )
