"""A deployment in AWS: its stack, which is distinguished from other stacks, and its uploads."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from launch.cloud.cloudformation import STUCK, Stack, parameters_of
from launch.cloud.session import Aws, explained
from serving.deploy.release import Upload
from trainer.common.errors import UserError


class ServingStack(Stack):
    """The stack with a deployment's name."""

    kind: ClassVar[str] = "deployment"
    told_by: ClassVar[str] = "FunctionRelease"  # a parameter that only stacks of this kind have

    def is_ours(self, stack: Mapping[str, Any]) -> bool:
        """Return whether a stack is the project's, and of this kind."""
        return self.told_by in parameters_of(stack) and self.aws.owns(stack.get("Tags", []))

    def find_ours(self) -> dict[str, Any] | None:
        """Return CloudFormation's description of the stack; None where there is no stack.

        Raise UserError for another project's stack, or one of another kind: the name alone doesn't
        make it ours.
        """
        stack = self.describe()
        if stack is None or self.is_ours(stack):
            return stack
        raise UserError(
            f"stack {self.name} in account {self.aws.account}, {self.aws.region} is no {self.kind} "
            f"of the project {self.aws.project}: it lacks the tag, or it is another kind of "
            "stack; give another --name, or --project"
        )

    def deployed(self) -> dict[str, Any]:
        """Return the stack as `find_ours`. Raise UserError where there is none."""
        stack = self.find_ours()
        if stack is None:
            raise UserError(
                f"there is no stack {self.name} in {self.aws.region}; python -m serving deploy "
                "makes it; --name and --region choose another"
            )
        return stack

    def check_rests(self, stack: Mapping[str, Any]) -> None:
        """Raise UserError where the stack can't be changed now. stack: its description."""
        status = stack["StackStatus"]
        if status in STUCK:
            remedy = "python -m serving destroy, then deploy again"
        elif status.endswith("IN_PROGRESS"):
            remedy = "wait until it is done"
        else:
            return
        raise UserError(f"stack {self.name} is in {status}; {remedy}")

    def reason(self) -> str:
        """Return CloudFormation's reason for the first failure of a resource."""
        return next(iter(self.failures()), "no reason given")

    def follow(self) -> dict[str, Any]:
        """Print the stack's events until it is settled, and return it then."""
        stack = self.settle(_print_event)
        assert stack is not None  # by its ARN CloudFormation shows even a deleted stack
        return stack


def _print_event(event: dict[str, Any]) -> None:
    status, name = event["ResourceStatus"], event["LogicalResourceId"]
    line = f"  {status:28}{name:20} {event.get('ResourceStatusReason', '')}"
    print(line.rstrip(), flush=True)


def send(aws: Aws, bucket: str, upload: Upload) -> None:
    """Upload a file, unless the bucket has its key, which is its content's. Raise UserError."""
    if aws.find("s3", "HeadObject", "404|NoSuchKey", Bucket=bucket, Key=upload.key):
        return
    print(f"uploading {upload.what}: {upload.size:,} bytes", flush=True)
    content = upload.content
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        try:
            aws.client("s3").upload_fileobj(file, bucket, upload.key)
        except Exception as error:
            raise explained(error, f"s3:PutObject {upload.key}") from error
