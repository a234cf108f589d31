"""`python -m launch up`: makes or changes the account's foundation (launch/stacks/foundation.yaml), after showing what changes."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from launch import foundation
from launch.aws import Aws, AwsError
from launch.logs import NOTEBOOK_GROUP, TRAINING_GROUP
from launch.spec import aws_of, split_overrides
from trainer.console import log, python
from trainer.errors import FAULT, OK, UserError

ABSENT = r"does not exist"
NO_CHANGE_SET = r"ChangeSetNotFound|does not exist"
NO_CHANGES = r"didn't contain changes|No updates are to be performed|no changes"
BROKEN = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED", "REVIEW_IN_PROGRESS")  # a stack that never was, or is no more


def confirmed(question: str, yes: bool) -> bool:
    """The user's word. yes: given on the command line already. Raises UserError where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{question}: nobody can be asked here; look at what is shown above, then add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def describe(aws: Aws, stack: str) -> dict[str, Any] | None:
    """The stack as CloudFormation describes it; None where there is none."""
    found = aws.find("cloudformation", "DescribeStacks", ABSENT, StackName=stack)
    return next((each for each in found["Stacks"] if each["StackStatus"] != "DELETE_COMPLETE"), None) if found else None


def settled(aws: Aws, stack: str, every: float) -> dict[str, Any] | None:
    """Waits until CloudFormation has finished with a stack."""
    while (
        (found := describe(aws, stack)) is not None and found["StackStatus"].endswith("_IN_PROGRESS") and found["StackStatus"] != "REVIEW_IN_PROGRESS"
    ):
        time.sleep(every)
    return found


def parameters(aws: Aws, given: dict[str, str], before: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The template's parameters: given ones, else as they were, else found out from the account. Raises UserError for an unknown one."""
    declared = foundation.parameters()
    if unknown := given.keys() - declared.keys():
        raise UserError(f"{', '.join(sorted(unknown))}: there is no such parameter; allowed: {', '.join(declared)}")
    had = {each["ParameterKey"]: each["ParameterValue"] for each in (before or {}).get("Parameters", [])}
    values = {"Project": aws.project}
    for name, group in (("TrainingLogs", TRAINING_GROUP), ("NotebookLogs", NOTEBOOK_GROUP)):
        values[name] = had.get(name) or ("keep" if _has_log_group(aws, group) else "make")
    values = {name: default["Default"] for name, default in declared.items()} | had | values | given
    return [{"ParameterKey": name, "ParameterValue": values[name]} for name in declared]


def _has_log_group(aws: Aws, name: str) -> bool:
    return any(group["logGroupName"] == name for group in aws.pages("logs", "DescribeLogGroups", "logGroups", logGroupNamePrefix=name))


def up(aws: Aws, given: dict[str, str], yes: bool, every: float) -> int:
    """Makes or changes the foundation. A killed one is found and finished by the next. Raises UserError, AwsError."""
    stack = foundation.stack_name(aws.project)
    before = settled(aws, stack, every)
    if before is not None and before["StackStatus"] in BROKEN:
        log.info("%s is left from an attempt that failed (%s): deleting it first", stack, before["StackStatus"])
        aws.call("cloudformation", "DeleteStack", StackName=stack)
        before = settled(aws, stack, every)
        if before is not None:
            raise UserError(f"{stack}: it can't be deleted ({before['StackStatus']}); its events in the CloudFormation console say why")
    body = foundation.TEMPLATE.read_text()
    wanted = parameters(aws, given, before)
    name = f"{aws.project}-{hashlib.sha256((body + json.dumps(wanted)).encode()).hexdigest()[:16]}"
    # Where there is a change set of this name, a killed `up` has left it.
    if before is not None and aws.find("cloudformation", "DescribeChangeSet", NO_CHANGE_SET, StackName=stack, ChangeSetName=name) is not None:
        aws.call("cloudformation", "DeleteChangeSet", StackName=stack, ChangeSetName=name)
    aws.call(
        "cloudformation",
        "CreateChangeSet",
        StackName=stack,
        ChangeSetName=name,
        ChangeSetType="UPDATE" if before else "CREATE",
        TemplateBody=body,
        Parameters=wanted,
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Tags=[{"Key": "project", "Value": aws.project}],
        ClientToken=name,
    )
    change = _change_set(aws, stack, name, every)
    if change is None:
        log.info("%s is as it should be: nothing to change", stack)
        return OK
    log.info("%s: what changes", stack)
    for entry in change["Changes"]:
        resource = entry["ResourceChange"]
        replaced = ", by a new one" if resource.get("Replacement") == "True" else ""
        log.info(
            "  %-7s %-26s %s%s",
            resource["Action"].lower(),
            resource["ResourceType"],
            resource.get("PhysicalResourceId") or resource["LogicalResourceId"],
            replaced,
        )
    log.info("it costs nothing itself; what will lie in the bucket costs about $0.023 per GB and month")
    if not confirmed("Make these changes?", yes):
        if before is None:
            aws.call("cloudformation", "DeleteStack", StackName=stack)  # the empty one that the change set made
        else:
            aws.call("cloudformation", "DeleteChangeSet", StackName=stack, ChangeSetName=name)
        log.info("nothing was changed")
        return OK
    aws.call("cloudformation", "ExecuteChangeSet", StackName=stack, ChangeSetName=name, ClientRequestToken=name)
    after = settled(aws, stack, every)
    if after is None or after["StackStatus"] not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        for event in reversed(list(aws.pages("cloudformation", "DescribeStackEvents", "StackEvents", StackName=stack))):
            if event["ResourceStatus"].endswith("FAILED"):
                log.error("%s: %s", event["LogicalResourceId"], event.get("ResourceStatusReason", event["ResourceStatus"]))
        return FAULT
    for output in after.get("Outputs", []):
        log.info("%-20s %s", output["OutputKey"], output["OutputValue"])
    log.info("next:\n  %s -m launch plan", python())
    return OK


def _change_set(aws: Aws, stack: str, name: str, every: float) -> dict[str, Any] | None:
    """The change set when CloudFormation has worked it out; None where there is nothing to change."""
    while True:
        found = aws.call("cloudformation", "DescribeChangeSet", StackName=stack, ChangeSetName=name)
        if found["Status"] == "CREATE_COMPLETE":
            return found if found.get("Changes") else None
        if found["Status"] == "FAILED":
            reason = found.get("StatusReason", "")
            if any(words in reason for words in NO_CHANGES.split("|")):
                aws.call("cloudformation", "DeleteChangeSet", StackName=stack, ChangeSetName=name)
                return None
            raise AwsError(f"cloudformation:CreateChangeSet: {reason}", "FAILED", reason)
        time.sleep(every)


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch up", description=__doc__)
    parser.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help="parameters of the template, like InstanceTypes=g4dn.xlarge,g5.2xlarge")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--every", type=float, default=3, metavar="SECONDS", help="how often CloudFormation is asked how far it is (default 3)")
    options = parser.parse_intermixed_args(rest)
    if any("=" not in each for each in options.parameters):
        parser.error("parameters are NAME=VALUE")
    return up(aws_of(targets), dict(each.split("=", 1) for each in options.parameters), options.yes, options.every)
