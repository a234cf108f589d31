"""`python -m launch delete`: deletes the notebook, with its disk, after asking."""

from collections.abc import Sequence

from launch.cloud.confirm import confirmed
from launch.targets.base import of
from launch.verbs.arguments import add_every, chosen, run_parser
from trainer.common.console import log
from trainer.common.errors import OK


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("delete", __doc__, "the newest run")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_every(parser, 5, "how often to look whether it has stopped")
    options = parser.parse_intermixed_args(arguments)
    aws, attempt = chosen(options.run)
    what = of(attempt).deletes(attempt)
    if not confirmed(f"Delete {what}?", options.yes):
        log.info("nothing was changed")
        return OK
    of(attempt).delete(aws, attempt, options.every)
    return OK
