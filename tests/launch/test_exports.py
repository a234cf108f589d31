"""Runs written for SkyPilot, dstack and AWS Batch.

`make engines` installs SkyPilot and dstack, whose own parsers then read what is written.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import exports
from launch.cloud.request import Request, check
from launch.planning import Plan, prepare
from launch.targets.spec import load_target
from tests.conftest import PROJECT
from tests.launch.conftest import running
from trainer.common.errors import FAULT, OK, RESUME, UserError

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
    assert "limit=3600" in script and "grace=300" in script and "train.epochs=3" in script
    assert "limit=600" in (short := exports.script(plan.spec, 1 / 6)) and "grace=60" in short


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


@pytest.mark.parametrize("engine", ["skypilot", "dstack"])
def test_an_engine_rents_one_machine(engine):
    with pytest.raises(UserError, match=r"instances=2: .*one machine"):
        exports.ENGINES[engine](planned("target=ec2", "target.instances=2"))


@pytest.mark.long
def test_the_script_trains_and_keeps_one_limit_over_all_machines(tmp_path, monkeypatch):
    """It goes on from the bucket, saves there, and is refused when its seconds are used up."""
    monkeypatch.setattr(exports, "SCRATCH", str(tmp_path / "scratch"))
    words = ("name=dogs", "train.epochs=1", "data.size=16", "data.resize=16", "train.threads=1")
    plan = prepare(None, load_target(["target=ec2"]), words)
    bucket = plan.spec.bucket
    with running(tmp_path / "calls.jsonl") as cloud:
        s3 = cloud.client("s3")
        s3.create_bucket(Bucket=bucket)
        s3.put_object(Bucket=bucket, Key=f"source/{plan.spec.source}.tar.gz", Body=plan.source)
        script = tmp_path / "script.sh"
        script.write_text(exports.script(plan.spec, 1.0))
        setuptools = importlib.util.find_spec("setuptools")
        assert setuptools is not None and setuptools.origin is not None
        environment = cloud.environment() | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # The set-up goes on top of the Python of the tests, and downloads nothing.
            "PYTHON": sys.executable,
            "PYTHONPATH": str(Path(setuptools.origin).parents[1]),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
        }

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["bash", script], env=environment, capture_output=True, text=True, timeout=1200
            )

        first = run()
        assert first.returncode == OK, first.stdout + first.stderr
        keys = {
            each["Key"]
            for each in s3.list_objects_v2(Bucket=bucket, Prefix="runs/dogs/")["Contents"]
        }
        assert {"runs/dogs/output/result.json", "runs/dogs/log.txt"} <= keys
        assert any("/checkpoints/" in key for key in keys)
        used = s3.get_object(Bucket=bucket, Key="runs/dogs/exported.seconds")["Body"].read()
        assert int(used) > 0
        s3.put_object(Bucket=bucket, Key="runs/dogs/exported.seconds", Body=b"3600")
        last = run()
        assert last.returncode == FAULT and "used up its 3600 seconds" in last.stdout
