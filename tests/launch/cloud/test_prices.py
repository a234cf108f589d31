"""What an hour costs: the table that ships, and what AWS said since, in the user's own cache."""

import json

import pytest

from launch.cloud import prices
from launch.cloud.prices import price
from tests.conftest import PROJECT
from trainer.common.errors import OK

SHIPPED = (PROJECT / "launch/cloud/prices.json").read_bytes()
TABLE = json.loads(SHIPPED)["regions"]["us-east-1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where refreshed prices lie, of this process and of those that it starts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".cache" / "packhorse" / "prices.json"
    monkeypatch.setattr(prices, "REFRESHED", path)
    return path


def test_a_price_says_its_date_region_and_source():
    assert price("g4dn.xlarge", "us-east-1").on_demand == 0.526
    basis = price("g4dn.xlarge", "us-east-1").basis
    assert basis == f"estimate of {TABLE['date']} for us-east-1; {TABLE['source']}"
    assert "(ap-south-1 is not in the table)" in price("g4dn.xlarge", "ap-south-1").basis
    assert price("x9.huge", "us-east-1").on_demand is None


def keep(cache, **regions):
    """Puts refreshed prices into the cache."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        name.replace("_", "-"): {"date": "2027-01-02", "source": "AWS", "hours": hours}
        for name, hours in regions.items()
    }
    cache.write_text(json.dumps({"regions": kept}))


def test_a_refreshed_region_leaves_the_others_as_they_are(cache):
    keep(cache, eu_west_1={"g4dn.xlarge": 0.6})
    assert price("g4dn.xlarge", "eu-west-1").on_demand == 0.6
    assert price("g4dn.xlarge", "eu-west-1").basis == "estimate of 2027-01-02 for eu-west-1; AWS"
    assert price("g4dn.xlarge", "us-east-1").on_demand == 0.526
    # What AWS did not name in its answer has the price of the region that stands for others.
    other = price("ml.g4dn.xlarge", "eu-west-1")
    assert other.on_demand == 0.7364 and f"of {TABLE['date']} for us-east-1" in other.basis


def test_of_a_region_in_both_the_refreshed_price_counts(cache):
    keep(cache, us_east_1={"g4dn.xlarge": 0.5})
    assert price("g4dn.xlarge", "us-east-1").on_demand == 0.5
    assert price("g4dn.xlarge", "ap-south-1").on_demand == 0.5
    assert price("ml.m5.large", "us-east-1").on_demand == 0.115


@pytest.mark.parametrize("text", ["", "{", "[]", '{"regions": {"x": 1}}', '{"regions": 3}'])
def test_a_damaged_cache_holds_no_prices(cache, text):
    keep(cache)
    cache.write_text(text)
    assert price("g4dn.xlarge", "us-east-1").on_demand == 0.526


def test_refreshed_prices_serve_every_command_and_every_region(cloud, cache):
    cloud.post("/strict/ask_price", ec2=0.6, ml=0.9)
    for region, shown in (("us-east-1", "$0.6000"), ("eu-west-1", "$0.9000")):
        code, printed = cloud.launch("prices", "--refresh", f"target.region={region}")
        assert code == OK and "AWS Price List API" in printed and shown in printed, printed
    assert {call["operation"] for call in cloud.calls()} == {"GetProducts"}
    assert (PROJECT / "launch/cloud/prices.json").read_bytes() == SHIPPED
    assert printed == cloud.launch("prices")[1]
    assert set(json.loads(cache.read_text())["regions"]) == {"us-east-1", "eu-west-1"}

    # Only another region is refreshed: what asks for the one that stands for all still finds it.
    keep(cache, eu_west_1={"g4dn.xlarge": 0.6})
    for command in (
        ["instances", "target.region=us-east-1"],
        ["plan", "target=ec2", "target.region=us-west-2"],
        ["plan", "target=sagemaker", "target.region=eu-west-1"],
    ):
        code, printed = cloud.launch(*command)
        assert code == OK, printed
