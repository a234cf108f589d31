"""What an hour costs: a dated table in this project (prices.json), and AWS's Price List API to renew it. Every figure is an estimate and says so."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from launch.cloud.session import Aws
from trainer.common import files
from trainer.common.errors import UserError

TABLE = Path(__file__).with_name("prices.json")
FALLBACK = "us-east-1"  # the region that stands for those not in the table
PRICE_LIST_REGION = "us-east-1"  # where the Price List API answers for all regions

# The Price List's filters for Linux by the hour, without anything on top.
EC2_FILTERS = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
    "marketoption": "OnDemand",
}


@dataclass(frozen=True)
class Price:
    """Dollars an hour of one machine. It is what the machine costs: disk, S3 and traffic come on top (cents)."""

    instance_type: str
    on_demand: float | None  # None: not in the table
    spot: float | None
    basis: str  # date, region and source of the figures


@cache
def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def price(instance_type: str, region: str) -> Price:
    regions: dict[str, dict[str, float]] = table()["regions"]
    listed = region if instance_type in regions.get(region, {}) else FALLBACK
    hour = regions[listed].get(instance_type)
    basis = f"estimate of {table()['date']} for {listed}" + (
        "" if listed == region else f" ({region} is not in the table)"
    )
    return Price(
        instance_type,
        hour,
        None if hour is None else hour * float(table()["spot_share"]),
        f"{basis}; {table()['source']}",
    )


def refresh(aws: Aws) -> dict[str, float]:
    """Asks AWS for the region's prices of every machine in the table and writes them into it. Raises UserError, AwsError."""
    wanted = {name for prices in table()["regions"].values() for name in prices}
    found = {name: hour for name in sorted(wanted) if (hour := _ask(aws, name)) is not None}
    if not found:
        raise UserError(
            f"the Price List knows none of {', '.join(sorted(wanted))} in {aws.region}; check target.region"
        )
    today = datetime.now(UTC).date().isoformat()
    renewed = table() | {
        "date": today,
        "source": "AWS Price List API",
        "regions": {aws.region: found},
    }
    files.write(TABLE, json.dumps(renewed, indent=2) + "\n")
    table.cache_clear()
    return found


def _ask(aws: Aws, instance_type: str) -> float | None:
    """Dollars an hour on demand by the Price List; None where it has none."""
    wanted = {"regionCode": aws.region}
    if instance_type.startswith("ml."):
        service = "AmazonSageMaker"
        wanted |= {
            "instanceName": instance_type,
            "component": "Notebook" if instance_type.startswith("ml.t") else "Training",
        }
    else:
        service = "AmazonEC2"
        wanted |= {"instanceType": instance_type} | EC2_FILTERS
    filters = [
        {"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()
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
