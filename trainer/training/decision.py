"""Decides the recipe of model=auto, by measuring on the pictures.

For each candidate, a linear probe is solved on the features of one plain view. The cheapest within
one standard error of the best is taken. Then all layers are fine-tuned from the solved head (LP-FT:
Kumar et al., ICLR 2022) in one of two ways, if there is time. A large valid split judges the
result: it is kept only if it is better than the probe by more than the standard error of the
difference (`Training.is_best`). With a small one, fine-tuning on halves of the pictures judges
first, and valid only has to rule out a ruined network. So a fine-tuning that ruins the network
costs time, but no accuracy.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.common.console import ProgressBar, log, quiet
from trainer.common.errors import Unreadable, UserError
from trainer.distributed.world import World
from trainer.images.augment import Augmentation
from trainer.images.folder import ImageFolder, Split
from trainer.images.loader import MIRRORED, PLAIN, ImageLoader
from trainer.images.usable import usable_images
from trainer.network import probe, weights
from trainer.network.build import Classifier
from trainer.network.device import Machine
from trainer.network.features import FeatureCache
from trainer.settings.config import (
    CROPS,
    FEW_VALID,
    LEARNING_RATES,
    TOY,
    Config,
    identity,
    solve_on_for,
    steps_per_epoch,
)
from trainer.training import recipe
from trainer.training.loop import fit, predict
from trainer.training.recipe import Candidate, Recipe
from trainer.training.run import Run
from trainer.training.training import (
    Training,
    build_training,
    make_loader,
    new_network,
    prepare_machine,
)

SAMPLE = 500  # pictures on which candidates are compared at least, where time is short
# By recipe.prefer: standard errors by which a cheaper network may be worse than the best, and how
# many times as much the best must cost.
TRADES = {"accuracy": (0.0, math.inf), "balance": (1.0, 2.0), "speed": (2.0, 1.0)}
# Fine-tuning from a solved head needs fewer passes, and steps, than training a random one.
EPOCHS, STEPS = 8, 120
TRIALS = "recipe"  # below the run's directory and its checkpoints, until the recipe is decided
APART = 6  # a sixth of train, by which a trial chooses its epoch
HALVES = 2  # in which train and valid judge fine-tuning, where valid is small
# Mean number of pictures of a class. With fewer than ENOUGH, a half has one or two of each, too few
# to judge fine-tuning; from MANY on, fine-tuning is mostly better than a solved head.
ENOUGH, MANY = 4, 10
WAYS_ON = 500  # most pictures to compare ways of fine-tuning on, if valid isn't small
FEWEST_EPOCHS = 4  # fewer are no fine-tuning
BATCH = 16  # batch size for timing
BACKWARD = 3.0  # times a forward pass that a training step takes
TUNE_MINUTES = {"cpu": 3.0}  # any time elsewhere
HURTS = 2.0  # standard errors by which a probe must be worse with mirrored pictures, or with parts
VIEWS = (PLAIN, 0)  # views for comparing crops: as served, and a random one
CROPS_ON = 500  # pictures, at most
SMALL, SMALLEST = 64, 16  # px: shorter sides at which a small network from scratch is tried
LOOKED_AT = 100  # images whose size is checked
SCRATCH_SIZE = 64  # px


@dataclass(frozen=True)
class Network:
    """A candidate that was built. images: the usable ones, at the network's size."""

    candidate: Candidate
    config: Config
    images: ImageFolder
    loader: ImageLoader
    cache: FeatureCache


