"""What `submit` is going to do: worked out, reckoned and checked, without changing anything."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from launch import ceiling
from launch.ceiling import Ceiling
from launch.cloud import account_stack, network, s3, source, wheelhouse
from launch.cloud.ownership import NO_BUCKET
from launch.cloud.prices import FALLBACK, Price, asked, price
from launch.cloud.remedies import DENIED
from launch.cloud.request import Request, check
from launch.cloud.session import Aws, AwsError
from launch.targets import attempt as notes
from launch.targets.attempt import Attempt, Phase, State
from launch.targets.base import Spec, TargetConfig, targets
from launch.targets.instance_types import processes
from launch.targets.spec import (
    NO_ACCOUNT,
    account_of,
    carried,
    load_config,
    only_here,
    resolved,
    run_id,
    weights_folder,
    weights_name,
    words_of,
)
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.common.git import revision
from trainer.settings import config as settings


@dataclass(frozen=True)
class Plan:
    """What `submit` is going to do. The same object is printed by `plan` and carried out."""

    spec: Spec
    source: bytes  # the source tarball
    account_stack: bool  # whether the account has a bucket for it
    requests: list[Request]  # in order; empty where there is nothing to send
    before: Attempt | None = None  # the newest attempt that there was
    state: State | None = None  # how it is
    # What an hour of each kind of machine costs, where AWS was asked.
    prices: Mapping[str, Price] = field(default_factory=dict)
    ceiling: Ceiling | None = None  # None: nothing is sent, or its price is not known
    others: tuple[Spec, ...] = ()  # what is asked for where AWS hasn't this, in order
    wished: Spec | None = None  # what they all stand for, where AWS is asked for one of several

    @cached_property
    def attempt(self) -> Attempt:
        """This attempt, to be noted before it is sent."""
        spec, now = self.spec, notes.now().isoformat()
        asked, after = now, None
        if self.before is not None:
            if self.before.refused is not None and self.before.asked is not None:
                asked = self.before.asked
            if self.before.number == spec.attempt:
                after = self.before.after
            elif self.state is not None and self.state.ended is not None and self.state.is_sure:
                after = self.state.ended.isoformat()
        return Attempt(
            run=spec.run,
            number=spec.attempt,
            target=spec.target.name,
            instance_type=spec.target.instance_type,
            instances=spec.instances,
            spot=spec.spot,
            hours=spec.hours,
            job=spec.job_name,
            price=self.price,
            requests=self.requests,
            identity=spec.identity,
            noted=now,
            per_hour=self.price.hour_at_most(spec.bid),
            ceiling=self.ceiling.dollars if self.ceiling else None,
            asked=asked,
            after=after,
            words=words_of(self.asked_for),
            project=spec.project,
        )

    @property
    def price(self) -> Price:
        """Return what an hour of one of its machines costs, of the dearest that it may be."""
        return dearest(self.spec, self.prices)

    @property
    def asked_for(self) -> Spec:
        """What the next attempt is planned from: all that may be asked for."""
        return self.wished or self.spec

    @property
    def next_offer(self) -> "Plan":
        """The same plan for the next of the others."""
        spec, *others = self.others
        return replace(self, spec=spec, requests=built(spec), others=tuple(others))

    @property
    def trials(self) -> tuple[int, int]:
        """The jobs that the requests may become, and how many of them at the same time."""
        return self.spec.kind.trials(self.requests[0]) if self.requests else (1, 1)


def prepare(
    aws: Aws | None,
    target: TargetConfig,
    overrides: Sequence[str],
    data: Path | None = None,
    again: bool = False,
) -> Plan:
    """Plan the next attempt at a run.

    aws: None without credentials. data: the folder to upload. again: also where the run is
    complete. Raise UserError, AwsError.
    """
    overrides, own_files = carried(overrides)
    config, name = load_config(target, overrides, data)
    extras = source.extras(config, s3.files_of(data) if data else ())
    wheels = None
    if takes_wheels(aws, target):
        wheels, lock = wheelhouse.made(extras)
        tarball = source.build(extras, lock=lock)
    else:
        tarball = source.build(extras)
    if own_files:
        tarball = source.with_files(tarball, own_files)
    if aws is None:
        account = NO_ACCOUNT
        region = account_of(target).configured_region or FALLBACK
    else:
        account, region = aws.account, aws.region
    spec = Spec(
        target=target,
        config=config,
        overrides=tuple(overrides),
        run=run_id(target, config, name, overrides),
        account=account,
        region=region,
        data=name,
        source=hashlib.sha256(tarball).hexdigest(),
        revision=revision(),
        extras=tuple(extras),
        weights=weights_name(weights_folder(target, overrides, data)),
        wheels=wheels,
    )
    return next_attempt(aws, spec, tarball, again)


def takes_wheels(aws: Aws | None, target: TargetConfig) -> bool:
    """Return whether a job installs from a wheelhouse in the bucket, and from no index.

    `target.wheels` says so. Where it says nothing, a job does whose subnets lead nowhere but to
    S3, as far as this user may look. Raise AwsError.
    """
    kind = targets()[target.name]
    asked: bool | None = getattr(target, "wheels", None)
    if not kind.trains or asked is not None or aws is None:
        return bool(kind.trains and asked)
    named, public_ip = kind.stands_in(target)
    if not named and public_ip is not False:
        return False
    try:
        found = network.subnets(aws, named, public_ip)
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return False
    return bool(found) and all(each.is_closed for each in found)


def next_attempt(aws: Aws | None, spec: Spec, tarball: bytes, again: bool = False) -> Plan:
    """Plan the next attempt at the run of a spec, whose number doesn't matter.

    Raise UserError, AwsError.
    """
    stack = aws is not None and has_bucket(aws)
    before = notes.latest(aws, spec.run) if aws is not None and stack else None
    if aws is None or before is None:
        first = Plan(replace(spec, attempt=1), tarball, stack, [])
        return priced(aws, first)
    check_same(before, spec)
    state = spec.kind.observe(aws, before)
    spec = replace(spec, attempt=before.number)

    def send(spec: Spec, requests: list[Request]) -> Plan:
        return Plan(spec, tarball, stack, requests, before, state)

    if state.phase is Phase.RUNNING:
        spec.kind.check_running(before, spec)
    if state.phase is Phase.RUNNING or (state.phase is Phase.COMPLETE and not again):
        return send(spec, [])
    restart = spec.kind.restart(before, state, spec)
    if restart:
        return send(spec, restart)
    # It was noted, and refused, never sent, or not yet seen by AWS: the very same is safe to send
    # again, and while it may be on its way nothing else is.
    never_seen = state.phase is Phase.ABSENT and not s3.exists(aws, before.key_of("stop"))
    if never_seen and before.may_be_on_its_way:
        return send(spec, before.requests)
    # What AWS made nothing of keeps its number: no machine has it.
    if never_seen and before.refused is not None:
        return priced(aws, send(spec, []))
    return priced(aws, send(replace(spec, attempt=before.number + 1), []))


def has_bucket(aws: Aws) -> bool:
    """Return whether the account has the project's bucket. Raise AwsError."""
    return aws.find("s3", "HeadBucket", NO_BUCKET, Bucket=aws.bucket) is not None


