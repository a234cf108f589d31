"""The state of an attempt on EC2: by its machine's last message, and by what EC2 says."""

import dataclasses
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from launch.cloud import s3
from launch.cloud.ownership import instances
from launch.cloud.remedies import remedy
from launch.cloud.session import Aws
from launch.targets.attempt import (
    YOUNG,
    Attempt,
    Phase,
    State,
    attempt_key,
    now,
    read,
    seconds_between,
)
from trainer.common.errors import OK, RESUME

PATIENCE = timedelta(minutes=10)  # after its time limit, by when a machine has ended itself

# Why EC2 ended an instance: the codes of StateReason (EC2 API reference, "StateReason").
RECLAIMED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")
NO_CAPACITY = "Server.InsufficientInstanceCapacity"
BY_HAND = "Client.UserInitiatedShutdown"  # `stop --now`, the console, or any other call
BY_ITSELF = "Client.InstanceInitiatedShutdown"
FORGOTTEN = "ended without a message; EC2 no longer says why"
NO_NOTE = "; without a note: it did not reach the bucket, or another machine has the run"

SPOT_NOTICE, IDLE, TIME_LIMIT = "spot notice", "idle", "time limit"  # in user_data.sh's words


def instance_of(aws: Aws, attempt: Attempt) -> dict[str, Any] | None:
    """Return the attempt's machine: by its id if known, since EC2 may show the tags later."""
    if attempt.id is None:
        tags = ("tag:run", attempt.run), ("tag:attempt", str(attempt.number))
        return next(iter(instances(aws, *tags)), None)
    named = [{"Name": "instance-id", "Values": [attempt.id]}]
    groups = aws.pages("ec2", "DescribeInstances", "Reservations", Filters=named)
    return next((each for group in groups for each in group["Instances"]), None)


def claimed_by(aws: Aws, attempt: Attempt) -> str | None:
    """Return the id of the machine that has claimed an attempt, None where none has."""
    claimed = s3.read(aws, attempt.key_of("machine"))
    # The first of several machines writes more: their request, and its own address.
    owner = claimed[0].decode(errors="replace").split()[:1] if claimed else []
    return owner[0] if owner and owner[0].startswith("i-") else None


