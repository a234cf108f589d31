"""A month of runs on EC2, in a model of AWS with a clock of its own.

What is asked for, noted, observed, waited for and limited is the product's own code; AWS, the
machine's script (tests/launch/targets/test_user_data.py runs the real one), the people and their
laptops are modelled here. Everything follows from a seed.

A run's life is played alone, in the weather that all runs share: which machines are free, what
spare ones cost, and when AWS can't be reached are functions of seed and hour.
"""

import dataclasses
import hashlib
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from launch import ceiling, following, patience, planning, submission
from launch.cloud.prices import ADDRESS_HOUR, GP3_GB_MONTH, HOURS_A_MONTH, S3_GB_MONTH
from launch.cloud.session import Aws, AwsError
from launch.targets import attempt as notes
from launch.targets import ec2_offers, ec2_request, ec2_state
from launch.targets.base import Spec
from launch.targets.spec import load_config, load_target
from trainer.common.console import log
from trainer.common.errors import FAULT, OK, RESUME, UserError

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
DAYS = 30
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
HOURLY = {"g4dn.xlarge": 0.526, "g5.xlarge": 1.006, "g6.xlarge": 0.805}
PARTS = 100 * GP3_GB_MONTH / HOURS_A_MONTH + ADDRESS_HOUR  # dollars an hour, of disk and address
SET_UP = 4  # minutes until a machine trains
CHECKPOINT = 300_000_000  # bytes
SAVES = 10  # minutes between two checkpoints
CODES = {notes.Phase.COMPLETE: OK, notes.Phase.FAILED: FAULT}
SILENT = 100  # a level that no line has
EVERY = 60.0  # seconds between two looks of a waiting submit


class Clock:
    """The time of the run that is played."""

    def __init__(self) -> None:
        self.time = BEGIN
        self.until: datetime | None = None  # when the laptop dies

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
        if self.until is not None and self.time >= self.until:
            self.until = None
            raise LaptopDied


class LaptopDied(BaseException):
    """The lid is closed, in the middle of whatever it was."""


