"""Evaluate a model on other labelled pictures: metrics, the report's page and a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.common import files
from trainer.images import folder
from trainer.images.decode import Preprocessing
from trainer.results import calibrate, report
from trainer.results.calibrate import Calibration
from trainer.results.intervals import wilson_interval
from trainer.results.prediction import predictions
from trainer.results.predictions import labelled
from trainer.training.metrics import classification
from trainer.training.run import PREDICTIONS

SPLIT = "test"  # the name of such a split


@dataclass(frozen=True)
class Evaluated:
    """N pictures and the model's predictions.

    title: names both. broken: (path, reason) of pictures that don't decode. facts: further lines
    about the machine and the model. config: the settings of its training.
    """

    title: str
    classes: Sequence[str]
    calibration: Calibration
    preprocessing: Preprocessing
    paths: Sequence[str]  # [N]
    labels: NDArray[np.int64]  # [N]
    logits: NDArray[np.float32]  # [N, classes]
    distance: NDArray[np.float32] | None  # [N]
    broken: Sequence[tuple[str, str]]
    facts: dict[str, str]
    config: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """Return loss, top1, top5 and f1."""
        named = classification(torch.from_numpy(self.logits), torch.from_numpy(self.labels), SPLIT)
        return {name.removeprefix(f"{SPLIT}_"): value for name, value in named.items()}


def write(evaluated: Evaluated, directory: Path, noted: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.html, predictions.csv and result.json; return result.json's content.

    noted: further entries for result.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metrics = evaluated.metrics()
    quality = None
    if evaluated.calibration.least_probability is not None:
        quality = calibrate.measure(
            evaluated.calibration, SPLIT, evaluated.logits, evaluated.labels, evaluated.distance
        )
    said = predictions(
        evaluated.calibration, evaluated.classes, evaluated.logits, evaluated.distance
    )
    table = labelled(evaluated.paths, evaluated.labels, evaluated.classes, said)
    files.write(directory / PREDICTIONS, table)
    page = report.Report(
        title=evaluated.title,
        split=SPLIT,
        history=[],
        best_epoch=0,
        metrics=metrics,
        classes=evaluated.classes,
        labels=evaluated.labels,
        probabilities=evaluated.calibration.probabilities(evaluated.logits),
        paths=evaluated.paths,
        broken=evaluated.broken,
        facts=evaluated.facts,
        config=evaluated.config,
        next_steps=[],
        trained=False,
        quality=quality,
    )
    spec = evaluated.preprocessing
    report.write(page, directory / "report.html", lambda path: folder.read_prepared(path, spec))
    hits = int((page.predictions == evaluated.labels).sum())
    interval = wilson_interval(hits, len(evaluated.labels))
    result = {
        **metrics,
        "pictures": len(evaluated.labels),
        "broken": len(evaluated.broken),
        "interval": [round(bound, 6) for bound in interval],
        **noted,
    }
    if quality is not None:
        result["calibration"] = quality.facts()
    files.write(directory / "result.json", json.dumps(result, indent=2))
    return result
