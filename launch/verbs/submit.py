"""`python -m launch submit`: carries out a plan. Every step finds what an earlier, killed submit has done already, so the same command goes on."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cloud import s3
from launch.cloud.request import Request
from launch.cloud.session import NO_CAPACITY, Aws, AwsError
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase
from launch.targets.spec import Ec2Target, Spec, load_target, resolved, split_overrides
from launch.verbs.logs import follow
from launch.verbs.plan import Plan, job_parser, missing, next_attempt, prepare
from trainer.common.console import log, python
from trainer.common.errors import FAULT, OK, RESUME, UserError

# AWS's ways to say that something of this name was made already. Ours follow from run and attempt, so it is the very thing.
ALREADY = r"ResourceInUse|already exists|must be unique|duplicate"
CAPACITY_PAUSE = 30  # times --every, between two requests for a machine that AWS does not have
REPLACEMENTS = 3  # in a row for machines that were taken back, none of which got further


def submit(aws: Aws, plan: Plan, data: Path | None = None) -> Attempt:
    """Makes sure that the run is going, or was complete before; returns its newest attempt. Raises UserError, AwsError."""
    for line in missing(aws, plan, data, ""):
        if plan.price.on_demand is not None or "price" not in line:
            raise UserError(f"missing: {line}")
        log.warning(line)
    if not plan.requests:
        assert plan.before is not None and plan.state is not None
        log.info(
            "attempt %d at %s is %s (%s): nothing is sent",
            plan.before.number,
            plan.spec.run,
            plan.state.phase,
            plan.state.detail,
        )
        return plan.before if plan.before.id else _confirm(aws, plan.before, plan.state.id)
    for line in resolved(plan.spec.target, plan.spec.overrides, data).notes:
        log.info(line)
    key = f"source/{plan.spec.source}.tar.gz"
    if not s3.exists(aws, key):
        s3.write(aws, key, plan.source)
        log.info("uploaded the code (%.1f MB) to %s", len(plan.source) / 1e6, plan.spec.uri(key))
    if data is not None and plan.spec.data is not None:
        s3.upload_folder(aws, data, f"data/{plan.spec.data}/")
    return carry_out(aws, plan)


def carry_out(aws: Aws, plan: Plan) -> Attempt:
    """Notes the attempt, sends its requests, and notes what AWS made of them. Raises UserError, AwsError."""
    attempt = plan.attempt
    if plan.before is not None and plan.before.number == attempt.number:
        attempt = plan.before
        if plan.state is not None and plan.state.phase is Phase.ABSENT:
            attempt = _again(aws, attempt)
    elif not s3.claim(aws, attempt.key, attempt.dumps()):
        log.info("another submit of %s is under way; this one joins it", attempt.run)
        noted = s3.read(aws, attempt.key)
        assert noted is not None
        attempt = runs.loads(noted[0])
    # A stopped notebook is started, with its first request on record.
    requests = attempt.requests if attempt.target != "notebook" else plan.requests
    try:
        made = [_send(aws, request) for request in requests]
    except AwsError as error:
        if error.refused:
            refused = dataclasses.replace(attempt, refused=error.code)
            s3.write(aws, attempt.key, refused.dumps())
        raise
    attempt = _confirm(aws, attempt, _id(made[-1]) or runs.observe(aws, attempt).id)
    log.info("sent attempt %d at %s: %s", attempt.number, attempt.run, attempt.id or attempt.job)
    return attempt


def _again(aws: Aws, attempt: Attempt) -> Attempt:
    """An attempt that was noted before, to be sent as it was noted: AWS may have it already."""
    log.info(
        "attempt %d at %s was noted before: it is sent as it was noted", attempt.number, attempt.run
    )
    if attempt.refused is None:
        return attempt
    attempt = dataclasses.replace(attempt, refused=None, noted=runs.now().isoformat())
    s3.write(aws, attempt.key, attempt.dumps())
    return attempt


def _confirm(aws: Aws, attempt: Attempt, id: str | None) -> Attempt:
    """Notes what AWS made of an attempt: an instance is forgotten an hour after its end, and must not be taken for one that never was."""
    sent = attempt.sent or (runs.now().isoformat() if id else None)
    attempt = dataclasses.replace(attempt, id=id, sent=sent, refused=None)
    s3.write(aws, attempt.key, attempt.dumps())
    return attempt


def _send(aws: Aws, request: Request) -> dict[str, Any]:
    """The answer; empty where an earlier submit was there first."""
    try:
        return aws.send(request)
    except AwsError as error:
        if not re.search(ALREADY, f"{error.code}: {error.message}"):
            raise
        log.info("%s: found what an earlier submit has made", request.operation)
        return {}


def _id(answer: dict[str, Any]) -> str | None:
    """AWS's own id of what it made."""
    if "Instances" in answer:
        return str(answer["Instances"][0]["InstanceId"])
    return next((str(value) for key, value in answer.items() if key.endswith("Arn")), None)


