"""`python -m serving plan | deploy | status | invoke | logs | destroy`: the model in the user's AWS account, as `serving/stack.yaml` says."""

import argparse
import hashlib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from launch.cloud.prices import FALLBACK, table
from launch.cloud.session import Aws, explained
from serving.deploy import operate, prices
from serving.deploy import stack as stacks
from serving.deploy.release import (
    NAME,
    TEMPLATE,
    Place,
    Release,
    Remote,
    Upload,
    build,
    idle_price,
    resources,
)
from trainer.common.console import python
from trainer.common.errors import OK, RESUME, UserError


def main(arguments: Sequence[str]) -> int:
    """arguments: the verb and what belongs to it. Raises UserError."""
    verb, *rest = arguments
    describe, run = VERBS[verb]
    parser = argparse.ArgumentParser(prog=f"python -m serving {verb}", description=describe)
    parser.add_argument(
        "--project",
        default="packhorse",
        help="begins the bucket's name, and is a tag of everything (default: %(default)s)",
    )
    parser.add_argument(
        "--name", help="of the stack, the endpoint and the function (default: PROJECT-serving)"
    )
    parser.add_argument("--region", help="(default: as in every AWS tool)")
    if verb in ("plan", "deploy", "destroy"):
        parser.add_argument("--bucket", help="of the uploads (default: PROJECT-ACCOUNT-REGION)")
    if verb in ("plan", "deploy"):
        parser.add_argument(
            "package",
            nargs="?",
            help="a model.tar.gz, here or at s3://BUCKET/KEY (default: keep the deployed one)",
        )
        parser.add_argument(
            "--door",
            help="endpoint: SageMaker, with a Lambda function in front; lambda: the model inside the function, no endpoint",
        )
        parser.add_argument(
            "--image",
            help="the endpoint's container in ECR: of serving/Dockerfile, or AWS's Ray Serve image",
        )
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a parameter of stack.yaml; plan lists them",
        )
    if verb in ("deploy", "destroy"):
        parser.add_argument("--yes", action="store_true", help="don't ask")
    if verb == "invoke":
        parser.add_argument("source", help="a picture's file, or the URL of one")
        parser.add_argument(
            "--endpoint",
            action="store_true",
            help="ask the endpoint itself, not the function in front of it",
        )
        parser.add_argument(
            "--labels", action="store_true", help="the most probable classes instead of logits"
        )
    if verb == "logs":
        parser.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
        parser.add_argument(
            "--minutes", type=float, default=60, help="how far back (default: %(default)s)"
        )
    options = parser.parse_args(rest)
    options.name = options.name or f"{options.project}-serving"
    if not re.fullmatch(NAME, options.name):
        raise UserError(
            f"--name {options.name}: allowed: lower-case letters, digits and hyphens, a letter first, at most 40"
        )
    try:
        return run(options)
    except KeyboardInterrupt:
        print(
            f"interrupted; what AWS has begun goes on: python -m serving status --name {options.name}",
            file=sys.stderr,
        )
        return RESUME


# ---- plan and deploy


@dataclass(frozen=True)
class Plan:
    """A release, and what it would change. change_set: of the stack that is there; None where there is no stack, or nothing to change."""

    release: Release
    exists: bool
    change_set: str | None


def plan(options: argparse.Namespace) -> int:
    aws = Aws(options.project, options.region)
    _discard(aws, _prepare(aws, options))  # the change set was made only to be shown
    return OK


def deploy(options: argparse.Namespace) -> int:
    aws = Aws(options.project, options.region)
    if not (aws.configured_region and aws.has_credentials()):
        raise UserError(
            "no AWS credentials or no region: aws configure, or aws sso login, and --region; `plan` works without"
        )
    prepared = _prepare(aws, options)
    release, name = prepared.release, prepared.release.place.name
    if prepared.exists and prepared.change_set is None:
        print("nothing to change")
        return OK
    try:
        if not _confirmed(options, "deploy this?"):
            print("nothing was changed")
            _discard(aws, prepared)
            return OK
        for upload in release.uploads:
            _upload(aws, release.place.bucket, upload)
    except BaseException:
        _discard(aws, prepared)
        raise
    before: Set[str] = set()
    if prepared.change_set:
        before = {event["EventId"] for event in stacks.events(aws, name)}
        aws.call("cloudformation", "ExecuteChangeSet", ChangeSetName=prepared.change_set)
        stack = stacks.follow(aws, name, before)
    else:
        # Rolled back and left there, it would be in the way of the next try.
        arn = aws.call("cloudformation", "CreateStack", **release.stack(), OnFailure="DELETE")[
            "StackId"
        ]
        stack = stacks.follow(aws, arn, before)
    if stack["StackStatus"] not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        left = (
            "what was deployed before stays in service"
            if prepared.exists
            else "nothing of it is left but the uploads"
        )
        raise UserError(
            f"stack {name}: {stack['StackStatus']}; {stacks.reason(aws, stack['StackId'], before)}; {left}"
        )
    for output in stack.get("Outputs", []):
        print(f"{output['OutputKey']:16}{output['OutputValue']}")
    print(
        f"next: {python()} -m serving invoke PICTURE{'' if name == 'packhorse-serving' else f' --name {name}'}"
    )
    return OK


