"""`python -m serving plan | deploy | status | invoke | logs | destroy`: the model in AWS.

deploy makes the stack `serving/stack.yaml`, and with --build `serving/image.yaml`.
"""

import argparse
import hashlib
import re
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.cloud import s3
from launch.cloud.cloudformation import IN_SERVICE, parameters_of
from launch.cloud.confirm import confirmed
from launch.cloud.prices import instance_types, price
from launch.cloud.session import Aws, bucket_name
from serving.deploy import image, operate
from serving.deploy.image import Image, ImageStack
from serving.deploy.refusals import check_instance, check_region
from serving.deploy.release import (
    NAME,
    TEMPLATE,
    Item,
    Place,
    Release,
    Remote,
    build,
    idle_price,
    image_region,
    resources,
    template,
    with_image,
)
from serving.deploy.stack import ServingStack, send
from serving.signature import as_text, public_key
from trainer.common.arguments import positive
from trainer.common.console import command
from trainer.common.errors import OK, RESUME, UserError
from trainer.common.paths import expanded
from trainer.common.text import dollars


def main(arguments: Sequence[str]) -> int:
    """Run a verb, and return the exit code. Raise UserError.

    arguments: the verb and its own arguments.
    """
    verb, *rest = arguments
    options = _parser(verb).parse_args(rest)
    options.name = options.name or f"{options.project}-serving"
    if not re.fullmatch(NAME, options.name):
        raise UserError(
            f"--name {options.name}: allowed: lower-case letters, digits and hyphens, "
            "a letter first, at most 40"
        )
    if options.region is not None:
        check_region(options.region)
    _, run = VERBS[verb]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # below we say what keeps running
    try:
        return run(options)
    except KeyboardInterrupt as interrupt:
        status = command("serving", "status", "--name", options.name)
        left = str(interrupt) or f"what AWS has begun keeps running: {status}"
        print(f"interrupted; {left}", file=sys.stderr)
        return RESUME


def _parser(verb: str) -> argparse.ArgumentParser:
    description, _ = VERBS[verb]
    parser = argparse.ArgumentParser(prog=f"python -m serving {verb}", description=description)
    add = parser.add_argument
    add(
        "--project",
        default="packhorse",
        help="the bucket's name begins with it, and everything is tagged with it "
        "(default: %(default)s)",
    )
    add("--name", help="of the stack, the endpoint and the function (default: PROJECT-serving)")
    add("--region", help="(default: as in every AWS tool)")
    if verb in ("plan", "deploy", "destroy"):
        add("--bucket", help="of the uploads (default: PROJECT-ACCOUNT-REGION)")
    if verb in ("plan", "deploy"):
        add(
            "package",
            nargs="?",
            help="a model.tar.gz, here or at s3://BUCKET/KEY (default: keep the deployed one)",
        )
        add(
            "--mode",
            help="endpoint: SageMaker, with a Lambda function in front; "
            "lambda: the model inside the function, no endpoint",
        )
        add(
            "--image",
            help="the endpoint's container in ECR, of serving/Dockerfile (default: AWS's Ray Serve "
            "image, with what it lacks in the archive)",
        )
        add(
            "--build",
            action="store_true",
            help="build the endpoint's container in the account, with CodeBuild from "
            "serving/Dockerfile, unless this one is built already",
        )
        add(
            "--signed-by",
            metavar="KEY",
            help="refuse a model that this public key has not signed, now and in later deployments "
            "until --set SignedBy=: its PEM file, or the text that sign printed",
        )
        add(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a parameter of stack.yaml; plan lists them",
        )
    if verb in ("deploy", "destroy"):
        add("--yes", action="store_true", help="don't ask")
    if verb == "invoke":
        add("source", help="a picture's file, or the URL of one")
        add(
            "--endpoint",
            action="store_true",
            help="ask the endpoint itself, not the function in front of it",
        )
        add("--labels", action="store_true", help="the most probable classes instead of logits")
    if verb == "logs":
        add("--follow", action="store_true", help="keep showing lines until Ctrl-C")
        add("--minutes", type=positive, default=60, help="how far back (default: %(default)s)")
    return parser


# ---- plan and deploy


