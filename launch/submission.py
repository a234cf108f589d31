"""Carries out a plan.

Every step sees what an earlier, killed submit has done already, so the same command goes on.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.cloud import ownership, s3, wheelhouse
from launch.cloud.remedies import NO_CAPACITY, NOT_THIS_ONE
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.following import follow, runs_on
from launch.patience import Patience
from launch.planning import Plan, means, missing, next_attempt
from launch.targets import attempt as notes
from launch.targets import base
from launch.targets.attempt import TAKEN, Attempt, Phase, State
from launch.targets.base import Spec
from launch.targets.spec import weights_name
from trainer.common.console import log
from trainer.common.errors import FAULT, OK, RESUME, UserError
from trainer.common.text import dollars

# AWS's ways to say that something of this name was made already. Ours follow from run and attempt,
# so it is the very thing, if it is this project's.
ALREADY = r"ResourceInUse|already exists|must be unique|duplicate"
# What AWS says of what was just made and is not seen everywhere yet.
YOUNG = {
    "Could not assume role|Invalid IAM Instance Profile": "role",
    "Placement Group .* unknown": "placement group",
}
IAM_TRIES, IAM_PAUSE = 10, 3.0  # seconds between two
CAPACITY_PAUSE = 30  # times --every, between two requests for a machine that AWS does not have
REPLACEMENTS = 3  # in a row for machines that were taken back, none of which got further


def submit(aws: Aws, plan: Plan, data: Path | None = None, weights: Path | None = None) -> Attempt:
    """Make sure that the run is going, or was complete before; return its newest attempt.

    data, weights: the folders to upload, of pictures and of weights; an attempt after the first
    needs neither. Raise UserError, AwsError.
    """
    for line in missing(aws, plan, data):
        raise UserError(f"missing: {line}")
    spec = plan.spec
    if not plan.requests:
        assert plan.before is not None and plan.state is not None
        log.info("%s: nothing is sent", plan.before.told(plan.state))
        return plan.before if plan.before.id else _confirm(aws, plan.before, plan.state.id)
    for line in means(spec, data):
        log.info(line)
    upload(aws, plan, data, weights)
    return carry_out(aws, plan)


def upload(aws: Aws, plan: Plan, data: Path | None, weights: Path | None) -> None:
    """Upload what a run needs, as far as it isn't there. Raise UserError, AwsError.

    data, weights: the folders of pictures and of weights; None: they are there, or not needed.
    """
    spec = plan.spec
    key = f"source/{spec.source}.tar.gz"
    if not s3.exists(aws, key):
        s3.write(aws, key, plan.source)
        log.info("uploaded the code (%.1f MB) to %s", len(plan.source) / 1e6, spec.uri(key))
    folders = []
    if data is not None and spec.data is not None:
        folders.append((data, f"data/{spec.data}/"))
    if weights is not None and weights_name(weights) == spec.weights:
        folders.append((weights, f"data/{spec.weights}/"))
    if spec.wheels is not None:
        made = wheelhouse.kept(spec.wheels)
        if made is not None:  # an attempt before this one, sent from elsewhere, has uploaded it
            folders.append((made, f"data/{spec.wheels}/"))
    for folder, prefix in folders:
        s3.upload_folder(aws, folder, prefix, s3.has_own_key(aws, key))


def carry_out(aws: Aws, plan: Plan) -> Attempt:
    """Note the attempt, send its requests, and note what AWS made of them.

    Raise UserError, AwsError.
    """
    attempt = plan.attempt
    if plan.before is not None and plan.before.number == attempt.number:
        if plan.state is not None and plan.state.phase is Phase.ABSENT:
            attempt = _again(aws, plan)
        else:
            attempt = plan.before
            if not plan.spec.kind.trains:  # it is set going again as it is asked for now
                attempt = dataclasses.replace(attempt, requests=plan.spec.kind.requests(plan.spec))
    elif not notes.claim(aws, attempt):
        log.info("another submit of %s is under way; this one joins it", attempt.run)
        noted = notes.read(aws, attempt.key)
        assert noted is not None
        attempt, plan = noted, dataclasses.replace(plan, requests=noted.requests, others=())
    attempt, made = _send_first_offer(aws, plan, attempt)
    attempt = _confirm(aws, attempt, _id(made[-1]) or base.of(attempt).observe(aws, attempt).id)
    base.of(attempt).sent(aws, attempt, plan.before)
    log.info("sent attempt %d at %s: %s", attempt.number, attempt.run, attempt.id or attempt.job)
    if attempt.ceiling is not None:
        log.info(
            "the run costs %s at most; this attempt ends after %.3g h",
            dollars(attempt.ceiling),
            attempt.hours,
        )
    return attempt


def _send_first_offer(
    aws: Aws, plan: Plan, attempt: Attempt
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Send a plan's requests, or those of the first of its others that AWS has a machine for.

    Return the attempt as it was noted, and AWS's answers. Each is noted before it is sent. Raise
    AwsError: where AWS has none, for a lack that may pass rather than one that doesn't.
    """
    lacking: AwsError | None = None
    while True:
        try:
            return attempt, [_send(aws, request) for request in plan.requests]
        except AwsError as error:
            if not error.refused:
                raise
            attempt = dataclasses.replace(attempt, refused=error.code)
            notes.note(aws, attempt)
            if not re.fullmatch(NOT_THIS_ONE, error.code):
                raise
            if lacking is None or re.fullmatch(NO_CAPACITY, error.code):
                lacking = error
            why = error.message or error.code
            before, plan = plan.spec, _without_same_quota(plan, error)
            if not plan.others:
                raise lacking from None
        plan = plan.next_offer
        log.info("no %s (%s); asking for %s", _offer(before), why, _offer(plan.spec))
        attempt = dataclasses.replace(plan.attempt, asked=attempt.asked)
        notes.note(aws, attempt)


