"""`python -m launch instances`: the machines for a job, and what an epoch costs on each.

Also why the default is the default.
"""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from launch.cloud.prices import FALLBACK, price
from launch.estimate import GMACS, estimate, pixels
from launch.targets.base import TargetConfig
from launch.targets.instance_types import OFFERED, InstanceType
from launch.targets.spec import load_config, load_target, split_overrides
from trainer.common.arguments import whole
from trainer.common.errors import OK
from trainer.common.text import dollars
from trainer.settings import config as settings
from trainer.settings.config import Config

# The job of the estimates, if none is given.
REFERENCE = ("experiment=dog_breeds", "data.root=dogImages")
PICTURES = 6680  # its training pictures: 133 breeds
WIDTH = 150  # columns

HEAD = (
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


@dataclass(frozen=True)
class Workload:
    """What is to be trained, and the region of the prices."""

    config: Config
    images: int  # of training
    region: str

    def hour(self, machine: InstanceType) -> float | None:
        """Return the dollars an hour of all machines of a job, None where they are unknown."""
        one = price(machine.name, self.region).on_demand
        return None if one is None else one * machine.count

    def row(self, machine: InstanceType, mark: str) -> tuple[str, ...]:
        """Return the machine's row of the table, as HEAD names its columns."""
        hour = self.hour(machine)
        before = epoch = epoch_dollars = run_dollars = "-"
        took = estimate(machine, self.config, self.images)
        if took and machine.trains:
            before, epoch = _time(took.before), _time(took.epoch)
            if hour:
                epoch_dollars = dollars(took.epoch * hour / 3600)
                run_dollars = dollars(took.run(self.config, self.images) * hour / 3600)
        return (
            mark,
            machine.name if machine.count == 1 else f"{machine.count} x {machine.name}",
            str(machine.vcpus),
            str(machine.memory),
            machine.gpu or "-",
            "?" if hour is None else f"{hour:.4g}",
            before,
            epoch,
            epoch_dollars,
            run_dollars,
            machine.use,
        )

    def run(self, machine: InstanceType) -> tuple[float, float] | None:
        """Return the estimated seconds and dollars of the run, None where they are unknown."""
        took, hour = estimate(machine, self.config, self.images), self.hour(machine)
        if took is None or hour is None:
            return None
        seconds = took.run(self.config, self.images)
        return seconds, seconds / 3600 * hour


def table(job: Workload, chosen: TargetConfig) -> list[str]:
    """Return a row for each machine. chosen: the target whose machine is marked."""
    default = chosen.instance_type, getattr(chosen, "instances", 1)
    rows: list[tuple[str, ...]] = [HEAD]
    for machine in OFFERED:
        rows.append(job.row(machine, "*" if (machine.name, machine.count) == default else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def reasons(job: Workload) -> list[str]:
    """Return why each target's default is what it is, with this job's figures."""
    ec2, training, plain, four = (job.run(machine) for machine in OFFERED if machine.trains)
    first = (
        "target=ec2 takes g4dn.xlarge, the smallest machine with a GPU: its T4 has 16 GB, enough "
        "for every network of the table."
    )
    last = (
        "target=notebook takes ml.t3.medium: it only starts jobs, so two processors and 4 GB do; "
        "it is no machine to train on."
    )
    if not (ec2 and training and plain and four):
        return [first, last]
    return [
        f"{first} This run takes {_time(ec2[0])} for {dollars(ec2[1])} there, against "
        f"{_time(plain[0])} for {dollars(plain[1])} on the 8 processors of ml.m5.2xlarge: "
        f"{plain[0] / ec2[0]:.0f} times faster, at {ec2[1] / plain[1]:.0%} of the price.",
        "target=sagemaker and target=tuner take the same machine as ml.g4dn.xlarge: "
        f"{training[1] / ec2[1] - 1:.0%} more by the hour, and nothing to set up, end or "
        "clean up; the trials of a search run side by side.",
        f"target=sagemaker_multi takes 4 x ml.m5.2xlarge: {_time(four[0])} for "
        f"{dollars(four[1])}. It needs no GPU quota, and general-purpose machines are hardly "
        "ever sold out; it is the way to train when no GPU is available, not a cheaper one.",
        last,
    ]


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
        type=whole(),
        default=PICTURES,
        metavar="N",
        help=f"training pictures (default: {PICTURES:,}, the reference job's)",
    )
    options = parser.parse_args(rest)
    target = load_target(targets)
    config, _ = load_config(target, options.overrides or REFERENCE)
    job = Workload(config, options.pictures, target.region or FALLBACK)
    print(
        f"{config.model.name}, freeze={config.model.freeze}, {pixels(config)} px, "
        f"{job.images:,} pictures, {settings.epochs_for(config.train, job.images)} epochs; "
        f"* marks target={target.name}\n"
    )
    print("\n".join(table(job, target)))
    print()
    for line in reasons(job):
        print(textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  "))
    print()
    if config.model.name == settings.AUTO:
        print(
            "No estimate for auto, which measures before it chooses: "
            "model=resnet50 model.freeze=none gives that of one of its candidates."
        )
    elif config.model.name not in GMACS:
        print(
            f"No estimate for {config.model.name}: python -m trainer.doctor measures it on the "
            "machine that it runs on."
        )
    elif config.model.freeze == "backbone" and config.model.cached_views:
        print(
            f"before: the backbone's features are computed once, {config.model.cached_views} views "
            "each; the epochs train the head on them."
        )
    print(
        "Times are estimates (docs/instances.md says how); a machine's start costs minutes more. "
        f"Prices: {price('g4dn.xlarge', job.region).basis}."
    )
    return OK


def _time(seconds: float) -> str:
    if seconds == 0:
        return "-"
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
