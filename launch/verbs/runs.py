"""`python -m launch runs`: the runs of this machine and those in the bucket, in one table.

Table and options are the trainer's (`python -m trainer.runs`). Without credentials it shows the
runs of this machine.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from trainer import runs
from trainer.common.console import log


def main(arguments: Sequence[str]) -> int:
    """Show what the command line names; return the exit code. Raise UserError for a bad target."""
    targets = [word for word in arguments if word.startswith(("target=", "target."))]
    rest = [word for word in arguments if word not in targets]
    return runs.main(rest, lambda: elsewhere(targets))


def elsewhere(targets: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the runs in the bucket for `trainer.runs`. If AWS denies it, print a line."""
    if find_spec("boto3") is None:
        return []
    # imported here: optional.
    from launch.verbs.overview import in_bucket

    told, missing = in_bucket(targets)
    if missing:
        log.warning("the runs in the bucket are not shown: %s", missing)
    return told
