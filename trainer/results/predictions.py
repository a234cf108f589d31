"""A table of predictions, as CSV: RFC 4180 in UTF-8, a row for each picture."""

import csv
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.results.prediction import Prediction

SHOWN = 3  # most probable classes, by default


class Columns:
    """The columns of such a table, and the text of its rows."""

    def __init__(self, top: int, labelled: bool = False, model: str | None = None) -> None:
        """top: number of most probable classes. labelled: the true class is known.

        model: the package's name in each row; None: no such column.
        """
        self._top, self._labelled, self.model = top, labelled, model
        self.names = ["path"]
        if labelled:
            self.names += ["true_label", "correct"]
        self.names += ["label", "probability", "sure", "set", "unlike"]
        for place in range(2, top + 1):
            self.names += [f"label_{place}", f"probability_{place}"]
        self.names.append("error")
        if model is not None:
            self.names.append("model")

    def head(self) -> str:
        """Return the line of the names."""
        return _line(self.names)

    def row(self, path: str, outcome: Prediction | Exception, true_label: str = "") -> str:
        """Return the line of a picture: its prediction, or the reason why there is none."""
        values = {"path": path, "true_label": true_label}
        if isinstance(outcome, Prediction):
            values["correct"] = _flag(outcome.label == true_label)
            values["sure"], values["unlike"] = _flag(outcome.sure), _flag(outcome.unlike)
            values["set"] = _joined(outcome.members)
            for place in range(self._top):
                number = f"_{place + 1}" if place else ""
                values[f"label{number}"] = outcome.labels[place]
                values[f"probability{number}"] = f"{outcome.probabilities[place]:.6g}"
        else:
            values["error"] = str(outcome)
        values["model"] = self.model or ""
        return _line([values.get(name, "") for name in self.names])


def labelled(
    paths: Sequence[str],
    labels: Sequence[int] | NDArray[np.int64],
    classes: Sequence[str],
    said: Sequence[Prediction],
) -> str:
    """Return the table of N pictures whose classes are known, by name. labels: among `classes`."""
    columns = Columns(min(SHOWN, len(classes)), labelled=True)
    rows = sorted(zip(paths, labels, said, strict=True), key=lambda row: row[0])
    lines = [columns.row(path, each, classes[label]) for path, label, each in rows]
    return "".join([columns.head(), *lines])


def whole_rows(data: bytes) -> tuple[list[list[str]], int]:
    """Return the complete rows of a table, and their number of bytes."""
    length, end = 0, 0
    rows: list[list[str]] = []
    text: list[str] = []
    for line in io.BytesIO(data):
        end += len(line)
        text.append(line.decode(errors="replace"))
        row = "".join(text)
        # A quoted cell may hold line breaks: the row ends where its quotes do.
        if row.endswith("\n") and row.count('"') % 2 == 0:
            rows += csv.reader([row])
            length, text = end, []
    return rows, length


def _line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _flag(value: bool | None) -> str:
    if value is None:
        return ""
    return str(value).lower()


def _joined(names: Sequence[str] | None) -> str:
    r"""Return classes in one cell, as a|b; a | within one as \|."""
    if names is None:
        return ""
    return "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in names)
