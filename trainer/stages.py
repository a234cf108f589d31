"""The stages of a run, one function each, in the order in which `trainer.__main__` calls them."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import cache, checkpoint, device, features, files, folder, metrics, model, optim, package, report
from trainer.augment import Augmentation
from trainer.config import Config, identity, metric_line
from trainer.console import Progress as ProgressBar
from trainer.console import log
from trainer.device import Machine
from trainer.folder import ImageFolder
from trainer.interrupt import Stop
from trainer.loader import Batches, Feed, Reader
from trainer.loop import Checkpoints, Learner, Progress, evaluate
from trainer.model import Classifier
from trainer.preprocess import PictureError, Preprocessing, prepare, shrink
from trainer.run import Run, check_identity


def read_pictures(config: Config, found: ImageFolder, run: Run, stop: Stop) -> tuple[ImageFolder, Reader | None]:
    """Decodes every picture once; those that fail are listed by name and left out. The reader gives the packed pixels; None: they weren't kept."""
    packed = None
    if config.data.cache == "packed" or (config.data.cache == "auto" and (config.model.cached_views or config.train.epochs) > 1):
        try:
            packed = pack_pictures(config, found, stop)
        except cache.TooLarge as error:
            if config.data.cache == "packed":
                raise
            log.info("pictures are decoded in each epoch: %s", error)

    def check(path: str) -> None:
        if packed is None:
            shrink(path, config.data.resize, config.data.interpolation)
        elif path in packed.broken:
            raise PictureError(packed.broken[path])

    with counted("checking pictures", stop) as step:
        found = folder.quarantine(found, check, 0 if packed else workers(config), config.data.max_broken, step)
    files.write(run.directory / "quarantine.txt", "".join(f"{path}\t{reason}\n" for path, reason in found.broken))
    for path, reason in found.broken[:10]:
        log.warning("left out: %s (%s)", path, reason)
    if len(found.broken) > 10:
        log.warning("left out %d pictures in all; see %s", len(found.broken), run.directory / "quarantine.txt")
    return found, packed


def pack_pictures(config: Config, found: ImageFolder, stop: Stop) -> cache.Packed:
    paths = [path for split in found.splits.values() for path in split.paths]
    limit = None if config.data.cache_gb is None else round(config.data.cache_gb * 1e9)
    root = Path(config.platform.cache) / "pixels"
    with counted("packing pictures", stop) as step:
        return cache.pack(paths, root, config.data.resize, config.data.interpolation, workers(config), limit, step)


