"""Machines past their time limit: they didn't end themselves, and cost money until someone does."""

import sys
from collections.abc import Iterator, Sequence

from launch.cloud.session import AwsError
from launch.targets import base
from launch.targets.attempt import Attempt, State
from launch.targets.inventory import Inventory
from trainer.common.console import command
from trainer.common.text import dollars


def machines(inventory: Inventory) -> Iterator[tuple[Attempt, State]]:
    """Yield the attempts whose machines run past their limits. Raise AwsError."""
    for kind in base.kinds():
        yield from kind.overdue(inventory)


def line(attempt: Attempt, state: State) -> str:
    """Return a line about a machine past its limit: its run, how late it is, its cost."""
    spent = attempt.dollars(state)
    cost = "price unknown" if spent is None else f"{dollars(spent)} so far"
    if state.ends_by is not None:
        return f"run {attempt.run} on {state.id}: {state.detail}, {cost}"
    late = base.of(attempt).past_limit(attempt, state)
    return (
        f"run {attempt.run} on {state.id}, {late:.1f} h past its {attempt.hours:g} h limit, {cost}"
    )


def warn(inventory: Inventory, targets: Sequence[str]) -> None:
    """Print the machines past their limits.

    To standard error, since standard output may be a document. targets: the user's overrides of the
    target. Raise AwsError where AWS can't be asked at all, but not where it refuses this question.
    """
    inventory.aws.account  # noqa: B018 (raises AwsError without credentials)
    given = [override for override in targets if not override.startswith("target=")]
    end_it = command("launch", "status", "--end", *given)
    try:
        for attempt, state in machines(inventory):
            _say(f"OVERDUE: {line(attempt, state)}; end it with: {end_it}")
    except AwsError as error:
        _say(f"whether a machine is past its limit is not known: {error}")


def end(inventory: Inventory) -> None:
    """End the machines past their limits. Raise AwsError."""
    for attempt, state in list(machines(inventory)):
        _say(f"OVERDUE: {line(attempt, state)}: ending it")
        base.of(attempt).stop_running(inventory.aws, attempt, state, at_once=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
