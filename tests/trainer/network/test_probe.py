import numpy as np
import pytest
import torch
from torch.nn import functional

from trainer.network import probe


def blobs(count: int, classes: int, width: int, spread: float, seed: int = 0):
    """Features around a random centre of each class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(9).normal(size=(classes, width))
    features = centres[labels] + spread * rng.normal(size=(count, width))
    return features.astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize(("count", "width"), [(60, 8), (40, 100)], ids=["long", "wide"])
def test_it_is_solved_to_its_optimum(count, width):
    features, labels = blobs(count, 4, width, 1.5)
    solved = probe.fit(features, labels, 4, seed=0)
    weight = solved.weight.double().requires_grad_()
    bias = solved.bias.double().requires_grad_()
    inputs = torch.from_numpy(features).double()
    # The penalty is of weights for features of mean squared length 1.
    scale = (inputs - inputs.mean(dim=0)).square().sum(dim=1).mean()
    loss = functional.cross_entropy(inputs @ weight.T + bias, torch.from_numpy(labels))
    loss = loss + solved.penalty / 2 * scale * weight.square().sum()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert all(slope.abs().max() < 2e-4 for slope in slopes)


def test_the_logits_are_of_probes_that_did_not_see_the_image():
    features, labels = blobs(80, 4, 200, 1.0)
    rng = np.random.default_rng(1)
    nonsense = rng.permutation(labels)
    honest = probe.fit(features, labels, 4, seed=0)
    assert probe.correct(honest.logits, labels).mean() > 0.95
    # With more dimensions than images anything can be learned by heart.
    by_heart = probe.fit(features, nonsense, 4, seed=0)
    assert probe.correct(by_heart.logits, nonsense).mean() < 0.5
    assert probe.correct(honest.of(features), labels).all()


def test_the_penalty_is_that_with_the_least_loss_outside():
    clean = probe.fit(*blobs(200, 4, 20, 0.3), 4, seed=0)
    noisy = probe.fit(*blobs(200, 4, 20, 4.0), 4, seed=0)
    assert noisy.penalty > clean.penalty


def test_all_views_train_and_the_first_is_judged():
    features, labels = blobs(60, 3, 10, 0.5)
    opposite = features[np.argsort(labels, kind="stable")[::-1]]
    # Mirrored images that look like other classes make a worse probe.
    alone = probe.fit(features, labels, 3, seed=0)
    both = probe.fit(np.stack([features, opposite], axis=1), labels, 3, seed=0)
    assert both.logits.shape == (60, 3)
    target = torch.from_numpy(labels)
    worse = probe.calibrated_losses(both.logits, target).mean()
    assert worse > probe.calibrated_losses(alone.logits, target).mean()


def test_none_wrong_of_few_is_no_certainty():
    assert probe.error_of_share(np.ones(40, np.bool_)) > 0.02
    answers = np.arange(1000) % 4 > 0
    assert probe.error_of_share(answers) == pytest.approx(probe.standard_error(answers), rel=0.01)


def test_folds_have_equal_shares_of_each_class_and_hold_each_image_once():
    labels = np.repeat(np.arange(5), [7, 7, 9, 20, 3]).astype(np.int64)
    parts = probe.folds(labels, 5, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    for part in parts:
        counts = np.bincount(labels[part], minlength=5)
        assert (np.abs(counts - np.array([7, 7, 9, 20, 3]) / 5) < 1).all()
    assert [each.tolist() for each in probe.folds(labels, 5, 3)] == [
        part.tolist() for part in parts
    ]
    assert probe.folds(labels, 5, 4)[0].tolist() != parts[0].tolist()


def test_losses_are_compared_at_the_best_temperature():
    labels = torch.tensor([0, 1, 0, 1] * 20)
    logits = torch.stack([1.0 - labels, labels.float()], dim=1)
    logits[::7] = logits[::7].flip(1)  # some are wrong
    for factor in (0.2, 5.0):
        torch.testing.assert_close(
            probe.calibrated_losses(factor * logits, labels).mean(),
            probe.calibrated_losses(logits, labels).mean(),
            rtol=0.01,
            atol=0,
        )


def test_it_is_a_function_of_features_labels_and_seed():
    features, labels = blobs(50, 3, 30, 1.0)
    one, other = (probe.fit(features, labels, 3, seed=1) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("width", [8, 200], ids=["long", "wide"])
def test_threads_change_no_bit_and_are_given_back(monkeypatch, width):
    features, labels = blobs(90, 5, width, 1.0)
    before = torch.get_num_threads()
    solved = []
    used = set()
    for small in (probe.SMALL, 0):  # in one thread, and in as many as there are
        monkeypatch.setattr(probe, "SMALL", small)
        torch.set_num_threads(3)
        try:
            look = lambda: used.add(torch.get_num_threads())  # noqa: E731
            solved.append(probe.fit(features, labels, 5, seed=0, check=look))
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)
    one, many = solved
    assert used == {1}
    assert torch.equal(one.weight, many.weight) and torch.equal(one.logits, many.logits)


def test_a_stop_ends_it_at_the_next_look(monkeypatch):
    monkeypatch.setattr(probe, "SMALL", 0)  # with several threads
    looks = []

    def check():
        looks.append(None)
        if len(looks) >= 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        probe.fit(*blobs(90, 5, 8, 1.0), 5, seed=0, check=check)
    assert len(looks) <= 20 + probe.FOLDS


def test_the_folds_are_solved_near_enough_to_choose_as_exact_ones_would(monkeypatch):
    features, labels = blobs(200, 4, 20, 2.0)
    rough = probe.fit(features, labels, 4, seed=0)
    monkeypatch.setattr(probe, "ROUGH_CHANGE", 1e-12)
    monkeypatch.setattr(probe._Part, "rounded", lambda part: part)
    exact = probe.fit(features, labels, 4, seed=0)
    assert rough.penalty == exact.penalty
    torch.testing.assert_close(rough.logits.double(), exact.logits.double(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(rough.weight, exact.weight, rtol=1e-3, atol=1e-4)


def test_of_features_that_are_no_numbers_nothing_is_solved():
    features, labels = blobs(40, 4, 20, 1.0)
    features[3, 2] = np.nan
    looks = []
    solved = probe.fit(features, labels, 4, seed=0, check=lambda: looks.append(None))
    assert not looks and solved.logits.shape == (40, 4) and solved.weight.shape == (4, 20)
    assert solved.logits.isnan().all() and solved.weight.isnan().all() and solved.bias.isnan().all()
    assert probe.calibrated_losses(solved.logits, torch.from_numpy(labels)).isinf().all()


def test_one_class_is_solved():
    features, _ = blobs(40, 4, 20, 1.0)
    assert probe.fit(features, np.zeros(40, np.int64), 1, seed=0).logits.isfinite().all()
