"""What the verbs for one run are all asked for: which run."""

import argparse
from collections.abc import Sequence

from launch.cloud.session import Aws
from launch.targets import overdue
from launch.targets.attempt import Attempt
from launch.targets.inventory import Inventory
from launch.targets.spec import aws_of, choose, split_overrides
from trainer.common.arguments import positive


def run_parser(verb: str, description: str | None, none: str) -> argparse.ArgumentParser:
    """Return a parser of the words for a run. none: what is meant where there are none."""
    parser = argparse.ArgumentParser(prog=f"python -m launch {verb}", description=description)
    parser.add_argument(
        "run",
        nargs="*",
        help=f"the run's id, or the overrides it was submitted with; none: {none}",
    )
    return parser


def add_every(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    """Add --every, the seconds between two looks at AWS. what: what is looked at."""
    parser.add_argument(
        "--every",
        type=positive,
        default=default,
        metavar="SECONDS",
        help=f"{what} (default {default:g})",
    )


def account_of(words: Sequence[str]) -> Aws:
    """Return the account that the words for a run name, after what is past its limit there."""
    targets = split_overrides(words)[0]
    aws = aws_of(targets)
    overdue.warn(Inventory(aws), targets)
    return aws


def chosen(words: Sequence[str]) -> tuple[Aws, Attempt]:
    """Return the account, and the newest attempt at the run that the words name."""
    aws = account_of(words)
    return aws, choose(aws, words)