@dataclass(frozen=True)
class Judged:
    """A network's probe: its logits, float32 [N, classes], for images that it didn't see."""

    network: Network
    logits: Tensor
    labels: NDArray[np.int64]

    @property
    def losses(self) -> Tensor:
        """Return the loss of each image, float32 [N]."""
        return probe.calibrated_losses(self.logits, torch.from_numpy(self.labels))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Return whether the prediction is right for each image, bool [N]."""
        return probe.correct(self.logits, self.labels)


@dataclass(frozen=True)
class Tried:
    """A way to fine-tune, and its result on pictures that it didn't see.

    way: settings. gains: by how much each image's loss is lower than with the solved head alone,
    float [N]; hits: how many more are predicted right. needed: see `needed_gain`.
    """

    way: dict[str, Any]
    gains: NDArray[np.float64]
    hits: float
    needed: float

    @property
    def hopeless(self) -> bool:
        """Return whether it is so bad on one half that the other can be skipped.

        One half alone is less certain than both.
        """
        least = (self.needed - 0.5) * probe.standard_error(self.gains)
        return bool(self.gains.mean() <= least)

    @property
    def better(self) -> bool:
        """Return whether fine-tuning on all pictures is expected to beat the solved head.

        If it must prove itself, it must not predict fewer right, either. Otherwise the loss alone
        decides: few answers differ, so their count is mostly chance.
        """
        enough = self.gains.mean() > self.needed * probe.standard_error(self.gains)
        return bool(enough and (self.needed < 0 or self.hits > -0.5))

    @property
    def words(self) -> str:
        """Return the result of the halves in words."""
        if self.better and self.needed < 0:
            return "on halves of the pictures nothing spoke against it"
        if self.better:
            return "on halves of the pictures that was better than the head alone"
        change = f"{-self.gains.mean():+.3f} +- {probe.standard_error(self.gains):.3f}"
        return (
            "to fine-tune everything on one half of the pictures isn't better on the other "
            f"(loss {change}, {self.hits:+.0f} of {len(self.gains)} right)"
        )


def needed_gain(images: ImageFolder) -> float:
    """Return by how many standard errors fine-tuning on halves must be better than a solved head.

    Half of the pictures hurts fine-tuning more than the head, so a full standard error would be too
    strict. With many pictures of a class, fine-tuning is mostly better (Kornblith et al., CVPR
    2019): then it is enough that nothing speaks against it.
    """
    if is_many(images):
        return -0.5
    return 0.5


def is_many(images: ImageFolder) -> bool:
    """Return whether there are many pictures of a class, on average."""
    return _of_a_class(images) >= MANY


class Decision:
    """Decides for one run, in one process."""

    def __init__(self, run: Run, images: ImageFolder) -> None:
        self.run = replace(run, world=World(), looks=False)
        self.config, self.stop, self.images = run.config, run.stop, images
        self.machine = prepare_machine(run.config, self.run.world)
        self.reasons: list[str] = []

    def recipe(self) -> Recipe:
        """Measure, decide, and log the reasons."""
        names = recipe.names(self.config, self.machine.device.type)
        candidates = [Candidate(name) for name in names]
        networks = [each for each in map(self.build, candidates) if each]
        if networks:
            best = self.choose(networks)
            flips = self.with_flips(best)
            values = flips | (self.small(best, flips) or self.training(best, flips))
            for line in recipe.table(candidates):
                log.info(line)
        else:
            values = self.from_scratch()
        chosen = recipe.applied(self.config, values)
        if chosen.model.head == "probe":
            few = self.images.count("valid")
            if solve_on_for(chosen, few) == "both":
                self.reasons.append(
                    f"valid has {few} pictures, so the head is solved on them too; figures of "
                    "valid are by heads that were solved without the picture"
                )
        for line in self.reasons:
            log.info("recipe: %s", line)
        return Recipe(values, candidates, self.reasons)

    # --- the candidates ---

    def build(self, candidate: Candidate) -> Network | None:
        """Build a candidate; return None, and record the reason, if its weights are unavailable."""
        config = recipe.applied(self.config, recipe.probe_of(candidate.name))
        try:
            # Quiet: the chosen one is logged later.
            with ProgressBar(f"building {candidate.name}", 1), quiet():
                config = weights.resolve(config, self.images)
                torch.manual_seed(config.seed)
                network = new_network(config, self.images.classes).to(self.machine.device)
        except Unreadable:
            raise
        except UserError as error:
            candidate.left_out = str(error)
            log.warning("left out: %s: %s", candidate.name, error)
            return None
        images, reader = usable_images(config, self.images, self.stop, self.run.world)
        loader = make_loader(replace(self.run, config=config), images, reader, self.machine)
        cache = FeatureCache(network, loader, self.machine, Path(config.platform.cache))
        size = loader.preprocessing.size
        candidate.licence = weights.provenance(config)["licence"] or "not stated"
        candidate.megabytes = sum(each.numel() for each in network.parameters()) * 4 / 1e6
        with ProgressBar(f"measuring {candidate.name}", 1):
            candidate.gflops = _gflops(network, size)
            candidate.milliseconds = _milliseconds(network, size, self.machine)
        return Network(candidate, config, images, loader, cache)

    # --- how good they are ---

    def choose(self, networks: Sequence[Network]) -> Judged:
        """Return the cheapest network within some standard errors of the best."""
        count = len(_labels(networks[0].images))
        fraction = self.affordable(networks)
        if len(networks) > 1 and fraction < 1:
            log.info("comparing %d networks on %d pictures", len(networks), fraction * count)
            judged = [
                self.measured(_sampled(each, fraction, self.config.seed)) for each in networks
            ]
            return self.measured(networks[self.cheapest(judged)])
        judged = [self.measured(each) for each in networks]
        return judged[self.cheapest(judged)]

    def affordable(self, networks: Sequence[Network]) -> float:
        """Return the share of the pictures on which all networks can be compared in time."""
        minutes = self.config.recipe.minutes
        if minutes is None:
            return 1.0
        count = len(_labels(networks[0].images))
        milliseconds = [each.candidate.milliseconds for each in networks]
        training = BACKWARD * float(np.median(milliseconds)) * count * EPOCHS
        allowed = max(minutes * 60_000, training / 10)
        return min(1.0, max(allowed / (sum(milliseconds) * count), SAMPLE / count))

    def judge(self, network: Network, kinds: Sequence[int] = (PLAIN,)) -> Judged:
        """Solve a probe on some views of the images, and judge it on images that it didn't see."""
        splits = network.images.splits
        features = {
            split: np.stack([network.cache.of(split, kind, self.stop) for kind in kinds], axis=1)
            for split in ("train", "valid")
        }
        classes, seed = len(network.images.classes), self.config.seed
        labels = {split: splits[split].labels for split in features}
        with ProgressBar("solving a head", 1):
            if self.pools(network.images):
                views, both = (np.concatenate([*each.values()]) for each in (features, labels))
                solved = probe.fit(views, both, classes, seed, self.stop.check)
                return Judged(network, solved.logits, both)
            solved = probe.fit(features["train"], labels["train"], classes, seed, self.stop.check)
            return Judged(network, solved.of(features["valid"][:, 0]), labels["valid"])

    def pools(self, images: ImageFolder) -> bool:
        """Return whether valid is so small that train judges too, by k-fold."""
        return images.count("valid") < FEW_VALID

    def measured(self, network: Network) -> Judged:
        """Judge a candidate on the plain view, and record its accuracy."""
        judged, candidate = self.judge(network), network.candidate
        candidate.accuracy = float(judged.correct.mean())
        candidate.error = probe.error_of_share(judged.correct)
        candidate.pictures = len(judged.labels)
        return judged

    def cheapest(self, judged: Sequence[Judged]) -> int:
        """Return the index of the cheapest candidate that is good enough.

        A cheaper one than the best must save enough, and must not be worse by more than some
        standard errors of the difference, picture by picture.
        """
        rows = [each.network.candidate for each in judged]

        def cost(number: int) -> float:
            return rows[number].gflops

        best = max(range(len(rows)), key=lambda number: (rows[number].accuracy, -cost(number)))
        within, saving = TRADES[self.config.recipe.prefer]
        good = [
            number
            for number in range(len(rows))
            if cost(number) * saving <= cost(best)
            and _worse_by(judged[number], judged[best]) <= within
        ]
        chosen = min(good, key=lambda number: (cost(number), -rows[number].accuracy), default=best)
        reason = f"{rows[chosen].name} is the most accurate"
        if chosen != best:
            less = rows[best].accuracy - rows[chosen].accuracy
            reason = (
                f"{rows[chosen].name} needs {cost(chosen) / cost(best):.0%} of the computing of "
                f"the most accurate, {rows[best].name}, and is no worse beyond doubt ({less:.1%}; "
                f"recipe.prefer={self.config.recipe.prefer})"
            )
        if len(rows) == 1:
            reason = f"{rows[chosen].name} is the only one available"
        self.reasons.append(reason)
        return chosen

    def with_flips(self, judged: Judged) -> dict[str, Any]:
        """Return whether views may be mirrored, if that isn't given.

        Mirrored writing and signs mean something else: then a probe that also saw mirrored pictures
        is worse.
        """
        if self.config.data.augment.flip is not None:
            return {}
        both = self.judge(judged.network, (PLAIN, MIRRORED))
        gain = (judged.losses - both.losses).numpy()
        hurts = gain.mean() < -HURTS * probe.standard_error(gain)
        hurts = hurts and both.correct.sum() < judged.correct.sum()
        if hurts:
            self.reasons.append("mirroring the pictures makes it worse: data.augment.flip=false")
        return {"data.augment.flip": not hurts}

    def with_crops(self, network: Network) -> dict[str, Any]:
        """Return how much of a picture a random view shows, if that isn't given.

        A part of a digit may be another digit: then a probe that also saw parts is clearly worse
        than one that also saw nearly whole pictures. Otherwise parts are used: fine-tuning on whole
        pictures soon memorises them.
        """
        if self.config.data.augment.scale is not None:
            return {}
        share = CROPS_ON / len(_labels(network.images))
        if share < 1:
            network = _sampled(network, share, self.config.seed)
        parts, whole = (self.judge(_cropped(network, CROPS[each]), VIEWS) for each in CROPS)
        gains = (parts.losses - whole.losses).double().numpy()
        chosen, words = (
            "parts",
            "smaller crops of the pictures work no worse than nearly whole ones",
        )
        if gains.mean() > HURTS * probe.standard_error(gains):
            chosen, words = "whole", "nearly whole pictures work better than smaller crops"
        low, high = CROPS[chosen]
        self.reasons.append(f"{words}: data.augment.scale=[{low:g},{high:g}]")
        return {"data.augment.scale": list(CROPS[chosen])}

    # --- how it is trained ---

    def training(self, judged: Judged, flips: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of the training: a solved head, and perhaps fine-tuning.

        flips: of `with_flips`.
        """
        candidate = judged.network.candidate
        frozen, few = recipe.probe_of(candidate.name), self.pools(judged.network.images)
        if self.config.model.freeze == "backbone" or self.config.train.epochs == 0:
            return frozen
        steps = self.steps_of(judged.network)
        epochs = self.config.train.epochs or max(EPOCHS, math.ceil(STEPS / steps))
        asked, ways = self.config.model.freeze == "none", self.ways(judged.network.images)
        halves = few and not asked
        minutes = self.minutes_of(judged.network, ways, halves)  # of an epoch, with its trials
        fits = epochs
        if not asked:
            fits = int(min(epochs, self.minutes_to_tune() / minutes))
        too_little = None
        if halves and _of_a_class(judged.network.images) < ENOUGH:
            too_little = f"fewer than {ENOUGH} pictures of a class can't judge fine-tuning"
        elif fits < min(FEWEST_EPOCHS, epochs):
            took = _about(minutes * epochs)
            too_little = f"to fine-tune everything would take {took} (recipe.tune_minutes)"
        if too_little:
            self.reasons.append(f"the head alone is solved: {too_little}")
            return frozen
        tuned = frozen | {"model.freeze": "none", "train.epochs": fits}
        tuned |= self.with_crops(judged.network)
        kept = "the result is kept only if it is better"
        if halves:
            tried = self.tuned_halves(judged.network, flips | tuned, ways)
            if not tried.better:
                self.reasons.append(f"the head alone is solved: {tried.words}")
                return frozen
            tuned |= tried.way
            kept = tried.words
            tuned["train.keep"] = "last"  # these were judged; the best by few pictures is chance
        elif len(ways) > 1:
            tuned |= self.better_way(judged.network, flips | tuned, ways)
        self.reasons.append(
            f"everything is fine-tuned from the solved head, in {_about(minutes * fits)}; {kept}"
        )
        if len(ways) > 1:
            self.reasons.append(_words_of(tuned))
        return tuned

    def minutes_of(self, network: Network, ways: Sequence[dict[str, Any]], halves: bool) -> float:
        """Return the minutes of an epoch of fine-tuning, with its share of the trials."""
        train = network.images.count("train")
        minutes = BACKWARD * network.candidate.milliseconds * train / 60_000
        if halves:  # at worst: each way on one half, one of them on the other
            return minutes * (1 + (len(ways) + 1) / HALVES * len(_labels(network.images)) / train)
        if len(ways) > 1:
            return minutes * (1 + len(ways) * min(1.0, WAYS_ON / train))
        return minutes

    def minutes_to_tune(self) -> float:
        """Return how many minutes fine-tuning may take, with its trials."""
        allowed = self.config.recipe.tune_minutes
        if allowed is not None:
            return allowed
        if self.config.recipe.minutes is None:  # nothing may depend on a clock
            return math.inf
        return TUNE_MINUTES.get(self.machine.device.type, math.inf)

    def ways(self, images: ImageFolder) -> list[dict[str, Any]]:
        """Return the learning rates to try for fine-tuning, the more promising ones first.

        The small rates of a solved head stay near the pretrained weights: best if these fit the
        pictures, or with few pictures. The rates of a new head on pretrained weights, the same for
        all layers, move further away: best for pictures unlike the pretraining's. If the user gives
        a rate, there is nothing to choose.
        """
        choice = self.config.optim
        if (choice.lr, choice.head_lr, choice.layer_decay) != (None, None, None):
            return [{}]
        lr, head_lr = LEARNING_RATES[choice.name]["pretrained"]
        further = {"optim.lr": lr, "optim.head_lr": head_lr, "optim.layer_decay": 1.0}
        if is_many(images):
            return [further, {}]
        return [{}, further]

    def tuned_halves(
        self, network: Network, values: dict[str, Any], ways: Sequence[dict[str, Any]]
    ) -> Tried:
        """Fine-tune on each half of train and valid, and predict the other half.

        The first way that isn't hopeless on the first half is taken, and tried on the other one.
        """
        first, second = (half for _, half in _halves(network.images, self.config.seed))
        for way in ways:
            rates = _rates(way) if len(ways) > 1 else ""
            log.info("fine-tuning%s on one half of the pictures: 1 of %d", rates, HALVES)
            tried = self.tried(network, values, way, first, 0)
            if not tried.hopeless:
                log.info("fine-tuning%s on one half of the pictures: 2 of %d", rates, HALVES)
                other = self.tried(network, values, way, second, 1)
                tried = replace(
                    tried,
                    gains=np.append(tried.gains, other.gains),
                    hits=tried.hits + other.hits,
                )
                break
        self.forget_trials()
        return tried

    def tried(
        self,
        network: Network,
        values: dict[str, Any],
        way: dict[str, Any],
        half: ImageFolder,
        number: int,
    ) -> Tried:
        """Fine-tune in one way on one half, and predict the other one, which is its valid."""
        training = self.trial(self.of_way(network, values | way), half, network, number)
        # With the last weights: the best by these pictures would look too good.
        logits, labels = self.answers(training, "valid")
        assert training.probe_losses is not None
        gains = training.probe_losses - probe.calibrated_losses(logits, labels)
        before = training.metrics_file.rows[0]["valid_top1"] * len(labels)
        hits = float(probe.correct(logits, labels.numpy()).sum() - before)
        return Tried(way, gains.double().numpy(), hits, needed_gain(network.images))

    def better_way(
        self, network: Network, values: dict[str, Any], ways: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the best way on a sample of the pictures, by its loss on valid.

        Each trial has as many steps as the training, at most STEPS.
        """
        steps = min(STEPS, values["train.epochs"] * self.steps_of(network))
        share = min(1.0, WAYS_ON / len(_labels(network.images)))
        if share < 1:
            network = _sampled(network, share, self.config.seed)
        values = values | {"train.epochs": math.ceil(steps / self.steps_of(network))}
        losses = []
        for number, way in enumerate(ways):
            log.info("fine-tuning%s on some of the pictures", _rates(way))
            training = self.trial(
                self.of_way(network, values | way), network.images, network, number
            )
            logits, labels = self.answers(training, "valid")
            losses.append(float(probe.calibrated_losses(logits, labels).mean()))
        self.forget_trials()
        return ways[int(np.argmin(losses))]

    def steps_of(self, network: Network) -> int:
        """Return the steps of an epoch."""
        return steps_per_epoch(self.config.train, network.images.count("train"))

    def of_way(self, network: Network, values: dict[str, Any]) -> Config:
        """Return the settings of a trial of the network."""
        with quiet():
            return weights.resolve(recipe.applied(self.config, values), network.images)

    def small(self, judged: Judged, flips: dict[str, Any]) -> dict[str, Any] | None:
        """Return the settings of a small network from scratch, if that is clearly better.

        It is tried if pictures are so small that they are enlarged for pretrained networks;
        otherwise return None.
        """
        images, asked = judged.network.images, self.config.model.freeze != "auto"
        side = _side(images.splits["train"].paths)
        if side > SMALL or asked or self.config.train.epochs == 0:
            return None
        size = self.config.data.size or max(side, SMALLEST)
        values = flips | {
            "model.name": TOY,
            "model.weights": None,
            "data.size": size,
            "data.resize": self.config.data.resize or size,
            "data.augment.scale": self.config.data.augment.scale or list(CROPS["whole"]),
        }
        with quiet():
            config = weights.resolve(recipe.applied(self.config, values), images)
        parts = [(np.arange(images.count("valid")), images)]
        if self.pools(images):
            parts = [*_halves(images, config.seed)]
        gains = []  # for each image: 1 if only it is right, -1 if only the solved head is
        correct = np.zeros(0, np.bool_)
        for number, (places, part) in enumerate(parts):
            log.info("a small network from scratch: %d of %d", number + 1, len(parts))
            training = self.trial(config, _chosen_apart(part, config.seed), None, number)
            # As in a run: the best epoch, chosen by pictures that don't judge.
            training.load_best_weights()
            logits, labels = self.answers(training, "judged")
            answers = probe.correct(logits, labels.numpy())
            correct = np.append(correct, answers)
            gains.append(answers.astype(np.float64) - judged.correct[places])
            if gains[-1].mean() <= 0:  # for one half: the other could hardly leave no doubt
                break
        self.forget_trials()
        gain = np.concatenate(gains)
        words = f"{TOY} from scratch, at {size} px, tells {correct.mean():.1%}"
        if gain.mean() <= probe.standard_error(gain):
            self.reasons.append(f"{words}, which isn't better beyond doubt")
            return None
        self.reasons.append(f"{words}: these pictures are small, and it is better beyond doubt")
        return values

    # --- trainings that only a decision needs ---

    def trial(
        self, config: Config, images: ImageFolder, network: Network | None, number: int
    ) -> Training:
        """Train on the images' train, to the end. network: whose pixels they are; None decodes."""
        # Of these settings alone: after a kill the clock may say another number of epochs.
        settings = json.dumps(identity(config), sort_keys=True).encode()
        place = Path(TRIALS, f"{hashlib.sha256(settings).hexdigest()[:8]}-{number}")
        run = replace(
            self.run,
            config=config,
            directory=self.run.directory / place,
            checkpoints=self.run.checkpoints / place,
            trial=True,
        )
        run.directory.mkdir(parents=True, exist_ok=True)
        read = network.loader.read if network else None
        loader = make_loader(run, images, read, self.machine)
        with ProgressBar("building the network", 1), quiet():
            training = build_training(run, images, loader=loader)
        fit(training)
        return training

    def answers(self, training: Training, split: str) -> tuple[Tensor, Tensor]:
        """Return the logits [N, classes] and labels [N] of a split, by the weights as they are."""
        batches = training.data.eval_batches(split)
        with ProgressBar("evaluating", 1):
            return predict(training, training.eval_model, batches, self.machine)

    def forget_trials(self) -> None:
        """Remove what trials have written."""
        for place in (self.run.directory, self.run.checkpoints):
            shutil.rmtree(place / TRIALS, ignore_errors=True)

    def from_scratch(self) -> dict[str, Any]:
        """Return the settings where no weights can be had: a small network on small pictures."""
        self.reasons.append(
            f"the weights of no candidate are available: {TOY} is trained from scratch, which "
            "is far less accurate; give model.weights_dir=DIR, a folder with weights"
        )
        return {
            "model.name": TOY,
            "model.weights": None,
            "data.size": self.config.data.size or SCRATCH_SIZE,
        }


def _cropped(network: Network, scale: tuple[float, float]) -> Network:
    """Return the network with random views that show such a share of each image, and no more."""
    augmentation = Augmentation(scale, network.loader.augmentation.ratio, flip=False, trivial=False)
    loader = replace(network.loader, augmentation=augmentation)
    return replace(network, loader=loader, cache=network.cache.of_other(loader))


def _worse_by(one: Judged, best: Judged) -> float:
    """Return by how many standard errors of the difference a network's probe is worse than another.

    Both answer for the same pictures, so what is hard for both doesn't count. With one answer more
    that either alone gives: none of few that differ is no certainty.
    """
    losses = best.correct.astype(np.float64) - one.correct
    return float(losses.mean() / probe.standard_error(np.append(losses, [1.0, -1.0])))


def _words_of(tuned: dict[str, Any]) -> str:
    """Return in words which way to fine-tune was taken."""
    if "optim.lr" not in tuned:
        return "small learning rates keep what the weights know"
    return (
        f"larger learning rates (optim.lr={tuned['optim.lr']:g} for all layers) let the weights "
        "learn more from these pictures"
    )


def _rates(way: dict[str, Any]) -> str:
    """Return which of two ways it is, behind a verb."""
    return " at larger learning rates" if "optim.lr" in way else " at small learning rates"


def _about(minutes: float) -> str:
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes:.0f} minutes"


