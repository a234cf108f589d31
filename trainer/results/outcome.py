"""The end of a run: test the best weights; write the model package, the report and the result."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.common import files
from trainer.common.console import log
from trainer.common.errors import AGAIN, UserError
from trainer.common.git import revision
from trainer.common.stages import cost
from trainer.images import folder
from trainer.images.loader import PLAIN
from trainer.images.names import suffix_of
from trainer.network.distance import Features, Joined, WithDistance, class_means
from trainer.network.saliency import Saliency
from trainer.network.weights import provenance
from trainer.results import calibrate, early, package, predecessor, quantize, report
from trainer.results.advice import Known, advice
from trainer.results.calibrate import Quality
from trainer.results.card import Card
from trainer.results.prediction import predictions
from trainer.results.predictions import labelled
from trainer.results.report import Other
from trainer.results.text import percent
from trainer.results.views import views
from trainer.settings.config import data_name, identity, metric_line
from trainer.settings.words import key_of
from trainer.training import complete, lineage
from trainer.training.loop import predict
from trainer.training.metrics import classification, mean_loss
from trainer.training.recipe import Recipe
from trainer.training.run import PREDICTIONS
from trainer.training.training import Training

# Largest difference between the best weights' loss on valid and the recorded one: relative,
# absolute. On the same machine it is equal (metrics keep 6 digits); the tolerance is for kernels
# that a GPU or a compiler chooses anew.
SAME_LOSS_HERE = (1e-3, 1e-5)
SAME_LOSS_ELSEWHERE = (0.05, 0.01)  # another machine or precision

Predicted = tuple[Tensor, Tensor, Tensor]  # logits [N, classes], distances [N], classes [N]

# Images of a class for its mean features: enough for a direction, and quickly computed.
FOR_MEANS = 10


@dataclass(frozen=True)
class Tested:
    """The best weights on the test split (on valid, where there is no test).

    other: the same metrics with the images that are in train too where `metrics` are without them,
    and the other way round; None where there is none.
    """

    split: str
    metrics: dict[str, float]  # loss, top1, top5, f1
    paths: Sequence[str]  # [N]
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.float64]  # [N, classes], calibrated
    quality: Quality  # of the calibration, and how good it is on these images
    means: Tensor  # of the classes' features, [classes, width]
    logits: NDArray[np.float32]  # [N, classes]
    distance: NDArray[np.float32]  # [N], from the nearest class
    other: Other | None = None


def load_best(run: Training) -> None:
    """Load the best weights into the network.

    Raise UserError if their loss on valid isn't the recorded one.
    """
    checkpoints, progress = run.checkpoints, run.progress
    best = run.load_best_weights()
    valid = run.data.eval_batches("valid")
    logits, targets = predict(run, run.eval_model, valid, run.machine)

    def check() -> None:
        assert progress.best is not None
        epoch = progress.best["epoch"]
        losses = {
            row["epoch"]: row.get("seen_loss", row["valid_loss"])
            for row in progress.rows
            if "valid_loss" in row
        }
        given = mean_loss(logits, targets)
        same_place = best["environment"] == run.facts["environment"]
        relative, absolute = SAME_LOSS_HERE if same_place else SAME_LOSS_ELSEWHERE
        if not np.isclose(given, losses[epoch], relative, absolute, equal_nan=True):
            raise UserError(
                f"{checkpoints.root}: the best weights, of epoch {epoch}, have "
                f"valid_loss={given}, but {losses[epoch]} was noted for them: the pictures, the "
                "pretrained weights or the files there have changed since; start a new run with "
                "another name=..."
            )

    run.world.broadcast_from_main(check)


def test(run: Training) -> Tested:
    """Evaluate the network with its best weights, as it is packaged.

    It runs from pixels, in float32. data.leaks says whether pictures that are in train too count;
    `other` has the figures of the other way. The calibration is fitted on valid, and measured on
    the tested images. Only rank 0 has labels and probabilities of every image.
    """
    load_best(run)
    assert run.progress.best is not None
    split = "test" if "test" in run.loader.folder.splits else "valid"
    means = mean_features(run)
    logits, distance, targets = _unseen(run, means, split)
    paths = run.loader.folder.splits[split].paths
    everything, clean = np.arange(len(paths)), _clean(run, split)
    counted, beside, how = everything, clean, "without_leaks"
    if run.config.data.leaks == "drop" and len(clean):
        counted, beside, how = clean, everything, "with_leaks"

    def measure(numbers: NDArray[np.int64]) -> dict[str, float]:
        output, target = logits[numbers], targets[numbers]
        own = run.own.figures(output, target, split)
        return classification(output, target, split) | own

    values = run.world.broadcast_from_main(lambda: measure(counted))
    other: Other | None = None
    if 0 < len(clean) < len(paths):
        others = run.world.broadcast_from_main(lambda: measure(beside))
        other = Other(how, len(beside), _bare(others, split))
    if split == "test":
        epoch = run.progress.best["epoch"]
        run.metrics_file.append({"epoch": epoch, "step": run.progress.step} | values)
        weights = f"the weights of epoch {epoch}" if epoch else "the solved head"
        told = (
            f"test: {percent(values['test_top1'])}, top-5 {percent(values['test_top5'])}, "
            f"macro F1 {percent(values['test_f1'])}, by {weights}"
        )
        log.info(metric_line({"epoch": epoch} | values), extra={"for_people": told})
    valid = logits, distance, targets
    if split != "valid":
        valid = _unseen(run, means, "valid")
    if run.world.is_main_process:
        logits, distance, targets = logits[counted], distance[counted], targets[counted]
    quality = run.world.broadcast_from_main(
        lambda: _quality(run, valid, split, (logits, distance, targets))
    )
    for line in (*quality.notes, quality.line()):
        log.info(line)
    return Tested(
        split,
        _bare(values, split),
        [paths[number] for number in counted],
        targets.numpy(),
        quality.calibration.probabilities(logits.numpy()),
        quality,
        means,
        logits.numpy(),
        distance.numpy(),
        other,
    )


def mean_features(run: Training) -> Tensor:
    """Return the direction of each class's mean features, float32 [classes, width].

    It uses plain views of FOR_MEANS images of each class. Random crops also show bare walls, so
    their means would be close to pictures of nothing (docs/decisions).
    """
    train, classes = run.loader.folder.splits["train"], run.loader.classes
    chosen = _spread(train.labels)
    if run.data.holds_features:  # the head was trained on these too, so they are in the cache
        return run.world.broadcast_from_main(
            lambda: class_means(
                run.feature_cache.of("train", PLAIN, run.stop)[chosen],
                train.labels[chosen],
                classes,
            )
        )
    batches = run.loader.eval_batches("train", chosen)
    features, targets = predict(run, Features(run.network), batches, run.machine.in_float32())
    return run.world.broadcast_from_main(
        lambda: class_means(features.numpy(), targets.numpy(), classes)
    )


def _spread(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of FOR_MEANS images of each class, evenly spread."""
    places = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.concatenate(
        [of[np.linspace(0, len(of) - 1, min(len(of), FOR_MEANS)).astype(np.int64)] for of in places]
    )


