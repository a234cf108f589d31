"""`python -m launch status`: every run, and everything of this project that costs money now.

With hours and dollars so far.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from launch.cloud import ownership, s3, teardown
from launch.cloud.prices import GP3_GB_MONTH, HOURS_A_MONTH, price
from launch.cloud.session import AwsError
from launch.targets import attempt as notes
from launch.targets import base, overdue
from launch.targets.attempt import Attempt, Noted, Phase, State, now, seconds_between
from launch.targets.inventory import Inventory
from launch.targets.rented import Machines, Rented, rented
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK
from trainer.common.text import dollars

# Final phases of an attempt.
ENDED = (Phase.COMPLETE, Phase.STOPPED, Phase.LOST, Phase.NO_CAPACITY, Phase.FAILED)
SERVICES = ("ec2", "s3", "sagemaker")


def all_rented(inventory: Inventory) -> tuple[list[Rented], list[str]]:
    """Return what of this project costs money now, for all users, and what is unknown.

    The listings are fetched in parallel; if one is denied, the others still count.
    """
    listings: list[Callable[[Inventory], Iterator[Rented]]] = [kind.rented for kind in base.kinds()]
    listings += [_endpoints, _disks]

    def ask(listing: Callable[[Inventory], Iterator[Rented]]) -> list[Rented] | AwsError:
        try:
            return list(listing(inventory))
        except AwsError as error:
            return error

    with ThreadPoolExecutor(s3.WORKERS) as pool:
        answers = list(pool.map(ask, listings))
    rows = [row for answer in answers if isinstance(answer, list) for row in answer]
    return rows, [str(answer) for answer in answers if isinstance(answer, AwsError)]


def all_runs(inventory: Inventory, only: str | None = None) -> list[tuple[Attempt, State]]:
    """Return each attempt and its state; only: those of one run. Raise AwsError.

    The listings give nearly all states. The others are requested in parallel, and ended ones are
    recorded, so that the next `status` needn't ask again. If AWS doesn't tell one now, or not to
    this user, only that one is unknown.
    """

    def look(noted: Noted) -> tuple[Attempt, State]:
        attempt = noted.attempt
        try:
            state = base.of(attempt).listed(inventory, noted)
            if state is not None:
                return attempt, state
            state = base.of(attempt).observe(inventory.aws, attempt)
        except AwsError as error:
            return attempt, State(Phase.UNKNOWN, str(error), id=attempt.id)
        if state.phase in ENDED and state.id is not None and base.of(attempt).trains:
            with contextlib.suppress(AwsError):  # a user who may only read asks again next time
                notes.note_state(inventory.aws, attempt, state)
        return attempt, state

    with ThreadPoolExecutor(s3.WORKERS) as pool:
        every = inventory.noted()
        return list(pool.map(look, [each for each in every if only in (None, each.attempt.run)]))


def _disks(inventory: Inventory) -> Iterator[Rented]:
    """Yield disks that cost money though no machine runs with them."""
    stopped: set[str] = set()
    with contextlib.suppress(AwsError):  # `rented` says why
        stopped = {
            each["InstanceId"]
            for each in inventory.instances()
            if each["State"]["Name"] in ("stopping", "stopped")
        }
    for volume in teardown.volumes(inventory.aws, stopped):
        name, size = volume["VolumeId"], f"{volume['Size']} GB"
        if volume["State"] != "available":
            size += f" of {volume['Attachments'][0]['InstanceId']}"
        hour = volume["Size"] * GP3_GB_MONTH / HOURS_A_MONTH
        hours = seconds_between(volume["CreateTime"], now()) / 3600
        yield Rented("disk", name, size, hours, hours * hour, hour, None)


def _endpoints(inventory: Inventory) -> Iterator[Rented]:
    aws = inventory.aws
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
                yield rented("endpoint", name, machines, price(instance_type, aws.region))


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch status", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as one JSON document")
    parser.add_argument(
        "--end", action="store_true", help="terminate the machines that run past their time limits"
    )
    options = parser.parse_intermixed_args(rest)
    aws = aws_of(targets)
    account = aws.account  # clients are made here, not by several threads
    aws.prepare(SERVICES)
    inventory = Inventory(aws)
    inventory.prefetch()
    if options.end:
        overdue.end(inventory)
        inventory = Inventory(aws)
    else:
        overdue.warn(inventory, targets)
    costs_now, unknown = all_rented(inventory)
    why = ""  # the runs are not known
    try:
        tried = all_runs(inventory)
    except AwsError as error:
        if not costs_now:
            raise
        tried, why = [], str(error)
    if options.json:
        document = {
            "runs": [_as_json(*entry) for entry in tried],
            "costs_now": [asdict(row) for row in costs_now],
            "not_known": [*filter(None, [why]), *unknown],
        }
        print(json.dumps(document, indent=2))
        return OK
    log.info("runs of %s in account %s, %s", aws.project, account, aws.region)
    if why:
        log.warning("  not known: %s", why)
    else:
        show_runs(tried)
    log.info("costs money now")
    show_costs(costs_now)
    for line in unknown:
        log.warning("  not known: %s", line)
    if not costs_now and not unknown:
        log.info(
            "  nothing by the hour; what is stored in s3://%s costs about $0.023 per GB and month",
            aws.bucket,
        )
    log.info("prices: %s", price("ml.g4dn.xlarge", aws.region).basis)
    newest = {attempt.run: state for attempt, state in tried}
    if any(state.phase is Phase.LOST for state in newest.values()):
        log.info(
            "start the submit of a reclaimed run again, and it continues from its last checkpoint"
        )
    return OK


def show_runs(tried: Sequence[tuple[Attempt, State]]) -> None:
    """Print the newest attempt at each run, with the dollars of all of them."""
    newest = {attempt.run: (attempt, state) for attempt, state in tried}
    spent = dict.fromkeys(newest, 0.0)
    for attempt, state in tried:
        spent[attempt.run] += attempt.dollars(state) or 0.0
    for attempt, state in newest.values():
        log.info(
            "  %-48s %-15s attempt %d  %-13s %9s  %s",
            attempt.run,
            attempt.target,
            attempt.number,
            state.phase,
            dollars(spent[attempt.run]),
            state.detail,
        )
    if not newest:
        log.info("  none yet; begin with: python -m launch plan")


def show_costs(rows: Sequence[Rented]) -> None:
    """Print what costs money by the hour."""
    for row in rows:
        so_far = "price unknown"
        if row.dollars is not None:
            so_far = f"{dollars(row.dollars)} so far, ${row.per_hour:.4f} an hour"
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
