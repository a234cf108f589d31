"""A release: everything that `deploy` sends.

It is computed from the package, the settings and the stack's template, without calls to AWS.
"""

import difflib
import hashlib
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.cloud.cloudformation import Content, load, resolve
from launch.cloud.prices import (
    ALARM_MONTH,
    HOURS_A_MONTH,
    PROVISIONED_GB_SECOND,
    SNAPSHOT_GB_SECOND,
    price,
)
from launch.cloud.registries import registry_of
from serving.deploy import bundle
from serving.deploy.refusals import check_endpoint, check_numbers
from trainer.common.errors import UserError

TEMPLATE = Path(__file__).parents[1] / "stack.yaml"
# Lower case, as in the endpoint's ARN in IAM; role names have 9 more characters, and at most 64.
NAME = r"[a-z][a-z0-9-]{0,39}"
NO_ACCOUNT = "000000000000"  # shown in a plan without credentials
ECR = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?"
    r"/(?P<repository>[^:@]+)([:@].+)"
)

# Parameters of the template that this module computes.
COMPUTED = {
    "Bucket",
    "CodeKey",
    "ModelUrl",
    "ModelArn",
    "ModelDigest",
    "ImageArn",
    "RayServeApp",
    "EndpointRelease",
    "FunctionRelease",
}
# AWS's own image, so that the user needs no container (aws.github.io/
# deep-learning-containers/ray/changelog, 2026-05), and the application that it starts.
RAY_IMAGE = "ray:serve-ml-sagemaker-cpu-v1.1.0"
RAY_APP = "serving.ray_app:app"
# Other defaults where the model runs inside Lambda: for ten pictures a day nobody should pay for a
# warm environment, and the network needs a whole processor (1,769 MB buy one).
IN_LAMBDA = {"Memory": "2048", "ProvisionedConcurrency": "0"}


@dataclass(frozen=True)
class Place:
    """Where to deploy a release. name: of the stack, the endpoint and the function."""

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
    """A file for the bucket, under a key that follows from its content."""

    what: str
    key: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


@dataclass(frozen=True)
class Remote:
    """A package that is in S3 already. digest: its ETag, or "unknown" where AWS was not asked."""

    uri: str
    digest: str


@dataclass(frozen=True)
class Release:
    """What is deployed where. parameters: the template's, by name."""

    place: Place
    parameters: Mapping[str, str]
    uploads: Sequence[Upload]

    def content(self) -> Content:
        """Return what the stack is made from."""
        return Content(TEMPLATE.read_text(), self.parameters)


def template() -> dict[str, Any]:
    """Return the stack's template, with its short forms (!Ref x) written out ({"Ref": x})."""
    return load(TEMPLATE)


def build(
    place: Place,
    package: Path | Remote | None,
    given: Mapping[str, str],
    deployed: Mapping[str, str],
) -> Release:
    """Return the release. Raise UserError.

    package: None to keep the deployed one. given: template parameters by name, as the user set
    them. deployed: those of the existing stack. A parameter's value is the user's, else the
    deployed one, else the template's default.
    """
    _check(given)
    declared = template()["Parameters"]
    values = {name: str(body.get("Default", "")) for name, body in declared.items()}
    mode = given.get("Door", deployed.get("Door", values["Door"]))
    if mode == "lambda":
        values |= IN_LAMBDA
    same_mode = mode == deployed.get("Door", mode)
    values |= {
        name: value
        for name, value in deployed.items()
        if name in declared and (same_mode or name not in IN_LAMBDA)
    }
    values |= {**given, "Bucket": place.bucket}
    check_numbers(values)
    # The zip of the function with the model also has libraries for its processor.
    same_files = mode == "endpoint" or values["Architecture"] == deployed.get("Architecture")
    if package is None and (not deployed or not same_mode or not same_files):
        raise UserError(
            "which model? give a model.tar.gz, or its s3:// address: "
            "python -m serving deploy runs/NAME/model.tar.gz ..."
        )
    if mode == "endpoint":
        if values["Image"] == "none":
            remedy = "give one of yours with --image, or deploy with --mode lambda"
            values["Image"] = f"{registry_of(place.region, remedy)}/{RAY_IMAGE}"
        was_on_ray = deployed.get("RayServeApp", "") != ""
        values["RayServeApp"] = ""
        if _is_ray(values["Image"]):
            values["RayServeApp"] = RAY_APP
        if package is None and was_on_ray != _is_ray(values["Image"]):
            raise UserError("another container needs the model.tar.gz again: give it")
        computed, uploads = _for_endpoint(place, package, values["Image"])
        check_endpoint(values, image_region(values["Image"]) or place.region, place.region)
    else:
        computed, uploads = {}, _for_lambda(place, package, values["Architecture"])
    values |= computed
    if uploads:
        values["CodeKey"] = uploads[0].key
    values["EndpointRelease"] = "none"
    if mode == "endpoint":
        values["EndpointRelease"] = fingerprint(("Model", "EndpointConfig"), values)
    values["FunctionRelease"] = fingerprint(("Function",), values)
    return Release(place, values, uploads)


