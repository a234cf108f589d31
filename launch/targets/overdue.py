"""Machines past their time limit: they should have ended themselves, and cost money till ended."""

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
    """Return what is to be known of a machine past its limit."""
    spent = attempt.dollars(state)
    cost = "price unknown" if spent is None else f"{dollars(spent)} so far"
    if state.ends_by is not None:
        return f"run {attempt.run} on {state.id}: {state.detail}, {cost}"
    late = base.of(attempt).past_limit(attempt, state)
    return (
        f"run {attempt.run} on {state.id}, {late:.1f} h past its {attempt.hours:g} h limit, {cost}"
    )


def warn(inventory: Inventory, targets: Sequence[str]) -> None:
    """Say what is past its limit.

    It goes to standard error, since standard output may be a document. targets: the overrides of
    the target that were given. Raise AwsError where AWS can't be asked at all, but not where it
    doesn't answer this one question.
    """
    inventory.aws.account  # noqa: B018 (who can't be told this is told nothing)
    given = [override for override in targets if not override.startswith("target=")]
    end_it = command("launch", "status", "--end", *given)
    try:
        for attempt, state in machines(inventory):
            _say(f"OVERDUE: {line(attempt, state)}; end it with: {end_it}")
    except AwsError as error:
        _say(f"whether a machine is past its limit is not known: {error}")


def end(inventory: Inventory) -> None:
    """End what is past its limit. Raise AwsError."""
    for attempt, state in list(machines(inventory)):
        _say(f"OVERDUE: {line(attempt, state)}: it is ended")
        base.of(attempt).stop_running(inventory.aws, attempt, state, at_once=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
