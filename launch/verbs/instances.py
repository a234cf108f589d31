"""`python -m launch instances`: the machines for a job, what an epoch takes and costs on each, and why the default is the default.

Times are estimates from the network's arithmetic; where `python -m trainer.doctor` has run on such a machine, its measurement takes their place.
"""

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cloud.prices import FALLBACK, price
from launch.targets.spec import (
    SageMakerTarget,
    TargetConfig,
    load_config,
    load_target,
    split_overrides,
)
from trainer.common.errors import OK, UserError
from trainer.settings import config as settings
from trainer.settings.config import Config

REFERENCE = (
    "experiment=dog_breeds",
    "data.root=dogImages",
)  # the job that is reckoned with where none is given
PICTURES = 6680  # its training pictures: 133 breeds
DOCTOR = "doctor.json"  # in platform.cache of the local machine


@dataclass(frozen=True)
class Machine:
    name: str  # as in target.instance_type
    vcpus: int
    memory: int  # GiB
    gpu: str | None
    use: str  # what it is for
    target: str  # the target whose default it is, or would be
    count: int = 1


# vCPU, memory and GPU: AWS's tables of instance types.
MACHINES = (
    Machine("g4dn.xlarge", 4, 16, "T4 16 GB", "one training run on EC2", "ec2"),
    Machine(
        "ml.g4dn.xlarge",
        4,
        16,
        "T4 16 GB",
        "a training job, and each trial of a search",
        "sagemaker",
    ),
    Machine("ml.m5.2xlarge", 8, 32, None, "the same without a GPU", "sagemaker"),
    Machine(
        "ml.m5.2xlarge",
        8,
        32,
        None,
        "a training job on several machines",
        "sagemaker_multi",
        count=4,
    ),
    Machine("ml.t3.medium", 2, 4, None, "a notebook, from which jobs are started", "notebook"),
)

# GPUs of NVIDIA in the machines that have several: AWS's tables of instance types (2026-11).
_GPUS = {
    2: "g3.8xlarge g5g.16xlarge g5g.metal g7e.12xlarge",
    4: "g3.16xlarge g4dn.12xlarge g5.12xlarge g5.24xlarge g6.12xlarge g6.24xlarge "
    "g6e.12xlarge g6e.24xlarge g7e.24xlarge p3.8xlarge",
    8: "g4dn.metal g5.48xlarge g6.48xlarge g6e.48xlarge g7e.48xlarge p2.8xlarge p3.16xlarge "
    "p3dn.24xlarge p4d.24xlarge p4de.24xlarge p5.48xlarge p5e.48xlarge p5en.48xlarge "
    "p6-b200.48xlarge p6-b300.48xlarge",
    16: "p2.16xlarge",
}  # fmt: skip
GPUS = {name: count for count, names in _GPUS.items() for name in names.split()}


def has_gpu(instance_type: str) -> bool:
    """Whether machines of this type, with or without `ml.`, have GPUs of NVIDIA."""
    return re.match(r"(ml\.)?(p|g)\d", instance_type) is not None


def processes(instance_type: str, config: Config, instances: int = 1) -> int:
    """How many processes train, on all machines: one for each GPU, unless the settings say how many."""
    if config.train.processes is not None:
        return config.train.processes
    if config.train.device == "cpu" and instances == 1:
        return 1
    return instances * GPUS.get(instance_type.removeprefix("ml."), 1)


# Multiply-adds of a forward pass, in 1e9, of a 224 px picture: torchvision's model pages.
GMACS = {
    "resnet18": 1.81, "resnet34": 3.66, "resnet50": 4.09, "resnet101": 7.80, "resnet152": 11.51, "wide_resnet50_2": 11.40,
    "mobilenet_v2": 0.30, "mobilenet_v3_large": 0.22, "mobilenet_v3_small": 0.06, "efficientnet_b0": 0.39, "convnext_tiny": 4.46,
    "regnet_y_400mf": 0.40, "densenet121": 2.83, "vgg16": 15.47, "vit_b_16": 17.56, "swin_t": 4.49,
}  # fmt: skip

# Measured with ResNet-50 at 224 px on an AMD EPYC core (docs/instances.md): seconds a picture.
CORE_TRAINING, CORE_FORWARD, CORE_HEAD = 0.359, 0.102, 0.00007
MEASURED_GMACS = GMACS["resnet50"]

