"""Numbers on a command line, held to their limits before anything is done with them.

Each is what argparse calls a type.
"""

import argparse
import math
from collections.abc import Callable


def positive(text: str) -> float:
    """Return a finite number above 0. Raise ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a number above 0")
    return value


def whole(at_least: int = 1, at_most: int | None = None) -> Callable[[str], int]:
    """Return the type of a whole number from `at_least` to `at_most`, both allowed."""
    allowed = f"a whole number, at least {at_least}"
    if at_most is not None:
        allowed = f"a whole number, {at_least} to {at_most}"

    def read(text: str) -> int:
        mistake = argparse.ArgumentTypeError(f"{text} is not allowed; allowed: {allowed}")
        try:
            value = int(text)
        except ValueError as error:
            raise mistake from error
        if value < at_least or (at_most is not None and value > at_most):
            raise mistake
        return value

    return read
