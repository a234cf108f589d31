"""Advice for the next run: each observation with a command to try."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.images.care import Findings
from trainer.results.intervals import wilson_interval
from trainer.results.text import percent
from trainer.training.recipe import Recipe

# Thresholds found by eye on the project's own sets. They only give advice.
OVERFITS = 0.1  # points of accuracy between train and valid
LEARNED = 0.9  # accuracy on train above which there is nothing left to learn there
FEW = 20  # pictures of a class to train on
WIDE = 0.1  # an interval from end to end
UNEVEN = 10.0  # times as many pictures in the largest class as in the smallest
FALLS = 0.03  # share of the loss of valid, in the last fifth of the epochs
WAITS = 0.3  # share of the training time

Command = Callable[..., str]  # from settings as words: the command of this run with these settings


@dataclass(frozen=True)
class Advice:
    """An observation, what helps, and the command; "" if there is none."""

    seen: str
    helps: str
    command: str = ""


@dataclass(frozen=True)
class Known:
    """The facts for the advice.

    history: as in `Report`. counts: images of each class [C], by split. hits: right predictions
    among the `pictures` of `split`. again: returns the command.
    """

    history: Sequence[Mapping[str, float]]
    best_epoch: int
    config: Mapping[str, Any]
    counts: Mapping[str, NDArray[np.int64]]
    split: str
    hits: int
    pictures: int
    findings: Findings
    recipe: Recipe | None
    again: Command


def advice(known: Known) -> list[Advice]:
    """Return the advice, the most important first."""
    parts = (_leaks, _labels, _overfits, _unfinished, _uneven, _few, _wide, _tie, _waits)
    return [each for part in parts for each in part(known)]


def _leaks(known: Known) -> Iterator[Advice]:
    leaks = len(known.findings.leaked)
    if leaks and known.config.get("data.leaks") == "warn":
        yield Advice(
            f"{_counted(leaks, 'picture of valid or test is', 'pictures of valid or test are')} "
            "in train too.",
            "The figures look better than they are. Leave these pictures out of them.",
            known.again("data.leaks=drop"),
        )


def _labels(known: Known) -> Iterator[Advice]:
    doubts = len(known.findings.of("doubt")) + len(known.findings.of("labels"))
    if doubts:
        yield Advice(
            f"{_counted(doubts, 'label', 'labels')} may be wrong.",
            "Check them below, correct the wrong ones, and train again: a wrong label in "
            "test harms the figures as one in train harms the network.",
            known.again(),
        )


def _overfits(known: Known) -> Iterator[Advice]:
    row = _best(known)
    train, valid = row.get("train_top1", 0.0), row.get("valid_top1", 1.0)
    if train < LEARNED or train - valid < OVERFITS:
        return
    words = []
    if known.config.get("model.freeze") == "backbone":
        words = ["optim.weight_decay=0.1"]
    elif not known.config.get("data.augment.trivial"):
        words = ["data.augment.trivial=true"]
    elif not known.config.get("data.augment.mixup"):
        words = ["data.augment.mixup=0.2"]
    yield Advice(
        f"It overfits: {percent(train)} on train, {percent(valid)} on valid.",
        "It has memorised its training pictures. More pictures help most; without any, "
        "augment them more, or regularise more.",
        known.again(*words) if words else "",
    )


def _unfinished(known: Known) -> Iterator[Advice]:
    epochs = len(known.history)
    if epochs < 5 or known.best_epoch != epochs or any(_overfits(known)):
        return
    losses = [row.get("valid_loss", 0.0) for row in known.history]
    earlier = losses[-1 - epochs // 5]
    if losses[-1] < (1 - FALLS) * earlier:
        yield Advice(
            f"The last epoch was the best of {epochs}, and the loss was still falling.",
            "Train longer.",
            known.again(f"train.epochs={2 * epochs}"),
        )


def _uneven(known: Known) -> Iterator[Advice]:
    counts = known.counts.get("train", np.zeros(0))
    counts = counts[counts > 0]
    if not len(counts) or known.config.get("train.imbalance") != "none":
        return
    most, least = int(counts.max()), int(counts.min())
    if most >= UNEVEN * least:
        yield Advice(
            f"The largest class has {most:,} training pictures, the smallest {least:,}.",
            "The network learns rare classes last. If all classes matter equally, give them "
            "equal weight: macro F1 rises, accuracy may fall a little.",
            known.again("train.imbalance=logits", "train.monitor=valid_f1"),
        )


def _few(known: Known) -> Iterator[Advice]:
    counts = known.counts.get("train", np.zeros(0))
    if not len(counts) or np.median(counts) >= FEW:
        return
    typical = int(np.median(counts))
    yield Advice(
        f"There are few pictures: {typical} of a typical class to train on.",
        f"Below about {FEW} a class, each further one helps. Ten more of each class, the least "
        "accurate ones below first, help more than any setting. Add them, and train again.",
        known.again(),
    )


def _wide(known: Known) -> Iterator[Advice]:
    low, high = wilson_interval(known.hits, known.pictures)
    if known.pictures and high - low > WIDE:
        yield Advice(
            f"{known.pictures:,} {known.split} pictures tell the accuracy to "
            f"{50 * (high - low):.0f} points either way.",
            "A smaller difference between two runs may be chance. To halve that, you need "
            "four times as many test pictures.",
        )


def _tie(known: Known) -> Iterator[Advice]:
    measured = [each for each in (known.recipe.candidates if known.recipe else ()) if each.accuracy]
    chosen = str(known.config.get("model.name"))
    own = next((each for each in measured if each.name == chosen), None)
    if own is None:
        return
    near = [
        each
        for each in measured
        if each is not own and abs(each.accuracy - own.accuracy) <= max(each.error, own.error)
    ]
    if near:
        best = max(near, key=lambda each: each.accuracy)
        yield Advice(
            f"{chosen} and {best.name} are as good as equal: {percent(own.accuracy)} and "
            f"{percent(best.accuracy)}, each give or take {percent(own.error)}.",
            "Train the other one too, and compare both on the test pictures.",
            known.again(f"model.name={best.name}"),
        )


def _waits(known: Known) -> Iterator[Advice]:
    seconds = sum(row.get("seconds", 0.0) for row in known.history)
    wait = sum(row.get("data_wait", 0.0) for row in known.history)
    if seconds > 60 and wait > WAITS * seconds:
        yield Advice(
            f"{percent(wait / seconds)} of the training time was spent waiting for pictures.",
            "Decoding is the bottleneck, not the network: pack the pixels once (data.cache), "
            "or rent more cores.",
        )


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _best(known: Known) -> Mapping[str, float]:
    return next((row for row in known.history if row["epoch"] == known.best_epoch), {})
