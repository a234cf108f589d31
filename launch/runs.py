"""What is known of runs: the attempts at each, as noted in the bucket before they were sent, and how AWS says they are."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from launch import s3
from launch.aws import Aws
from launch.prices import Price
from launch.request import Request
from launch.spec import load_config, load_target, run_id, split_overrides
from trainer.errors import OK, RESUME, UserError

NOT_FOUND = r"not found|does not exist|ResourceNotFound|RecordNotFound|Could not find"  # in what SageMaker answers about a job that is not there


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, noted at runs/RUN/attempts/N.request.json before it is sent, so that a crash leaves no doubt about what was."""

    run: str
    number: int
    target: str  # a key of launch.spec.KINDS
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
    FAILED = "failed"


@dataclass(frozen=True)
class State:
    phase: Phase
    detail: str = ""  # in AWS's words
    started: datetime | None = None
    ended: datetime | None = None
    machine_seconds: float = 0.0  # so far, over all its machines; for SageMaker's ended jobs what it bills
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
    found = [s3.read(aws, item.key) for item in keys.values() if re.fullmatch(r"runs/[^/]+/attempts/\d+\.request\.json", item.key)]
    return sorted((loads(entry[0]) for entry in found if entry is not None), key=lambda attempt: (attempt.run, attempt.number))


def latest(aws: Aws, run: str) -> Attempt | None:
    """The newest attempt at a run, None where there was none. Raises AwsError."""
    numbers = [int(found[1]) for name in s3.listing(aws, f"runs/{run}/attempts/") if (found := re.fullmatch(r"(\d+)\.request\.json", name))]
    entry = s3.read(aws, attempt_key(run, max(numbers), "request.json")) if numbers else None
    return None if entry is None else loads(entry[0])


def choose(aws: Aws, arguments: Sequence[str]) -> Attempt:
    """The newest attempt at the run that is meant: named by its id or by the overrides it was submitted with; with neither, the newest of all."""
    names = [argument for argument in arguments if "=" not in argument]
    targets, overrides = split_overrides([argument for argument in arguments if "=" in argument])
    if len(names) > 1 or (names and overrides):
        raise UserError(f"{' '.join(arguments)}: more than one run; give the id of one run, or the overrides it was submitted with")
    if not names and not overrides and not any(override.startswith("target=") for override in targets):
        every = attempts(aws)
        if not every:
            raise UserError(f"s3://{aws.bucket}/runs: no run was ever submitted; begin with: python -m launch plan")
        return max(every, key=lambda attempt: attempt.noted)
    if names:
        run = names[0]
    else:
        target = load_target(targets)
        config, data = load_config(target, overrides)
        run = run_id(target, config, data, overrides)
    found = latest(aws, run)
    if found is None:
        raise UserError(f"{run}: there is no such run in s3://{aws.bucket}/runs; python -m launch status lists them")
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


def instances(aws: Aws, *filters: tuple[str, str]) -> list[dict[str, Any]]:
    """This project's EC2 instances, as EC2 describes them, newest first."""
    wanted = [{"Name": name, "Values": [value]} for name, value in (("tag:project", aws.project), *filters)]
    found = [each for group in aws.pages("ec2", "DescribeInstances", "Reservations", Filters=wanted) for each in group["Instances"]]
    return sorted(found, key=lambda each: each["LaunchTime"], reverse=True)


