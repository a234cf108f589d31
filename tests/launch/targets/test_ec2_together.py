"""Several EC2 machines of one run: asked for together, ended together."""

import json

import pytest

from launch.targets import ec2_request
from launch.targets.base import targets
from launch.targets.spec import load_target
from tests.conftest import wait_for
from tests.launch.conftest import Cloud
from tests.launch.targets.test_money import end, machines, put, sent
from tests.launch.targets.test_user_data import make_spec
from trainer.common.errors import OK, RESUME, UserError

TWO = ("target=ec2", "target.instances=2")
RECLAIM = "Server.SpotInstanceTermination"


def of_attempt(cloud: Cloud, run: str, number: int = 1) -> list[dict]:
    """The attempt's machines, the first one first."""
    found = [
        each
        for each in machines(cloud, run)
        if {"Key": "attempt", "Value": str(number)} in each["Tags"]
    ]
    return sorted(found, key=lambda each: each["AmiLaunchIndex"])


def groups(cloud: Cloud) -> set[str]:
    tagged = [{"Name": "tag:project", "Values": ["packhorse"]}]
    answer = cloud.client("ec2").describe_placement_groups(Filters=tagged)
    return {each["GroupName"] for each in answer["PlacementGroups"]}


def finish(cloud: Cloud, run: str, machine: dict, code: str, **more: float) -> None:
    cloud.post("/strict/end_instance", instance=machine["InstanceId"], code=code, **more)


def state_of(cloud: Cloud, run: str) -> dict:
    code, printed = cloud.launch("status", "--json")
    assert code == OK, printed
    document = json.loads(printed[printed.index("{") :])
    return next(each for each in document["runs"] if each["run"] == run)


def test_they_are_asked_for_together_and_cost_together(account):
    code, printed = account.launch("plan", *TWO, "name=pair")
    assert code == OK, printed
    assert "2 x g4dn.xlarge, 2 processes" in printed and "$1.08 an hour with disk" in printed
    assert "ceiling   $8.76" in printed and "the machines reach each other by sg-" in printed
    account.post("/strict/sold_out", what="g4dn.xlarge (-|us-east-1a) .*")
    code, printed = account.launch("submit", *TWO, "name=pair")
    account.post("/strict/sold_out", what="")
    assert code == OK and "asking for g4dn.xlarge in us-east-1b" in printed, printed
    first, _ = of_attempt(account, "pair")
    assert first["Placement"]["AvailabilityZone"] == "us-east-1b"
    assert "packhorse-pair-1" in groups(account)
    for request in sent(account, "RunInstances", "packhorse-pair-1"):
        assert (request["MinCount"], request["MaxCount"]) == ("2", "2"), "all of them, or none"
        assert request["Placement.GroupName"] == "packhorse-pair-1"
    assert "running on 2 machines" in state_of(account, "pair")["detail"]
    assert account.launch("stop", "pair", "--now")[0] == OK
    ended = {each["State"]["Name"] for each in of_attempt(account, "pair")}
    assert ended <= {"terminated", "shutting-down"}
    assert state_of(account, "pair")["state"] == "stopped"


def test_one_that_is_reclaimed_ends_all_and_the_run_goes_on_as_a_new_attempt(account):
    """Also where the others end in a way of their own: they have lost it."""
    process = account.start(
        "submit", *TWO, "target.spot=true", "name=lost", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: len(machines(account, "lost")) == 2, 120)
    first, second = of_attempt(account, "lost")
    finish(account, "lost", second, RECLAIM)
    state = state_of(account, "lost")
    assert state["state"] == "running" and "1 of 2 machines lost, the others end" in state["detail"]
    put(account, "runs/lost/attempts/1.json", {"attempt": 1, "code": 75, "reason": "interrupted"})
    finish(account, "lost", first, "Client.InstanceInitiatedShutdown")
    assert wait_for(lambda: len(machines(account, "lost")) == 4, 120)
    assert wait_for(lambda: "packhorse-lost-1" not in groups(account), 120)
    put(account, "runs/lost/attempts/2.json", {"attempt": 2, "code": 0, "reason": "done"})
    put(account, "runs/lost/attempts/2.1.json", {"attempt": 2, "code": 0, "reason": "done"})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK and "attempt 1 lost its machine" in printed, printed
    assert "packhorse-lost-2" in groups(account)


