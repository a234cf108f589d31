"""`python -m launch cost`: dollars spent on each run, how many of them on work done twice, and what a point of accuracy costs."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from launch.cloud import ownership, s3
from launch.cloud.session import Aws
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase, State, dollars
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import OK


@dataclass(frozen=True)
class Cost:
    """Of one run, over all its attempts. Dollars are estimates by the prices noted when each attempt was sent."""

    run: str
    attempts: int
    hours: float  # of machines
    dollars: float
    lost: (
        float  # dollars for work that an interrupted attempt had not saved, and the next did again
    )
    accuracy: float | None  # top-1 on the test pictures, or for a tuning job its best objective
    per_point: float | None  # dollars per percent of accuracy


def of_run(aws: Aws, tried: Sequence[tuple[Attempt, State]]) -> Cost:
    """What a run cost. tried: its attempts in order. Raises AwsError."""
    run = tried[0][0].run
    saves = _saves(aws, run)
    spent = sum(dollars(attempt, state) or 0.0 for attempt, state in tried)
    lost = sum(_lost(attempt, state, saves) for attempt, state in tried)
    accuracy = _accuracy(aws, *tried[-1])
    hours = sum(state.machine_seconds for _, state in tried) / 3600
    return Cost(
        run,
        len(tried),
        hours,
        spent,
        lost,
        accuracy,
        spent / (100 * accuracy) if accuracy else None,
    )


def _saves(aws: Aws, run: str) -> list[datetime]:
    """When checkpoints were saved (their manifests come last), also those deleted since, as long as the bucket keeps old versions: 30 days."""
    prefix = f"runs/{run}/checkpoints/"
    versions = aws.pages("s3", "ListObjectVersions", "Versions", Bucket=aws.bucket, Prefix=prefix)
    return sorted(
        version["LastModified"] for version in versions if version["Key"].endswith("/manifest.json")
    )


def _lost(attempt: Attempt, state: State, saves: Sequence[datetime]) -> float:
    """Dollars from the last save to the end of an attempt that was cut short."""
    if (
        state.phase not in (Phase.LOST, Phase.FAILED, Phase.STOPPED)
        or state.started is None
        or state.ended is None
    ):
        return 0.0
    saved = max(
        (save for save in saves if state.started <= save <= state.ended), default=state.started
    )
    share = (
        (state.ended - saved) / (state.ended - state.started)
        if state.ended > state.started
        else 0.0
    )
    return share * (dollars(attempt, state) or 0.0)


def _accuracy(aws: Aws, attempt: Attempt, state: State) -> float | None:
    if attempt.target == "ec2":
        found = s3.read(aws, f"runs/{attempt.run}/output/result.json")
        return float(json.loads(found[0])["top1"]) if found else None
    if attempt.target == "notebook" or state.phase is Phase.ABSENT:
        return None
    if attempt.target == "tuner":
        job = (
            aws.find(
                "sagemaker",
                "DescribeHyperParameterTuningJob",
                ownership.NOT_FOUND,
                HyperParameterTuningJobName=attempt.job,
            )
            or {}
        )
        best = job.get("BestTrainingJob", {})
        metric = best.get("FinalHyperParameterTuningJobObjectiveMetric", {})
        return float(metric["Value"]) if metric.get("MetricName", "").endswith("top1") else None
    job = (
        aws.find("sagemaker", "DescribeTrainingJob", ownership.NOT_FOUND, TrainingJobName=attempt.job)
        or {}
    )
    values = {
        metric["MetricName"]: float(metric["Value"])
        for metric in job.get("FinalMetricDataList", [])
    }
    return values.get("test_top1", values.get("valid_top1"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch cost", description=__doc__)
    parser.add_argument(
        "run",
        nargs="*",
        help="the run's id, or the overrides it was submitted with; none: all runs",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON document")
    options = parser.parse_intermixed_args(arguments)
    targets, overrides = split_overrides(options.run)
    aws = aws_of(targets)
    overdue.warn(aws, targets)
    only = (
        runs.choose(aws, options.run).run
        if overrides or any(override.startswith("target=") for override in targets)
        else None
    )
    tried = runs.attempts(aws, only)
    names = dict.fromkeys(attempt.run for attempt in tried)
    costs = [
        of_run(
            aws, [(attempt, runs.observe(aws, attempt)) for attempt in tried if attempt.run == name]
        )
        for name in names
    ]
    if options.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
        return OK
    for cost in costs:
        point = (
            ""
            if cost.per_point is None
            else f"  {100 * (cost.accuracy or 0):.1f} % accuracy, ${cost.per_point:.4f} a point"
        )
        log.info(
            "%-48s %d attempts %7.2f h  $%.2f, of it $%.2f lost to work done twice%s",
            cost.run,
            cost.attempts,
            cost.hours,
            cost.dollars,
            cost.lost,
            point,
        )
    log.info(
        "$%.2f in all; machines only, by the prices noted at each submit (%s)",
        sum(cost.dollars for cost in costs),
        tried[-1].price.basis if tried else "none",
    )
    return OK