def priced(aws: Aws | None, plan: Plan) -> Plan:
    """Return a plan for new requests: what is asked for, in order, each below the ceiling.

    Raise UserError where the ceiling leaves too little for any, AwsError.
    """
    before, waited = plan.before, 0.0
    if before is not None and before.refused is not None and before.asked is not None:
        waited = notes.seconds_between(datetime.fromisoformat(before.asked), notes.now())
    spec = plan.spec.kind.looked_up(aws, plan.spec)
    plan = replace(plan, wished=spec)
    offers = spec.kind.offers(aws, spec, waited)
    names = dict.fromkeys(name for offer in offers for name in offer.instance_types)
    prices = {name: asked(aws, name) if aws else price(name, spec.region) for name in names}
    plan = replace(plan, prices=prices)
    offers = [
        replace(offer, dollars_hour=expected_hour(offer, dearest(offer, prices)))
        for offer in offers
    ]
    cost = dearest(offers[0], prices)
    trials, _ = spec.kind.trials(spec.kind.requests(offers[0])[0])
    dollars = ceiling.of_run(offers[0], cost, trials)
    if dollars is None or cost.on_demand is None or not spec.kind.trains:
        return replace(plan, spec=offers[0], requests=built(offers[0]), others=tuple(offers[1:]))
    spent = ceiling.spent(aws, spec.run) if aws is not None and before is not None else 0.0
    limit = Ceiling(dollars, spent)
    allowed = []
    refused: list[UserError] = []
    for offer in offers:
        cost = dearest(offer, prices)
        if cost.on_demand is None:
            continue  # no ceiling could be held at a price that nobody knows
        try:
            allowed.append(ceiling.limited(offer, cost, limit, trials))
        except UserError as error:
            refused.append(error)
    if not allowed:
        raise refused[0]
    return replace(
        plan,
        spec=allowed[0],
        requests=built(allowed[0]),
        others=tuple(allowed[1:]),
        ceiling=limit,
    )


