"""`python -m launch plan`: what `submit` will send, what it costs, what it may touch, what is missing. Changes nothing; needs no credentials."""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.cloud import account_stack, s3
from launch.cloud.prices import FALLBACK, Price, price
from launch.cloud.request import Request, check
from launch.cloud.session import Aws
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase, State
from launch.targets.spec import (
    NO_ACCOUNT,
    Ec2Target,
    NotebookTarget,
    SageMakerTarget,
    Spec,
    TargetConfig,
    load_config,
    load_target,
    resolved,
    run_id,
    split_overrides,
)
from launch.verbs.instances import processes
from trainer.common.console import log, python
from trainer.common.errors import OK, UserError
from trainer.common.git import revision
from trainer.settings import config as settings

NO_IMAGE = "ami-00000000000000000"  # stands in a plan where AWS can't be asked

ROLES = {
    "ec2": "ec2",
    "sagemaker": "training",
    "sagemaker_multi": "training",
    "tuner": "training",
    "notebook": "notebook",
}


@dataclass(frozen=True)
class Plan:
    """What `submit` is going to do. The same object is printed by `plan` and carried out by `submit`."""

    spec: Spec
    source: bytes  # the source tarball
    requests: list[Request]  # in order; empty where there is nothing to send
    foundation: bool  # whether the account has a bucket for it
    before: Attempt | None = None  # the newest attempt that there was
    state: State | None = None  # how it is

    @cached_property
    def attempt(self) -> Attempt:
        """This attempt, to be noted before it is sent."""
        target = self.spec.target
        return Attempt(
            run=self.spec.run,
            number=self.spec.attempt,
            target=target.name,
            instance_type=target.instance_type,
            instances=target.instances if isinstance(target, SageMakerTarget) else 1,
            spot=isinstance(target, Ec2Target | SageMakerTarget) and target.spot,
            hours=target.hours,
            job=self.spec.job_name,
            price=self.price,
            requests=self.requests,
            identity=identity(self.spec),
            noted=runs.now().isoformat(),
        )

    @property
    def price(self) -> Price:
        return price(self.spec.target.instance_type, self.spec.region)

    @property
    def trials(self) -> tuple[int, int]:
        """The jobs that a request may become, and how many of them at the same time: the trials of a tuning job."""
        for request in self.requests:
            if tuning := request.parameters.get("HyperParameterTuningJobConfig"):
                limits = tuning["ResourceLimits"]
                points = math.prod(
                    len(each["Values"])
                    for each in tuning["ParameterRanges"].get("CategoricalParameterRanges", [])
                )
                return limits.get("MaxNumberOfTrainingJobs", points), limits[
                    "MaxParallelTrainingJobs"
                ]  # a grid tries every point
        return 1, 1


def requests(spec: Spec, image: str) -> list[Request]:
    """What is sent for a spec, in order. image: the AMI of an EC2 instance."""
    from launch.targets import ec2, notebook, sagemaker

    build: dict[str, Callable[[], list[Request]]] = {
        "ec2": lambda: [ec2.run_instances(spec, image, ec2.user_data(spec))],
        "sagemaker": lambda: [sagemaker.training_job(spec)],
        "sagemaker_multi": lambda: [sagemaker.training_job(spec)],
        "tuner": lambda: [sagemaker.tuning_job(spec)],
        "notebook": lambda: [notebook.lifecycle_config(spec), notebook.notebook_instance(spec)],
    }
    built = build[spec.target.name]()
    for request in built:
        check(request)
    return built


def prepare(
    aws: Aws | None,
    target: TargetConfig,
    overrides: Sequence[str],
    data: Path | None = None,
    again: bool = False,
) -> Plan:
    """Plans the next attempt at a run. aws: None without credentials. again: also where the run is complete. Raises UserError, AwsError."""
    from launch.cloud import source

    config, name = load_config(target, overrides, data)
    tarball = source.build(source.extras(config))
    spec = Spec(
        target=target,
        config=config,
        overrides=tuple(overrides),
        run=run_id(target, config, name, overrides),
        account=aws.account if aws else NO_ACCOUNT,
        region=aws.region
        if aws
        else Aws(target.project, target.region).configured_region or FALLBACK,
        data=name,
        source=hashlib.sha256(tarball).hexdigest(),
        revision=revision(),
    )
    return next_attempt(aws, spec, tarball, again)


