"""`python -m launch status`: every run, and everything of this project that costs money now, with hours and dollars so far."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from launch.cloud import ownership
from launch.cloud.prices import price
from launch.cloud.session import Aws
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase, State, dollars
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK


@dataclass(frozen=True)
class Rented:
    """Something that costs money by the hour, as long as it is there."""

    kind: str
    name: str
    machines: str
    hours: float  # of all its machines together
    dollars: float | None  # so far; None: no price known
    per_hour: float | None
    run: str | None


def rented(aws: Aws) -> Iterator[Rented]:
    """What of this project costs money now, whoever started it and however. Raises AwsError."""
    yield from _instances(aws)
    yield from _training(aws)
    yield from _notebooks(aws)
    yield from _endpoints(aws)
    for volume in aws.pages(
        "ec2",
        "DescribeVolumes",
        "Volumes",
        Filters=[{"Name": "tag:project", "Values": [aws.project]}],
    ):
        if volume["State"] == "available":  # attached to nothing
            yield Rented(
                "disk",
                volume["VolumeId"],
                f"{volume['Size']} GB",
                _hours(volume["CreateTime"]),
                None,
                None,
                None,
            )


def _instances(aws: Aws) -> Iterator[Rented]:
    for found in ownership.instances(aws):
        if found["State"]["Name"] in ("pending", "running"):
            spot = found.get("InstanceLifecycle") == "spot"
            tags = {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])}
            yield _row(
                aws,
                "machine",
                found["InstanceId"],
                found["InstanceType"],
                1,
                found["LaunchTime"],
                spot,
                tags.get("run"),
            )


def _training(aws: Aws) -> Iterator[Rented]:
    """Training jobs and trials that run."""
    for summary in ownership.owned(aws, "TrainingJob", StatusEquals="InProgress"):
        name = summary["TrainingJobName"]
        found = aws.find("sagemaker", "DescribeTrainingJob", ownership.NOT_FOUND, TrainingJobName=name)
        if found is None:
            continue  # listed, and not yet described
        machines = found["ResourceConfig"]
        spot = found.get("EnableManagedSpotTraining", False)
        run = (
            found.get("OutputDataConfig", {})
            .get("S3OutputPath", "")
            .partition("/runs/")[2]
            .partition("/")[0]
            or None
        )
        yield _row(
            aws,
            "training",
            name,
            machines["InstanceType"],
            machines["InstanceCount"],
            found.get("TrainingStartTime"),
            spot,
            run,
        )


def _notebooks(aws: Aws) -> Iterator[Rented]:
    for found in ownership.owned(aws, "NotebookInstance"):
        if found["NotebookInstanceStatus"] in ("Pending", "InService", "Updating"):
            yield _row(
                aws,
                "notebook",
                found["NotebookInstanceName"],
                found["InstanceType"],
                1,
                found["LastModifiedTime"],
                False,
                None,
            )


def _endpoints(aws: Aws) -> Iterator[Rented]:
    for summary in ownership.owned(aws, "Endpoint"):
        name = summary["EndpointName"]
        found = aws.call("sagemaker", "DescribeEndpoint", EndpointName=name)
        config = aws.call(
            "sagemaker", "DescribeEndpointConfig", EndpointConfigName=found["EndpointConfigName"]
        )
        types = {
            variant["VariantName"]: variant.get("InstanceType")
            for variant in config["ProductionVariants"]
        }
        for variant in found.get("ProductionVariants", []):
            if types.get(variant["VariantName"]):
                count = variant.get("CurrentInstanceCount", 1)
                yield _row(
                    aws,
                    "endpoint",
                    name,
                    str(types[variant["VariantName"]]),
                    count,
                    found["CreationTime"],
                    False,
                    None,
                )


def _row(
    aws: Aws,
    kind: str,
    name: str,
    machine: str,
    count: int,
    since: datetime | None,
    spot: bool,
    run: str | None,
) -> Rented:
    hour = price(machine, aws.region).spot if spot else price(machine, aws.region).on_demand
    hours = count * _hours(since)
    spent = None if hour is None else hour * hours
    return Rented(
        kind,
        name,
        f"{count} x {machine}{' spot' if spot else ''}",
        hours,
        spent,
        None if hour is None else hour * count,
        run,
    )


def _hours(since: datetime | None) -> float:
    return (runs.now() - since).total_seconds() / 3600 if since else 0.0


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch status", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as one JSON document")
    parser.add_argument(
        "--end", action="store_true", help="terminate the machines that run past their time limits"
    )
    options = parser.parse_intermixed_args(rest)
    aws = aws_of(targets)
    if options.end:
        overdue.end(aws)
    else:
        overdue.warn(aws, targets)
    found = [(attempt, runs.observe(aws, attempt)) for attempt in runs.attempts(aws)]
    newest = {attempt.run: (attempt, state) for attempt, state in found}
    now = list(rented(aws))
    if options.json:
        print(
            json.dumps(
                {
                    "runs": [_run(*entry) for entry in found],
                    "costs_now": [asdict(row) for row in now],
                },
                indent=2,
            )
        )
        return OK
    log.info("runs of %s in account %s, %s", aws.project, aws.account, aws.region)
    for attempt, state in newest.values():
        spent = [dollars(each, how) for each, how in found if each.run == attempt.run]
        known = sum(value for value in spent if value is not None)
        log.info(
            "  %-48s %-15s attempt %d  %-13s $%8.2f  %s",
            attempt.run,
            attempt.target,
            attempt.number,
            state.phase,
            known,
            state.detail,
        )
    if not newest:
        log.info("  none yet; begin with: python -m launch plan")
    log.info("costs money now")
    for row in now:
        so_far = (
            "price unknown"
            if row.dollars is None
            else f"${row.dollars:.2f} so far, ${row.per_hour:.4f} an hour"
        )
        log.info(
            "  %-9s %-50s %-22s %7.2f h  %s", row.kind, row.name, row.machines, row.hours, so_far
        )
    if not now:
        log.info(
            "  nothing by the hour; what lies in s3://%s costs about $0.023 per GB and month",
            aws.bucket,
        )
    log.info("prices: %s", price("ml.g4dn.xlarge", aws.region).basis)
    if any(state.phase is Phase.LOST for _, state in newest.values()):
        log.info("a reclaimed run goes on from its last checkpoint when you start its submit again")
    return OK


def _run(attempt: Attempt, state: State) -> dict[str, object]:
    return {
        "run": attempt.run,
        "attempt": attempt.number,
        "target": attempt.target,
        "job": attempt.job,
        "state": state.phase,
        "detail": state.detail,
        "hours": state.machine_seconds / 3600,
        "dollars": dollars(attempt, state),
    }