@dataclass(frozen=True)
class DeploymentPlan:
    """A release, and what it would change.

    change_set: its name, where a stack exists; None where there is no stack, or nothing to change.
    image: with --build, the image to build first; None: it is built already.
    """

    release: Release
    stack: ServingStack
    exists: bool
    change_set: str | None
    image: Image | None = None

    @property
    def changes_nothing(self) -> bool:
        """Return whether everything is deployed already."""
        return self.exists and self.change_set is None and self.image is None

    def discard(self) -> None:
        """Delete the change set, which is no longer needed."""
        if self.change_set:
            self.stack.discard(self.change_set)


def plan(options: argparse.Namespace) -> int:
    """Show what `deploy` would do."""
    _prepare(Aws(options.project, options.region), options).discard()
    return OK


def deploy(options: argparse.Namespace) -> int:
    """Show what `plan` shows, ask, and do it."""
    aws = Aws(options.project, options.region)
    if not _is_online(aws):
        raise UserError(
            "no AWS credentials or no region: aws configure, or aws sso login, and --region; "
            "`plan` works without"
        )
    prepared = _prepare(aws, options)
    name = prepared.release.place.name
    if prepared.changes_nothing:
        print("nothing to change")
        return OK
    try:
        if not confirmed("deploy this?", options.yes):
            print("nothing was changed")
            prepared.discard()
            return OK
        prepared = _sent(aws, prepared)
    except BaseException:
        prepared.discard()
        raise
    if prepared.changes_nothing:
        print("nothing else to change")
        return OK
    stack = _begin(prepared)
    described = stack.follow()
    if described["StackStatus"] not in IN_SERVICE:
        left = "only its uploads are left"
        if prepared.exists:
            left = "what was deployed before stays in service"
        raise UserError(f"stack {name}: {described['StackStatus']}; {stack.reason()}; {left}")
    for output in described.get("Outputs", []):
        print(f"{output['OutputKey']:16}{output['OutputValue']}")
    which = [] if name == "packhorse-serving" else ["--name", name]
    print(f"next: {command('serving', 'invoke', 'PICTURE', *which)}")
    return OK


def _begin(prepared: DeploymentPlan) -> ServingStack:
    """Begin the change, and return the stack to follow; a new one by its ARN."""
    stack = prepared.stack
    if not prepared.change_set:
        return ServingStack(stack.aws, stack.create(prepared.release.content()))
    stack.mark_events()
    stack.execute(prepared.change_set)
    return stack


def _sent(aws: Aws, prepared: DeploymentPlan) -> DeploymentPlan:
    """Build the image where it is missing, upload the rest, and return the remaining plan.

    It names the image by its digest, so exactly the built image runs.
    """
    release, change_set = prepared.release, prepared.change_set
    if prepared.image is not None:
        release = with_image(release, prepared.image.build())
    for upload in release.uploads:
        send(aws, release.place.bucket, upload)
    if prepared.image is not None and prepared.exists:
        change_set, _ = _propose(prepared.stack, release)
        prepared.discard()
    return replace(prepared, release=release, change_set=change_set, image=None)


def _propose(stack: ServingStack, release: Release) -> tuple[str | None, list[dict[str, Any]]]:
    """Make a change set of a release; return its name and its changes.

    The name is None where the release changes nothing.
    """
    name = f"release-{release.parameters['FunctionRelease']}-{secrets.token_hex(4)}"
    changes = stack.propose(name, release.content(), first=False)
    if changes is None:
        return None, []
    return name, changes


def _is_online(aws: Aws) -> bool:
    return aws.configured_region is not None and aws.has_credentials()


def _prepare(aws: Aws, options: argparse.Namespace) -> DeploymentPlan:
    """Compute the release, and print it with its changes and its price."""
    given = _given(options)
    is_online = _is_online(aws)
    if "InstanceType" in given:
        check_instance(given["InstanceType"], instance_types())
    stack = ServingStack(aws, options.name)
    described, asked = None, None
    place = _place_offline(options)
    if is_online:
        check_region(aws.region)
        asked = aws
        described = stack.find_ours()
        place = _place(aws, options, parameters_of(described))
    if described:
        stack.check_rests(described)
    deployed = parameters_of(described)
    wanted, found = None, None
    if options.build:
        wanted = Image(asked, image.recipe(place, _backend(given, deployed)))
        found = wanted.find()
        given["Image"] = found or wanted.recipe.address
    signed_by = given.get("SignedBy", deployed.get("SignedBy", ""))
    package = _package(asked, options.package, signed_by)
    release = build(place, package, given, deployed)
    _check_scaling(deployed, release.parameters)

    if not asked:
        print(
            f"no AWS credentials or no region: shown for account {place.account} in "
            f"{place.region}, and as if nothing were deployed"
        )
    status = described["StackStatus"] if described else "new"
    print(f"stack {place.name} in account {place.account}, {place.region}: {status}")
    digest = hashlib.sha256(TEMPLATE.read_bytes()).hexdigest()
    print(f"template: serving/{TEMPLATE.name}, SHA-256 {digest}")
    if wanted is not None:
        wanted.show(found)
    _print_release(release, deployed)
    change_set = None
    if described:
        change_set, changes = _propose(stack, release)
        lines = [_line(change) for change in changes]
    else:
        made = resources(release.parameters)
        lines = [f"add      {kind:44}{name}" for name, kind in made.items()]
    print("changes:")
    for line in lines or ["none"]:
        print(f"  {line}")
    _print_price(release)
    missing = wanted if found is None else None
    return DeploymentPlan(release, stack, described is not None, change_set, missing)


