"""`python -m launch prices`: dollars an hour, as plans reckon them."""

import argparse
from collections.abc import Sequence

from launch.cloud import prices
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
        help="ask AWS's Price List API for the region, and keep its answers in ~/.cache/packhorse",
    )
    options = parser.parse_intermixed_args(rest)
    if options.refresh:
        prices.refresh(aws_of(targets))
    table = prices.table()
    log.info("spot: %.0f %% of it, %s", 100 * table["spot_share"], table["spot_source"])
    for region in dict.fromkeys([*prices.shipped(), *prices.refreshed()]):
        for rates in prices.rates(region):
            log.info("%s, %s, %s", region, rates.date, rates.source)
            for name, hour in rates.hours.items():
                log.info("%-12s %-16s $%.4f an hour", region, name, hour)
    return OK