T4_PEAK = 65e12  # FLOP/s in float16, NVIDIA's data sheet
T4_SHARE = 0.15  # of the peak that convolutions reach in training: an assumption, near what is reported for ResNet-50 with mixed precision
TRAINING_PASSES = 3  # a backward pass costs two forward ones

# Of 4 machines training one network, from the bytes of its gradients and 5 Gbit/s (docs/instances.md); a frozen backbone sends its head's only.
EFFICIENCY = {"none": 0.93, "backbone": 0.99}


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run on one kind of machine. once: computing the features of a frozen backbone, before the first epoch."""

    once: float
    epoch: float
    measured: str | None = None  # by doctor: its date


def estimate(machine: Machine, config: Config, pictures: int) -> Estimate | None:
    """None where the network's arithmetic is not known."""
    if config.model.name not in GMACS:
        return None
    size = GMACS[config.model.name] * (_pixels(config) / 224) ** 2
    if machine.gpu:
        forward = 2e9 * size / (T4_PEAK * T4_SHARE)
        training, head = TRAINING_PASSES * forward, CORE_HEAD / machine.vcpus
    else:
        share = size / MEASURED_GMACS / machine.vcpus
        training, forward, head = (
            CORE_TRAINING * share,
            CORE_FORWARD * share,
            CORE_HEAD / machine.vcpus,
        )
    speed = 1.0 if machine.count == 1 else machine.count * EFFICIENCY[config.model.freeze]
    if config.model.freeze == "none":
        return Estimate(0.0, pictures * training / speed)
    if config.model.cached_views is None:
        return Estimate(0.0, pictures * forward / speed)
    views = min(config.model.cached_views, settings.epochs_for(config.train, pictures))
    return Estimate(pictures * views * forward / speed, pictures * head)


def measured(
    machine: Machine, config: Config, pictures: int, doctor: dict[str, object] | None
) -> Estimate | None:
    """What doctor measured on this kind of machine with this network; None where it did not."""
    if (
        doctor is None
        or (doctor["machine"], doctor["model"], doctor["freeze"])
        != (machine.name, config.model.name, config.model.freeze)
        or machine.count > 1
    ):
        return None
    return Estimate(
        float(str(doctor["once_seconds"])),
        pictures / float(str(doctor["images_per_second"])),
        str(doctor["date"]),
    )


def read_doctor(cache: Path) -> dict[str, object] | None:
    path = cache / DOCTOR
    if not path.exists():
        return None
    try:
        found: dict[str, object] = json.loads(path.read_text())
        return found
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: can't be read ({error}); run python -m trainer.doctor again, or delete it"
        ) from error


