"""Runs written for SkyPilot, dstack and AWS Batch.

`make engines` installs SkyPilot and dstack, whose own parsers then read what is written.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import exports
from launch.cloud.request import Request, check
from launch.planning import Plan, prepare
from launch.targets.spec import load_target
from tests.conftest import PROJECT
from trainer.common.errors import RESUME, UserError

ENGINES = PROJECT / ".venv-engines"  # an environment each: what they need doesn't go together
needs_engines = pytest.mark.skipif(not ENGINES.exists(), reason="make engines installs them")
OVERRIDES = ("name=dogs", "train.epochs=3", "model.name=it's")
# What each engine reads: a program that reads the document from its standard input, and prints what
# it made of it.
READERS = {
    "skypilot": """
import sys, yaml, json, sky
task = sky.Task.from_yaml_config(yaml.safe_load(sys.stdin))
resources = [each for each in task.resources]
print(json.dumps({
    "name": task.name,
    "run": task.run,
    "machines": [[each.instance_type, each.region, each.use_spot] for each in resources],
    "codes": [each.job_recovery["recover_on_exit_codes"] for each in resources],
}))
""",
    "dstack": """
import sys, yaml, json
from dstack._internal.core.models.configurations import parse_run_configuration
run = parse_run_configuration(yaml.safe_load(sys.stdin))
print(json.dumps({
    "name": run.name,
    "run": run.commands[0],
    "machines": run.instance_types,
    "spot": str(run.spot_policy.value),
    "max_duration": run.max_duration,
    "events": [each.value for each in run.retry.on_events],
}))
""",
}


def planned(*targets: str) -> Plan:
    return prepare(None, load_target(list(targets)), OVERRIDES[:2])


def read_by(engine: str, text: str) -> dict[str, Any]:
    program = [ENGINES / engine / "bin/python", "-c", READERS[engine]]
    read = subprocess.run(program, input=text, capture_output=True, text=True, timeout=600)
    assert read.returncode == 0, read.stderr
    answer: dict[str, Any] = json.loads(read.stdout.splitlines()[-1])
    return answer


SPOT = ("target=ec2", "target.spot=auto", "target.instance_type=g4dn.xlarge,g5.xlarge")


@needs_engines
def test_skypilot_reads_it():
    plan = planned(*SPOT)
    text, start = exports.written(plan, "skypilot", Path("a file.yaml"))
    read = read_by("skypilot", text)
    assert start == ["sky", "jobs", "launch", "a file.yaml"]
    assert read["name"] == "dogs" and read["run"] == exports.skypilot(plan)["run"]
    names = ("g4dn.xlarge", "g5.xlarge")
    assert read["machines"] == [
        [name, "us-east-1", use_spot] for use_spot in (True, False) for name in names
    ]
    assert read["codes"] == [[RESUME]] * 4, "a run that saved goes on elsewhere"


@needs_engines
def test_dstack_reads_it():
    plan = planned(*SPOT)
    text, _ = exports.written(plan, "dstack", Path("a.yaml"))
    read = read_by("dstack", text)
    assert read["name"] == "dogs" and read["run"] == exports.dstack(plan)["commands"][0]
    assert read["machines"] == ["g4dn.xlarge", "g5.xlarge"] and read["spot"] == "auto"
    assert read["max_duration"] == 60 * round(60 * exports.hours(plan))
    assert read["events"] == ["no-capacity", "interruption"]


def test_batch_takes_it():
    """botocore's models have both the call and the request that it carries."""
    plan = planned("target=sagemaker")
    text, start = exports.written(plan, "batch", Path("job.json"))
    document = json.loads(text)
    check(Request("batch", "SubmitServiceJob", document))
    carried = json.loads(document["serviceRequestPayload"])
    assert [Request("sagemaker", "CreateTrainingJob", carried)] == plan.requests
    assert "file://job.json" in start


@pytest.mark.parametrize("engine", ["skypilot", "dstack"])
def test_what_is_written_is_what_is_meant(engine):
    """The YAML is the document, its script bash, with the settings as they were typed."""
    plan = planned(*SPOT)
    text, _ = exports.written(plan, engine, Path("a.yaml"))
    assert yaml.safe_load(text) == exports.ENGINES[engine](plan)
    script = exports.script(plan.spec, 1.0)
    assert "arguments=(" in script and f"limit={3600 * 8}" in text
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "limit=3600" in script and "train.epochs=3" in script


def test_the_dearest_machine_keeps_the_ceiling():
    plan = planned(*SPOT, "target.max_dollars=2")
    assert plan.ceiling is not None
    dearest = max(price.on_demand or 0.0 for price in plan.prices.values())
    assert exports.hours(plan) * dearest <= 2


@pytest.mark.parametrize(
    ("engine", "target"),
    [("skypilot", "sagemaker"), ("dstack", "box"), ("batch", "ec2"), ("batch", "tuner")],
)
def test_what_an_engine_cannot_carry_is_refused(engine, target):
    sweep = ["sweep=head"] if target == "tuner" else []
    plan = prepare(None, load_target([f"target={target}"]), sweep)
    with pytest.raises(UserError, match=f"target={target}: .*give target="):
        exports.written(plan, engine, Path("a"))