def _predict(run: Training, means: Tensor, split: str) -> Predicted:
    """Return logits [N, classes], distances [N] and classes [N] of a split, as it is packaged."""
    network = Joined(WithDistance(run.network, means.to(run.device)))
    batches = run.loader.eval_batches(split)
    both, targets = predict(run, network, batches, run.machine.in_float32())
    return both[:, :-1], both[:, -1:].flatten(), targets  # a process may have no batch


def _unseen(run: Training, means: Tensor, split: str) -> Predicted:
    """Return the same as `_predict`, for images that weren't trained on.

    If the head was solved on valid, its logits come from heads that were solved without the image.
    """
    logits, distance, targets = _predict(run, means, split)
    if split == "valid" and run.head_saw_valid:
        logits = run.unseen_logits("valid")
    return logits, distance, targets


def _quality(run: Training, valid: Predicted, split: str, counted: Predicted) -> Quality:
    """Return the calibration from valid, and its quality on the counted images of a split.

    Images of valid that are in train too are left out, if others remain. If these are few and the
    solved head is packaged, train counts too, with heads that were solved without each image.
    """
    chosen = _clean(run, "valid")
    if not len(chosen):
        chosen = np.arange(len(valid[0]))
    logits, distance, targets = (each[chosen].numpy() for each in valid)
    if run.packages_probe() and run.probe_logits is not None:
        logits = np.concatenate([logits, run.unseen_logits("train").numpy()])
        targets = np.concatenate([targets, run.loader.folder.splits["train"].labels])
    calibration, notes = calibrate.fit(logits, targets, distance)
    logits, distance, targets = (each.numpy() for each in counted)
    quality = calibrate.measure(calibration, split, logits, targets, distance)
    return replace(quality, notes=notes)


