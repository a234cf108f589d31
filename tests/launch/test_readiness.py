"""What a plan says before anything is rented: on one screen, and whatever AWS refuses to tell."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from launch.cloud import quotas
from launch.readiness import clock
from launch.targets.base import NAMES
from launch.targets.questions import Answer, way_to_s3
from tests.conftest import make_pictures
from tests.launch.conftest import Cloud
from trainer.common.errors import MISTAKE, OK

G_ON_DEMAND, G_SPOT = "L-DB2E81BA", "L-3819A6DF"
SCREEN = 16  # lines, with what is next and what a small search adds


def plan(cloud: Cloud, *words: str) -> str:
    code, printed = cloud.launch("plan", *words)
    assert code == OK, printed
    return printed


@pytest.mark.parametrize("target", NAMES)
def test_a_plan_fits_a_screen_and_names_quota_and_price(account, target):
    more = ["sweep=head"] if target == "tuner" else []
    printed = plan(account, f"target={target}", *more)
    lines = printed.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= 160, printed
    assert [
        word for word in ("runs", "costs", "quota", "next:") if f"\n{word}" not in printed
    ] == []
    assert "missing" not in printed and "an hour" in printed and "at the time limit" in printed
    assert "(L-" in printed and "Statement" not in printed


def test_the_full_plan_adds_what_is_sent_and_what_the_machine_may_touch(account):
    lines = plan(account, "target=ec2").splitlines()
    full = plan(account, "target=ec2", "--full")
    assert "sends     ec2 RunInstances" in full and "may touch" in full and "UserData" in full
    assert [line for line in lines if line not in full] == []


def test_on_demand_and_spot_are_two_quotas_each_named_with_its_number(account):
    account.post("/strict/quota", number=G_ON_DEMAND, value=0)
    account.post("/strict/quota", number=G_SPOT, value=8)
    printed = plan(account, "target=ec2")
    assert f"({G_ON_DEMAND}): 0 vCPUs, needs 4" in printed
    assert (
        f"missing: quota Running On-Demand G and VT instances ({G_ON_DEMAND}): it is 0" in printed
    )
    assert f"quotas/{G_ON_DEMAND}?region=us-east-1" in printed
    spot = plan(account, "target=ec2", "target.spot=true")
    assert f"({G_SPOT}): 8 vCPUs, needs 4" in spot and "missing" not in spot
    assert "rated 7 of 10" in spot
    account.post("/strict/quota", number=G_ON_DEMAND, value=64)


def test_sagemakers_quotas_are_by_machine_and_use_and_found_by_their_names_once(account):
    account.post("/strict/quota", number="ml.g4dn.xlarge for spot training job usage", value=0)
    quotas.NUMBERS.unlink(missing_ok=True)
    for _ in range(2):
        before = len(account.calls())
        printed = plan(account, "target=sagemaker", "target.spot=true")
        asked = [call["operation"] for call in account.calls()[before:]]
        assert "quota     ml.g4dn.xlarge for spot training job usage (L-" in printed
        assert "training job usage" in printed
    assert "ListServiceQuotas" not in asked and "GetServiceQuota" in asked
    unknown = plan(account, "target=sagemaker", "target.instance_type=ml.g6.xlarge")
    assert "there is no such machine in us-east-1" in unknown


def test_a_search_needs_as_many_machines_as_run_side_by_side(account):
    printed = plan(account, "target=tuner", "sweep=head", "sweep.parallel=5")
    assert "it is 4 instances in us-east-1, and 5 are needed" in printed


def test_a_network_without_a_way_to_s3_is_missing(cloud):
    cloud.post("/strict/close")
    printed = plan(cloud, "target=ec2")
    assert "way to S3: none" in printed and "create-vpc-endpoint" in printed
    printed = plan(cloud, "target=ec2", "target.subnet=subnet-0123456789abcdef0")
    assert "us-east-1 has no such subnet" in printed


SUBNET = {"SubnetId": "subnet-1", "AvailabilityZone": "us-east-1a", "VpcId": "vpc-1"}
TRANSIT, ENDPOINT = {"TransitGatewayId": "tgw-1"}, {"GatewayId": "vpce-1"}
ROUTES = [
    ("a NAT or transit gateway", [{"DestinationCidrBlock": "0.0.0.0/0"} | TRANSIT]),
    ("none", [{"DestinationCidrBlock": "10.0.0.0/8"} | TRANSIT]),
    ("the internet", [{"DestinationCidrBlock": "0.0.0.0/0", "GatewayId": "igw-1"}]),
    ("an endpoint of S3", [{"DestinationPrefixListId": "pl-1"} | ENDPOINT]),
    # a firewall's, to some addresses and to all
    ("none", [{"DestinationCidrBlock": "10.0.0.0/8"} | ENDPOINT]),
    ("the internet", [{"DestinationCidrBlock": "0.0.0.0/0"} | ENDPOINT]),
]
IPV6 = {"DestinationIpv6CidrBlock": "::/0", "GatewayId": "igw-1"}
NAT64 = {"DestinationIpv6CidrBlock": "64:ff9b::/96", "NatGatewayId": "nat-1"}


def way(routes: list[dict], **subnet: object) -> Answer:
    """What is said of a subnet with these routes."""
    table = {"VpcId": "vpc-1", "Associations": [{"Main": True}], "Routes": routes}
    found = {"Subnets": [SUBNET | {"MapPublicIpOnLaunch": True} | subnet], "RouteTables": [table]}
    aws = SimpleNamespace(pages=lambda _, __, key, **___: found[key], region="us-east-1")
    return way_to_s3("subnet-1").ask(aws)


@pytest.mark.parametrize(("led", "routes"), ROUTES)
def test_a_way_to_the_company_alone_is_none_to_s3(led, routes):
    told = way(routes)
    assert told.line.endswith(f"way to S3: {led}") and (told.missing is not None) is (led == "none")


def test_a_subnet_with_ipv6_alone_is_named():
    told = way([IPV6], Ipv6Native=True)
    assert "has IPv6 alone" in str(told.missing) and "NAT64" in str(told.missing)
    assert way([IPV6, NAT64], Ipv6Native=True).missing is None


READ = [
    ("GetServiceQuota", "quota"),
    ("DescribeSubnets", "network"),
    ("GetParameter", "what exists already"),
]


@pytest.mark.parametrize(("operation", "about"), READ)
def test_a_user_who_may_not_ask_one_thing_sees_the_rest(account, operation, about):
    account.post("/strict/refuse", operation=operation, code="AccessDenied", message="no")
    printed = plan(account, "target=ec2")
    account.post("/strict/refuse", operation=operation, code="", message="")
    line = next(line for line in printed.splitlines() if about in line)
    assert "not known" in line or "AWS refuses" in line
    assert "costs " in printed and "next:" in printed


def test_pictures_are_looked_at_by_the_trainers_own_eyes(account, tmp_path):
    pictures = make_pictures(tmp_path / "dogs", {"train": 3, "valid": 1})
    linked = pictures / "train" / "linked"
    (pictures / "train/circle").rename(tmp_path / "elsewhere")
    (pictures / "train/circle").symlink_to(tmp_path / "elsewhere")
    given = ("target=sagemaker", "data=folder", "--data", str(pictures))
    printed = plan(account, *given)
    assert "pictures  " in printed and " train, " in printed and "3 classes" in printed
    code, sent = account.launch("submit", *given, "name=linked")
    assert code == OK and "train" in sent, sent
    keys = account.client("s3").list_objects_v2(Bucket="packhorse-123456789012-us-east-1")
    uploaded = [each["Key"] for each in keys["Contents"] if "/train/circle/" in each["Key"]]
    assert len(uploaded) == 3, "a class that is a link is uploaded as the laptop trains on it"
    assert not linked.exists()

    (tmp_path / "elsewhere/000.png").write_bytes(b"")
    printed = plan(account, *given, "data.max_broken=0.5")
    assert "1 can't be used: 000.png" in printed
    (pictures / "train").rename(pictures / "pictures")
    printed = plan(account, *given)
    assert "missing: pictures that can be trained on" in printed and "train" in printed
    before = len(account.calls())
    code, printed = account.launch("submit", *given, "name=none")
    assert code == MISTAKE and len(printed.splitlines()) == 1
    assert "PutObject" not in [call["operation"] for call in account.calls()[before:]]


@pytest.mark.parametrize(("minutes", "is_missing"), [(0, False), (-20, True), (20, True)])
def test_a_clock_that_is_wrong_is_missing(minutes, is_missing):
    said = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    answer = {"ResponseMetadata": {"HTTPHeaders": {"date": said}}}
    told = clock(SimpleNamespace(call=lambda *_: answer))
    assert (told.missing is not None) is is_missing
    assert not is_missing or "20 minutes off" in told.line


@pytest.mark.parametrize(
    ("machine", "spot", "number", "needed"),
    [
        ("g4dn.xlarge", False, G_ON_DEMAND, 4),
        ("g5.12xlarge", True, G_SPOT, 48),
        ("p3.8xlarge", False, "L-417A185B", 32),
        ("p5.48xlarge", True, "L-C4BD4855", 192),
        ("m5.large", False, "L-1216C47A", 2),
        ("t3.medium", True, "L-34B43A08", 2),
    ],
)
def test_ec2_counts_processors_by_family(machine, spot, number, needed):
    quota = quotas.of_ec2(machine, spot, 1)
    assert quota is not None and (quota.number, quota.needed) == (number, needed)


def test_json_holds_all_of_it(account):
    told = json.loads(plan(account, "target=ec2", "--json"))
    assert {"pictures", "expected", "known", "missing", "cost"} <= told.keys()
    assert [about for about, _ in told["known"]] == ["quota", "capacity", "network"]
