import dataclasses

import numpy as np
import pytest

from tests.trainer.trainings import make_loader
from trainer.images.sampler import balanced_order, random_order

LABELS = np.repeat([0, 1, 2], [60, 25, 4])  # 89 of them: 30, 30 and 29 of a class


def test_an_epoch_has_as_many_of_each_class():
    order = balanced_order(LABELS, seed=3, epoch=0)
    assert sorted(np.bincount(LABELS[order % 89])) == [29, 30, 30] and len(order) == 89
    assert len(np.unique(order)) == 89  # what comes again has another number
    counts = np.bincount(order % 89, minlength=89)
    assert set(counts[:60]) == {0, 1} and set(counts[60:85]) <= {1, 2} and min(counts[85:]) >= 7
    assert (order[order >= 89] % 89 >= 60).all()


def test_it_is_a_function_of_seed_and_epoch_alone():
    one = balanced_order(LABELS, 3, 0)
    assert np.array_equal(one, balanced_order(LABELS, 3, 0))
    for seed, epoch in ((3, 1), (4, 0)):
        other = balanced_order(LABELS, seed, epoch)
        assert not np.array_equal(one, other) and set(one[one < 60]) != set(other[other < 60])


def test_a_random_order_is_another_in_each_epoch_and_for_each_seed():
    orders = [random_order(24, seed, epoch).tolist() for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    assert len({*map(tuple, orders)}) == 3 and random_order(24, 3, 0).tolist() == orders[0]


@pytest.mark.parametrize("kept", [None, 2])
def test_views_are_new_in_each_epoch_or_taken_in_turn(pictures, kept):
    loader = dataclasses.replace(make_loader(pictures), views=kept, batch_size=24, balanced=False)
    shown = []
    for epoch in range(3):  # all pictures, in their own order
        (batch,) = loader.train_batches(epoch)
        shown.append(batch.image[np.argsort(loader.epoch(epoch)[0])])
    assert not np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0], shown[2]) == (kept == 2)


def test_every_picture_of_a_large_class_has_its_turn_and_none_its_place():
    orders = [balanced_order(LABELS, 0, epoch) % 89 for epoch in range(40)]
    seen = np.bincount(np.concatenate(orders), minlength=89)
    assert seen[:60].min() > 8 and seen[:60].max() < 32  # of 20, sd 3.2
    firsts = np.bincount([LABELS[order[0]] for order in orders], minlength=3)
    assert firsts.min() >= 5


def test_classes_of_one_size_are_only_put_in_order():
    labels = np.repeat([0, 1, 2], 8)
    order = balanced_order(labels, 0, 0)
    assert sorted(order) == list(range(24)) == sorted(random_order(24, 0, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_comes_again_is_seen_in_another_view(pictures, workers):
    loader = make_loader(pictures, workers)
    train = loader.folder.splits["train"]
    few = [0, 8, *range(16, 24)]  # one of each of the first two classes, and 8 of the third
    paths = tuple(train.paths[place] for place in few)
    train = dataclasses.replace(train, paths=paths, labels=train.labels[few])
    folder = dataclasses.replace(loader.folder, splits=loader.folder.splits | {"train": train})
    loader = dataclasses.replace(loader, folder=folder, batch_size=10)
    (batch,) = loader.train_batches(0)
    assert sorted(np.bincount(batch.target)) == [3, 3, 4]
    # Two may come out equally black; if what comes again looked the same there were 6.
    assert len({image.numpy().tobytes() for image in batch.image}) > 8
    (again,) = loader.train_batches(0)
    assert np.array_equal(batch.image, again.image)