def _of_a_class(images: ImageFolder) -> float:
    """Return how many pictures a class has in train and valid together, in the mean."""
    return len(_labels(images)) / len(images.classes)


def _labels(images: ImageFolder) -> NDArray[np.int64]:
    return np.concatenate([images.splits[split].labels for split in ("train", "valid")])


def _sampled(network: Network, fraction: float, seed: int) -> Network:
    """Return the network with a share of the images, that of each class alike."""
    images = network.images
    splits = dict(images.splits)
    for name in ("train", "valid"):
        split = splits[name]
        chosen = probe.folds(split.labels, max(2, math.ceil(1 / fraction)), seed)[0]
        paths = tuple(split.paths[sample] for sample in chosen)
        splits[name] = Split(paths, split.labels[chosen])
    few = replace(images, splits=splits)
    loader = replace(network.loader, folder=few)
    return replace(network, images=few, loader=loader, cache=network.cache.of_other(loader))


def _halves(images: ImageFolder, seed: int) -> Iterator[tuple[NDArray[np.int64], ImageFolder]]:
    """Yield the images with one half of train and valid as valid, the rest as train.

    And before it which images that half is, of train and valid together.
    """
    both = [images.splits[split] for split in ("train", "valid")]
    paths, labels = sum((split.paths for split in both), ()), _labels(images)
    for chosen in probe.folds(labels, HALVES, seed):
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        splits = {
            name: Split(tuple(paths[sample] for sample in samples), labels[samples])
            for name, samples in (("train", rest), ("valid", chosen))
        }
        yield chosen, replace(images, splits=splits)


