"""What can be known before a submit, asked of AWS read-only; any question may go unanswered."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime

from launch.cloud.session import Aws, AwsError
from launch.planning import Plan
from launch.targets.attempt import now
from launch.targets.questions import Answer, Question

# AWS refuses what is signed by a clock that is wrong by more than 15 minutes (5 for some services).
CLOCK = timedelta(minutes=4)


@dataclass(frozen=True)
class Readiness:
    """What is known, a line for each question, and what would stop the run, with its remedy."""

    known: list[tuple[str, str]]
    missing: list[str]


def ask(aws: Aws, plan: Plan) -> Readiness:
    """Ask AWS what a plan's target needs to know, all at once.

    What the user may not ask, or AWS doesn't answer in time, is said as not known.
    """
    questions = [*plan.spec.kind.questions(plan.spec), Question("clock", clock)]
    hurried = aws.hurried()
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda each: _answer(hurried, each.ask), questions))
    known = [(each.about, answer.line) for each, answer in zip(questions, answers, strict=True)]
    return Readiness(
        [entry for entry in known if entry[1]],
        [answer.missing for answer in answers if answer.missing is not None],
    )


def clock(aws: Aws) -> Answer:
    """Return how far this machine's clock is from AWS's. Raise AwsError."""
    before = time.monotonic()
    answer = aws.call("sts", "GetCallerIdentity")
    said = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    if not said:
        return Answer("")
    late = timedelta(seconds=time.monotonic() - before)
    off = abs(now() - parsedate_to_datetime(said))
    if off < CLOCK + late:
        return Answer("")
    minutes = round(off.total_seconds() / 60)
    return Answer(
        f"{minutes} minutes off",
        f"the right time: this machine's clock is {minutes} minutes off, so AWS refuses its "
        "requests; set it (sudo ntpdate -u pool.ntp.org)",
    )


def lines(readiness: Readiness) -> Sequence[str]:
    """Return what is known, as a plan shows it."""
    return [f"{about:<9} {line}" for about, line in readiness.known]


def _answer(aws: Aws, question: Callable[[Aws], Answer]) -> Answer:
    try:
        return question(aws)
    except AwsError as error:
        action = str(error).split(": ", 1)[0]
        return Answer(f"not known ({action}: {error.code})")
