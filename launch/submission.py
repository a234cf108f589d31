"""Carries out a plan.

Every step sees what an earlier, killed submit has done already, so the same command goes on.
"""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from launch.cloud import ownership, s3
from launch.cloud.remedies import NO_CAPACITY
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.following import follow
from launch.planning import Plan, means, missing, next_attempt
from launch.targets import attempt as notes
from launch.targets import base
from launch.targets.attempt import TAKEN, Attempt, Phase, State
from launch.targets.base import Spec
from launch.targets.spec import weights_folder, weights_name
from trainer.common.console import log
from trainer.common.errors import FAULT, OK, RESUME, UserError

# AWS's ways to say that something of this name was made already. Ours follow from run and attempt,
# so it is the very thing, if it is this project's.
ALREADY = r"ResourceInUse|already exists|must be unique|duplicate"
CAPACITY_PAUSE = 30  # times --every, between two requests for a machine that AWS does not have
# IAM shows a new role everywhere only after some seconds. This is said of one made just now.
NOT_YET = re.compile("(?i)could not assume role|iamInstanceProfile|instance profile")
IAM_DELAY, IAM_PAUSE = 60.0, 5.0  # seconds: for how long it is asked again, and how often
REPLACEMENTS = 3  # in a row for machines that were taken back, none of which got further


def submit(aws: Aws, plan: Plan, data: Path | None = None) -> Attempt:
    """Make sure that the run is going, or was complete before; return its newest attempt.

    data: the folder of pictures to upload. Raise UserError, AwsError.
    """
    for line in missing(aws, plan, data):
        if plan.price.on_demand is not None or "price" not in line:
            raise UserError(f"missing: {line}")
        log.warning(line)
    spec = plan.spec
    if not plan.requests:
        assert plan.before is not None and plan.state is not None
        log.info("%s: nothing is sent", plan.before.told(plan.state))
        return plan.before if plan.before.id else _confirm(aws, plan.before, plan.state.id)
    for line in means(spec, data):
        log.info(line)
    key = f"source/{spec.source}.tar.gz"
    if not s3.exists(aws, key):
        s3.write(aws, key, plan.source)
        log.info("uploaded the code (%.1f MB) to %s", len(plan.source) / 1e6, spec.uri(key))
    if data is not None and spec.data is not None:
        s3.upload_folder(aws, data, f"data/{spec.data}/")
    weights = weights_folder(spec.target, spec.overrides, data)
    if weights is not None and weights_name(weights) == spec.weights:
        s3.upload_folder(aws, weights, f"data/{spec.weights}/")
    return carry_out(aws, plan)


def carry_out(aws: Aws, plan: Plan) -> Attempt:
    """Note the attempt, send its requests, and note what AWS made of them.

    Raise UserError, AwsError.
    """
    attempt, requests = plan.attempt, plan.requests
    if plan.before is not None and plan.before.number == attempt.number:
        attempt = plan.before
        if plan.state is not None and plan.state.phase is Phase.ABSENT:
            attempt = _again(aws, attempt)
    elif not s3.claim(aws, attempt.key, attempt.dumps()):
        log.info("another submit of %s is under way; this one joins it", attempt.run)
        noted = notes.read(aws, attempt.key)
        assert noted is not None
        attempt, requests = noted, noted.requests
    try:
        made = [_send(aws, request) for request in requests]
    except AwsError as error:
        if error.refused:
            refused = dataclasses.replace(attempt, refused=error.code)
            s3.write(aws, attempt.key, refused.dumps())
        raise
    attempt = _confirm(aws, attempt, _id(made[-1]) or base.of(attempt).observe(aws, attempt).id)
    log.info("sent attempt %d at %s: %s", attempt.number, attempt.run, attempt.id or attempt.job)
    return attempt


