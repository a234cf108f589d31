"""A SageMaker tuning job: each trial is a training job; the search space is the trainer's."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from launch.cloud import hyperparameters as codec
from launch.cloud.ownership import NOT_FOUND
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.targets.attempt import Attempt, Figures, State, now, seconds_between
from launch.targets.base import Spec
from launch.targets.inventory import Inventory
from launch.targets.rented import Rented
from launch.targets.sagemaker import (
    SageMaker,
    SageMakerConfig,
    checked,
    definition,
    for_job,
    job_phase,
    job_results,
    start,
)
from launch.targets.spec import explained
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings import words
from trainer.settings.compose import check_options, first_trial
from trainer.settings.config import EPOCHS, Config, setting

TRIALS = "trials"  # a key of ours, not in SageMaker's description of a tuning job
LEAST_RUNTIME = 120  # seconds of a tuning job's limit: SageMaker's own


@dataclass
class TunerConfig(SageMakerConfig):
    warm_start: str | None = setting()
    patience: int | None = setting(at_least=3, at_most=1000)
    goal: float | None = setting(at_least=-1e9, at_most=1e9)


class Tuner(SageMaker):
    config = TunerConfig
    most_types = 6
    thing = "HyperParameterTuningJob"
    sweeps = True
    page = "hyper-tuning-jobs"
    job_name_limit = 32
    log_streams = "{job}-"  # its trials are named JOB-NUMBER-HASH

    def fixed(self, overrides: Sequence[str]) -> list[str]:
        """Return the overrides of the first trial: swept ones are the tuning job's ranges."""
        return first_trial(*space.split(overrides))

    def run_name(self, config: Config, overrides: Sequence[str]) -> str:
        """Return a name that depends on the search space too."""
        digest = sha256(repr(sorted(overrides)).encode()).hexdigest()[:8]
        return f"{super().run_name(config, overrides)}-{digest}"

    def requests(self, spec: Spec) -> list[Request]:
        return [tuning_job(spec)]

    def trials(self, request: Request) -> tuple[int, int]:
        limits = request.parameters["HyperParameterTuningJobConfig"]["ResourceLimits"]
        return limits["MaxNumberOfTrainingJobs"], limits["MaxParallelTrainingJobs"]

    def of_listing(self, inventory: Inventory, attempt: Attempt) -> dict[str, Any] | None:
        """Return the job's description from the lists of tuning jobs and of their trials."""
        listed = inventory.tuning_jobs().get(attempt.job)
        # The list doesn't say why a job failed.
        if listed is None or listed["HyperParameterTuningJobStatus"] == "Failed":
            return None
        name = re.compile(rf"{re.escape(attempt.job)}-\d+-[0-9a-f]{{8}}")
        jobs = inventory.training_jobs().items()
        return listed | {TRIALS: [job for each, job in jobs if name.fullmatch(each)]}

    def state(self, aws: Aws, attempt: Attempt, described: dict[str, Any]) -> State:
        trials = described.get(TRIALS)
        if trials is None:
            trials = trial_jobs(aws, attempt)
        seconds = sum(
            seconds_between(trial.get("TrainingStartTime"), trial.get("TrainingEndTime") or now())
            for trial in trials
        )
        counts = described.get("TrainingJobStatusCounters", {})
        counted = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return State(
            job_phase(described["HyperParameterTuningJobStatus"]),
            described.get("FailureReason") or counted,
            described.get("CreationTime"),
            described.get("HyperParameterTuningEndTime"),
            seconds * attempt.instances,
            id=described["HyperParameterTuningJobArn"],
        )

    def best(self, aws: Aws, attempt: Attempt) -> dict[str, Any] | None:
        """Return the trial with the best result so far, None where there is none."""
        return (self.described(aws, attempt) or {}).get("BestTrainingJob")

    def results(self, aws: Aws, attempt: Attempt) -> str:
        """Return the key prefix of the best trial's results."""
        best = self.best(aws, attempt)
        if best is None:
            raise UserError(
                f"{attempt.job}: no trial has ended with a result yet; python -m launch status"
            )
        return job_results(attempt, best["TrainingJobName"])

    def figures(self, inventory: Inventory, attempt: Attempt) -> Figures:
        """Return the best value of the objective, where it is an accuracy."""
        best = self.best(inventory.aws, attempt) or {}
        metric = best.get("FinalHyperParameterTuningJobObjectiveMetric", {})
        if not metric.get("MetricName", "").endswith("top1"):
            return Figures()
        return Figures(valid=float(metric["Value"]))

    @classmethod
    def rented(cls, inventory: Inventory) -> Iterator[Rented]:
        """Yield nothing: `SageMaker.rented` yields the trials."""
        yield from ()


