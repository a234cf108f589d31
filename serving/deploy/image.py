"""The endpoint's container, which CodeBuild builds in the account from serving/Dockerfile.

`serving/image.yaml` is its stack, beside the deployment's own. An image's tag is the digest of its
source, so the same source is built once.
"""

import hashlib
import re
import secrets
import shlex
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cloud.account_stack import AccountStack
from launch.cloud.cloudformation import IN_SERVICE, NO_CHANGES, Content, load, parameters_of
from launch.cloud.prices import BUILD_DATE, BUILD_MINUTE, ECR_GB_MONTH, FALLBACK
from launch.cloud.session import Aws, AwsError, domain
from launch.cloud.source import BESIDE, beside
from serving.deploy import bundle
from serving.deploy.release import Place, Upload
from serving.deploy.stack import ServingStack, send
from trainer.common.errors import PROJECT, UserError
from trainer.common.text import dollars

TEMPLATE = Path(__file__).parents[1] / "image.yaml"
DOCKERFILE = "serving/Dockerfile"
# The Dockerfile's RUNTIME, by the stack's Backend.
RUNTIMES = {"onnx": "onnxruntime", "cuda": "onnxruntime-gpu[cuda,cudnn]"}
EVERY = 5.0  # seconds between two looks at a build
LAST_LINES = 20  # to show of a failed build's log
ABSENT = "RepositoryNotFound|ImageNotFound"


# ---- the source


@dataclass(frozen=True)
class Recipe:
    """What an image is built from. runtime: the package that runs the network, in pip's words."""

    place: Place
    runtime: str
    source: Upload

    @property
    def name(self) -> str:
        """Return the name of the stack, the CodeBuild project and the repository."""
        return stack_name(self.place.name)

    @property
    def tag(self) -> str:
        content = f"{self.source.key.rpartition('/')[2]} {self.runtime}"
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    @property
    def repository(self) -> str:
        account, region = self.place.account, self.place.region
        return f"{account}.dkr.ecr.{region}.{domain(region)}/{self.name}"

    @property
    def address(self) -> str:
        """Return the image's address by its tag; its digest is known only when it is built."""
        return f"{self.repository}:{self.tag}"


def stack_name(deployment: str) -> str:
    """Return the name of the stack that builds a deployment's image."""
    return f"{deployment}-image"


def recipe(place: Place, backend: str) -> Recipe:
    """Return the recipe of this checkout's image. Raise UserError."""
    if backend not in RUNTIMES:
        raise UserError(
            f"--build: serving/Dockerfile has nothing for --set Backend={backend}; take "
            f"{' or '.join(RUNTIMES)}, or give a container of yours with --image"
        )
    content = bundle.archive(context(), zipfile.ZIP_STORED)
    digest = hashlib.sha256(content).hexdigest()[:32]
    key = f"{_folder(place)}{digest}.zip"
    return Recipe(place, RUNTIMES[backend], Upload("the image's source", key, content))


def context() -> dict[str, bytes]:
    """Return the Dockerfile and the files of its COPY lines, by path."""
    text = (PROJECT / DOCKERFILE).read_text()
    lines = re.findall(r"^COPY (.*)$", text, re.MULTILINE)
    sources = [source for line in lines for source in line.split()[:-1]]
    paths = [pair for source in (DOCKERFILE, *sources) for pair in _files(source)]
    return {name: path.read_bytes() for name, path in paths}


def _files(source: str) -> Iterator[tuple[str, Path]]:
    """Yield the files, with their names, of a source in a COPY line."""
    if source in BESIDE:
        yield source, beside(source)
        return
    for path in PROJECT.glob(f"{source}**/*" if source.endswith("/") else source):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(PROJECT).as_posix(), path


def _folder(place: Place) -> str:
    return f"{place.folder}image/"


# ---- the build


class ImageStack(ServingStack):
    """The stack that builds a deployment's image."""

    kind = "deployment's image"
    told_by = "SourceFolder"


