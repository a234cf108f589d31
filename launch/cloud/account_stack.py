"""The account stack: the bucket, the roles and the policies that every run of a project needs.

Its template is stacks/foundation.yaml; a comment above each policy statement gives the reason.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cloud.cloudformation import Content, Stack, load, parameters_of, parse, resolve
from launch.cloud.logs import SHARED_GROUPS
from launch.cloud.session import Aws, bucket_name, partition, role_name
from trainer.common.errors import UserError

TEMPLATE = Path(__file__).parent / "stacks" / "foundation.yaml"
DEPLOYER = Path(__file__).parent / "stacks" / "deployer.yaml"

# Each part, with the template's resources that hold its permissions.
PARTS = {
    "launcher": ("LauncherPolicy", "LauncherEc2Policy"),
    "training": ("TrainingRole",),
    "ec2": ("Ec2Role",),
    "notebook": ("NotebookRole",),
}
# Further policies, and the parts that get them, where a parameter of `up` is given.
BY_PARAMETER: dict[str, dict[str, tuple[str, ...]]] = {
    "Image": {"OwnImagePolicy": ("training",)},
    "PicturesBucket": {"OwnPicturesPolicy": ("training", "ec2")},
    "KmsKey": {"OwnKeyPolicy": ("training", "ec2", "notebook")},
    "OwnNetwork": {"OwnNetworkPolicy": ("training", "notebook")},
}


class AccountStack(Stack):
    """The stack of a project in an account and region."""

    def __init__(self, aws: Aws, every: float) -> None:
        """Take the seconds between two looks while CloudFormation works."""
        super().__init__(aws, f"{aws.project}-foundation", every)

    def is_ours(self, stack: Mapping[str, Any]) -> bool:
        """Return whether a stack of this name is this project's.

        Before its first change set is executed, a stack is empty and has no tags.
        """
        under_review = stack["StackStatus"] == "REVIEW_IN_PROGRESS"
        return under_review or self.aws.owns(stack.get("Tags", []))

    def content(self, given: Mapping[str, str], before: Mapping[str, Any] | None) -> Content:
        """Return what `up` makes: parameters as given, else as before, else the template's default.

        Raise UserError for an unknown parameter.
        """
        declared = load(TEMPLATE)["Parameters"]
        unknown = ", ".join(sorted(given.keys() - declared.keys()))
        if unknown:
            raise UserError(
                f"{unknown}: there is no such parameter; allowed: {', '.join(declared)}"
            )
        defaults = {name: each.get("Default", "") for name, each in declared.items()}
        ours = {
            "Project": self.aws.project,
            "BucketName": self.aws.bucket,
            "OwnBucket": "yes" if self.aws.own_bucket else "no",
        }
        values = defaults | parameters_of(before) | ours | {**given}
        return Content(TEMPLATE.read_text(), {name: values[name] for name in declared})

    # ---- log groups of the whole account, which the first edition put into the stack

    def shared_logs(self) -> dict[str, str]:
        """Return the names of those groups, by their logical ids in the template."""
        names = {
            each["LogicalResourceId"]: each.get("PhysicalResourceId", "")
            for each in self.resources()
        }
        return {logical: name for logical, name in names.items() if name in SHARED_GROUPS}

    def outlived_by(self, logs: Iterable[str]) -> bool:
        """Return whether these groups already survive their removal from the stack."""
        return not logs or outliving(self.body(), logs) == self.body()

    def keep_shared_logs(self) -> None:
        """Let those groups survive their removal from the stack. Raise UserError where it fails."""
        logs = self.shared_logs()
        if self.outlived_by(logs):
            return
        self.update(Content(outliving(self.body(), logs), parameters_of(self.describe())))
        after = self.settle()
        if after is None or after["StackStatus"] != "UPDATE_COMPLETE":
            raise UserError(
                f"{self.name}: it would delete log groups of the whole account, and can't be "
                f"changed: {'; '.join(self.failures()) or 'its events in the console say why'}"
            )

    def delete_ours(self, stack: Mapping[str, Any]) -> None:
        """Begin to delete the stack without those groups. stack: as CloudFormation describes it."""
        if stack["StackStatus"] == "DELETE_FAILED":
            # It can no longer be updated, but DeleteStack takes a list of resources to retain.
            self.delete(RetainResources=list(self.shared_logs()))
            return
        if stack["StackStatus"] != "REVIEW_IN_PROGRESS":
            self.keep_shared_logs()
        self.delete()


def outliving(body: str, names: Iterable[str]) -> str:
    """Return the template with these resources set to survive removal from it, or its deletion.

    Raise UserError where the template isn't written as ours are.
    """
    resources = parse(body)["Resources"]
    for name in names:
        if resources[name].get("DeletionPolicy") == "Retain":
            continue
        # CloudFormation ignores a changed DeletionPolicy alone, so the metadata changes with it.
        policy = (
            r"\1    DeletionPolicy: Retain\n"
            r"    Metadata: {Stays: it is shared by the whole account}\n"
        )
        block = rf"^(  {name}:\n(?:    .*\n)*?)    DeletionPolicy: \w+.*\n"
        body, count = re.subn(block, policy, body, count=1, flags=re.MULTILINE)
        if not count:
            raise UserError(
                f"{name}: this stack would delete a log group of the whole account; give it "
                "DeletionPolicy: Retain in the CloudFormation console, then start again"
            )
    return body


# ---- what each part may do


@dataclass(frozen=True)
class Statement:
    """A statement of a policy. document: as IAM reads it."""

    sid: str
    reason: str  # the comment above it in the template
    document: dict[str, Any]

    @property
    def actions(self) -> list[str]:
        return as_list(self.document["Action"])

    @property
    def resources(self) -> list[str]:
        return as_list(self.document["Resource"])


@dataclass(frozen=True)
class Place:
    """Where a project is, and the parameters that `up` gave its template."""

    project: str
    account: str
    region: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def permissions(part: str, place: Place) -> list[Statement]:
    """Return what a part may do, as IAM will read it. part: one of PARTS."""
    project, account, region = place.project, place.account, place.region
    given = {"BucketName": bucket_name(project, account, region)} | {**place.parameters}
    names = {}
    for name, each in load(TEMPLATE)["Parameters"].items():
        value = given.get(name, each.get("Default", ""))
        is_list = each["Type"] == "CommaDelimitedList"
        names[name] = value.split(",") if is_list else value
    iam = f"arn:{partition(region)}:iam::{account}"
    names |= {
        "Project": project,
        "TrainingRole.Arn": f"{iam}:role/{role_name(project, 'training', region)}",
        "Ec2Role.Arn": f"{iam}:role/{role_name(project, 'ec2', region)}",
        "Ec2InstanceProfile.Arn": f"{iam}:instance-profile/{role_name(project, 'ec2', region)}",
        "AWS::AccountId": account,
        "AWS::Region": region,
    }
    resources = list(PARTS[part])
    for name, policies in BY_PARAMETER.items():
        if given.get(name, "no") not in ("", "no"):
            resources += [policy for policy, parts in policies.items() if part in parts]
    return statements(TEMPLATE, resources, names)


def statements(path: Path, resources: Iterable[str], names: Mapping[str, Any]) -> list[Statement]:
    """Return the statements of these resources of a template.

    names: what its parameters, its own resources, AWS::AccountId and AWS::Region stand for.
    """
    text = path.read_text()
    names = {**names, "AWS::Partition": partition(names["AWS::Region"])}
    listed = []
    for name in resources:
        reasons = _reasons(text.split(f"\n  {name}:\n")[1].split("PolicyDocument:", 1)[1])
        for document in _documents(load(path)["Resources"][name]["Properties"]):
            listed += [
                Statement(each["Sid"], reasons[each["Sid"]], resolve(each, names))
                for each in document["Statement"]
            ]
    return listed


def _documents(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the policy documents of a resource, without that of who may assume a role."""
    if isinstance(node, list):
        for value in node:
            yield from _documents(value)
    elif isinstance(node, dict):
        if "PolicyDocument" in node:
            yield node["PolicyDocument"]
            return
        for key, value in node.items():
            if key != "AssumeRolePolicyDocument":
                yield from _documents(value)


def _reasons(text: str) -> dict[str, str]:
    """Return the comment right above each statement, by its Sid.

    Where a later resource has a statement of the same Sid, the first counts.
    """
    reasons: dict[str, str] = {}
    for comment, sid in re.findall(r"^((?: *# .*\n)+) *- Sid: (\w+)", text, re.MULTILINE):
        lines = [line.strip().removeprefix("# ") for line in comment.splitlines()]
        reasons.setdefault(sid, " ".join(lines))
    return reasons


def as_list(value: Any) -> list[Any]:
    """Return the value as a list: IAM may write a list of one as the value alone."""
    return value if isinstance(value, list) else [value]