TARGETS = (Tuner("tuner"),)


def trial_jobs(aws: Aws, attempt: Attempt) -> list[dict[str, Any]]:
    """Return the trials of a tuning job; [] where SageMaker doesn't know the job yet."""
    operation, key = "ListTrainingJobsForHyperParameterTuningJob", "TrainingJobSummaries"
    try:
        return list(aws.pages("sagemaker", operation, key, HyperParameterTuningJobName=attempt.job))
    except AwsError as error:
        if re.search(NOT_FOUND, f"{error.code}: {error.message}"):
            return []
        raise


def tuning_job(spec: Spec) -> Request:
    """Return CreateHyperParameterTuningJob as a request, with the ranges of the trainer's sweep.

    For a grid, each range is the list of its points. Trials can't set their entrypoint, so a
    stopped one only has the checkpoints that it saved before. Raise UserError as `training_job`
    does, and for a sweep that SageMaker can't run.
    """
    target = checked(spec)
    if target.instances > 1:
        raise UserError(
            f"target.instances={target.instances}: a trial of the tuner trains on one machine; "
            "allowed: target.instances=1"
        )
    fixed, swept = space.split(spec.overrides)
    sweep = space.load(spec.config, swept, fixed)
    places = ["platform=sagemaker"]
    if spec.data_root:
        places.append(f"data.root={spec.data_root}")
    if spec.weights_root:
        places.append(f"model.weights_dir={spec.weights_root}")
    with explained(settings.keys()):
        check_options(sweep, [*fixed, *places], swept)
    tuned = {parameter.key for parameter in sweep.space}
    static = codec.encode(
        override
        for override in [*for_job(fixed), *spec.price_words]
        if override.partition("=")[0].lstrip("+") not in tuned
    )
    assert isinstance(target, TunerConfig)
    return Request(
        "sagemaker",
        "CreateHyperParameterTuningJob",
        {
            "HyperParameterTuningJobName": spec.job_name,
            "HyperParameterTuningJobConfig": search(sweep, spec) | completion(target),
            **warm_start(target),
            "TrainingJobDefinition": {
                "StaticHyperParameters": static | start(spec, target),
                **definition(spec, target),
                **machines_of_trials(spec, target.disk_gb),
            },
            "Tags": spec.tag_list,
        },
    )


def completion(target: TunerConfig) -> dict[str, Any]:
    """Return the criteria that end a search before its last trial, besides its ceiling."""
    criteria: dict[str, Any] = {}
    if target.patience is not None:
        criteria["BestObjectiveNotImproving"] = {
            "MaxNumberOfTrainingJobsNotImproving": target.patience
        }
    if target.goal is not None:
        criteria["TargetObjectiveMetricValue"] = target.goal
    return {"TuningJobCompletionCriteria": criteria} if criteria else {}


def warm_start(target: TunerConfig) -> dict[str, Any]:
    """Return the earlier tuning jobs whose trials this one learns from.

    Their pictures and ranges may differ: AWS calls that transfer learning.
    """
    names = [name.strip() for name in (target.warm_start or "").split(",") if name.strip()]
    if not names:
        return {}
    parents = [{"HyperParameterTuningJobName": name} for name in names]
    config = {"ParentHyperParameterTuningJobs": parents, "WarmStartType": "TransferLearning"}
    return {"WarmStartConfig": config}


