"""The account's foundation as a document: launch/cloud/stacks/foundation.yaml, and its policies with the reason for each statement."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.cloud.session import bucket_name, partition
from trainer.common.errors import UserError

TEMPLATE = Path(__file__).parent / "stacks" / "foundation.yaml"

# The resources of the template that hold each part's permissions.
PARTS = {
    "launcher": ("LauncherPolicy", "LauncherEc2Policy"),
    "training": ("TrainingRole",),
    "ec2": ("Ec2Role",),
    "notebook": ("NotebookRole",),
}


@dataclass(frozen=True)
class Statement:
    sid: str
    reason: str  # the comment above it in the template
    document: dict[str, Any]  # as IAM reads it

    @property
    def actions(self) -> list[str]:
        return _listed(self.document["Action"])

    @property
    def resources(self) -> list[str]:
        return _listed(self.document["Resource"])


def stack_name(project: str) -> str:
    return f"{project}-foundation"


def parameters() -> dict[str, Any]:
    """The template's parameters, with their defaults."""
    declared: dict[str, Any] = yaml.load(TEMPLATE.read_text(), _Loader)["Parameters"]
    return declared


def outliving(body: str, names: Iterable[str]) -> str:
    """A deployed template in which these resources outlive the stack: they stay where an update drops them, or the stack is deleted.

    Raises UserError where the template isn't written as ours are.
    """
    resources = yaml.load(body, _Loader)["Resources"]
    for name in names:
        if resources[name].get("DeletionPolicy") == "Retain":
            continue
        # CloudFormation takes no change of a policy alone: the metadata changes with it.
        policy = r"\1    DeletionPolicy: Retain\n    Metadata: {Stays: it is shared by the whole account}\n"
        block = rf"^(  {name}:\n(?:    .*\n)*?)    DeletionPolicy: \w+.*\n"
        body, found = re.subn(block, policy, body, count=1, flags=re.MULTILINE)
        if not found:
            raise UserError(
                f"{name}: this stack would delete a log group of the whole account; give it DeletionPolicy: Retain in the "
                "CloudFormation console, then start again"
            )
    return body


def permissions(part: str, project: str, account: str, region: str) -> list[Statement]:
    """What a part may do, as IAM will read it. part: one of PARTS."""
    declared = parameters()
    names = {
        name: each["Default"].split(",")
        if each["Type"] == "CommaDelimitedList"
        else each["Default"]
        for name, each in declared.items()
    }
    iam = f"arn:{partition(region)}:iam::{account}"
    names |= {
        "Project": project,
        "Bucket.Arn": f"arn:{partition(region)}:s3:::{bucket_name(project, account, region)}",
        "TrainingRole.Arn": f"{iam}:role/{project}-training",
        "Ec2Role.Arn": f"{iam}:role/{project}-ec2",
        "Ec2InstanceProfile.Arn": f"{iam}:instance-profile/{project}-ec2",
    }
    return statements(TEMPLATE, PARTS[part], names, account, region)


def statements(
    path: Path, resources: Iterable[str], names: Mapping[str, Any], account: str, region: str
) -> list[Statement]:
    """The statements of these resources of a template. names: what its parameters and its own resources stand for."""
    text = path.read_text()
    template = yaml.load(text, _Loader)
    names = {
        **names,
        "AWS::AccountId": account,
        "AWS::Region": region,
        "AWS::Partition": partition(region),
    }
    found = []
    for name in resources:
        reasons = _reasons(text.split(f"\n  {name}:\n")[1].split("PolicyDocument:", 1)[1])
        for document in _documents(template["Resources"][name]["Properties"]):
            found += [
                Statement(each["Sid"], reasons[each["Sid"]], _resolve(each, names))
                for each in document["Statement"]
            ]
    return found


def _documents(node: Any) -> Iterator[dict[str, Any]]:
    """Every policy document below a resource's properties; under a condition too. Not who may assume a role."""
    if isinstance(node, dict):
        if "PolicyDocument" in node:
            yield node["PolicyDocument"]
        else:
            for key, value in node.items():
                if key != "AssumeRolePolicyDocument":
                    yield from _documents(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documents(value)


def _reasons(text: str) -> dict[str, str]:
    """By Sid, the comment right above each statement; where other parts follow with statements of the same name, the first counts."""
    found: dict[str, str] = {}
    for comment, sid in re.findall(r"^((?: *# .*\n)+) *- Sid: (\w+)", text, re.MULTILINE):
        found.setdefault(
            sid, " ".join(line.strip().removeprefix("# ") for line in comment.splitlines())
        )
    return found


@dataclass(frozen=True)
class _Function:
    """A CloudFormation function in the template: !Ref, !Sub or !GetAtt."""

    name: str
    text: str


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML with CloudFormation's short functions."""


def _function(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _Function(suffix, str(loader.construct_scalar(node)))
    return loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else None


_Loader.add_multi_constructor("!", _function)


def _resolve(node: Any, names: dict[str, Any]) -> Any:
    if isinstance(node, _Function):
        if node.name == "Sub":
            return re.sub(r"\$\{([\w.:]+)\}", lambda match: str(names[match[1]]), node.text)
        return names[node.text]
    if isinstance(node, dict):
        return {key: _resolve(value, names) for key, value in node.items()}
    return [_resolve(value, names) for value in node] if isinstance(node, list) else node


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]
