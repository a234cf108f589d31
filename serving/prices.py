"""What serving costs: an estimate from prices written down here, for the decision before AWS is asked for anything. AWS's bill is what counts."""

from dataclasses import dataclass

AS_OF = "2026-11, us-east-1, on demand"
HOURS = 730  # in a month, as AWS counts

# US dollars an hour for a real-time endpoint's instance. Public price tables of 2024 to 2026, which differ a little; AWS's Price List is the source.
INSTANCES = {
    "ml.t2.medium": 0.056,
    "ml.m5.large": 0.115,
    "ml.m5.xlarge": 0.23,
    "ml.m5.2xlarge": 0.461,
    "ml.m5.4xlarge": 0.922,
    "ml.c5.large": 0.102,
    "ml.c5.xlarge": 0.204,
    "ml.c5.2xlarge": 0.408,
    "ml.c5.4xlarge": 0.816,
    "ml.g4dn.xlarge": 0.7364,
    "ml.g4dn.2xlarge": 0.94,
    "ml.g5.xlarge": 1.408,
}
WARM_GB_SECOND = 0.0000041667  # Lambda's provisioned concurrency, x86
GB_SECOND = 0.0000166667  # Lambda at work, x86
REQUEST = 0.20 / 1e6  # Lambda, one call
ALARM_MONTH = 0.10  # CloudWatch, one metric


@dataclass(frozen=True)
class Item:
    """One line of the bill. month: US dollars, or None where the price is not known."""

    what: str
    month: float | None


def instance(kind: str) -> float | None:
    """US dollars an hour, or None."""
    return INSTANCES.get(kind)


def instances(kind: str, count: int) -> Item:
    hour = instance(kind)
    return Item(f"{count} x {kind}" + (f" at ${hour:g} an hour" if hour else ""), None if hour is None else count * hour * HOURS)


def warm(count: int, megabytes: int) -> Item:
    """Lambda environments kept ready."""
    return Item(f"{count} x {megabytes} MB of Lambda kept warm", count * megabytes / 1024 * HOURS * 3600 * WARM_GB_SECOND)


def alarms(count: int) -> Item:
    return Item(f"{count} alarms", count * ALARM_MONTH)


def dollars(amount: float | None) -> str:
    return "unknown" if amount is None else f"${amount:,.2f}"
