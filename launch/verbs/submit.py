"""`python -m launch submit`: carries out a plan.

`submit RUN` continues an existing run by its name, also without the folder of pictures. Every step
checks what an earlier, killed submit has done already, so the same command continues.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import pictures
from launch.cloud.confirm import confirmed
from launch.cloud.remedies import NO_CAPACITY
from launch.cloud.session import Aws, AwsError
from launch.planning import Plan, described, next_attempt, prepare
from launch.submission import ask_until_free, pause, submit, wait, with_elsewhere
from launch.targets import overdue
from launch.targets.base import console_url, of
from launch.targets.inventory import Inventory
from launch.targets.spec import (
    account_of,
    choose,
    load_target,
    noted_spec,
    resolved,
    split_overrides,
    weights_folder,
)
from launch.verbs.arguments import add_every
from launch.verbs.plan import expected, job_parser, show_cost
from trainer.common.console import command, log
from trainer.common.errors import OK, UserError


def _as_noted(aws: Aws, options: Namespace, targets: Sequence[str]) -> Plan:
    """Return the plan of the next attempt at a run given by its name: as the last was recorded.

    Raise UserError for other settings beside its name, except target.project, target.region,
    target.bucket and target.max_dollars.
    """
    words = options.overrides
    if len(words) > 1 or options.data is not None:
        raise UserError(
            f"{' '.join(words)}: a run given by its name continues as it was submitted; give "
            "its name alone, or all its settings as KEY=VALUE"
        )
    attempt = choose(aws, words)
    spec = noted_spec(aws, attempt)
    for word in targets:
        key = word.partition("=")[0]
        if key == "target.max_dollars":
            given: Any = load_target([f"target={attempt.target}", word])
            changed: Any = spec.target
            changed = replace(changed, max_dollars=given.max_dollars)
            spec = replace(spec, target=changed)
        elif key not in ("target", "target.project", "target.region", "target.bucket"):
            raise UserError(f"{word}: {attempt.run} continues as it was submitted; leave it out")
    return next_attempt(aws, spec.kind.pinned(spec, attempt), b"", options.again)


def agreed(aws: Aws, plan: Plan, data: Path | None, yes: bool) -> bool:
    """Repeat a plan's cost; ask on a terminal. Raise UserError for pictures that can't be used."""
    if not plan.requests:
        return True
    images = None
    if data is not None:
        line, images = pictures.look(plan.spec.target, plan.spec.overrides, data)
        log.info("pictures  %s", line)
    what = described(aws, plan, data, "")
    what["expected"] = expected(plan, images)
    show_cost(what)
    if yes or not sys.stdin.isatty():
        return True
    return confirmed("Rent it?", yes)


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = job_parser("submit", __doc__)
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait for a machine where AWS has none, follow the log to the end, and ask again for "
        "a spot machine that AWS took back",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask, on a terminal either")
    add_every(parser, 10, "with --wait: how often AWS is asked")
    options = parser.parse_intermixed_args(rest)
    target = load_target(targets)
    aws = account_of(target)
    weights = None
    runs = [word for word in options.overrides if "=" not in word]
    if runs:
        overdue.warn(Inventory(aws), targets)
        plan = _as_noted(aws, options, targets)
    else:
        resolved(target, options.overrides, options.data)  # report a mistake before AWS is asked
        overdue.warn(Inventory(aws), targets)
        plan = prepare(aws, target, options.overrides, options.data, options.again)
        weights = weights_folder(target, options.overrides, options.data)
    if not agreed(aws, plan, options.data, options.yes):
        log.info("nothing was sent")
        return OK
    try:
        attempt = submit(aws, plan, options.data, weights)
    except AwsError as error:
        if not (options.wait and (error.passes or re.fullmatch(NO_CAPACITY, error.code))):
            raise with_elsewhere(aws, plan.asked_for, error) from error
        pause(str(with_elsewhere(aws, plan.asked_for, error)), options.every)
        attempt = ask_until_free(
            aws,
            lambda: next_attempt(aws, plan.asked_for, plan.source, options.again),
            options.every,
            options.data,
            weights,
        )
    log.info("console   %s", console_url(attempt, aws.region))
    trains = of(attempt).trains
    where = [override for override in targets if not override.startswith("target=")]
    verbs = ("logs", "stop", "fetch", "cost") if trains else ("logs", "stop", "cost")
    next_lines = [command("launch", verb, attempt.run, *where) for verb in verbs]
    log.info("next:\n  %s", "\n  ".join(next_lines))
    if options.wait and trains:
        return wait(aws, attempt, plan, options.every)
    return OK
