"""What is known of runs: the attempts at each, as noted in the bucket before they were sent, and how AWS says they are."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from launch.cloud import s3
from launch.cloud.ownership import NOT_FOUND, instances
from launch.cloud.prices import Price
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.targets.spec import load_config, load_target, run_id, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK, RESUME, UserError

# AWS is eventually consistent: for a while it may not list what it has just made. What was sent
# less than so long ago and is not seen is on its way. EC2 forgets an instance an hour after its end.
YOUNG = timedelta(hours=1)
UNSEEN = "sent, and not listed by AWS yet"

# Why EC2 ended an instance: the codes of StateReason (EC2 API reference, "StateReason").
RECLAIMED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")
NO_CAPACITY = "Server.InsufficientInstanceCapacity"
BY_HAND = "Client.UserInitiatedShutdown"  # `stop --now`, the console, or any other call
BY_ITSELF = "Client.InstanceInitiatedShutdown"

SPOT_NOTICE = "spot notice"  # in user_data.sh's words
PATIENCE = timedelta(minutes=10)  # past its time limit, in which a machine ends itself


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, noted at runs/RUN/attempts/N.request.json before it is sent, so that a crash leaves no doubt about what was."""

    run: str
    number: int
    target: str  # a key of launch.targets.spec.KINDS
    instance_type: str
    instances: int  # of one job
    spot: bool
    hours: float  # time limit
    job: str  # its name in AWS
    price: Price  # when it was sent
    requests: list[Request]
    identity: dict[str, Any]  # what all attempts at the run have in common
    noted: str  # when, ISO 8601
    id: str | None = None  # AWS's own, noted after it was sent
    sent: str | None = None  # when, ISO 8601
    refused: str | None = None  # AWS's code, where it answered that it makes nothing of it

    @property
    def since(self) -> datetime:
        """When it was sent, as far as that is known."""
        return datetime.fromisoformat(self.sent or self.noted)

    @property
    def key(self) -> str:
        return attempt_key(self.run, self.number, "request.json")

    def dumps(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()


class Phase(StrEnum):
    ABSENT = "never started"
    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"  # by a person or its time limit, with what it saved
    LOST = "reclaimed"  # AWS took a spot machine back
    NO_CAPACITY = "no capacity"  # AWS had no such machine after all: it never ran
    FAILED = "failed"


@dataclass(frozen=True)
class State:
    phase: Phase
    detail: str = ""  # in AWS's words
    started: datetime | None = None
    ended: datetime | None = None
    machine_seconds: float = (
        0.0  # so far, over all its machines; for SageMaker's ended jobs what it bills
    )
    discounted: bool = False  # whether a spot discount is in machine_seconds already
    id: str | None = None


def attempt_key(run: str, number: int, what: str) -> str:
    return f"runs/{run}/attempts/{number}.{what}"


def loads(data: bytes) -> Attempt:
    fields = json.loads(data)
    fields["price"] = Price(**fields["price"])
    fields["requests"] = [Request(**request) for request in fields["requests"]]
    return Attempt(**fields)


def attempts(aws: Aws, run: str | None = None) -> list[Attempt]:
    """The attempts at a run in order, or at every run of the project. Raises AwsError."""
    keys = s3.listing(aws, f"runs/{run}/attempts/" if run else "runs/")
    found = [
        s3.read(aws, item.key)
        for item in keys.values()
        if re.fullmatch(r"runs/[^/]+/attempts/\d+\.request\.json", item.key)
    ]
    return sorted(
        (loads(entry[0]) for entry in found if entry is not None),
        key=lambda attempt: (attempt.run, attempt.number),
    )


def latest(aws: Aws, run: str) -> Attempt | None:
    """The newest attempt at a run, None where there was none. Raises AwsError."""
    numbers = [
        int(found[1])
        for name in s3.listing(aws, f"runs/{run}/attempts/")
        if (found := re.fullmatch(r"(\d+)\.request\.json", name))
    ]
    entry = s3.read(aws, attempt_key(run, max(numbers), "request.json")) if numbers else None
    return None if entry is None else loads(entry[0])


def choose(aws: Aws, arguments: Sequence[str]) -> Attempt:
    """The newest attempt at the run that is meant: named by its id or by the overrides it was submitted with; with neither, the newest of all."""
    names = [argument for argument in arguments if "=" not in argument]
    targets, overrides = split_overrides([argument for argument in arguments if "=" in argument])
    if len(names) > 1 or (names and overrides):
        raise UserError(
            f"{' '.join(arguments)}: more than one run; give the id of one run, or the overrides it was submitted with"
        )
    if (
        not names
        and not overrides
        and not any(override.startswith("target=") for override in targets)
    ):
        every = attempts(aws)
        if not every:
            raise UserError(
                f"s3://{aws.bucket}/runs: no run was ever submitted; begin with: python -m launch plan"
            )
        return max(every, key=lambda attempt: attempt.noted)
    if names:
        run = names[0]
    else:
        target = load_target(targets)
        config, data = load_config(target, overrides)
        run = run_id(target, config, data, overrides)
    found = latest(aws, run)
    if found is None:
        raise UserError(
            f"{run}: there is no such run in s3://{aws.bucket}/runs; python -m launch status lists them"
        )
    return found


# --- how it is ---


def observe(aws: Aws, attempt: Attempt) -> State:
    """How an attempt is now. Raises AwsError."""
    look: dict[str, Callable[[Aws, Attempt], State]] = {
        "ec2": _observe_ec2,
        "sagemaker": _observe_training,
        "sagemaker_multi": _observe_training,
        "tuner": _observe_tuning,
        "notebook": _observe_notebook,
    }
    return look[attempt.target](aws, attempt)


def now() -> datetime:
    return datetime.now(UTC)


def _unseen(attempt: Attempt, alive: datetime) -> State:
    """Of an attempt that AWS doesn't list. alive: the last time that something was known of it."""
    if attempt.id is None:
        return State(Phase.ABSENT)
    if now() - alive < YOUNG:
        seconds = _seconds(attempt.since, now())
        return State(Phase.RUNNING, UNSEEN, attempt.since, None, seconds, id=attempt.id)
    gone = "AWS no longer lists it: it was deleted"
    return State(Phase.STOPPED, gone, attempt.since, id=attempt.id)


def _observe_ec2(aws: Aws, attempt: Attempt) -> State:
    found = _instance(aws, attempt)
    reason = (found or {}).get("StateReason", {}).get("Code", "")
    outcome = s3.read(aws, attempt_key(attempt.run, attempt.number, "json"))
    started = found["LaunchTime"] if found else datetime.fromisoformat(attempt.noted)
    if outcome is not None:
        told = json.loads(outcome[0])
        detail = f"{told['reason']}, exit code {told['code']}"
        phase = _phase_told(told, reason)
        seconds = _seconds(started, outcome[1])
        return State(phase, detail, started, outcome[1], seconds, id=attempt.id)
    if found is None and attempt.id is None:
        return _unseen(attempt, attempt.since)
    if found is None:
        wrote = s3.read(
            aws, f"runs/{attempt.run}/log.txt"
        )  # once a minute: the best guess at the end
        ended = max(wrote[1], started) if wrote else None
        if now() - (ended or attempt.since) < YOUNG:
            return _unseen(attempt, ended or attempt.since)
        asked = asked_to_stop(aws, attempt)
        phase = Phase.STOPPED if asked else Phase.FAILED
        detail = "asked to stop" if asked else "ended without a word; EC2 no longer says why"
        return State(phase, detail, started, ended, _seconds(started, ended), id=attempt.id)
    name, id = found["State"]["Name"], found["InstanceId"]
    if name not in ("terminated", "stopped"):
        return State(Phase.RUNNING, name, started, None, _seconds(started, now()), id=id)
    why = found.get("StateTransitionReason", "")
    at = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", why)
    ended = datetime.fromisoformat(at[1]).replace(tzinfo=UTC) if at else now()
    seconds = 0.0 if reason == NO_CAPACITY else _seconds(started, ended)
    asked = asked_to_stop(aws, attempt)
    phase = Phase.STOPPED if asked else _phase_of_reason(reason)
    detail = found.get("StateReason", {}).get("Message", "") or why or "terminated"
    if reason == BY_ITSELF and not asked:
        detail += "; without a note: it did not reach the bucket, or another machine has the run"
    return State(phase, detail, started, ended, seconds, id=id)


def _instance(aws: Aws, attempt: Attempt) -> dict[str, Any] | None:
    """The attempt's machine as EC2 describes it: by its id, since its tags may be seen later."""
    if attempt.id is None:
        tags = ("tag:run", attempt.run), ("tag:attempt", str(attempt.number))
        return next(iter(instances(aws, *tags)), None)
    named = [{"Name": "instance-id", "Values": [attempt.id]}]
    groups = aws.pages("ec2", "DescribeInstances", "Reservations", Filters=named)
    return next((each for group in groups for each in group["Instances"]), None)


def asked_to_stop(aws: Aws, attempt: Attempt) -> bool:
    return s3.exists(aws, attempt_key(attempt.run, attempt.number, "stop"))


def _phase_told(told: dict[str, Any], reason: str) -> Phase:
    """Of what an instance said last (user_data.sh): its code, the trainer's or the set-up's, and
    why it ended. reason: AWS's, where it has one."""
    if told["code"] == OK:
        return Phase.COMPLETE
    if told["reason"] in ("asked to stop", "time limit"):
        return Phase.STOPPED
    if told["reason"] == SPOT_NOTICE:
        return Phase.LOST
    if told["code"] != RESUME and told["reason"] != "SIGTERM":
        return Phase.FAILED
    return Phase.LOST if reason in RECLAIMED else Phase.STOPPED


def _phase_of_reason(reason: str) -> Phase:
    """Of an instance that ended without a word, by AWS's reason."""
    if reason in RECLAIMED:
        return Phase.LOST
    if reason == NO_CAPACITY:
        return Phase.NO_CAPACITY
    return Phase.STOPPED if reason == BY_HAND else Phase.FAILED


def _observe_training(aws: Aws, attempt: Attempt) -> State:
    found = aws.find("sagemaker", "DescribeTrainingJob", NOT_FOUND, TrainingJobName=attempt.job)
    if found is None:
        return _unseen(attempt, attempt.since)
    started, ended = found.get("TrainingStartTime"), found.get("TrainingEndTime")
    billed = found.get("BillableTimeInSeconds")
    seconds = _seconds(started, ended or now()) if billed is None else float(billed)
    detail = found.get("FailureReason") or found.get("SecondaryStatus", "")
    return State(
        _phase(found["TrainingJobStatus"]),
        detail,
        started,
        ended,
        seconds * attempt.instances,
        discounted=billed is not None,
        id=found["TrainingJobArn"],
    )


def _observe_tuning(aws: Aws, attempt: Attempt) -> State:
    found = aws.find(
        "sagemaker",
        "DescribeHyperParameterTuningJob",
        NOT_FOUND,
        HyperParameterTuningJobName=attempt.job,
    )
    if found is None:
        return _unseen(attempt, attempt.since)
    trials = trial_jobs(aws, attempt)
    seconds = sum(
        _seconds(trial.get("TrainingStartTime"), trial.get("TrainingEndTime") or now())
        for trial in trials
    )
    counts = found.get("TrainingJobStatusCounters", {})
    detail = found.get("FailureReason") or ", ".join(
        f"{count} {name}" for name, count in counts.items() if count
    )
    return State(
        _phase(found["HyperParameterTuningJobStatus"]),
        detail,
        found.get("CreationTime"),
        found.get("HyperParameterTuningEndTime"),
        seconds * attempt.instances,
        id=found["HyperParameterTuningJobArn"],
    )


def trial_jobs(aws: Aws, attempt: Attempt) -> list[dict[str, Any]]:
    """The trials of a tuning job, as SageMaker lists them: none, where it doesn't know the job yet."""
    operation, key = "ListTrainingJobsForHyperParameterTuningJob", "TrainingJobSummaries"
    try:
        return list(aws.pages("sagemaker", operation, key, HyperParameterTuningJobName=attempt.job))
    except AwsError as error:
        if re.search(NOT_FOUND, f"{error.code}: {error.message}"):
            return []
        raise


def _observe_notebook(aws: Aws, attempt: Attempt) -> State:
    found = aws.find(
        "sagemaker", "DescribeNotebookInstance", NOT_FOUND, NotebookInstanceName=attempt.job
    )
    if found is None:
        return _unseen(attempt, attempt.since)
    status = found["NotebookInstanceStatus"]
    phase = (
        Phase.STOPPED
        if status in ("Stopped", "Stopping")
        else Phase.FAILED
        if status == "Failed"
        else Phase.RUNNING
    )
    started = found.get("LastModifiedTime")  # it changes when a notebook is started or stopped
    seconds = _seconds(started, now()) if phase is Phase.RUNNING else 0.0
    return State(
        phase,
        found.get("FailureReason") or status,
        started,
        None,
        seconds,
        id=found["NotebookInstanceArn"],
    )


def _phase(status: str) -> Phase:
    """Of a SageMaker job's status."""
    return {"Completed": Phase.COMPLETE, "Stopped": Phase.STOPPED, "Failed": Phase.FAILED}.get(
        status, Phase.RUNNING
    )


def overdue(attempt: Attempt, state: State) -> float:
    """Hours that a machine runs past its time limit, at which it should have ended itself; 0: none.

    SageMaker ends its jobs itself, and a notebook has no limit.
    """
    if attempt.target != "ec2" or state.phase is not Phase.RUNNING or state.started is None:
        return 0.0
    if state.detail == "shutting-down":
        return 0.0
    past = now() - state.started - timedelta(hours=attempt.hours)
    return past.total_seconds() / 3600 if past > PATIENCE else 0.0


def terminate(aws: Aws, attempt: Attempt, id: str) -> None:
    """Terminates a machine, noted as any other stop, so that nobody takes it for reclaimed. Raises AwsError."""
    s3.write(aws, attempt_key(attempt.run, attempt.number, "stop"), b"")
    unseen = r"InvalidInstanceID\.NotFound"
    if aws.find("ec2", "TerminateInstances", unseen, InstanceIds=[id]) is None:
        log.info("EC2 does not list %s yet: it is asked to stop, and ends when it has started", id)
    else:
        log.info("terminating %s; what it did since its last checkpoint is lost", id)


def newest_step(aws: Aws, run: str) -> int:
    """The training step of the newest whole checkpoint in the bucket; -1: there is none."""
    names = s3.listing(aws, f"runs/{run}/checkpoints/")
    steps = (re.fullmatch(r"step-(\d+)[^/]*/manifest\.json", name) for name in names)
    return max((int(step[1]) for step in steps if step), default=-1)


def _seconds(start: datetime | None, end: datetime | None) -> float:
    return (end - start).total_seconds() if start and end else 0.0


def dollars(attempt: Attempt, state: State) -> float | None:
    """What the attempt has cost so far, by the prices noted when it was sent; None where they are unknown. An estimate."""
    hour = attempt.price.spot if attempt.spot and not state.discounted else attempt.price.on_demand
    return None if hour is None else hour * state.machine_seconds / 3600
