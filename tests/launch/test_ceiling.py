"""What a run may cost, and what is asked for: in the model of AWS, whose clock is the test's."""

import dataclasses
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise

import pytest

from launch import ceiling, planning, submission
from launch.cloud.prices import Price
from launch.cloud.session import AwsError
from launch.planning import prepare
from launch.targets import ec2_offers, ec2_request
from launch.targets.attempt import Phase, State
from launch.targets.base import Spec
from launch.targets.instance_types import check_trains
from launch.targets.spec import load_target
from tests.launch.month import (
    BEGIN,
    HOURLY,
    PARTS,
    ZONES,
    Clock,
    Life,
    Model,
    Weather,
    clocked,
    spec_of,
    template,
)
from trainer.common.errors import UserError

G4DN = HOURLY["g4dn.xlarge"]


class Calm(Weather):
    """AWS has everything that it was not told to have sold out, and answers each call."""

    sold_out = ""

    def is_free(self, kind, zone, market, when):
        return not (self.sold_out and re.fullmatch(self.sold_out, f"{kind} {zone} {market}"))

    def is_out(self, when, who):
        return False

    def has_quota(self, account, market, when):
        return True

    def spot_price(self, kind, zone, when):
        return (0.3 + 0.05 * ZONES.index(zone)) * HOURLY[kind]


@pytest.fixture(scope="module")
def common() -> Spec:
    return template(0)


@pytest.fixture
def model() -> Iterator[Model]:
    clock = Clock()
    with clocked(clock):
        made = Model(Calm(0), clock, Life(1, 10_000.0, True, "false", None), 0)
        made.put(f"source/{'5e' * 32}.tar.gz", b"", BEGIN)
        yield made


def spec(common: Spec, model: Model, **settings) -> Spec:
    made = spec_of(common, model.life)
    assert isinstance(made.target, ec2_request.Ec2Config)
    return dataclasses.replace(made, target=dataclasses.replace(made.target, **settings))


def submit(model: Model, wish: Spec):
    return submission.submit(model, planning.next_attempt(model, wish, b""))


def reclaim(model: Model, hours: float) -> None:
    """Takes the newest machine back, so many hours after its start."""
    machine = model.life.machines[-1]
    machine.unseen = 0
    machine.fails = dict.fromkeys(machine.fails, machine.since + timedelta(days=999))
    machine.reclaimed = machine.since + timedelta(hours=hours)
    model.clock.time = machine.reclaimed + timedelta(minutes=5)
    model.play()


# --- the ceiling ---


def test_by_default_it_is_the_price_of_the_time_limit_on_demand(common, model):
    attempt = submit(model, spec(common, model))
    assert attempt.hours == 8
    assert attempt.ceiling == pytest.approx((G4DN + PARTS) * (8 + ceiling.AROUND / 3600))
    assert model.life.machines[0].limit == 8 * 3600
    script = str(attempt.requests[0].parameters["UserData"])
    assert f"platform.dollars_hour={round(G4DN + PARTS, 4)}" in script  # for the report


@pytest.mark.parametrize("spot", ["true", "false"])
def test_an_hour_has_one_price_wherever_it_is_told(spot, common, model):
    """In the plan, to the run for its report, in what it has cost so far; and below its ceiling."""
    wish = spec(common, model, spot=spot)
    plan = planning.next_attempt(model, wish, b"")
    machine = 0.3 * G4DN if spot == "true" else G4DN  # today's price of the cheapest zone
    hour = pytest.approx(machine + PARTS, abs=1e-4)
    told = planning.cost(model, plan)
    assert told["per_hour_spot" if spot == "true" else "per_hour"] == hour
    assert told["disk_and_address_per_hour"] == pytest.approx(PARTS, abs=1e-4)
    assert told["per_hour_spot"] == pytest.approx(0.3 * G4DN + PARTS, abs=1e-4)
    assert plan.spec.dollars_hour == hour
    attempt = submit(model, wish)
    state = State(Phase.RUNNING, started=BEGIN, machine_seconds=3600.0)
    assert attempt.dollars(state) == hour
    bid = ec2_offers.HEADROOM * machine if spot == "true" else machine
    assert attempt.per_hour == pytest.approx(bid + PARTS, abs=1e-4)