def table(
    config: Config,
    pictures: int,
    region: str,
    chosen: TargetConfig | None,
    doctor: dict[str, object] | None,
) -> list[str]:
    """A row for each machine. chosen: the target whose machine is marked."""
    head = (
        "",
        "machine",
        "vCPU",
        "GiB",
        "GPU",
        "$ an hour",
        "before",
        "epoch",
        "$ an epoch",
        "$ the run",
        "for",
    )
    rows = [head]
    for machine in MACHINES:
        hour = price(machine.name, region).on_demand
        found = measured(machine, config, pictures, doctor) or estimate(machine, config, pictures)
        rate = None if hour is None else hour * machine.count / 3600
        works = machine.target != "notebook"
        epochs = settings.epochs_for(config.train, pictures)
        rows.append(
            (
                "*"
                if chosen
                and (chosen.instance_type, _count(chosen)) == (machine.name, machine.count)
                else "",
                f"{machine.count} x {machine.name}" if machine.count > 1 else machine.name,
                str(machine.vcpus),
                str(machine.memory),
                machine.gpu or "-",
                "?" if hour is None else f"{hour * machine.count:.4g}",
                _time(found.once) if found and works else "-",
                (_time(found.epoch) + ("!" if found.measured else "")) if found and works else "-",
                _dollars(found.epoch * rate) if found and rate and works else "-",
                _dollars((found.once + epochs * found.epoch) * rate)
                if found and rate and works
                else "-",
                machine.use,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def reasons(config: Config, pictures: int, region: str) -> list[str]:
    """Why each target's default is what it is, with this job's figures."""

    def of(name: str, count: int = 1) -> tuple[float, float] | None:
        machine = next(entry for entry in MACHINES if (entry.name, entry.count) == (name, count))
        found, hour = estimate(machine, config, pictures), price(name, region).on_demand
        if found is None or hour is None:
            return None
        seconds = found.once + settings.epochs_for(config.train, pictures) * found.epoch
        return seconds, seconds / 3600 * hour * count

    ec2, job, plain, four = (
        of("g4dn.xlarge"),
        of("ml.g4dn.xlarge"),
        of("ml.m5.2xlarge"),
        of("ml.m5.2xlarge", 4),
    )
    lines = [
        "target=ec2 takes g4dn.xlarge, the smallest machine with a GPU: its T4 has 16 GB, enough for every network of the table."
    ]
    if ec2 and job and plain and four:
        lines[0] += (
            f" This run takes {_time(ec2[0])} for {_dollars(ec2[1])} there, against {_time(plain[0])} for {_dollars(plain[1])} on the 8 processors of"
            f" ml.m5.2xlarge: {plain[0] / ec2[0]:.0f} times faster, at {ec2[1] / plain[1]:.0%} of the price."
        )
        lines.append(
            f"target=sagemaker and target=tuner take the same machine as ml.g4dn.xlarge: {job[1] / ec2[1] - 1:.0%} dearer by the hour,"
            " and nothing to set up, end or clean up; the trials of a search run side by side."
        )
        lines.append(
            f"target=sagemaker_multi takes 4 x ml.m5.2xlarge: {_time(four[0])} for {_dollars(four[1])}. It needs no GPU quota,"
            " and general-purpose machines are hardly ever sold out; it is the way to train when no GPU can be had, not a cheaper one."
        )
    lines.append(
        "target=notebook takes ml.t3.medium: it only starts jobs, so two processors and 4 GB do; it is no machine to train on."
    )
    return lines


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m launch instances",
        description="The machines for a job, and what an epoch costs on each.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"the trainer's settings (default: {' '.join(REFERENCE)}, the reference job)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=PICTURES,
        metavar="N",
        help=f"training pictures (default: {PICTURES:,}, the reference job's)",
    )
    options = parser.parse_args(rest)
    target = load_target(targets)
    config, _ = load_config(target, options.overrides or REFERENCE)
    region = target.region or FALLBACK
    doctor = read_doctor(Path.home() / ".cache" / "packhorse")
    width = 150
    print(
        f"{config.model.name}, freeze={config.model.freeze}, {_pixels(config)} px, {options.pictures:,} pictures,"
        f" {settings.epochs_for(config.train, options.pictures)} epochs;"
        f" * marks target={target.name}\n"
    )
    print("\n".join(table(config, options.pictures, region, target, doctor)))
    print()
    for line in reasons(config, options.pictures, region):
        print(textwrap.fill(line, width, initial_indent="- ", subsequent_indent="  "))
    print()
    if config.model.name not in GMACS:
        print(
            f"No estimate for {config.model.name}: python -m trainer.doctor measures it on the machine that it runs on."
        )
    elif config.model.freeze == "backbone" and config.model.cached_views:
        print(
            f"before: the backbone's features are computed once, {config.model.cached_views} views each; the epochs train the head on them."
        )
    if any(measured(machine, config, options.pictures, doctor) for machine in MACHINES):
        print("!: measured there by python -m trainer.doctor.")
    print(
        f"Times are estimates (docs/instances.md says how); a machine's start costs minutes more. Prices: {price('g4dn.xlarge', region).basis}."
    )
    return OK


def _pixels(config: Config) -> int:
    return (
        config.data.size or settings.PLAIN.size
    )  # null: what the weights expect, which for all networks of the table is this


def _count(target: TargetConfig) -> int:
    return target.instances if isinstance(target, SageMakerTarget) else 1


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s" if seconds else "-"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _dollars(amount: float) -> str:
    return (
        f"${amount:.2f}" if amount >= 0.1 else f"${amount:.4f}" if amount >= 0.0001 else "< $0.0001"
    )