def next_attempt(aws: Aws | None, spec: Spec, tarball: bytes, again: bool = False) -> Plan:
    """Plans the next attempt at the run of a spec, whose number doesn't matter. Raises UserError, AwsError."""
    target = spec.target
    there = (
        aws is not None
        and aws.find("s3", "HeadBucket", r"404|NoSuchBucket|NotFound", Bucket=aws.bucket)
        is not None
    )
    before = runs.latest(aws, spec.run) if aws is not None and there else None
    if aws is None or before is None:
        first = dataclasses.replace(spec, attempt=1)
        return Plan(first, tarball, requests(first, image_id(aws, first)), there)
    check_same(before, spec)
    state = runs.observe(aws, before)
    spec = dataclasses.replace(spec, attempt=before.number)
    if state.phase is Phase.RUNNING or (state.phase is Phase.COMPLETE and not again):
        return Plan(spec, tarball, [], there, before, state)
    if isinstance(target, NotebookTarget) and state.phase is not Phase.ABSENT:
        start = Request("sagemaker", "StartNotebookInstance", {"NotebookInstanceName": before.job})
        return Plan(spec, tarball, [start], there, before, state)
    if state.phase is Phase.ABSENT and not runs.asked_to_stop(aws, before):
        # It was noted, and refused, never sent, or not yet seen by AWS: the very same is safe to
        # send again, and while it may be on its way nothing else is.
        on_its_way = before.refused is None and runs.now() - before.since < runs.YOUNG
        if on_its_way or requests(spec, image_id(aws, spec)) == before.requests:
            return Plan(spec, tarball, before.requests, there, before, state)
    spec = dataclasses.replace(spec, attempt=before.number + 1)
    return Plan(spec, tarball, requests(spec, image_id(aws, spec)), there, before, state)