def test_it_is_of_the_run_over_all_its_attempts(common, model):
    """Each machine gets what is left; at its end nothing more is sent, and a line says what to do.

    The same holds for spot and for a laptop that was never there: the limit is the machine's own.
    """
    wish = spec(common, model, spot="true", max_dollars=1.0)
    limits = []
    for _ in range(3):
        limits.append(submit(model, wish).hours)
        reclaim(model, 1.0)
    bid = 0.3 * G4DN * ec2_offers.HEADROOM
    assert limits[0] == pytest.approx(1.0 / (bid + PARTS) - ceiling.AROUND / 3600, abs=0.02)
    assert all(0.75 < before - after < 1.1 for before, after in pairwise(limits))
    for _ in range(9):
        try:
            submit(model, wish)
        except UserError as error:
            said = str(error)
            break
        reclaim(model, 1.0)
    assert "of its ceiling of $1.00" in said and "nothing is sent" in said
    more = float(re.search(r"target.max_dollars=([\d.]+)", said)[1])
    assert submit(model, spec(common, model, spot="true", max_dollars=more)).hours > 1


def test_what_s3_keeps_counts_too(common, model):
    wish = spec(common, model, spot="true", max_dollars=2.0)
    submit(model, wish)
    reclaim(model, 1.0)
    before = planning.next_attempt(model, wish, b"").ceiling.spent
    model.put(f"runs/{wish.run}/output/large", b"", model.clock.time, 10**12)
    after = planning.next_attempt(model, wish, b"").ceiling.spent
    assert after - before == pytest.approx(1000 * 0.023 * ceiling.EXPIRES / 730)


def test_an_end_that_nobody_saw_is_reckoned_as_late_as_it_can_have_been(common, model):
    price = Price("g4dn.xlarge", G4DN, None, "")
    attempt = dataclasses.replace(submit(model, spec(common, model)), price=price)
    lost = State(Phase.FAILED, started=BEGIN)
    whole = (G4DN + PARTS) * (8 + ceiling.AROUND / 3600)
    assert ceiling.at_most(model, attempt, lost) == pytest.approx(whole)
    heard = State(Phase.FAILED, started=BEGIN, ended=BEGIN, is_sure=False)
    assert ceiling.at_most(model, attempt, heard) == pytest.approx(whole), "its script may be dead"
    never = State(Phase.NO_CAPACITY, started=BEGIN)
    assert ceiling.at_most(model, attempt, never) == 0


def test_a_machine_whose_id_nobody_heard_is_known_by_its_claim(common, model):
    wish = spec(common, model)
    unheard = dataclasses.replace(submit(model, wish), id=None, sent=None)
    machine = model.life.machines[0]
    machine.fails = dict.fromkeys(machine.fails, machine.since + timedelta(days=999))
    machine.unseen = 9
    model.clock.time += timedelta(hours=2)
    model.play()
    state = wish.kind.observe(model, unheard)
    assert state.phase is Phase.RUNNING and state.id == machine.id


def test_an_older_attempt_that_ec2_has_forgotten_ended_when_the_next_one_knew(common, model):
    wish = spec(common, model)
    first = submit(model, wish)
    model.life.machines[0].chance.random = lambda: 1.0  # it goes without a word
    reclaim(model, 2.0)
    submit(model, wish)
    model.clock.time += timedelta(hours=3)
    state = wish.kind.observe(model, first)
    assert state.phase is Phase.FAILED and "no longer says why" in state.detail
    assert state.machine_seconds == pytest.approx(2 * 3600, abs=120)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["target=sagemaker", "target.max_dollars=1"], 3600 * 1 / 0.746 - 300),
        (["target=sagemaker", "target.max_dollars=100"], 8 * 3600),
        (["target=sagemaker_multi", "target.max_dollars=4"], 3600 * 4 / 4 / 0.4706 - 300),
    ],
)
def test_sagemaker_ends_a_job_at_the_ceiling(words, seconds, monkeypatch):
    monkeypatch.setattr("launch.cloud.source.build", lambda extras: b"")
    plan = prepare(None, load_target(words), ["train.epochs=1"])
    limit = plan.requests[0].parameters["StoppingCondition"]["MaxRuntimeInSeconds"]
    assert limit == pytest.approx(seconds, abs=61) and plan.attempt.hours == limit / 3600
    told = float(
        json.loads(plan.requests[0].parameters["HyperParameters"]["platform.dollars_hour"])
    )
    assert told == pytest.approx(0.746 if "target=sagemaker" in words else 4 * 0.4706, abs=0.01)