def _again(aws: Aws, attempt: Attempt) -> Attempt:
    """Return an attempt that was noted before, to be sent as it was noted: AWS may have it."""
    log.info(
        "attempt %d at %s was noted before: it is sent as it was noted", attempt.number, attempt.run
    )
    if attempt.refused is None:
        return attempt
    attempt = dataclasses.replace(attempt, refused=None, noted=notes.now().isoformat())
    s3.write(aws, attempt.key, attempt.dumps())
    return attempt


def _confirm(aws: Aws, attempt: Attempt, id: str | None) -> Attempt:
    """Note what AWS made of an attempt.

    An instance is forgotten an hour after its end, and must not be taken for one that never was.
    """
    sent = attempt.sent or (notes.now().isoformat() if id else None)
    attempt = dataclasses.replace(attempt, id=id, sent=sent, refused=None)
    s3.write(aws, attempt.key, attempt.dumps())
    return attempt


def _send(aws: Aws, request: Request) -> dict[str, Any]:
    """Return AWS's answer, empty where an earlier submit was first."""
    try:
        return _send_to_young_role(aws, request)
    except AwsError as error:
        if not re.search(ALREADY, f"{error.code}: {error.message}"):
            raise
        _check_owner(aws, request)
        log.info("%s: found what an earlier submit has made", request.operation)
        return {}


def _send_to_young_role(aws: Aws, request: Request) -> dict[str, Any]:
    """Return AWS's answer, asked again for as long as a role of `up` may not be known to it yet."""
    until = time.monotonic() + IAM_DELAY
    while True:
        try:
            return aws.send(request)
        except AwsError as error:
            if not NOT_YET.search(error.message) or time.monotonic() > until:
                raise
            log.info("%s; asking again in %.0f seconds", error, IAM_PAUSE)
        time.sleep(IAM_PAUSE)


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
        line = f"{name}: what has this name at AWS belongs to {whose}; give another name=..."
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
    two looks. Raise UserError where machines are lost one after the other, and none of them gets
    further.
    """
    spec = plan.spec.kind.pinned(plan.spec, attempt)
    reached, in_vain = notes.newest_step(aws, attempt.run), 0
    while True:
        state = follow(aws, attempt, every, end_overdue=True)
        if state.phase is Phase.NO_CAPACITY:
            pause(f"attempt {attempt.number} found no machine free ({state.detail})", every)
        elif state.phase is Phase.LOST:
            before, reached = reached, notes.newest_step(aws, attempt.run)
            in_vain = 0 if reached > before else in_vain + 1
            check_vain(attempt, state, in_vain)
        else:
            break
        attempt = ask_until_free(aws, plan, spec, every)
    log.info(attempt.told(state))
    return {Phase.COMPLETE: OK, Phase.STOPPED: RESUME}.get(state.phase, FAULT)


def check_vain(attempt: Attempt, state: State, in_vain: int) -> None:
    """Raise UserError where too many machines in a row got no further than the one before."""
    if in_vain > REPLACEMENTS:
        raise UserError(
            f"{attempt.run}: {in_vain} machines in a row were taken back ({state.detail}) before "
            "a new checkpoint was saved; no other is asked for: give target.spot=false, or a lower "
            "checkpoint.minutes, or start the same submit again later"
        )
    log.info(
        "attempt %d lost its machine (%s); asking for another, which goes on from the last "
        "checkpoint",
        attempt.number,
        state.detail,
    )


def ask_until_free(aws: Aws, plan: Plan, spec: Spec, every: float) -> Attempt:
    """Send the next attempt, as often as AWS has no machine for it. Raise UserError, AwsError."""
    while True:
        try:
            return submit(aws, next_attempt(aws, spec, plan.source))
        except AwsError as error:
            if not re.fullmatch(NO_CAPACITY, error.code):
                raise
            pause(str(error), every)


def pause(why: str, every: float) -> None:
    """Wait before the next request for a machine that AWS does not have."""
    log.info("%s; trying again in %.0f seconds", why, every * CAPACITY_PAUSE)
    time.sleep(every * CAPACITY_PAUSE)