def check_same(before: Attempt, spec: Spec) -> None:
    """Raises UserError where a run would go on as another: on another kind of machine, or with other settings."""
    then, now = before.identity, identity(spec)
    changed = [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed and not isinstance(spec.target, NotebookTarget):
        raise UserError(
            f"{spec.run}: this run began with other settings ({'; '.join(changed[:5])}); give the same again, or another name=..."
        )


def identity(spec: Spec) -> dict[str, Any]:
    """What stays the same over all attempts at a run."""
    return settings.identity(spec.config) | {"target": spec.target.name, "data": spec.data}


def image_id(aws: Aws | None, spec: Spec) -> str:
    """The AMI: the one given, else the one that AWS's public parameter names today. Raises AwsError."""
    if not isinstance(spec.target, Ec2Target):
        return ""
    if spec.target.image is not None:
        return spec.target.image
    return (
        str(aws.call("ssm", "GetParameter", Name=spec.target.ssm_parameter)["Parameter"]["Value"])
        if aws
        else NO_IMAGE
    )


# --- for people ---


def missing(aws: Aws | None, plan: Plan, data: Path | None, why_offline: str) -> list[str]:
    """What `submit` would stop at, each with its remedy."""
    lines = [why_offline] if why_offline else []
    weights = plan.spec.config.model.weights
    if weights and Path(weights).is_file() and not weights.startswith("/opt/"):
        where = f"{plan.spec.data_root or '/opt/ml/input/data/training'}/{Path(weights).name}"
        lines.append(
            f"model.weights={weights} is a file of this machine: put it into the folder of pictures, and give model.weights={where}"
        )
    if plan.price.on_demand is None:
        lines.append(
            f"the price of {plan.spec.target.instance_type} is not in the table, so no costs are shown: look it up at AWS"
        )
    if aws is None:
        return lines
    if not plan.foundation:
        lines.append(f"the foundation (bucket {aws.bucket}, roles): python -m launch up")
    elif plan.spec.data and data is None and not s3.listing(aws, f"data/{plan.spec.data}/"):
        uploaded = s3.folders(aws, f"data/{plan.spec.data}-")
        there = (
            f", or give one that is there as data.root=NAME: {', '.join(uploaded)}"
            if uploaded
            else ""
        )
        lines.append(
            f"the pictures (s3://{aws.bucket}/data/{plan.spec.data}/ is empty): add --data DIR to upload them{there}"
        )
    return lines


def cost(plan: Plan, spot: float | None) -> dict[str, Any]:
    """Dollars, estimated. spot: today's price of one hour, where AWS tells it."""
    target, per_hour = plan.spec.target, plan.price
    machines = plan.attempt.instances
    spot_hour = spot if spot is not None else per_hour.spot
    trials, parallel = plan.trials

    def rounded(hour: float | None, hours: float) -> float | None:
        return None if hour is None else round(hour * machines * hours, 4)

    return {
        "machines": ", ".join(machines_of(plan)),
        "per_hour": rounded(per_hour.on_demand, parallel),
        "per_hour_spot": None
        if isinstance(target, NotebookTarget)
        else rounded(spot_hour, parallel),
        "at_time_limit": rounded(per_hour.on_demand, target.hours * trials),
        "at_time_limit_spot": None
        if isinstance(target, NotebookTarget)
        else rounded(spot_hour, target.hours * trials),
        "time_limit_hours": target.hours,
        "uses_spot": plan.attempt.spot,
        "basis": per_hour.basis + ("" if spot is None else "; spot: what AWS asks now"),
    }


def machines_of(plan: Plan) -> list[str]:
    """What is rented, and how it is used."""
    spec, (trials, parallel) = plan.spec, plan.trials
    parts = [f"{plan.attempt.instances} x {spec.target.instance_type}"]
    several = processes(spec.target.instance_type, spec.config, plan.attempt.instances)
    if several > 1 and not isinstance(spec.target, NotebookTarget):
        parts.append(f"{several} processes")
    if trials > 1:
        parts.append(f"{trials} trials, {parallel} at a time")
    return parts


def spot_now(aws: Aws, spec: Spec) -> float | None:
    """The lowest spot price of the machine in the region now; None where AWS tells none (SageMaker's)."""
    if not isinstance(spec.target, Ec2Target):
        return None
    found = aws.call(
        "ec2",
        "DescribeSpotPriceHistory",
        InstanceTypes=[spec.target.instance_type],
        ProductDescriptions=["Linux/UNIX"],
        StartTime=runs.now(),
        MaxResults=20,
    )["SpotPriceHistory"]
    return min((float(entry["SpotPrice"]) for entry in found), default=None)


def described(aws: Aws | None, plan: Plan, data: Path | None, why_offline: str) -> dict[str, Any]:
    """The plan as data."""
    spec = plan.spec
    part = ROLES[spec.target.name]
    touch = {
        spec.role(part): [
            {
                "why": statement.reason,
                "actions": statement.actions,
                "resources": statement.resources,
            }
            for statement in account_stack.permissions(part, spec.project, spec.account, spec.region)
        ]
    }
    return {
        "run": spec.run,
        "attempt": spec.attempt,
        "state": None
        if plan.state is None or plan.before is None
        else f"attempt {plan.before.number}: {plan.state.phase} ({plan.state.detail})",
        "account": spec.account,
        "region": spec.region,
        "means": resolved(spec.target, spec.overrides, data).notes,
        "settings": {key: value for key, value, _ in settings.walk(spec.config)},
        "uploads": {
            "source": f"{spec.uri('source', spec.source)}.tar.gz",
            "data": spec.uri("data", spec.data) if spec.data and data else None,
        },
        "requests": [dataclasses.asdict(request) for request in plan.requests],
        "cost": cost(plan, spot_now(aws, spec) if aws else None),
        "may_touch": touch,
        "missing": missing(aws, plan, data, why_offline),
    }


def show(what: dict[str, Any]) -> None:
    log.info(
        "run       %s, attempt %d, in account %s, %s",
        what["run"],
        what["attempt"],
        what["account"],
        what["region"],
    )
    for line in what["means"]:
        log.info("means     %s", line)
    if what["state"]:
        log.info("before    %s", what["state"])
    for name, place in what["uploads"].items():
        if place:
            log.info("uploads   %s to %s", name, place)
    for request in what["requests"]:
        parameters = dict(request["parameters"])
        script = parameters.pop("UserData", None)
        log.info(
            "sends     %s %s\n%s",
            request["service"],
            request["operation"],
            json.dumps(parameters, indent=2, ensure_ascii=False),
        )
        if script is not None:
            log.info("UserData:\n%s", "\n".join(f"  | {line}" for line in script.splitlines()))
    if not what["requests"]:
        log.info("sends     nothing")
    for role, statements in what["may_touch"].items():
        log.info("may touch, as %s", role)
        for statement in statements:
            log.info(
                "  %s\n    %s\n    on %s",
                statement["why"],
                ", ".join(statement["actions"]),
                ", ".join(statement["resources"]),
            )
    money = what["cost"]
    log.info(
        "costs     %s, at most %g hours (%s)",
        money["machines"],
        money["time_limit_hours"],
        money["basis"],
    )
    for name, key in (("an hour", "per_hour"), ("at the time limit", "at_time_limit")):
        if money[key] is not None:
            spot = money[f"{key}_spot"]
            log.info(
                "  %-18s $%.2f%s",
                name,
                money[key],
                ""
                if spot is None
                else f", with spot about $%.2f{' (this plan)' if money['uses_spot'] else ''}"
                % spot,
            )
    for line in what["missing"]:
        log.warning("missing: %s", line)


def connect(target: TargetConfig) -> tuple[Aws | None, str]:
    """AWS, or None and why it can't be asked."""
    aws = Aws(target.project, target.region)
    try:
        if not aws.has_credentials() or not aws.account:
            return (
                None,
                f"credentials: there are none, so account {NO_ACCOUNT} stands for yours; sign in with aws sso login or aws configure",
            )
    except UserError as error:
        return None, str(error)
    return aws, ""


def job_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """What `plan` and `submit` are both asked for."""
    parser = argparse.ArgumentParser(prog=f"python -m launch {verb}", description=description)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the trainer's settings, as for python -m trainer",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the folder of pictures to upload, unless they are in the bucket",
    )
    parser.add_argument(
        "--again", action="store_true", help="one more attempt, also where the run is complete"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = job_parser("plan", __doc__)
    parser.add_argument("--json", action="store_true", help="the plan as one JSON document")
    options = parser.parse_intermixed_args(rest)
    if options.json:
        log.setLevel(logging.WARNING)  # the document alone on standard output
    target = load_target(targets)
    aws, why_offline = connect(target)
    if aws is not None:
        overdue.warn(aws, targets)
    plan = prepare(aws, target, options.overrides, options.data, options.again)
    what = described(aws, plan, options.data, why_offline)
    if options.json:
        print(json.dumps(what, indent=2, default=str))
    else:
        show(what)
        log.info("next:\n  %s -m launch submit %s", python(), shlex.join(arguments))
    return OK