def _prepare(aws: Aws, options: argparse.Namespace) -> Plan:
    """Builds the release, and prints it with what it changes and costs."""
    given = _given(options)
    if "InstanceType" in given:
        _check_instance(given["InstanceType"])
    online = aws.configured_region is not None and aws.has_credentials()
    stack = stacks.find_ours(aws, options.name) if online else None
    if stack and (
        stack["StackStatus"] in stacks.STUCK or stack["StackStatus"].endswith("IN_PROGRESS")
    ):
        remedy = (
            "python -m serving destroy, then deploy again"
            if stack["StackStatus"] in stacks.STUCK
            else "wait until it is done"
        )
        raise UserError(f"stack {options.name} is in {stack['StackStatus']}; {remedy}")
    deployed = stacks.parameters(stack) if stack else {}
    package = _package(aws if online else None, options.package)
    release = build(
        _place(aws, options, deployed) if online else _place_offline(options),
        package,
        given,
        deployed,
    )
    _check_scaling(deployed, release.parameters)

    place = release.place
    if not online:
        print(
            f"no AWS credentials or no region: shown for account {place.account} in {place.region}, and as if nothing were deployed"
        )
    print(
        f"stack {place.name} in account {place.account}, {place.region}: {stack['StackStatus'] if stack else 'new'}"
    )
    print(
        f"template: serving/{TEMPLATE.name}, SHA-256 {hashlib.sha256(TEMPLATE.read_bytes()).hexdigest()}"
    )
    print("parameters:")
    for name, value in release.parameters.items():
        was = f"  (was {deployed[name] or 'empty'})" if deployed.get(name, value) != value else ""
        print(f"  {name:24}{value}{was}")
    print("uploads:")
    for upload in release.uploads:
        print(f"  {upload.size:>12,} bytes  {upload.what}: s3://{place.bucket}/{upload.key}")
    print("changes:")
    if stack:
        change_set, changes = stacks.change(aws, release)
    else:
        change_set, changes = (
            None,
            [f"add      {kind:44}{name}" for name, kind in resources(release.parameters).items()],
        )
    for change in changes or ["none"]:
        print(f"  {change}")
    _print_price(release)
    return Plan(release, stack is not None, change_set)


def _discard(aws: Aws, prepared: Plan) -> None:
    if prepared.change_set:
        aws.call("cloudformation", "DeleteChangeSet", ChangeSetName=prepared.change_set)


def _given(options: argparse.Namespace) -> dict[str, str]:
    given = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write NAME=VALUE")
        given[name] = value
    flags = {"Door": options.door, "Image": options.image}
    return given | {name: value for name, value in flags.items() if value is not None}


def _check_instance(kind: str) -> None:
    """By botocore's model, which lists what an endpoint may run on."""
    try:
        from botocore.session import get_session
    except ImportError:
        return
    allowed = (
        get_session()
        .get_service_model("sagemaker")
        .shape_for("ProductionVariantInstanceType")
        .metadata["enum"]
    )
    if kind not in allowed:
        priced = [name for name in table()["regions"][FALLBACK] if name in allowed]
        raise UserError(
            f"--set InstanceType={kind}: endpoints don't run on it; try one of {', '.join(priced)}"
        )


