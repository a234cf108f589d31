"""`python -m launch up`: makes or changes the account's foundation (launch/cloud/stacks/foundation.yaml), after showing what changes."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

from launch.cloud import foundation
from launch.cloud.logs import SHARED_GROUPS
from launch.cloud.session import Aws, AwsError
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log, python
from trainer.common.errors import FAULT, OK, UserError

ABSENT = r"does not exist"
NO_CHANGE_SET = r"ChangeSetNotFound|does not exist"
NO_CHANGES = r"didn't contain changes|No updates are to be performed|no changes"
BROKEN = (
    "ROLLBACK_COMPLETE",
    "ROLLBACK_FAILED",
    "DELETE_FAILED",
    "REVIEW_IN_PROGRESS",
)  # a stack that never was, or is no more


def confirmed(question: str, yes: bool) -> bool:
    """The user's word. yes: given on the command line already. Raises UserError where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            f"{question}: nobody can be asked here; look at what is shown above, then add --yes"
        )
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def describe(aws: Aws, stack: str) -> dict[str, Any] | None:
    """The stack as CloudFormation describes it; None where there is none."""
    found = aws.find("cloudformation", "DescribeStacks", ABSENT, StackName=stack)
    return (
        next((each for each in found["Stacks"] if each["StackStatus"] != "DELETE_COMPLETE"), None)
        if found
        else None
    )


def settled(aws: Aws, stack: str, every: float) -> dict[str, Any] | None:
    """Waits until CloudFormation has finished with a stack."""
    while (
        (found := describe(aws, stack)) is not None
        and found["StackStatus"].endswith("_IN_PROGRESS")
        and found["StackStatus"] != "REVIEW_IN_PROGRESS"
    ):
        time.sleep(every)
    return found