def test_the_tuner_ends_all_its_trials_at_the_ceiling(monkeypatch):
    monkeypatch.setattr("launch.cloud.source.build", lambda extras: b"")
    words = ["target=tuner", "target.max_dollars=10"]
    plan = prepare(None, load_target(words), ["train.epochs=1", "sweep=head", "sweep.parallel=2"])
    limits = plan.requests[0].parameters["HyperParameterTuningJobConfig"]["ResourceLimits"]
    trials = limits["MaxNumberOfTrainingJobs"]
    assert limits["MaxParallelTrainingJobs"] == 2
    hours = 10 / 0.746 - trials * 300 / 3600
    assert limits["MaxRuntimeInSeconds"] == pytest.approx(hours * 3600 / 2, abs=61)
    given = plan.requests[0].parameters["TrainingJobDefinition"]["StaticHyperParameters"]
    assert float(given["platform.dollars_hour"]) == pytest.approx(0.746, abs=0.01)


def test_a_price_that_nobody_knows_is_refused(common, model, monkeypatch):
    monkeypatch.setitem(HOURLY, "g4dn.xlarge", 0.0)  # of which the Price List says nothing
    monkeypatch.setattr("launch.cloud.prices.rates", lambda: {"us-east-1": {}})
    wish = spec(common, model, instance_type="g4dn.xlarge")
    with pytest.raises(UserError, match="no ceiling can be held"):
        submit(model, wish)
    assert not model.life.machines


# --- what is asked for ---


def kinds(model: Model) -> list[tuple[str, str, bool]]:
    return [(each.kind, each.zone, each.spot) for each in model.life.machines]


def test_each_kind_in_each_zone_is_asked_for_in_order(common, model):
    offers = spec(common, model, spot="auto").kind.offers(model, spec(common, model), 0)
    assert [(each.target.instance_type, each.zone) for each in offers][:5] == [
        ("g4dn.xlarge", None),
        *(("g4dn.xlarge", zone) for zone in ZONES),
        ("g6.xlarge", None),
    ]
    wish = spec(common, model, zones="us-east-1c,us-east-1a", instance_type="[g5.xlarge]")
    assert [each.zone for each in wish.kind.offers(model, wish, 0)] == ["us-east-1c", "us-east-1a"]
    with pytest.raises(UserError, match=r"none of target.zones=eu-west-1a in us-east-1 has"):
        wish.kind.offers(model, spec(common, model, zones="eu-west-1a"), 0)
    [alone] = wish.kind.offers(model, spec(common, model, subnet="subnet-1", instance_type="x"), 0)
    assert alone.zone is None
    wish = spec(common, model, spot="true", subnet="subnet-1", instance_type="g4dn.xlarge")
    [alone] = wish.kind.offers(model, wish, 0)
    dearest = 0.4 * G4DN
    assert alone.zone is None and alone.bid == pytest.approx(dearest * 1.25, abs=1e-4)


def test_the_first_that_is_free_is_taken_and_noted(common, model):
    model.weather.__class__.sold_out = "g4dn.* .*|g6.* us-east-1[ab] .*"
    try:
        attempt = submit(model, spec(common, model, spot="true"))
    finally:
        Calm.sold_out = ""
    assert kinds(model) == [("g6.xlarge", "us-east-1c", True)]
    assert attempt.number == 1 and attempt.instance_type == "g6.xlarge" and attempt.refused is None
    market = attempt.requests[0].parameters["InstanceMarketOptions"]["SpotOptions"]
    assert float(market["MaxPrice"]) == pytest.approx(0.4 * HOURLY["g6.xlarge"] * 1.25, abs=1e-4)
    noted = json.loads(model.current[attempt.key].body)
    assert noted["requests"][0]["parameters"]["Placement"] == {"AvailabilityZone": "us-east-1c"}


