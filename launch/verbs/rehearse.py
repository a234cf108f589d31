"""`python -m launch rehearse`: the very request that would be sent, checked, and then run here by AWS's own toolkit (launch/local/opt_ml.py)."""

import argparse
import importlib.util
import math
import os
import random
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.cloud import hyperparameters as codec
from launch.cloud import source
from launch.cloud.request import Request, check
from launch.local import opt_ml
from launch.local.container_entry import CHANNELS
from launch.local.opt_ml import Job, Machine, Outcome
from launch.planning import Plan
from launch.planning import prepare as planned
from launch.targets import sagemaker
from launch.targets.spec import load_target, split_overrides
from trainer.common.console import log, python
from trainer.common.errors import MISTAKE, OK, RESUME, UserError, install_command
from trainer.common.interrupt import heeded
from trainer.settings import config as settings
from trainer.settings.compose import compose
from trainer.settings.config import Config
from trainer.settings.hydra_errors import CONFIG_ERRORS, explain

# What to change, by what the toolkit says where it isn't the trainer that failed; \1 is what the pattern's group found.
REMEDIES = {
    r"No matching distribution found for (\S+)": r"requirements.txt: \1 is not installed here; correct it in pyproject.toml, or install it",
    r"InstallRequirementsError": "requirements.txt: pip refused it (see the log); correct the dependencies in pyproject.toml",
    r"\(404\)|NoSuchKey": "the source tarball is not at sagemaker_submit_directory: upload it before the request is sent",
    r"ReadError|BadGzipFile": "the source tarball can't be unpacked: build it with launch/cloud/source.py",
    r"can't open file": "sagemaker_program names a file that the tarball lacks: bring it back, or name it in launch/cloud/source.py",
    r"ExitCode (?:137|-9)\b": "the trainer was killed, most likely for memory: take a larger target.instance_type, or lower train.batch_size",
    r"ExitCode (?:139|-11)\b": "the trainer crashed in native code: run it here (python -m trainer) with the same settings to see where",
}


