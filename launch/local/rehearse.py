"""A rehearsal: the jobs of a request, what would be refused, and what a run lacked.

Nothing here runs a job (launch/local/sagemaker.py does) or prints.
"""

import importlib.util
import math
import random
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from launch.cloud import hyperparameters as codec
from launch.cloud import source
from launch.cloud.request import Request, check
from launch.local.container_entry import CHANNELS
from launch.local.sagemaker import Outcome, TrainingJob, scrape
from launch.targets import sagemaker
from launch.targets.spec import only_here
from trainer.common.errors import UserError, install_command
from trainer.images import table
from trainer.images.names import SPLIT_NAMES
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.settings.config import Config
from trainer.settings.hydra_errors import CONFIG_ERRORS, explain

# Remedies for the toolkit's own messages, where the trainer didn't fail; \1 is the pattern's group.
REMEDIES = {
    r"No matching distribution found for (\S+)": (
        r"requirements.txt: \1 is not installed here; correct it in pyproject.toml, or install it"
    ),
    r"InstallRequirementsError": (
        "requirements.txt: pip refused it (see the log); correct the dependencies in pyproject.toml"
    ),
    r"\(404\)|NoSuchKey": (
        "the source tarball is not at sagemaker_submit_directory: "
        "upload it before the request is sent"
    ),
    r"ReadError|BadGzipFile": (
        "the source tarball can't be unpacked: build it with launch/cloud/source.py"
    ),
    r"can't open file": (
        "sagemaker_program names a file that the tarball lacks: "
        "bring it back, or name it in launch/cloud/source.py"
    ),
    r"ExitCode (?:137|-9)\b": (
        "the trainer was killed, most likely for memory: "
        "take a larger target.instance_type, or lower train.batch_size"
    ),
    r"ExitCode (?:139|-11)\b": (
        "the trainer crashed in native code: "
        "run it here (python -m trainer) with the same settings to see where"
    ),
}
# Prefixes of the toolkit's own messages; all others are the trainer's.
TOOLKIT = ("Framework Error", "InstallRequirementsError", "ExecuteUserScriptError")


def jobs_of(request: Request, trials: int, region: str) -> list[TrainingJob]:
    """Return the training jobs that a request makes.

    These are the job itself, or the first trials of a tuning job, with values sampled like the
    tuner's.
    """
    parameters = request.parameters
    if request.operation == "CreateTrainingJob":
        name, fixed = parameters["TrainingJobName"], parameters["HyperParameters"]
        return [TrainingJob(name, fixed, parameters, region)]
    tuning = parameters["HyperParameterTuningJobConfig"]
    definition = parameters["TrainingJobDefinition"]
    metric = tuning["HyperParameterTuningJobObjective"]["MetricName"]
    fixed = definition["StaticHyperParameters"] | {"_tuning_objective_metric": metric}
    rng = random.Random(tuning["RandomSeed"])
    name = parameters["HyperParameterTuningJobName"]
    samples = [_sample(tuning["ParameterRanges"], rng) for _ in range(trials)]
    return [
        TrainingJob(f"{name}-{number:03d}", fixed | sample, definition, region)
        for number, sample in enumerate(samples, 1)
    ]


def _sample(ranges: dict[str, list[dict[str, Any]]], rng: random.Random) -> dict[str, str]:
    """Return one value of each range, as the strings that SageMaker writes."""
    values = {}
    for kind, entries in ranges.items():
        for entry in entries:
            name = entry["Name"]
            if kind == "CategoricalParameterRanges":
                values[name] = str(rng.choice(entry["Values"]))
                continue
            low, high = float(entry["MinValue"]), float(entry["MaxValue"])
            if entry["ScalingType"] == "Logarithmic":
                value = math.exp(rng.uniform(math.log(low), math.log(high)))
            else:
                value = rng.uniform(low, high)
            if kind == "IntegerParameterRanges":
                value = round(value)
            values[name] = str(value)
    return values


def objective_of(request: Request) -> str | None:
    """Return the metric that a tuning job improves; None of a training job."""
    tuning = request.parameters.get("HyperParameterTuningJobConfig", {})
    objective: str | None = tuning.get("HyperParameterTuningJobObjective", {}).get("MetricName")
    return objective


# --- before a run ---


def preflight(
    request: Request,
    jobs: list[TrainingJob],
    tarball: bytes,
    channels: dict[str, Path],
    config: Config,
) -> None:
    """Raise UserError for what AWS, the container or the trainer in it would refuse.

    It checks what can be known without running anything.
    """
    check(request)
    source.check(tarball)
    for module in ("sagemaker_training", "sagemaker_pytorch_container"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{module}: AWS's training toolkit is not installed; "
                f"{install_command('rehearse')} (it compiles a file: apt-get install gcc)"
            )
    definition = jobs[0].definition
    _check_channels(definition, channels)
    for given, instead in only_here(config, f"/opt/ml/input/data/{sagemaker.CHANNEL}"):
        raise UserError(
            f"{given}: a job doesn't see this machine's files; "
            f"put it into the folder of pictures, and give {instead}"
        )
    _check_metrics(jobs[0], objective_of(request))
    place = definition["CheckpointConfig"].get("LocalPath")
    if place != config.platform.checkpoints:
        raise UserError(
            f"CheckpointConfig.LocalPath={place}: the trainer saves to "
            f"{config.platform.checkpoints}, which SageMaker would not keep"
        )
    for job in jobs:
        _check_start(job, tarball)
        _config(job)


