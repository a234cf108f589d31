"""The stack of a deployment: told from other stacks, and told about while it changes."""

from typing import Any

from launch.cloud.cloudformation import Stack, parameters_of
from trainer.common.errors import UserError


class ServingStack(Stack):
    """The stack of a deployment's name."""

    def find_ours(self) -> dict[str, Any] | None:
        """Return the stack as CloudFormation describes it; None where there is none.

        Raise UserError for one that is another project's, or no deployment: its name doesn't
        make it ours.
        """
        stack = self.describe()
        if stack is None:
            return None
        is_deployment = "FunctionRelease" in parameters_of(stack)
        if is_deployment and self.aws.owns(stack.get("Tags", [])):
            return stack
        raise UserError(
            f"stack {self.name} in account {self.aws.account}, {self.aws.region} is no deployment "
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

    def follow(self) -> dict[str, Any]:
        """Print what happens to the stack until it rests, and return it then."""
        stack = self.settle(_print_event)
        assert stack is not None  # asked for by its ARN, a deleted one is described too
        return stack


def _print_event(event: dict[str, Any]) -> None:
    status, name = event["ResourceStatus"], event["LogicalResourceId"]
    print(f"  {status:28}{name:20}{event.get('ResourceStatusReason', '')}", flush=True)