@dataclass(frozen=True)
class Image:
    """The image of a recipe, in the account. aws: None where there are no credentials.

    Every method may raise AwsError.
    """

    aws: Aws | None
    recipe: Recipe

    def find(self) -> str | None:
        """Return the image's address by its digest; None where it isn't built, or offline.

        Raise UserError for a repository that is another project's.
        """
        if self.aws is None or self._stack(self.aws).find_ours() is None:
            return None
        which = [{"imageTag": self.recipe.tag}]
        wanted = {"repositoryName": self.recipe.name, "imageIds": which}
        answer = self.aws.find("ecr", "DescribeImages", ABSENT, **wanted)
        if answer is None:
            return None
        return f"{self.recipe.repository}@{answer['imageDetails'][0]['imageDigest']}"

    def show(self, found: str | None) -> None:
        """Print what `build` will do. found: what `find` returned."""
        print(f"image: {DOCKERFILE} with {self.recipe.runtime}, tag {self.recipe.tag}")
        if found is not None:
            print(f"  built already: {found}")
            return
        running = _running(self.aws, self.recipe.name) if self.aws else []
        if mine := [build for build in running if _tag(build) == self.recipe.tag]:
            print(f"  being built by {mine[0]['id']}: deploy waits for it")
            return
        source = self.recipe.source
        where = f"s3://{self.recipe.place.bucket}/{source.key}"
        digest = hashlib.sha256(TEMPLATE.read_bytes()).hexdigest()
        print(
            f"  deploy builds it first, with CodeBuild in this account: some minutes at "
            f"${BUILD_MINUTE:g} each; ECR keeps it for {dollars(ECR_GB_MONTH)} a GB and month "
            f"(estimate of {BUILD_DATE} for {FALLBACK})"
        )
        print(f"  {source.size:>12,} bytes  {source.what}: {where}")
        described = self._stack(self.aws).find_ours() if self.aws else None
        status = described["StackStatus"] if described else "new"
        print(f"  stack {self.recipe.name}: {status}; serving/{TEMPLATE.name}, SHA-256 {digest}")
        if described is None:
            for name, body in load(TEMPLATE)["Resources"].items():
                print(f"  add      {body['Type']:44}{name}")

    def build(self) -> str:
        """Build the image unless it exists, and return its address by its digest.

        Where a build of it runs already, another user's or that of a killed `deploy`, wait for it.
        Raise UserError where the build fails.
        """
        aws = self.aws
        assert aws is not None
        build = None
        try:
            if (found := self.find()) is not None:
                return found
            running = _running(aws, self.recipe.name)
            build = next((each for each in running if _tag(each) == self.recipe.tag), None)
            if build is None:
                self._make_stack(aws)
                send(aws, self.recipe.place.bucket, self.recipe.source)
                build = self._start(aws)
            print(f"building {self.recipe.address}: {build['id']}", flush=True)
            ended = _follow(aws, build["id"])
        except KeyboardInterrupt:
            left = "what AWS has begun keeps running"
            if build is not None:
                left = (
                    f"{build['id']} keeps running, an hour at most "
                    f"(aws codebuild stop-build --id {shlex.quote(build['id'])} ends it)"
                )
            raise KeyboardInterrupt(f"{left}; the same command goes on with it") from None
        found = self.find()
        if found is None:
            raise _failure(aws, ended)
        print(f"built {found}", flush=True)
        return found

    def _stack(self, aws: Aws) -> ImageStack:
        return ImageStack(aws, self.recipe.name)

    def _make_stack(self, aws: Aws) -> None:
        """Create the stack, or update it. Raise UserError where that fails."""
        stack = self._stack(aws)
        place = self.recipe.place
        account = AccountStack(aws, stack.every)
        bounds = account.describe()
        boundary = ""
        if bounds is not None and account.is_ours(bounds):
            boundary = parameters_of(bounds).get("PermissionsBoundary", "")
        parameters = {
            "Bucket": place.bucket,
            "SourceFolder": _folder(place),
            "PermissionsBoundary": boundary,
        }
        content = Content(TEMPLATE.read_text(), parameters)
        described = None
        if stack.find_ours() is not None:
            described = stack.settle()  # another `deploy`, or a killed one, may be changing it
        if described is None:
            stack = ImageStack(aws, stack.create(content))
        else:
            stack.check_rests(described)
            stack.mark_events()
            try:
                stack.update(content)
            except AwsError as error:
                if re.search(NO_CHANGES, error.message):
                    return
                raise
        status = stack.follow()["StackStatus"]
        if status not in IN_SERVICE:
            raise UserError(
                f"stack {self.recipe.name}: {status}; {stack.reason()}; nothing was deployed"
            )

    def _start(self, aws: Aws) -> dict[str, Any]:
        variables = {"TAG": self.recipe.tag, "RUNTIME": self.recipe.runtime}
        answer = aws.call(
            "codebuild",
            "StartBuild",
            projectName=self.recipe.name,
            sourceLocationOverride=f"{self.recipe.place.bucket}/{self.recipe.source.key}",
            environmentVariablesOverride=[
                {"name": name, "value": value} for name, value in variables.items()
            ],
            idempotencyToken=secrets.token_hex(16),  # botocore's retries start no second build
        )
        build: dict[str, Any] = answer["build"]
        return build


