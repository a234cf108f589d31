"""`python -m launch stop`: ends a run after a checkpoint; the same submit goes on from it."""

from collections.abc import Sequence

from launch.targets.base import of
from launch.verbs.arguments import chosen, run_parser
from trainer.common.console import command, log
from trainer.common.errors import OK


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("stop", __doc__, "the newest")
    parser.add_argument(
        "--now",
        action="store_true",
        help="on EC2: terminate the machine without waiting for a checkpoint",
    )
    options = parser.parse_intermixed_args(arguments)
    aws, attempt = chosen(options.run)
    of(attempt).stop(aws, attempt, options.now)
    log.info("next:\n  %s", command("launch", "status"))
    return OK
