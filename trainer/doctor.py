"""`python -m trainer.doctor [key=value ...]`: what this machine can do with these settings.

It runs the real loop for some seconds on a sample of the real images, with its own cache, and
predicts from that. It starts no run.
"""

import argparse
import dataclasses
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.common import sessions
from trainer.common.console import ProgressBar, loading, log, to_terminal

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import
    with loading():
        import torch

import numpy as np
import torch

from trainer.common import files, programs
from trainer.common.arguments import positive
from trainer.common.command import guarded, leave
from trainer.common.cpu import cores
from trainer.common.errors import Interrupted, UserError
from trainer.common.interrupt import Stop, metadata
from trainer.common.paths import ARCHIVE
from trainer.common.text import amount
from trainer.distributed.world import World
from trainer.images import cache
from trainer.images.datasets import find_images
from trainer.images.folder import ImageFolder, Split
from trainer.images.loader import Batch, ImageLoader, Loader
from trainer.images.usable import (
    preprocessing,
    reads_more_than_once,
    report_left_out,
    workers,
)
from trainer.network import features, weights
from trainer.network.build import Classifier
from trainer.network.device import Machine
from trainer.network.features import FeatureLoader
from trainer.settings import config as settings
from trainer.settings.compose import explain_settings, resolve
from trainer.settings.config import CheckpointConfig, Config
from trainer.training import loop, recipe
from trainer.training.loop import train_one_epoch
from trainer.training.metrics import classification
from trainer.training.run import Run
from trainer.training.training import (
    Progress,
    Training,
    build_network,
    build_training,
    make_loader,
    prepare_machine,
)

PICTURES = 512  # of each split, at most
SLOW = 4.0  # seconds: a longer step is measured on fewer images
WAITING = 0.1  # share of the loop's time: above it, waiting for images is the bottleneck
NVME = Path("/opt/dlami/nvme")  # the scratch disk of AWS's Deep Learning AMI


@dataclass(frozen=True)
class Measured:
    """Rates in images or bytes a second. None: the run has no such work."""

    decode: float  # decoding and shrinking, by all threads: what packing costs
    picture_bytes: float  # of a packed image, on average
    load: float  # random views, without training
    extract: float | None  # the frozen backbone, one view
    train: float  # the loop as it runs: views, steps and moving average
    wait: float  # share of the loop's time spent waiting for images
    evaluate: float  # valid, as after each epoch
    write: float  # bytes, flushed to the disk of the runs
    copy: float  # bytes, within the memory
    link: float | None  # bytes, from page-locked memory to the GPU


@dataclass(frozen=True)
class Forecast:
    """How long a run takes, in seconds.

    once: before the first epoch (packing, features). training, evaluation: of one epoch.
    """

    once: float
    training: float
    evaluation: float

    @property
    def epoch(self) -> float:
        """Return the seconds of one epoch."""
        return self.training + self.evaluation


def main() -> int:
    """Measure for the settings of the command line; return the exit code."""
    sessions.end_when_asked(clear=True)
    to_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m trainer.doctor",
        description="Measures this machine, predicts a run's time, proposes settings.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as for python -m trainer"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=8.0,
        help="for measuring the loop, and half of it for each other part (default 8)",
    )
    options = parser.parse_intermixed_args()
    settings.register()
    return guarded(lambda: examine(options.overrides, options.seconds), log.log, explain_settings)


def examine(overrides: list[str], seconds: float) -> None:
    """Measure, predict and propose; print each."""
    resolved = resolve(overrides)
    config = settings.load(resolved.composed)
    for line in resolved.notes:
        log.info(line)
    for line in settings.ignored(config, overrides):
        log.warning(line)
    instance = instance_type()
    machine = prepare_machine(config, World())
    log.info("this machine\n%s\n", _table(machine_facts(config, machine, instance)))
    if lacking := programs.missing():
        log.info("for other commands\n%s\n", _table(lacking))
    images = find_images(config, words=overrides)
    glanced = recipe.glanced(config, machine.device.type)
    with loading("looking at the weights"):
        config = weights.resolve(glanced, images)
    with ProgressBar("building the network", 1):
        network = build_network(_run(config, Path()), images, machine)
    with ProgressBar("measuring, for less than a minute", 1):
        measured = measure(config, images, network, machine, seconds)
    prediction = predict(config, images, measured)
    log.info("\nmeasured\n%s", _table(measured_facts(measured, machine)))
    facts = run_facts(config, images, network, measured, prediction)
    log.info("\nthis run, about\n%s", _table(facts))
    lines = propose(config, images, measured, machine, instance) or ["nothing: it fits"]
    log.info("\nproposed\n%s", "\n".join(f"  {line}" for line in lines))


