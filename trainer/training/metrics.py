"""What a run reports of itself: classification metrics, and the ledger with one row an epoch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.common import files
from trainer.common.errors import naming
from trainer.common.text import noted
from trainer.network.device import counting
from trainer.training.tracking import Tracking


def mean_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the mean cross-entropy in nats, as it is noted.

    logits: float32 [N, classes]; labels: int64 [N].
    """
    return noted(functional.cross_entropy(logits, labels).item())


def classification(logits: Tensor, labels: Tensor, prefix: str) -> dict[str, float]:
    """Return cross-entropy, top-1, top-5 and macro F1, by names like `valid_top1`.

    logits: float32 [N, classes]; labels: int64 [N]. Top-1, top-5 and F1 lie in 0..1.
    """
    # imported here: torchmetrics pulls in torchvision, which a run doesn't need before its first
    # step.
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    classes = logits.shape[1]
    five = logits.topk(min(5, classes)).indices
    first = logits.argmax(dim=1)
    # A class among the first five counts as the right answer: so torchmetrics gets N predictions,
    # and not N x classes logits, which it would sort again for each figure.
    among = torch.where((five == labels[:, None]).any(dim=1), labels, first)
    with counting():
        values = {
            "top1": multiclass_accuracy(first, labels, classes, average="micro"),
            "top5": multiclass_accuracy(among, labels, classes, average="micro"),
            "f1": multiclass_f1_score(first, labels, classes, average="macro"),
        }
    metrics = {f"{prefix}_loss": mean_loss(logits, labels)}
    for name, value in values.items():
        metrics[f"{prefix}_{name}"] = noted(value.item())
    return metrics


LOWER_IS_BETTER = ("valid_loss", "valid_refinement")


def better(metrics: Mapping[str, float], best: Mapping[str, float], monitor: str) -> bool:
    """Return whether an epoch's metrics of valid beat the best so far, by the monitored one.

    Losses fall, everything else rises; where it is equal, as is common for few images, the lower
    loss at its best temperature is better: a package is calibrated.
    """
    if metrics[monitor] == best[monitor]:
        return metrics["valid_refinement"] < best["valid_refinement"]
    if monitor in LOWER_IS_BETTER:
        return metrics[monitor] < best[monitor]
    return metrics[monitor] > best[monitor]


class MetricsFile:
    """`metrics.jsonl`: one JSON object a row, in step with the checkpoints.

    path: None where another process writes it. tracking: where a team looks.

    The rows belong to the checkpoint too: a run that resumes goes on from the rows that its
    checkpoint holds, so no row is lost or written twice.
    """

    def __init__(self, path: Path | None, tracking: Tracking) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.tracking = tracking

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Make the file hold these rows, and no others."""
        self.rows = list(rows)
        if self.path is not None:
            files.write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.tracking.send(self.rows)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, to the file and where a team looks."""
        self.rows.append(row)
        if self.path is not None:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.tracking.send(self.rows)  # with those that were missed until now


class TrainSums:
    """Sums over the images trained on since the epoch began: loss, correct ones, images.

    What a step leaves is looked at FETCH_EVERY microbatches later: a GPU is not waited for in each,
    and a small network's steps are not held up by arithmetic that they don't need. It is added up
    one by one, so that the sums don't depend on where a run was interrupted.
    """

    FETCH_EVERY = 64

    def __init__(self, sums: list[float]) -> None:
        self._loss, self._correct, self._count = sums
        self._pending: list[tuple[int, Tensor, Tensor, Tensor]] = []
        # The first step with a loss that is no finite number, and that loss.
        self.bad: tuple[int, float] | None = None

    def add(self, step: int, loss: Tensor, output: Tensor, target: Tensor) -> None:
        """Take in a microbatch.

        step: its number, from 0; loss: summed over its images; output: logits [N, classes]; target:
        classes int64 [N], or probabilities [N, classes], of which none is counted as correct.
        """
        self._pending.append((step, loss.detach(), output.detach(), target))
        if len(self._pending) == self.FETCH_EVERY:
            self.fetch()

    def fetch(self) -> list[float]:
        """Return the sums so far. Waits for a GPU."""
        if self._pending:
            steps, losses, outputs, targets = zip(*self._pending, strict=True)
            self._pending = []
            # One by one, and not by `sum`, which since Python 3.12 rounds at its end alone.
            for step, value in zip(steps, torch.stack(losses).tolist(), strict=True):
                self._loss += value
                if self.bad is None and not math.isfinite(value):
                    self.bad = step, value
            self._count += sum(map(len, targets))
            if targets[0].ndim == 1:
                hits = torch.cat(outputs).argmax(1) == torch.cat(targets)
                self._correct += hits.sum().item()
        return [self._loss, self._correct, self._count]
