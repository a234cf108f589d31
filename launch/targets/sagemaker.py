"""Training and tuning jobs as requests: pure functions of a Spec, plain data, the same for `plan`, `submit` and `rehearse`."""

import math
import re
from typing import Any

from launch.cloud import hyperparameters as codec
from launch.cloud import source
from launch.cloud.request import Request
from launch.targets.spec import SageMakerTarget, Spec, explained
from launch.verbs.instances import GPUS, has_gpu, processes
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings.compose import check_options
from trainer.settings.config import Config

PYTORCH = "2.13"  # the newest supported image of AWS (2026-11)
CUDA = "cu133"

# Whose registry holds AWS's images in a region (aws/deep-learning-containers, 2026-11); no API tells.
_SHARED = (
    "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 eu-central-1 eu-west-1 eu-west-2 eu-west-3 eu-north-1 "
    "ap-south-1 ap-northeast-1 ap-northeast-2 ap-southeast-1 ap-southeast-2 sa-east-1"
)
REGISTRIES = dict.fromkeys(_SHARED.split(), "763104351884") | {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360",
    "ap-south-2": "772153158452",
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "eu-central-2": "380420809688",
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "mx-central-1": "637423239942",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "us-gov-west-1": "442386744353",
    "us-gov-east-1": "446045086412",
}

# AWS's image runs the toolkit's `train` under a shell that keeps SIGTERM for itself. This one hands it to the whole process group: the toolkit
# ignores it, the trainer saves, and the container lives until the toolkit has seen the trainer end. One line of at most 256 characters: AWS's limits.
ENTRYPOINT = ["bash", "-c"]
ON_STOP = (
    "set -m; (trap '' TERM; exec train) & job=$!; set +m; trap 'kill -TERM -- -$job' TERM; wait $job; code=$?; "
    "while [ $code -eq 143 ] && kill -0 $job 2>&-; do wait $job; code=$?; done; exit $code"
)

CHECKPOINTS = "/opt/ml/checkpoints"  # as in conf/platform/sagemaker.yaml
CHANNEL = "training"  # holds the folders train, valid and test

_NOT_FOR_A_JOB = re.compile(r"[+~]*(data\.(root|train|valid|test)|platform|sweep(\..*)?)(=.*)?")


def training_job(spec: Spec) -> Request:
    """CreateTrainingJob, on one or several machines. Raises UserError for settings that such a job can't carry or do."""
    target = _target(spec)
    parameters: dict[str, Any] = {
        "TrainingJobName": spec.job_name,
        "HyperParameters": codec.encode(_settings(spec.overrides)) | _start(spec, target),
        **_definition(spec, target),
        "Tags": _tags(spec),
    }
    parameters["AlgorithmSpecification"] |= {
        "ContainerEntrypoint": ENTRYPOINT,
        "ContainerArguments": [ON_STOP],
    }
    return Request("sagemaker", "CreateTrainingJob", parameters)


def tuning_job(spec: Spec) -> Request:
    """CreateHyperParameterTuningJob: the same job, with the ranges of the trainer's sweep=NAME; a grid's are lists of the points that it tries here.

    Such jobs can't choose their entrypoint, so a stopped trial is left with the checkpoints that it saves as it goes. Raises UserError as
    `training_job` does, and for a sweep that SageMaker can't do.
    """
    target = _target(spec)
    if target.instances > 1:
        raise UserError(
            f"target.instances={target.instances}: a trial of the tuner trains on one machine; allowed: target.instances=1"
        )
    fixed, swept = space.split(spec.overrides)
    sweep = space.load(spec.config, swept, fixed)
    places = ["platform=sagemaker", *([f"data.root={spec.data_root}"] if spec.data_root else [])]
    with explained(settings.keys()):
        check_options(sweep, [*fixed, *places], swept)
    tuned = {parameter.key for parameter in sweep.space}
    static = codec.encode(
        override
        for override in _settings(fixed)
        if override.partition("=")[0].lstrip("+") not in tuned
    )
    grid = sweep.engine == "grid"
    ranges = parameter_ranges(sweep)
    # A grid has as many trials as it has points, and AWS takes no other number.
    points = math.prod(
        len(entry["Values"]) for entry in ranges.get("CategoricalParameterRanges", [])
    )
    trials = points if grid else sweep.trials
    parameters: dict[str, Any] = {
        "HyperParameterTuningJobName": spec.job_name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Grid" if grid else {"tpe": "Bayesian", "random": "Random"}[sweep.sampler],
            "HyperParameterTuningJobObjective": {
                "Type": "Minimize" if sweep.minimize else "Maximize",
                "MetricName": sweep.objective,
            },
            "ResourceLimits": {
                "MaxNumberOfTrainingJobs": trials,
                "MaxParallelTrainingJobs": min(sweep.parallel, trials),
            },
            "ParameterRanges": ranges,
            "TrainingJobEarlyStoppingType": "Off" if grid or sweep.pruner == "none" else "Auto",
            "RandomSeed": sweep.seed,
        },
        "TrainingJobDefinition": {
            "StaticHyperParameters": static | _start(spec, target),
            **_definition(spec, target),
        },
        "Tags": _tags(spec),
    }
    return Request("sagemaker", "CreateHyperParameterTuningJob", parameters)


