"""The CloudFormation stack: found, changed, and watched while it changes."""

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Set
from typing import Any

from launch.cloud.session import Aws
from serving.deploy.release import Release
from trainer.common.errors import UserError

POLL = 5.0  # seconds between two looks at a stack that changes
ABSENT = "does not exist"  # CloudFormation answers ValidationError for a stack that is not there
STUCK = (
    "ROLLBACK_COMPLETE",
    "ROLLBACK_FAILED",
    "CREATE_FAILED",
    "DELETE_FAILED",
    "REVIEW_IN_PROGRESS",
)  # never was in service, or is half gone


def find(aws: Aws, name: str) -> dict[str, Any] | None:
    """By its name, or, also when it is deleted, by its ARN."""
    found = aws.find("cloudformation", "DescribeStacks", ABSENT, StackName=name)
    stack: dict[str, Any] | None = found["Stacks"][0] if found and found["Stacks"] else None
    return stack


def find_ours(aws: Aws, name: str) -> dict[str, Any] | None:
    """As `find`. Raises UserError for a stack that is another project's, or no deployment: its name doesn't make it ours."""
    stack = find(aws, name)
    if stack is None or (
        aws.owns(stack.get("Tags", [])) and "FunctionRelease" in parameters(stack)
    ):
        return stack
    raise UserError(
        f"stack {name} in account {aws.account}, {aws.region} is no deployment of the project {aws.project}: "
        "it lacks the tag, or it is another kind of stack; give another --name, or --project"
    )


def deployed(aws: Aws, name: str) -> dict[str, Any]:
    stack = find_ours(aws, name)
    if stack is None:
        raise UserError(
            f"there is no stack {name} in {aws.region}; python -m serving deploy makes it; --name and --region choose another"
        )
    return stack


def parameters(stack: Mapping[str, Any]) -> dict[str, str]:
    return {
        parameter["ParameterKey"]: parameter["ParameterValue"]
        for parameter in stack.get("Parameters", [])
    }


def follow(aws: Aws, name: str, before: Set[str]) -> dict[str, Any]:
    """Prints what happens to the stack until it rests, and returns it. name: or its ARN. before: the events that were there already."""
    shown = set(before)
    while True:
        stack = find(aws, name)
        assert stack is not None
        for event in reversed(list(events(aws, stack["StackId"]))):
            if event["EventId"] not in shown:
                shown.add(event["EventId"])
                print(
                    f"  {event['ResourceStatus']:28}{event['LogicalResourceId']:20}{event.get('ResourceStatusReason', '')}",
                    flush=True,
                )
        if not stack["StackStatus"].endswith("IN_PROGRESS"):
            return stack
        time.sleep(POLL)


def events(aws: Aws, stack: str) -> Iterator[dict[str, Any]]:
    """Newest first."""
    return aws.pages("cloudformation", "DescribeStackEvents", "StackEvents", StackName=stack)


def reason(aws: Aws, stack: str, before: Set[str]) -> str:
    """Why it failed: what CloudFormation says of the first resource that did."""
    failed = [
        event
        for event in events(aws, stack)
        if event["ResourceStatus"].endswith("FAILED") and event["EventId"] not in before
    ]
    return (
        f"{failed[-1]['LogicalResourceId']}: {failed[-1].get('ResourceStatusReason', 'no reason given')}"
        if failed
        else "no reason given"
    )


def change(aws: Aws, release: Release) -> tuple[str | None, list[str]]:
    """The change set's ARN, None where there is nothing to change, and a line for each change."""
    name = f"release-{release.parameters['FunctionRelease']}-{secrets.token_hex(4)}"
    arn = aws.call(
        "cloudformation",
        "CreateChangeSet",
        **release.stack(),
        ChangeSetName=name,
        ChangeSetType="UPDATE",
    )["Id"]
    while (found := aws.call("cloudformation", "DescribeChangeSet", ChangeSetName=arn))[
        "Status"
    ].endswith(("PENDING", "IN_PROGRESS")):
        time.sleep(POLL / 5)
    if found["Status"] == "FAILED":
        aws.call("cloudformation", "DeleteChangeSet", ChangeSetName=arn)
        reason = found.get("StatusReason", "")
        if re.search("didn't contain changes|No updates are to be performed", reason):
            return None, []
        raise UserError(f"CloudFormation refuses the change: {reason}")
    lines = []
    for change in aws.pages("cloudformation", "DescribeChangeSet", "Changes", ChangeSetName=arn):
        resource = change["ResourceChange"]
        action = "replace" if resource.get("Replacement") == "True" else resource["Action"].lower()
        lines.append(f"{action:9}{resource['ResourceType']:44}{resource['LogicalResourceId']}")
    return arn, lines
