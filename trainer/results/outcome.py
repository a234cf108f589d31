"""What comes out of a training: its best weights, tested; a model package; a report; a result."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.common.git import revision
from trainer.images import folder
from trainer.images.names import suffix_of
from trainer.results import package, quantize, report
from trainer.results.report import Other
from trainer.settings.config import identity, metric_line
from trainer.training.loop import predict
from trainer.training.metrics import classification
from trainer.training.training import Training

# How far the loss of the best weights on valid may lie from what was noted for them: relative,
# absolute. Where nothing that the bits depend on has changed it is equal (metrics keep 6 digits);
# the rest is for kernels that a GPU or a compiler chooses anew.
SAME_LOSS_HERE = (1e-3, 1e-5)
SAME_LOSS_ELSEWHERE = (0.05, 0.01)  # another machine or precision


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
    probabilities: NDArray[np.float32]  # [N, classes]
    other: Other | None = None


def load_best(run: Training) -> None:
    """Load the best weights into the network.

    Raises UserError where they don't give the loss on valid that was noted for them.
    """
    checkpoints, progress = run.checkpoints, run.progress
    best = run.world.broadcast_from_main(
        lambda: checkpoints.best.state() if checkpoints.best else None
    )
    assert best is not None
    run.load_eval_weights(best["network"])
    valid = run.data.eval_batches("valid")
    logits, targets = predict(run, run.eval_model, valid, run.machine)

    def check() -> None:
        assert progress.best is not None
        epoch = progress.best["epoch"]
        losses = {row["epoch"]: row["valid_loss"] for row in progress.rows if "valid_loss" in row}
        given = classification(logits, targets, "valid")["valid_loss"]
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
    """Evaluate the whole network with its best weights, as it is packaged.

    From pixels, in float32. data.leaks says whether what is in train too counts; the figures of the
    other way go beside. Rank 0 alone has labels and probabilities of every image.
    """
    load_best(run)
    assert run.progress.best is not None
    split = "test" if "test" in run.loader.folder.splits else "valid"
    batches = run.loader.eval_batches(split)
    logits, targets = predict(run, run.network, batches, run.machine.in_float32())
    paths = run.loader.folder.splits[split].paths
    everything, clean = np.arange(len(paths)), _clean(run, paths)
    counted, beside, how = everything, clean, "without_leaks"
    if run.config.data.leaks == "drop" and len(clean):
        counted, beside, how = clean, everything, "with_leaks"

    def measure(numbers: NDArray[np.int64]) -> dict[str, float]:
        return classification(logits[numbers], targets[numbers], split)

    values = run.world.broadcast_from_main(lambda: measure(counted))
    other: Other | None = None
    if 0 < len(clean) < len(paths):
        others = run.world.broadcast_from_main(lambda: measure(beside))
        other = Other(how, len(beside), _bare(others, split))
    if split == "test":
        epoch = run.progress.best["epoch"]
        run.metrics_file.append({"epoch": epoch, "step": run.progress.step} | values)
        log.info(metric_line({"epoch": epoch} | values))
    if run.world.is_main_process:
        logits, targets = logits[counted], targets[counted]
    return Tested(
        split,
        _bare(values, split),
        [paths[number] for number in counted],
        targets.numpy(),
        logits.softmax(1).numpy(),
        other,
    )


def _clean(run: Training, paths: Sequence[str]) -> NDArray[np.int64]:
    """Return the places of the images that are not in train too."""
    leaked = run.findings.leaked
    return np.array([place for place, path in enumerate(paths) if path not in leaked], np.int64)


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
        config=identity(config),
        revision=revision(),
        golden=[split.paths[first] for first in firsts],
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
    package.build(run.network, contents, target, archive=target.suffix == ".gz")


def write_report(run: Training, tested: Tested) -> None:
    """Write report.html."""
    assert run.progress.best is not None
    images, pixels = run.loader.folder, run.loader.preprocessing
    report.write(
        report.Report(
            title=run.run.name,
            split=tested.split,
            history=[row for row in run.progress.rows if "valid_loss" in row],
            best_epoch=run.progress.best["epoch"],
            metrics=tested.metrics,
            classes=images.classes,
            labels=tested.labels,
            probabilities=tested.probabilities,
            paths=tested.paths,
            broken=images.broken,
            other=tested.other,
            findings=run.findings,
            facts=_environment(run),
            config=identity(run.config),
            next_steps=run.run.next_steps(),
        ),
        run.run.directory / "report.html",
        lambda path: folder.read_prepared(path, pixels),
    )


def result(run: Training, tested: Tested, seconds: float) -> dict[str, Any]:
    """Return what says that the run is complete. seconds: that it took."""
    assert run.progress.best is not None
    beside: dict[str, Any] = {}
    if tested.other:
        beside[tested.other.how] = {**tested.other.metrics, "pictures": tested.other.pictures}
    return {
        "split": tested.split,
        **tested.metrics,
        "pictures": len(tested.labels),
        **beside,
        "best_epoch": run.progress.best["epoch"],
        "epochs": run.progress.epoch,
        "seconds": round(seconds, 1),
        "identity": run.facts["identity"],
        "weights_file": run.run.loaded_weights(),
    }


def _environment(run: Training) -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git revision": revision() or "unknown",
        "platform": run.config.platform.name,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{key: str(value) for key, value in run.machine.environment().items()},
    }
