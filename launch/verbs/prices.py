"""`python -m launch prices`: the prices an hour that plans use."""

import argparse
from collections.abc import Sequence

from launch.cloud import prices
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m launch prices", description="Shows the prices an hour that plans use."
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
    sources: dict[tuple[str, str], None] = {}
    for region, listed in prices.rates().items():
        for name, rate in listed.items():
            log.info("%-12s %-16s $%.4f an hour, %s", region, name, rate.hour, rate.date)
            sources[rate.date, rate.source] = None
    for date, source in sources:
        log.info("%s: %s", date, source)
    log.info("spot: %.0f %% of it, %s", 100 * table["spot_share"], table["spot_source"])
    return OK
