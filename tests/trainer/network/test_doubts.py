"""Labels that features contradict: right on what is known, silent where nothing is wrong."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.trainer.network import confident
from trainer.network import doubts

CPU = torch.device("cpu")
CLASSES, WIDTH = 12, 96


def features(
    count: int, seed: int = 0, spread: float = 2.3
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of classes that overlap: a linear probe is right in about 90 %."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, WIDTH))
    labels = np.arange(count) % CLASSES
    return (centres[labels] + spread * rng.normal(size=(count, WIDTH))).astype(np.float32), labels


def spoiled(labels: NDArray[np.int64], share: float, seed: int = 1) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
    given = labels.copy()
    given[chosen] = (labels[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
    return given


def rates(flagged: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> tuple[float, float]:
    hits = (flagged & wrong).sum()
    return hits / flagged.sum(), hits / wrong.sum()


@pytest.mark.parametrize("count", [60, 300], ids=["fewer than features", "more"])
def test_left_out_means_fitted_without_it(count: int):
    """Against a fit of its own for every image: the closed form is exact."""
    seen, labels = features(count)
    directions = doubts.unit(torch.from_numpy(seen).double())
    target = torch.from_numpy(labels)
    scores = doubts.leave_one_out(directions, target)

    def alone(left_out: int, ridge: float) -> torch.Tensor:
        """Ridge regression with an intercept that isn't penalised."""
        kept = torch.arange(count) != left_out
        design = torch.cat([directions, torch.ones(count, 1)], 1).double()
        penalty = ridge * torch.eye(WIDTH + 1).double()
        penalty[-1, -1] = 0
        gram = design[kept].T @ design[kept] + penalty
        truth = torch.nn.functional.one_hot(target[kept], CLASSES).double()
        return design[left_out] @ torch.linalg.solve(gram, design[kept].T @ truth)

    errors = [
        max(
            (alone(number, ridge) - scores[number]).abs().max().item() for number in range(0, 60, 7)
        )
        for ridge in doubts.RIDGES
    ]
    assert min(errors) < 1e-5


def test_wrong_labels_are_found_and_right_ones_left_alone():
    seen, labels = features(600)
    hits = flags = wrongs = corrected = 0
    for draw in range(5):
        given = spoiled(labels, 0.05, draw)
        verdict = doubts.judge(seen, given, CPU)
        assert 0.8 < verdict.right < 0.95
        flagged, wrong = verdict.wrong > doubts.DOUBT, given != labels
        hits, flags, wrongs = (
            hits + (flagged & wrong).sum(),
            flags + flagged.sum(),
            wrongs + wrong.sum(),
        )
        corrected += (flagged & wrong & (verdict.rather == labels)).sum()
    assert hits / flags >= 0.8 and hits / wrongs >= 0.8, (hits, flags, wrongs)
    assert corrected / hits > 0.9


def test_it_is_no_worse_than_confident_learning():
    seen, labels = features(600)
    given = spoiled(labels, 0.05)
    target = torch.from_numpy(given)
    scores = doubts.leave_one_out(doubts.unit(torch.from_numpy(seen)), target).double()
    losses = {
        warmth: torch.nn.functional.cross_entropy(scores * warmth, target).item()
        for warmth in doubts.TEMPERATURES
    }
    probabilities = (scores * min(losses, key=losses.__getitem__)).softmax(1).numpy()
    theirs = rates(confident.by_noise_rate(probabilities, given), given != labels)
    ours = rates(doubts.judge(seen, given, CPU).wrong > doubts.DOUBT, given != labels)

    def f1(precision: float, recall: float) -> float:
        return 2 * precision * recall / (precision + recall)

    assert f1(*ours) >= f1(*theirs)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_doubted_where_nothing_is_wrong(seed: int):
    seen, labels = features(360, seed)
    assert (doubts.judge(seen, labels, CPU).wrong > doubts.DOUBT).mean() <= 0.01


def test_features_that_know_nothing_doubt_nothing():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(300, WIDTH)).astype(np.float32)
    verdict = doubts.judge(seen, rng.integers(CLASSES, size=300), CPU)
    assert verdict.right < 0.2
    assert (verdict.wrong == 0).all()


def test_a_class_of_a_few_images_is_not_judged():
    seen, labels = features(240)
    labels = np.append(labels, [CLASSES, CLASSES, CLASSES + 3])
    seen = np.concatenate([seen, seen[:3]])
    assert (doubts.judge(seen, labels, CPU).wrong[-3:] == 0).all()


def test_what_is_unlike_all_others_is_told():
    seen, labels = features(300, spread=1.0)
    seen[7] = 2 * np.random.default_rng(9).normal(size=WIDTH)
    unlike = doubts.judge(seen, labels, CPU).unlike
    assert unlike.argmax() == 7 and unlike[7] > doubts.UNLIKE


@pytest.mark.parametrize("count", [2, 7, 8, 30])
def test_each_is_compared_with_all_others_whatever_the_blocks(monkeypatch, count: int):
    monkeypatch.setattr(doubts, "BLOCK", 7)
    directions = doubts.unit(torch.from_numpy(features(count)[0]))
    similarity = (directions @ directions.T).fill_diagonal_(-1)
    nearest = similarity.topk(min(doubts.NEAREST, count - 1)).values.mean(1).numpy()
    spread = 1.4826 * np.median(np.abs(nearest - np.median(nearest)))
    expected = (np.median(nearest) - nearest) / max(spread, 1e-6)
    np.testing.assert_allclose(doubts.unlikeness(directions), expected, rtol=1e-3, atol=1e-3)


def test_no_random_number_is_drawn():
    seen, labels = features(120)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    doubts.judge(seen, labels, CPU)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_features_that_are_no_numbers_are_refused():
    seen, labels = features(60)
    seen[3, 5] = np.nan
    with pytest.raises(RuntimeError, match="finite"):
        doubts.judge(seen, labels, CPU)
