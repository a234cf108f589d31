"""`python -m launch plan`: what `submit` will do, how long it takes, and what it costs.

It also shows what is missing. --full adds the requests, and what the machine may touch. It changes
nothing, and needs no credentials.
"""

import argparse
import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import pictures, readiness
from launch.cloud.remedies import DENIED
from launch.cloud.session import Aws, AwsError
from launch.estimate import START, estimate
from launch.planning import Plan, described, prepare
from launch.targets import overdue
from launch.targets.base import TargetConfig
from launch.targets.instance_types import OFFERED
from launch.targets.inventory import Inventory
from launch.targets.spec import NO_ACCOUNT, account_of, load_target, split_overrides
from trainer.common.arguments import typed_path
from trainer.common.console import command, log
from trainer.common.errors import OK, UserError
from trainer.common.text import dollars

# Training pictures of the data sets that ship with the trainer.
EMBEDDED_IMAGES = {"fashion_mnist": 2000}


def show(what: dict[str, Any]) -> None:
    """Print a plan (launch.planning.described and what `main` adds) on one screen."""
    log.info(
        "run       %s, attempt %d, in account %s, %s",
        what["run"],
        what["attempt"],
        what["account"],
        what["region"],
    )
    if what["state"]:
        log.info("before    %s", what["state"])
    if not what["requests"]:
        log.info("sends     nothing")
    for line in what["means"]:
        log.info("means     %s", line)
    if what["pictures"]:
        log.info("pictures  %s", what["pictures"])
    show_cost(what)
    for about, line in what["known"]:
        log.info("%-9s %s", about, line)
    for line in what["missing"]:
        log.warning("missing: %s", line)


def show_in_full(what: dict[str, Any]) -> None:
    """Print the requests, their destination, what the machine may touch, and the prices' source."""
    cost = what["cost"]
    parts = f"disk and address are {dollars(cost['disk_and_address_per_hour'])} of an hour"
    log.info("prices    %s; %s", cost["basis"], parts)
    for name, place in what["uploads"].items():
        if place:
            log.info("uploads   %s to %s", name, place)
    for request in what["requests"]:
        parameters = dict(request["parameters"])
        script = parameters.pop("UserData", None)
        shown = json.dumps(parameters, indent=2, ensure_ascii=False)
        log.info("sends     %s %s\n%s", request["service"], request["operation"], shown)
        if script is not None:
            log.info("UserData:\n%s", "\n".join(f"  | {line}" for line in script.splitlines()))
    for role, statements in what["may_touch"].items():
        log.info("may touch, as %s", role)
        for statement in statements:
            actions, resources = statement["actions"], statement["resources"]
            log.info("  %s\n    %s", statement["why"], ", ".join(actions))
            log.info("    on %s", ", ".join(resources))


def show_cost(what: dict[str, Any]) -> None:
    """Print a plan's machines, time and cost."""
    cost, expected = what["cost"], what["expected"]
    hours = cost["time_limit_hours"]
    took = ""
    if expected:
        took = f"about {_duration(expected['seconds'])} ({expected['by']}), "
    log.info("runs      %s; %sat most %g h", cost["machines"], took, hours)
    if cost["per_hour"] is None:
        return
    spot = cost["uses_spot"] and cost["per_hour_spot"] is not None
    kind = "_spot" if spot else ""
    hour = f"{dollars(cost[f'per_hour{kind}'])} an hour{' as spot' if spot else ''}"
    parts = [f"{hour} with disk" if cost["disk_and_address_per_hour"] else hour]
    if not spot and cost["per_hour_spot"] is not None:
        parts.append(f"as spot about {dollars(cost['per_hour_spot'])}")
    if expected:
        spent = cost[f"per_hour{kind}"] * expected["seconds"] / 3600
        told = dollars(spent)
        if not told.startswith("<"):
            told = f"about {told}"
        parts.insert(0, f"{told} expected")
    parts.append(f"{dollars(cost[f'at_time_limit{kind}'])} at the time limit")
    log.info("costs     %s (%s)", ", ".join(parts), cost["basis"].split(";")[0])
    if what.get("ceiling"):
        log.info("ceiling   %s for the whole run", dollars(what["ceiling"]["dollars"]))


