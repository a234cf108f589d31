"""`python -m launch cost`: dollars spent on each run, and what a point of accuracy costs.

It also shows the dollars spent on repeated work.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime

from launch.ceiling import stored
from launch.cloud import s3
from launch.cloud.session import Aws, AwsError
from launch.targets.attempt import Attempt, Phase, State
from launch.targets.base import of
from launch.targets.inventory import Inventory
from launch.targets.spec import choose, names_target, split_overrides
from launch.verbs.arguments import account_of, run_parser
from launch.verbs.status import SERVICES, all_runs
from trainer.common.console import log
from trainer.common.errors import MISTAKE, OK
from trainer.common.text import dollars


@dataclass(frozen=True)
class Cost:
    """The cost of one run, over all its attempts.

    Dollars are estimates with the prices recorded when each attempt was sent.
    """

    run: str
    attempts: int
    hours: float  # of machines
    dollars: float
    # Dollars for work that an interrupted attempt had not saved, and the next one repeated.
    lost: float
    accuracy: float | None  # top-1 on the test pictures, or for a tuning job its best objective
    per_point: float | None  # dollars per percent of accuracy
    ceiling: float | None  # dollars, of the newest attempt; None: it has none
    stored_gb: float  # in S3, old versions too
    storage: float  # dollars for them so far
    storage_a_month: float  # dollars from now on


def of_run(inventory: Inventory, tried: Sequence[tuple[Attempt, State]]) -> Cost | str:
    """Return what a run cost, or why that is not known. tried: its attempts in order."""
    unknown = [state.detail for _, state in tried if state.phase is Phase.UNKNOWN]
    try:
        return unknown[0] if unknown else _of_run(inventory, tried)
    except AwsError as error:
        return str(error)


def _of_run(inventory: Inventory, tried: Sequence[tuple[Attempt, State]]) -> Cost:
    last, aws = tried[-1][0], inventory.aws
    saves = _saves(aws, last.run)
    spent = sum(attempt.dollars(state) or 0.0 for attempt, state in tried)
    accuracy = of(last).figures(inventory, last).accuracy
    kept = stored(aws, last.run)
    return Cost(
        run=last.run,
        attempts=len(tried),
        hours=sum(state.machine_seconds for _, state in tried) / 3600,
        dollars=spent,
        lost=sum(_lost(attempt, state, saves) for attempt, state in tried),
        accuracy=accuracy,
        per_point=spent / (100 * accuracy) if accuracy else None,
        ceiling=last.ceiling,
        stored_gb=kept.size / 1e9,
        storage=kept.so_far,
        storage_a_month=kept.a_month,
    )


def _saves(aws: Aws, run: str) -> list[datetime]:
    """Return when checkpoints were saved: the times of their manifests, which are written last.

    This includes deleted ones, while the bucket keeps such small old versions: 30 days.
    """
    prefix = f"runs/{run}/checkpoints/"
    versions = aws.pages("s3", "ListObjectVersions", "Versions", Bucket=aws.bucket, Prefix=prefix)
    return sorted(
        version["LastModified"] for version in versions if version["Key"].endswith("/manifest.json")
    )


def _lost(attempt: Attempt, state: State, saves: Sequence[datetime]) -> float:
    """Return the dollars from the last save to the end of an attempt that was cut short."""
    started, ended = state.started, state.ended
    if state.phase not in (Phase.LOST, Phase.FAILED, Phase.STOPPED):
        return 0.0
    if started is None or ended is None or ended <= started:
        return 0.0
    saved = max((save for save in saves if started <= save <= ended), default=started)
    return (ended - saved) / (ended - started) * (attempt.dollars(state) or 0.0)


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("cost", __doc__, "all runs")
    parser.add_argument("--json", action="store_true", help="as one JSON document")
    options = parser.parse_intermixed_args(arguments)
    aws = account_of(options.run)
    targets, overrides = split_overrides(options.run)
    only = None
    if overrides or names_target(targets):
        only = choose(aws, options.run).run
    aws.prepare(SERVICES)
    inventory = Inventory(aws)
    inventory.prefetch()
    tried: dict[str, list[tuple[Attempt, State]]] = {}
    for attempt, state in all_runs(inventory, only):
        tried.setdefault(attempt.run, []).append((attempt, state))
    with ThreadPoolExecutor(s3.WORKERS) as pool:
        told = list(pool.map(lambda attempts: of_run(inventory, attempts), tried.values()))
    costs = [cost for cost in told if isinstance(cost, Cost)]
    unknown = {run: why for run, why in zip(tried, told, strict=True) if isinstance(why, str)}
    if options.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        show(costs, tried)
    for run, why in unknown.items():
        print(f"not in the sum: {run}: {why}", file=sys.stderr)
    return MISTAKE if unknown else OK


def show(costs: Sequence[Cost], tried: Mapping[str, Sequence[tuple[Attempt, State]]]) -> None:
    """Print what runs cost, and the sum. tried: the attempts at each."""
    basis = "none"
    for cost in costs:
        basis = tried[cost.run][-1][0].price.basis
        log.info(
            "%-48s %d attempts %7.2f h  %s%s, of it %s lost to work done twice%s; "
            "%.2f GB in S3, %s so far, %s a month",
            cost.run,
            cost.attempts,
            cost.hours,
            dollars(cost.dollars),
            "" if cost.ceiling is None else f" of at most {dollars(cost.ceiling)}",
            dollars(cost.lost),
            _point(cost),
            cost.stored_gb,
            dollars(cost.storage),
            dollars(cost.storage_a_month),
        )
    log.info(
        "%s in all, machines by the prices noted at each submit (%s), and S3",
        dollars(sum(cost.dollars + cost.storage for cost in costs)),
        basis,
    )


def _point(cost: Cost) -> str:
    """Return the cost of a point of accuracy; empty if it is unknown."""
    if cost.per_point is None:
        return ""
    return f"  {cost.accuracy or 0:.1%} accuracy, {dollars(cost.per_point)} a point"
