"""What serving costs: an estimate from prices written down here, for the decision before AWS is asked for anything. AWS's bill is what counts."""

from dataclasses import dataclass

from launch.cloud.prices import price

HOURS = 730  # in a month, as AWS counts

# US dollars in us-east-1, from AWS's pages of November 2026; a machine's hour is in launch/cloud/prices.json.
WARM_GB_SECOND = 0.0000041667  # Lambda's provisioned concurrency, x86
GB_SECOND = 0.0000166667  # Lambda at work, x86
REQUEST = 0.20 / 1e6  # Lambda, one call
ALARM_MONTH = 0.10  # CloudWatch, one metric


@dataclass(frozen=True)
class Item:
    """One line of the bill. month: US dollars, or None where the price is not known."""

    what: str
    month: float | None


def instances(kind: str, count: int, region: str) -> Item:
    """Instances of a real-time endpoint; AWS asks the same for them as for training on them."""
    hour = price(kind, region).on_demand
    return Item(
        f"{count} x {kind}" + (f" at ${hour:g} an hour" if hour else ""),
        None if hour is None else count * hour * HOURS,
    )


def warm(count: int, megabytes: int) -> Item:
    """Lambda environments kept ready."""
    return Item(
        f"{count} x {megabytes} MB of Lambda kept warm",
        count * megabytes / 1024 * HOURS * 3600 * WARM_GB_SECOND,
    )


def alarms(count: int) -> Item:
    return Item(f"{count} alarms", count * ALARM_MONTH)


def dollars(amount: float | None) -> str:
    return "unknown" if amount is None else f"${amount:,.2f}"
