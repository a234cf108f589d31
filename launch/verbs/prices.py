"""`python -m launch prices`: dollars an hour, as plans reckon them."""

import argparse
from collections.abc import Sequence

from launch.cloud.prices import refresh, table
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m launch prices", description="Dollars an hour, as Packhorse reckons them."
    )
    parser.add_argument(
        "--refresh",
        action="store_true",
        help="ask AWS's Price List API, and write launch/cloud/prices.json",
    )
    options = parser.parse_intermixed_args(rest)
    if options.refresh:
        refresh(aws_of(targets))
    log.info(
        "%s, %s\nspot: %.0f %% of it, %s",
        table()["date"],
        table()["source"],
        100 * table()["spot_share"],
        table()["spot_source"],
    )
    for region, hours in table()["regions"].items():
        for name, hour in hours.items():
            log.info("%-12s %-16s $%.4f an hour", region, name, hour)
    return OK
