"""Temperature, sets, distance and the calibration error, on pictures whose truth is known."""

import numpy as np
import pytest

from trainer.common import temperature
from trainer.results import calibrate
from trainer.results.calibrate import Calibration, fit, measure


def draw(count: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [count, 10] and labels that softmax(sharpness * logits) is the truth about."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((count, 10)) / sharpness
    probabilities = Calibration().probabilities(sharpness * logits)
    labels = (probabilities.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    return logits.astype(np.float32), labels


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    probabilities = Calibration(temperature).probabilities(logits)
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_the_temperature_is_what_the_labels_say(sharpness):
    chosen, notes = calibrate.temperature(*draw(5000, sharpness))
    assert chosen == pytest.approx(1 / sharpness, rel=0.05) and notes == []


def test_the_temperature_is_the_optimum():
    logits, labels = draw(300, 2.0)
    chosen = temperature.optimum(logits.astype(np.float64), labels, caution=0.0)
    steps = np.linspace(0.97, 1.03, 61) * chosen
    assert np.argmin([loss(logits, labels, step) for step in steps]) == 30


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_few_pictures_do_no_harm(sharpness):
    """Over 100 draws of 37 pictures; where nothing is to be mended, they cost 0.013 at most."""
    others = draw(5000, sharpness, seed=1000)
    changes = [
        loss(*others, calibrate.temperature(*draw(37, sharpness, seed))[0]) - loss(*others, 1)
        for seed in range(100)
    ]
    if sharpness == 1:
        assert np.mean(changes) < 0.013
    else:
        assert np.mean(changes) < -0.14 and np.max(changes) <= 0


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (np.zeros((0, 3)), [], "no valid picture"),
        (np.full((5, 3), 7.0), [0, 1, 2, 0, 1], "say nothing"),
        (np.full((5, 3), np.nan), [0, 1, 2, 0, 1], "say nothing"),
        (np.eye(3)[[0, 1]], [0, 0], "doesn't help others"),  # one says less, one says more
        (np.eye(3)[[0]], [0], "doesn't help others"),  # there are none
    ],
)
def test_what_says_nothing_changes_nothing_and_is_told(logits, labels, said):
    calibration, notes = fit(logits, np.array(labels, np.int64), np.zeros(len(labels)))
    assert (calibration.temperature, calibration.least_probability) == (1.0, 0.0)
    assert said in notes[0] and "too few for sets" in notes[1]
    assert calibration.farthest is None and "too few to tell what is unlike" in notes[2]


@pytest.mark.parametrize(("wrong", "end"), [(False, temperature.LEAST), (True, temperature.MOST)])
def test_the_temperature_has_two_bounds(wrong, end):
    labels = np.arange(3000) % 3
    logits = 0.01 * np.eye(3)[labels]
    if wrong:
        logits = -10_000 * logits
    assert calibrate.temperature(logits, labels)[0] == pytest.approx(end)


@pytest.mark.parametrize("count", [9, 37, 400])
def test_sets_hold_the_right_class_in_90_percent(count):
    """In the mean over calibrations: at least 0.9, at most 0.9 + 1 / (count + 1) (Vovk)."""
    coverage = []
    for seed in range(100):
        calibration, notes = fit(*draw(count, 2.0, seed))
        assert not notes or "doesn't help" in notes[0]
        coverage.append(measure(calibration, "test", *draw(500, 2.0, 500 + seed)).coverage)
    error = np.std(coverage) / 10
    assert 0.9 - 3 * error < np.mean(coverage) < 0.9 + 1 / (count + 1) + 3 * error


def test_fewer_than_nine_pictures_give_sets_of_all_classes():
    calibration, notes = fit(*draw(8, 1.0))
    members = calibration.members(calibration.probabilities(draw(5, 1.0)[0]))
    assert members is not None and members.all()
    assert "8 pictures are too few for sets at 90%" in notes[-1]


def test_a_set_is_never_empty():
    calibration = Calibration(least_probability=0.9)
    members = calibration.members(np.array([[0.5, 0.3, 0.2], [0.95, 0.05, 0.0]]))
    assert members is not None and members.tolist() == [[True, False, False]] * 2
    assert Calibration().members(np.ones((1, 1))) is None


@pytest.mark.parametrize(("count", "allowed"), [(20, 0.02), (98, 0.015), (99, 0.012), (500, 0.011)])
def test_about_one_percent_of_new_pictures_are_unlike(count, allowed):
    rng = np.random.default_rng(0)
    limits = [calibrate.limit(rng.normal(0.3, 0.05, count)) for _ in range(200)]
    new = rng.normal(0.3, 0.05, 20_000)
    shares = [float((new > limit).mean()) for limit in limits]
    assert 0.5 * allowed / 2 < np.mean(shares) < allowed


def test_unlike_is_said_where_it_is_known():
    assert Calibration(farthest=0.4).unlike(np.array([0.3, 0.5])).tolist() == [False, True]
    assert Calibration(farthest=0.4).unlike(None) is None
    assert Calibration().unlike(np.array([0.3])) is None
    members = np.array([[True, False], [True, True], [True, False]])
    assert calibrate.is_sure(members, np.array([False, False, True])).tolist() == [
        True,
        False,
        False,
    ]


def test_the_calibration_error_by_hand():
    # Three at 0.6, of which one is right; one at 1.0, which is.
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.4, 0.6], [1.0, 0.0]])
    bins = calibrate.reliability(probabilities, np.array([0, 1, 0, 0]))
    assert [(each.count, each.right) for each in bins] == [(3, pytest.approx(1 / 3)), (1, 1.0)]
    assert calibrate.calibration_error(bins) == pytest.approx(3 / 4 * (0.6 - 1 / 3))


def test_a_measure_says_all_of_it_in_one_line():
    calibration, _ = fit(*draw(400, 3.0), np.linspace(0, 1, 400))
    quality = measure(calibration, "test", *draw(2000, 3.0, seed=9), np.linspace(0, 1, 2000))
    assert quality.error < quality.error_before / 2
    facts = quality.facts()
    assert facts["error"] == round(quality.error, 6) and facts["pictures"] == 400
    assert facts["unlike"] == pytest.approx(0.01, abs=0.005)
    assert quality.line().count("\n") == 0
    for part in (
        "temperature 0.3",
        "by 400 pictures that",
        "% before",
        "asked: 90%",
        "sure of",
    ):
        assert part in quality.line()
    assert fit(*draw(400, 3.0), np.linspace(0, 1, 400))[0] == calibration  # the same bits