def _package(aws: Aws | None, package: str | None) -> Path | Remote | None:
    if package is None:
        return None
    if package.startswith("s3://"):
        bucket, _, key = package.removeprefix("s3://").partition("/")
        if aws is None:
            return Remote(package, "unknown")
        head = aws.find("s3", "HeadObject", "404|NoSuch", Bucket=bucket, Key=key)
        if head is None:
            raise UserError(
                f"{package}: there is no such object; look with: aws s3 ls s3://{bucket}/"
            )
        return Remote(package, head["ETag"].strip('"'))

    from serving.package import PackageError, load

    path = Path(package)
    try:
        if path.is_dir():
            raise UserError(f"{path}: a directory can't be deployed; give the model.tar.gz")
        load(path)
    except (PackageError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
    return path


def _place(aws: Aws, options: argparse.Namespace, deployed: Mapping[str, str]) -> Place:
    bucket = options.bucket or deployed.get("Bucket") or aws.bucket
    return Place(options.name, options.project, bucket, aws.account, aws.region, aws.partition)


def _place_offline(options: argparse.Namespace) -> Place:
    place = Place(
        options.name, options.project, options.bucket or "", region=options.region or Place.region
    )
    return (
        place
        if place.bucket
        else Place(
            place.name,
            place.project,
            f"{place.project}-{place.account}-{place.region}",
            region=place.region,
        )
    )


def _check_scaling(deployed: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """SageMaker refuses another instance type for a variant that autoscaling looks after ("Update endpoints that use auto scaling" in its guide)."""
    if not deployed or deployed["InstanceType"] == wanted["InstanceType"]:
        return
    if "ScalableTarget" in resources(deployed) and "ScalableTarget" in resources(wanted):
        fixed = f"--set MaxInstances={deployed['MinInstances']}"
        raise UserError(
            f"InstanceType can't change while autoscaling is on: deploy with {fixed} --set MinInstances={deployed['MinInstances']} first, "
            f"then with --set InstanceType={wanted['InstanceType']}, then with --set MaxInstances={wanted['MaxInstances']}"
        )


def _print_price(release: Release) -> None:
    parameters, region = release.parameters, release.place.region
    print(f"price of a month at idle (an estimate of {table()['date']}; {table()['source']}):")
    items = idle_price(parameters, region)
    for item in items:
        print(f"  {prices.dollars(item.month):>12}  {item.what}")
    print(f"  {_total(items):>12}  together")
    if "ScalingPolicy" in resources(parameters):
        most = idle_price(parameters, region, int(parameters["MaxInstances"]))
        print(f"  {_total(most):>12}  with all {parameters['MaxInstances']} instances at work")


def _total(items: Sequence[prices.Item]) -> str:
    known = [item.month for item in items if item.month is not None]
    return prices.dollars(sum(known)) + ("" if len(known) == len(items) else " and what is unknown")


def _upload(aws: Aws, bucket: str, upload: Upload) -> None:
    if aws.find("s3", "HeadObject", "404|NoSuchKey", Bucket=bucket, Key=upload.key):
        return
    print(f"uploading {upload.what}: {upload.size:,} bytes")
    with (
        upload.content.open("rb")
        if isinstance(upload.content, Path)
        else io.BytesIO(upload.content) as file
    ):
        try:
            aws.client("s3").upload_fileobj(file, bucket, upload.key)
        except Exception as error:
            raise explained(error, f"s3:PutObject {upload.key}") from error


def _confirmed(options: argparse.Namespace, question: str) -> bool:
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody is here to ask: give --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


# ---- destroy


def destroy(options: argparse.Namespace) -> int:
    """The stack holds all but the uploads: endpoint, configuration, model, scaling, alarms, function with its versions, log groups, roles."""
    aws = Aws(options.project, options.region)
    stack = stacks.find_ours(aws, options.name)
    place = _place(aws, options, stacks.parameters(stack) if stack else {})
    print(
        f"stack {place.name} in account {place.account}, {place.region}: {stack['StackStatus'] if stack else 'none'}"
    )
    if stack:
        for resource in aws.pages(
            "cloudformation", "ListStackResources", "StackResourceSummaries", StackName=place.name
        ):
            print(f"  remove {resource['ResourceType']:44}{resource.get('PhysicalResourceId', '')}")
    print(f"  remove all below s3://{place.bucket}/{place.folder}")
    if not _confirmed(options, "remove all of this?"):
        print("nothing was removed")
        return OK
    if stack:
        before = {event["EventId"] for event in stacks.events(aws, stack["StackId"])}
        aws.call("cloudformation", "DeleteStack", StackName=place.name)
        gone = stacks.follow(aws, stack["StackId"], before)
        if gone["StackStatus"] != "DELETE_COMPLETE":
            raise UserError(
                f"stack {place.name}: {gone['StackStatus']}; {stacks.reason(aws, stack['StackId'], before)}; start the same command again"
            )
    count = _delete_objects(
        aws, place.bucket, place.folder
    )  # after the stack: an endpoint that scales out reads its model again
    print(
        f"removed: {'the stack, and ' if stack else ''}{count} objects in s3://{place.bucket}/{place.folder}"
    )
    return OK


def _delete_objects(aws: Aws, bucket: str, prefix: str) -> int:
    """Deletes all versions. How many there were."""
    objects: list[dict[str, str]] = []
    for key in ("Versions", "DeleteMarkers"):
        objects += [
            {"Key": item["Key"], "VersionId": item["VersionId"]}
            for item in aws.pages("s3", "ListObjectVersions", key, Bucket=bucket, Prefix=prefix)
        ]
    for start in range(0, len(objects), 1000):  # as many as one call takes
        answer = aws.call(
            "s3",
            "DeleteObjects",
            Bucket=bucket,
            Delete={"Objects": objects[start : start + 1000], "Quiet": True},
        )
        if answer.get("Errors"):
            raise UserError(
                f"s3://{bucket}/{answer['Errors'][0]['Key']}: {answer['Errors'][0]['Message']}; delete it by hand, or start again"
            )
    return len(objects)


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "plan": (
        "Show what deploying would make, change and cost. Changes nothing, and works without credentials.",
        plan,
    ),
    "deploy": (
        "Show the same, ask, and do it. A new model takes over from the old one only when the alarms stay silent.",
        deploy,
    ),
    "status": ("Show what is deployed, its state, and what it costs.", operate.status),
    "invoke": ("Ask the deployed model for a prediction.", operate.invoke),
    "logs": ("Show what the function and the endpoint logged.", operate.logs),
    "destroy": ("Remove all that `deploy` made.", destroy),
}