# --- measuring ---


def measure(
    config: Config, images: ImageFolder, network: Classifier, machine: Machine, seconds: float
) -> Measured:
    """Measure each part of the run on a sample.

    Takes about four times `seconds`; longer only where a single step does.
    """
    Path(config.platform.cache).mkdir(parents=True, exist_ok=True)
    # On the disk of the real cache, and gone afterwards.
    prefix = f"{files.TEMPORARY}doctor-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=config.platform.cache) as scratch:
        run = _run(config, Path(scratch))
        sample = _sampled(images)
        started = time.monotonic()
        packed = _pack(config, sample, run.directory)
        paths = [path for split in sample.splits.values() for path in split.paths]
        decode = len(paths) / (time.monotonic() - started)
        broken = (*images.broken, *packed.broken.items())
        report_left_out(dataclasses.replace(images, broken=broken))
        sample = _without(sample, packed.broken)
        usable = [path for split in sample.splits.values() for path in split.paths]

        reader = packed if reads_more_than_once(config) else None
        loader = make_loader(run, _as_many(sample, images), reader, machine)
        data: Loader = loader
        extract = None
        if loader.views is not None:
            extract = _extract_rate(network, loader, machine, seconds)
            data = _some_features(loader, network)

        def training_on(data: Loader) -> Training:
            return build_training(run, images, network=network, loader=loader, data=data)

        small = _resized(data, min(8, config.train.batch_size))
        data = _fewer(config, data, _trained(training_on(small), seconds / 4), machine)
        training = training_on(data)
        # The slow first steps (choosing kernels, allocating memory) don't count.
        _trained(training, seconds / 4)
        trained = _trained(training, seconds)
        return Measured(
            decode=decode,
            picture_bytes=float(np.mean([packed(path).size for path in usable])),
            load=_rate(loader.train_batches(0), seconds / 2),
            extract=extract,
            train=trained.count / trained.seconds,
            wait=trained.data_wait / trained.seconds,
            evaluate=_evaluate_rate(training, seconds / 2),
            write=_write_rate(run.directory),
            copy=_copy_rate(torch.device("cpu")),
            link=_copy_rate(machine.device) if machine.device.type == "cuda" else None,
        )


def _run(config: Config, directory: Path) -> Run:
    """Return a run that saves nothing, in `directory`."""
    never = CheckpointConfig(minutes=1e9, max_cost=1e-9, keep=2)
    # All layers: the first epochs, of the head alone, are few, and much faster.
    model = dataclasses.replace(config.model, unfreeze_epochs=None)
    config = dataclasses.replace(config, checkpoint=never, model=model)
    places = (directory, directory / "checkpoints", directory / ARCHIVE)
    return Run(config, World(), Stop(), "doctor", *places)


def _pack(config: Config, sample: ImageFolder, directory: Path) -> cache.Packed:
    paths = [path for split in sample.splits.values() for path in split.paths]
    pixels = preprocessing(config)
    store = cache.PixelCache(directory, pixels.resize, pixels.interpolation)
    return store.pack(paths, workers(config, World()), lambda *_: None)


@dataclass
class Trained:
    """The work of the loop, and its time."""

    count: float = 0.0  # images
    seconds: float = 0.0
    data_wait: float = 0.0


def _trained(training: Training, seconds: float) -> Trained:
    """Run the loop itself, up to the step after `seconds`.

    If an epoch ends before, start another one.
    """
    trained, deadline = Trained(), time.monotonic() + seconds
    with _stopped_at(deadline) as training.stop:
        while training.stop.reason is None and time.monotonic() < deadline:
            training.progress = Progress()
            with suppress(Interrupted):
                train_one_epoch(training)
            trained.count += training.progress.sums[2]
            trained.seconds += training.progress.seconds
            trained.data_wait += training.progress.data_wait
    return trained


def _fewer(config: Config, data: Loader, warm: Trained, machine: Machine) -> Loader:
    """Return the data in batches so small that a step of them takes at most SLOW.

    On a CPU time is in proportion to the images.
    """
    fit_in = int(SLOW * warm.count / warm.seconds)
    if machine.device.type == "cuda" or fit_in >= config.train.batch_size:
        return data
    return _resized(data, max(fit_in, min(8, config.train.batch_size), config.train.accumulate))


