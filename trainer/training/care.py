"""Care for the data of a run: when it is looked at, by whom, and where it is told."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.common import files
from trainer.common.console import ProgressBar, log
from trainer.images import care
from trainer.images.cache import Packed
from trainer.images.care import Finding, Findings
from trainer.images.folder import ImageFolder
from trainer.images.loader import Loader
from trainer.images.usable import interruptible, preprocessing, workers
from trainer.network import doubts
from trainer.network.device import Machine
from trainer.network.features import FeatureLoader
from trainer.training.run import Run

Features = Mapping[str, Callable[[], NDArray[np.float32]]]  # of a split: [N, width]


def look(run: Run, images: ImageFolder, packed: Packed) -> tuple[ImageFolder, Findings]:
    """Return the images as data.leaks says, and what was noticed about them.

    Rank 0 looks. Where leaks decide something, pixels are decoded for it if they are not packed.
    Raise UserError where leaks stop the run.
    """
    config, spec, findings = run.config, preprocessing(run.config), Findings()
    read = None
    if packed.kept or config.data.leaks != "warn":
        read = packed
    if run.world.is_main_process:
        with interruptible("comparing pictures", run.stop) as step:
            findings = care.look(images, read, spec.size, workers(config, run.world), step)
    run.world.barrier(run.stop)
    findings = run.world.broadcast_from_main(lambda: findings)
    findings.balanced = config.train.imbalance != "none"
    return care.keep_or_stop(images, findings, config.data.leaks), findings


def tell(run: Run, findings: Findings, data: Loader, machine: Machine) -> None:
    """Add what cached features say, and tell all: in the log and in care.csv. Rank 0 does."""
    if not run.looks or not run.world.is_main_process:
        return
    if isinstance(data, FeatureLoader) and run.config.model.weights is not None:
        views, valid = data.views, data.valid
        features: Features = {"train": lambda: _mean(views), "valid": lambda: np.asarray(valid)}
        # What judges them needs decompositions and 64 bits, which Apple's GPUs have not.
        device = torch.device("cpu") if machine.device.type == "mps" else machine.device
        with ProgressBar("looking for wrong labels", 1):
            judge(findings, data.loader.folder, features, device)
    write(findings, run.directory / "care.csv")


def _mean(views: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the mean of each training image's views."""
    total = np.zeros(views[0].shape, np.float32)
    for view in views:
        total += view
    return total / np.float32(len(views))


def judge(
    findings: Findings, images: ImageFolder, features: Features, device: torch.device
) -> None:
    """Add labels that the features contradict, and images unlike all others.

    features: gives those of each split, in the order of the images' splits, if it is asked.
    """
    everything = [picture for picture in care.pictures(images) if picture.split in features]
    if len(everything) > doubts.LIMIT:
        findings.unseen.append(
            "wrong labels and pictures unlike all others, "
            f"since there are more than {doubts.LIMIT:,} pictures"
        )
        return
    labels = np.concatenate([images.splits[split].labels for split in features])
    try:
        verdict = doubts.judge(
            np.concatenate([part() for part in features.values()]), labels, device
        )
    except RuntimeError as error:  # also what PyTorch raises for a full GPU
        # It is a word of advice: no run ends for it.
        reason = str(error).splitlines()[0]
        findings.unseen.append(f"wrong labels and pictures unlike all others: {reason}")
        return
    if verdict.right < doubts.KNOWN:
        findings.unseen.append(
            f"wrong labels: by its features alone the network tells only {verdict.right:.0%}"
        )
    for index in _worst(verdict.wrong, doubts.DOUBT):
        note = f"rather {images.classes[verdict.rather[index]]}, {verdict.wrong[index]:.0%}"
        findings.all.append(Finding("doubt", (everything[index],), note))
    for index in _worst(verdict.unlike, doubts.UNLIKE):
        findings.all.append(Finding("unlike", (everything[index],)))


def _worst(values: NDArray[np.float64], least: float) -> NDArray[np.int64]:
    """Return the indices of the values above `least`, the largest first."""
    indices = np.flatnonzero(values > least)
    return indices[np.argsort(-values[indices], kind="stable")]


def write(findings: Findings, path: Path) -> None:
    """Say a line for each kind of finding, and write all of them to `path`, a CSV."""
    files.write(path, findings.csv())
    for line, spoils in findings.lines():
        if spoils:
            log.warning(line)
        else:
            log.info(line)
    if findings.all:
        log.info("problems found in the pictures: %s", path)
