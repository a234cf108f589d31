"""One EC2 instance: everything makes it end by itself and stay closed.

What the instance reads from and writes to the bucket (user_data.sh), below runs/RUN/:
`checkpoints/` and `log.txt` once a minute, `output/` (model package, report, metrics, result),
`attempts/N.json` ({"attempt", "code", "reason"}) when attempt N has ended, `attempts/N.machine`
which machine has it. `attempts/N.stop` asks it to stop; a note of a later attempt
(`M.request.json`) ends it without another word.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from launch.cloud import quotas, s3
from launch.cloud.ownership import instances
from launch.cloud.request import Request
from launch.cloud.session import Aws
from launch.targets.attempt import (
    YOUNG,
    Attempt,
    Phase,
    State,
    attempt_key,
    loads,
    now,
    seconds_between,
)
from launch.targets.base import Spec, Target, TargetConfig, tag_list, tag_values
from launch.targets.questions import Question, capacity, quota, way_to_s3
from launch.targets.rented import Machines, Rented, rented
from launch.targets.script import fill
from trainer.common.console import log
from trainer.common.errors import OK, RESUME, UserError
from trainer.settings.config import Config, setting

USER_DATA_BYTES = 16384  # EC2's limit, before base64
ROOT_DEVICE = "/dev/xvda"  # of Amazon Linux
NO_IMAGE = "ami-00000000000000000"  # stands in a plan where AWS can't be asked
UPLOAD_EVERY = 60  # seconds
# Seconds before the time limit, in which a run saves and uploads; a tenth of short limits.
GRACE = 300
PATIENCE = timedelta(minutes=10)  # past its time limit, in which a machine ends itself

# Why EC2 ended an instance: the codes of StateReason (EC2 API reference, "StateReason").
RECLAIMED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")
NO_CAPACITY = "Server.InsufficientInstanceCapacity"
BY_HAND = "Client.UserInitiatedShutdown"  # `stop --now`, the console, or any other call
BY_ITSELF = "Client.InstanceInitiatedShutdown"

SPOT_NOTICE = "spot notice"  # in user_data.sh's words


@dataclass
class Ec2Config(TargetConfig):
    spot: bool = setting()
    image: str | None = setting()
    ssm_parameter: str = setting()
    disk_gb: int = setting(at_least=75, at_most=16384)
    subnet: str | None = setting()


class Ec2(Target):
    config = Ec2Config
    role = "ec2"
    platform = "ec2"

    def data_root(self, data: str) -> str:
        return f"/opt/dlami/nvme/data/{data}"

    def looked_up(self, aws: Aws | None, spec: Spec) -> Spec:
        """Return the spec with an image: the one given, else AWS's newest."""
        target = _config(spec)
        if target.image is not None:
            return spec
        if aws is None:
            return _with_image(spec, NO_IMAGE)
        answer = aws.call("ssm", "GetParameter", Name=target.ssm_parameter)
        return _with_image(spec, str(answer["Parameter"]["Value"]))

    def pinned(self, spec: Spec, attempt: Attempt) -> Spec:
        """Return the spec with an attempt's image: a newer one could change what comes out."""
        return _with_image(spec, attempt.requests[0].parameters["ImageId"])

    def requests(self, spec: Spec) -> list[Request]:
        return [run_instances(spec, user_data(spec))]

    def questions(self, spec: Spec) -> list[Question]:
        target = _config(spec)
        asked = [
            capacity(target.instance_type, target.spot, spec.instances),
            way_to_s3(target.subnet),
        ]
        counted = quotas.of_ec2(target.instance_type, target.spot, spec.instances)
        if counted is not None:
            asked.insert(0, quota(counted))
        return asked

    def spot_price(self, aws: Aws, spec: Spec) -> float | None:
        """Return the lowest of the region's zones."""
        history = aws.call(
            "ec2",
            "DescribeSpotPriceHistory",
            InstanceTypes=[spec.target.instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=now(),
            MaxResults=20,
        )["SpotPriceHistory"]
        return min((float(entry["SpotPrice"]) for entry in history), default=None)

    def observe(self, aws: Aws, attempt: Attempt) -> State:
        instance = _instance_of(aws, attempt)
        outcome = s3.read(aws, attempt.key_of("json"))
        if outcome is not None:
            return _ended_with_word(attempt, instance, json.loads(outcome[0]), outcome[1])
        if instance is None:
            return _unlisted(aws, attempt)
        name, started = instance["State"]["Name"], instance["LaunchTime"]
        if name in ("terminated", "stopped"):
            return _ended_without_word(aws, attempt, instance)
        seconds = seconds_between(started, now())
        return State(Phase.RUNNING, name, started, None, seconds, id=instance["InstanceId"])

    def stop_running(self, aws: Aws, attempt: Attempt, state: State, at_once: bool) -> None:
        # Noted as any other stop, so that nobody takes a machine that is terminated for reclaimed.
        self.stop_early(aws, attempt)
        unseen = r"InvalidInstanceID\.NotFound"
        if not at_once:
            text = (
                "asked %s to stop: it looks once a minute, saves, uploads and terminates; "
                "--now does not wait for it"
            )
        elif aws.find("ec2", "TerminateInstances", unseen, InstanceIds=[str(state.id)]) is None:
            text = "EC2 does not list %s yet: it is asked to stop, and ends when it has started"
        else:
            text = "terminating %s; what it did since its last checkpoint is lost"
        log.info(text, state.id)

    def stop_early(self, aws: Aws, attempt: Attempt) -> bool:
        s3.write(aws, attempt.key_of("stop"), b"")
        return True

    def log_reader(self, aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
        shown = 0

        def read() -> list[str]:
            nonlocal shown
            entry = s3.read(aws, f"runs/{attempt.run}/log.txt")
            text = entry[0].decode(errors="replace") if entry else ""
            complete = text[: text.rfind("\n") + 1]  # the last line may be half written
            fresh, shown = complete[shown:], max(shown, len(complete))
            return fresh.splitlines()

        return read

    def results(self, aws: Aws, attempt: Attempt) -> str:
        return f"runs/{attempt.run}/output/"

    def accuracy(self, aws: Aws, attempt: Attempt) -> float | None:
        entry = s3.read(aws, f"runs/{attempt.run}/output/result.json")
        return float(json.loads(entry[0])["top1"]) if entry else None

    def console(self, attempt: Attempt, region: str) -> str:
        return f"ec2/home?region={region}#InstanceDetails:instanceId={attempt.id}"

    def past_limit(self, attempt: Attempt, state: State) -> float:
        if state.phase is not Phase.RUNNING or state.started is None:
            return 0.0
        if state.detail == "shutting-down":
            return 0.0
        past = now() - state.started - timedelta(hours=attempt.hours)
        return past.total_seconds() / 3600 if past > PATIENCE else 0.0

    @classmethod
    def overdue(cls, aws: Aws) -> Iterator[tuple[Attempt, State]]:
        for instance in instances(aws, ("instance-state-name", "running")):
            running = seconds_between(instance["LaunchTime"], now())
            tags = tag_values(instance.get("Tags", []))
            if running < PATIENCE.total_seconds() or not {"run", "attempt"} <= tags.keys():
                continue
            key = attempt_key(tags["run"], int(tags["attempt"]), "request.json")
            noted = s3.read(aws, key)
            if noted is None:
                continue
            attempt = loads(noted[0])
            state = State(
                Phase.RUNNING,
                "running",
                instance["LaunchTime"],
                machine_seconds=running,
                id=instance["InstanceId"],
            )
            if cls(attempt.target).past_limit(attempt, state):
                yield attempt, state

    @classmethod
    def rented(cls, aws: Aws) -> Iterator[Rented]:
        for instance in instances(aws):
            if instance["State"]["Name"] in ("pending", "running"):
                machines = Machines(
                    instance["InstanceType"],
                    instance["LaunchTime"],
                    spot=instance.get("InstanceLifecycle") == "spot",
                )
                run = tag_values(instance.get("Tags", [])).get("run")
                yield rented(aws, "machine", instance["InstanceId"], machines, run)


TARGETS = (Ec2("ec2"),)


# --- the request ---


def run_instances(spec: Spec, user_data: str) -> Request:
    """Return the request for one instance.

    The same attempt with the same content has the same ClientToken, so it can't start twice.
    """
    target = _config(spec)
    tags = tag_list({"Name": spec.job_name} | spec.tags | {"attempt": str(spec.attempt)})
    tagged = ["instance", "volume", "network-interface"]
    root = {
        "VolumeSize": target.disk_gb,
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    parameters: dict[str, Any] = {
        "ImageId": target.image,
        "InstanceType": target.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": user_data,
        "IamInstanceProfile": {"Name": f"{spec.project}-ec2"},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "HttpEndpoint": "enabled",
        },
        "BlockDeviceMappings": [{"DeviceName": ROOT_DEVICE, "Ebs": root}],
    }
    if target.spot:
        tagged.append("spot-instances-request")
    parameters["TagSpecifications"] = [{"ResourceType": each, "Tags": tags} for each in tagged]
    if target.subnet:
        parameters["SubnetId"] = target.subnet
    if target.spot:
        parameters["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
            },
        }
    content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    parameters["ClientToken"] = f"{spec.run}-{spec.attempt}-{content[:8]}"
    return Request("ec2", "RunInstances", parameters)


def user_data(spec: Spec, upload_every: int = UPLOAD_EVERY) -> str:
    """Return the script that the instance runs at each boot.

    upload_every: seconds. Raise UserError where it comes out longer than EC2 allows.
    """
    limit = round(3600 * spec.target.hours)
    script = fill(
        "user_data.sh",
        run=spec.run,
        attempt=spec.attempt,
        bucket=spec.uri(),
        region=spec.region,
        source_sha256=spec.source,
        data=spec.data or "",
        data_root=spec.data_root or "",
        weights=spec.weights or "",
        weights_root=spec.weights_root or "",
        extras=",".join(spec.extras) or "train",
        limit=limit,
        grace=min(GRACE, limit // 10),
        every=upload_every,
        processes=processes(spec.config),
        arguments=arguments(spec),
        revision=spec.revision or "",
    )
    size = len(script.encode())
    if size > USER_DATA_BYTES:
        raise UserError(
            f"user data: {size} bytes, EC2 allows {USER_DATA_BYTES}; put settings into a file of "
            "conf/experiment and give experiment=NAME"
        )
    return script


def processes(config: Config) -> str:
    """Return how many processes train; empty: as many as the instance has GPUs."""
    if config.train.device == "cpu":
        return "1"
    return str(config.train.processes or "")


def arguments(spec: Spec) -> list[str]:
    """Return the trainer's command line.

    The user's overrides, then where things lie on the instance, whatever the overrides say.
    """
    places = [
        "platform=ec2",
        f"name='{spec.run}'",
        f"platform.run_dir=/opt/dlami/nvme/runs/{spec.run}",
        "platform.checkpoints=null",
        "platform.package=null",
    ]
    if spec.data_root:
        places.append(f"data.root={spec.data_root}")
    if spec.weights_root:
        places.append(f"model.weights_dir={spec.weights_root}")
    return [*spec.overrides, *places]


def _config(spec: Spec) -> Ec2Config:
    assert isinstance(spec.target, Ec2Config)
    return spec.target


def _with_image(spec: Spec, image: str) -> Spec:
    return dataclasses.replace(spec, target=dataclasses.replace(_config(spec), image=image))


# --- the instance ---


def _instance_of(aws: Aws, attempt: Attempt) -> dict[str, Any] | None:
    """Return the attempt's machine: by its id if known, since its tags may be seen later."""
    if attempt.id is None:
        tags = ("tag:run", attempt.run), ("tag:attempt", str(attempt.number))
        return next(iter(instances(aws, *tags)), None)
    named = [{"Name": "instance-id", "Values": [attempt.id]}]
    groups = aws.pages("ec2", "DescribeInstances", "Reservations", Filters=named)
    return next((each for group in groups for each in group["Instances"]), None)


def _asked_to_stop(aws: Aws, attempt: Attempt) -> bool:
    return s3.exists(aws, attempt.key_of("stop"))


def _ended_with_word(
    attempt: Attempt, instance: dict[str, Any] | None, word: dict[str, Any], written: datetime
) -> State:
    """Return the state of an attempt that noted its end. written: when."""
    started = datetime.fromisoformat(attempt.noted)
    reason = ""
    if instance is not None:
        started = instance["LaunchTime"]
        reason = _reason(instance)
    detail = f"{word['reason']}, exit code {word['code']}"
    seconds = seconds_between(started, written)
    return State(_phase_told(word, reason), detail, started, written, seconds, id=attempt.id)


def _unlisted(aws: Aws, attempt: Attempt) -> State:
    """Return the state of an attempt without a word, whose machine EC2 doesn't list."""
    if attempt.id is None:
        return attempt.unseen()
    started = datetime.fromisoformat(attempt.noted)
    ended = None
    log_entry = s3.read(aws, f"runs/{attempt.run}/log.txt")
    if log_entry is not None:
        ended = max(log_entry[1], started)  # it is written once a minute: the best guess
    alive = ended or attempt.since
    if now() - alive < YOUNG:
        return attempt.unseen(alive)
    phase, detail = Phase.FAILED, "ended without a word; EC2 no longer says why"
    if _asked_to_stop(aws, attempt):
        phase, detail = Phase.STOPPED, "asked to stop"
    return State(phase, detail, started, ended, seconds_between(started, ended), id=attempt.id)


def _ended_without_word(aws: Aws, attempt: Attempt, instance: dict[str, Any]) -> State:
    """Return the state of an attempt without a word, by what EC2 says of its machine."""
    started, reason = instance["LaunchTime"], _reason(instance)
    why = instance.get("StateTransitionReason", "")
    at = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", why)
    ended = datetime.fromisoformat(at[1]).replace(tzinfo=UTC) if at else now()
    seconds = seconds_between(started, ended)
    if reason == NO_CAPACITY:
        seconds = 0.0
    detail = instance.get("StateReason", {}).get("Message", "") or why or "terminated"
    phase = _phase_of_reason(reason)
    if _asked_to_stop(aws, attempt):
        phase = Phase.STOPPED
    elif reason == BY_ITSELF:
        detail += "; without a note: it did not reach the bucket, or another machine has the run"
    return State(phase, detail, started, ended, seconds, id=instance["InstanceId"])


def _reason(instance: dict[str, Any]) -> str:
    """Return AWS's code for why an instance ended, empty where it has none."""
    return str(instance.get("StateReason", {}).get("Code", ""))


def _phase_told(word: dict[str, Any], reason: str) -> Phase:
    """Return the phase by what an instance said last (user_data.sh).

    word: its code, the trainer's or the set-up's, and why it ended. reason: AWS's, or empty.
    """
    if word["code"] == OK:
        return Phase.COMPLETE
    if word["reason"] in ("asked to stop", "time limit"):
        return Phase.STOPPED
    if word["reason"] == SPOT_NOTICE:
        return Phase.LOST
    if word["code"] != RESUME and word["reason"] != "SIGTERM":
        return Phase.FAILED
    return Phase.LOST if reason in RECLAIMED else Phase.STOPPED


def _phase_of_reason(reason: str) -> Phase:
    """Return the phase of an instance that ended without a word, by AWS's reason."""
    if reason in RECLAIMED:
        return Phase.LOST
    phases = {NO_CAPACITY: Phase.NO_CAPACITY, BY_HAND: Phase.STOPPED}
    return phases.get(reason, Phase.FAILED)