def parameter_ranges(sweep: space.Sweep) -> dict[str, Any]:
    """The space as AWS writes it: bounds and choices as strings, each choice as the codec carries it."""
    ranges: dict[str, list[dict[str, Any]]] = {}
    for parameter in sweep.space:
        if isinstance(parameter, space.Categorical) or sweep.engine == "grid":
            texts = [
                space.override(parameter.key, choice).partition("=")[2]
                for choice in space.grid(parameter, sweep.points)
            ]
            ranges.setdefault("CategoricalParameterRanges", []).append(
                {"Name": parameter.key, "Values": [codec.encode_value(text) for text in texts]}
            )
        else:
            kind = (
                "ContinuousParameterRanges"
                if isinstance(parameter, space.Continuous)
                else "IntegerParameterRanges"
            )
            bounds = {"MinValue": str(parameter.low), "MaxValue": str(parameter.high)}
            ranges.setdefault(kind, []).append(
                {
                    "Name": parameter.key,
                    **bounds,
                    "ScalingType": "Logarithmic" if parameter.log else "Linear",
                }
            )
    return ranges


def image(target: SageMakerTarget, region: str) -> str:
    """The URI of the container: the target's own, or AWS's for the region and machine. Raises UserError where AWS has none."""
    if target.image is not None:
        return target.image
    if region not in REGISTRIES:
        raise UserError(
            f"region {region}: the registry of AWS's PyTorch images is not known there; give one of them as target.image=URI"
        )
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{REGISTRIES[region]}.dkr.ecr.{region}.{suffix}/pytorch:{PYTORCH}-{CUDA if has_gpu(target.instance_type) else 'cpu'}-amzn2023-sagemaker"


def check_settings(config: Config, target: SageMakerTarget) -> None:
    """Raises UserError for settings that are right by themselves but not for a job on this target."""
    if config.train.device == "cuda" and not has_gpu(target.instance_type):
        raise UserError(
            f"train.device=cuda: {target.instance_type} has no GPU; give target.instance_type=ml.g4dn.xlarge, or train.device=auto"
        )
    alone = config.train.processes == 1 and target.instances == 1
    started = target.instances * GPUS.get(target.instance_type.removeprefix("ml."), 1)
    if config.train.processes not in (None, started) and not alone:
        raise UserError(
            f"train.processes={config.train.processes}: on {target.instances} x {target.instance_type} {started} would run, "
            "one for each GPU; leave train.processes out"
        )
    for key in ("run_dir", "runs", "checkpoints", "package"):
        place = getattr(config.platform, key)
        if place is not None and not place.startswith("/opt/ml/"):
            raise UserError(
                f"platform.{key}={place}: what lies outside /opt/ml is lost when the job ends; leave platform.* to platform=sagemaker"
            )
    if config.platform.checkpoints != CHECKPOINTS:
        raise UserError(
            f"platform.checkpoints={config.platform.checkpoints}: SageMaker keeps {CHECKPOINTS} only; leave platform.* to platform=sagemaker"
        )


def _target(spec: Spec) -> SageMakerTarget:
    assert isinstance(spec.target, SageMakerTarget)
    check_settings(spec.config, spec.target)
    return spec.target


def _settings(overrides: tuple[str, ...] | list[str]) -> list[str]:
    """The overrides that the job takes: where things lie is the container's to say, and which search space the tuner's."""
    return [override for override in overrides if not _NOT_FOR_A_JOB.fullmatch(override)]


def _start(spec: Spec, target: SageMakerTarget) -> dict[str, str]:
    """The toolkit's own hyperparameters, JSON like all others: what to run, and by torchrun where there are several machines or GPUs."""
    start = {
        "sagemaker_program": source.ENTRY_POINT,
        "sagemaker_submit_directory": spec.uri("source", f"{spec.source}.tar.gz"),
    }
    start |= {"sagemaker_region": spec.region}
    texts = {key: codec.encode_value(text) for key, text in start.items()}
    if target.instances > 1 or processes(target.instance_type, spec.config) > 1:
        texts |= {
            "sagemaker_torch_distributed_enabled": "true",
            "sagemaker_instance_type": codec.encode_value(target.instance_type),
        }
        texts |= {"sagemaker_distribution_instance_groups": '["homogeneousCluster"]'}
    return texts


def _definition(spec: Spec, target: SageMakerTarget) -> dict[str, Any]:
    """What a training job and a trial of a tuning job have in common."""
    seconds = round(3600 * target.hours)
    channel = {
        "ChannelName": CHANNEL,
        "DataSource": {
            "S3DataSource": {
                "S3DataType": "S3Prefix",
                "S3Uri": spec.uri("data", f"{spec.data}/"),
                "S3DataDistributionType": "FullyReplicated",
            }
        },
        "InputMode": "File",
    }
    return {
        "AlgorithmSpecification": {
            "TrainingImage": image(target, spec.region),
            "TrainingInputMode": "File",
            "MetricDefinitions": settings.metric_definitions(),
        },
        "RoleArn": spec.role("training"),
        **({"InputDataConfig": [channel]} if spec.data is not None else {}),
        "OutputDataConfig": {"S3OutputPath": spec.uri("runs", spec.run, "output")},
        "ResourceConfig": {
            "InstanceType": target.instance_type,
            "InstanceCount": target.instances,
            "VolumeSizeInGB": target.disk_gb,
        },
        "StoppingCondition": {
            "MaxRuntimeInSeconds": seconds,
            **({"MaxWaitTimeInSeconds": round(3600 * target.wait_hours)} if target.spot else {}),
        },
        "EnableManagedSpotTraining": target.spot,
        "CheckpointConfig": {
            "S3Uri": spec.uri("runs", spec.run, "checkpoints"),
            "LocalPath": CHECKPOINTS,
        },
        "RetryStrategy": {"MaximumRetryAttempts": target.retries},
        "Environment": {
            "PYTHONUNBUFFERED": "1",
            **({"PACKHORSE_REVISION": spec.revision} if spec.revision else {}),
        },
    }


def _tags(spec: Spec) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in spec.tags.items()]