def console(aws: Aws, attempt: Attempt) -> str:
    """The page of AWS's console that shows the attempt."""
    suffix = "amazonaws.cn" if aws.region.startswith("cn-") else "aws.amazon.com"
    kind = {
        "tuner": "hyper-tuning-jobs",
        "notebook": "notebook-instances",
        "sagemaker": "jobs",
        "sagemaker_multi": "jobs",
    }
    if attempt.target == "ec2":
        return f"https://{aws.region}.console.{suffix}/ec2/home?region={aws.region}#InstanceDetails:instanceId={attempt.id}"
    return f"https://{aws.region}.console.{suffix}/sagemaker/home?region={aws.region}#/{kind[attempt.target]}/{attempt.job}"


def wait(aws: Aws, attempt: Attempt, plan: Plan, every: float) -> int:
    """Follows the log to the run's end; asks again for a machine that AWS took back, and ends one past its limit.

    plan: the first one. What is asked for again is the same: code, pictures, settings, image.
    Raises UserError where machines are lost one after the other, and none of them gets further.
    """
    spec = pinned(plan.spec, attempt)
    reached, in_vain = runs.newest_step(aws, attempt.run), 0
    while True:
        state = follow(aws, attempt, every, end_overdue=True)
        if state.phase not in (Phase.LOST, Phase.NO_CAPACITY):
            break
        if state.phase is Phase.NO_CAPACITY:
            pause(f"attempt {attempt.number} found no machine free ({state.detail})", every)
        else:
            before, reached = reached, runs.newest_step(aws, attempt.run)
            in_vain = 0 if reached > before else in_vain + 1
            if in_vain > REPLACEMENTS:
                raise UserError(
                    f"{attempt.run}: {in_vain} machines in a row were taken back ({state.detail}) before a new checkpoint was saved; "
                    "no other is asked for: give target.spot=false, or a lower checkpoint.minutes, or start the same submit again later"
                )
            log.info(
                "attempt %d lost its machine (%s); asking for another, which goes on from the last checkpoint",
                attempt.number,
                state.detail,
            )
        while True:
            try:
                attempt = submit(aws, next_attempt(aws, spec, plan.source))
                break
            except AwsError as error:
                if not re.fullmatch(NO_CAPACITY, error.code):
                    raise
                pause(str(error), every)
    log.info("attempt %d at %s is %s (%s)", attempt.number, attempt.run, state.phase, state.detail)
    return {Phase.COMPLETE: OK, Phase.STOPPED: RESUME}.get(state.phase, FAULT)


def pinned(spec: Spec, attempt: Attempt) -> Spec:
    """The spec with the machine image of an attempt, so that a newer one doesn't change what comes out of the run."""
    if not isinstance(spec.target, Ec2Target):
        return spec
    image = attempt.requests[0].parameters["ImageId"]
    return dataclasses.replace(spec, target=dataclasses.replace(spec.target, image=image))


def pause(why: str, every: float) -> None:
    """Waits before the next request for a machine that AWS does not have."""
    log.info("%s; trying again in %.0f seconds", why, every * CAPACITY_PAUSE)
    time.sleep(every * CAPACITY_PAUSE)


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = job_parser("submit", __doc__)
    parser.add_argument(
        "--wait",
        action="store_true",
        help="follow the log to the end, and ask again for a spot machine that AWS took back",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=10,
        metavar="SECONDS",
        help="with --wait: how often AWS is asked (default 10)",
    )
    options = parser.parse_intermixed_args(rest)
    target = load_target(targets)
    aws = Aws(target.project, target.region)
    overdue.warn(aws, targets)
    plan = prepare(aws, target, options.overrides, options.data, options.again)
    attempt = submit(aws, plan, options.data)
    log.info("console   %s", console(aws, attempt))
    where = "".join(f" {override}" for override in targets if not override.startswith("target="))
    verbs = (
        ("logs", "stop", "cost")
        if attempt.target == "notebook"
        else ("logs", "stop", "fetch", "cost")
    )
    log.info(
        "next:\n%s",
        "\n".join(f"  {python()} -m launch {verb} {attempt.run}{where}" for verb in verbs),
    )
    return (
        wait(aws, attempt, plan, options.every)
        if options.wait and attempt.target != "notebook"
        else OK
    )
