"""`python -m serving evaluate MODEL DIR`: how good a model is on other labelled pictures."""

import argparse
import logging
import os
import platform
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from serving import bulk
from serving.backends import Scores
from serving.locate import package_of
from serving.package import Package, load_for_command
from serving.sources import Source, on_disk
from trainer.common import sessions
from trainer.common.arguments import typed_path
from trainer.common.console import ProgressBar, command, loading
from trainer.common.errors import OK, Unreadable, UserError, needed_by
from trainer.common.text import listed
from trainer.images import folder, identity, table
from trainer.images.decode import ImageError
from trainer.images.folder import File
from trainer.images.names import SPLIT_NAMES, alike, counted


@dataclass
class Labelled:
    """Pictures of the model's classes. labels: indices of their classes in the model's."""

    pictures: list[Source] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # by the picture's name
    notes: list[str] = field(default_factory=list)  # lines for the user


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the command line says. arguments: the verb and its own. Raises UserError."""
    options = _parser().parse_args(arguments[1:])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    found = _find(options.folder, options.labels, options.split)
    path = package_of(options.model)
    with ProgressBar("loading the model", 1):
        package = load_for_command(path, bulk.THREADS)
    labelled = _matched(found, package.classes, options.folder)
    for note in labelled.notes:
        print(note)
    sessions.end_when_asked()  # nothing is open while PyTorch is imported
    with needed_by("evaluate", "serve"), loading():
        # imported here: metrics and report are the trainer's, with PyTorch.
        from trainer.results import evaluation
    sessions.end_when_asked(clear=True)
    answers = _answers(package, labelled, _known(path))
    scores, broken, seen = answers.scores, answers.broken, answers.seen
    if not scores:
        raise UserError(f"{options.folder}: no picture can be read: {broken[0][0]}: {broken[0][1]}")
    if seen:
        print(
            f"the model has seen {seen} of these {len(scores)} pictures, in its run's "
            "train and valid: expect worse figures than these on new ones"
        )
    together = Scores.joined([*scores.values()])
    evaluated = evaluation.Evaluated(
        title=f"{path} on {options.folder}",
        classes=package.classes,
        calibration=package.calibration,
        preprocessing=package.preprocessing,
        paths=[*scores],
        labels=np.array([labelled.labels[name] for name in scores], np.int64),
        logits=together.logits,
        distance=together.distance,
        broken=broken,
        facts=_facts(package) | ({"seen in training": str(seen)} if seen else {}),
        config=package.config,
    )
    noted = {"model": package.digest, "data": str(options.folder)}
    with ProgressBar("report", 1):
        result = evaluation.write(evaluated, options.to, noted)
    low, high = result["interval"]
    words = f"top-1 {result['top1']:.1%} (95% interval {low:.1%} to {high:.1%}), "
    if len(package.classes) > 5:
        words += f"top-5 {result['top5']:.1%}, "
    print(f"{words}macro F1 {result['f1']:.1%}, {result['pictures']} pictures")
    print(f"report       {options.to / 'report.html'}")
    print(f"predictions  {options.to / 'predictions.csv'}")
    around = (options.folder, options.folder.parent)  # the folder may be a data set, or a part
    root = next((each for each in around if (each / "train").is_dir()), "DIR")
    going_on = command("trainer", f"data.root={root}", f"model.weights={path}")
    print(f"next, to train on from it: {going_on}")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving evaluate",
        description="Say how good a model is on labelled pictures that it has not seen.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model.tar.gz, a run's directory, or newest"
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        type=typed_path,
        help="a folder for each class, or such folders in test/ (else valid/); with --labels, "
        "where the table's pictures lie",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        type=typed_path,
        help="a table with the columns path and label, as data.labels",
    )
    parser.add_argument(
        "--split", choices=[*SPLIT_NAMES], help="only this part of DIR, or of the table"
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=typed_path,
        default=Path("evaluation"),
        help="to write report.html, predictions.csv and result.json to (default %(default)s)",
    )
    return parser


# --- the pictures ---


def _find(root: Path, labels: Path | None, split: str | None) -> dict[str, list[File]]:
    """Return the files by class; "": without a class. Raises UserError for a missing folder."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder")
    if labels is not None:
        return table.by_class(labels, str(root), split)
    splits = folder.find_splits(str(root), dict.fromkeys(SPLIT_NAMES))[0]
    there = [name for name in ("test", "valid", "train") if Path(splits[name]).is_dir()]
    if split is not None and split not in there:
        raise UserError(f"{root}: there is no folder for {split}; there is: {listed(there)}")
    if split or there:
        chosen = splits[split or there[0]]
        print(f"pictures of {chosen}")
        return folder.by_class(chosen)
    return folder.by_class(str(root))


def _matched(found: Mapping[str, list[File]], classes: Sequence[str], root: Path) -> Labelled:
    """Return the pictures whose class the model has. Raises UserError where there are none."""
    labelled = Labelled()
    left_out: list[str] = []
    unknown: list[str] = []
    for name, members in found.items():
        images = [file for file in members if not file.kind]
        left_out += [file.kind for file in members if file.kind]
        if name in classes:
            for file in images:
                labelled.pictures.append(on_disk(file.path, file.path, file.name))
                labelled.labels[file.path] = classes.index(name)
        elif images:
            unknown.append(f"{_compared(name, classes)}, {len(images)} pictures")
    if left_out:
        labelled.notes.append(f"left out: {counted(left_out)}")
    if unknown:
        labelled.notes.append(f"left out, classes that the model doesn't know: {listed(unknown)}")
    without = [name for name in classes if name not in found]
    if without:
        labelled.notes.append(f"no pictures of {len(without)} of its classes: {listed(without)}")
    if not labelled.pictures:
        raise UserError(
            f"{root}: no picture of a class that the model has ({listed(classes)}); "
            f"its folders: {listed(name for name in found if name) or 'none'}"
        )
    return labelled


def _compared(name: str, classes: Sequence[str]) -> str:
    near = alike(name, classes)
    if near is None:
        return name
    return f"{name} (the model has {near}: rename it)"


def _known(path: Path) -> set[str]:
    """Return the SHA-256 of the pictures that the model has seen, from the run beside it, if any.

    The run's valid counts too: it chose the epoch, calibrated the probabilities, and may have been
    used to solve the head.
    """
    samples = identity.noted(path.parent / "checkpoints" / identity.INDEX) or []
    return {content for split, _, content, _ in samples if split != "test"}


@dataclass
class Answers:
    """The scores of each picture by its name; broken pictures, with the reason.

    seen: how many pictures the model has seen in its training.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)
    seen: int = 0


def _answers(package: Package, labelled: Labelled, known: Container[str]) -> Answers:
    """Run the model on the pictures. Raises Unreadable for one that can't be read now."""

    def answer(picture: Source, data: bytes, scores: Scores) -> tuple[Scores, bool]:
        return scores, identity.of_bytes(data) in known

    answers = Answers()
    with ProgressBar("pictures", len(labelled.pictures)) as bar:
        for picture, outcome in bulk.each(package, labelled.pictures, answer):
            if isinstance(outcome, Unreadable):
                raise outcome
            if isinstance(outcome, ImageError):
                answers.broken.append((picture.name, str(outcome)))
            else:
                answers.scores[picture.name], is_known = outcome
                answers.seen += is_known
            bar.advance()
    return answers


def _facts(package: Package) -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": package.digest,
        "model built": package.created,
        "git revision of the model": package.revision or "unknown",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