def _backend(given: Mapping[str, str], deployed: Mapping[str, str]) -> str:
    """Return the backend in the image that --build builds. Raise UserError."""
    if "Image" in given:
        raise UserError("--build: it makes the image that --image names; leave one of them out")
    if given.get("Door", deployed.get("Door")) == "lambda":
        raise UserError(
            "--build: with --mode lambda no container is used; leave one of them out, "
            "or deploy with --mode endpoint"
        )
    default = template()["Parameters"]["Backend"]["Default"]
    return given.get("Backend", deployed.get("Backend", default))


def _print_release(release: Release, deployed: Mapping[str, str]) -> None:
    print("parameters:")
    for name, value in release.parameters.items():
        was = ""
        if deployed.get(name, value) != value:
            was = f"  (was {deployed[name] or 'empty'})"
        print(f"  {name:24}{value}{was}")
    print("uploads:")
    for upload in release.uploads:
        where = f"s3://{release.place.bucket}/{upload.key}"
        print(f"  {upload.size:>12,} bytes  {upload.what}: {where}")


def _line(change: Mapping[str, str]) -> str:
    action = change["Action"].lower()
    if change.get("Replacement") == "True":
        action = "replace"
    return f"{action:9}{change['ResourceType']:44}{change['LogicalResourceId']}"


def _given(options: argparse.Namespace) -> dict[str, str]:
    """Return the template's parameters that the user has set."""
    given = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write NAME=VALUE")
        given[name] = value
    # The template calls the mode Door: with another name it would replace every endpoint.
    flags = {"Door": options.mode, "Image": options.image}
    if options.signed_by is not None:
        given["SignedBy"] = as_text(public_key(expanded(options.signed_by)))
    return given | {name: value for name, value in flags.items() if value is not None}