def parameters(
    aws: Aws, given: dict[str, str], before: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The template's parameters: given ones, else as they were, else its defaults. Raises UserError for an unknown one."""
    declared = foundation.parameters()
    if unknown := given.keys() - declared.keys():
        raise UserError(
            f"{', '.join(sorted(unknown))}: there is no such parameter; allowed: {', '.join(declared)}"
        )
    had = {
        each["ParameterKey"]: each["ParameterValue"]
        for each in (before or {}).get("Parameters", [])
    }
    values = (
        {name: default["Default"] for name, default in declared.items()}
        | had
        | {"Project": aws.project}
        | given
    )
    return [{"ParameterKey": name, "ParameterValue": values[name]} for name in declared]


def is_ours(aws: Aws, stack: dict[str, Any]) -> bool:
    """Whether a stack of the foundation's name is this project's. One that no change set was carried out on has nothing yet, no tags either."""
    return stack["StackStatus"] == "REVIEW_IN_PROGRESS" or aws.owns(stack.get("Tags", []))


def stack_resources(aws: Aws, stack: str) -> list[dict[str, Any]]:
    """What is in a stack now."""
    found = aws.pages(
        "cloudformation", "ListStackResources", "StackResourceSummaries", StackName=stack
    )
    return [each for each in found if each["ResourceStatus"] != "DELETE_COMPLETE"]


def shared_logs(aws: Aws, stack: str) -> dict[str, str]:
    """The log groups of the whole account that the first edition put into the stack: names in its template to their own."""
    found = {
        each["LogicalResourceId"]: each.get("PhysicalResourceId", "")
        for each in stack_resources(aws, stack)
    }
    return {logical: name for logical, name in found.items() if name in SHARED_GROUPS}


def keep_shared_logs(aws: Aws, stack: str, every: float) -> None:
    """Lets the log groups of the whole account outlive the stack, so that they stay when they leave it. Raises UserError, AwsError."""
    logs = shared_logs(aws, stack)
    if _outlive(aws, stack, logs):
        return
    had = describe(aws, stack)
    assert had is not None
    aws.call(
        "cloudformation",
        "UpdateStack",
        StackName=stack,
        TemplateBody=foundation.outliving(_template(aws, stack), logs),
        Parameters=[
            {key: each[key] for key in ("ParameterKey", "ParameterValue")}
            for each in had["Parameters"]
        ],
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Tags=[{"Key": "project", "Value": aws.project}],
    )
    after = settled(aws, stack, every)
    if after is None or after["StackStatus"] != "UPDATE_COMPLETE":
        raise UserError(
            f"{stack}: it would delete log groups of the whole account, and can't be changed; its events in the console say why"
        )


def _outlive(aws: Aws, stack: str, logs: Collection[str]) -> bool:
    """Whether these log groups outlive the stack already."""
    return not logs or foundation.outliving(_template(aws, stack), logs) == _template(aws, stack)


def _template(aws: Aws, stack: str) -> str:
    """The template of a stack, as it was sent."""
    body = aws.call("cloudformation", "GetTemplate", StackName=stack)["TemplateBody"]
    return body if isinstance(body, str) else json.dumps(body)


def delete_stack(aws: Aws, stack: dict[str, Any], every: float) -> None:
    """Begins to delete a stack of ours, without the log groups of the whole account in it. Raises UserError, AwsError."""
    name = stack["StackName"]
    kept: dict[str, Any] = {}
    if (
        stack["StackStatus"] == "DELETE_FAILED"
    ):  # it can't be changed any more, but takes a list of what stays
        kept = {"RetainResources": list(shared_logs(aws, name))}
    elif stack["StackStatus"] != "REVIEW_IN_PROGRESS":
        keep_shared_logs(aws, name, every)
    aws.call("cloudformation", "DeleteStack", StackName=name, **kept)


def up(aws: Aws, given: dict[str, str], yes: bool, every: float) -> int:
    """Makes or changes the foundation. A killed one is found and finished by the next. Raises UserError, AwsError."""
    stack = foundation.stack_name(aws.project)
    before = settled(aws, stack, every)
    if before is not None and not is_ours(aws, before):
        raise UserError(
            f"{stack}: account {aws.account} has a stack of this name without the tag project={aws.project}, so it is another's; "
            "take another name for yours: target.project=NAME"
        )
    if before is not None and before["StackStatus"] in BROKEN:
        log.info(
            "%s is left from an attempt that failed (%s): deleting it first",
            stack,
            before["StackStatus"],
        )
        delete_stack(aws, before, every)
        before = settled(aws, stack, every)
        if before is not None:
            raise UserError(
                f"{stack}: it can't be deleted ({before['StackStatus']}); its events in the CloudFormation console say why"
            )
    leaving = {} if before is None else shared_logs(aws, stack)
    if leaving and not _outlive(aws, stack, leaving):
        log.info("%s owns log groups of the whole account: %s", stack, ", ".join(leaving.values()))
        log.info(
            "first they are made to outlive it; then they leave it and stay as they are, with all that is in them"
        )
        if not confirmed("Do the first step?", yes):
            log.info("nothing was changed")
            return OK
        keep_shared_logs(aws, stack, every)
    body = foundation.TEMPLATE.read_text()
    wanted = parameters(aws, given, before)
    name = f"{aws.project}-{hashlib.sha256((body + json.dumps(wanted)).encode()).hexdigest()[:16]}"
    # Where there is a change set of this name, a killed `up` has left it.
    if (
        before is not None
        and aws.find(
            "cloudformation",
            "DescribeChangeSet",
            NO_CHANGE_SET,
            StackName=stack,
            ChangeSetName=name,
        )
        is not None
    ):
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
        logical = resource["LogicalResourceId"]
        replaced = ", by a new one" if resource.get("Replacement") == "True" else ""
        note = ", which stays in the account" if logical in leaving else replaced
        log.info(
            "  %-7s %-26s %s%s",
            resource["Action"].lower(),
            resource["ResourceType"],
            resource.get("PhysicalResourceId") or leaving.get(logical) or logical,
            note,
        )
    log.info(
        "it costs nothing itself; what will lie in the bucket costs about $0.023 per GB and month"
    )
    if not confirmed("Make these changes?", yes):
        if before is None:
            aws.call(
                "cloudformation", "DeleteStack", StackName=stack
            )  # the empty one that the change set made
        else:
            aws.call("cloudformation", "DeleteChangeSet", StackName=stack, ChangeSetName=name)
        log.info("nothing was changed")
        return OK
    aws.call(
        "cloudformation",
        "ExecuteChangeSet",
        StackName=stack,
        ChangeSetName=name,
        ClientRequestToken=name,
    )
    after = settled(aws, stack, every)
    if after is None or after["StackStatus"] not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        for event in reversed(
            list(aws.pages("cloudformation", "DescribeStackEvents", "StackEvents", StackName=stack))
        ):
            if event["ResourceStatus"].endswith("FAILED"):
                log.error(
                    "%s: %s",
                    event["LogicalResourceId"],
                    event.get("ResourceStatusReason", event["ResourceStatus"]),
                )
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
    parser.add_argument(
        "parameters",
        nargs="*",
        metavar="NAME=VALUE",
        help="parameters of the template, like InstanceTypes=g4dn.xlarge,g5.2xlarge",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--every",
        type=float,
        default=3,
        metavar="SECONDS",
        help="how often CloudFormation is asked how far it is (default 3)",
    )
    options = parser.parse_intermixed_args(rest)
    if any("=" not in each for each in options.parameters):
        parser.error("parameters are NAME=VALUE")
    return up(
        aws_of(targets),
        dict(each.split("=", 1) for each in options.parameters),
        options.yes,
        options.every,
    )