def chance(*parts: object) -> float:
    """A number from 0 to 1 that follows from its parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Weather:
    """What AWS has, asks and suffers in an hour."""

    seed: int

    def is_free(self, kind: str, zone: str, market: str, when: datetime) -> bool:
        hour = int((when - BEGIN).total_seconds() // 3600)
        drought = chance(self.seed, "drought", kind, market, hour // 12) < 0.25
        rate = 0.15 if drought else 0.7 if market == "spot" else 0.85
        return chance(self.seed, "free", kind, zone, market, hour) < rate

    def has_quota(self, account: int, market: str, when: datetime) -> bool:
        """Whether an account's quota allows it: a few have to ask, and wait."""
        granted = BEGIN + timedelta(days=DAYS * chance(account, "granted"))
        return chance(self.seed, "quota", account, market) >= 0.04 or when >= granted

    def spot_price(self, kind: str, zone: str, when: datetime) -> float:
        day = int((when - BEGIN).total_seconds() // 86400)
        hour = int((when - BEGIN).total_seconds() // 3600)
        level = 0.3 + 0.3 * chance(self.seed, "price", kind, zone, day)
        return HOURLY[kind] * level * (0.95 + 0.3 * chance(self.seed, "tick", kind, zone, hour))

    def is_out(self, when: datetime, who: str) -> bool:
        """Whether AWS can't be reached, by a person's network or by a fault of its own."""
        hour = int((when - BEGIN).total_seconds() // 3600)
        fault = chance(self.seed, "fault", hour // 3) < 0.01
        return fault or chance(self.seed, "lid", who, hour // 2) < 0.04


@dataclass
class Version:
    """An object's version in the bucket."""

    key: str
    body: bytes
    size: int
    since: datetime
    until: datetime | None = None  # when it was replaced or deleted


@dataclass
class Machine:
    """An instance, and what its script does (launch/targets/user_data.sh)."""

    id: str
    kind: str
    zone: str
    spot: bool
    bid: float | None
    attempt: int
    limit: int
    grace: int
    idle: int
    since: datetime
    chance: random.Random
    unseen: int  # answers in which it is not listed yet
    until: datetime | None = None
    reason: str = ""
    began: datetime | None = None  # the script, once it owns the run
    done: float = 0.0  # minutes of work, on its disk
    saved: int = 0
    _at: datetime | None = None

    def __post_init__(self) -> None:
        pick = self.chance
        self.script = self.since + timedelta(seconds=pick.uniform(20, 50))
        self.deadline = self.script + timedelta(seconds=self.limit)
        hours = pick.expovariate
        # Of these most never come in a machine's few hours.
        self.fails = {
            "hang": self.script + timedelta(hours=hours(1 / 150)),
            "script": self.script + timedelta(hours=hours(1 / 300)),
            "hardware": self.script + timedelta(hours=hours(1 / 400)),
            "reboot": self.script + timedelta(hours=hours(1 / 60)),
        }
        self.reclaimed = datetime.max.replace(tzinfo=UTC)
        if self.spot:
            self.reclaimed = self.script + timedelta(hours=hours(1 / 6))

    def end(self, when: datetime, reason: str) -> None:
        self.until, self.reason = when, reason


@dataclass
class Life:
    """A run, from its first submit to its end, with what it cost."""

    number: int
    need: float  # minutes of work
    supervised: bool
    market: str
    max_dollars: float | None
    machines: list[Machine] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)
    limit: float = 0.0  # its ceiling, as it was noted
    end: str = ""  # complete, ceiling, gave up
    submits: int = 0
    deaths: int = 0
    twins: int = 0
    refusals: int = 0
    outages: int = 0

    @property
    def run(self) -> str:
        return f"run-{self.number}"


class Model(Aws):
    """AWS as one run sees it."""

    def __init__(self, weather: Weather, clock: Clock, life: Life, seed: int) -> None:
        super().__init__("packhorse", "us-east-1")
        self.__dict__["account"] = "123456789012"
        self.weather, self.clock, self.life = weather, clock, life
        self.chance = random.Random(f"{seed} {life.number}")
        self.current: dict[str, Version] = {}
        self.tokens: dict[str, dict[str, Any]] = {}
        self.during: Callable[[], None] | None = None  # happens at a call, as another submit does
        self.countdown = 0

    def renew(self) -> None:
        pass

    def call(
        self, service: str, operation: str, *, region: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        self.countdown -= 1
        if self.countdown == 0 and self.during is not None:
            happens, self.during = self.during, None
            happens()
        if self.weather.is_out(self.clock.time, self.life.run):
            self.life.outages += 1
            if operation == "RunInstances" and self.chance.random() < 0.5:
                self._answer(operation, parameters)  # AWS has it, and nobody hears
            raise AwsError("AWS can't be reached", "EndpointConnectionError", "")
        self.play()
        return self._answer(operation, parameters)

    def _answer(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self, f"_{operation}")(**parameters)
        return answer

    def pages(
        self, service: str, operation: str, key: str, **parameters: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self.call(service, operation, **parameters)[key]

    # --- S3 ---

    def put(self, key: str, body: bytes, when: datetime, size: int | None = None) -> None:
        before = self.current.get(key)
        if before is not None:
            before.until = when
        self.current[key] = Version(key, body, len(body) if size is None else size, when)
        self.life.versions.append(self.current[key])

    def delete(self, key: str, when: datetime) -> None:
        self.current.pop(key).until = when

    def _PutObject(self, **asked: Any) -> dict[str, Any]:
        if "IfNoneMatch" in asked and asked["Key"] in self.current:
            raise AwsError("taken", "PreconditionFailed", "", refused=True)
        self.put(asked["Key"], asked["Body"], self.clock.time)
        return {"ETag": "1"}

    def _GetObject(self, **asked: Any) -> dict[str, Any]:
        version = self._HeadObject(**asked)["version"]
        return {"Body": io.BytesIO(version.body), "LastModified": version.since}

    def _HeadObject(self, **asked: Any) -> dict[str, Any]:
        if asked["Key"] not in self.current:
            raise AwsError("none", "NoSuchKey", "", refused=True)
        return {"version": self.current[asked["Key"]]}

    def _HeadBucket(self, **asked: Any) -> dict[str, Any]:
        return {}

    def _ListObjectsV2(self, **asked: Any) -> dict[str, Any]:
        listed = [
            {"Key": key, "Size": each.size, "ETag": '"1"', "LastModified": each.since}
            for key, each in sorted(self.current.items())
            if key.startswith(asked["Prefix"])
        ]
        return {"Contents": listed}

    def _ListObjectVersions(self, **asked: Any) -> dict[str, Any]:
        now = self.clock.time
        listed = [
            {"Key": each.key, "Size": each.size, "LastModified": each.since}
            for each in self.life.versions
            if each.key.startswith(asked["Prefix"]) and gone(each, now) > now
        ]
        return {"Versions": listed}

    # --- EC2 ---

    def _GetProducts(self, **asked: Any) -> dict[str, Any]:
        wanted = {each["Field"]: each["Value"] for each in asked["Filters"]}
        price = {"unit": "Hrs", "pricePerUnit": {"USD": str(HOURLY[wanted["instanceType"]])}}
        terms = {"OnDemand": {"T": {"priceDimensions": {"D": price}}}}
        return {"PriceList": [json.dumps({"terms": terms})]}

    def _GetParameter(self, **asked: Any) -> dict[str, Any]:
        return {"Parameter": {"Value": "ami-0123456789abcdef0"}}

    def _DescribeInstanceTypeOfferings(self, **asked: Any) -> dict[str, Any]:
        names = asked["Filters"][0]["Values"]
        made = [{"InstanceType": name, "Location": zone} for name in names for zone in ZONES]
        return {"InstanceTypeOfferings": made}

    def _DescribeSpotPriceHistory(self, **asked: Any) -> dict[str, Any]:
        at, history = asked["StartTime"], []
        while True:
            history += [
                {
                    "AvailabilityZone": zone,
                    "SpotPrice": str(self.weather.spot_price(kind, zone, at)),
                }
                for kind in asked["InstanceTypes"]
                for zone in ZONES
                if asked.get("AvailabilityZone", zone) == zone
            ]
            if at >= asked["EndTime"]:
                break
            at = min(at + timedelta(hours=1), asked["EndTime"])
        return {"SpotPriceHistory": history}

    def _GetSpotPlacementScores(self, **asked: Any) -> dict[str, Any]:
        return {"SpotPlacementScores": []}

    def _RunInstances(self, **asked: Any) -> dict[str, Any]:
        if asked["ClientToken"] in self.tokens:
            return self.tokens[asked["ClientToken"]]
        now = self.clock.time
        options = asked.get("InstanceMarketOptions", {}).get("SpotOptions")
        market = "spot" if options else "on-demand"
        kind = asked["InstanceType"]
        zone = asked.get("Placement", {}).get("AvailabilityZone")
        zone = zone or ZONES[int(3 * self.chance.random())]
        if not self.weather.has_quota(self.life.number, market, now):
            self.life.refusals += 1
            raise AwsError("quota", "VcpuLimitExceeded", "", refused=True)
        bid = float(options["MaxPrice"]) if options and "MaxPrice" in options else None
        if not self.weather.is_free(kind, zone, market, now):
            self.life.refusals += 1
            raise AwsError("none free", "InsufficientInstanceCapacity", "", refused=True)
        script = asked["UserData"]
        number = dict(re.findall(r"^(attempt|limit|grace|idle)=(\d+)$", script, re.MULTILINE))
        machine = Machine(
            id=f"i-{len(self.life.machines):017x}",
            kind=kind,
            zone=zone,
            spot=bool(options),
            bid=bid,
            since=now,
            chance=random.Random(self.chance.random()),
            unseen=self.chance.choice((0, 0, 0, 1, 3)),
            attempt=int(number["attempt"]),
            limit=int(number["limit"]),
            grace=int(number["grace"]),
            idle=int(number["idle"]),
        )
        self.life.machines.append(machine)
        self.tokens[asked["ClientToken"]] = {"Instances": [{"InstanceId": machine.id}]}
        return self.tokens[asked["ClientToken"]]

    def _DescribeInstances(self, **asked: Any) -> dict[str, Any]:
        wanted = {each["Name"]: each["Values"] for each in asked["Filters"]}
        now, found = self.clock.time, []
        for machine in self.life.machines:
            if machine.unseen:
                machine.unseen -= 1
                continue
            if machine.until is not None and now - machine.until > timedelta(hours=1):
                continue
            if machine.id not in wanted.get("instance-id", [machine.id]):
                continue
            if str(machine.attempt) not in wanted.get("tag:attempt", [str(machine.attempt)]):
                continue
            state = "running" if machine.until is None or machine.until > now else "terminated"
            if state not in wanted.get("instance-state-name", [state]):
                continue
            found.append(self._described(machine, state))
        return {"Reservations": [{"Instances": found}]}

    def _described(self, machine: Machine, state: str) -> dict[str, Any]:
        described: dict[str, Any] = {
            "InstanceId": machine.id,
            "State": {"Name": state},
            "LaunchTime": machine.since,
            "Tags": [
                {"Key": "run", "Value": self.life.run},
                {"Key": "attempt", "Value": str(machine.attempt)},
            ],
        }
        if state == "terminated":
            assert machine.until is not None
            described["StateReason"] = {"Code": machine.reason, "Message": machine.reason}
            described["StateTransitionReason"] = f"({machine.until:%Y-%m-%d %H:%M:%S} GMT)"
        return described

    def _TerminateInstances(self, **asked: Any) -> dict[str, Any]:
        for machine in self.life.machines:
            if machine.id in asked["InstanceIds"] and machine.until is None:
                machine.end(self.clock.time, ec2_state.BY_HAND)
        return {}

    # --- the machines' own time ---

    def play(self) -> None:
        """Let the machines live until now, minute by minute, in the order of time."""
        now = self.clock.time
        live = [machine for machine in self.life.machines if machine.until is None]
        while live:
            machine = min(live, key=lambda each: each._at or each.script)
            at = machine._at or machine.script
            if at > now:
                break
            self._minute(machine, at)
            machine._at = at + timedelta(minutes=1)
            live = [each for each in live if each.until is None]

    def _minute(self, machine: Machine, at: datetime) -> None:
        """One minute of a machine's script."""
        if machine.began is None and not self._claims(machine, at):
            machine.end(at + timedelta(seconds=5), ec2_state.BY_ITSELF)
            return
        price = self.weather.spot_price(machine.kind, machine.zone, at)
        dear = machine.spot and machine.bid is not None and price > machine.bid
        if at >= machine.reclaimed or dear:
            told = machine.chance.random() < 0.8  # else it is gone before anybody knows
            if told and at < machine.fails["script"]:
                self._save(machine, at)
                self._word(machine, at, RESUME, ec2_state.SPOT_NOTICE)
            machine.end(at + timedelta(seconds=30 * told), ec2_state.RECLAIMED[0])
        elif at >= machine.fails["hardware"]:
            machine.end(at, "Server.InternalError")
        elif at >= machine.fails["script"]:
            # systemd ends the machine, at the whole minute after its deadline
            if at >= machine.deadline:
                machine.end(at + timedelta(minutes=1), ec2_state.BY_ITSELF)
        elif machine.fails["reboot"] <= at < machine.fails["reboot"] + timedelta(minutes=2):
            pass
        else:
            self._works(machine, at)

    def _claims(self, machine: Machine, at: datetime) -> bool:
        """What the script does first: `claim` and `look`."""
        key = f"runs/{self.life.run}/attempts/{machine.attempt}"
        if f"{key}.machine" not in self.current:
            self.put(f"{key}.machine", machine.id.encode(), at)
        owner = self.current[f"{key}.machine"].body.decode()
        if owner != machine.id or self._newest() > machine.attempt or f"{key}.json" in self.current:
            return False
        machine.began = at
        self.put(f"runs/{self.life.run}/log.txt", b"", at, 100_000)
        machine.done = machine.saved = self._stored()
        return True

    def _works(self, machine: Machine, at: datetime) -> None:
        key = f"runs/{self.life.run}/attempts/{machine.attempt}"
        assert machine.began is not None
        self.current[f"runs/{self.life.run}/log.txt"].since = at  # once a minute
        hangs = at >= machine.fails["hang"]
        if at - machine.began > timedelta(minutes=SET_UP) and not hangs:
            machine.done += 1
        if self._newest() > machine.attempt:
            machine.end(at + timedelta(seconds=10), ec2_state.BY_ITSELF)
        elif machine.done >= self.life.need:
            self._save(machine, at)
            self._word(machine, at, OK, "done")
            machine.end(at + timedelta(seconds=30), ec2_state.BY_ITSELF)
        elif f"{key}.stop" in self.current:
            self._save(machine, at)
            self._word(machine, at, RESUME, "asked to stop")
            machine.end(at + timedelta(seconds=30), ec2_state.BY_ITSELF)
        elif at >= machine.deadline - timedelta(seconds=machine.grace):
            self._save(machine, at)
            self._word(machine, at, RESUME, "time limit")
            machine.end(at + timedelta(seconds=60), ec2_state.BY_ITSELF)
        elif hangs and (at - machine.fails["hang"]).total_seconds() > machine.idle > 0:
            self._word(machine, at, 137, ec2_state.IDLE)
            machine.end(at + timedelta(seconds=30), ec2_state.BY_ITSELF)
        elif machine.done - machine.saved >= SAVES:
            self._save(machine, at)

    def _newest(self) -> int:
        pattern = rf"runs/{self.life.run}/attempts/(\d+)\.request\.json"
        found = (re.fullmatch(pattern, key) for key in self.current)
        return max(int(match[1]) for match in found if match)

    def _stored(self) -> int:
        found = (re.search(r"/step-(\d+)/manifest\.json$", key) for key in self.current)
        return max((int(match[1]) for match in found if match), default=0)

    def _save(self, machine: Machine, at: datetime) -> None:
        machine.saved = int(machine.done)
        old = [key for key in self.current if "/checkpoints/" in key]
        where = f"runs/{self.life.run}/checkpoints/step-{machine.saved:08d}"
        self.put(f"{where}/tensors.safetensors", b"", at, CHECKPOINT)
        self.put(f"{where}/manifest.json", b"{}", at)
        for key in old:
            if not key.startswith(where):
                self.delete(key, at)

    def _word(self, machine: Machine, at: datetime, code: int, reason: str) -> None:
        word = f'{{"attempt": {machine.attempt}, "code": {code}, "reason": "{reason}"}}'
        self.put(f"runs/{self.life.run}/attempts/{machine.attempt}.json", word.encode(), at)


def gone(version: Version, now: datetime) -> datetime:
    """When S3 no longer keeps, or bills, a version: up to two days after it was replaced."""
    if version.until is None:
        return datetime.max.replace(tzinfo=UTC)
    midnight = version.until.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + timedelta(days=2)


# --- the people ---


def template(seed: int) -> Spec:
    """What all runs have in common; they differ in their names, markets and ceilings."""
    target = load_target(["target=ec2", "target.instance_type=g4dn.xlarge,g6.xlarge,g5.xlarge"])
    overrides = ("train.epochs=1",)
    config, _ = load_config(target, overrides)
    return Spec(
        target, config, overrides, "run", "123456789012", "us-east-1", None, "5e" * 32, "0123abc"
    )


def spec_of(common: Spec, life: Life) -> Spec:
    assert isinstance(common.target, ec2_request.Ec2Config)
    target = dataclasses.replace(common.target, spot=life.market, max_dollars=life.max_dollars)
    return dataclasses.replace(common, run=life.run, target=target)


def born(seed: int, number: int) -> Life:
    """A run, as somebody wants it."""
    pick = random.Random(f"{seed} life {number}")
    max_dollars = pick.choice((None, None, 0.5, 1.5, 4.0, 8.0))
    return Life(
        number=number,
        need=pick.choice((20, 60, 150, 300, 420)) * pick.uniform(0.7, 1.3),
        supervised=pick.random() < 0.6,
        market=pick.choice(("true", "true", "auto", "auto", "false")),
        max_dollars=max_dollars,
    )


def live(common: Spec, weather: Weather, number: int) -> Life:
    """Play a run: submits, waits, deaths of laptops, twins, until it ends or is given up."""
    seed = weather.seed
    life, pick = born(seed, number), random.Random(f"{seed} people {number}")
    clock = Clock()
    clock.time = BEGIN + timedelta(days=(DAYS - 10) * pick.random())
    model = Model(weather, clock, life, seed)
    model.put(f"source/{common.source}.tar.gz", b"", clock.time)
    spec = spec_of(common, life)
    with clocked(clock):
        faults = 0
        while not life.end:
            code = _sit_down(model, spec, pick)
            if life.end:
                break
            if code == OK:
                life.end = "complete"
            elif code == FAULT:
                faults += 1
            if faults > 5:
                life.end = "failed six times"
            if clock.time > BEGIN + timedelta(days=DAYS + 30):
                life.end = "gave up"
            clock.time += timedelta(hours=pick.expovariate(1 / 4))
        clock.time += timedelta(days=6)  # nobody looks any more
        model.play()
    return life


def _sit_down(model: Model, spec: Spec, pick: random.Random) -> int | None:
    """Start the submit, once; return its exit code, None where it didn't come to an end."""
    life, clock = model.life, model.clock
    life.submits += 1
    _draw_fate(model, spec, pick)
    try:
        attempt = _submit(model, spec)
        life.limit = max(life.limit, attempt.ceiling or 0.0)
        if life.supervised:
            plan = planning.next_attempt(model, spec, b"")
            return submission.wait(model, attempt, plan, EVERY)
        clock.time += timedelta(hours=pick.uniform(1, 9))
        return CODES.get(attempt_state(model, spec))
    except LaptopDied:
        life.deaths += 1
    except AwsError:
        pass  # an outage, or nothing is free: another day
    except UserError as error:
        if "ceiling" in str(error):
            life.end = "ceiling"
            life.limit = life.limit or (life.max_dollars or 0.0)
    return None


def _submit(model: Model, spec: Spec) -> notes.Attempt:
    def planned() -> planning.Plan:
        return planning.next_attempt(model, spec, b"")

    if model.life.supervised:
        return submission.ask_until_free(model, planned, EVERY)
    return submission.submit(model, planned())


def _draw_fate(model: Model, spec: Spec, pick: random.Random) -> None:
    """Draw whether another submit comes between this one's calls, or when the laptop dies."""
    life, clock = model.life, model.clock
    model.during, model.countdown = None, 0
    clock.until = None
    fate = pick.random()
    if fate < 0.15:

        def twin() -> None:
            life.twins += 1
            with suppress(UserError):
                submission.submit(model, planning.next_attempt(model, spec, b""))

        model.during, model.countdown = twin, pick.randrange(1, 30)
    elif fate < 0.3:

        def dies() -> None:
            raise LaptopDied

        model.during, model.countdown = dies, pick.randrange(1, 30)
    if life.supervised and pick.random() < 0.4:
        clock.until = clock.time + timedelta(hours=pick.expovariate(1 / 3))


def attempt_state(model: Model, spec: Spec) -> notes.Phase:
    attempt = notes.latest(model, spec.run)
    assert attempt is not None
    return spec.kind.observe(model, attempt).phase


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Let the product's code live by a clock."""
    real = notes.now
    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith("launch.") and getattr(module, "now", None) is real
    ]
    sleepers: tuple[Any, ...] = (submission, following, patience)
    kept = [module.time for module in sleepers]
    level = log.level
    try:
        log.setLevel(SILENT)
        for module in users:
            module.now = clock.now  # type: ignore[attr-defined]
        for module in sleepers:
            module.time = SimpleNamespace(sleep=clock.sleep)
        yield
    finally:
        log.setLevel(level)
        for module in users:
            module.now = real  # type: ignore[attr-defined]
        for module, time in zip(sleepers, kept, strict=True):
            module.time = time


# --- the bill, as AWS writes it ---


def bill(life: Life, weather: Weather) -> float:
    """Dollars of a run: machines by the second, disks, addresses, and what S3 has kept."""
    dollars = 0.0
    for machine in life.machines:
        assert machine.until is not None
        at = machine.since
        while at < machine.until:
            until = min(machine.until, at + timedelta(minutes=1))
            hour = HOURLY[machine.kind]
            if machine.spot:
                hour = min(hour, weather.spot_price(machine.kind, machine.zone, at))
                hour = min(hour, machine.bid or hour)
            dollars += (hour + PARTS) * (until - at).total_seconds() / 3600
            at = until
    end = max((machine.until for machine in life.machines if machine.until), default=BEGIN)
    for version in life.versions:
        kept = min(gone(version, end), end + timedelta(days=2)) - version.since
        hours = max(0.0, kept.total_seconds() / 3600)
        dollars += version.size / 1e9 * hours * S3_GB_MONTH / HOURS_A_MONTH
    return dollars


def overlap(life: Life) -> tuple[float, float]:
    """The longest time, in seconds, in which two machines were rented, and in which two worked."""
    rented = worked = 0.0
    for one in life.machines:
        for other in life.machines:
            if one is other or one.since > other.since:
                continue
            assert one.until is not None and other.until is not None
            together = min(one.until, other.until) - max(one.since, other.since)
            rented = max(rented, together.total_seconds())
            if one.began is not None and other.began is not None:
                together = min(one.until, other.until) - max(one.began, other.began)
                worked = max(worked, together.total_seconds())
    return rented, worked


def could_finish(life: Life, weather: Weather) -> bool:
    """Whether a run that its ceiling ended could have paid for its remaining work all the same.

    One more machine of the cheapest kind, at the highest price that may be billed for it.
    """
    if life.end != "ceiling":
        return False
    saved = (re.search(r"/step-(\d+)/manifest\.json$", each.key) for each in life.versions)
    done = max((int(match[1]) for match in saved if match), default=0)
    minutes = life.need - done + SET_UP + ceiling.AROUND / 60 + ec2_request.GRACE / 60
    kind = "g4dn.xlarge"
    hour = HOURLY[kind]
    end = max((each.until for each in life.machines if each.until), default=BEGIN)
    if life.market == "true":
        hour = ec2_offers.HEADROOM * max(weather.spot_price(kind, zone, end) for zone in ZONES)
    return bill(life, weather) + (hour + PARTS) * max(minutes, 10) / 60 < life.limit


@dataclass(frozen=True)
class Month:
    """What became of the runs of a month."""

    lives: list[Life]
    weather: Weather

    def figures(self) -> dict[str, Any]:
        """What is asked of it, and what happened."""
        lives, ends = self.lives, [life.end for life in self.lives]
        shares = [bill(life, self.weather) / life.limit for life in lives if life.limit]
        overlaps = [overlap(life) for life in lives]
        return {
            "runs": len(lives),
            "complete": ends.count("complete"),
            "ended by their ceiling": ends.count("ceiling"),
            "otherwise": len(ends) - ends.count("complete") - ends.count("ceiling"),
            "of these it could have paid for": sum(
                could_finish(life, self.weather) for life in lives
            ),
            "above their ceiling": sum(share > 1 for share in shares),
            "largest share of a ceiling": max(shares),
            "machines": sum(len(life.machines) for life in lives),
            "machines left": sum(m.until is None for life in lives for m in life.machines),
            "longest time of two machines": max(rented for rented, _ in overlaps),
            "longest time of two that work": max(worked for _, worked in overlaps),
            "reclaims": sum(
                m.reason in ec2_state.RECLAIMED for life in lives for m in life.machines
            ),
            "refusals": sum(life.refusals for life in lives),
            "calls without an answer": sum(life.outages for life in lives),
            "dead laptops": sum(life.deaths for life in lives),
            "twins": sum(life.twins for life in lives),
        }


def month(runs: int, seed: int = 0) -> Month:
    """Play so many runs of a month."""
    common, weather = template(seed), Weather(seed)
    return Month([live(common, weather, number) for number in range(runs)], weather)


if __name__ == "__main__":
    for name, value in month(int(sys.argv[1]), int(sys.argv[2])).figures().items():
        print(f"{name:35} {value}")