@contextmanager
def counted(what: str, stop: Stop) -> Iterator[Callable[[int, int], None]]:
    """A progress callback(done, total) that raises Interrupted when asked to stop."""
    bar: ProgressBar | None = None

    def step(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or ProgressBar(what, total)
        bar.advance(done - bar.done)
        stop.check()

    try:
        yield step
    finally:
        if bar:
            bar.close()


def prepare_machine(config: Config) -> Machine:
    settings = config.train
    return device.prepare(settings.device, settings.precision, deterministic=settings.deterministic, threads=settings.threads)


def make_network(config: Config, found: ImageFolder, machine: Machine) -> Classifier:
    """The network on its device, with weights that depend on nothing but the seed and the settings."""
    torch.manual_seed(config.seed)
    settings = config.model
    network = model.build(
        settings.name,
        len(found.classes),
        weights=settings.weights,
        freeze=settings.freeze,
        head_hidden=settings.head_hidden,
        mean=settings.mean,
        std=settings.std,
        channels_last=config.train.channels_last,
    )
    at_once = min(config.train.batch_size, len(found.splits["train"].paths)) // config.train.accumulate
    model.check(network, settings.name, config.data.size, max(at_once, 1))
    network = network.to(machine.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    log.info("model: %s, %s parameters, %s trained, on %s in %s", settings.name, f"{parameters:,}", f"{trained:,}", machine.device, machine)
    return network


def make_feed(config: Config, found: ImageFolder, read: Reader | None, machine: Machine) -> Feed:
    settings = config.data.augment
    return Feed(
        found,
        preprocessing(config),
        Augmentation(
            scale=(settings.scale[0], settings.scale[1]), ratio=(settings.ratio[0], settings.ratio[1]), flip=settings.flip, trivial=settings.trivial
        ),
        config.train.batch_size,
        config.seed,
        workers(config),
        pin=machine.device.type == "cuda",
        read=read,
        views=config.model.cached_views if config.model.freeze == "backbone" else None,
    )


def cache_features(config: Config, network: Classifier, feed: Feed, machine: Machine, stop: Stop) -> Batches:
    """What the loop trains on: features, where the backbone is frozen and its views are fixed, else the pixels as they are."""
    if feed.views is None:
        return feed
    return features.extract(network, feed, Path(config.platform.cache), machine.device, machine.precision, stop)


def make_learner(config: Config, network: Classifier, batches: Batches, machine: Machine) -> Learner:
    choice = config.optim
    optimizer = optim.build(network, choice.name, lr=choice.lr, head_lr=choice.head_lr, weight_decay=choice.weight_decay, momentum=choice.momentum)
    trained = network if isinstance(batches, Feed) else network.head
    learner = Learner(trained, optimizer, machine.device, machine.precision, config.train.ema_decay)
    if config.train.compile:
        learner.forward = torch.compile(trained)
    return learner


def resume(config: Config, run: Run, learner: Learner, ledger: metrics.Ledger, found: ImageFolder, machine: Machine) -> tuple[Checkpoints, Progress]:
    """Where the run stands: at its newest good checkpoint, or at the beginning."""
    facts = {
        "identity": identity(config) | {"pictures": found.fingerprint},
        "classes": list(found.classes),
        "surroundings": machine.surroundings(),
    }
    cadence = checkpoint.Cadence(config.checkpoint.minutes, config.checkpoint.max_cost)
    checkpoints = Checkpoints(run.checkpoints, cadence, config.checkpoint.keep, ledger, facts)
    progress = Progress()
    if newest := checkpoint.newest(run.checkpoints):
        path, state = newest
        check_identity(state["facts"]["identity"], config, found.fingerprint, run.checkpoints)
        surroundings = machine.surroundings()
        for key, then in state["facts"]["surroundings"].items():
            if then != (now := surroundings[key]):
                log.warning("resumed, but no longer bit for bit: %s was %s, is %s", key, then, now)
        learner.restore(state)
        progress = Progress(**state["progress"])
        checkpoints.good.add(path.name)
        log.info("resumed from %s: %d of %d epochs complete, %d steps done", path, progress.epoch, config.train.epochs, progress.step)
    ledger.restore(progress.rows)
    return checkpoints, progress


@dataclass(frozen=True)
class Test:
    """The best weights on the test split (on valid, where there is no test)."""

    split: str
    metrics: dict[str, float]  # loss, top1, top5, f1
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.float32]  # [N, classes]


def test(run: Run, network: Classifier, learner: Learner, feed: Feed, progress: Progress, ledger: metrics.Ledger, stop: Stop) -> Test:
    """Loads the best weights into the network and evaluates all of it, from pixels, in float32: as it is packaged."""
    assert progress.best is not None
    best = checkpoint.load(run.checkpoints / progress.best["checkpoint"])
    learner.network.load_state_dict(best["network"])
    split = "test" if "test" in feed.folder.splits else "valid"
    logits, labels = evaluate(network, feed.plain(split), learner.device, torch.float32, stop)
    values = metrics.classification(logits, labels, split)
    if split == "test":
        ledger.append({"epoch": progress.best["epoch"], "step": progress.step} | values)
        log.info(metric_line({"epoch": progress.best["epoch"]} | values))
    return Test(split, {name.removeprefix(f"{split}_"): value for name, value in values.items()}, labels.numpy(), probabilities(logits))


def build_package(config: Config, run: Run, network: Classifier, feed: Feed, tested: Test, progress: Progress) -> None:
    """The model package, checked by a process of its own before it gets its name."""
    assert progress.best is not None
    split = feed.folder.splits[tested.split]
    firsts = [int(np.flatnonzero(split.labels == label)[0]) for label in np.unique(split.labels)[:8]]
    contents = package.Contents(
        classes=feed.folder.classes,
        preprocessing=feed.preprocessing,
        metrics={f"{tested.split}_{name}": value for name, value in tested.metrics.items()} | {"epoch": progress.best["epoch"]},
        config=identity(config),
        revision=revision(),
        golden=[split.paths[first] for first in firsts],
    )
    package.build(network, contents, run.package, archive=run.package.suffix == ".gz")


def write_report(config: Config, run: Run, feed: Feed, tested: Test, progress: Progress, machine: Machine) -> None:
    assert progress.best is not None
    report.write(
        report.Report(
            title=run.name,
            split=tested.split,
            history=[row for row in progress.rows if "valid_loss" in row],
            best_epoch=progress.best["epoch"],
            metrics=tested.metrics,
            classes=feed.folder.classes,
            labels=tested.labels,
            probabilities=tested.probabilities,
            paths=feed.folder.splits[tested.split].paths,
            broken=feed.folder.broken,
            facts=environment(config, machine),
            config=identity(config),
            next_steps=run.next_steps(),
        ),
        run.directory / "report.html",
        lambda path: prepare(path, feed.preprocessing),
    )


def result(config: Config, found: ImageFolder, tested: Test, progress: Progress, seconds: float) -> dict[str, Any]:
    """What says that the run is complete. identity: the settings and pictures that it is the result of."""
    assert progress.best is not None
    return {
        "split": tested.split,
        **tested.metrics,
        "pictures": len(tested.labels),
        "best_epoch": progress.best["epoch"],
        "epochs": progress.epoch,
        "seconds": round(seconds, 1),
        "identity": identity(config) | {"pictures": found.fingerprint},
    }


def workers(config: Config) -> int:
    """Threads that read pictures: data.workers, or one a core that this process may use."""
    if config.data.workers is not None:
        return config.data.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preprocessing(config: Config) -> Preprocessing:
    return Preprocessing(resize=config.data.resize, size=config.data.size, interpolation=config.data.interpolation)


def probabilities(logits: Tensor) -> NDArray[np.float32]:
    return logits.softmax(1).numpy()


def revision() -> str | None:
    """The git revision of this code, with `-dirty` where files were changed; None outside a checkout."""
    if known := os.environ.get("PACKHORSE_REVISION"):
        return known
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(config: Config, machine: Machine) -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git revision": revision() or "unknown",
        "platform": config.platform.name,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{key: str(value) for key, value in machine.surroundings().items()},
    }