def _check_channels(definition: dict[str, Any], channels: dict[str, Path]) -> None:
    for channel in definition.get("InputDataConfig", []):
        name, uri = channel["ChannelName"], channel["DataSource"]["S3DataSource"]["S3Uri"]
        if name not in CHANNELS:
            allowed = ", ".join(CHANNELS)
            raise UserError(f"channel {name}: the trainer doesn't use it; allowed: {allowed}")
        if not uri.endswith("/"):
            raise UserError(
                f"channel {name}: {uri} also matches every prefix that begins with it; end it "
                "with /"
            )
        if name not in channels or not any(channels[name].iterdir()):
            raise UserError(
                f"channel {name}: {channels.get(name, uri)} holds nothing; "
                "give the folder of pictures with --data DIR"
            )


def _check_metrics(job: TrainingJob, objective: str | None) -> None:
    """Raise UserError unless the metrics' regexes fit the trainer's metric line.

    Each must extract its own value from it, and the objective must be one of them.
    """
    values = {name: float(number) for number, name in enumerate(settings.METRICS, 1)}
    instead = "take trainer.settings.config.metric_definitions()"
    for entry in job.metrics:
        name, regex = entry["Name"], entry["Regex"]
        try:
            groups = re.compile(regex).groups
        except re.error as error:
            raise UserError(
                f"metric {name}: {regex} is no regular expression ({error}); {instead}"
            ) from error
        if groups != 1:
            raise UserError(
                f"metric {name}: {regex} has {groups} groups; "
                "SageMaker takes the value from exactly one"
            )
        if scrape([settings.metric_line(values)], [entry]).get(name) != [values.get(name)]:
            raise UserError(
                f"metric {name}: {regex} doesn't find it in the trainer's line; {instead}"
            )
    if objective is not None and objective not in [entry["Name"] for entry in job.metrics]:
        raise UserError(
            f"objective {objective}: no metric of that name is scraped, so every trial would "
            f"fail; allowed: {', '.join(settings.METRICS)}"
        )


def _check_start(job: TrainingJob, tarball: bytes) -> None:
    """Raise UserError unless the toolkit would start this code, on all hosts as one job."""
    parameters = job.hyperparameters
    distributed = parameters.get("sagemaker_torch_distributed_enabled") == "true"
    if job.instances > 1 and not distributed:
        raise UserError(
            f"{job.instances} machines would each train by themselves: "
            "give sagemaker_torch_distributed_enabled=true"
        )
    program = codec.decode_value(parameters["sagemaker_program"])
    if program != source.ENTRY_POINT:
        raise UserError(
            f"sagemaker_program={program}: the tarball's entry is {source.ENTRY_POINT}; "
            "name that one"
        )
    uri = codec.decode_value(parameters["sagemaker_submit_directory"])
    if uri.rpartition("/")[2] != f"{sha256(tarball).hexdigest()}.tar.gz":
        raise UserError(
            "sagemaker_submit_directory: it names another tarball than this code's; "
            "build the request again"
        )


def _config(job: TrainingJob) -> Config:
    """Return the trainer's settings, composed from the hyperparameters as in the container.

    Raise UserError if the trainer refuses them.
    """
    settings.register()
    names = [channel["ChannelName"] for channel in job.definition.get("InputDataConfig", [])]
    channels = [f"{CHANNELS[name]}=/opt/ml/input/data/{name}" for name in names]
    try:
        return compose([*codec.decode(job.hyperparameters), "platform=sagemaker", *channels])
    except UserError as error:
        raise UserError(f"hyperparameters: {error}") from error
    except CONFIG_ERRORS as error:
        raise UserError(f"hyperparameters: {explain(error, settings.keys())}") from error


# --- after a run ---


def faults_of(job: TrainingJob, outcome: Outcome, channels: dict[str, Path]) -> list[str]:
    """Return what to change after a run, a line each. channels: those of the run."""
    faults = list(outcome.warnings)
    if outcome.stopped:
        return faults
    if any(outcome.codes):
        return [*faults, f"{job.name}: {remedy(outcome)}"]
    expected = expected_metrics(job, channels)
    silent = [name for name in expected if name not in outcome.metrics]
    if silent and not outcome.resumed:
        faults.append(
            f"{job.name}: the log has no line for the metrics {', '.join(silent)}; "
            "print them with trainer.settings.config.metric_line"
        )
    if not outcome.archives["model.tar.gz"]:
        faults.append(
            f"{job.name}: model.tar.gz is empty; the model package goes to platform.package, "
            "which must be SM_MODEL_DIR"
        )
    return faults


def expected_metrics(job: TrainingJob, channels: dict[str, Path]) -> list[str]:
    """Return the metrics that a job's run prints, from its settings and its folder of images."""
    config = _config(job)
    augment = config.data.augment
    mixed = augment.mixup > 0 or augment.cutmix > 0  # with mixup no image has one right class
    folder = channels.get(sagemaker.CHANNEL)
    tested = folder is None or _has_test(folder, config.data.labels)
    return [
        entry["Name"]
        for entry in job.metrics
        if not (mixed and entry["Name"] == "train_top1")
        and (tested or not entry["Name"].startswith("test_"))
    ]


def _has_test(folder: Path, labels: str | None) -> bool:
    if labels is not None:
        return "test" in table.splits(folder / labels, str(folder))
    return any(
        path.is_dir() and path.name.casefold() in SPLIT_NAMES["test"] for path in folder.iterdir()
    )


def remedy(outcome: Outcome) -> str:
    """Return what to change after a failure, from the trainer's or the toolkit's message."""
    failure = outcome.failure or "the container ended without a message; see the log"
    if not failure.startswith(TOOLKIT):
        return failure.splitlines()[0]  # the trainer's
    text = "\n".join([failure, *outcome.log[-200:]])
    for pattern, advice in REMEDIES.items():
        if match := re.search(pattern, text):
            return match.expand(advice)
    return f"{failure.strip().splitlines()[-1]}; see the log"