def with_image(release: Release, image: str) -> Release:
    """Return the release of an endpoint with another image of the same repository."""
    values = {**release.parameters, "Image": image}
    values["EndpointRelease"] = fingerprint(("Model", "EndpointConfig"), values)
    return replace(release, parameters=values)


def _for_endpoint(
    place: Place, package: Path | Remote | None, image: str
) -> tuple[dict[str, str], list[Upload]]:
    """Return the parameters that follow from package and image, and the uploads: code first."""
    values = {"ImageArn": _image_arn(image, place)}
    uploads = [_named("the function", bundle.proxy(), ".zip", place)]
    if package is None:
        return values, uploads
    if isinstance(package, Remote):
        if _is_ray(image):
            raise _not_here(package, "the archive for AWS's image")
        uri, digest = package.uri, package.digest
    else:
        content: bytes | Path = package
        if _is_ray(image):
            content = bundle.endpoint(package)
        model = _named("the model package", content, ".tar.gz", place)
        uploads.append(model)
        uri = f"s3://{place.bucket}/{model.key}"
        digest = Path(model.key).name.removesuffix(".tar.gz")
    arn = f"arn:{place.partition}:s3:::{uri.removeprefix('s3://')}"
    return values | {"ModelUrl": uri, "ModelArn": arn, "ModelDigest": digest}, uploads


def _for_lambda(place: Place, package: Path | Remote | None, architecture: str) -> list[Upload]:
    if package is None:
        return []
    if isinstance(package, Remote):
        raise _not_here(package, "the function with the model inside")
    return [
        _named("the function with the model", bundle.direct(package, architecture), ".zip", place)
    ]


def _is_ray(image: str) -> bool:
    """Return whether a container is AWS's Ray Serve image."""
    parts = ECR.fullmatch(image)
    return parts is not None and parts["repository"] == RAY_IMAGE.split(":")[0]


def _not_here(package: Remote, what: str) -> UserError:
    return UserError(
        f"{package.uri}: {what} is built here and needs the file: "
        f"aws s3 cp {shlex.quote(package.uri)} . and give model.tar.gz"
    )


def _check(given: Mapping[str, str]) -> None:
    """Raise UserError for an unknown setting, or a value that is not allowed."""
    declared = template()["Parameters"]
    for name, value in given.items():
        if name not in declared or name in COMPUTED:
            close = difflib.get_close_matches(name, declared.keys() - COMPUTED, n=1, cutoff=0)
            raise UserError(
                f"--set {name}: there is no such setting; did you mean {close[0]}? "
                "python -m serving plan shows them all"
            )
        allowed = _not_allowed(declared[name], value)
        if allowed:
            flag = "--mode " if name == "Door" else f"--set {name}="
            raise UserError(f"{flag}{value}: allowed: {allowed}")


def _not_allowed(parameter: Mapping[str, Any], value: str) -> str | None:
    """Return in words what the parameter allows, None where it allows `value`."""
    if "AllowedValues" in parameter:
        values = [str(each) for each in parameter["AllowedValues"]]
        return None if value in values else ", ".join(values)
    if parameter["Type"] == "Number":
        low, high = parameter["MinValue"], parameter["MaxValue"]
        if value.isdecimal() and low <= int(value) <= high:
            return None
        return f"a whole number, {low} to {high}"
    pattern = parameter.get("AllowedPattern", ".*")
    return None if re.fullmatch(pattern, value) else f"a text that matches {pattern}"