def _duration(seconds: float) -> str:
    if seconds < 90 * 60:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.1f} h"


def expected(plan: Plan, images: int | None) -> dict[str, Any] | None:
    """Return how long its machines are paid for, and the estimate's source; None: unknown.

    images: of training; None: unknown.
    """
    spec = plan.spec
    known = [each for each in OFFERED if each.name == spec.target.instance_type and each.trains]
    if not known or images is None or not spec.kind.trains:
        return None
    machine = dataclasses.replace(known[0], count=spec.instances)
    took = estimate(machine, spec.config, images)
    if took is None:
        return None
    return {
        "seconds": START + took.run(spec.config, images),
        "by": f"{START / 60:.0f} to start, then the network's arithmetic: docs/instances.md",
    }


def looked_up(aws: Aws | None, plan: Plan, what: dict[str, Any], data: Path | None) -> None:
    """Add to a plan's data what its pictures and AWS tell: pictures, expected, known, missing."""
    spec = plan.spec
    images = EMBEDDED_IMAGES.get(spec.config.data.source)
    what["pictures"] = None
    if data is not None:
        try:
            what["pictures"], images = pictures.look(spec.target, spec.overrides, data)
        except UserError as error:
            what["missing"].append(f"pictures that can be trained on: {error}")
    what["expected"] = expected(plan, images)
    what["known"] = []
    if aws is not None and plan.requests:
        ready = readiness.ask(aws, plan)
        what["known"] = ready.known
        what["missing"] += ready.missing


def connect(target: TargetConfig) -> tuple[Aws | None, str]:
    """Return AWS, or None and the reason why it can't be asked."""
    aws = account_of(target)
    try:
        if aws.has_credentials() and aws.account:
            return aws, ""
    except UserError as error:
        return None, str(error)
    return None, (
        f"credentials: there are none, so account {NO_ACCOUNT} stands for yours; "
        "sign in with aws sso login or aws configure"
    )


def planned(
    aws: Aws | None, target: TargetConfig, options: argparse.Namespace
) -> tuple[Aws | None, Plan, str]:
    """Return AWS and the plan; instead of AWS the reason, if this user may not read the account.

    Raise UserError, AwsError.
    """
    words = target, options.overrides, options.data, options.again
    try:
        return aws, prepare(aws, *words), ""
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return None, prepare(None, *words), f"what exists already, since AWS refuses: {error}"


def job_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the options that `plan` and `submit` share."""
    parser = argparse.ArgumentParser(prog=f"python -m launch {verb}", description=description)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the trainer's settings, as for python -m trainer",
    )
    parser.add_argument(
        "--data",
        type=typed_path,
        metavar="DIR",
        help="the folder of pictures to upload, unless they are in the bucket",
    )
    parser.add_argument(
        "--again", action="store_true", help="one more attempt, also where the run is complete"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = job_parser("plan", __doc__)
    parser.add_argument("--json", action="store_true", help="the plan as one JSON document")
    parser.add_argument(
        "--full", action="store_true", help="also what is sent, and what the machine may touch"
    )
    options = parser.parse_intermixed_args(rest)
    if options.json:
        log.setLevel(logging.WARNING)  # the document alone on standard output
    target = load_target(targets)
    aws, offline = connect(target)
    if aws is not None:
        overdue.warn(Inventory(aws), targets)
    aws, plan, denied = planned(aws, target, options)
    what = described(aws, plan, options.data, offline or denied)
    looked_up(aws, plan, what, options.data)
    if options.json:
        print(json.dumps(what, indent=2, default=str))
    else:
        if options.full:
            show_in_full(what)
        show(what)
        words = [word for word in arguments if word != "--full"]
        log.info("next:\n  %s", command("launch", "submit", *words))
    return OK
