"""The state of an attempt on several EC2 machines, which begin together and end together."""

import dataclasses
import re
from datetime import datetime, timedelta
from typing import Any

from launch.cloud import s3
from launch.cloud.session import Aws
from launch.targets.attempt import (
    YOUNG,
    Attempt,
    Phase,
    State,
    last_word,
    now,
    seconds_between,
)
from launch.targets.ec2_state import (
    NO_CAPACITY,
    PATIENCE,
    RECLAIMED,
    SPOT_NOTICE,
    TIME_LIMIT,
    asked_to_stop,
    claimed_by,
    ended_at,
    phase_of_reason,
    phase_told,
    reason_of,
    running,
    unlisted,
    why_ended,
)
from trainer.common.errors import OK

AWAY = "EC2 lists it no longer"


@dataclasses.dataclass(frozen=True)
class Machine:
    """One of an attempt's machines: its last message, and what EC2 says of it."""

    number: int  # from 0; the first one has the run
    started: datetime
    ended: datetime | None  # by its own message, or by EC2
    word: dict[str, Any] | None
    instance: dict[str, Any] | None  # None: EC2 doesn't list it

    @property
    def reason(self) -> str:
        """AWS's code for why it ended, "" where there is none."""
        return "" if self.instance is None else reason_of(self.instance)

    @property
    def is_lost(self) -> bool:
        """Whether it has ended without success."""
        return self.ended is not None and (self.word is None or self.word["code"] != OK)

    @property
    def told(self) -> str:
        """Why it ended, in words."""
        why = AWAY
        if self.word is not None:
            why = f"{self.word['reason']}, exit code {self.word['code']}"
        elif self.instance is not None:
            why = why_ended(self.instance)
        return f"machine {self.number + 1}: {why}"


def instances_of(aws: Aws, attempt: Attempt) -> list[dict[str, Any]]:
    """Return the attempt's machines that EC2 lists: those of the one request that has claimed it.

    Two submits at once may send two requests; the machines of the later one end themselves.
    """
    tags = {"project": aws.project, "run": attempt.run, "attempt": str(attempt.number)}
    filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in tags.items()]
    groups = list(aws.pages("ec2", "DescribeInstances", "Reservations", Filters=filters))
    owner = claimed_by(aws, attempt) or attempt.id
    if owner is not None:
        holding = {
            group["ReservationId"]
            for group in groups
            if owner in [each["InstanceId"] for each in group["Instances"]]
        }
        groups = [group for group in groups if group["ReservationId"] in holding]
    found = [each for group in groups for each in group["Instances"]]
    return sorted(found, key=lambda each: int(each.get("AmiLaunchIndex", 0)))


def observe(aws: Aws, attempt: Attempt) -> State:
    """Return the state of an attempt: it has ended when all its machines have."""
    attempt = dataclasses.replace(attempt, id=claimed_by(aws, attempt) or attempt.id)
    instances = instances_of(aws, attempt)
    words = _words(aws, attempt)
    if not instances and 0 not in words:
        state = unlisted(aws, attempt)
        return dataclasses.replace(state, machine_seconds=state.machine_seconds * attempt.instances)
    machines = _machines(attempt, instances, words)
    lost = sorted((each for each in machines if each.is_lost), key=lambda each: str(each.ended))
    id = attempt.id
    if id is None and machines[0].instance is not None:
        id = machines[0].instance["InstanceId"]
    seconds = sum(seconds_between(each.started, each.ended or now()) for each in machines)
    state = State(
        Phase.RUNNING,
        started=min(each.started for each in machines),
        machine_seconds=seconds,
        id=id,
    )
    going = [each for each in machines if each.ended is None]
    if not going:
        told = lost[0].told if lost else machines[0].told
        ended = max(each.ended for each in machines if each.ended is not None)
        phase = _phase(aws, attempt, machines, lost)
        return dataclasses.replace(state, phase=phase, detail=told, ended=ended)
    if not lost:
        names = {each.instance["State"]["Name"] for each in going if each.instance is not None}
        ending = len(machines) - len(going)
        detail = f"{', '.join(sorted(names)) or 'running'} on {len(going)} machines"
        if ending:
            detail = f"{ending} of {attempt.instances} machines have done their part"
        return dataclasses.replace(state, detail=detail)
    first = lost[0]
    assert first.ended is not None
    # Training machines notice the loss themselves, and save; where one never started, none trains.
    patience = timedelta() if first.reason == NO_CAPACITY else PATIENCE
    detail = f"{len(lost)} of {attempt.instances} machines lost, the others end ({first.told})"
    return dataclasses.replace(state, detail=detail, ends_by=first.ended + patience)


def _machines(
    attempt: Attempt,
    instances: list[dict[str, Any]],
    words: dict[int, tuple[dict[str, Any], datetime]],
) -> list[Machine]:
    """Return the attempt's machines in order. One that EC2 no longer lists has ended."""
    numbered = {int(each.get("AmiLaunchIndex", 0)): each for each in instances}
    noted = datetime.fromisoformat(attempt.noted)
    machines = []
    for number in range(attempt.instances):
        instance = numbered.get(number)
        word, written = words.get(number, (None, None))
        started = noted if instance is None else instance["LaunchTime"]
        ended = written
        if ended is None and instance is None and now() - attempt.since > YOUNG:
            ended = attempt.since + YOUNG
        if ended is None and instance is not None and running(instance) is None:
            ended = ended_at(instance)
            if reason_of(instance) == NO_CAPACITY:
                ended = started  # AWS bills nothing for it
        machines.append(Machine(number, started, ended, word, instance))
    return machines


def _phase(aws: Aws, attempt: Attempt, machines: list[Machine], lost: list[Machine]) -> Phase:
    """Return the phase of an attempt whose machines have all ended.

    The first machine has the run: where it has succeeded, that counts. lost: machines that ended
    without success, in order of their ends.
    """
    main = machines[0].word
    if main is not None and main["code"] == OK:
        return Phase.COMPLETE
    if asked_to_stop(aws, attempt):
        return Phase.STOPPED
    said = [each.word["reason"] for each in machines if each.word is not None]
    if TIME_LIMIT in said:
        return Phase.STOPPED
    reasons = [each.reason for each in machines]
    if SPOT_NOTICE in said or any(reason in RECLAIMED for reason in reasons):
        return Phase.LOST
    if NO_CAPACITY in reasons:
        return Phase.NO_CAPACITY
    first = lost[0]
    if first.word is not None:
        return phase_told(first.word, first.reason)
    return phase_of_reason(first.reason)


def _words(aws: Aws, attempt: Attempt) -> dict[int, tuple[dict[str, Any], datetime]]:
    """Return each machine's last message and its time, by number. Raise AwsError."""
    names = s3.listing(aws, f"runs/{attempt.run}/attempts/").items()
    words = {}
    for name, item in names:
        match = re.fullmatch(rf"{attempt.number}(?:\.(\d+))?\.json", name)
        entry = s3.read(aws, item.key) if match else None
        if match and entry is not None:
            said = last_word(entry[0])
            if said is not None:
                words[int(match[1] or 0)] = said, entry[1]
    return words
