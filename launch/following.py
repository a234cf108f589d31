"""What a run prints, as it prints it, until it ends."""

import sys
import time
from functools import partial

from launch.cloud.session import Aws
from launch.patience import Patience
from launch.targets import base, overdue
from launch.targets.attempt import Attempt, Phase, State
from trainer.common import streams
from trainer.common.console import log


def follow(
    aws: Aws, attempt: Attempt, every: float, end_overdue: bool = False, while_read: bool = False
) -> State:
    """Print the log until the attempt has ended; return how. Raise AwsError.

    An outage of AWS, or of the way there, is waited out. every: seconds between two looks.
    end_overdue: ends a machine that runs past its limit. while_read: ends too when nobody reads
    what is printed.
    """
    kind = base.of(attempt)
    read = kind.log_reader(aws, attempt)
    patience = Patience(aws, every, runs_on(attempt))
    told = ""
    ran = False  # whether it was seen running

    def look() -> tuple[State, list[str]]:
        state = kind.observe(aws, attempt)  # before the log, which is then read to its end
        return state, read()

    while True:
        state, lines = patience.ask(look)
        has_ended = state.phase not in (Phase.RUNNING, Phase.ABSENT)
        if has_ended and ran and kind.logs_late:
            time.sleep(every)
            lines += patience.ask(read)
        for line in lines:
            print(line, flush=True)
        if has_ended:
            return state
        ran = True
        if while_read and streams.gone(sys.stdout):
            return state
        if end_overdue and kind.past_limit(attempt, state):
            log.warning("OVERDUE: %s: ending it", overdue.line(attempt, state))
            patience.ask(partial(kind.stop_running, aws, attempt, state, at_once=True))
        if state.detail != told:
            told = state.detail
            log.info("[%s: %s]", attempt.job, told)
        time.sleep(every)


def runs_on(attempt: Attempt) -> str:
    """Return what goes on at AWS while it can't be asked."""
    machine = attempt.id or attempt.job
    return f"{attempt.run} keeps running without us on {machine}, for {attempt.hours:.3g} h at most"
