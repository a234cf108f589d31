"""What a run prints, as it prints it, until it ends."""

import sys
import time

from launch.cloud.session import Aws
from launch.targets import base, overdue
from launch.targets.attempt import Attempt, Phase, State
from trainer.common import streams
from trainer.common.console import log


def follow(
    aws: Aws, attempt: Attempt, every: float, end_overdue: bool = False, while_read: bool = False
) -> State:
    """Print the log until the attempt has ended; return how. Raise AwsError.

    every: seconds between two looks. end_overdue: ends a machine that runs past its limit.
    while_read: ends too when nobody reads what is printed.
    """
    kind = base.of(attempt)
    read = kind.log_reader(aws, attempt)
    told = ""
    while True:
        state = kind.observe(aws, attempt)  # before the log, which is then read to its end
        for line in read():
            print(line, flush=True)
        if state.phase not in (Phase.RUNNING, Phase.ABSENT):
            return state
        if while_read and streams.gone(sys.stdout):
            return state
        if end_overdue and kind.past_limit(attempt, state):
            log.warning("OVERDUE: %s: it is ended", overdue.line(attempt, state))
            kind.stop_running(aws, attempt, state, at_once=True)
        if state.detail != told:
            told = state.detail
            log.info("[%s: %s]", attempt.job, told)
        time.sleep(every)
