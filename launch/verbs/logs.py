"""`python -m launch logs`: what a run prints, as it prints it: from CloudWatch for SageMaker, from the bucket for EC2."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from launch.cloud import s3
from launch.cloud.logs import NOTEBOOK_GROUP, TRAINING_GROUP, LogReader
from launch.cloud.session import Aws
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase, State
from launch.targets.spec import aws_of, split_overrides
from trainer.common import streams
from trainer.common.console import log
from trainer.common.errors import OK


def reader(aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
    """A function that returns the lines that came since its last call."""
    return (
        _bucket_reader(aws, attempt)
        if attempt.target == "ec2"
        else _cloudwatch_reader(aws, attempt)
    )


def _bucket_reader(aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
    shown = 0

    def read() -> list[str]:
        nonlocal shown
        found = s3.read(aws, f"runs/{attempt.run}/log.txt")
        text = found[0].decode(errors="replace") if found else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be half written
        fresh, shown = whole[shown:], max(shown, len(whole))
        return fresh.splitlines()

    return read


def _cloudwatch_reader(aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
    group = NOTEBOOK_GROUP if attempt.target == "notebook" else TRAINING_GROUP
    # Streams are JOB/HOST; the trials of a tuning job are named JOB-NUMBER-HASH.
    prefix = f"{attempt.job}-" if attempt.target == "tuner" else f"{attempt.job}/"
    several = attempt.target == "tuner" or attempt.instances > 1
    log_reader = LogReader(aws, group, prefix)

    def read() -> list[str]:
        if not several:
            return [event["message"] for event in log_reader.read()]
        return [
            f"{event['logStreamName'].removeprefix(prefix)}: {event['message']}"
            for event in log_reader.read()
        ]

    return read


def follow(
    aws: Aws, attempt: Attempt, every: float, end_overdue: bool = False, while_read: bool = False
) -> State:
    """Prints the log until the attempt has ended; returns how. Raises AwsError.

    every: seconds between two looks. end_overdue: terminates a machine that runs past its limit. while_read: ends too
    when nobody reads what is printed.
    """
    read = reader(aws, attempt)
    told = ""
    while True:
        state = runs.observe(
            aws, attempt
        )  # before the log: what was written until the end is then read too
        for line in read():
            print(line, flush=True)
        if state.phase not in (Phase.RUNNING, Phase.ABSENT):
            return state
        if while_read and streams.gone(sys.stdout):
            return state
        if end_overdue and runs.overdue(attempt, state):
            log.warning("OVERDUE: %s: it is ended", overdue.line(attempt, state))
            runs.terminate(aws, attempt, str(state.id))
        if state.detail != told:
            told = state.detail
            log.info("[%s: %s]", attempt.job, told)
        time.sleep(every)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch logs", description=__doc__)
    parser.add_argument(
        "run",
        nargs="*",
        help="the run's id, or the overrides it was submitted with; none: the newest",
    )
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run ends")
    parser.add_argument(
        "--every",
        type=float,
        default=10,
        metavar="SECONDS",
        help="with --follow: how often to look (default 10)",
    )
    options = parser.parse_intermixed_args(arguments)
    targets = split_overrides(options.run)[0]
    aws = aws_of(targets)
    overdue.warn(aws, targets)
    attempt = runs.choose(aws, options.run)
    if options.follow:
        state = follow(aws, attempt, options.every, while_read=True)
    else:
        for line in reader(aws, attempt)():
            print(line)
        state = runs.observe(aws, attempt)
    log.info("attempt %d at %s is %s (%s)", attempt.number, attempt.run, state.phase, state.detail)
    return OK