def _chosen_apart(images: ImageFolder, seed: int) -> ImageFolder:
    """Return the images with valid as "judged", and a part of train in the place of valid.

    So the pictures by which a training chooses its best epoch are not those that judge it.
    """
    train, judged = images.splits["train"], images.splits["valid"]
    chosen = probe.folds(train.labels, APART, seed)[0]
    rest = np.setdiff1d(np.arange(len(train.labels)), chosen)
    splits = {
        name: Split(tuple(train.paths[sample] for sample in samples), train.labels[samples])
        for name, samples in (("train", rest), ("valid", chosen))
    }
    return replace(images, splits=splits | {"judged": judged})


def _side(paths: Sequence[str]) -> int:
    """Return the median of the shorter sides of some images, in pixels, as their headers say."""
    sides = []
    for path in paths[:: max(len(paths) // LOOKED_AT, 1)]:
        with suppress(OSError, ValueError), Image.open(path) as image:
            sides.append(min(image.size))
    return int(np.median(sides)) if sides else SMALL + 1


def _gflops(network: Classifier, size: int) -> float:
    """Return the billions of multiplications, and as many additions, of one picture."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.eval()(_pixels(network, 1, size))
    return float(counter.get_total_flops()) / 2e9


def _milliseconds(network: Classifier, size: int, machine: Machine) -> float:
    """Return how long a picture takes, forward and in a batch, on this machine.

    On a CPU by processor time: what else runs there should decide nothing.
    """
    on_cpu = machine.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    pixels, seconds = _pixels(network, BATCH, size), 0.0
    with torch.inference_mode(), machine.autocast():
        for _ in range(2):  # the first makes ready
            started = clock()
            network.eval().features(pixels).sum().item()
            seconds = clock() - started
    if on_cpu:
        seconds /= torch.get_num_threads()
    return 1000 * seconds / BATCH


def _pixels(network: Classifier, count: int, size: int) -> Tensor:
    return torch.zeros(count, size, size, 3, dtype=torch.uint8, device=network.mean.device)