def _without_same_quota(plan: Plan, error: AwsError) -> Plan:
    """Return a plan without others that the same quota refuses: it is of all zones together."""
    if re.fullmatch(f"{NO_CAPACITY}|Unsupported", error.code):
        return plan
    kind, spot = plan.spec.target.instance_type, plan.spec.spot
    others = [
        each for each in plan.others if (each.target.instance_type, each.spot) != (kind, spot)
    ]
    return dataclasses.replace(plan, others=tuple(others))


def _offer(spec: Spec) -> str:
    """Return a kind of machine in words."""
    words = [spec.target.instance_type]
    if spec.spot:
        words.append("spot")
    if spec.zone:
        words.append(f"in {spec.zone}")
    return " ".join(words)


def _again(aws: Aws, plan: Plan) -> Attempt:
    """Return what is noted for an attempt that was noted before, and never came to be.

    AWS may have it, unless it has refused it: then it may be sent otherwise.
    """
    before = plan.before
    assert before is not None
    if before.refused is None:
        log.info(
            "attempt %d at %s was recorded earlier: sending it as recorded",
            before.number,
            before.run,
        )
        return before
    notes.note(aws, plan.attempt)
    return plan.attempt


def _confirm(aws: Aws, attempt: Attempt, id: str | None) -> Attempt:
    """Note what AWS made of an attempt.

    An instance is forgotten an hour after its end, and must not be taken for one that never was.
    """
    sent = attempt.sent or (notes.now().isoformat() if id else None)
    attempt = dataclasses.replace(attempt, id=id, sent=sent, refused=None)
    notes.note(aws, attempt)
    return attempt


def _send(aws: Aws, request: Request) -> dict[str, Any]:
    """Return AWS's answer, empty where an earlier submit was first."""
    try:
        return _send_once_seen(aws, request)
    except AwsError as error:
        if not re.search(ALREADY, f"{error.code}: {error.message}"):
            raise
        _check_owner(aws, request)
        log.info("%s: found what an earlier submit created", request.operation)
        return {}


def _send_once_seen(aws: Aws, request: Request) -> dict[str, Any]:
    """Send a request, again for a while where what it names is too young to be seen.

    IAM and EC2 are eventually consistent: a role that `up` has just made is there some seconds
    later.
    """
    for left in reversed(range(IAM_TRIES)):
        try:
            return aws.send(request)
        except AwsError as error:
            young = [what for says, what in YOUNG.items() if re.search(says, error.message)]
            if not left or not young:
                raise
            if left == IAM_TRIES - 1:
                log.info(
                    "%s; a new %s takes a moment to be seen everywhere: asking again",
                    error,
                    young[0],
                )
            time.sleep(IAM_PAUSE)
    raise AssertionError("the last try returns or raises")


