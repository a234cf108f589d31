"""`python -m launch logs`: show a run's output.

From CloudWatch for SageMaker, from the bucket for EC2.
"""

from collections.abc import Sequence

from launch.following import follow
from launch.targets.base import of
from launch.verbs.arguments import add_every, chosen, run_parser
from trainer.common.console import log
from trainer.common.errors import OK

CONSOLE_LINES = 60  # the last of a machine that could not reach the bucket


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("logs", __doc__, "the newest")
    parser.add_argument(
        "--follow", "-f", action="store_true", help="keep showing lines until the run ends"
    )
    add_every(parser, 10, "with --follow: how often to look")
    options = parser.parse_intermixed_args(arguments)
    aws, attempt = chosen(options.run)
    if options.follow:
        state = follow(aws, attempt, options.every, while_read=True)
    else:
        for line in of(attempt).log_reader(aws, attempt)():
            print(line)
        state = of(attempt).observe(aws, attempt)
    for line in of(attempt).last_words(aws, attempt, state).splitlines()[-CONSOLE_LINES:]:
        print(f"console: {line}")
    log.info(attempt.told(state))
    return OK
