"""One EC2 instance: everything makes it end by itself and stay closed.

What the instance reads from and writes to the bucket (user_data.sh), below runs/RUN/:
`checkpoints/` and `log.txt` once a minute, `output/` (model package, report, metrics, result),
`attempts/N.json` ({"attempt", "code", "reason"}) when attempt N has ended, which the index says
too (attempt.py), `attempts/N.machine` which machine has it. `attempts/N.stop` asks it to stop; a
note of a later attempt (`M.request.json`) ends it without another word.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil, inf
from typing import Any

from launch.cloud import quotas, s3
from launch.cloud.ownership import instances
from launch.cloud.prices import ADDRESS_HOUR, GP3_GB_MONTH, HOURS_A_MONTH, asked
from launch.cloud.remedies import DENIED
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.targets.attempt import (
    INDEX,
    YOUNG,
    Attempt,
    Noted,
    Phase,
    State,
    attempt_key,
    now,
    read,
    seconds_between,
)
from launch.targets.base import RUN, Spec, Target, TargetConfig, fit, tag_list, tag_values
from launch.targets.instance_types import check_trains, names_in
from launch.targets.inventory import Inventory
from launch.targets.questions import Question, capacity, quota, way_to_s3
from launch.targets.rented import Machines, Rented, rented
from launch.targets.script import fill
from trainer.common.console import log
from trainer.common.errors import OK, RESUME, UserError
from trainer.settings.config import Config, setting

USER_DATA_BYTES = 16384  # EC2's limit, before base64
ROOT_DEVICE = "/dev/xvda"  # of Amazon Linux
NO_IMAGE = "ami-00000000000000000"  # stands in a plan where AWS can't be asked
UPLOAD_EVERY = 60  # seconds
HEADROOM = 1.25  # of the highest price for spot over what EC2 asks when it is asked for
# Seconds before the time limit, in which a run saves and uploads; a tenth of short limits.
GRACE = 300
PATIENCE = timedelta(minutes=10)  # past its time limit, in which a machine ends itself

# Why EC2 ended an instance: the codes of StateReason (EC2 API reference, "StateReason").
RECLAIMED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")
NO_CAPACITY = "Server.InsufficientInstanceCapacity"
BY_HAND = "Client.UserInitiatedShutdown"  # `stop --now`, the console, or any other call
BY_ITSELF = "Client.InstanceInitiatedShutdown"
FORGOTTEN = "ended without a word; EC2 no longer says why"
NO_NOTE = "; without a note: it did not reach the bucket, or another machine has the run"

SPOT_NOTICE, IDLE = "spot notice", "idle"  # in user_data.sh's words


@dataclass
class Ec2Config(TargetConfig):
    spot: str = setting("false", "true", "auto")
    spot_patience: float = setting(at_least=0, at_most=10080, only_if="target.spot=auto")
    zones: str | None = setting()
    max_dollars: float | None = setting(above=0, at_most=1000000)
    idle_minutes: float = setting(at_least=0, at_most=10080)
    image: str | None = setting()
    ssm_parameter: str = setting()
    disk_gb: int = setting(at_least=75, at_most=16384)
    public_ip: bool | None = setting()


class Ec2(Target):
    config = Ec2Config
    role = "ec2"
    platform = "ec2"

    def data_root(self, data: str) -> str:
        return f"/opt/dlami/nvme/data/{fit(data, RUN)}"

    def looked_up(self, aws: Aws | None, spec: Spec) -> Spec:
        """Return the spec with an image: the one given, else AWS's newest."""
        target = _config(spec)
        if target.image is not None:
            return spec
        if aws is None:
            return _with_image(spec, NO_IMAGE)
        answer = aws.call("ssm", "GetParameter", Name=target.ssm_parameter)
        return _with_image(spec, str(answer["Parameter"]["Value"]))

    def pinned(self, spec: Spec, attempt: Attempt) -> Spec:
        """Return the spec with an attempt's image: a newer one could change what comes out."""
        return _with_image(spec, attempt.requests[0].parameters["ImageId"])

    def requests(self, spec: Spec) -> list[Request]:
        return [run_instances(spec, user_data(spec))]

    def questions(self, spec: Spec) -> list[Question]:
        target = _config(spec)
        asked = [
            capacity(spec.instance_types[0], spec.spot, spec.instances),
            way_to_s3(target.subnet),
        ]
        counted = quotas.of_ec2(spec.instance_types[0], spec.spot, spec.instances)
        if counted is not None:
            asked.insert(0, quota(counted))
        return asked

    def check(self, target: Ec2Config) -> None:
        for name in names_in(target.instance_type):
            check_trains(name)

    def offers(self, aws: Aws | None, spec: Spec, waited: float) -> list[Spec]:
        """Return each kind of machine where AWS likes, then in each zone; spot before on demand.

        An instance is asked for by RunInstances, once for each of them: each has a token of its
        own, its refusal a reason, and nothing is left to be removed, as a fleet's template would
        be (docs/decisions/2026-11-26-a-machine-that-comes.md).
        """
        target = _config(spec)
        markets = [target.spot]
        if target.spot == "auto":
            markets = ["true"] if waited < 60 * target.spot_patience else ["true", "false"]
        zones = zones_of(aws, spec)
        offers = []
        for market in markets:
            for name in spec.instance_types:
                chosen = dataclasses.replace(target, instance_type=name, spot=market)
                offer = dataclasses.replace(spec, target=chosen)
                prices = spot_prices(aws, name) if aws is not None and market == "true" else {}
                for zone in _by_price(zones.get(name, []), prices):
                    bid = highest_bid(prices, zone)
                    offers.append(dataclasses.replace(offer, zone=zone, bid=bid))
        if not offers:
            places = f"no zone of {spec.region}"
            if target.zones:
                places = f"none of target.zones={target.zones} in {spec.region}"
            raise UserError(
                f"{places} has {target.instance_type}; "
                "take another target.instance_type, or another target.region"
            )
        return offers

    def elsewhere(self, aws: Aws, spec: Spec) -> str:
        try:
            zones = zones_of(aws, spec)
            scores = spot_scores(aws, spec) if spec.spot else {}
        except AwsError:
            return ""
        places = [f"{name} is made in {', '.join(filter(None, zones[name]))}" for name in zones]
        if scores:
            best = ", ".join(f"{zone} {score}/10" for zone, score in scores.items())
            places.append(f"chances of spot: {best}")
        now_at = asked(aws, spec.instance_types[0])
        if spec.spot and now_at.on_demand is not None:
            places.append(f"on demand (target.spot=false) it is ${now_at.on_demand:.3f} an hour")
        return "; ".join([*places, "--wait waits for one"])

    def parts_per_hour(self, spec: Spec) -> float:
        return _config(spec).disk_gb * GP3_GB_MONTH / HOURS_A_MONTH + ADDRESS_HOUR

    def hour_at_most(self, aws: Aws, attempt: Attempt, state: State) -> float:
        """Return what it was at most by the zone's price history, below what was bid."""
        hour = attempt.per_hour or 0.0
        parameters = attempt.requests[0].parameters
        options = parameters.get("InstanceMarketOptions", {}).get("SpotOptions", {})
        zone = parameters.get("Placement", {}).get("AvailabilityZone")
        if state.ended is None or zone is None or "MaxPrice" not in options:
            return hour
        prices = spot_prices(aws, attempt.instance_type, zone, (state.started, state.ended))
        if not prices:
            return hour
        bid = float(options["MaxPrice"])
        return hour - bid + min(bid, max(prices.values()))

    def spot_price(self, aws: Aws, spec: Spec) -> float | None:
        """Return the lowest of the region's zones."""
        return min(spot_prices(aws, spec.instance_types[0]).values(), default=None)

    def observe(self, aws: Aws, attempt: Attempt) -> State:
        if attempt.id is None:  # nobody heard EC2's answer, and a machine may have it all the same
            attempt = dataclasses.replace(attempt, id=_claimed_by(aws, attempt))
        instance = _owner_of(aws, attempt, _instance_of(aws, attempt))
        outcome = s3.read(aws, attempt.key_of("json"))
        if outcome is not None:
            return _ended_with_word(attempt, instance, json.loads(outcome[0]), outcome[1])
        if instance is None:
            return _unlisted(aws, attempt)
        return _running(instance) or _ended_without_word(aws, attempt, instance)

    def listed(self, inventory: Inventory, noted: Noted) -> State | None:
        """Return how it is: what its machine said last, else that it runs."""
        if noted.state is not None:
            return noted.state
        attempt = noted.attempt
        machines = {each["InstanceId"]: each for each in inventory.instances()}
        instance = machines.get(attempt.id or "")
        if noted.word is not None and noted.said is not None:
            return _ended_with_word(attempt, instance, noted.word, noted.said)
        return None if instance is None else _running(instance)

    def stop_running(self, aws: Aws, attempt: Attempt, state: State, at_once: bool) -> None:
        # Noted as any other stop, so that nobody takes a machine that is terminated for reclaimed.
        self.stop_early(aws, attempt)
        unseen = r"InvalidInstanceID\.NotFound"
        if not at_once:
            text = (
                "asked %s to stop: it looks once a minute, saves, uploads and terminates; "
                "--now does not wait for it"
            )
        elif aws.find("ec2", "TerminateInstances", unseen, InstanceIds=[str(state.id)]) is None:
            text = "EC2 does not list %s yet: it is asked to stop, and ends when it has started"
        else:
            text = "terminating %s; what it did since its last checkpoint is lost"
        log.info(text, state.id)

    def stop_early(self, aws: Aws, attempt: Attempt) -> bool:
        s3.write(aws, attempt.key_of("stop"), b"")
        return True

    def log_reader(self, aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
        shown = 0

        def read() -> list[str]:
            nonlocal shown
            entry = s3.read(aws, f"runs/{attempt.run}/log.txt")
            text = entry[0].decode(errors="replace") if entry else ""
            complete = text[: text.rfind("\n") + 1]  # the last line may be half written
            fresh, shown = complete[shown:], max(shown, len(complete))
            return fresh.splitlines()

        return read

    def last_words(self, aws: Aws, attempt: Attempt, state: State) -> str:
        """Return what the machine has written to its console, where it left no other word."""
        if state.id is None or not state.detail.endswith(NO_NOTE):
            return ""
        unseen = r"InvalidInstanceID\.NotFound"
        answer = aws.find("ec2", "GetConsoleOutput", unseen, InstanceId=state.id, Latest=True)
        return str((answer or {}).get("Output", ""))

    def connection(self, aws: Aws, attempt: Attempt, state: State) -> str | list[str]:
        """Return the command for a shell through Session Manager."""
        where = ["--target", str(state.id), "--region", aws.region]
        return ["aws", "ssm", "start-session", *where]

    def results(self, aws: Aws, attempt: Attempt) -> str:
        return f"runs/{attempt.run}/output/"

    def accuracy(self, aws: Aws, attempt: Attempt) -> float | None:
        entry = s3.read(aws, f"runs/{attempt.run}/output/result.json")
        return float(json.loads(entry[0])["top1"]) if entry else None

    def console(self, attempt: Attempt, region: str) -> str:
        return f"ec2/home?region={region}#InstanceDetails:instanceId={attempt.id}"

    def past_limit(self, attempt: Attempt, state: State) -> float:
        if state.phase is not Phase.RUNNING or state.started is None:
            return 0.0
        if state.detail == "shutting-down":
            return 0.0
        past = now() - state.started - timedelta(hours=attempt.hours)
        return past.total_seconds() / 3600 if past > PATIENCE else 0.0

    @classmethod
    def overdue(cls, inventory: Inventory) -> Iterator[tuple[Attempt, State]]:
        for instance in inventory.instances():
            state = _running(instance)
            tags = tag_values(instance.get("Tags", []))
            if instance["State"]["Name"] != "running" or not {"run", "attempt"} <= tags.keys():
                continue
            if state is None or state.machine_seconds < PATIENCE.total_seconds():
                continue
            attempt = inventory.attempts().get((tags["run"], int(tags["attempt"])))
            if attempt is not None and cls(attempt.target).past_limit(attempt, state):
                yield attempt, state

    @classmethod
    def rented(cls, inventory: Inventory) -> Iterator[Rented]:
        for instance in inventory.instances():
            if instance["State"]["Name"] in ("pending", "running"):
                machines = Machines(
                    instance["InstanceType"],
                    instance["LaunchTime"],
                    spot=instance.get("InstanceLifecycle") == "spot",
                )
                run = tag_values(instance.get("Tags", [])).get("run")
                yield rented(inventory.aws, "machine", instance["InstanceId"], machines, run)


TARGETS = (Ec2("ec2"),)


# --- what may be asked for ---


def zones_of(aws: Aws | None, spec: Spec) -> dict[str, list[str | None]]:
    """Return the zones in which each kind of machine is asked for, in order.

    None is where AWS likes: the first, unless target.zones says where, and all there is where a
    subnet is given, or AWS can't or may not be asked. Raise AwsError.
    """
    target = _config(spec)
    names = spec.instance_types
    if target.subnet is not None:
        return {name: [None] for name in names}
    given: list[str | None] = [*names_in(target.zones)] or [None]
    if aws is None:
        return {name: list(given) for name in names}
    try:
        listed = list(
            aws.pages(
                "ec2",
                "DescribeInstanceTypeOfferings",
                "InstanceTypeOfferings",
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": names}],
            )
        )
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return {name: list(given) for name in names}
    made: dict[str, list[str | None]] = {}
    for offering in sorted(listed, key=lambda each: str(each["Location"])):
        made.setdefault(offering["InstanceType"], []).append(offering["Location"])
    wanted = names_in(target.zones)
    if wanted:
        return {name: [zone for zone in wanted if zone in made.get(name, [])] for name in names}
    return {name: [None, *made[name]] for name in names if name in made}


def _by_price(zones: list[str | None], prices: dict[str, float]) -> list[str | None]:
    """Return zones of one kind of machine, the cheapest for spot first, unless they were given.

    Where AWS likes (None) may be where spot is dear, and is not asked for where prices are known.
    """
    if not prices or None not in zones:
        return zones
    named = [zone for zone in zones if zone is not None]
    return [*sorted(named, key=lambda zone: prices.get(zone, inf))]


def spot_prices(
    aws: Aws,
    instance_type: str,
    zone: str | None = None,
    between: tuple[datetime | None, datetime | None] = (None, None),
) -> dict[str, float]:
    """Return the highest dollars an hour of a spot machine by zone; {} where it may not be asked.

    zone: None for all. between: a beginning and an end; None is now. Raise AwsError.
    """
    begin, end = (each or now() for each in between)
    where = {"AvailabilityZone": zone} if zone else {}
    try:
        history = aws.pages(
            "ec2",
            "DescribeSpotPriceHistory",
            "SpotPriceHistory",
            InstanceTypes=[instance_type],
            ProductDescriptions=["Linux/UNIX"],
            StartTime=begin,
            EndTime=end,
            **where,
        )
        highest: dict[str, float] = {}
        for entry in history:
            name, price = entry["AvailabilityZone"], float(entry["SpotPrice"])
            highest[name] = max(price, highest.get(name, 0.0))
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return {}
    return highest


def highest_bid(prices: dict[str, float], zone: str | None) -> float | None:
    """Return what EC2 may bill for an hour of a spot machine at most, in dollars.

    Some headroom above what it asks now; above that EC2 takes the machine back. None, the price on
    demand, where the price is not known.
    """
    asked_now = prices.get(zone) if zone else max(prices.values(), default=None)
    if asked_now is None:
        return None
    return ceil(asked_now * HEADROOM * 1e4) / 1e4


def spot_scores(aws: Aws, spec: Spec) -> dict[str, int]:
    """Return how likely a spot request comes through now, from 1 to 10, by zone. Raise AwsError."""
    answer = aws.call(
        "ec2",
        "GetSpotPlacementScores",
        InstanceTypes=spec.instance_types,
        TargetCapacity=spec.instances,
        SingleAvailabilityZone=True,
        RegionNames=[aws.region],
    )
    scores = {
        str(each.get("AvailabilityZoneId") or each["Region"]): int(each["Score"])
        for each in answer["SpotPlacementScores"]
    }
    return dict(sorted(scores.items(), key=lambda item: -item[1])[:3])


# --- the request ---


def run_instances(spec: Spec, user_data: str) -> Request:
    """Return the request for one instance.

    The same attempt with the same content has the same ClientToken, so it can't start twice.
    """
    target = _config(spec)
    tags = tag_list({"Name": spec.job_name} | spec.tags | {"attempt": str(spec.attempt)})
    tagged = ["instance", "volume", "network-interface"]
    root = {
        "VolumeSize": target.disk_gb,
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    if target.kms_key:
        root["KmsKeyId"] = target.kms_key
    parameters: dict[str, Any] = {
        "ImageId": target.image,
        "InstanceType": target.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": user_data,
        "IamInstanceProfile": {"Name": spec.instance_profile},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "HttpEndpoint": "enabled",
        },
        "BlockDeviceMappings": [{"DeviceName": ROOT_DEVICE, "Ebs": root}],
    }
    if spec.spot:
        tagged.append("spot-instances-request")
    parameters["TagSpecifications"] = [{"ResourceType": each, "Tags": tags} for each in tagged]
    parameters |= network(target)
    if spec.zone:
        parameters["Placement"] = {"AvailabilityZone": spec.zone}
    if spec.spot:
        options = {
            "SpotInstanceType": "one-time",
            "InstanceInterruptionBehavior": "terminate",
        }
        if spec.bid is not None:
            options["MaxPrice"] = f"{spec.bid:.4f}"
        parameters["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    parameters["ClientToken"] = f"{spec.run}-{spec.attempt}-{content[:8]}"
    return Request("ec2", "RunInstances", parameters)


def network(target: Ec2Config) -> dict[str, Any]:
    """Return where the machine stands, as RunInstances has it.

    A public address is given to an interface, which then takes subnet and groups for itself.
    """
    place: dict[str, Any] = {}
    if target.subnet:
        place["SubnetId"] = target.subnet
    if target.public_ip is None:
        return place | ({"SecurityGroupIds": target.groups} if target.groups else {})
    place |= {"DeviceIndex": 0, "AssociatePublicIpAddress": target.public_ip}
    if target.groups:
        place["Groups"] = target.groups
    return {"NetworkInterfaces": [place]}


def user_data(spec: Spec, upload_every: int = UPLOAD_EVERY) -> str:
    """Return the script that the instance runs at each boot.

    upload_every: seconds. Raise UserError where it comes out longer than EC2 allows.
    """
    limit = round(3600 * spec.hours)
    script = fill(
        "user_data.sh",
        run=spec.run,
        attempt=spec.attempt,
        bucket=spec.uri(),
        index=INDEX,
        region=spec.region,
        source_sha256=spec.source,
        data=spec.data_uri or "",
        data_root=spec.data_root or "",
        weights=spec.weights or "",
        weights_root=spec.weights_root or "",
        extras=",".join(spec.extras) or "train",
        limit=limit,
        grace=min(GRACE, limit // 10),
        every=upload_every,
        idle=round(60 * _config(spec).idle_minutes),
        processes=processes(spec.config),
        arguments=arguments(spec),
        revision=spec.revision or "",
    )
    size = len(script.encode())
    if size > USER_DATA_BYTES:
        raise UserError(
            f"user data: {size} bytes, EC2 allows {USER_DATA_BYTES}; put settings into a file of "
            "conf/experiment and give experiment=NAME"
        )
    return script


def processes(config: Config) -> str:
    """Return how many processes train; empty: as many as the instance has GPUs."""
    if config.train.device == "cpu":
        return "1"
    return str(config.train.processes or "")


def arguments(spec: Spec) -> list[str]:
    """Return the trainer's command line.

    The user's overrides, then where things lie on the instance, whatever the overrides say.
    """
    places = [
        "platform=ec2",
        f"name='{spec.run}'",
        f"platform.run_dir=/opt/dlami/nvme/runs/{spec.run}",
        "platform.checkpoints=null",
        "platform.package=null",
    ]
    if spec.data_root:
        places.append(f"data.root={spec.data_root}")
    if spec.weights_root:
        places.append(f"model.weights_dir={spec.weights_root}")
    return [*spec.overrides, *places]


def _config(spec: Spec) -> Ec2Config:
    assert isinstance(spec.target, Ec2Config)
    return spec.target


def _with_image(spec: Spec, image: str) -> Spec:
    return dataclasses.replace(spec, target=dataclasses.replace(_config(spec), image=image))


# --- the instance ---


def _instance_of(aws: Aws, attempt: Attempt) -> dict[str, Any] | None:
    """Return the attempt's machine: by its id if known, since its tags may be seen later."""
    if attempt.id is None:
        tags = ("tag:run", attempt.run), ("tag:attempt", str(attempt.number))
        return next(iter(instances(aws, *tags)), None)
    named = [{"Name": "instance-id", "Values": [attempt.id]}]
    groups = aws.pages("ec2", "DescribeInstances", "Reservations", Filters=named)
    return next((each for group in groups for each in group["Instances"]), None)


def _claimed_by(aws: Aws, attempt: Attempt) -> str | None:
    """Return the id of the machine that has claimed an attempt, None where none has."""
    claimed = s3.read(aws, attempt.key_of("machine"))
    owner = claimed[0].decode(errors="replace").strip() if claimed else ""
    return owner if owner.startswith("i-") else None


def _owner_of(aws: Aws, attempt: Attempt, instance: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the machine that has the attempt, where the noted one has ended by itself.

    Two submits at once may rent two machines; the one that is later ends itself.
    """
    if instance is None or _reason(instance) != BY_ITSELF:
        return instance
    owner = _claimed_by(aws, attempt)
    if owner is None or owner == instance["InstanceId"]:
        return instance
    return _instance_of(aws, dataclasses.replace(attempt, id=owner))


def _running(instance: dict[str, Any]) -> State | None:
    """Return the state of a machine that has not ended, None of one that has."""
    name, started = instance["State"]["Name"], instance["LaunchTime"]
    if name in ("terminated", "stopped"):
        return None
    seconds = seconds_between(started, now())
    return State(Phase.RUNNING, name, started, None, seconds, id=instance["InstanceId"])


def _asked_to_stop(aws: Aws, attempt: Attempt) -> bool:
    return s3.exists(aws, attempt.key_of("stop"))


def _ended_with_word(
    attempt: Attempt, instance: dict[str, Any] | None, word: dict[str, Any], written: datetime
) -> State:
    """Return the state of an attempt that noted its end. written: when."""
    started = datetime.fromisoformat(attempt.noted)
    reason = ""
    if instance is not None:
        started = instance["LaunchTime"]
        reason = _reason(instance)
    detail = f"{word['reason']}, exit code {word['code']}"
    seconds = seconds_between(started, written)
    return State(_phase_told(word, reason), detail, started, written, seconds, id=attempt.id)


def _unlisted(aws: Aws, attempt: Attempt) -> State:
    """Return the state of an attempt without a word, whose machine EC2 doesn't list."""
    if attempt.id is None:
        return attempt.unseen()
    started = datetime.fromisoformat(attempt.noted)
    ended = None
    log_entry = s3.read(aws, f"runs/{attempt.run}/log.txt")
    if log_entry is not None:
        ended = max(log_entry[1], started)  # it is written once a minute: the best guess
    # The next attempt has written the log since. Whoever asked for it knew when this one had ended.
    following = read(aws, attempt_key(attempt.run, attempt.number + 1, "request.json"))
    if following is not None:
        limit = started + timedelta(hours=attempt.hours) + PATIENCE
        known = following.after or following.asked or following.noted
        ended = min(datetime.fromisoformat(known), limit)
        return State(
            Phase.FAILED,
            FORGOTTEN,
            started,
            ended,
            seconds_between(started, ended),
            id=attempt.id,
            is_sure=following.after is not None,
        )
    alive = ended or attempt.since
    if now() - alive < YOUNG:
        return attempt.unseen(alive)
    phase, detail = Phase.FAILED, FORGOTTEN
    if _asked_to_stop(aws, attempt):
        phase, detail = Phase.STOPPED, "asked to stop"
    seconds = seconds_between(started, ended)
    return State(phase, detail, started, ended, seconds, id=attempt.id, is_sure=False)


def _ended_without_word(aws: Aws, attempt: Attempt, instance: dict[str, Any]) -> State:
    """Return the state of an attempt without a word, by what EC2 says of its machine."""
    started, reason = instance["LaunchTime"], _reason(instance)
    why = instance.get("StateTransitionReason", "")
    at = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", why)
    ended = datetime.fromisoformat(at[1]).replace(tzinfo=UTC) if at else now()
    seconds = seconds_between(started, ended)
    if reason == NO_CAPACITY:
        seconds = 0.0
    detail = instance.get("StateReason", {}).get("Message", "") or why or "terminated"
    phase = _phase_of_reason(reason)
    if _asked_to_stop(aws, attempt):
        phase = Phase.STOPPED
    elif reason == BY_ITSELF:
        detail += NO_NOTE
    return State(phase, detail, started, ended, seconds, id=instance["InstanceId"])


def _reason(instance: dict[str, Any]) -> str:
    """Return AWS's code for why an instance ended, empty where it has none."""
    return str(instance.get("StateReason", {}).get("Code", ""))


def _phase_told(word: dict[str, Any], reason: str) -> Phase:
    """Return the phase by what an instance said last (user_data.sh).

    word: its code, the trainer's or the set-up's, and why it ended. reason: AWS's, or empty.
    """
    if word["code"] == OK:
        return Phase.COMPLETE
    if word["reason"] in ("asked to stop", "time limit"):
        return Phase.STOPPED
    if word["reason"] == SPOT_NOTICE:
        return Phase.LOST
    if word["reason"] == IDLE:
        return Phase.FAILED
    if word["code"] != RESUME and word["reason"] != "SIGTERM":
        return Phase.FAILED
    return Phase.LOST if reason in RECLAIMED else Phase.STOPPED


def _phase_of_reason(reason: str) -> Phase:
    """Return the phase of an instance that ended without a word, by AWS's reason."""
    if reason in RECLAIMED:
        return Phase.LOST
    phases = {NO_CAPACITY: Phase.NO_CAPACITY, BY_HAND: Phase.STOPPED}
    return phases.get(reason, Phase.FAILED)
