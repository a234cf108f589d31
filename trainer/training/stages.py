"""The stages of a run, one function each, in the order in which `trainer.__main__` calls them."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.common import files
from trainer.common.console import ProgressBar, log
from trainer.common.errors import UserError
from trainer.common.git import revision
from trainer.common.interrupt import Stop
from trainer.distributed.job import ALONE, Gradients, Job, Ordered, Replicated, World
from trainer.images import cache, folder
from trainer.images.augment import Augmentation
from trainer.images.decode import ImageError, Preprocessing
from trainer.images.folder import ImageFolder
from trainer.images.loader import Batches, ImageLoader, Reader
from trainer.images.sampler import Share
from trainer.network import build as model
from trainer.network import device, features, optim
from trainer.network.build import Classifier
from trainer.network.device import Machine
from trainer.results import package, quantize, report
from trainer.settings.config import Config, identity, metric_line
from trainer.training import checkpoint, metrics
from trainer.training.loop import Checkpoints, Learner, Progress, evaluate, trained_part
from trainer.training.run import Run, check_identity

# How far the loss of the best weights on valid may lie from what was noted for them: relative, absolute.
# Where nothing that the bits depend on has changed it is equal (metrics keep 6 digits); the rest is for
# kernels that a GPU or a compiler chooses anew.
SAME_LOSS_HERE = (1e-3, 1e-5)
SAME_LOSS_ELSEWHERE = (0.05, 0.01)  # another machine or precision


def read_pictures(
    config: Config, found: ImageFolder, run: Run, stop: Stop, world: World = ALONE
) -> tuple[ImageFolder, Reader | None]:
    """Decodes every picture once; those that fail are listed by name and left out. The reader gives the packed pixels; None: they weren't kept.

    The processes of a host share its cache: the first one packs, the others wait.
    """
    packed, wanted = None, preprocessing(config)
    if reads_more_than_once(config):
        try:
            packed = pack_pictures(config, found, stop, world)
        except cache.TooLarge as error:
            if config.data.cache == "packed":
                raise
            log.info("pictures are decoded in each epoch: %s", error)

    def check(path: str) -> None:
        if packed is None:
            folder.read_shrunk(path, wanted.resize, wanted.interpolation)
        elif path in packed.broken:
            raise ImageError(packed.broken[path])

    with counted("checking pictures", stop) as step:
        found = folder.quarantine(
            found, check, 0 if packed else workers(config, world), config.data.max_broken, step
        )
    broken = sorted(Path(path).name for path, _ in found.broken)
    world.check_same(
        {
            "pictures that can't be used": ", ".join(broken[:5]) or "none",
            "their number": str(len(broken)),
        },
        stop,
    )
    if not world.is_main_process:
        return found, packed
    files.write(
        run.directory / "quarantine.txt",
        "".join(f"{path}\t{reason}\n" for path, reason in found.broken),
    )
    for path, reason in found.broken[:10]:
        log.warning("left out: %s (%s)", path, reason)
    if len(found.broken) > 10:
        log.warning(
            "left out %d pictures in all; see %s",
            len(found.broken),
            run.directory / "quarantine.txt",
        )
    return found, packed


def reads_more_than_once(config: Config) -> bool:
    """Whether packed pixels are worth their disk."""
    assert config.train.epochs is not None  # weights.resolve
    return config.data.cache == "packed" or (
        config.data.cache == "auto" and (config.model.cached_views or config.train.epochs) > 1
    )


def pack_pictures(
    config: Config, found: ImageFolder, stop: Stop, world: World = ALONE
) -> cache.Packed:
    paths = [path for split in found.splits.values() for path in split.paths]
    limit = None if config.data.cache_gb is None else round(config.data.cache_gb * 1e9)
    root, wanted = Path(config.platform.cache) / "pixels", preprocessing(config)
    with counted("packing pictures", stop) as step:
        return cache.pack(
            paths, root, wanted.resize, wanted.interpolation, workers(config, world), limit, step
        )


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


def prepare_machine(config: Config, world: World = ALONE) -> Machine:
    settings = config.train
    machine = device.prepare(
        settings.device,
        settings.precision,
        deterministic=settings.deterministic,
        threads=settings.threads,
        processes=world.size if settings.exact_shards is None else "any",
        local_rank=world.local_rank,
        local_size=world.local_size,
    )
    if settings.compile:
        device.check_compiler(machine.device)
    if (
        world.size == 1
        and machine.device.type == "cuda"
        and (there := torch.cuda.device_count()) > 1
    ):
        log.warning(
            "one of %d GPUs is used; torchrun --nproc_per_node=%d -m trainer (make train GPUS=%d) uses all",
            there,
            there,
            there,
        )
    return machine


def share_of(config: Config, found: ImageFolder, world: World) -> Share:
    """What this process computes of each batch. Raises UserError where there are more processes than a batch can be divided among."""
    shards = config.train.exact_shards or world.size
    if shards < world.size:
        raise UserError(
            f"train.exact_shards={shards}, but {world.size} processes run: each needs a shard at least; start fewer, or give more shards"
        )
    at_once = min(config.train.batch_size, len(found.splits["train"].paths))
    if shards * config.train.accumulate > at_once:
        raise UserError(
            f"a batch of {at_once} pictures is divided among {world.size} processes, and train.accumulate={config.train.accumulate} splits each part "
            "further: that is less than a picture each; give a larger train.batch_size, or start fewer processes"
        )
    return Share(world.rank, world.size, shards)


def make_network(
    config: Config, found: ImageFolder, machine: Machine, world: World = ALONE
) -> Classifier:
    """The network on its device, with weights that depend on nothing but the seed and the settings."""
    torch.manual_seed(config.seed)
    settings = config.model
    assert settings.mean is not None and settings.std is not None  # weights.resolve
    with world.local_main_process_first() if settings.weights is not None else nullcontext():
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
    shards = share_of(config, found, world).shards
    at_once = (
        min(config.train.batch_size, len(found.splits["train"].paths))
        // shards
        // config.train.accumulate
    )
    model.check(network, settings.name, preprocessing(config).size, max(at_once, 1))
    network = network.to(machine.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(
        parameter.numel() for parameter in network.parameters() if parameter.requires_grad
    )
    name = f"{settings.name}, {model.origin(settings.name, settings.weights)}"
    log.info(
        "model: %s, %s parameters, %s trained, on %s in %s",
        name,
        f"{parameters:,}",
        f"{trained:,}",
        machine.device,
        machine,
    )
    if world.size > 1:
        mode = "fast" if config.train.exact_shards is None else f"exact, in {shards} shards"
        log.info(
            "processes: %d on %d host%s; %s", world.size, world.hosts, "s" * (world.hosts > 1), mode
        )
    return network


def make_loader(
    config: Config, found: ImageFolder, read: Reader | None, machine: Machine, world: World = ALONE
) -> ImageLoader:
    settings = config.data.augment
    return ImageLoader(
        found,
        preprocessing(config),
        Augmentation(
            scale=(settings.scale[0], settings.scale[1]),
            ratio=(settings.ratio[0], settings.ratio[1]),
            flip=settings.flip,
            trivial=settings.trivial,
        ),
        config.train.batch_size,
        config.seed,
        workers(config, world),
        pin=machine.device.type == "cuda",
        read=read,
        views=config.model.cached_views if config.model.freeze == "backbone" else None,
        share=share_of(config, found, world),
    )


def cache_features(
    config: Config,
    network: Classifier,
    feed: ImageLoader,
    machine: Machine,
    stop: Stop,
    world: World = ALONE,
) -> Batches:
    """What the loop trains on: features, where the backbone is frozen and its views are fixed, else the pixels as they are."""
    if feed.views is None:
        return feed
    extracted = features.extract(
        network, feed, Path(config.platform.cache), machine.device, machine.precision, stop, world
    )
    world.barrier(stop)
    return extracted


def make_learner(
    config: Config, network: Classifier, batches: Batches, machine: Machine, world: World = ALONE
) -> Learner:
    choice = config.optim
    assert choice.lr is not None
    optimizer = optim.build(
        network,
        choice.name,
        lr=choice.lr,
        head_lr=choice.head_lr,
        weight_decay=choice.weight_decay,
        momentum=choice.momentum,
    )
    trained = network if isinstance(batches, ImageLoader) else network.head
    forward: Any = device.compiled(trained) if config.train.compile else trained
    if config.train.exact_shards is not None:
        gradients: Gradients = Ordered(
            forward,
            world,
            batches.share,
            batches.global_batch_size,
            machine.device,
            trained_part(trained),
        )
    elif isinstance(world, Job):
        gradients = Replicated(
            forward,
            world,
            batches.share,
            batches.global_batch_size,
            machine.device,
            config.train.compression,
        )
    else:
        gradients = Gradients(forward)
    return Learner(
        trained,
        optimizer,
        machine.device,
        machine.precision,
        config.train.ema_decay,
        forward,
        gradients,
    )


def make_ledger(config: Config, run: Run, world: World) -> metrics.Ledger:
    if not world.is_main_process:
        return metrics.Ledger(None)
    return metrics.Ledger(
        run.directory / "metrics.jsonl",
        run.directory / "tensorboard" if config.train.tensorboard else None,
    )


def resume(
    config: Config,
    run: Run,
    learner: Learner,
    ledger: metrics.Ledger,
    found: ImageFolder,
    machine: Machine,
    world: World = ALONE,
) -> tuple[Checkpoints, Progress]:
    """Where the run stands: at its newest good checkpoint, or at the beginning."""
    facts = {
        "identity": identity(config) | {"pictures": found.fingerprint},
        "classes": list(found.classes),
        "environment": machine.environment(),
    }
    cadence = checkpoint.Cadence(config.checkpoint.minutes, config.checkpoint.max_cost)
    checkpoints = Checkpoints(
        run.checkpoints,
        cadence,
        config.checkpoint.keep,
        ledger,
        facts,
        writes=world.is_main_process,
    )
    progress = Progress()
    newest = world.broadcast_from_main(lambda: checkpoint.newest(run.checkpoints))
    if world.size > 1:
        check_strays(run, newest[0] if newest else None, world)
    if newest:
        path, state = newest
        check_identity(state["facts"]["identity"], config, found.fingerprint, run.checkpoints)
        environment = machine.environment()
        for key, then in state["facts"]["environment"].items():
            if then != (now := environment[key]):
                log.warning("resumed, but no longer bit for bit: %s was %s, is %s", key, then, now)
        learner.restore(state)
        progress = Progress(**state["progress"])
        checkpoints.go_on_from(path, state)
        log.info(
            "resumed from %s: %d of %d epochs complete, %d steps done",
            path,
            progress.epoch,
            config.train.epochs,
            progress.step,
        )
    elif world.size > 1:
        learner.restore(
            world.broadcast_from_main(learner.state)
        )  # the same beginning, also where hosts of different kinds made their own
    ledger.restore(progress.rows)
    return checkpoints, progress


def check_strays(run: Run, newest: Path | None, world: World) -> None:
    """Raises UserError where this host has a checkpoint that rank 0's hasn't, and that is newer: to go on without it would throw work away."""
    known = world.broadcast_from_main(
        lambda: [path.name for path in checkpoint.steps(run.checkpoints)]
    )
    here = [path for path in checkpoint.steps(run.checkpoints) if path.name not in known]
    if here and (newest is None or here[-1].name > newest.name):
        raise UserError(
            f"{here[-1]}: this host's checkpoint is newer than those of rank 0's host ({newest.name if newest else 'it has none'}); start this host "
            "as the first (torchrun --node_rank=0), or copy the checkpoint there, or delete it here"
        )


@dataclass(frozen=True)
class Test:
    """The best weights on the test split (on valid, where there is no test)."""

    split: str
    metrics: dict[str, float]  # loss, top1, top5, f1
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.float32]  # [N, classes]


def load_best(
    learner: Learner,
    batches: Batches,
    progress: Progress,
    checkpoints: Checkpoints,
    stop: Stop,
    world: World = ALONE,
) -> None:
    """Load the best weights into the network.

    Raises UserError where they don't give the loss on valid that was noted for them.
    """
    best = world.broadcast_from_main(lambda: checkpoints.best.state() if checkpoints.best else None)
    assert best is not None
    learner.load_eval_weights(best["network"])
    valid = batches.eval_batches("valid")
    logits, labels = evaluate(
        learner.eval_model(), valid, learner.device, learner.precision, stop, world
    )

    def check() -> None:
        assert progress.best is not None
        epoch = progress.best["epoch"]
        losses = {row["epoch"]: row["valid_loss"] for row in progress.rows if "valid_loss" in row}
        noted = losses[epoch]
        given = metrics.classification(logits, labels, "valid")["valid_loss"]
        here = best["environment"] == checkpoints.facts["environment"]
        relative, absolute = SAME_LOSS_HERE if here else SAME_LOSS_ELSEWHERE
        if not np.isclose(given, noted, relative, absolute, equal_nan=True):
            raise UserError(
                f"{checkpoints.root}: the best weights, of epoch {epoch}, give valid_loss={given}, but "
                f"{noted} was noted for them: the pictures, the pretrained weights or the files there have "
                "changed since; start a new run with another name=..."
            )

    world.broadcast_from_main(check)


def test(
    network: Classifier,
    learner: Learner,
    feed: ImageLoader,
    progress: Progress,
    ledger: metrics.Ledger,
    stop: Stop,
    world: World = ALONE,
) -> Test:
    """Evaluate all of the network, from pixels, in float32: as it is packaged."""
    assert progress.best is not None
    split = "test" if "test" in feed.folder.splits else "valid"
    logits, labels = evaluate(
        network, feed.eval_batches(split), learner.device, torch.float32, stop, world
    )
    values = world.broadcast_from_main(lambda: metrics.classification(logits, labels, split))
    if split == "test":
        ledger.append({"epoch": progress.best["epoch"], "step": progress.step} | values)
        log.info(metric_line({"epoch": progress.best["epoch"]} | values))
    return Test(
        split,
        {name.removeprefix(f"{split}_"): value for name, value in values.items()},
        labels.numpy(),
        probabilities(logits),
    )


def build_package(
    config: Config,
    run: Run,
    network: Classifier,
    feed: ImageLoader,
    tested: Test,
    progress: Progress,
) -> None:
    """The model package, checked by a process of its own before it gets its name."""
    assert progress.best is not None
    split = feed.folder.splits[tested.split]
    firsts = [
        int(np.flatnonzero(split.labels == label)[0]) for label in np.unique(split.labels)[:8]
    ]
    contents = package.Contents(
        classes=feed.folder.classes,
        preprocessing=feed.preprocessing,
        metrics={f"{tested.split}_{name}": value for name, value in tested.metrics.items()}
        | {"epoch": progress.best["epoch"]},
        config=identity(config),
        revision=revision(),
        golden=[split.paths[first] for first in firsts],
    )
    if config.package.int8:
        valid = feed.folder.splits["valid"]
        pictures = quantize.choose(valid.paths, valid.labels, feed.preprocessing)
        contents = replace(contents, int8=pictures, max_drop=config.package.max_drop)
    package.build(network, contents, run.package, archive=run.package.suffix == ".gz")


def write_report(
    config: Config, run: Run, feed: ImageLoader, tested: Test, progress: Progress, machine: Machine
) -> None:
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
        lambda path: folder.read_prepared(path, feed.preprocessing),
    )


def result(
    config: Config, found: ImageFolder, tested: Test, progress: Progress, seconds: float
) -> dict[str, Any]:
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


def workers(config: Config, world: World = ALONE) -> int:
    """Threads that read pictures: data.workers, or one a core that this process may use, of which the processes of a host have equal shares."""
    if config.data.workers is not None:
        return config.data.workers
    return max(device.cores() // world.local_size, 1)


def preprocessing(config: Config) -> Preprocessing:
    data = config.data
    assert (
        data.resize is not None and data.size is not None and data.interpolation is not None
    )  # weights.resolve
    return Preprocessing(resize=data.resize, size=data.size, interpolation=data.interpolation)


def probabilities(logits: Tensor) -> NDArray[np.float32]:
    return logits.softmax(1).numpy()


def environment(config: Config, machine: Machine) -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git revision": revision() or "unknown",
        "platform": config.platform.name,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{key: str(value) for key, value in machine.environment().items()},
    }
