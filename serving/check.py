"""`python -m serving check PACKAGE`: verify a model package, and print what it holds."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from serving.contract import Form
from serving.handler import write
from serving.locate import package_of
from serving.package import Package, load_for_command
from trainer.common.errors import OK, UserError
from trainer.results.calibrate import COVERAGE

SHOWN = 5  # classes that the output names


def main(arguments: Sequence[str]) -> int:
    """Verify a package, and print what it holds. arguments: the verb and its own.

    Raises UserError for a package that fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving check", description="Verify a model package."
    )
    parser.add_argument(
        "package",
        help="a model.tar.gz, the directory that it was unpacked into, a run's, or newest",
    )
    parser.add_argument(
        "--signed-by",
        metavar="KEY",
        default="",
        help="the public key that must have signed it: its PEM file, or the text that sign printed",
    )
    options = parser.parse_args(arguments[1:])
    path = package_of(options.package)
    package = load_for_command(path, signed_by=options.signed_by)
    _check_answers(package, path)
    classes = ", ".join(package.classes[:SHOWN])
    if len(package.classes) > SHOWN:
        classes += ", ..."
    preprocessing = package.preprocessing
    size, resize = preprocessing.size, preprocessing.resize
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in package.metrics.items())
    print(
        f"classes   {len(package.classes)} ({classes})\n"
        f"pictures  {size} x {size}, cut from a shorter side of {resize} "
        f"({preprocessing.interpolation})\n"
        f"metrics   {metrics}\n"
        f"built     {package.created}, from revision {package.revision or 'unknown'}\n"
        f"answers   {_calibration(package)}\n"
        f"golden    {package.golden} pictures, pixels equal, logits off by at most "
        f"{package.difference:.2g} (allowed: {package.allowed:.2g})\n"
        "ok"
    )
    return OK


def _check_answers(package: Package, path: Path) -> None:
    """Raise UserError unless the answers for the golden images apply the package's calibration.

    load() has compared the probabilities; this checks what a caller gets.
    """
    calibration = package.calibration
    probabilities = calibration.probabilities(package.golden_scores.logits)
    rows = json.loads(
        write(package.golden_scores, package, Form("labels", False), len(package.classes))
    )
    for row, expected in zip(rows, probabilities, strict=True):
        told = {entry["label"]: entry["probability"] for entry in row["labels"]}
        same = told == dict(zip(package.classes, expected.tolist(), strict=True))
        has_set = bool(row["set"]) and row["set"][0] == row["labels"][0]["label"]
        calibrated = calibration.least_probability is not None
        knows_unlike = calibration.farthest is not None
        if (same, has_set, row["sure"] is not None, row["unlike"] is not None) != (
            True,
            calibrated,
            calibrated,
            knows_unlike,
        ):
            raise UserError(f"{path}: the answer {row} is not calibrated as package.json says")


def _calibration(package: Package) -> str:
    """Return in a line what answers say besides the classes."""
    calibration = package.calibration
    if calibration.least_probability is None:
        return "softmax as it is: this package was built without calibration"
    words = (
        f"temperature {calibration.temperature:.3g}, sets at {COVERAGE}%, "
        f"by {calibration.pictures} pictures"
    )
    if calibration.farthest is not None:
        words += f"; unlike what was trained on: farther than {calibration.farthest:.3g}"
    return words
