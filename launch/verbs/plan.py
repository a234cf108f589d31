"""`python -m launch plan`: what `submit` will send, and what it costs.

Also what it may touch, and what is missing. Changes nothing; needs no credentials.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from launch.cloud.session import Aws
from launch.planning import described, prepare
from launch.targets import overdue
from launch.targets.base import TargetConfig
from launch.targets.spec import NO_ACCOUNT, load_target, split_overrides
from trainer.common.arguments import typed_path
from trainer.common.console import command, log
from trainer.common.errors import OK, UserError


def show(what: dict[str, Any]) -> None:
    """Print a plan (launch.planning.described)."""
    log.info(
        "run       %s, attempt %d, in account %s, %s",
        what["run"],
        what["attempt"],
        what["account"],
        what["region"],
    )
    for line in what["means"]:
        log.info("means     %s", line)
    if what["state"]:
        log.info("before    %s", what["state"])
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
    if not what["requests"]:
        log.info("sends     nothing")
    for role, statements in what["may_touch"].items():
        log.info("may touch, as %s", role)
        for statement in statements:
            actions, resources = statement["actions"], statement["resources"]
            log.info("  %s\n    %s", statement["why"], ", ".join(actions))
            log.info("    on %s", ", ".join(resources))
    show_cost(what["cost"])
    for line in what["missing"]:
        log.warning("missing: %s", line)


def show_cost(cost: dict[str, Any]) -> None:
    """Print what a plan costs (launch.planning.cost)."""
    log.info(
        "costs     %s, at most %g hours (%s)",
        cost["machines"],
        cost["time_limit_hours"],
        cost["basis"],
    )
    this = " (this plan)" if cost["uses_spot"] else ""
    for name, key in (("an hour", "per_hour"), ("at the time limit", "at_time_limit")):
        if cost[key] is None:
            continue
        spot = cost[f"{key}_spot"]
        text = f"${cost[key]:.2f}"
        if spot is not None:
            text += f", with spot about ${spot:.2f}{this}"
        log.info("  %-18s %s", name, text)


def connect(target: TargetConfig) -> tuple[Aws | None, str]:
    """Return AWS, or None and why it can't be asked."""
    aws = Aws(target.project, target.region)
    try:
        if aws.has_credentials() and aws.account:
            return aws, ""
    except UserError as error:
        return None, str(error)
    return None, (
        f"credentials: there are none, so account {NO_ACCOUNT} stands for yours; "
        "sign in with aws sso login or aws configure"
    )


def job_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """Return what `plan` and `submit` are both asked for."""
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
    options = parser.parse_intermixed_args(rest)
    if options.json:
        log.setLevel(logging.WARNING)  # the document alone on standard output
    target = load_target(targets)
    aws, offline = connect(target)
    if aws is not None:
        overdue.warn(aws, targets)
    plan = prepare(aws, target, options.overrides, options.data, options.again)
    what = described(aws, plan, options.data, offline)
    if options.json:
        print(json.dumps(what, indent=2, default=str))
    else:
        show(what)
        log.info("next:\n  %s", command("launch", "submit", *arguments))
    return OK
