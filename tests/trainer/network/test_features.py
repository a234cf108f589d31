import dataclasses
import fcntl
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_pictures
from tests.trainer.trainings import make_loader, open_training
from trainer.common.errors import Interrupted
from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.images.loader import ImageLoader
from trainer.network import build as model
from trainer.network import features
from trainer.network.device import Machine
from trainer.network.features import FeatureCache, FeatureLoader
from trainer.training.loop import fit

MACHINE = Machine(torch.device("cpu"), torch.float32)


def extract(
    network: model.Classifier, feed: ImageLoader, cache: Path, stop: Stop | None = None
) -> FeatureLoader:
    return FeatureCache(network, feed, MACHINE, cache).extract(stop or Stop(), World())


@pytest.fixture
def feed(pictures):
    return dataclasses.replace(make_loader(pictures), views=2)


def frozen_network(seed: int = 0) -> model.Classifier:
    torch.manual_seed(seed)
    return model.build("small_cnn", 3, freeze="backbone")


def test_training_on_features_is_training_on_the_same_views(tmp_path, feed, configure):
    config = configure(
        "model=small_cnn", "optim=sgd", "optim.lr=0.02", "optim.weight_decay=1e-4",
        "train.epochs=5",
        "train.batch_size=8", "train.ema_decay=0.9", "model.freeze=backbone", "data.size=16",
    )  # fmt: skip
    whole, cached = frozen_network(), frozen_network()
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
    start = frozen_network().head.state_dict()
    assert not torch.equal(start["weight"], whole.head.state_dict()["weight"])


def test_the_views_differ_and_the_epochs_take_them_in_turn(tmp_path, feed):
    extracted = extract(frozen_network(), feed, tmp_path)
    assert not np.array_equal(extracted.views[0], extracted.views[1])
    shown = [next(extracted.train_batches(epoch)).image for epoch in range(4)]
    for epoch in range(4):
        first = features.epoch_batches(24, feed.batch_size, feed.seed, epoch)[0]
        assert np.array_equal(shown[epoch].numpy(), extracted.views[epoch % 2][first])


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
    assert not [
        path for path in (tmp_path / "cut").rglob("*") if path.suffix in (".partial", ".rows")
    ]


def test_rows_that_were_not_safe_on_disk_are_computed_again(tmp_path, feed):
    whole = extract(frozen_network(), feed, tmp_path)
    (complete,) = tmp_path.rglob("train-1.f32")
    expected = complete.read_bytes()
    # As after a power cut: the file has its length, but only its beginning was ever said to be
    # safe.
    complete.with_suffix(".partial").write_bytes(expected[: len(expected) // 2] + b"\0" * 4096)
    complete.with_suffix(".rows").write_text("0")
    complete.unlink()
    again = extract(frozen_network(), feed, tmp_path)
    assert np.array_equal(whole.views[1], again.views[1])


def key(network, feed, precision=torch.float32) -> str:
    return features._key(network, feed, precision)


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
        key(
            frozen_network(),
            make_loader(make_pictures(tmp_path, {"train": 8, "valid": 3, "test": 3})),
        ),
    ]
    assert len({usual, *others}) == 7
    assert usual == key(frozen_network(), dataclasses.replace(feed, batch_size=16, workers=3))


def test_a_second_run_waits_for_the_first_and_can_be_stopped_meanwhile(tmp_path, feed):
    network = frozen_network()
    directory = tmp_path / "features" / key(network, feed)
    directory.mkdir(parents=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop = Stop()
        stop.ask("the test")
        with pytest.raises(Interrupted):
            extract(network, feed, tmp_path, stop)
    assert extract(network, feed, tmp_path).valid.shape == (
        9,
        network.features_width,
    )
