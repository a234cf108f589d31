"""What a run may cost at most, over all its attempts, and what of that is left.

A ceiling is kept by what can't forget it: the machine's own deadline, SageMaker's MaxRuntime, and
for spare capacity the highest price that EC2 may bill.
"""

import dataclasses
from dataclasses import dataclass

from launch.cloud.prices import HOURS_A_MONTH, S3_GB_MONTH, Price
from launch.cloud.session import Aws
from launch.targets import attempt as notes
from launch.targets.attempt import Attempt, Phase, State, now, seconds_between
from launch.targets.base import Spec, of
from trainer.common.errors import UserError
from trainer.common.text import dollars

# Seconds of an attempt that AWS bills and that its own limit doesn't count: before its script or
# container starts, and while it shuts down, in whole minutes.
AROUND = 300
LEAST = 600  # seconds: a machine for less is not worth its start
EXPIRES = 48  # hours at most that S3 keeps an old version of an object (foundation.yaml)


@dataclass(frozen=True)
class Ceiling:
    """Dollars: what a run may cost at most, and has cost at most so far."""

    dollars: float
    spent: float


@dataclass(frozen=True)
class Stored:
    """All versions of what a run has in the bucket."""

    size: int  # bytes
    so_far: float  # dollars
    a_month: float  # dollars


def stored(aws: Aws, run: str) -> Stored:
    """Return what lies below runs/RUN/, old versions too, and what S3 takes for it.

    Each version is reckoned as kept from when it was written until now. Raise AwsError.
    """
    where = {"Bucket": aws.bucket, "Prefix": f"runs/{run}/"}
    size, gb_hours = 0, 0.0
    for version in aws.pages("s3", "ListObjectVersions", "Versions", **where):
        size += version["Size"]
        gb_hours += version["Size"] / 1e9 * seconds_between(version["LastModified"], now()) / 3600
    hour = S3_GB_MONTH / HOURS_A_MONTH
    return Stored(size, gb_hours * hour, size / 1e9 * S3_GB_MONTH)


def of_run(spec: Spec, price: Price, trials: int) -> float | None:
    """Return the ceiling: target.max_dollars, else the price of the time limit on demand.

    None where there is no price for it. price: of one machine, as the spec buys it. trials: the
    jobs that it may become.
    """
    if spec.max_dollars is not None:
        return spec.max_dollars
    hour = price.hour_at_most()
    if hour is None:
        return None
    return hour * spec.instances * trials * (spec.target.hours + AROUND / 3600)


def at_most(aws: Aws, attempt: Attempt, state: State) -> float:
    """Return the dollars that an attempt has cost at most, or will before its limit ends it.

    An end that neither AWS nor the machine told is reckoned as late as its limit: where the script
    has died, a machine goes on in silence until then.

    Raise AwsError.
    """
    if attempt.per_hour is None or state.phase is Phase.ABSENT:
        return 0.0
    # One of several machines that never came keeps others waiting that did.
    if state.phase is Phase.NO_CAPACITY and not state.machine_seconds:
        return 0.0
    if (state.ended is not None and state.is_sure) or state.discounted:
        machine_hours = state.machine_seconds / 3600 + attempt.instances * 60 / 3600
    else:
        machine_hours = attempt.instances * (attempt.hours + AROUND / 3600)
    return of(attempt).hour_at_most(aws, attempt, state) * machine_hours


def spent(aws: Aws, run: str) -> float:
    """Return the dollars that a run has cost at most, with what S3 keeps. Raise AwsError."""
    tried = [(each, of(each).observe(aws, each)) for each in notes.attempts(aws, run)]
    kept = stored(aws, run)
    storage = kept.so_far + kept.a_month * EXPIRES / HOURS_A_MONTH  # until old versions expire
    return storage + sum(at_most(aws, attempt, state) for attempt, state in tried)


def limited(spec: Spec, price: Price, ceiling: Ceiling, trials: int) -> Spec:
    """Return the spec with the hours that are left below the ceiling, of all its jobs together.

    price: of one machine, as the spec buys it. Raise UserError where that is too little for another
    machine.
    """
    hour = price.hour_at_most(spec.bid)
    assert hour is not None
    paid = (ceiling.dollars - ceiling.spent) / (hour * spec.instances) - trials * AROUND / 3600
    least = min(LEAST / 3600, spec.target.hours)
    if paid < least - 1e-6:
        left = dollars(max(0.0, ceiling.dollars - ceiling.spent))
        raise UserError(
            f"{spec.run}: {left} is left of its ceiling of {dollars(ceiling.dollars)}, too little "
            f"for {least * 60:.0f} minutes of {spec.target.instance_type} at ${hour:.4f} an hour: "
            f"nothing is sent; target.max_dollars={_more(ceiling, hour * spec.instances, spec)} "
            "is a higher one"
        )
    # In whole minutes, so that cents of storage don't make another request of the same one.
    if paid >= spec.target.hours * trials - 1e-6:
        return dataclasses.replace(spec, paid_hours=None)
    return dataclasses.replace(spec, paid_hours=max(least, int(paid * 60) / 60))


def _more(ceiling: Ceiling, hour: float, spec: Spec) -> str:
    """Return a ceiling that allows the time limit once more."""
    return f"{ceiling.spent + hour * (spec.target.hours + AROUND / 3600):.2f}"