def _check_owner(aws: Aws, request: Request) -> None:
    """Raise AwsError where what has the name of a request is not this project's.

    The run dev-x of packhorse and the run x of packhorse-dev give their jobs one name.
    """
    kind = request.operation.removeprefix("Create")
    if kind not in ownership.JOBS:
        return
    name = request.parameters[f"{kind}Name"]
    whose = ownership.anothers(aws, kind, name)
    if whose is not None:
        line = f"{name}: on AWS this name belongs to {whose}; give another name=..."
        raise AwsError(line, TAKEN, line, refused=True)


def _id(answer: dict[str, Any]) -> str | None:
    """Return AWS's own id of what it made."""
    if "Instances" in answer:
        return str(answer["Instances"][0]["InstanceId"])
    return next((str(value) for key, value in answer.items() if key.endswith("Arn")), None)


def wait(aws: Aws, attempt: Attempt, plan: Plan, every: float) -> int:
    """Follow the log to the run's end; return the exit code.

    Asks again for a machine that AWS took back, and ends one past its limit. plan: the first one.
    What is asked for again is the same: code, pictures, settings, image. every: seconds between
    two looks. An outage is waited out. Raise UserError where machines are lost one after the other,
    and none of them gets further, or the ceiling is reached.
    """
    spec = plan.asked_for.kind.pinned(plan.asked_for, attempt)
    patience = Patience(aws, every, runs_on(attempt))

    def newest_step() -> int:
        return patience.ask(lambda: notes.newest_step(aws, attempt.run))

    reached, in_vain = newest_step(), 0
    while True:
        state = follow(aws, attempt, every, end_overdue=True)
        if state.phase is Phase.NO_CAPACITY:
            pause(f"attempt {attempt.number} found no machine free ({state.detail})", every)
        elif state.phase is Phase.LOST:
            before, reached = reached, newest_step()
            in_vain = 0 if reached > before else in_vain + 1
            check_vain(attempt, state, in_vain)
        else:
            break
        attempt = ask_until_free(aws, lambda: next_attempt(aws, spec, plan.source), every)
    log.info(attempt.told(state))
    return {Phase.COMPLETE: OK, Phase.STOPPED: RESUME}.get(state.phase, FAULT)


def check_vain(attempt: Attempt, state: State, in_vain: int) -> None:
    """Raise UserError where too many machines in a row got no further than the one before."""
    if in_vain > REPLACEMENTS:
        raise UserError(
            f"{attempt.run}: {in_vain} machines in a row were taken back ({state.detail}) "
            "before a new checkpoint was saved; not asking for another: give "
            "target.spot=false, or a lower checkpoint.minutes, or start the same submit "
            "again later"
        )
    log.info(
        "attempt %d lost its machine (%s); asking for another, which continues from the last "
        "checkpoint",
        attempt.number,
        state.detail,
    )


def ask_until_free(
    aws: Aws, planned: Callable[[], Plan], every: float, *folders: Path | None
) -> Attempt:
    """Carry out what is planned, as often as AWS has no machine for it, and through outages.

    planned: makes the plan, anew each time. folders: to upload, as `submit` takes them. Raise
    UserError, AwsError.
    """
    patience = Patience(aws, every, "what was sent before keeps running")
    while True:
        try:
            return patience.ask(lambda: submit(aws, planned(), *folders))
        except AwsError as error:
            if not re.fullmatch(NO_CAPACITY, error.code):
                raise
            pause(str(error), every)


def with_elsewhere(aws: Aws, spec: Spec, error: AwsError) -> AwsError:
    """Return an error for a machine that AWS hasn't, with a line on what it may have where."""
    line = spec.kind.elsewhere(aws, spec)
    if not line or not re.fullmatch(NO_CAPACITY, error.code):
        return error
    return AwsError(f"{error}; {line}", error.code, error.message, error.refused)


def pause(why: str, every: float) -> None:
    """Wait before the next request for a machine that AWS does not have."""
    log.info("%s; trying again in %.0f seconds", why, every * CAPACITY_PAUSE)
    time.sleep(every * CAPACITY_PAUSE)