def _image_arn(image: str, place: Place) -> str:
    parts = ECR.fullmatch(image)
    if not parts:
        raise UserError(
            f"--image {image}: this is no image in ECR with a tag or a digest; give "
            "ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG of one built from serving/Dockerfile, "
            "or leave it out for AWS's own; --build builds one"
        )
    where = f"{parts['region']}:{parts['account']}"
    return f"arn:{place.partition}:ecr:{where}:repository/{parts['repository']}"


def image_region(image: str) -> str | None:
    """Return the region of an image in ECR; None for any other text."""
    parts = ECR.fullmatch(image)
    if parts is None:
        return None
    return parts["region"]


def _named(what: str, content: bytes | Path, suffix: str, place: Place) -> Upload:
    """Return the upload of a content, under a key with its digest."""
    opened = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
    with opened as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Upload(what, f"{place.folder}{digest[:32]}{suffix}", content)


def fingerprint(resources: Sequence[str], values: Mapping[str, str]) -> str:
    """Return a digest, 12 hexadecimal digits, of these resources and the values that they use.

    CloudFormation can't replace a resource under the same name, so the name must follow from the
    content.
    """
    bodies = [template()["Resources"][name] for name in resources]
    used = set(references(bodies)) - {"EndpointRelease", "FunctionRelease"}
    content = [bodies, [(name, values[name]) for name in sorted(used)]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def references(node: Any) -> Iterator[str]:
    """Yield the parameters that a part of the template uses, also through its conditions."""
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


def resources(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the type of each resource that the template makes with these parameters, by name."""
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
        left, right = resolve(value, parameters)
        return bool(left == right)
    if kind == "Fn::Not":
        return not _holds(value[0], parameters)
    assert kind == "Fn::And", kind
    return all(_holds(inner, parameters) for inner in value)


@dataclass(frozen=True)
class Item:
    """One line of the bill. month: US dollars, or None where the price is not known."""

    what: str
    month: float | None


def idle_price(
    parameters: Mapping[str, str], region: str, instances: int | None = None
) -> list[Item]:
    """Return the bill of a month without requests.

    instances: of the endpoint; None: MinInstances.
    """
    made = resources(parameters)
    items = []
    if "Endpoint" in made:
        count = int(parameters["MinInstances"]) if instances is None else instances
        items.append(_instances(parameters["InstanceType"], count, region))
    warm, megabytes = int(parameters["ProvisionedConcurrency"]), int(parameters["Memory"])
    if warm:
        what = f"{warm} x {megabytes} MB of Lambda kept warm"
        seconds = HOURS_A_MONTH * 3600
        items.append(Item(what, warm * megabytes / 1024 * seconds * PROVISIONED_GB_SECOND))
    if parameters["SnapStart"] == "on":
        seconds = HOURS_A_MONTH * 3600
        what = f"a snapshot of {megabytes} MB"
        items.append(Item(what, megabytes / 1024 * seconds * SNAPSHOT_GB_SECOND))
    metrics = sum(map(_watched, made))
    if "ScalingPolicy" in made:
        metrics += 2  # target tracking makes two alarms of its own
    # AWS bills by the metric; an account's first ten are free.
    items.append(Item(f"alarms on {metrics} metrics", metrics * ALARM_MONTH))
    return items


def _watched(name: str) -> int:
    """Return how many metrics a resource watches: AWS bills by their number."""
    body = template()["Resources"][name]
    if body["Type"] != "AWS::CloudWatch::Alarm":
        return 0
    metrics = body["Properties"].get("Metrics", [{"MetricStat": None}])
    return sum("MetricStat" in metric for metric in metrics)


def _instances(kind: str, count: int, region: str) -> Item:
    """Return the instances' line. AWS's price is the same for endpoints as for training."""
    hour = price(kind, region).on_demand
    if hour is None:
        return Item(f"{count} x {kind}", None)
    return Item(f"{count} x {kind} at ${hour:g} an hour", count * hour * HOURS_A_MONTH)
