"""A release: everything that `deploy` sends, computed from the package, the settings and the stack's template. No AWS here."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from serving.deploy import bundle, prices
from trainer.common.errors import UserError, install_command

TEMPLATE = Path(__file__).parents[1] / "stack.yaml"
NAME = r"[a-z][a-z0-9-]{0,39}"  # lower case, as IAM writes the endpoint's ARN; role names add 9 characters to it, and end at 64
NO_ACCOUNT = "000000000000"  # stands in a plan where there are no credentials
ECR = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/(?P<repository>[^:@]+)([:@].+)"
)

# Parameters of the template that are computed here, and those that begin otherwise where the model runs inside Lambda: ten pictures a day
# should not pay for a warm environment, and the network wants a whole processor (1,769 MB buy one).
COMPUTED = {
    "Bucket",
    "CodeKey",
    "ModelUrl",
    "ModelArn",
    "ModelDigest",
    "ImageArn",
    "EndpointRelease",
    "FunctionRelease",
}
IN_LAMBDA = {"Memory": "2048", "ProvisionedConcurrency": "0"}


@dataclass(frozen=True)
class Place:
    """Where a release goes. name: of the stack, the endpoint and the function."""

    name: str
    project: str
    bucket: str
    account: str = NO_ACCOUNT
    region: str = "us-east-1"
    partition: str = "aws"

    @property
    def folder(self) -> str:
        """Prefix in the bucket of all that this deployment uploads."""
        return f"serving/{self.name}/"


@dataclass(frozen=True)
class Upload:
    """A file for the bucket, under a key that its content gives."""

    what: str
    key: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


@dataclass(frozen=True)
class Remote:
    """A package that lies in S3 already. digest: its ETag, or "unknown" where AWS was not asked."""

    uri: str
    digest: str


@dataclass(frozen=True)
class Release:
    place: Place
    parameters: Mapping[str, str]
    uploads: Sequence[Upload]

    def stack(self) -> dict[str, Any]:
        """What CreateStack and CreateChangeSet have in common."""
        return {
            "StackName": self.place.name,
            "TemplateBody": TEMPLATE.read_text(),
            "Parameters": [
                {"ParameterKey": name, "ParameterValue": value}
                for name, value in self.parameters.items()
            ],
            "Capabilities": ["CAPABILITY_NAMED_IAM"],
            "Tags": [{"Key": "project", "Value": self.place.project}],
        }


def build(
    place: Place,
    package: Path | Remote | None,
    given: Mapping[str, str],
    deployed: Mapping[str, str],
) -> Release:
    """package: None to keep the deployed one. given: template parameters by name, as the user set them. deployed: those of the stack that is there.

    A parameter is what the user gave, else what is deployed, else the template's default. Raises UserError.
    """
    _check(given)
    declared = template()["Parameters"]
    values = {name: str(declared[name].get("Default", "")) for name in declared}
    door = given.get("Door", deployed.get("Door", values["Door"]))
    if door == "lambda":
        values |= IN_LAMBDA
    same_door = door == deployed.get("Door", door)
    values |= {
        name: value
        for name, value in deployed.items()
        if name in declared and (same_door or name not in IN_LAMBDA)
    }
    values |= {**given, "Bucket": place.bucket}
    if int(values["MaxInstances"]) < int(values["MinInstances"]):
        raise UserError(
            f"MaxInstances={values['MaxInstances']} is below MinInstances={values['MinInstances']}; set both with --set"
        )
    if package is None and (not deployed or not same_door):
        raise UserError(
            "which model? give a model.tar.gz, or its s3:// address: python -m serving deploy runs/NAME/model.tar.gz ..."
        )

    uploads: list[Upload] = []
    if door == "endpoint":
        values["ImageArn"] = _image_arn(values["Image"], place)
        uploads.append(_named("the function", bundle.proxy(), ".zip", place))
        if package is not None:
            url, arn, digest, upload = _model(package, place)
            values |= {"ModelUrl": url, "ModelArn": arn, "ModelDigest": digest}
            uploads += upload
    elif isinstance(package, Remote):
        raise UserError(
            f"{package.uri}: the door inside Lambda is built here and needs the file: aws s3 cp {package.uri} . and give model.tar.gz"
        )
    elif package is not None:
        uploads.append(_named("the function with the model", bundle.direct(package), ".zip", place))
    if uploads:
        values["CodeKey"] = uploads[0].key
    values["EndpointRelease"] = (
        fingerprint(("Model", "EndpointConfig"), values) if door == "endpoint" else "none"
    )
    values["FunctionRelease"] = fingerprint(("Function",), values)
    return Release(place, values, uploads)


def _check(given: Mapping[str, str]) -> None:
    declared = template()["Parameters"]
    for name, value in given.items():
        if name not in declared or name in COMPUTED:
            close = difflib.get_close_matches(name, declared.keys() - COMPUTED, n=1, cutoff=0)
            raise UserError(
                f"--set {name}: there is no such setting; did you mean {close[0]}? python -m serving plan shows them all"
            )
        allowed = _allowed(declared[name], value)
        if allowed:
            raise UserError(f"--set {name}={value}: allowed: {allowed}")


def _allowed(parameter: Mapping[str, Any], value: str) -> str | None:
    """What the parameter allows, where `value` is something else."""
    if "AllowedValues" in parameter:
        return (
            None
            if value in map(str, parameter["AllowedValues"])
            else ", ".join(map(str, parameter["AllowedValues"]))
        )
    if parameter["Type"] == "Number":
        low, high = parameter.get("MinValue", 0), parameter.get("MaxValue", float("inf"))
        return (
            None
            if value.isdecimal() and low <= int(value) <= high
            else f"a whole number, {low} to {high}"
        )
    pattern = parameter.get("AllowedPattern", ".*")
    return None if re.fullmatch(pattern, value) else f"what matches {pattern}"


def _image_arn(image: str, place: Place) -> str:
    parts = ECR.fullmatch(image)
    if not parts:
        what = (
            "an endpoint needs a container"
            if image == "none"
            else f"--image {image}: this is no image in ECR with a tag or a digest"
        )
        raise UserError(
            f"{what}; build serving/Dockerfile, push it and give ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG, or deploy with --door lambda"
        )
    return f"arn:{place.partition}:ecr:{parts['region']}:{parts['account']}:repository/{parts['repository']}"


def _model(package: Path | Remote, place: Place) -> tuple[str, str, str, list[Upload]]:
    """URL, ARN and digest of the model package, and what to upload for it."""
    if isinstance(package, Remote):
        return (
            package.uri,
            f"arn:{place.partition}:s3:::{package.uri.removeprefix('s3://')}",
            package.digest,
            [],
        )
    upload = _named("the model package", package, ".tar.gz", place)
    where = f"{place.bucket}/{upload.key}"
    return (
        f"s3://{where}",
        f"arn:{place.partition}:s3:::{where}",
        Path(upload.key).name.removesuffix(".tar.gz"),
        [upload],
    )


def _named(what: str, content: bytes | Path, suffix: str, place: Place) -> Upload:
    if isinstance(content, Path):
        with content.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        digest = hashlib.sha256(content).hexdigest()
    return Upload(what, f"{place.folder}{digest[:32]}{suffix}", content)


def fingerprint(resources: Sequence[str], values: Mapping[str, str]) -> str:
    """12 hexadecimal digits over these resources of the template and all parameters that they use.

    CloudFormation can't replace a resource under the same name, so the name has to follow from the content.
    """
    bodies = [template()["Resources"][name] for name in resources]
    used = sorted(
        {name for body in bodies for name in references(body)}
        - {"EndpointRelease", "FunctionRelease"}
    )
    return hashlib.sha256(
        json.dumps([bodies, [(name, values[name]) for name in used]], sort_keys=True).encode()
    ).hexdigest()[:12]


def references(node: Any) -> Iterator[str]:
    """Names of the parameters that a part of the template uses, also by its conditions."""
    names: list[str] = []
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "Ref":
                names = [value]
            elif key == "Fn::Sub":
                names = re.findall(r"\$\{(\w+)\}", value)
            elif key == "Fn::If":
                yield from references(template()["Conditions"][value[0]])
                yield from references(value[1:])
            elif key == "Condition" and isinstance(value, str):
                yield from references(template()["Conditions"][value])
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)
    yield from (name for name in names if name in template()["Parameters"])


@cache
def template() -> dict[str, Any]:
    """The stack's template, its short forms (!Ref x) written out ({"Ref": x})."""
    try:
        import yaml
    except ImportError as error:
        raise UserError(
            f"PyYAML is not installed, which reads the stack's template: {install_command('aws')}"
        ) from error

    class Loader(yaml.SafeLoader):
        pass

    def short_form(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> dict[str, Any]:
        if isinstance(node, yaml.ScalarNode):
            value: Any = node.value
        else:
            assert isinstance(node, yaml.SequenceNode)
            value = loader.construct_sequence(node, deep=True)
        if name == "GetAtt":
            value = value.split(".", 1)
        return {name if name in ("Ref", "Condition") else f"Fn::{name}": value}

    Loader.add_multi_constructor("!", short_form)
    loaded: dict[str, Any] = yaml.load(TEMPLATE.read_text(), Loader)
    return loaded


def resources(parameters: Mapping[str, str]) -> dict[str, str]:
    """Type of each resource that the template makes with these parameters, by name."""
    return {
        name: body["Type"]
        for name, body in template()["Resources"].items()
        if "Condition" not in body or _holds({"Condition": body["Condition"]}, parameters)
    }


def _holds(condition: Any, parameters: Mapping[str, str]) -> bool:
    [(kind, value)] = condition.items()
    if kind == "Condition":
        return _holds(template()["Conditions"][value], parameters)
    if kind == "Fn::Equals":
        left, right = (
            parameters[side["Ref"]] if isinstance(side, dict) else side for side in value
        )
        return bool(left == right)
    if kind == "Fn::Not":
        return not _holds(value[0], parameters)
    assert kind == "Fn::And", kind
    return all(_holds(inner, parameters) for inner in value)


def idle_price(
    parameters: Mapping[str, str], region: str, instances: int | None = None
) -> list[prices.Item]:
    """The bill of a month in which nobody asks anything. instances: of the endpoint; MinInstances, if not given."""
    made = resources(parameters)
    items = []
    if "Endpoint" in made:
        count = int(parameters["MinInstances"]) if instances is None else instances
        items.append(prices.instances(parameters["InstanceType"], count, region))
    if parameters["ProvisionedConcurrency"] != "0":
        items.append(
            prices.warm(int(parameters["ProvisionedConcurrency"]), int(parameters["Memory"]))
        )
    # Target tracking makes two more of its own.
    alarms = sum(kind == "AWS::CloudWatch::Alarm" for kind in made.values()) + 2 * (
        "ScalingPolicy" in made
    )
    return [*items, *([prices.alarms(alarms)] if alarms else [])]
