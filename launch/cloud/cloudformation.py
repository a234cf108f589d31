"""CloudFormation: reading templates; describing, changing and deleting stacks."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from launch.cloud.session import Aws, AwsError

POLL = 5.0  # seconds between two looks at a stack
ABSENT = "does not exist"  # in CloudFormation's ValidationError for a stack that is not there
ABSENT_CHANGE_SET = rf"ChangeSetNotFound|{ABSENT}"
NO_CHANGES = r"didn't contain changes|No updates are to be performed|no changes"
IN_SERVICE = ("CREATE_COMPLETE", "UPDATE_COMPLETE")
# Statuses of stacks that never were in service, or are half deleted: they can only be deleted.
STUCK = (
    "ROLLBACK_COMPLETE",
    "ROLLBACK_FAILED",
    "CREATE_FAILED",
    "DELETE_FAILED",
    "REVIEW_IN_PROGRESS",
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML with CloudFormation's short functions."""


def _written_out(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        value: Any = node.value
    else:
        assert isinstance(node, yaml.SequenceNode)
        value = loader.construct_sequence(node, deep=True)
    if name == "GetAtt":
        value = value.split(".", 1)
    return {name if name in ("Ref", "Condition") else f"Fn::{name}": value}


_Loader.add_multi_constructor("!", _written_out)


def parse(body: str) -> dict[str, Any]:
    """Return a template, with its short functions (!Ref x) written out ({"Ref": x})."""
    template: dict[str, Any] = yaml.load(body, _Loader)
    return template


@cache
def load(path: Path) -> dict[str, Any]:
    """Return the template in a file as `parse` does. Callers share it: don't change it."""
    return parse(path.read_text())


def resolve(node: Any, names: Mapping[str, Any]) -> Any:
    """Return a part of a template with its references replaced by their values.

    names: the values, by parameter, resource, RESOURCE.ATTRIBUTE and pseudo parameter
    (AWS::Region).
    """
    if isinstance(node, list):
        return [resolve(value, names) for value in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        [(key, value)] = node.items()
        if key == "Ref":
            return names[value]
        if key == "Fn::GetAtt":
            return names[".".join(value)]
        if key == "Fn::Sub":
            return re.sub(r"\$\{([\w.:]+)\}", lambda match: str(names[match[1]]), value)
    return {key: resolve(value, names) for key, value in node.items()}


def parameters_of(stack: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the parameters of a stack that CloudFormation describes; {} without a stack."""
    listed = (stack or {}).get("Parameters", [])
    return {each["ParameterKey"]: each["ParameterValue"] for each in listed}


@dataclass(frozen=True)
class Content:
    """What a stack is made from. body: the template's text."""

    body: str
    parameters: Mapping[str, str]

    def request(self, project: str) -> dict[str, Any]:
        """Return what CreateStack, UpdateStack and CreateChangeSet have in common."""
        return {
            "TemplateBody": self.body,
            "Parameters": [
                {"ParameterKey": name, "ParameterValue": value}
                for name, value in self.parameters.items()
            ],
            "Capabilities": ["CAPABILITY_NAMED_IAM"],
            "Tags": [{"Key": "project", "Value": project}],
        }


class Stack:
    """A stack by its name, or by its ARN, under which CloudFormation shows it even when deleted.

    Every method may raise AwsError.
    """

    def __init__(self, aws: Aws, name: str, every: float = POLL) -> None:
        """Take the seconds between two looks while CloudFormation works."""
        self.aws, self.name, self.every = aws, name, every
        self._known_events: set[str] = set()

    def describe(self) -> dict[str, Any] | None:
        """Return CloudFormation's description of the stack; None where there is no stack."""
        answer = self._find("DescribeStacks", ABSENT)
        if answer is None or not answer["Stacks"]:
            return None
        stack: dict[str, Any] = answer["Stacks"][0]
        return stack

    def resources(self) -> list[dict[str, Any]]:
        """Return the resources that are in the stack now."""
        listed = self._told("ListStackResources", "StackResourceSummaries")
        return [each for each in listed if each["ResourceStatus"] != "DELETE_COMPLETE"]

    def body(self) -> str:
        """Return the template as it was sent."""
        body = self._call("GetTemplate")["TemplateBody"]
        return body if isinstance(body, str) else json.dumps(body)

    # ---- changing it

    def create(self, content: Content) -> str:
        """Begin to create the stack; return its ARN. CloudFormation deletes it where that fails."""
        request = content.request(self.aws.project)
        return str(self._call("CreateStack", **request, OnFailure="DELETE")["StackId"])

    def update(self, content: Content) -> None:
        """Begin to change the stack."""
        self._call("UpdateStack", **content.request(self.aws.project))

    def delete(self, **options: Any) -> None:
        """Begin to delete the stack; where there is none, do nothing."""
        self._call("DeleteStack", **options)

    def settle(self, tell: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any] | None:
        """Wait until CloudFormation has finished; return the stack, None where it is gone.

        tell: called with each event since `mark_events`.
        """
        told = set(self._known_events)
        while True:
            stack = self.describe()
            if tell is not None:
                for event in reversed(self.new_events()):
                    if event["EventId"] not in told:
                        told.add(event["EventId"])
                        tell(event)
            status = stack["StackStatus"] if stack else "gone"
            if not status.endswith("_IN_PROGRESS") or status == "REVIEW_IN_PROGRESS":
                return stack
            time.sleep(self.every)

    # ---- change sets

    def propose(self, name: str, content: Content, first: bool) -> list[dict[str, Any]] | None:
        """Make a change set and return the changes; None, and no change set, where there are none.

        first: there is no stack yet. The list may be empty, where no resource changes.
        """
        self._call(
            "CreateChangeSet",
            **content.request(self.aws.project),
            ChangeSetName=name,
            ChangeSetType="CREATE" if first else "UPDATE",
            ClientToken=name,
        )
        while True:
            answer = self._call("DescribeChangeSet", ChangeSetName=name)
            if not answer["Status"].endswith(("PENDING", "IN_PROGRESS")):
                break
            time.sleep(self.every / 5)
        if answer["Status"] != "FAILED":
            changes = self._pages("DescribeChangeSet", "Changes", ChangeSetName=name)
            return [each["ResourceChange"] for each in changes]
        self.discard(name)
        reason = answer.get("StatusReason", "")
        if re.search(NO_CHANGES, reason):
            return None
        raise AwsError(f"CloudFormation refuses the change: {reason}", "FAILED", reason)

    def has_proposal(self, name: str) -> bool:
        """Return whether there is a change set of this name."""
        return self._find("DescribeChangeSet", ABSENT_CHANGE_SET, ChangeSetName=name) is not None

    def discard(self, name: str) -> None:
        """Delete a change set."""
        self._call("DeleteChangeSet", ChangeSetName=name)

    def execute(self, name: str) -> None:
        """Begin to execute a change set."""
        self._call("ExecuteChangeSet", ChangeSetName=name, ClientRequestToken=name)

    # ---- events

    def mark_events(self) -> None:
        """Let `new_events` leave out all events until now."""
        self._known_events.update(event["EventId"] for event in self.new_events())

    def new_events(self) -> list[dict[str, Any]]:
        """Return the events since `mark_events`, newest first."""
        events = self._told("DescribeStackEvents", "StackEvents")
        return [event for event in events if event["EventId"] not in self._known_events]

    def failures(self) -> list[str]:
        """Return "RESOURCE: reason" of each failure since `mark_events`, the earliest first."""
        return [
            f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', 'no reason given')}"
            for event in reversed(self.new_events())
            if event["ResourceStatus"].endswith("FAILED")
        ]

    # ---- calls

    def _told(self, operation: str, key: str) -> list[dict[str, Any]]:
        """Return the whole list, empty where another command has deleted the stack."""
        try:
            return list(self._pages(operation, key))
        except AwsError as error:
            if not re.search(ABSENT, f"{error.code}: {error.message}"):
                raise
            return []

    def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        return self.aws.call("cloudformation", operation, StackName=self.name, **parameters)

    def _find(self, operation: str, absent: str, **parameters: Any) -> dict[str, Any] | None:
        return self.aws.find("cloudformation", operation, absent, StackName=self.name, **parameters)

    def _pages(self, operation: str, key: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        return self.aws.pages("cloudformation", operation, key, StackName=self.name, **parameters)
