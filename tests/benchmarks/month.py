"""A thousand runs of a month, in a model of AWS (tests/launch/month.py): what they cost, and how
they end.
"""

from pathlib import Path
from typing import Any

from tests.benchmarks.table import Row, Table
from tests.launch.month import month

TITLE = "A month of runs"
SEEDS = (0, 1)
NOTE = """1,000 runs on EC2 for each seed, of 14 minutes to 9 hours of work, begun within 20 days of
a month, on g4dn.xlarge, g6.xlarge or g5.xlarge, spot, `spot=auto` or on demand, two of three with a
ceiling of their own ($0.50 to $8). Reclaims (with a notice in 4 of 5), missing capacity by kind,
zone and hour, quotas granted later, outages of AWS and of the way there (also in the middle of
RunInstances), reboots, machines that hang, whose script dies or that break, a second submit between
any two calls of the first, and laptops that die at any call or hour. It is the product's own code
in a model of AWS with a clock of its own; only the machine's script and the people are modelled
([how](../tests/launch/month.py)). The bill is reckoned as AWS does: by the second, at the spot
price of each hour, with disks, addresses and what S3 keeps. A machine boots in 20 to 50 s. "Could
have paid": in hindsight the real bill had left enough for the rest of the work, though the highest
price that may be billed had not."""


def measure(scratch: Path, rounds: int) -> Table:
    """Play the months; scratch and rounds are not needed."""
    figures = [month(1000, seed).figures() for seed in SEEDS]

    def row(name: str, target: str = "", met: bool | None = None) -> Row:
        return Row(name, tuple(shown(each[name]) for each in figures), target, met)

    none_above = all(each["above their ceiling"] == 0 for each in figures)
    none_left = all(each["machines left"] == 0 for each in figures)
    alone = all(each["longest time of two machines"] <= 60 for each in figures)
    ended = all(each["otherwise"] == 0 for each in figures)
    rows = [
        row("complete"),
        row("ended by their ceiling"),
        row("of these it could have paid for"),
        row("otherwise", "0", ended),
        row("above their ceiling", "0", none_above),
        row("largest share of a ceiling"),
        row("machines"),
        row("machines left", "0", none_left),
        row("longest time of two machines", "60 s", alone),
        row("longest time of two that work"),
        row("reclaims"),
        row("refusals"),
        row("calls without an answer"),
        row("dead laptops"),
        row("twins"),
    ]
    return Table(TITLE, NOTE, tuple(f"seed {seed}" for seed in SEEDS), rows)


def shown(value: Any) -> str:
    """A figure: seconds and shares in two digits."""
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