def _observe_ec2(aws: Aws, attempt: Attempt) -> State:
    found = next(iter(instances(aws, ("tag:run", attempt.run), ("tag:attempt", str(attempt.number)))), None)
    outcome = s3.read(aws, attempt_key(attempt.run, attempt.number, "json"))
    started = found["LaunchTime"] if found else datetime.fromisoformat(attempt.noted)
    if outcome is not None:
        told = json.loads(outcome[0])
        detail = f"{told['reason']}, exit code {told['code']}"
        return State(_phase_ec2(attempt, told), detail, started, outcome[1], _seconds(started, outcome[1]), id=attempt.id)
    if found is None:
        # An instance is listed for about an hour after its end.
        if attempt.id is None:
            return State(Phase.ABSENT)
        wrote = s3.read(aws, f"runs/{attempt.run}/log.txt")  # once a minute: the best guess at the end
        ended = max(wrote[1], started) if wrote else None
        return State(Phase.LOST, "ended without a word", started, ended, _seconds(started, ended), id=attempt.id)
    name = found["State"]["Name"]
    if name in ("terminated", "stopped"):
        reason = found.get("StateReason", {}).get("Message", "") or found.get("StateTransitionReason", "")
        at = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", found.get("StateTransitionReason", ""))
        ended = datetime.fromisoformat(at[1]).replace(tzinfo=UTC) if at else now()
        phase = Phase.LOST if attempt.spot or "spot" in reason.lower() else Phase.STOPPED
        return State(phase, reason or "terminated", started, ended, _seconds(started, ended), id=found["InstanceId"])
    return State(Phase.RUNNING, name, started, None, _seconds(started, now()), id=found["InstanceId"])


def _phase_ec2(attempt: Attempt, told: dict[str, Any]) -> Phase:
    """Of what an instance said last: its code, the trainer's or the set-up's, and why it ended (user_data.sh)."""
    if told["code"] == OK:
        return Phase.COMPLETE
    if told["reason"] in ("asked to stop", "time limit"):
        return Phase.STOPPED
    return Phase.LOST if told["code"] == RESUME else Phase.FAILED


def _observe_training(aws: Aws, attempt: Attempt) -> State:
    found = aws.find("sagemaker", "DescribeTrainingJob", NOT_FOUND, TrainingJobName=attempt.job)
    if found is None:
        return State(Phase.ABSENT)
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
    found = aws.find("sagemaker", "DescribeHyperParameterTuningJob", NOT_FOUND, HyperParameterTuningJobName=attempt.job)
    if found is None:
        return State(Phase.ABSENT)
    trials = trial_jobs(aws, attempt)
    seconds = sum(_seconds(trial.get("TrainingStartTime"), trial.get("TrainingEndTime") or now()) for trial in trials)
    counts = found.get("TrainingJobStatusCounters", {})
    detail = found.get("FailureReason") or ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return State(
        _phase(found["HyperParameterTuningJobStatus"]),
        detail,
        found.get("CreationTime"),
        found.get("HyperParameterTuningEndTime"),
        seconds * attempt.instances,
        id=found["HyperParameterTuningJobArn"],
    )


def trial_jobs(aws: Aws, attempt: Attempt) -> list[dict[str, Any]]:
    """The trials of a tuning job, as SageMaker lists them."""
    key = "TrainingJobSummaries"
    return list(aws.pages("sagemaker", "ListTrainingJobsForHyperParameterTuningJob", key, HyperParameterTuningJobName=attempt.job))


def _observe_notebook(aws: Aws, attempt: Attempt) -> State:
    found = aws.find("sagemaker", "DescribeNotebookInstance", NOT_FOUND, NotebookInstanceName=attempt.job)
    if found is None:
        return State(Phase.ABSENT)
    status = found["NotebookInstanceStatus"]
    phase = Phase.STOPPED if status in ("Stopped", "Stopping") else Phase.FAILED if status == "Failed" else Phase.RUNNING
    started = found.get("LastModifiedTime")  # it changes when a notebook is started or stopped
    seconds = _seconds(started, now()) if phase is Phase.RUNNING else 0.0
    return State(phase, found.get("FailureReason") or status, started, None, seconds, id=found["NotebookInstanceArn"])


def _phase(status: str) -> Phase:
    """Of a SageMaker job's status."""
    return {"Completed": Phase.COMPLETE, "Stopped": Phase.STOPPED, "Failed": Phase.FAILED}.get(status, Phase.RUNNING)


def _seconds(start: datetime | None, end: datetime | None) -> float:
    return (end - start).total_seconds() if start and end else 0.0


def dollars(attempt: Attempt, state: State) -> float | None:
    """What the attempt has cost so far, by the prices noted when it was sent; None where they are unknown. An estimate."""
    hour = attempt.price.spot if attempt.spot and not state.discounted else attempt.price.on_demand
    return None if hour is None else hour * state.machine_seconds / 3600