def dearest(spec: Spec, prices: Mapping[str, Price]) -> Price:
    """Return the price of the dearest machine that a job may get, as it buys it.

    One without a price is the dearest.
    """
    known = [
        prices[name] if name in prices else price(name, spec.region) for name in spec.instance_types
    ]
    most = max(known, key=lambda each: inf if each.on_demand is None else each.on_demand)
    return spec.bought(most)


def expected_hour(spec: Spec, price: Price) -> float | None:
    """Return dollars an hour that all of a job's machines will probably cost; None: not known."""
    hour = price.hour(spec.spot)
    return None if hour is None else round(hour * spec.instances, 4)


def built(spec: Spec) -> list[Request]:
    """Return what is sent for a spec, in order, checked. Raise UserError."""
    made = spec.kind.requests(spec)
    for request in made:
        check(request)
    return made


def check_same(before: Attempt, spec: Spec) -> None:
    """Raise UserError where a run would go on as another.

    That is on another kind of machine, or with other settings.
    """
    then, now = before.identity, spec.identity
    changed = [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed and spec.kind.trains:
        raise UserError(
            f"{spec.run}: this run began with other settings ({'; '.join(changed[:5])}); "
            "give the same again, or another name=..."
        )


def missing(aws: Aws | None, plan: Plan, data: Path | None) -> list[str]:
    """Return what `submit` would stop at, each with its remedy. Raise AwsError."""
    lines = []
    spec = plan.spec
    folder = spec.data_root or "/opt/ml/input/data/training"
    for given, instead in only_here(spec.config, folder):
        lines.append(
            f"{given} is on this machine only: put it into the folder of pictures, and give "
            f"{instead}"
        )
    resent = plan.before is not None and plan.requests == plan.before.requests
    if plan.price.on_demand is None and plan.requests and not resent:
        lines.append(
            f"the price of {plan.price.instance_type}: neither AWS's Price List nor the table "
            "has it, so no ceiling can be held: choose another target.instance_type, or run "
            "python -m launch prices --refresh as a user who may call pricing:GetProducts"
        )
    if aws is None:
        return lines
    if aws.own_bucket:
        lines += other_region(aws, aws.own_bucket)
    if not plan.account_stack:
        lines.append(f"the foundation (bucket {aws.bucket}, roles): python -m launch up")
    elif spec.own_data:
        lines += own_pictures(aws, str(spec.data_uri))
    elif spec.data and data is None and not s3.listing(aws, f"data/{spec.data}/"):
        line = f"the pictures (s3://{aws.bucket}/data/{spec.data}/ is empty): "
        line += "add --data DIR to upload them"
        uploaded = s3.folders(aws, f"data/{spec.data}-")
        if uploaded:
            line += f", or give one that is there as data.root=NAME: {', '.join(uploaded)}"
        lines.append(line)
    return lines


def own_pictures(aws: Aws, uri: str) -> list[str]:
    """Return what is missing of pictures that lie on S3 already, as far as this user may look."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    lines = other_region(aws, bucket)
    if lines:
        return lines
    try:
        found = aws.call("s3", "ListObjectsV2", Bucket=bucket, Prefix=f"{prefix}/train/", MaxKeys=1)
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return []  # the job's role may read what its user may not
    if found.get("KeyCount"):
        return []
    return [f"the pictures: there is nothing below {uri}/train/; correct data.root"]


def other_region(aws: Aws, bucket: str) -> list[str]:
    """Return a line where a bucket of the user's own lies in another region than the machines.

    That is as far as this user may look.
    """
    try:
        found = aws.find("s3", "HeadBucket", NO_BUCKET, Bucket=bucket)
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return []
    region = (found or {}).get("BucketRegion", aws.region)
    if region == aws.region:
        return []
    return [
        f"a bucket in {aws.region}, where the machines are: s3://{bucket} is in {region}, which "
        "SageMaker refuses and EC2 bills by the byte; give "
        f"target.region={shlex.quote(region)}, or another bucket"
    ]


def cost(aws: Aws | None, plan: Plan) -> dict[str, Any]:
    """Return dollars, estimated: of all machines at a time, with what comes with them."""
    trials, parallel = plan.trials
    hours, price = plan.spec.target.hours, plan.price
    on_demand, spot = price.hour(spot=False), None
    if plan.spec.kind.trains:
        price = with_spot_now(aws, plan)
        spot = price.hour(spot=True)

    def rounded(hour: float | None, times: float) -> float | None:
        return None if hour is None else round(hour * plan.spec.instances * times, 4)

    return {
        "machines": ", ".join(machines_of(plan)),
        "per_hour": rounded(on_demand, parallel),
        "per_hour_spot": rounded(spot, parallel),
        "disk_and_address_per_hour": rounded(price.parts, parallel),
        "at_time_limit": rounded(on_demand, hours * trials),
        "at_time_limit_spot": rounded(spot, hours * trials),
        "time_limit_hours": hours,
        "uses_spot": plan.spec.spot,
        "basis": price.basis,
    }


def machines_of(plan: Plan) -> list[str]:
    """Return what is rented, and how it is used."""
    spec, (trials, parallel) = plan.spec, plan.trials
    parts = [f"{spec.instances} x {spec.target.instance_type}"]
    several = processes(spec.instance_types[0], spec.config, spec.instances)
    if several > 1 and spec.kind.trains:
        parts.append(f"{several} processes")
    if trials > 1:
        parts.append(f"{trials} trials, {parallel} at a time")
    return parts


def means(spec: Spec, data: Path | None) -> list[str]:
    """Return a line for what the overrides mean and don't say, and for each without effect."""
    notes = [*resolved(spec.target, spec.overrides, data).notes]
    if spec.wheels is not None:
        why = "target.wheels=true"
        if getattr(spec.target, "wheels", None) is None:
            why = "its subnet leads nowhere but to S3"
        notes.append(f"{why}: the job installs from the bucket, and asks no index of packages")
    recipe = spec.config.recipe
    if spec.config.model.name == settings.AUTO:
        longest = "any time"
        if recipe.minutes is not None:
            longest = f"{recipe.minutes:g} minutes, or a tenth of the training if that is longer"
        notes.append(
            f"model={settings.AUTO} measures before it trains, for {longest}; only then is it "
            "known how long training takes, so the price at the time limit is the most that "
            "it can cost"
        )
    return notes + settings.ignored(spec.config, spec.overrides, spec.kind.sweeps)


def with_spot_now(aws: Aws | None, plan: Plan) -> Price:
    """Return the price of a plan with what AWS asks for spot now, where it tells this user."""
    spec = plan.spec
    if aws is None or spec.spot_price is not None:
        return plan.price
    try:
        asked_now = spec.kind.asked_for_spot(aws, spec)
    except AwsError as error:
        log.warning("today's spot price is not known: %s", error)
        return plan.price
    return dearest(replace(spec, spot_price=asked_now), plan.prices)


def described(aws: Aws | None, plan: Plan, data: Path | None, offline: str) -> dict[str, Any]:
    """Return the plan as data. offline: why AWS can't be asked. Raise AwsError."""
    spec = plan.spec
    role = spec.kind.role
    statements = account_stack.permissions(role, spec.place)
    state = None
    if plan.before is not None and plan.state is not None:
        state = f"attempt {plan.before.number}: {plan.state.phase} ({plan.state.detail})"
    return {
        "run": spec.run,
        "attempt": spec.attempt,
        "state": state,
        "account": spec.account,
        "region": spec.region,
        "means": means(spec, data),
        "settings": {key: value for key, value, _ in settings.walk(spec.config)},
        "uploads": {
            "source": f"{spec.uri('source', spec.source)}.tar.gz",
            "data": spec.uri("data", spec.data) if spec.data and data else None,
            "weights": spec.uri("data", spec.weights) if spec.weights else None,
            "wheels": spec.uri("data", spec.wheels) if spec.wheels else None,
        },
        "requests": [dataclasses.asdict(request) for request in plan.requests],
        "ceiling": None if plan.ceiling is None else dataclasses.asdict(plan.ceiling),
        "cost": cost(aws, plan),
        "may_touch": {
            spec.role(role): [
                {
                    "why": statement.reason,
                    "actions": statement.actions,
                    "resources": statement.resources,
                }
                for statement in statements
            ]
        },
        "missing": [*filter(None, [offline]), *missing(aws, plan, data)],
    }
