"""Each training that was submitted, with what it found out and cost: the rows of `packhorse runs`.

What listings don't tell of a run that has ended, its settings and figures, is kept in one object
of the bucket. So a look at many runs takes as many calls as a look at one, but for those that have
ended since the last look.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.cloud import s3
from launch.cloud.session import Aws, AwsError
from launch.targets import attempt as notes
from launch.targets.attempt import Attempt, Phase, State
from launch.targets.base import of
from launch.targets.inventory import Inventory
from launch.targets.spec import DIGEST, aws_of
from launch.verbs.status import ENDED, SERVICES, all_runs
from trainer.common.console import ProgressBar
from trainer.common.errors import UserError
from trainer.common.objects import parsed
from trainer.settings import config as settings

FIGURES = "runs/.all/figures.json"  # by run: the attempt, its settings and figures


def in_bucket(targets: Sequence[str]) -> tuple[list[Mapping[str, Any]], str]:
    """Return the trainings in the bucket, and why they are not known; "": they are.

    targets: overrides of the target. Without credentials there are none. Raise UserError for a
    target that is not allowed.
    """
    aws = aws_of(targets).hurried()  # a table of this machine's runs doesn't wait for minutes
    try:
        if not aws.has_credentials():
            return [], ""
        with ProgressBar("looking at the runs in the bucket", 1):
            return overview(aws), ""
    except AwsError as error:
        if error.code == s3.NO_BUCKET:  # nothing was ever submitted
            return [], ""
        return [], str(error)
    except UserError as error:
        return [], str(error)


def overview(aws: Aws) -> list[Mapping[str, Any]]:
    """Return the trainings in the bucket, as `trainer.results.runs.elsewhere` takes them.

    Raise AwsError.
    """
    aws.account  # noqa: B018 (asked for here, as clients are made here, not by several threads)
    aws.prepare(SERVICES)
    inventory = Inventory(aws)
    inventory.prefetch()
    by_run: dict[str, list[tuple[Attempt, State]]] = {}
    for attempt, state in all_runs(inventory):
        if of(attempt).trains:
            by_run.setdefault(attempt.run, []).append((attempt, state))
    if not by_run:
        return []
    before = _kept(aws)
    with ThreadPoolExecutor(s3.WORKERS) as pool:
        facts = dict(pool.map(lambda tried: _facts(inventory, tried, before), by_run.values()))
    kept = {
        run: facts[run]
        for run, tried in by_run.items()
        if tried[-1][1].phase in ENDED and facts[run] is not None
    }
    if kept != before:
        with contextlib.suppress(AwsError):  # who may only read asks again
            s3.write(aws, FIGURES, json.dumps(kept).encode())
    return [_row(aws, tried, facts[run] or {}) for run, tried in by_run.items()]


def _kept(aws: Aws) -> dict[str, Any]:
    """Return what the last look has kept; {} where that isn't readable. Raise AwsError."""
    entry = s3.read(aws, FIGURES)
    return (parsed(entry[0]) if entry else None) or {}


def _facts(
    inventory: Inventory, tried: Sequence[tuple[Attempt, State]], before: Mapping[str, Any]
) -> tuple[str, dict[str, Any] | None]:
    """Return a run, and its settings and figures; None where AWS doesn't tell."""
    attempt, state = tried[-1]
    kept = before.get(attempt.run)
    if kept is not None and kept.get("attempt") == attempt.number:
        return attempt.run, kept
    try:
        noted = notes.read(inventory.aws, attempt.key) or attempt
        figures = notes.Figures()
        if state.phase is not Phase.RUNNING:
            figures = of(attempt).figures(inventory, attempt)
    except AwsError:
        return attempt.run, None
    facts = {"attempt": attempt.number, "settings": _settings(noted)}
    return attempt.run, facts | dataclasses.asdict(figures)


def _settings(attempt: Attempt) -> dict[str, Any]:
    """Return the settings of a run that were decided when it was sent, by key.

    What was not is decided where the pictures are.
    """
    known = settings.schema()
    told = {
        key: value for key, value in attempt.identity.items() if key in known and value is not None
    }
    data = attempt.identity.get("data")
    if data is not None:
        told["data.root"] = re.sub(rf"-[0-9a-f]{{{DIGEST}}}$", "", data)
    return told


def _row(
    aws: Aws, tried: Sequence[tuple[Attempt, State]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    attempt, state = tried[-1]
    when = state.ended or state.started or attempt.since
    return {
        "name": attempt.run,
        "uri": run_uri(aws, attempt.run),
        "state": str(state.phase),
        "date": when.timestamp(),
        "settings": facts.get("settings", {}),
        "epochs": facts.get("epochs"),
        "valid": facts.get("valid"),
        "test": facts.get("test"),
        "pictures": facts.get("pictures"),
        "seconds": facts.get("seconds"),
        "dollars": dollars(tried),
    }


def dollars(tried: Sequence[tuple[Attempt, State]]) -> float | None:
    """Return what the attempts at a run have cost, by the prices that were noted; None: unknown."""
    spent = [cost for each, state in tried if (cost := each.dollars(state)) is not None]
    return sum(spent) if spent else None


def run_uri(aws: Aws, run: str) -> str:
    """Return where a run lies in the bucket."""
    return f"s3://{aws.bucket}/runs/{run}"