def _resized(data: Loader, batch_size: int) -> Loader:
    if isinstance(data, FeatureLoader):
        loader = dataclasses.replace(data.loader, batch_size=batch_size)
        return dataclasses.replace(data, loader=loader)
    assert isinstance(data, ImageLoader)
    return dataclasses.replace(data, batch_size=batch_size)


def _evaluate_rate(training: Training, seconds: float) -> float:
    training.stop = Stop()
    rate = 0.0
    for limit in (0.0, seconds):  # the first batch, and the import of torchmetrics, do not count
        started = time.monotonic()
        batches = _until(training.data.eval_batches("valid"), limit)
        logits, targets = loop.predict(training, training.eval_model, batches, training.machine)
        classification(logits, targets, "valid")
        rate = len(logits) / (time.monotonic() - started)
    return rate


def _extract_rate(
    network: Classifier, loader: ImageLoader, machine: Machine, seconds: float
) -> float:
    count, started = 0, time.monotonic()
    for batch in _until(loader.ordered_batches("train", 0, features.BATCH), seconds):
        features.compute(network, batch, machine.for_frozen())
        count += len(batch.target)
    return count / (time.monotonic() - started)


def _some_features(loader: ImageLoader, network: Classifier) -> FeatureLoader:
    """Return random features, as many as the run will have.

    They are only for timing the head.
    """
    width = network.features_width
    train = np.zeros((loader.folder.count("train"), width), np.float32)
    valid = np.zeros((loader.folder.count("valid"), width), np.float32)
    return FeatureLoader(loader, (train,), valid, valid if network.averages_flip else None)


def _rate(batches: Generator[Batch, None, None], seconds: float) -> float:
    count, started = 0, time.monotonic()
    for batch in _until(batches, seconds):
        count += len(batch.target)
    return count / (time.monotonic() - started)


def _until(batches: Generator[Batch, None, None], seconds: float) -> Iterator[Batch]:
    """Yield batches until the time is over: at least one."""
    deadline = time.monotonic() + seconds
    for batch in batches:
        yield batch
        if time.monotonic() >= deadline:
            break
    batches.close()


@contextmanager
def _stopped_at(deadline: float) -> Iterator[Stop]:
    stop = Stop()
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), stop.ask, ["the doctor"])
    timer.daemon = True
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()


def _write_rate(directory: Path, size: int = 64 << 20) -> float:
    data = os.urandom(size)  # random bytes, which no file system can compress
    started = time.monotonic()
    files.flush(directory / "disk", data)
    return size / (time.monotonic() - started)


def _copy_rate(to: torch.device, size: int = 256 << 20) -> float:
    source = torch.ones(size, dtype=torch.uint8, pin_memory=to.type == "cuda")
    target = torch.zeros(size, dtype=torch.uint8, device=to)
    started = time.monotonic()
    target.copy_(source)
    if to.type == "cuda":
        torch.cuda.synchronize()
    return size / (time.monotonic() - started)


# --- the sample ---


def _sampled(images: ImageFolder) -> ImageFolder:
    """Return some images of train and valid.

    They are chosen at random, so that their sizes are typical.
    """
    splits = {}
    for name in ("train", "valid"):
        split = images.splits[name]
        chosen = np.random.default_rng(0).permutation(len(split.paths))[:PICTURES]
        splits[name] = Split(tuple(split.paths[number] for number in chosen), split.labels[chosen])
    return dataclasses.replace(images, splits=splits)


def _without(sample: ImageFolder, broken: Mapping[str, str]) -> ImageFolder:
    splits = {}
    for name, split in sample.splits.items():
        good = [number for number, path in enumerate(split.paths) if path not in broken]
        if not good:
            first = split.paths[0]
            raise UserError(
                f"{first}: none of {len(split.paths)} pictures of {name} can be read "
                f"({broken[first]})"
            )
        splits[name] = Split(tuple(split.paths[number] for number in good), split.labels[good])
    return dataclasses.replace(sample, splits=splits)


def _as_many(sample: ImageFolder, images: ImageFolder) -> ImageFolder:
    """Return the sample, repeated until it has as many images as `images` has."""
    splits = {}
    for name, split in sample.splits.items():
        chosen = np.resize(np.arange(len(split.paths)), len(images.splits[name].paths))
        splits[name] = Split(tuple(split.paths[number] for number in chosen), split.labels[chosen])
    return dataclasses.replace(sample, splits=splits)


# --- predicting and proposing ---


