"""Machines past their time limit: they should have ended themselves, and cost money until somebody ends them."""

import re
import sys
from collections.abc import Iterator, Sequence

from launch.cloud import ownership
from launch.cloud.session import Aws, AwsError
from launch.targets import runs
from launch.targets.runs import Attempt, Phase, State, dollars
from trainer.common.console import python

DENIED = "AccessDenied(Exception)?|UnauthorizedOperation|UnauthorizedAccess|403"


def machines(aws: Aws) -> Iterator[tuple[Attempt, State]]:
    """The attempts whose machines run past their limits. Raises AwsError."""
    for found in ownership.instances(aws, ("instance-state-name", "running")):
        running = (runs.now() - found["LaunchTime"]).total_seconds()
        tags = {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])}
        if running < runs.PATIENCE.total_seconds() or not {"run", "attempt"} <= tags.keys():
            continue
        key = runs.attempt_key(tags["run"], int(tags["attempt"]), "request.json")
        noted = aws.find("s3", "GetObject", "NoSuchKey|NoSuchBucket", Bucket=aws.bucket, Key=key)
        if noted is None:
            continue
        attempt = runs.loads(noted["Body"].read())
        state = State(
            Phase.RUNNING, "running", found["LaunchTime"], None, running, id=found["InstanceId"]
        )
        if runs.overdue(attempt, state):
            yield attempt, state


def line(attempt: Attempt, state: State) -> str:
    """What is to be known of a machine past its limit."""
    spent = dollars(attempt, state)
    cost = "price unknown" if spent is None else f"${spent:.2f} so far"
    late = runs.overdue(attempt, state)
    return (
        f"run {attempt.run} on {state.id}, {late:.1f} h past its {attempt.hours:g} h limit, {cost}"
    )


def warn(aws: Aws, targets: Sequence[str]) -> None:
    """Says what is past its limit, on standard error, since standard output may be a document.

    targets: the overrides of the target that were given. Raises AwsError, but not for a caller
    who may not look.
    """
    given = [override for override in targets if not override.startswith("target=")]
    command = " ".join([python(), "-m launch status --end", *given])
    try:
        for attempt, state in machines(aws):
            print(
                f"OVERDUE: {line(attempt, state)}; end it with: {command}",
                file=sys.stderr,
                flush=True,
            )
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        print(
            f"whether a machine is past its limit is not known: {error}",
            file=sys.stderr,
            flush=True,
        )


def end(aws: Aws) -> int:
    """Terminates what is past its limit; returns how many machines. Raises AwsError."""
    found = list(machines(aws))
    for attempt, state in found:
        print(f"OVERDUE: {line(attempt, state)}: it is ended", file=sys.stderr, flush=True)
        runs.terminate(aws, attempt, str(state.id))
    return len(found)
