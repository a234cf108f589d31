"""Whether averaging the weights of several epochs tells more pictures than the best epoch's."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import photos, recipe
from tests.benchmarks.recipe import BATCH, LITE0, SEEDS, Results
from tests.benchmarks.table import Row, Table, installed
from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.images.datasets import find_images
from trainer.network import probe
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.training.loop import fit, predict
from trainer.training.run import open_run
from trainer.training.training import Training, build_training

TITLE = "Averages of epochs"
EPOCHS = 8  # as model=auto fine-tunes
MOVING, PLAIN = "moving average", "plain weights"
CLOTHES = "clothes, 500"
NOTE = f"""An EfficientNet-Lite0 is fine-tuned on all layers from the solved head, {EPOCHS} passes
in batches of {BATCH}, as `model=auto` does it. Of its epochs the best by valid (the loss at its
best temperature) is held against the greedy average (Wortsman et al., "Model soups", 2022): the
epochs' weights in the order of their loss on valid, each taken into the mean where that isn't worse
on valid. Once of the weights as they are trained, and once of the moving average that the loop
evaluates (decay 0.99 a step). The pictures are the photos and the 500 clothes of the recipe's
table.

Mean over the seeds ± standard error of the mean; the gain is the average's less the best epoch's,
seed by seed. Loss: at the best temperature, of valid and of test. Taken: epochs in the average."""
COLUMNS = ("best epoch, test top-1", "average", "gain", "gain, loss of valid", "of test", "taken")

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """Weights, and how good they are: loss at its best temperature, and top-1."""

    weights: State
    loss: float
    top1: float


def measure(scratch: Path, rounds: int) -> Table:
    missing = [package for package in recipe.NEEDS if not installed(package)]
    if missing:
        return Table(TITLE, NOTE, COLUMNS, [], (), missing)
    results = Results.of_environment(scratch)
    weights = recipe.folder_of_weights(scratch / "weights")
    rows = []
    given = photos.given()
    for pictures in recipe.sets():
        if pictures.name != CLOTHES and (given is None or pictures.name != given.name):
            continue
        for seed in range(min(rounds, SEEDS)):
            root = pictures.write(scratch / f"{pictures.name}-{seed}".replace(" ", "-"), seed)
            words = (
                f"data.root={root}", f"model.weights_dir={weights}", f"seed={seed}",
                f"platform.runs={scratch}", f"platform.cache={scratch}/cache",
                f"name=run-{pictures.name}-{seed}".replace(", ", "-"),
            )  # fmt: skip
            keys = {"averaged": pictures.name, "seed": seed}
            results.get(lambda words=words: averaged(words), **keys)
        done = [each for each in results.rows() if each.get("averaged") == pictures.name]
        rows += [row_of(pictures.name, kind, done) for kind in (MOVING, PLAIN) if done]
    return Table(TITLE, NOTE, COLUMNS, rows, ("timm",))


def averaged(words: Sequence[str]) -> dict[str, Any]:
    """Fine-tune, and judge the best epoch and the greedy average by valid and test."""
    settings.register()
    config = compose(
        [*words, f"model.name={LITE0}", "model.head=probe", "model.freeze=none",
         f"train.epochs={EPOCHS}", f"train.batch_size={BATCH}"]
    )  # fmt: skip
    with open_run(config, World(), Stop()) as opened:
        images = find_images(config, opened.stop, words)
        training = build_training(replace(opened.resolved(images), looks=False), images)
        kept: dict[str, list[State]] = {MOVING: [], PLAIN: []}
        ends = training.end_epoch

        def end_epoch(metrics: dict[str, float]) -> None:
            ends(metrics)
            assert training.ema is not None
            for kind, network in ((MOVING, training.ema.network), (PLAIN, training.model)):
                state = network.state_dict()
                kept[kind].append({key: value.clone() for key, value in state.items()})

        training.end_epoch = end_epoch  # type: ignore[method-assign]
        fit(training)
        return {kind: greedy(training, states) for kind, states in kept.items()}


def greedy(training: Training, states: Sequence[State]) -> dict[str, Any]:
    """Return how good the best of some epochs' weights is, and their greedy average."""
    of_valid = sorted(
        (judge(training, weights, "valid") for weights in states), key=lambda each: each.loss
    )
    best = mixed = of_valid[0]
    chosen = [best.weights]
    for each in of_valid[1:]:
        tried = judge(training, mean_of([*chosen, each.weights]), "valid")
        if tried.loss <= mixed.loss:
            mixed, chosen = tried, [*chosen, each.weights]
    tests = [judge(training, each.weights, "test") for each in (best, mixed)]
    return {
        "best": tests[0].top1, "average": tests[1].top1, "taken": len(chosen),
        "valid_gain": best.loss - mixed.loss, "test_gain": tests[0].loss - tests[1].loss,
    }  # fmt: skip


def mean_of(states: Sequence[State]) -> State:
    """Return the mean of weights; of what only counts, the first's."""
    mean = dict(states[0])
    for key, value in mean.items():
        if value.is_floating_point():
            mean[key] = torch.stack([state[key] for state in states]).mean(0)
    return mean


def judge(training: Training, weights: State, split: str) -> Judged:
    training.load_eval_weights(dict(weights))
    batches = training.loader.eval_batches(split)
    logits, labels = predict(training, training.network, batches, training.machine)
    loss = probe.calibrated_losses(logits, labels).mean().item()
    return Judged(weights, loss, probe.correct(logits, labels.numpy()).mean())


def row_of(name: str, kind: str, done: Sequence[Mapping[str, Any]]) -> Row:
    runs = [each[kind] for each in done]
    gains = [each["average"] - each["best"] for each in runs]
    cells = (
        shown([each["best"] for each in runs]), shown([each["average"] for each in runs]),
        shown(gains), shown([each["valid_gain"] for each in runs]),
        shown([each["test_gain"] for each in runs]),
        f"{statistics.mean(each['taken'] for each in runs):.1f} of {EPOCHS}",
    )  # fmt: skip
    return Row(f"{name}, {kind} (seeds: {len(runs)})", cells)


def shown(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"
    return text
