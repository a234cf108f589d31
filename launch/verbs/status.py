"""`python -m launch status`: every run, and everything of this project that costs money now.

With hours and dollars so far.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from launch.cloud import ownership, teardown
from launch.cloud.prices import price
from launch.cloud.session import Aws
from launch.targets import attempt as notes
from launch.targets import base, overdue
from launch.targets.attempt import Attempt, Phase, State, now, seconds_between
from launch.targets.rented import Machines, Rented, rented
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK


def all_rented(aws: Aws) -> Iterator[Rented]:
    """Yield what of this project costs money now, whoever started it. Raise AwsError."""
    for kind in base.kinds():
        yield from kind.rented(aws)
    yield from _endpoints(aws)
    for volume in teardown.volumes(aws):
        hours = seconds_between(volume["CreateTime"], now()) / 3600
        size = f"{volume['Size']} GB"
        yield Rented("disk", volume["VolumeId"], size, hours, None, None, None)


def _endpoints(aws: Aws) -> Iterator[Rented]:
    for summary in ownership.owned(aws, "Endpoint"):
        name = summary["EndpointName"]
        endpoint = aws.call("sagemaker", "DescribeEndpoint", EndpointName=name)
        config_name = endpoint["EndpointConfigName"]
        config = aws.call("sagemaker", "DescribeEndpointConfig", EndpointConfigName=config_name)
        types = {
            variant["VariantName"]: variant.get("InstanceType")
            for variant in config["ProductionVariants"]
        }
        for variant in endpoint.get("ProductionVariants", []):
            instance_type = types.get(variant["VariantName"])
            if instance_type:
                count = variant.get("CurrentInstanceCount", 1)
                machines = Machines(instance_type, endpoint["CreationTime"], count)
                yield rented(aws, "endpoint", name, machines)


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
    tried = [(each, base.of(each).observe(aws, each)) for each in notes.attempts(aws)]
    costs_now = list(all_rented(aws))
    if options.json:
        document = {
            "runs": [_as_json(*entry) for entry in tried],
            "costs_now": [asdict(row) for row in costs_now],
        }
        print(json.dumps(document, indent=2))
        return OK
    log.info("runs of %s in account %s, %s", aws.project, aws.account, aws.region)
    show_runs(tried)
    log.info("costs money now")
    show_costs(costs_now)
    if not costs_now:
        log.info(
            "  nothing by the hour; what lies in s3://%s costs about $0.023 per GB and month",
            aws.bucket,
        )
    log.info("prices: %s", price("ml.g4dn.xlarge", aws.region).basis)
    newest = {attempt.run: state for attempt, state in tried}
    if any(state.phase is Phase.LOST for state in newest.values()):
        log.info("a reclaimed run goes on from its last checkpoint when you start its submit again")
    return OK


def show_runs(tried: Sequence[tuple[Attempt, State]]) -> None:
    """Print the newest attempt at each run, with the dollars of all of them."""
    newest = {attempt.run: (attempt, state) for attempt, state in tried}
    spent = dict.fromkeys(newest, 0.0)
    for attempt, state in tried:
        spent[attempt.run] += attempt.dollars(state) or 0.0
    for attempt, state in newest.values():
        log.info(
            "  %-48s %-15s attempt %d  %-13s $%8.2f  %s",
            attempt.run,
            attempt.target,
            attempt.number,
            state.phase,
            spent[attempt.run],
            state.detail,
        )
    if not newest:
        log.info("  none yet; begin with: python -m launch plan")


def show_costs(rows: Sequence[Rented]) -> None:
    """Print what costs money by the hour."""
    for row in rows:
        so_far = "price unknown"
        if row.dollars is not None:
            so_far = f"${row.dollars:.2f} so far, ${row.per_hour:.4f} an hour"
        log.info(
            "  %-9s %-50s %-22s %7.2f h  %s", row.kind, row.name, row.machines, row.hours, so_far
        )


def _as_json(attempt: Attempt, state: State) -> dict[str, object]:
    return {
        "run": attempt.run,
        "attempt": attempt.number,
        "target": attempt.target,
        "job": attempt.job,
        "state": state.phase,
        "detail": state.detail,
        "hours": state.machine_seconds / 3600,
        "dollars": attempt.dollars(state),
    }