def stop(aws: Aws, name: str) -> None:
    """Stop the running builds of a stack. Raise AwsError."""
    for build in _running(aws, name):
        aws.call("codebuild", "StopBuild", id=build["id"])


def _running(aws: Aws, name: str) -> list[dict[str, Any]]:
    """Return the running builds of a CodeBuild project; [] where there is no such project."""
    which = {"projectName": name, "sortOrder": "DESCENDING"}
    answer = aws.find("codebuild", "ListBuildsForProject", "ResourceNotFound", **which)
    ids = answer["ids"] if answer else []
    if not ids:
        return []
    builds = aws.call("codebuild", "BatchGetBuilds", ids=ids)["builds"]
    return [build for build in builds if not build["buildComplete"]]


def _tag(build: dict[str, Any]) -> str | None:
    variables = build["environment"]["environmentVariables"]
    return next((each["value"] for each in variables if each["name"] == "TAG"), None)


def _follow(aws: Aws, build_id: str) -> dict[str, Any]:
    """Print each phase of a build, and return the build when it has ended."""
    shown = None
    while True:
        [build] = aws.call("codebuild", "BatchGetBuilds", ids=[build_id])["builds"]
        if build["currentPhase"] != shown:
            shown = build["currentPhase"]
            print(f"  {shown}", flush=True)
        if build["buildComplete"]:
            return dict(build)
        time.sleep(EVERY)


def _failure(aws: Aws, build: dict[str, Any]) -> UserError:
    """Print the end of a build's log, and return the error, in one line."""
    said = f"the build {build['id']}: {build['buildStatus']}"
    for phase in build.get("phases", []):
        if phase.get("phaseStatus", "SUCCEEDED") != "SUCCEEDED":
            contexts = [each.get("message", "") for each in phase.get("contexts", [])]
            said += f" in {phase['phaseType']}; {' '.join(' '.join(contexts).split())}"
            break
    logs = build.get("logs", {})
    group, stream = logs.get("groupName"), logs.get("streamName")
    if stream:
        which = {"logGroupName": group, "logStreamName": stream, "limit": LAST_LINES}
        answer = aws.find("logs", "GetLogEvents", "ResourceNotFound", **which) or {"events": []}
        for event in answer["events"]:
            print(f"  {event['message'].rstrip()}", flush=True)
        tail = shlex.join(["aws", "logs", "tail", group, "--log-stream-names", stream])
        said += f"; its log: {tail}"
    return UserError(f"{said}; nothing was deployed")
