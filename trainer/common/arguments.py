"""Types for argparse: numbers and paths, checked against their limits."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from trainer.common.errors import UserError
from trainer.common.paths import expanded

LARGEST = 100_000_000  # three years in seconds: more is a typing error


def positive(text: str) -> float:
    """Return a number above 0, to LARGEST. Raise ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text} is not allowed; allowed: a number above 0 and at most {LARGEST}"
        )
    return value


def whole(at_least: int = 1, at_most: int = LARGEST) -> Callable[[str], int]:
    """Return the argparse type of a whole number from `at_least` to `at_most`, inclusive."""
    allowed = f"a whole number, {at_least} to {at_most}"

    def read(text: str) -> int:
        mistake = argparse.ArgumentTypeError(f"{text} is not allowed; allowed: {allowed}")
        try:
            value = int(text)
        except ValueError as error:
            raise mistake from error
        if not at_least <= value <= at_most:
            raise mistake
        return value

    return read


def typed_path(text: str) -> Path:
    """Return a path with `~` and $NAME replaced. Raise ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; allowed: a path")
    try:
        return Path(expanded(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