def _clean(run: Training, split: str) -> NDArray[np.int64]:
    """Return the indices of a split's images that aren't in the training images too."""
    seen, paths = set(run.findings.leaked), run.loader.folder.splits[split].paths
    if split == "test" and run.head_saw_valid:
        seen |= run.findings.in_valid
    return np.array([place for place, path in enumerate(paths) if path not in seen], np.int64)


def _bare(metrics: dict[str, float], split: str) -> dict[str, float]:
    return {name.removeprefix(f"{split}_"): value for name, value in metrics.items()}


def build_package(run: Training, tested: Tested) -> None:
    """Build the model package, checked by a process of its own before it gets its name."""
    assert run.progress.best is not None
    images, pixels, config = run.loader.folder, run.loader.preprocessing, run.config
    split = images.splits[tested.split]
    firsts = [
        int(np.flatnonzero(split.labels == label)[0]) for label in np.unique(split.labels)[:8]
    ]
    metrics = {f"{tested.split}_{name}": value for name, value in tested.metrics.items()}
    contents = package.Contents(
        classes=images.classes,
        preprocessing=pixels,
        metrics=metrics | {"epoch": run.progress.best["epoch"]},
        card=_card(run, tested).text(),
        calibration=tested.quality.calibration,
        means=tested.means.cpu(),
        config=identity(config),
        revision=revision(),
        weights=provenance(config),
        data=data_name(config.data.source, config.data.root),
        golden=[split.paths[first] for first in firsts],
        graph=early.graph_of(config, run.network),
        suffixes=frozenset(
            suffix_of(path) for each in images.splits.values() for path in each.paths
        ),
        identity={
            key: value
            for key, value in run.facts["identity"].items()
            if key == "pictures" or key.startswith("weights.")
        },
    )
    if config.package.int8:
        valid = images.splits["valid"]
        chosen = quantize.choose(valid.paths, valid.labels, pixels)
        contents = replace(contents, int8=chosen, max_drop=config.package.max_drop)
    target = run.run.package
    archive = target.suffix == ".gz"
    try:
        package.build(run.network, contents, target, archive=archive, temporary=run.run.temporary)
    except package.SelfTestFailed as error:
        raise UserError(
            f"{target}: {error}; what was trained is saved: fix that, {AGAIN}"
        ) from error


def _card(run: Training, tested: Tested) -> Card:
    """Return the package's README.md."""
    images, config = run.loader.folder, run.config
    notes = [f"Probabilities: {tested.quality.line()}."]
    if tested.other:
        words = tested.other.how.replace("_leaks", " the pictures that are in train too")
        top1 = percent(tested.other.metrics["top1"])
        notes.append(f"{words.capitalize()}: top-1 accuracy {top1} of {tested.other.pictures:,}.")
    return Card(
        name=run.run.name,
        network=config.model.name,
        data=data_name(config.data.source, config.data.root),
        classes=images.classes,
        split=tested.split,
        metrics=tested.metrics,
        counts={name: images.count(name) for name in images.splits},
        labels=tested.labels.tolist(),
        weights=provenance(config),
        findings=[line for line, _ in run.findings.lines()],
        notes=notes,
    )


def write_report(
    run: Training,
    tested: Tested,
    recipe: Recipe | None = None,
    before: dict[str, Any] | None = None,
) -> None:
    """Write report.html. recipe: of model=auto. before: as in `result`."""
    assert run.progress.best is not None
    images, pixels = run.loader.folder, run.loader.preprocessing
    history = [row for row in run.progress.rows if "train_loss" in row]
    config, best_epoch = identity(run.config), run.progress.best["epoch"]
    data = data_name(run.config.data.source, run.config.data.root)
    counts = {
        name: np.bincount(split.labels, minlength=len(images.classes))
        for name, split in images.splits.items()
    }
    saliency = Saliency(run.network)
    known = Known(
        history=history,
        best_epoch=best_epoch,
        config=config,
        counts=counts,
        split=tested.split,
        hits=int((tested.probabilities.argmax(1) == tested.labels).sum()),
        pictures=len(tested.labels),
        findings=run.findings,
        recipe=recipe,
        again=run.run.again,
    )
    report.write(
        report.Report(
            title=run.run.name,
            split=tested.split,
            history=history,
            best_epoch=best_epoch,
            metrics=tested.metrics,
            classes=images.classes,
            labels=tested.labels,
            probabilities=tested.probabilities,
            quality=tested.quality,
            paths=tested.paths,
            broken=images.broken,
            other=tested.other,
            findings=run.findings,
            recipe=recipe,
            facts=_environment(run) | _rewinds(run) | _parent(run),
            config=config,
            next_steps=run.run.next_steps(),
            about=_about(run, data),
            given={key_of(word) for word in run.run.given},
            counts=counts,
            views=views(run.loader, solved=run.packages_probe() and not history),
            advice=advice(known),
            before=predecessor.find(run.run.directory, data, config),
            stages=lambda: _times(run, before).get("stages", {}),
            dollars_hour=run.config.platform.dollars_hour,
        ),
        run.run.directory / "report.html",
        lambda path: folder.read_prepared(path, pixels),
        lambda path, label: saliency.where(folder.read_prepared(path, pixels), label),
    )