def machines_of_trials(spec: Spec, disk_gb: int) -> dict[str, Any]:
    """Return the machine of a trial: of one type, or of the first type that is free."""
    one = [{"InstanceType": name, "InstanceCount": 1} for name in spec.instance_types]
    if len(one) == 1:
        return {"ResourceConfig": one[0] | {"VolumeSizeInGB": disk_gb}}
    configs = [each | {"VolumeSizeInGB": disk_gb} for each in one]
    chosen = {"AllocationStrategy": "Prioritized", "InstanceConfigs": configs}
    return {"HyperParameterTuningResourceConfig": chosen}


def search(sweep: space.Sweep, spec: Spec) -> dict[str, Any]:
    """Return a sweep in AWS's terms. The search ends when its ceiling is reached."""
    ranges = parameter_ranges(sweep)
    strategy = {"tpe": "Bayesian", "random": "Random"}.get(sweep.sampler)
    trials, stops_early = sweep.trials, sweep.pruner != "none"
    if sweep.engine == "grid":
        strategy, stops_early = "Grid", False
        # A grid has as many trials as it has points, and AWS takes no other number.
        points = ranges.get("CategoricalParameterRanges", [])
        trials = math.prod(len(entry["Values"]) for entry in points)
    more: dict[str, Any] = {}
    if (sweep.engine, sweep.sampler, sweep.pruner) == ("optuna", "random", "halving"):
        # Random trials with successive halving are Hyperband (Li et al. 2018).
        strategy, stops_early = "Hyperband", False
        resource = {"MinResource": 1, "MaxResource": max(2, spec.config.train.epochs or EPOCHS)}
        more = {"StrategyConfig": {"HyperbandStrategyConfig": resource}}
    parallel = min(sweep.parallel, trials)
    ceiling = {}
    if spec.paid_hours is not None:
        seconds = int(3600 * spec.paid_hours / parallel)
        ceiling = {"MaxRuntimeInSeconds": max(LEAST_RUNTIME, seconds)}
    return {
        "Strategy": strategy,
        **more,
        "HyperParameterTuningJobObjective": {
            "Type": "Minimize" if sweep.minimize else "Maximize",
            "MetricName": sweep.objective,
        },
        "ResourceLimits": {
            "MaxNumberOfTrainingJobs": trials,
            "MaxParallelTrainingJobs": parallel,
            **ceiling,
        },
        "ParameterRanges": ranges,
        "TrainingJobEarlyStoppingType": "Auto" if stops_early else "Off",
        "RandomSeed": sweep.seed,
    }


def parameter_ranges(sweep: space.Sweep) -> dict[str, Any]:
    """Return the search space in AWS's terms.

    Bounds and choices are strings; choices are encoded as in `hyperparameters`.
    """
    ranges: dict[str, list[dict[str, Any]]] = {}
    for parameter in sweep.space:
        entry: dict[str, Any] = {"Name": parameter.key}
        if isinstance(parameter, space.Categorical) or sweep.engine == "grid":
            kind = "CategoricalParameterRanges"
            choices = [
                words.override(parameter.key, choice)
                for choice in space.grid(parameter, sweep.points)
            ]
            entry["Values"] = [codec.encode_value(word.partition("=")[2]) for word in choices]
        else:
            kind = "IntegerParameterRanges"
            if isinstance(parameter, space.Continuous):
                kind = "ContinuousParameterRanges"
            entry["MinValue"], entry["MaxValue"] = str(parameter.low), str(parameter.high)
            entry["ScalingType"] = "Logarithmic" if parameter.log else "Linear"
        ranges.setdefault(kind, []).append(entry)
    return ranges
