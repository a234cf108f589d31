"""Prices of an hour: a dated table that ships (prices.json), and AWS's answers since then.

Every figure is an estimate and gives its date, region and source. Only AWS's bill counts.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common import files
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.common.paths import user_cache

if TYPE_CHECKING:  # estimates alone need no boto3
    from launch.cloud.session import Aws

TABLE = Path(__file__).with_name("prices.json")
REFRESHED = user_cache() / "prices.json"
FALLBACK = "us-east-1"  # the region that stands for those not in the table
PRICE_LIST_REGION = "us-east-1"  # where the Price List API answers for all regions

# US dollars in us-east-1 for everything but machines, from AWS's pages of November 2026 (/lambda,
# /cloudwatch, /ebs and /vpc pricing).
PROVISIONED_GB_SECOND = 0.0000041667  # Lambda's provisioned concurrency, x86
SNAPSHOT_GB_SECOND = 0.0000015046  # to keep a SnapStart snapshot (Python)
ALARM_MONTH = 0.10  # CloudWatch, one metric
GP3_GB_MONTH = 0.08
ML_GB_MONTH = 0.14  # SageMaker's disks for training (/sagemaker/pricing)
S3_GB_MONTH = 0.023  # S3 Standard
ADDRESS_HOUR = 0.005
HOURS_A_MONTH = 730  # as AWS counts
# From other sites' pages of this month: AWS's own page could not be read.
BUILD_DATE = "2026-05"
BUILD_MINUTE = 0.005  # CodeBuild, general1.small on Linux
ECR_GB_MONTH = 0.10

# The Price List's filters for Linux by the hour, without further software.
EC2_FILTERS = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
    "marketoption": "OnDemand",
}


@dataclass(frozen=True)
class Price:
    """Dollars per hour of one machine, with its disk and address. S3 and traffic are extra."""

    instance_type: str
    on_demand: float | None  # None: not known
    spot: float | None  # AWS's price now, else the usual share of the on-demand price
    basis: str  # date, region and source of the figures
    parts: float = 0.0  # the disk and address

    def hour(self, spot: bool) -> float | None:
        """Return what an hour will probably cost, with its parts; None: not known."""
        machine = self.spot if spot else self.on_demand
        return None if machine is None else machine + self.parts

    def hour_at_most(self, bid: float | None = None) -> float | None:
        """Return what an hour costs at most, with its parts; None: not known.

        bid: the maximum price of a spot machine; None: for one on demand.
        """
        if self.on_demand is None:
            return None
        machine = self.on_demand if bid is None else min(self.on_demand, bid)
        return machine + self.parts


@dataclass(frozen=True)
class Rate:
    """Dollars per hour, with the date and the source."""

    hour: float | None
    date: str
    source: str


@cache
def table() -> dict[str, Any]:
    """Return the table that ships."""
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def rates() -> dict[str, dict[str, Rate]]:
    """Return the known rates by region and instance type: refreshed ones, else those that ship."""
    merged: dict[str, dict[str, Rate]] = {}
    for regions in (table()["regions"], _refreshed()):
        for region, each in regions.items():
            listed = {
                name: Rate(hour, each["date"], each["source"])
                for name, hour in each["hours"].items()
            }
            merged.setdefault(region, {}).update(listed)
    return merged


def _refreshed() -> dict[str, Any]:
    """Return the regions of REFRESHED; {} for a missing or damaged file."""
    try:
        regions: dict[str, Any] = json.loads(REFRESHED.read_text())["regions"]
        for each in regions.values():
            dict(each["hours"], date=each["date"], source=each["source"])
        return regions
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: can't be read (%s); python -m launch prices --refresh", REFRESHED, error)
        return {}


def price(instance_type: str, region: str) -> Price:
    """Return the price of an instance type in a region, else in the fallback region."""
    known = rates()
    listed = region if instance_type in known.get(region, {}) else FALLBACK
    ships = table()["regions"][FALLBACK]
    unknown = Rate(None, ships["date"], ships["source"])
    rate = known[listed].get(instance_type, unknown)
    basis = f"estimate of {rate.date} for {listed}"
    if listed != region:
        basis += f" ({region} is not in the table)"
    spot = None if rate.hour is None else rate.hour * float(table()["spot_share"])
    return Price(instance_type, rate.hour, spot, f"{basis}; {rate.source}")


def asked(aws: "Aws", instance_type: str) -> Price:
    """Return the price in AWS's Price List now; where that fails, what `price` returns.

    The Price List may be denied or out of reach; no run stops for that.
    """
    known = price(instance_type, aws.region)
    if aws.partition != "aws":  # PRICE_LIST_REGION is not in any other partition
        return known
    try:
        hour = _ask(aws, instance_type)
    except UserError:
        hour = None
    if hour is None:
        return known
    spot = hour * float(table()["spot_share"])
    basis = f"AWS Price List API for {aws.region}, {datetime.now(UTC).date()}"
    return Price(instance_type, hour, spot, f"estimate by {basis}")


def instance_types() -> list[str]:
    """Return the instance types that have a price somewhere."""
    return sorted({name for listed in rates().values() for name in listed})


def refresh(aws: "Aws") -> None:
    """Ask AWS for the region's price of every machine, and save the answers in REFRESHED.

    Prices of other regions stay as they are. Raise UserError, AwsError.
    """
    names = instance_types()
    asked = {name: _ask(aws, name) for name in names}
    hours = {name: hour for name, hour in asked.items() if hour is not None}
    if not hours:
        raise UserError(
            f"the Price List knows none of {', '.join(names)} in {aws.region}; check target.region"
        )
    today = datetime.now(UTC).date().isoformat()
    answer = {"date": today, "source": "AWS Price List API", "hours": hours}
    regions = _refreshed() | {aws.region: answer}
    REFRESHED.parent.mkdir(parents=True, exist_ok=True)
    files.write(REFRESHED, json.dumps({"regions": regions}, indent=2) + "\n")


def _ask(aws: "Aws", instance_type: str) -> float | None:
    """Return dollars per hour on demand by the Price List; None where it has no such price."""
    terms = {"regionCode": aws.region}
    if instance_type.startswith("ml."):
        service = "AmazonSageMaker"
        component = "Notebook" if instance_type.startswith("ml.t") else "Training"
        terms |= {"instanceName": instance_type, "component": component}
    else:
        service = "AmazonEC2"
        terms |= {"instanceType": instance_type} | EC2_FILTERS
    filters = [
        {"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in terms.items()
    ]
    answer = aws.call(
        "pricing", "GetProducts", region=PRICE_LIST_REGION, ServiceCode=service, Filters=filters
    )
    hours = [
        float(dimension["pricePerUnit"]["USD"])
        for product in answer["PriceList"]
        for term in json.loads(product)["terms"].get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
        if dimension["unit"].lower() in ("hrs", "hours", "hour")
    ]
    return min((hour for hour in hours if hour > 0), default=None)