def _about(run: Training, data: str) -> list[str]:
    """Return the report's subtitle in lines: network, pictures, machine.

    data: the data set's name.
    """
    config, images, known = run.config, run.loader.folder, provenance(run.config)
    parameters = sum(part.numel() for part in run.network.parameters())
    network = f"{config.model.name}, {parameters / 1e6:.1f} million parameters, "
    if config.model.weights is None:
        network += f"weights {known['source']}"
    else:
        licence = known["licence"] or "not stated"
        network += f"weights from {known['source']}, licence {licence}"
    splits = ", ".join(f"{len(split.paths):,} {name}" for name, split in images.splits.items())
    pictures = f"{data}: {splits} pictures, "
    pictures += f"{len(images.classes):,} classes"
    environment = run.machine.environment()
    where_run = environment["device"]
    if run.device.type == "cpu":
        where_run = f"{os.cpu_count()} cores ({platform.machine()})"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return [network, pictures, f"on {where_run} in {environment['precision']}, {when}"]


def write_predictions(run: Training, tested: Tested) -> None:
    """Write predictions.csv: a row for each picture, sorted by name."""
    classes = run.loader.folder.classes
    said = predictions(tested.quality.calibration, classes, tested.logits, tested.distance)
    table = labelled(tested.paths, tested.labels, classes, said)
    files.write(run.run.directory / PREDICTIONS, table)


def result(run: Training, tested: Tested, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return result.json, which marks the run as complete.

    before: the one from the training, if files are built again.
    """
    assert run.progress.best is not None
    beside: dict[str, Any] = {}
    if tested.other:
        beside[tested.other.how] = {**tested.other.metrics, "pictures": tested.other.pictures}
    if run.progress.rewinds:
        beside["rewinds"] = run.progress.rewinds
    parent = lineage.of_run(run.run)
    if parent:
        beside["parent"] = parent
    return {
        "split": tested.split,
        **tested.metrics,
        "pictures": len(tested.labels),
        **beside,
        "best_epoch": run.progress.best["epoch"],
        "epochs": run.progress.epoch,
        "calibration": tested.quality.facts(),
        **_times(run, before),
        "identity": run.facts["identity"],
        "weights_file": run.run.loaded_weights(),
        "files": complete.promise(run.run),
    }


def _times(run: Training, before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the run's seconds, in all and of each stage, and their cost."""
    if before:
        return {key: before[key] for key in ("seconds", "stages", "dollars") if key in before}
    stages = {name: round(spent, 1) for name, spent in run.run.stages.in_all().items()}
    seconds = round(sum(stages.values()), 1)
    times: dict[str, Any] = {"seconds": seconds, "stages": stages}
    dollars = cost(seconds, run.config.platform.dollars_hour)
    if dollars is not None:
        times["dollars"] = round(dollars, 6)
    return times


def _rewinds(run: Training) -> dict[str, str]:
    """Return a line on where training diverged and went back."""
    places = [
        f"epoch {each['epoch']}, at step {each['step']} (loss {each['loss']}, learning rate "
        f"{each['lr']:.3g})"
        for each in run.progress.rewinds
    ]
    if not places:
        return {}
    return {"diverged": f"{'; '.join(places)}: gone back each time, with half the learning rate"}


def _parent(run: Training) -> dict[str, str]:
    """Return a line on the run from which this one continues."""
    parent = lineage.of_run(run.run)
    if parent is None:
        return {}
    what = {"state": "its end, with more epochs", "weights": "its weights"}[parent["what"]]
    return {"continues from": f"{parent['run']}: {what}"}


def _starts(run: Training) -> dict[str, str]:
    """Return a line on how often the run was started, if it was interrupted."""
    starts = run.run.stages.starts
    if starts == 1:
        return {}
    return {"starts": f"{starts}; the times are of all of them together"}


def _environment(run: Training) -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git revision": revision() or "unknown",
        "platform": run.config.platform.name,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **_starts(run),
        **{key: str(value) for key, value in run.machine.environment().items()},
    }