def _package(aws: Aws | None, package: str | None, signed_by: str) -> Path | Remote | None:
    """Return the package to deploy. signed_by: the key that must have signed it; "": any.

    A package in S3 is not downloaded: its signature is checked when the container starts. Raise
    UserError.
    """
    if package is None:
        return None
    if package.startswith("s3://"):
        return _remote(aws, package)

    # imported here: only a package on this machine needs NumPy and Pillow
    from serving.manifest import PackageError
    from serving.package import load

    path = Path(expanded(package))
    if path.is_dir():
        raise UserError(f"{path}: a directory can't be deployed; give the model.tar.gz")
    try:
        load(path, signed_by=signed_by)
    except (PackageError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
    return path


def _remote(aws: Aws | None, uri: str) -> Remote:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise UserError(f"{uri}: this names no object; write s3://BUCKET/KEY")
    if aws is None:
        return Remote(uri, "unknown")
    head = aws.find("s3", "HeadObject", "404|NoSuch", Bucket=bucket, Key=key)
    if head is None:
        look = f"aws s3 ls {shlex.quote(f's3://{bucket}/')}"
        raise UserError(f"{uri}: there is no such object; look with: {look}")
    return Remote(uri, head["ETag"].strip('"'))


def _place(aws: Aws, options: argparse.Namespace, deployed: Mapping[str, str]) -> Place:
    bucket = options.bucket or deployed.get("Bucket") or aws.bucket
    return Place(options.name, options.project, bucket, aws.account, aws.region, aws.partition)


def _place_offline(options: argparse.Namespace) -> Place:
    region = options.region or image_region(options.image or "") or Place.region
    bucket = options.bucket or bucket_name(options.project, Place.account, region)
    return Place(options.name, options.project, bucket, region=region)


def _check_scaling(deployed: Mapping[str, str], target: Mapping[str, str]) -> None:
    """Raise UserError for a new instance type where autoscaling is on.

    SageMaker refuses it ("Update endpoints that use auto scaling" in its guide).
    """
    if not deployed or deployed["InstanceType"] == target["InstanceType"]:
        return
    if "ScalableTarget" in resources(deployed) and "ScalableTarget" in resources(target):
        least = deployed["MinInstances"]
        raise UserError(
            "InstanceType can't change while autoscaling is on: deploy with "
            f"{_flag('MaxInstances', least)} {_flag('MinInstances', least)} first, "
            f"then with {_flag('InstanceType', target['InstanceType'])}, "
            f"then with {_flag('MaxInstances', target['MaxInstances'])}"
        )


def _print_price(release: Release) -> None:
    parameters, region = release.parameters, release.place.region
    print(f"price of a month at idle ({price(parameters['InstanceType'], region).basis}):")
    items = idle_price(parameters, region)
    for item in items:
        month = "unknown" if item.month is None else dollars(item.month)
        print(f"  {month:>12}  {item.what}")
    print(f"  {_total(items):>12}  together")
    if "ScalingPolicy" in resources(parameters):
        most = idle_price(parameters, region, int(parameters["MaxInstances"]))
        print(f"  {_total(most):>12}  with all {parameters['MaxInstances']} instances at work")


def _total(items: Sequence[Item]) -> str:
    known = [item.month for item in items if item.month is not None]
    rest = "" if len(known) == len(items) else " and unknown items"
    return dollars(sum(known)) + rest


# ---- destroy


def destroy(options: argparse.Namespace) -> int:
    """Remove the stack, the image and the uploads."""
    aws = Aws(options.project, options.region)
    stack = ServingStack(aws, options.name)
    described = stack.find_ours()
    builds = ImageStack(aws, image.stack_name(options.name))
    built = builds.describe()
    if built is not None and not builds.is_ours(built):
        built = None  # only its name is like one of ours
    place = _place(aws, options, parameters_of(described or built))
    status = described["StackStatus"] if described else "none"
    print(f"stack {place.name} in account {place.account}, {place.region}: {status}")
    if described:
        _list(stack)
    if built:
        print(f"stack {builds.name}: {built['StackStatus']}")
        _list(builds)
        print("  remove every image in this repository")
    print(f"  remove all below s3://{place.bucket}/{place.folder}")
    if not confirmed("remove all of this?", options.yes):
        print("nothing was removed")
        return OK
    if described:
        _delete(ServingStack(aws, described["StackId"]), place.name)
    if built:
        image.stop(aws, builds.name)
        _delete(ImageStack(aws, built["StackId"]), builds.name)
    # After the stack: an endpoint that scales out reads its model from the bucket again.
    count = s3.delete_versions(aws, place.bucket, place.folder)
    also = "the stack, and " if described else ""
    also = f"the image, {also}" if built else also
    print(f"removed: {also}{count} objects in s3://{place.bucket}/{place.folder}")
    return OK


def _list(stack: ServingStack) -> None:
    for resource in stack.resources():
        print(f"  remove {resource['ResourceType']:44}{resource.get('PhysicalResourceId', '')}")


def _delete(stack: ServingStack, name: str) -> None:
    stack.mark_events()
    stack.delete()
    status = stack.follow()["StackStatus"]
    if status != "DELETE_COMPLETE":
        raise UserError(f"stack {name}: {status}; {stack.reason()}; start the same command again")


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "plan": (
        "Show what deploying would make, change and cost. "
        "Changes nothing, and works without credentials.",
        plan,
    ),
    "deploy": (
        "Show the same, ask, and do it. "
        "A new model takes over from the old one only when the alarms stay silent.",
        deploy,
    ),
    "status": ("Show what is deployed, its state, and what it costs.", operate.status),
    "invoke": ("Ask the deployed model for a prediction.", operate.invoke),
    "logs": ("Show what the function and the endpoint logged.", operate.logs),
    "destroy": ("Remove all that `deploy` made.", destroy),
}


def _flag(parameter: str, value: str) -> str:
    """Return the flag that sets a parameter, as the user types it."""
    return f"--set {shlex.quote(f'{parameter}={value}')}"
