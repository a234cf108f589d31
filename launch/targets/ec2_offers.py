"""Which instance types to ask EC2 for, in which zones, and at which maximum price."""

import re
from datetime import datetime
from math import ceil, inf

from launch.cloud.remedies import DENIED
from launch.cloud.session import Aws, AwsError
from launch.targets.attempt import (
    now,
)
from launch.targets.base import Spec
from launch.targets.ec2_request import settings_of
from launch.targets.instance_types import names_in

HEADROOM = 1.25  # the maximum spot price as a multiple of EC2's price at the request


def zones_of(aws: Aws | None, spec: Spec) -> dict[str, list[str | None]]:
    """Return the zones in which to ask for each instance type, in order.

    None stands for AWS's choice. It comes first, unless target.zones gives zones; it is the only
    one where a subnet is given, or where AWS can't or may not be asked. Raise AwsError.
    """
    target = settings_of(spec)
    names = spec.instance_types
    if target.subnet is not None:
        return {name: [None] for name in names}
    given: list[str | None] = [*names_in(target.zones)] or [None]
    if aws is None:
        return {name: list(given) for name in names}
    try:
        listed = list(
            aws.pages(
                "ec2",
                "DescribeInstanceTypeOfferings",
                "InstanceTypeOfferings",
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": names}],
            )
        )
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return {name: list(given) for name in names}
    made: dict[str, list[str | None]] = {}
    for offering in sorted(listed, key=lambda each: str(each["Location"])):
        made.setdefault(offering["InstanceType"], []).append(offering["Location"])
    wanted = names_in(target.zones)
    if wanted:
        return {name: [zone for zone in wanted if zone in made.get(name, [])] for name in names}
    return {name: [None, *made[name]] for name in names if name in made}


def by_price(zones: list[str | None], prices: dict[str, float]) -> list[str | None]:
    """Return the zones of an instance type, the cheapest for spot first, unless the user gave them.

    Where prices are known, AWS's choice (None) is left out: it may be a zone with dear spot
    machines.
    """
    named = [zone for zone in zones if zone is not None]
    if not prices or not named or None not in zones:
        return zones
    return [*sorted(named, key=lambda zone: prices.get(zone, inf))]


def spot_prices(
    aws: Aws,
    instance_type: str,
    zone: str | None = None,
    between: tuple[datetime | None, datetime | None] = (None, None),
) -> dict[str, float]:
    """Return the highest spot price by zone, in dollars per hour; {} where the call is denied.

    zone: None for all. between: a beginning and an end; None is now. Raise AwsError.
    """
    begin, end = (each or now() for each in between)
    where = {"AvailabilityZone": zone} if zone else {}
    try:
        history = aws.pages(
            "ec2",
            "DescribeSpotPriceHistory",
            "SpotPriceHistory",
            InstanceTypes=[instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=begin,
            EndTime=end,
            **where,
        )
        highest: dict[str, float] = {}
        for entry in history:
            name, price = entry["AvailabilityZone"], float(entry["SpotPrice"])
            highest[name] = max(price, highest.get(name, 0.0))
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return {}
    return highest


def price_in(zone: str | None, prices: dict[str, float]) -> float | None:
    """Return the price in a zone, for AWS's choice (None) the highest; None: not known."""
    return prices.get(zone) if zone else max(prices.values(), default=None)


def highest_bid(asked_now: float | None) -> float | None:
    """Return the maximum price to bid for a spot machine, in dollars per hour.

    It is HEADROOM times the price now; when the price rises above it, EC2 takes the machine back.
    None, which means the on-demand price, where the price now is not known.
    """
    if asked_now is None:
        return None
    return ceil(asked_now * HEADROOM * 1e4) / 1e4


def spot_scores(aws: Aws, spec: Spec) -> dict[str, int]:
    """Return how likely a spot request succeeds now, from 1 to 10, by zone. Raise AwsError."""
    answer = aws.call(
        "ec2",
        "GetSpotPlacementScores",
        InstanceTypes=spec.instance_types,
        TargetCapacity=spec.instances,
        SingleAvailabilityZone=True,
        RegionNames=[aws.region],
    )
    scores = {
        str(each.get("AvailabilityZoneId") or each["Region"]): int(each["Score"])
        for each in answer["SpotPlacementScores"]
    }
    return dict(sorted(scores.items(), key=lambda item: -item[1])[:3])
