"""What costs money by the hour: machines and disks, whoever rented them."""

from dataclasses import dataclass
from datetime import datetime

from launch.cloud.prices import Price
from launch.targets.attempt import now, seconds_between


@dataclass(frozen=True)
class Rented:
    """Something that costs money by the hour as long as it exists."""

    kind: str
    name: str
    machines: str
    hours: float  # of all its machines
    dollars: float | None  # so far; None: no price known
    per_hour: float | None
    run: str | None


@dataclass(frozen=True)
class Machines:
    """Machines of one type that were rented at the same time."""

    instance_type: str
    since: datetime | None  # None: they have not begun
    count: int = 1
    spot: bool = False


def rented(
    kind: str, name: str, machines: Machines, price: Price, run: str | None = None
) -> Rented:
    """Return machines with their cost. price: of one machine."""
    hours = machines.count * seconds_between(machines.since, now()) / 3600
    text = f"{machines.count} x {machines.instance_type}"
    if machines.spot:
        text += " spot"
    hour = price.hour(machines.spot)
    if hour is None:
        return Rented(kind, name, text, hours, None, None, run)
    return Rented(kind, name, text, hours, hour * hours, hour * machines.count, run)
