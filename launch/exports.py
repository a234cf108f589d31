"""The same run written for engines that rent machines by themselves: SkyPilot, dstack, AWS Batch.

They take it over capacity, retries and the laptop's absence; the run, its code, pictures,
checkpoints and results in the bucket are the ones of `submit`. Each document is plain data, held
to the engine's own parser by tests/launch/test_exports.py.
"""

import hashlib
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from launch.planning import Plan
from launch.targets import ec2_request as ec2
from launch.targets.base import Spec, fit
from launch.targets.instance_types import has_gpu, names_in
from launch.targets.sagemaker import SageMaker
from launch.targets.script import fill
from trainer.common.errors import RESUME, UserError

SCRATCH = "/tmp/packhorse"  # on a machine of theirs: code, pictures and the run's directory
SKYPILOT_NAME, DSTACK_NAME = 48, 41  # characters of a task's name, at most
RECOVERIES = 10  # times that an engine starts a run again after a machine was taken back


def skypilot(plan: Plan) -> dict[str, Any]:
    """Return the task for `sky jobs launch`. Raise UserError for what SkyPilot can't carry."""
    spec = plan.spec
    target = rented(spec)
    places = [f"aws/{spec.region}/{zone}" for zone in names_in(target.zones)]
    choices = [
        {"infra": place, "instance_type": name, "use_spot": use_spot}
        for use_spot in {"true": [True], "false": [False]}.get(market(plan), [True, False])
        for name in plan.asked_for.instance_types
        for place in places or [f"aws/{spec.region}"]
    ]
    common = {
        "disk_size": target.disk_gb,
        # What is left of it ends by itself, should the engine's controller be gone.
        "autostop": {"idle_minutes": max(1, ceil(target.idle_minutes or 60)), "down": True},
        # The run says by it that it has saved, and goes on.
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [RESUME]},
    }
    return {
        "name": fit(spec.run, SKYPILOT_NAME).lower(),
        "resources": common | (choices[0] if len(choices) == 1 else {"ordered": choices}),
        "run": script(spec, hours(plan)),
    }


def dstack(plan: Plan) -> dict[str, Any]:
    """Return the task for `dstack apply`. Raise UserError for what dstack can't carry."""
    spec = plan.spec
    target = rented(spec)
    policies = {"true": "spot", "auto": "auto", "false": "on-demand"}
    document: dict[str, Any] = {
        "type": "task",
        "name": fit(spec.run, DSTACK_NAME).lower(),
        "python": "3.12",
        # Without a value: dstack takes it from the shell that applies this.
        "env": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"],
        "commands": [script(spec, hours(plan))],
        "backends": ["aws"],
        "regions": [spec.region],
        "instance_types": plan.asked_for.instance_types,
        "resources": {"disk": f"{target.disk_gb}GB.."},
        "spot_policy": policies[market(plan)],
        "max_duration": f"{ceil(60 * hours(plan))}m",
        "retry": {"on_events": ["no-capacity", "interruption"], "duration": "30d"},
        "creation_policy": "reuse-or-create",
        "idle_duration": "5m",
    }
    if has_gpu(spec.instance_types[0]):
        document["resources"]["gpu"] = "1.."
    if target.zones:
        document["availability_zones"] = names_in(target.zones)
    if plan.attempt.per_hour is not None:
        document["max_price"] = round(plan.attempt.per_hour, 4)
    return document


def batch(plan: Plan) -> dict[str, Any]:
    """Return what `aws batch submit-service-job --cli-input-json` takes.

    Its queue is the user's, and so is replaced. Raise UserError for other targets than a training
    job of SageMaker's.
    """
    spec = plan.spec
    if type(spec.kind) is not SageMaker:
        raise UserError(
            f"target={spec.target.name}: AWS Batch queues SageMaker's training jobs; "
            "give target=sagemaker"
        )
    [request] = spec.kind.requests(spec)
    payload = json.dumps(request.parameters, sort_keys=True)
    digest = hashlib.sha256(payload.encode()).hexdigest()[:8]
    return {
        "jobName": spec.job_name,
        "jobQueue": "YOUR-QUEUE",
        "serviceJobType": "SAGEMAKER_TRAINING",
        "serviceRequestPayload": payload,
        # The job's own limit, and no second one: Batch counts an attempt that waits, too.
        "retryStrategy": {"attempts": 1},
        "tags": spec.tags,
        "clientToken": f"{spec.run}-{spec.attempt}-{digest}",
    }


ENGINES: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "skypilot": skypilot,
    "dstack": dstack,
    "batch": batch,
}


def written(plan: Plan, engine: str, file: Path) -> tuple[str, list[str]]:
    """Return a document of one of ENGINES, and the command that starts it from a file."""
    document = ENGINES[engine](plan)
    if engine == "batch":
        start = ["aws", "batch", "submit-service-job", "--cli-input-json", f"file://{file}"]
        return json.dumps(document, indent=2) + "\n", [*start, "--region", plan.spec.region]
    text: str = yaml.dump(document, Dumper=Readable, sort_keys=False, width=200)
    start = {"skypilot": ["sky", "jobs", "launch"], "dstack": ["dstack", "apply", "-f"]}[engine]
    return text, [*start, str(file)]


class Readable(yaml.SafeDumper):
    """YAML that shows a script as it is."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Readable.add_representer(str, _text)


def rented(spec: Spec) -> ec2.Ec2Config:
    """Return the settings of the machine. Raise UserError where it is not one of EC2's."""
    if not isinstance(spec.target, ec2.Ec2Config) or not spec.kind.trains:
        raise UserError(
            f"target={spec.target.name}: SkyPilot and dstack rent EC2 machines; give target=ec2"
        )
    if spec.instances > 1:
        raise UserError(
            f"target.instances={spec.instances}: an exported run trains on one machine; give "
            "target.instances=1, or submit it here"
        )
    return spec.target


def market(plan: Plan) -> str:
    """Return the setting target.spot: each of the plan's offers has one of its own."""
    return rented(plan.asked_for).spot


def hours(plan: Plan) -> float:
    """Return the hours that the ceiling allows on the dearest machine that the engine may take."""
    return min(spec.hours for spec in (plan.spec, *plan.others))


def script(spec: Spec, hours: float) -> str:
    """Return what the machine runs: it goes on from the bucket, and saves there.

    hours: of all machines that the engine rents for the run, one after the other.
    """
    limit = round(3600 * hours)
    places = {
        "platform.run_dir": f"{SCRATCH}/runs/{spec.run}",
        "platform.cache": f"{SCRATCH}/cache",
        "platform.checkpoints": "null",
        "platform.package": "null",
    }
    data_root = weights_root = ""
    if spec.data is not None:
        data_root = places["data.root"] = f"{SCRATCH}/data"
    if spec.weights is not None:
        weights_root = places["model.weights_dir"] = f"{SCRATCH}/weights"
    named = [f"{key}={value}" for key, value in places.items()]
    return fill(
        "exported.sh",
        run=spec.run,
        bucket=spec.uri(),
        region=spec.region,
        source_sha256=spec.source,
        data=spec.data_uri or "",
        data_root=data_root,
        weights=spec.weights or "",
        weights_root=weights_root,
        wheels=spec.wheels or "",
        extras=",".join(spec.extras) or "train",
        scratch=SCRATCH,
        limit=limit,
        grace=ec2.grace_of(limit),
        every=ec2.UPLOAD_EVERY,
        processes=ec2.processes(spec.config),
        arguments=[*spec.overrides, "platform=ec2", f"name='{spec.run}'", *named],
        revision=spec.revision or "",
    )