def test_spot_auto_takes_a_machine_on_demand_when_its_patience_ends(common, model, monkeypatch):
    monkeypatch.setattr(Calm, "sold_out", ".* spot")
    wish = spec(common, model, spot="auto", spot_patience=30)
    for _ in range(3):
        with pytest.raises(AwsError, match="none free"):
            submit(model, wish)
        model.clock.time += timedelta(minutes=9)
    model.clock.time += timedelta(minutes=9)
    attempt = submit(model, wish)
    assert kinds(model)[0][2] is False and not attempt.spot and attempt.number == 1


def test_a_quota_refuses_one_kind_and_not_the_next(common, model, monkeypatch):
    asked = []
    answer = model._RunInstances

    def refuse(**parameters):
        asked.append(parameters["InstanceType"])
        if parameters["InstanceType"] == "g4dn.xlarge":
            raise AwsError("quota", "VcpuLimitExceeded", "", refused=True)
        return answer(**parameters)

    monkeypatch.setattr(model, "_RunInstances", refuse)
    assert submit(model, spec(common, model)).instance_type == "g6.xlarge"
    assert asked == ["g4dn.xlarge", "g6.xlarge"], "its quota is of all zones together"


def test_two_submits_at_once_leave_one_machine_that_works(common, model):
    wish = spec(common, model)
    for call in range(1, 25):
        life = model.life = Life(call, 10_000.0, True, "false", None)
        other = dataclasses.replace(wish, run=life.run)
        model.current = {k: v for k, v in model.current.items() if k.startswith("source/")}
        model.tokens.clear()
        model.during, model.countdown = lambda other=other: submit(model, other), call
        attempt = submit(model, other)
        model.clock.time += timedelta(minutes=3)
        model.play()
        assert sum(each.until is None for each in life.machines) == 1, call
        assert wish.kind.observe(model, attempt).phase is Phase.RUNNING, call


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("g5g.xlarge", "ARM"),
        ("m7g.large", "ARM"),
        ("p3.2xlarge", "CUDA 13"),
        ("ml.p2.xlarge", "CUDA 13"),
        ("g4ad.xlarge", "AMD"),
        ("ml.trn1.2xlarge", "no GPU"),
        ("p6e-gb200.36xlarge", "ARM"),
    ],
)
def test_a_machine_that_can_not_train_is_refused(kind, why):
    with pytest.raises(UserError, match=why):
        check_trains(kind)


@pytest.mark.parametrize(
    "kind", ["g4dn.xlarge", "ml.g5.xlarge", "g6e.xlarge", "p4d.24xlarge", "m5.large", "gr6.4xlarge"]
)
def test_a_machine_that_can_train_is_not(kind):
    check_trains(kind)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target.disk_gb=500"], "at most 125"),
        (["target.instance_type=ml.g4dn.xlarge,ml.g4dn.12xlarge"], "different numbers of GPUs"),
        (["target.instance_type=" + ",".join(["ml.g5.xlarge"] * 6)], "5 at most"),
    ],
)
def test_combinations_that_sagemaker_refuses_are_refused_before(words, said):
    with pytest.raises(UserError, match=said):
        load_target(["target=sagemaker", *words])


def test_sagemaker_is_told_which_machines_are_preferred(monkeypatch):
    monkeypatch.setattr("launch.cloud.source.build", lambda extras: b"")
    both = "target.instance_type=ml.g4dn.xlarge,ml.g5.xlarge"
    plan = prepare(None, load_target(["target=sagemaker", both]), ["train.epochs=1"])
    config = plan.requests[0].parameters["ResourceConfig"]
    names = ["ml.g4dn.xlarge", "ml.g5.xlarge"]
    assert [each["InstanceType"] for each in config["InstancePreferences"]] == names
    assert "InstanceType" not in config and plan.price.instance_type == "ml.g5.xlarge"
    words = ["train.epochs=1", "sweep=head"]
    plan = prepare(None, load_target(["target=tuner", both]), words)
    trial = plan.requests[0].parameters["TrainingJobDefinition"]
    config = trial["HyperParameterTuningResourceConfig"]
    assert config["AllocationStrategy"] == "Prioritized" and "ResourceConfig" not in trial
    assert [each["InstanceType"] for each in config["InstanceConfigs"]] == names
