import random
from types import SimpleNamespace

import pytest

from serving.adapters import lambda_inside
from tests.serving import fuzz_packages
from tests.serving.fuzz import attack, event


def test_hostile_requests_do_no_harm(original, tmp_path):
    statuses = attack(original / "package", tmp_path, requests=400, seed=1)
    assert statuses.keys() >= {200, 400, 413, 415}  # the fuzzer reaches all these answers


@pytest.mark.long
def test_20000_hostile_requests_do_no_harm(original, tmp_path):
    attack(original / "package", tmp_path, requests=20_000, seed=2)


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.long)])
def test_forged_packages_load_or_are_refused_in_one_line(original, tmp_path, count):
    outcomes = fuzz_packages.attack(original / "package", tmp_path, count, seed=3)
    assert outcomes["refused"] > count / 2


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_events_of_no_shape_are_the_callers_fault(original, picture, monkeypatch, count):
    monkeypatch.setenv("MODEL_DIR", str(original / "package"))
    lambda_inside.engine.cache_clear()
    context = SimpleNamespace(aws_request_id="request-1")
    statuses = set()
    for number in range(count):
        told = lambda_inside.handler(event(random.Random(f"3 {number}"), picture), context)
        assert 200 <= told["statusCode"] < 500, (number, told)
        assert "Traceback" not in told["body"]
        statuses.add(told["statusCode"])
    assert statuses >= {200, 400}
    lambda_inside.engine.cache_clear()
