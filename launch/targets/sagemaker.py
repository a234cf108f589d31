"""SageMaker as a target: what its targets share, and training jobs on one or several machines.

Requests are pure functions of a Spec: plain data, the same for `plan`, `submit` and `rehearse`.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from launch.cloud import hyperparameters as codec
from launch.cloud import quotas, source
from launch.cloud.logs import TRAINING_GROUP, LogReader
from launch.cloud.ownership import ENDED, NOT_FOUND
from launch.cloud.prices import HOURS_A_MONTH, ML_GB_MONTH
from launch.cloud.registries import registry_of
from launch.cloud.remedies import DENIED
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.targets.attempt import (
    TAKEN,
    Attempt,
    Figures,
    Noted,
    Phase,
    State,
    now,
    seconds_between,
)
from launch.targets.base import Spec, Target, TargetConfig
from launch.targets.instance_types import check_trains, gpus, has_gpu, local_gb, names_in, processes
from launch.targets.inventory import Inventory
from launch.targets.questions import Question, quota
from launch.targets.rented import Machines, Rented, rented
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings.config import Config, setting

PYTORCH = "2.13"  # as on the AMI of target=ec2; tests/ends.py has the end of its support
CUDA = "cu133"

# AWS's image runs the toolkit's `train` under a shell that doesn't pass SIGTERM on. This one sends
# it to the whole process group: the toolkit ignores it, the trainer saves, and the container lives
# until the toolkit has seen the trainer end. AWS's limits: one line, 256 characters.
ENTRYPOINT = ["bash", "-c"]
ON_STOP = (
    "set -m; (trap '' TERM; exec train) & job=$!; set +m; "
    "trap 'kill -TERM -- -$job' TERM; wait $job; code=$?; "
    "while [ $code -eq 143 ] && kill -0 $job 2>&-; do wait $job; code=$?; done; exit $code"
)

CHECKPOINTS = "/opt/ml/checkpoints"  # as in conf/platform/sagemaker.yaml
CHANNEL = "training"  # holds the folders train, valid and test
RUNNING = ("InProgress", "Stopping")  # TrainingJobStatus of jobs that cost money
STARTING = r"\b(Pending|Updating)\b"  # statuses of a notebook that can't be stopped yet
NO_CAPACITY = "CapacityError"  # begins FailureReason where SageMaker found no machine free
# SecondaryStatus of a job that was stopped by a limit, in our words.
ENDS = {
    "MaxRuntimeExceeded": "MaxRuntimeExceeded: target.hours, or what its ceiling left, is over",
    "MaxWaitTimeExceeded": (
        "MaxWaitTimeExceeded: target.wait_hours is over, training and waiting for a spot machine "
        "together; submit it again with target.spot=false, or later"
    ),
}
WEIGHTS_CHANNEL = "weights"  # holds the files of model.weights_dir

_NOT_FOR_A_JOB = re.compile(
    r"[+~]*(data\.(root|train|valid|test)|platform|sweep(\..*)?)(=.*)?"
    r"|[+]*model\.weights_dir=(?!/opt/).*"
)


class OnSageMaker(Target):
    """What all targets at SageMaker have in common."""

    platform = "sagemaker"
    logs_late = True
    use: ClassVar[str] = "training job"  # the machines' use, in the words of SageMaker's quotas
    thing: ClassVar[str]  # its name in SageMaker's operations: Describe..., Stop...
    page: ClassVar[str]  # of the console
    log_group: ClassVar[str] = TRAINING_GROUP
    log_streams: ClassVar[str] = "{job}/"  # how their names begin; the host's name follows

    def check(self, target: Any) -> None:
        if bool(target.subnets) != bool(target.groups):
            raise UserError(
                f"target.subnet={target.subnet} with target.security_groups="
                f"{target.security_groups}: SageMaker takes both or none; give the other one too"
            )

    def data_root(self, data: str) -> str:
        return f"/opt/ml/input/data/{CHANNEL}"

    def weights_root(self, weights: str) -> str:
        return f"/opt/ml/input/data/{WEIGHTS_CHANNEL}"

    def questions(self, spec: Spec) -> list[Question]:
        use = f"spot {self.use}" if spec.spot else self.use
        parallel = self.trials(self.requests(spec)[0])[1]
        count = spec.instances * parallel
        return [quota(quotas.of_sagemaker(spec.instance_types[0], use, count))]

    def described(self, aws: Aws, attempt: Attempt) -> dict[str, Any] | None:
        """Return SageMaker's description of an attempt; None where SageMaker doesn't know it."""
        name = {f"{self.thing}Name": attempt.job}
        return aws.find("sagemaker", f"Describe{self.thing}", NOT_FOUND, **name)

    def observe(self, aws: Aws, attempt: Attempt) -> State:
        if attempt.refused == TAKEN:  # the job of this name at SageMaker is not ours
            return attempt.unseen()
        described = self.described(aws, attempt)
        if described is None:
            return attempt.unseen()
        return self.state(aws, attempt, described)

    def listed(self, inventory: Inventory, noted: Noted) -> State | None:
        if noted.state is not None or noted.attempt.refused == TAKEN:
            return noted.state
        described = self.of_listing(inventory, noted.attempt)
        if described is None:
            return None
        return self.state(inventory.aws, noted.attempt, described)

    def of_listing(self, inventory: Inventory, attempt: Attempt) -> dict[str, Any] | None:
        """Return an attempt's description from listings; None where they don't say enough."""
        return None

    @abstractmethod
    def state(self, aws: Aws, attempt: Attempt, described: dict[str, Any]) -> State:
        """Return the state of an attempt by SageMaker's description."""

    def stop_running(self, aws: Aws, attempt: Attempt, state: State, at_once: bool) -> None:
        if state.detail == "Stopping":
            log.info("%s is stopping already", attempt.job)
            return
        name = {f"{self.thing}Name": attempt.job}
        try:
            answer = aws.find("sagemaker", f"Stop{self.thing}", NOT_FOUND, **name)
        except AwsError as error:
            if error.code != ENDED:
                raise
            if re.search(STARTING, error.message):
                raise UserError(
                    f"{attempt.job} is still starting, and SageMaker can't stop it yet "
                    f"({error.message}); start the same command again in some minutes"
                ) from error
            log.info("%s has ended meanwhile, or is about to (%s)", attempt.job, error.message)
            return
        if answer is None:
            raise UserError(
                f"{attempt.job}: SageMaker does not list it yet; "
                "start the same command again in a minute"
            )
        log.info(
            "asked SageMaker to stop %s: a training saves and ends within two minutes", attempt.job
        )

    def log_reader(self, aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
        prefix = self.log_streams.format(job=attempt.job)
        several = attempt.instances > 1 or not prefix.endswith("/")
        reader = LogReader(aws, self.log_group, prefix)

        def text(event: dict[str, Any]) -> str:
            if not several:
                return str(event["message"])
            return f"{event['logStreamName'].removeprefix(prefix)}: {event['message']}"

        return lambda: [text(event) for event in reader.read()]

    def console(self, attempt: Attempt, region: str) -> str:
        return f"sagemaker/home?region={region}#/{self.page}/{attempt.job}"


@dataclass
class SageMakerConfig(TargetConfig):
    instances: int = setting(at_least=1, at_most=20)
    spot: bool = setting()
    max_dollars: float | None = setting(above=0, at_most=1000000)
    wait_hours: float = setting(above=0, at_most=240)
    image: str | None = setting()
    disk_gb: int = setting(at_least=1, at_most=16384)
    retries: int = setting(at_least=1, at_most=30)
    wheels: bool | None = setting()


class SageMaker(OnSageMaker):
    """A training job."""

    config = SageMakerConfig
    most_types: ClassVar[int] = 5  # instance types in one request: SageMaker's limit
    role = "training"
    thing = "TrainingJob"
    page = "jobs"

    def check(self, target: SageMakerConfig) -> None:
        super().check(target)
        names = names_in(target.instance_type)
        if len(names) > self.most_types:
            raise UserError(
                f"target.instance_type={target.instance_type} names {len(names)} machines; "
                f"allowed: {self.most_types} at most"
            )
        for name in names:
            check_trains(name)
            disk = local_gb(name)
            if disk is not None and target.disk_gb > disk:
                raise UserError(
                    f"target.disk_gb={target.disk_gb}: {name} has a disk of its own of {disk} GB, "
                    f"and SageMaker gives it no other; allowed: at most {disk}, or another machine"
                )
        if len({(gpus(name), has_gpu(name)) for name in names}) > 1:
            raise UserError(
                f"target.instance_type={target.instance_type}: these have different numbers of "
                "GPUs, and so would train in different numbers of processes; name machines that "
                "have the same"
            )
        if target.spot and target.wait_hours < target.hours:
            raise UserError(
                f"target.wait_hours={target.wait_hours:g} is less than target.hours="
                f"{target.hours:g}: it counts training and waiting together; "
                "allowed: target.wait_hours >= target.hours"
            )

    def stands_in(self, target: SageMakerConfig) -> tuple[list[str], bool | None]:
        if not target.subnets:
            return [], None
        return target.subnets, False  # in them SageMaker's machines get no public address

    def requests(self, spec: Spec) -> list[Request]:
        return [training_job(spec)]

    def parts_per_hour(self, spec: Spec) -> float:
        return checked(spec).disk_gb * ML_GB_MONTH / HOURS_A_MONTH

    def state(self, aws: Aws, attempt: Attempt, described: dict[str, Any]) -> State:
        started, ended = described.get("TrainingStartTime"), described.get("TrainingEndTime")
        billed = described.get("BillableTimeInSeconds")
        seconds = seconds_between(started, ended or now()) if billed is None else float(billed)
        phase = job_phase(described["TrainingJobStatus"])
        detail = described.get("FailureReason") or described.get("SecondaryStatus", "")
        if phase is Phase.FAILED and detail.startswith(NO_CAPACITY):
            phase = Phase.NO_CAPACITY
        return State(
            phase,
            ENDS.get(detail, detail),
            started,
            ended,
            seconds * attempt.instances,
            discounted=billed is not None,
            id=described["TrainingJobArn"],
        )

    def results(self, aws: Aws, attempt: Attempt) -> str:
        return job_results(attempt, attempt.job)

    def of_listing(self, inventory: Inventory, attempt: Attempt) -> dict[str, Any] | None:
        try:
            return inventory.training_jobs().get(attempt.job)
        except AwsError as error:
            if not re.fullmatch(DENIED, error.code):
                raise
            return None  # a user who may not search may still ask about each job

    def figures(self, inventory: Inventory, attempt: Attempt) -> Figures:
        """Return the last value of each metric that SageMaker has read from the log."""
        job = self.of_listing(inventory, attempt) or self.described(inventory.aws, attempt) or {}
        metrics = job.get("FinalMetricDataList", [])
        values = {metric["MetricName"]: float(metric["Value"]) for metric in metrics}
        epochs = values.get("epoch")
        return Figures(
            valid=values.get("valid_top1"),
            test=values.get("test_top1"),
            epochs=None if epochs is None else round(epochs),
            seconds=seconds_between(job.get("TrainingStartTime"), job.get("TrainingEndTime"))
            or None,
        )

    @classmethod
    def rented(cls, inventory: Inventory) -> Iterator[Rented]:
        """Yield the running training jobs, including the trials of tuning jobs."""
        for name, job in inventory.training_jobs().items():
            if job["TrainingJobStatus"] not in RUNNING:
                continue
            taken = preferred_machine(job)
            machines = Machines(
                taken["InstanceType"],
                job.get("TrainingStartTime"),
                taken["InstanceCount"],
                job.get("EnableManagedSpotTraining", False),
            )
            place = job.get("OutputDataConfig", {}).get("S3OutputPath", "")
            run = place.partition("/runs/")[2].partition("/")[0]
            hour = inventory.price_of(taken["InstanceType"], run)
            yield rented("training", name, machines, hour, run or None)


TARGETS = (SageMaker("sagemaker"), SageMaker("sagemaker_multi"))


def job_phase(status: str) -> Phase:
    """Return the phase of a SageMaker job by its status."""
    phases = {"Completed": Phase.COMPLETE, "Stopped": Phase.STOPPED, "Failed": Phase.FAILED}
    return phases.get(status, Phase.RUNNING)


def job_results(attempt: Attempt, job: str) -> str:
    """Return the key prefix of a training job's model.tar.gz and output.tar.gz."""
    return f"runs/{attempt.run}/output/{job}/output/"


# --- the request ---


def training_job(spec: Spec) -> Request:
    """Return the CreateTrainingJob request, for one or several machines.

    Raise UserError for settings that such a job can't take.
    """
    target = checked(spec)
    parameters: dict[str, Any] = {
        "TrainingJobName": spec.job_name,
        "HyperParameters": codec.encode([*for_job(spec.overrides), *spec.price_words])
        | start(spec, target),
        **definition(spec, target),
        "ResourceConfig": machines(spec, target),
        "Tags": spec.tag_list,
    }
    parameters["AlgorithmSpecification"] |= {
        "ContainerEntrypoint": ENTRYPOINT,
        "ContainerArguments": [ON_STOP],
    }
    return Request("sagemaker", "CreateTrainingJob", parameters)


def image(target: SageMakerConfig, region: str) -> str:
    """Return the URI of the container: the target's own, or AWS's for the region and machine.

    Raise UserError where AWS has none.
    """
    if target.image is not None:
        return target.image
    device = CUDA if has_gpu(first_type(target)) else "cpu"
    registry = registry_of(region, "give one of AWS's for PyTorch as target.image=URI")
    return f"{registry}/pytorch:{PYTORCH}-{device}-amzn2023-sagemaker"


def preferred_machine(definition: dict[str, Any]) -> dict[str, Any]:
    """Return InstanceType and InstanceCount of a job: those that it has, else the preferred ones.

    definition: of CreateTrainingJob or of a trial, or SageMaker's description of a job.
    """
    tried_in_turn = definition.get("HyperParameterTuningResourceConfig", {}).get("InstanceConfigs")
    if tried_in_turn:
        return dict(tried_in_turn[0])
    config = definition["ResourceConfig"]
    if "SelectedInstanceType" in config:
        return {
            "InstanceType": config["SelectedInstanceType"],
            "InstanceCount": config["SelectedInstanceCount"],
        }
    return dict(config.get("InstancePreferences", [config])[0])


def first_type(target: SageMakerConfig) -> str:
    """Return the preferred instance type; the others have as many GPUs."""
    return names_in(target.instance_type)[0]


def machines(spec: Spec, target: SageMakerConfig) -> dict[str, Any]:
    """Return the machines of a training job: of one type, or of the first type that is free."""
    volume: dict[str, Any] = {"VolumeSizeInGB": target.disk_gb}
    # AWS takes no key for a machine's local disks: their hardware encrypts them.
    if target.kms_key and all(local_gb(name) is None for name in names_in(target.instance_type)):
        volume["VolumeKmsKeyId"] = target.kms_key
    counted = [
        {"InstanceType": name, "InstanceCount": target.instances} for name in spec.instance_types
    ]
    if len(counted) == 1:
        return counted[0] | volume
    return {"InstancePreferences": counted} | volume


def checked(spec: Spec) -> SageMakerConfig:
    """Return the target's settings.

    Raise UserError for settings of the trainer that are valid, but not for a job.
    """
    target = spec.target
    assert isinstance(target, SageMakerConfig)
    check_settings(spec.config, target)
    return target


def check_settings(config: Config, target: SageMakerConfig) -> None:
    """Raise UserError for settings that are valid, but not for such a job."""
    if config.train.device == "cuda" and not has_gpu(first_type(target)):
        raise UserError(
            f"train.device=cuda: {target.instance_type} has no GPU; "
            "give target.instance_type=ml.g4dn.xlarge, or train.device=auto"
        )
    alone = config.train.processes == 1 and target.instances == 1
    started = target.instances * gpus(first_type(target))
    if config.train.processes not in (None, started) and not alone:
        raise UserError(
            f"train.processes={config.train.processes}: on {target.instances} x "
            f"{target.instance_type} {started} would run, one for each GPU; "
            "leave train.processes out"
        )
    for key in ("run_dir", "runs", "checkpoints", "package"):
        place = getattr(config.platform, key)
        if place is not None and not place.startswith("/opt/ml/"):
            raise UserError(
                f"platform.{key}={place}: what lies outside /opt/ml is lost when the job ends; "
                "leave platform.* to platform=sagemaker"
            )
    if config.platform.checkpoints != CHECKPOINTS:
        raise UserError(
            f"platform.checkpoints={config.platform.checkpoints}: SageMaker keeps {CHECKPOINTS} "
            "only; leave platform.* to platform=sagemaker"
        )


def for_job(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that a job takes.

    Not paths, which the container sets, nor the search space, which the tuner has.
    """
    return [override for override in overrides if not _NOT_FOR_A_JOB.fullmatch(override)]


def start(spec: Spec, target: SageMakerConfig) -> dict[str, str]:
    """Return the hyperparameters of SageMaker's toolkit itself, JSON like all others.

    They name the program to run, and ask for torchrun where there are several machines or GPUs.
    """
    values = {
        "sagemaker_program": source.ENTRY_POINT,
        "sagemaker_submit_directory": spec.uri("source", f"{spec.source}.tar.gz"),
        "sagemaker_region": spec.region,
    }
    texts = {key: codec.encode_value(text) for key, text in values.items()}
    if target.instances > 1 or processes(first_type(target), spec.config) > 1:
        texts |= {
            "sagemaker_torch_distributed_enabled": "true",
            "sagemaker_instance_type": codec.encode_value(first_type(target)),
            "sagemaker_distribution_instance_groups": '["homogeneousCluster"]',
        }
    return texts


def channel(name: str, uri: str) -> dict[str, Any]:
    """Return the channel that copies the objects below an S3 URI into the container."""
    return {
        "ChannelName": name,
        "DataSource": {
            "S3DataSource": {
                "S3DataType": "S3Prefix",
                "S3Uri": f"{uri.rstrip('/')}/",
                "S3DataDistributionType": "FullyReplicated",
            }
        },
        "InputMode": "File",
    }


def network(target: SageMakerConfig) -> dict[str, Any]:
    """Return the user's own network for a job's machines, {} where none is given."""
    if not target.subnets:
        return {}
    return {"VpcConfig": {"Subnets": target.subnets, "SecurityGroupIds": target.groups}}


def definition(spec: Spec, target: SageMakerConfig) -> dict[str, Any]:
    """Return the parameters that a training job and a trial of a tuning job have in common."""
    inputs = [
        channel(name, uri)
        for name, uri in (
            (CHANNEL, spec.data_uri),
            (WEIGHTS_CHANNEL, spec.weights and spec.uri("data", spec.weights)),
            (source.WHEELS_CHANNEL, spec.wheels and spec.uri("data", spec.wheels)),
        )
        if uri is not None
    ]
    channels = {"InputDataConfig": inputs} if inputs else {}
    limits = {"MaxRuntimeInSeconds": round(3600 * spec.hours)}
    if target.spot:
        limits["MaxWaitTimeInSeconds"] = round(3600 * target.wait_hours)
    output = {"S3OutputPath": spec.uri("runs", spec.run, "output")}
    if target.kms_key:
        output["KmsKeyId"] = target.kms_key
    environment = {"PYTHONUNBUFFERED": "1"}
    if spec.revision:
        environment["PACKHORSE_REVISION"] = spec.revision
    return {
        "AlgorithmSpecification": {
            "TrainingImage": image(target, spec.region),
            "TrainingInputMode": "File",
            "MetricDefinitions": settings.metric_definitions(),
        },
        "RoleArn": spec.role("training"),
        **channels,
        "OutputDataConfig": output,
        **network(target),
        "StoppingCondition": limits,
        "EnableManagedSpotTraining": target.spot,
        "CheckpointConfig": {
            "S3Uri": spec.uri("runs", spec.run, "checkpoints"),
            "LocalPath": CHECKPOINTS,
        },
        "RetryStrategy": {"MaximumRetryAttempts": target.retries},
        "Environment": environment,
    }
