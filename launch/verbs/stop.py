"""`python -m launch stop`: end a run after a checkpoint; the same submit continues from it."""

from collections.abc import Sequence

from launch.targets.attempt import Noted, Phase
from launch.targets.base import of
from launch.targets.inventory import Inventory
from launch.targets.spec import choose
from launch.verbs.arguments import account_of, run_parser
from trainer.common.console import command, log
from trainer.common.errors import OK


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("stop", __doc__, "the one that is going")
    parser.add_argument(
        "--now",
        action="store_true",
        help="on EC2: terminate the machine without waiting for a checkpoint",
    )
    options = parser.parse_intermixed_args(arguments)
    aws = account_of(options.run)

    inventory = Inventory(aws)

    def is_going(noted: Noted) -> bool:
        kind = of(noted.attempt)
        state = kind.listed(inventory, noted) or kind.observe(aws, noted.attempt)
        return state.phase in (Phase.RUNNING, Phase.ABSENT)

    attempt = choose(aws, options.run, is_going)
    of(attempt).stop(aws, attempt, options.now)
    log.info("next:\n  %s", command("launch", "status"))
    return OK