def test_what_still_runs_without_the_others_is_ended(account):
    """By --wait, and by whoever looks: a machine whose script has died waits for ever."""
    process = account.start(
        "submit", *TWO, "target.spot=true", "name=halves", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: len(machines(account, "halves")) == 2, 120)
    for each in of_attempt(account, "halves"):
        account.post("/strict/age", instance=each["InstanceId"], hours=1)
    _, second = of_attempt(account, "halves")
    finish(account, "halves", second, RECLAIM, hours=0.5)
    assert wait_for(lambda: len(machines(account, "halves")) == 4, 120), "a new attempt"
    assert of_attempt(account, "halves")[0]["State"]["Name"] in ("terminated", "shutting-down")
    assert account.launch("stop", "halves", "--now")[0] == OK
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == RESUME and "OVERDUE: run halves" in printed, printed


def test_one_that_aws_never_had_ends_the_other_at_once(account):
    process = account.start("submit", *TWO, "name=single", "--wait", "--every", "0.02")
    assert wait_for(lambda: len(machines(account, "single")) == 2, 120)
    end(account, "single", "Server.InsufficientInstanceCapacity")
    assert wait_for(lambda: len(machines(account, "single")) == 4, 120)
    assert account.launch("stop", "single", "--now")[0] == OK
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == RESUME and "found no machine free" in printed, printed


@pytest.mark.parametrize(
    ("said", "reasons", "phase"),
    [
        ({0: (0, "done"), 1: (75, "spot notice")}, ("", ""), "complete"),
        ({0: (75, "interrupted"), 1: (75, "spot notice")}, ("", ""), "reclaimed"),
        ({0: (75, "interrupted")}, ("", RECLAIM), "reclaimed"),
        ({0: (2, "failed"), 1: (2, "failed")}, ("", ""), "failed"),
        ({0: (75, "time limit"), 1: (75, "interrupted")}, ("", RECLAIM), "stopped"),
        ({0: (143, "another machine has ended"), 1: (1, "failed")}, ("", ""), "failed"),
        ({}, ("Client.UserInitiatedShutdown",) * 2, "stopped"),
    ],
)
def test_how_it_ended_is_told_by_all_of_them(account, said, reasons, phase):
    run = f"told-{phase}-{len(said)}-{sum(code for code, _ in said.values())}"
    assert account.launch("submit", *TWO, "target.spot=true", f"name={run}")[0] == OK
    for machine, reason in zip(of_attempt(account, run), reasons, strict=True):
        finish(account, run, machine, reason or "Client.InstanceInitiatedShutdown")
    for number, (code, reason) in said.items():
        name = "1.json" if number == 0 else f"1.{number}.json"
        put(account, f"runs/{run}/attempts/{name}", {"attempt": 1, "code": code, "reason": reason})
    assert state_of(account, run)["state"] == phase


def test_the_ceiling_counts_all_of_them(account):
    """Both are paid for while they ran, until the later one's end."""
    assert account.launch("submit", *TWO, "name=dear")[0] == OK
    for each in of_attempt(account, "dear"):
        account.post("/strict/age", instance=each["InstanceId"], hours=2)
    assert state_of(account, "dear")["hours"] == pytest.approx(4, abs=0.1)
    code, printed = account.launch("submit", *TWO, "name=cheap", "target.max_dollars=2")
    assert code == OK and "this attempt ends after 1.7" in printed, printed


def test_a_group_that_keeps_its_members_apart_is_said_before(account):
    ec2 = account.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    closed = ec2.create_security_group(GroupName="closed", Description="closed", VpcId=vpc)
    _, printed = account.launch("plan", *TWO, f"target.security_groups={closed['GroupId']}")
    assert f"missing: a rule by which the machines of {closed['GroupId']} reach" in printed, printed
    rule = {"IpProtocol": "tcp", "FromPort": 0, "ToPort": 65535}
    rule["UserIdGroupPairs"] = [{"GroupId": closed["GroupId"]}]
    ec2.authorize_security_group_ingress(GroupId=closed["GroupId"], IpPermissions=[rule])
    _, printed = account.launch("plan", *TWO, f"target.security_groups={closed['GroupId']}")
    assert f"reach each other by {closed['GroupId']}" in printed and "a rule" not in printed


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("target=ec2", "target.instances=2", "target.instance_type=t3.large"), "close to another"),
        (("target=box", "target.instances=2"), "a box is one machine"),
    ],
)
def test_what_cannot_be(overrides, why):
    with pytest.raises(UserError, match=why):
        load_target(overrides)


def test_processes_spread_evenly():
    spec = make_spec("train.processes=3", instances=2)
    with pytest.raises(UserError, match="give a multiple"):
        targets()["ec2"].requests(spec)
    assert "processes=2\n" in ec2_request.user_data(make_spec("train.processes=4", instances=2))


def test_down_deletes_their_groups(account):
    assert account.launch("submit", *TWO, "name=last")[0] == OK
    code, printed = account.launch("down", "--yes", "--every", "0.05")
    assert code == OK and "deletes   placement group packhorse-last-1" in printed, printed
    assert not groups(account)