def owner_of(aws: Aws, attempt: Attempt, instance: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the machine that has the attempt; it may not be the noted one, which ended itself.

    Two submits at once may rent two machines; the later one ends itself.
    """
    if instance is None or reason_of(instance) != BY_ITSELF:
        return instance
    owner = claimed_by(aws, attempt)
    if owner is None or owner == instance["InstanceId"]:
        return instance
    return instance_of(aws, dataclasses.replace(attempt, id=owner))


def running(instance: dict[str, Any]) -> State | None:
    """Return the state of a machine that has not ended, None where it has."""
    name, started = instance["State"]["Name"], instance["LaunchTime"]
    if name in ("terminated", "stopped"):
        return None
    seconds = seconds_between(started, now())
    return State(Phase.RUNNING, name, started, None, seconds, id=instance["InstanceId"])


def asked_to_stop(aws: Aws, attempt: Attempt) -> bool:
    return s3.exists(aws, attempt.key_of("stop"))


def ended_with_word(
    attempt: Attempt, instance: dict[str, Any] | None, word: dict[str, Any], written: datetime
) -> State:
    """Return the state of an attempt whose machine noted its end. written: when it did."""
    started = datetime.fromisoformat(attempt.noted)
    reason = ""
    if instance is not None:
        started = instance["LaunchTime"]
        reason = reason_of(instance)
    detail = f"{word['reason']}, exit code {word['code']}"
    seconds = seconds_between(started, written)
    return State(phase_told(word, reason), detail, started, written, seconds, id=attempt.id)


def unlisted(aws: Aws, attempt: Attempt) -> State:
    """Return the state of an attempt without a message, whose machine EC2 doesn't list."""
    if attempt.id is None:
        return attempt.unseen()
    started = datetime.fromisoformat(attempt.noted)
    ended = None
    log_entry = s3.read(aws, f"runs/{attempt.run}/log.txt")
    if log_entry is not None:
        ended = max(log_entry[1], started)  # the log is written once a minute: the best guess
    # The next attempt writes the same log. The submit that sent it noted when this one ended.
    following = read(aws, attempt_key(attempt.run, attempt.number + 1, "request.json"))
    if following is not None:
        limit = started + timedelta(hours=attempt.hours) + PATIENCE
        known = following.after or following.asked or following.noted
        ended = min(datetime.fromisoformat(known), limit)
        return State(
            Phase.FAILED,
            FORGOTTEN,
            started,
            ended,
            seconds_between(started, ended),
            id=attempt.id,
            is_sure=following.after is not None,
        )
    alive = ended or attempt.since
    if now() - alive < YOUNG:
        return attempt.unseen(alive)
    phase, detail = Phase.FAILED, FORGOTTEN
    if asked_to_stop(aws, attempt):
        phase, detail = Phase.STOPPED, "asked to stop"
    seconds = seconds_between(started, ended)
    return State(phase, detail, started, ended, seconds, id=attempt.id, is_sure=False)


def ended_without_word(aws: Aws, attempt: Attempt, instance: dict[str, Any]) -> State:
    """Return the state of an attempt without a message, by what EC2 says of its machine."""
    started, reason = instance["LaunchTime"], reason_of(instance)
    ended = ended_at(instance)
    seconds = seconds_between(started, ended)
    if reason == NO_CAPACITY:
        seconds = 0.0
    detail = why_ended(instance)
    phase = phase_of_reason(reason)
    if asked_to_stop(aws, attempt):
        phase = Phase.STOPPED
    elif reason == BY_ITSELF:
        detail += NO_NOTE
    return State(phase, detail, started, ended, seconds, id=instance["InstanceId"])


def ended_at(instance: dict[str, Any]) -> datetime:
    """Return when EC2 ended an instance; the time now, where EC2 doesn't say."""
    why = instance.get("StateTransitionReason", "")
    at = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", why)
    return datetime.fromisoformat(at[1]).replace(tzinfo=UTC) if at else now()


def why_ended(instance: dict[str, Any]) -> str:
    """Return why an instance ended, in AWS's words, and what to do about it, where we know."""
    told = instance.get("StateReason", {}).get("Message", "")
    told = told or instance.get("StateTransitionReason", "") or "terminated"
    return "; ".join(filter(None, [told, remedy(reason_of(instance), told)]))


def reason_of(instance: dict[str, Any]) -> str:
    """Return AWS's code for why an instance ended, "" where there is none."""
    return str(instance.get("StateReason", {}).get("Code", ""))


def phase_told(word: dict[str, Any], reason: str) -> Phase:
    """Return the phase by an instance's last message (user_data.sh).

    word: the exit code of the trainer or the set-up, and why it ended. reason: AWS's, or "".
    """
    if word["code"] == OK:
        return Phase.COMPLETE
    if word["reason"] in ("asked to stop", TIME_LIMIT):
        return Phase.STOPPED
    if word["reason"] == SPOT_NOTICE:
        return Phase.LOST
    if word["reason"] == IDLE:
        return Phase.FAILED
    if word["code"] != RESUME and word["reason"] != "SIGTERM":
        return Phase.FAILED
    return Phase.LOST if reason in RECLAIMED else Phase.STOPPED


def phase_of_reason(reason: str) -> Phase:
    """Return the phase of an instance that ended without a message, by AWS's reason."""
    if reason in RECLAIMED:
        return Phase.LOST
    phases = {NO_CAPACITY: Phase.NO_CAPACITY, BY_HAND: Phase.STOPPED}
    return phases.get(reason, Phase.FAILED)