def predict(config: Config, images: ImageFolder, measured: Measured) -> Forecast:
    """Return how long the run takes at the measured rates."""
    train, valid = (len(images.splits[name].paths) for name in ("train", "valid"))
    # Every image is packed, or checked for damage.
    once = sum(len(split.paths) for split in images.splits.values()) / measured.decode
    if measured.extract is not None:
        assert config.model.cached_views is not None and config.train.epochs is not None
        views = min(config.model.cached_views, config.train.epochs)
        of_valid = 2 * valid if config.train.tta == "flip" else valid
        once += (train * views + of_valid) / measured.extract
    batch = min(config.train.batch_size, train)
    return Forecast(once, train // batch * batch / measured.train, valid / measured.evaluate)


def propose(
    config: Config, images: ImageFolder, measured: Measured, machine: Machine, instance: str | None
) -> list[str]:
    """Return a line for each setting to change, with the reason."""
    lines = _used_gpu(machine)
    if (
        config.model.freeze == "backbone"
        and config.model.cached_views is None
        and not config.data.augment.mixup + config.data.augment.cutmix
    ):
        lines.append(
            "model.cached_views=2: the frozen backbone would run once for each of 2 views, "
            "and not in every epoch"
        )
    if measured.wait > WAITING:
        lines.append(_faster_reading(config, measured))
    if not config.train.channels_last and measured.extract is None:
        lines.append("train.channels_last=true: convolutions are faster that way on most machines")
    if machine.device.type == "cuda" and machine.precision == torch.float32:
        lines.append("train.precision=auto: half precision is several times as fast on this GPU")
    if NVME.is_mount() and config.platform.name == "local":
        lines.append(
            f"platform=ec2: runs and cache on the fast disk {NVME}, and the run saves when a "
            "spot notice comes"
        )
    if instance and instance.startswith("t") and machine.device.type == "cpu":
        lines.append(
            f"an instance other than {instance}, whose full speed lasts for short bursts "
            "only; see python -m launch instances"
        )
    free = shutil.disk_usage(config.platform.cache).free
    packed = packed_bytes(images, measured)
    if reads_more_than_once(config) and packed > free:
        lines.append(
            f"platform.cache=DIR on a larger disk: {amount(packed)} of packed pixels do not fit "
            f"into {amount(free)}"
        )
    return lines


def _used_gpu(machine: Machine) -> list[str]:
    lines = []
    driver = nvidia_driver()
    if driver and not torch.cuda.is_available():
        build = "is built without CUDA"
        if torch.version.cuda is not None:
            build = f"is built for CUDA {torch.version.cuda}, and the driver may be too old for it"
        lines.append(
            f"a GPU that works: there is one ({driver}), but PyTorch {torch.__version__} {build}; "
            "see pytorch.org/get-started"
        )
    if machine.device.type == "cpu" and torch.cuda.is_available():
        lines.append("train.device=cuda: this machine's GPU is idle")
    return lines


def _faster_reading(config: Config, measured: Measured) -> str:
    waited = f"{measured.wait:.0%} of the time is spent waiting for"
    if not reads_more_than_once(config):
        return f"data.cache=packed: {waited} pictures to be decoded"
    threads = config.data.workers
    if threads is not None and threads < cores():
        return f"data.workers=null: {waited} pictures, read by {threads} of {cores()} cores"
    return f"data.augment.trivial=false, or a machine with more cores: {waited} random views"


def packed_bytes(images: ImageFolder, measured: Measured) -> float:
    """Return the bytes of all images as packed pixels."""
    return measured.picture_bytes * sum(len(split.paths) for split in images.splits.values())


# --- output ---


def machine_facts(config: Config, machine: Machine, instance: str | None) -> dict[str, str]:
    """Return the machine's facts, as a table's names and values."""
    runs = _existing(Path(config.platform.run_dir or config.platform.runs))
    kept = _existing(Path(config.platform.cache))
    free_for_runs = amount(shutil.disk_usage(runs).free)
    free_for_cache = amount(shutil.disk_usage(kept).free)
    capability = torch.backends.cpu.get_cpu_capability()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    held = credentials(instance) or "none found"
    return {
        "instance": instance or "not on EC2, it seems",
        "processor": (
            f"{platform.machine()}, {cores()} of {os.cpu_count()} cores may be used, {capability}"
        ),
        "memory": amount(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "GPU": gpu(machine) or "none",
        "driver": nvidia_driver() or "none",
        "PyTorch": (
            f"{torch.__version__} ({build}), Python {platform.python_version()}, "
            f"computes on {machine.device} in {machine}"
        ),
        "free disk": f"{free_for_runs} for runs ({runs}), {free_for_cache} for the cache ({kept})",
        "AWS credentials": f"{held} (training needs none, python -m launch does)",
    }


def measured_facts(measured: Measured, machine: Machine) -> dict[str, str]:
    """Return the measured rates, as a table's names and values."""
    facts = {
        "decoding": f"{measured.decode:,.0f} pictures/s",
        "random views": f"{measured.load:,.0f} pictures/s, without training",
        "frozen backbone": f"{measured.extract:,.1f} pictures/s" if measured.extract else "",
        "training": (
            f"{measured.train:,.1f} pictures/s, {measured.wait:.0%} of the time waiting for them"
        ),
        "evaluation": f"{measured.evaluate:,.1f} pictures/s",
        "disk": f"{measured.write / 1e6:,.0f} MB/s written and flushed",
        "memory": f"{measured.copy / 1e9:.1f} GB/s copied",
        "link to the GPU": f"{measured.link / 1e9:.1f} GB/s" if measured.link else "",
    }
    return {name: value for name, value in facts.items() if value}


def limited_by(measured: Measured) -> str:
    """Return what limits an epoch."""
    if measured.wait > WAITING:
        return "reading pictures"
    return "the network's steps" if measured.extract is None else "the head's steps"


def run_facts(
    config: Config,
    images: ImageFolder,
    network: Classifier,
    measured: Measured,
    prediction: Forecast,
) -> dict[str, str]:
    """Return the run's forecast, as a table's names and values."""
    once_limit = "the frozen backbone" if measured.extract is not None else "decoding"
    epochs = config.train.epochs
    assert epochs is not None
    total = prediction.once + epochs * prediction.epoch
    packed = "none"
    if reads_more_than_once(config):
        packed = amount(packed_bytes(images, measured))
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return {
        "an epoch": (
            f"{duration(prediction.epoch)}: {duration(prediction.training)} training, "
            f"{duration(prediction.evaluation)} evaluation"
        ),
        "limited by": limited_by(measured),
        "once, before": (
            f"{duration(prediction.once)}, limited by {once_limit}; skipped where it is "
            "cached already"
        ),
        "all epochs": f"{duration(total)} for {epochs}",
        "packed pixels": packed,
        "a checkpoint": f"at least {amount(size)}, written in {duration(size / measured.write)}",
    }


# --- facts of the machine ---


def instance_type() -> str | None:
    """Return EC2's or SageMaker's name of this machine; None elsewhere.

    The metadata service is asked only on a machine that looks like EC2.
    """
    name = os.environ.get("SM_CURRENT_INSTANCE_TYPE")
    if name:
        return name
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    told = "AWS_EC2_METADATA_SERVICE_ENDPOINT" in os.environ
    if not told and not (vendor.exists() and "Amazon" in vendor.read_text()):
        return None
    try:
        return metadata("instance-type")
    except OSError:
        return "EC2, whose metadata service does not answer"


def credentials(instance: str | None) -> str | None:
    """Return where AWS credentials would come from, without reading their values."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        if name in os.environ:
            return f"in the environment ({name})"
    if any(name.startswith("AWS_CONTAINER_CREDENTIALS_") for name in os.environ):
        return "of the container's role"
    for path in (Path.home() / ".aws/credentials", Path.home() / ".aws/config"):
        if path.exists():
            return f"in {path}"
    with suppress(OSError):
        if instance and metadata("iam/security-credentials/"):
            return "of the instance's role"
    return None


def nvidia_driver() -> str | None:
    """Return the GPUs and the driver's version from nvidia-smi; None without a driver."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi fails ({error})"
    return "; ".join(line.strip() for line in answer.stdout.split("\n") if line.strip())


def gpu(machine: Machine) -> str | None:
    """Return the run's GPUs, from PyTorch; None without any."""
    if machine.device.type != "cuda":
        return "one, not used" if torch.cuda.is_available() else None
    device = torch.cuda.get_device_properties(machine.device)
    native = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
    return (
        f"{torch.cuda.device_count()} x {device.name}, {amount(device.total_memory)}, "
        f"compute capability {device.major}.{device.minor}, {native} native bf16"
    )


def _existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def duration(seconds: float) -> str:
    """Return seconds as text, in s, min or h."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<23} {value}" for name, value in facts.items())


if __name__ == "__main__":
    leave(main(), globals())
