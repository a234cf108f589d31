"""EC2 instances of one run: they end by themselves, and accept no connection from outside.

An instance reads and writes these objects in the bucket (user_data.sh), below runs/RUN/:
`checkpoints/` and `log.txt`, once a minute; `output/` (model package, report, metrics, result);
`attempts/N.json` ({"attempt", "code", "reason"}), when attempt N has ended: the index has this too
(attempt.py); `attempts/N.machine`, the machine that has claimed attempt N. `attempts/N.stop` asks
it to stop. The note of a later attempt (`M.request.json`) ends it without a message. Of several
machines (`target.instances`) the first one has the run, and the claim; the others write
`attempts/N.K.json` and `log.K.txt`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from launch.cloud import quotas, s3
from launch.cloud.prices import ADDRESS_HOUR, GP3_GB_MONTH, HOURS_A_MONTH, asked
from launch.cloud.request import Request
from launch.cloud.session import Aws, AwsError
from launch.targets import ec2_together
from launch.targets.attempt import (
    Attempt,
    Figures,
    Noted,
    Phase,
    State,
    last_word,
    now,
)
from launch.targets.base import RUN, Spec, Target, fit, tag_values
from launch.targets.ec2_offers import (
    by_price,
    highest_bid,
    price_in,
    spot_prices,
    spot_scores,
    zones_of,
)
from launch.targets.ec2_request import (
    Ec2Config,
    placement_group,
    run_instances,
    settings_of,
    user_data,
    with_image,
)
from launch.targets.ec2_state import (
    NO_NOTE,
    PATIENCE,
    claimed_by,
    ended_with_word,
    ended_without_word,
    instance_of,
    owner_of,
    running,
    unlisted,
)
from launch.targets.instance_types import check_trains, names_in
from launch.targets.inventory import Inventory
from launch.targets.questions import Question, capacity, quota, together, way_to_s3
from launch.targets.rented import Machines, Rented, rented
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.common.objects import parsed

NO_IMAGE = "ami-00000000000000000"  # shown in a plan where AWS can't be asked


class Ec2(Target):
    config = Ec2Config
    role = "ec2"
    platform = "ec2"

    def data_root(self, data: str) -> str:
        return f"/opt/dlami/nvme/data/{fit(data, RUN)}"

    def looked_up(self, aws: Aws | None, spec: Spec) -> Spec:
        """Return the spec with an image: the one given, else AWS's newest."""
        target = settings_of(spec)
        if target.image is not None:
            return spec
        if aws is None:
            return with_image(spec, NO_IMAGE)
        answer = aws.call("ssm", "GetParameter", Name=target.ssm_parameter)
        return with_image(spec, str(answer["Parameter"]["Value"]))

    def stands_in(self, target: Ec2Config) -> tuple[list[str], bool | None]:
        return target.subnets, target.public_ip

    def pinned(self, spec: Spec, attempt: Attempt) -> Spec:
        """Return the spec with an attempt's image: a newer one could change the results."""
        return with_image(spec, _machines_of(attempt)["ImageId"])

    def requests(self, spec: Spec) -> list[Request]:
        several = spec.instances > 1
        count = spec.config.train.processes
        if several and count is not None and count % spec.instances:
            raise UserError(
                f"train.processes={count}: they don't spread evenly over "
                f"target.instances={spec.instances}; give a multiple of it, or leave it out"
            )
        machines = run_instances(spec, user_data(spec))
        return [placement_group(spec), machines] if several else [machines]

    def sent(self, aws: Aws, attempt: Attempt, before: Attempt | None) -> None:
        """Delete the placement group of the previous attempt: its machines have ended."""
        if before is None or before.instances == 1 or before.job == attempt.job:
            return
        others = r"InvalidPlacementGroup\.(Unknown|InUse)"
        aws.find("ec2", "DeletePlacementGroup", others, GroupName=before.job)

    def questions(self, spec: Spec) -> list[Question]:
        target = settings_of(spec)
        asked = [
            capacity(spec.instance_types[0], spec.spot, spec.instances),
            way_to_s3(target.subnet, target.public_ip),
        ]
        counted = quotas.of_ec2(spec.instance_types[0], spec.spot, spec.instances)
        if counted is not None:
            asked.insert(0, quota(counted))
        if spec.instances > 1:
            asked.append(together(target.subnet, target.groups))
        return asked

    def check(self, target: Ec2Config) -> None:
        for name in names_in(target.instance_type):
            check_trains(name)
            if target.instances > 1 and re.match(r"t\d", name):
                raise UserError(
                    f"target.instances={target.instances}: EC2 keeps no {name} close to another "
                    "one (placement groups); choose another target.instance_type"
                )

    def offers(self, aws: Aws | None, spec: Spec, waited: float) -> list[Spec]:
        """Return each instance type in a zone of AWS's choice, then in each zone; spot comes first.

        Each offer is one RunInstances request: it has its own token, a refusal has a reason, and
        unlike a fleet's template nothing is left to delete
        (docs/decisions/2026-11-26-a-machine-that-comes.md).
        """
        target = settings_of(spec)
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
                for zone in by_price(zones.get(name, []), prices):
                    asked_now = price_in(zone, prices)
                    bid = highest_bid(asked_now)
                    offers.append(
                        dataclasses.replace(offer, zone=zone, spot_price=asked_now, bid=bid)
                    )
        if not offers:
            places = f"no zone of {spec.region}"
            if target.zones:
                places = f"none of target.zones={target.zones} in {spec.region}"
            raise UserError(
                f"{places} has {target.instance_type}; "
                "choose another target.instance_type, or another target.region"
            )
        return offers

    def elsewhere(self, aws: Aws, spec: Spec) -> str:
        try:
            zones = zones_of(aws, spec)
            scores = spot_scores(aws, spec) if spec.spot else {}
        except AwsError:
            return ""
        places = [f"{name} is offered in {', '.join(filter(None, zones[name]))}" for name in zones]
        if scores:
            best = ", ".join(f"{zone} {score}/10" for zone, score in scores.items())
            places.append(f"chances of spot: {best}")
        hour = spec.bought(asked(aws, spec.instance_types[0])).hour(spot=False)
        if spec.spot and hour is not None:
            places.append(f"on demand (target.spot=false) it is ${hour:.3f} an hour")
        return "; ".join([*places, "--wait waits for one"])

    def parts_per_hour(self, spec: Spec) -> float:
        return settings_of(spec).disk_gb * GP3_GB_MONTH / HOURS_A_MONTH + ADDRESS_HOUR

    def hour_at_most(self, aws: Aws, attempt: Attempt, state: State) -> float:
        """Return the highest price of the zone while it ran, at most the bid, with its parts."""
        hour = attempt.per_hour or 0.0
        parameters = _machines_of(attempt)
        options = parameters.get("InstanceMarketOptions", {}).get("SpotOptions", {})
        zone = parameters.get("Placement", {}).get("AvailabilityZone")
        if state.ended is None or zone is None or "MaxPrice" not in options:
            return hour
        prices = spot_prices(aws, attempt.instance_type, zone, (state.started, state.ended))
        if not prices:
            return hour
        bid = float(options["MaxPrice"])
        return hour - bid + min(bid, max(prices.values()))

    def asked_for_spot(self, aws: Aws, spec: Spec) -> float | None:
        """Return the lowest price of the region's zones."""
        return min(spot_prices(aws, spec.instance_types[0]).values(), default=None)

    def observe(self, aws: Aws, attempt: Attempt) -> State:
        if attempt.instances > 1:
            return ec2_together.observe(aws, attempt)
        if attempt.id is None:  # EC2's answer was lost, but a machine may have the attempt
            attempt = dataclasses.replace(attempt, id=claimed_by(aws, attempt))
        instance = owner_of(aws, attempt, instance_of(aws, attempt))
        outcome = s3.read(aws, attempt.key_of("json"))
        said = last_word(outcome[0]) if outcome else None
        if outcome is not None and said is not None:
            return ended_with_word(attempt, instance, said, outcome[1])
        if instance is None:
            return unlisted(aws, attempt)
        return running(instance) or ended_without_word(aws, attempt, instance)

    def listed(self, inventory: Inventory, noted: Noted) -> State | None:
        """Return its state by its machine's last message, else that it runs."""
        if noted.state is not None:
            return noted.state
        attempt = noted.attempt
        if attempt.instances > 1:
            return None  # each machine must be looked at
        machines = {each["InstanceId"]: each for each in inventory.instances()}
        instance = machines.get(attempt.id or "")
        if noted.word is not None and noted.said is not None:
            return ended_with_word(attempt, instance, noted.word, noted.said)
        return None if instance is None else running(instance)

    def stop_running(self, aws: Aws, attempt: Attempt, state: State, at_once: bool) -> None:
        # Noted as any other stop, so that a terminated machine doesn't count as reclaimed. Where
        # one of several machines is gone, the others end for that, which is no stop.
        if state.ends_by is None:
            self.stop_early(aws, attempt)
        unseen = r"InvalidInstanceID\.NotFound"
        ids = [str(state.id)]
        if attempt.instances > 1:
            found = ec2_together.instances_of(aws, attempt)
            ids = [each["InstanceId"] for each in found if running(each) is not None] or ids
        if not at_once:
            text = (
                "asked %s to stop: it checks once a minute, then saves, uploads and terminates; "
                "--now does not wait for it"
            )
        elif aws.find("ec2", "TerminateInstances", unseen, InstanceIds=ids) is None:
            text = "EC2 does not list %s yet: it is asked to stop, and ends when it has started"
        else:
            text = "terminating %s; what it did since its last checkpoint is lost"
        log.info(text, ", ".join(ids))

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
        """Return the machine's console output, where it left no note."""
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

    def figures(self, inventory: Inventory, attempt: Attempt) -> Figures:
        """Return the figures in result.json, and those of the best epoch in metrics.jsonl."""
        place = self.results(inventory.aws, attempt)
        entry = s3.read(inventory.aws, f"{place}result.json")
        if entry is None:
            return Figures()
        result = parsed(entry[0])
        if result is None or "top1" not in result:
            return Figures()
        lines = s3.read(inventory.aws, f"{place}metrics.jsonl")
        rows = list(filter(None, map(parsed, lines[0].splitlines()))) if lines else []
        best = [row for row in rows if row.get("epoch") == result.get("best_epoch")]
        valid = next((row["valid_top1"] for row in best if "valid_top1" in row), None)
        return Figures(
            valid=result["top1"] if result.get("split") == "valid" else valid,
            test=None if result.get("split") == "valid" else result["top1"],
            pictures=result.get("pictures"),
            epochs=result.get("epochs"),
            seconds=result.get("seconds"),
        )

    def console(self, attempt: Attempt, region: str) -> str:
        return f"ec2/home?region={region}#InstanceDetails:instanceId={attempt.id}"

    def past_limit(self, attempt: Attempt, state: State) -> float:
        if state.phase is not Phase.RUNNING or state.started is None:
            return 0.0
        if state.detail == "shutting-down":
            return 0.0
        if state.ends_by is not None and now() > state.ends_by:
            return (now() - state.ends_by).total_seconds() / 3600
        past = now() - state.started - timedelta(hours=attempt.hours)
        return past.total_seconds() / 3600 if past > PATIENCE else 0.0

    @classmethod
    def overdue(cls, inventory: Inventory) -> Iterator[tuple[Attempt, State]]:
        seen: list[Attempt] = []  # attempts on several machines: each is yielded once
        for instance in inventory.instances():
            state = running(instance)
            tags = tag_values(instance.get("Tags", []))
            if instance["State"]["Name"] != "running" or "run" not in tags:
                continue
            number = tags.get("attempt", "")
            if not number.isdecimal():  # not from a submit
                continue
            if state is None or state.machine_seconds < PATIENCE.total_seconds():
                continue
            attempt = inventory.attempts().get((tags["run"], int(number)))
            if attempt is not None and attempt.instances > 1:
                if attempt in seen:
                    continue
                seen.append(attempt)
                state = ec2_together.observe(inventory.aws, attempt)
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
                hour = inventory.price_of(instance["InstanceType"], run)
                yield rented("machine", instance["InstanceId"], machines, hour, run)


TARGETS = (Ec2("ec2"),)


def _machines_of(attempt: Attempt) -> dict[str, Any]:
    """Return the parameters of the attempt's RunInstances: the last of its requests."""
    return attempt.requests[-1].parameters
