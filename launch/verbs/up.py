"""`python -m launch up`: makes or changes the account stack, after showing what changes."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from launch.cloud.account_stack import AccountStack
from launch.cloud.cloudformation import IN_SERVICE, STUCK, Content
from launch.cloud.confirm import confirmed
from launch.cloud.session import Aws
from launch.targets.spec import aws_of, split_overrides
from launch.verbs.arguments import add_every
from trainer.common.console import command, log
from trainer.common.errors import FAULT, OK, UserError


def up(aws: Aws, given: Mapping[str, str], yes: bool, every: float) -> int:
    """Create or change the account stack; return the exit code. Raise UserError, AwsError.

    The next `up` finishes what a killed one began.
    """
    stack = AccountStack(aws, every)
    before = stack.settle()
    if before is not None and not stack.is_ours(before):
        raise UserError(
            f"{stack.name}: account {aws.account} has a stack of this name without the tag "
            f"project={aws.project}, so it isn't yours; choose another name: "
            "target.project=NAME"
        )
    if before is not None and before["StackStatus"] in STUCK:
        _clear_away(stack, before)
        before = None
    leaving = {} if before is None else stack.shared_logs()
    if not stack.outlived_by(leaving):
        log.info(
            "%s owns log groups of the whole account: %s", stack.name, ", ".join(leaving.values())
        )
        log.info(
            "this takes two steps: the first marks them to be kept, the second takes them "
            "out of the stack; their logs stay"
        )
        if not confirmed("Do the first step?", yes):
            log.info("nothing was changed")
            return OK
        stack.keep_shared_logs()
    content = stack.content(given, before)
    name = _change_set_name(aws.project, content)
    if before is not None and stack.has_proposal(name):
        stack.discard(name)  # left by a killed `up`
    changes = stack.propose(name, content, first=before is None)
    if not changes:
        log.info("%s is as it should be: nothing to change", stack.name)
        return OK
    _show(stack.name, changes, leaving)
    if not confirmed("Make these changes?", yes):
        if before is None:
            stack.delete()  # the empty one that the change set made
        else:
            stack.discard(name)
        log.info("nothing was changed")
        return OK
    stack.execute(name)
    after = stack.settle()
    if after is None or after["StackStatus"] not in IN_SERVICE:
        for failure in stack.failures():
            log.error(failure)
        return FAULT
    for output in after.get("Outputs", []):
        log.info("%-20s %s", output["OutputKey"], output["OutputValue"])
    log.info("next:\n  %s", command("launch", "plan"))
    return OK


def _clear_away(stack: AccountStack, before: Mapping[str, Any]) -> None:
    status = before["StackStatus"]
    log.info("%s is left from an attempt that failed (%s): deleting it first", stack.name, status)
    stack.delete_ours(before)
    after = stack.settle()
    if after is not None:
        raise UserError(
            f"{stack.name}: it can't be deleted ({after['StackStatus']}): "
            f"{'; '.join(stack.failures()) or 'its events in the console say why'}"
        )


def _change_set_name(project: str, content: Content) -> str:
    """Return the same name for the same change, so that the next `up` finds it."""
    parameters = content.request(project)["Parameters"]
    digest = hashlib.sha256((content.body + json.dumps(parameters)).encode()).hexdigest()
    return f"{project}-{digest[:16]}"


def _show(stack: str, changes: Sequence[Mapping[str, Any]], leaving: Mapping[str, str]) -> None:
    log.info("%s: what changes", stack)
    for change in changes:
        logical = change["LogicalResourceId"]
        note = ""
        if logical in leaving:
            note = ", which stays in the account"
        elif change.get("Replacement") == "True":
            note = ", by a new one"
        log.info(
            "  %-7s %-26s %s%s",
            change["Action"].lower(),
            change["ResourceType"],
            change.get("PhysicalResourceId") or leaving.get(logical) or logical,
            note,
        )
    log.info(
        "it costs nothing itself; what you store in the bucket costs about $0.023 per GB and month"
    )


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch up", description=__doc__)
    parser.add_argument(
        "parameters",
        nargs="*",
        metavar="NAME=VALUE",
        help="parameters of the template, like InstanceTypes=g4dn.xlarge,g5.2xlarge",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_every(parser, 3, "how often CloudFormation is asked how far it is")
    options = parser.parse_intermixed_args(rest)
    if any("=" not in each for each in options.parameters):
        parser.error("parameters are NAME=VALUE")
    return up(
        aws_of(targets),
        dict(each.split("=", 1) for each in options.parameters),
        options.yes,
        options.every,
    )