def main(arguments: Sequence[str]) -> int:
    """The verb. 0: the job would complete; 2: one line says what to change; 75: stopped, and it goes on from there when rehearsed again."""
    options = _parse(arguments)
    flags = None if options.plain or opt_ml.INSIDE in os.environ else opt_ml.namespaces()
    if flags is not None:
        # This very process goes on inside, so that signals reach it.
        environment = os.environ | {
            opt_ml.INSIDE: "inside",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        os.execvpe(
            "unshare",
            ["unshare", *flags, sys.executable, "-m", "launch", "rehearse", *arguments],
            environment,
        )
    plan, folder = prepare(options.overrides, options.data)
    spec, request = plan.spec, plan.requests[0]
    channels = {} if folder is None else {sagemaker.CHANNEL: folder}
    jobs = jobs_of(request, options.trials, spec.region)
    preflight(request, jobs, plan.source, channels, spec.config)
    machine = Machine(
        (options.directory or Path("runs/rehearsed") / spec.run).resolve(),
        isolated=opt_ml.INSIDE in os.environ,
    )
    if not machine.isolated:
        log.info(
            "without namespaces: the hosts are plain processes, with SAGEMAKER_BASE_DIR in the place of /opt/ml"
        )
    machine.upload(spec.uri("source", f"{spec.source}.tar.gz"), plan.source)
    for number in heeded():
        signal.signal(number, machine.stop)
    objective, code = _objective(request), OK
    for job in jobs:
        log.info("rehearsing %s: %s", job.name, " ".join(codec.decode(job.hyperparameters)))
        outcome = machine.run(job, channels)
        faults = show(job, outcome, objective, machine.directory)
        if outcome.stopped:
            return RESUME
        code = MISTAKE if faults else code
    if code == OK:
        again = [
            f"target={spec.target.name}",
            *(override for override in options.overrides if not override.startswith("target=")),
        ]
        pictures = [] if options.data is None else ["--data", str(options.data)]
        log.info(
            "\nthe job would complete; next:\n  %s -m launch plan %s",
            python(),
            shlex.join([*again, *pictures]),
        )
    return code


def prepare(arguments: Sequence[str], data: Path | None) -> tuple[Plan, Path | None]:
    """What `submit` would do, without credentials, and the folder of the pictures (None: the trainer writes its own). Raises UserError."""
    ours, overrides = split_overrides(arguments)
    target = load_target(
        ours
        if any(override.startswith("target=") for override in ours)
        else ["target=sagemaker", *ours]
    )
    if not isinstance(target, sagemaker.SageMakerConfig):
        raise UserError(
            f"target={target.name}: only SageMaker's containers are rehearsed; allowed: sagemaker, sagemaker_multi, tuner"
        )
    plan = planned(None, target, overrides, data)
    if plan.spec.data is None:
        return plan, None
    typed = [override for override in overrides if override.startswith("data.root=")]
    folder = data or Path(
        str(OverridesParser.create().parse_override(typed[-1]).value()) if typed else plan.spec.data
    )
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of pictures; give --data DIR")
    return plan, folder


def jobs_of(request: Request, trials: int, region: str) -> list[Job]:
    """The training jobs that a request makes: itself, or the first trials of a tuning job, with values sampled as the tuner does."""
    parameters = request.parameters
    if request.operation == "CreateTrainingJob":
        return [
            Job(parameters["TrainingJobName"], parameters["HyperParameters"], parameters, region)
        ]
    tuning, definition = (
        parameters["HyperParameterTuningJobConfig"],
        parameters["TrainingJobDefinition"],
    )
    fixed = definition["StaticHyperParameters"] | {
        "_tuning_objective_metric": tuning["HyperParameterTuningJobObjective"]["MetricName"]
    }
    rng = random.Random(tuning["RandomSeed"])
    name = parameters["HyperParameterTuningJobName"]
    samples = [_sample(tuning["ParameterRanges"], rng) for _ in range(trials)]
    return [
        Job(f"{name}-{number:03d}", fixed | sample, definition, region)
        for number, sample in enumerate(samples, 1)
    ]


def preflight(
    request: Request, jobs: list[Job], tarball: bytes, channels: dict[str, Path], config: Config
) -> None:
    """Raises UserError for what AWS, the container or the trainer in it would refuse, as far as that can be seen without running anything."""
    check(request)
    source.check(tarball)
    for module in ("sagemaker_training", "sagemaker_pytorch_container"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{module}: AWS's training toolkit is not installed; {install_command('rehearse')} (it compiles a file: apt-get install gcc)"
            )
    definition = jobs[0].definition
    for channel in definition.get("InputDataConfig", []):
        name, uri = channel["ChannelName"], channel["DataSource"]["S3DataSource"]["S3Uri"]
        if name not in CHANNELS:
            raise UserError(
                f"channel {name}: the trainer has no use for it; allowed: {', '.join(CHANNELS)}"
            )
        if not uri.endswith("/"):
            raise UserError(
                f"channel {name}: {uri} would also match its longer neighbours; end it with /"
            )
        if name not in channels or not any(channels[name].iterdir()):
            raise UserError(
                f"channel {name}: {channels.get(name, uri)} holds nothing; give the folder of pictures with --data DIR"
            )
    weights = config.model.weights
    if weights and Path(weights).is_file():
        where = f"/opt/ml/input/data/{sagemaker.CHANNEL}/{Path(weights).name}"
        raise UserError(
            f"model.weights={weights}: a job doesn't see this machine's files; put it into the folder of pictures, and give {where}"
        )
    _check_metrics(request, definition)
    if (place := definition["CheckpointConfig"].get("LocalPath")) != config.platform.checkpoints:
        raise UserError(
            f"CheckpointConfig.LocalPath={place}: the trainer saves to {config.platform.checkpoints}, which SageMaker would not keep"
        )
    for job in jobs:
        if (
            job.instances > 1
            and job.hyperparameters.get("sagemaker_torch_distributed_enabled") != "true"
        ):
            raise UserError(
                f"{job.instances} machines would each train by themselves: give sagemaker_torch_distributed_enabled=true"
            )
        program = codec.decode_value(job.hyperparameters["sagemaker_program"])
        if program != source.ENTRY_POINT:
            raise UserError(
                f"sagemaker_program={program}: the tarball's entry is {source.ENTRY_POINT}; name that one"
            )
        if (
            codec.decode_value(job.hyperparameters["sagemaker_submit_directory"]).rpartition("/")[2]
            != f"{sha256(tarball).hexdigest()}.tar.gz"
        ):
            raise UserError(
                "sagemaker_submit_directory: it names another tarball than this code's; build the request again"
            )
        _check_settings(job)


def _check_metrics(request: Request, definition: dict[str, object]) -> None:
    """Each metric's regex takes its own value out of the line that the trainer prints, and the objective is one of them."""
    values = {name: float(number) for number, name in enumerate(settings.METRICS, 1)}
    definitions: list[dict[str, str]] = definition["AlgorithmSpecification"]["MetricDefinitions"]  # type: ignore[index]
    for entry in definitions:
        name, regex = entry["Name"], entry["Regex"]
        try:
            groups = re.compile(regex).groups
        except re.error as error:
            raise UserError(
                f"metric {name}: {regex} is no regular expression ({error}); take trainer.settings.config.metric_definitions()"
            ) from error
        if groups != 1:
            raise UserError(
                f"metric {name}: {regex} has {groups} groups; SageMaker takes the value from exactly one"
            )
        if opt_ml.scrape([settings.metric_line(values)], [entry]).get(name) != [values.get(name)]:
            raise UserError(
                f"metric {name}: {regex} doesn't find it in the trainer's line; take trainer.settings.config.metric_definitions()"
            )
    objective = _objective(request)
    if objective is not None and objective not in [entry["Name"] for entry in definitions]:
        raise UserError(
            f"objective {objective}: no metric of that name is scraped, so every trial would fail; allowed: {', '.join(settings.METRICS)}"
        )


def _check_settings(job: Job) -> None:
    """The trainer takes the hyperparameters, by the same composition as in the container."""
    settings.register()
    try:
        names = [channel["ChannelName"] for channel in job.definition.get("InputDataConfig", [])]
        channels = [f"{CHANNELS[name]}=/opt/ml/input/data/{name}" for name in names]
        compose([*codec.decode(job.hyperparameters), "platform=sagemaker", *channels])
    except CONFIG_ERRORS as error:
        raise UserError(f"hyperparameters: {explain(error, settings.keys())}") from error


def show(job: Job, outcome: Outcome, objective: str | None, directory: Path) -> list[str]:
    """Prints what SageMaker would show of a job, and what to change; returns the latter."""
    failed = any(outcome.codes)
    status = "Stopped" if outcome.stopped else "Failed" if failed else "Completed"
    log.info("\n%-15s %s, after %.1f s", "status", status, outcome.seconds)
    for name, values in outcome.metrics.items():
        log.info(
            "%-15s %-12s %g%s",
            "metric",
            name,
            values[-1],
            f"  ({len(values)} values)" if len(values) > 1 else "",
        )
    for name, names in outcome.archives.items():
        log.info("%-15s %s", name, ", ".join(names) or "nothing")
    log.info("%-15s %s", "kept in", directory)
    if outcome.failure:
        log.info("%-15s %s", "FailureReason", outcome.failure)
    faults = list(outcome.warnings)
    if failed and not outcome.stopped:
        faults.append(f"{job.name}: {remedy(outcome)}")
    elif not outcome.stopped:
        silent = [
            entry["Name"]
            for entry in job.definition["AlgorithmSpecification"]["MetricDefinitions"]
            if entry["Name"] not in outcome.metrics
        ]
        if silent and not outcome.resumed:
            faults.append(
                f"{job.name}: the log has no line for the metrics {', '.join(silent)}; print them with trainer.settings.config.metric_line"
            )
        if objective is not None and objective in outcome.metrics:
            log.info("%-15s %s=%g", "objective", objective, outcome.metrics[objective][-1])
        if not outcome.archives["model.tar.gz"]:
            faults.append(
                f"{job.name}: model.tar.gz is empty; the model package goes to platform.package, which must be SM_MODEL_DIR"
            )
    for fault in faults:
        log.error(fault)
    return faults


def remedy(outcome: Outcome) -> str:
    """What to change after a failure: by the trainer's own words, or by the toolkit's."""
    failure = outcome.failure or "the container ended without a word; see the log"
    if not failure.startswith(
        ("Framework Error", "InstallRequirementsError", "ExecuteUserScriptError")
    ):
        return failure.splitlines()[0]  # the trainer's
    said = "\n".join([failure, *outcome.log[-200:]])
    for pattern, help in REMEDIES.items():
        if found := re.search(pattern, said):
            return found.expand(help)
    return f"{failure.strip().splitlines()[-1]}; see the log"


def _objective(request: Request) -> str | None:
    """The metric that a tuning job improves; None of a training job."""
    objective: str | None = (
        request.parameters.get("HyperParameterTuningJobConfig", {})
        .get("HyperParameterTuningJobObjective", {})
        .get("MetricName")
    )
    return objective


def _sample(ranges: dict[str, list[dict[str, object]]], rng: random.Random) -> dict[str, str]:
    """One value of each range, as the strings that SageMaker writes."""
    values: dict[str, str] = {}
    for kind, entries in ranges.items():
        for entry in entries:
            if kind == "CategoricalParameterRanges":
                values[str(entry["Name"])] = str(rng.choice(entry["Values"]))  # type: ignore[arg-type]
                continue
            low, high = float(str(entry["MinValue"])), float(str(entry["MaxValue"]))
            log_scale = entry["ScalingType"] == "Logarithmic"
            value = (
                math.exp(rng.uniform(math.log(low), math.log(high)))
                if log_scale
                else rng.uniform(low, high)
            )
            values[str(entry["Name"])] = str(
                round(value) if kind == "IntegerParameterRanges" else value
            )
    return values


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch rehearse",
        description="Runs the request that submit would send, here, in AWS's own training toolkit: no AWS account, no Docker, no network.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="target=sagemaker, sagemaker_multi or tuner; target.KEY=VALUE; the trainer's settings",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the folder of pictures that submit would upload"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where S3 and /opt/ml lie (runs/rehearsed/RUN); kept, so that a stopped run goes on",
    )
    parser.add_argument(
        "--trials", type=int, default=3, metavar="N", help="target=tuner: how many trials (3)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="without namespaces, as on machines that give none"
    )
    return parser.parse_intermixed_args(list(arguments))
