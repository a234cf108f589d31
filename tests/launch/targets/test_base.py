"""A target is one file and one YAML: one that nobody knows is added, and every verb knows it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.targets.base import NAMES, kinds, targets
from tests.conftest import PROJECT
from trainer.common.errors import MISTAKE, OK

YAML = """
name: toy
project: packhorse
region: us-east-1
bucket: null
role: null
tags: null
kms_key: null
subnet: null
security_groups: null
instance_type: g4dn.xlarge
hours: 2
queue: slow
instances: 3
"""

MODULE = '''
"""A job of AWS Batch."""

from dataclasses import dataclass

from launch.cloud.request import Request
from launch.targets.attempt import Figures, State
from launch.targets.base import Target, TargetConfig
from trainer.settings.config import setting


@dataclass
class ToyConfig(TargetConfig):
    queue: str = setting("slow", "quick")
    instances: int = setting(at_least=1)


class Toy(Target):
    config = ToyConfig
    role = "training"
    platform = "local"

    def data_root(self, data):
        return f"/data/{data}"

    def requests(self, spec):
        names = {"jobQueue": spec.target.queue, "jobDefinition": spec.run}
        return [Request("batch", "SubmitJob", {"jobName": spec.job_name, **names})]

    def observe(self, aws, attempt):
        return attempt.unseen()

    def stop_running(self, aws, attempt, state, at_once):
        pass

    def log_reader(self, aws, attempt):
        return list

    def results(self, aws, attempt):
        return f"runs/{attempt.run}/output/"

    def figures(self, inventory, attempt):
        return Figures()

    def console(self, attempt, region):
        return "batch"


TARGETS = (Toy("toy"),)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one more target."""
    root = tmp_path_factory.mktemp("project")
    for name in ("launch", "conf", "trainer", "serving", ".ci"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, root / name, ignore=ignored)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, root)
    (root / "launch/targets/toy.py").write_text(MODULE)
    (root / "conf/target/toy.yaml").write_text(YAML)
    return root


def launch(project: Path, *arguments: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=project,
        env=kept
        | {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(project), "HOME": "/nonexistent"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_a_target_is_one_file_and_one_yaml(project: Path) -> None:
    code, printed = launch(project, "plan", "target=toy", "name=first", "--json")
    assert code == OK, printed
    plan = json.loads(printed)
    assert plan["requests"] == [
        {
            "service": "batch",
            "operation": "SubmitJob",
            "parameters": {
                "jobName": "packhorse-first-1",
                "jobQueue": "slow",
                "jobDefinition": "first",
            },
        }
    ]
    assert plan["cost"]["machines"] == "3 x g4dn.xlarge, 3 processes"
    assert plan["cost"]["at_time_limit"] == pytest.approx(2 * 3 * 0.526)
    assert list(plan["may_touch"]) == [
        "arn:aws:iam::000000000000:role/packhorse-training-us-east-1"
    ]


def test_its_settings_are_checked_and_its_name_is_offered(project: Path) -> None:
    code, printed = launch(project, "plan", "target=toy", "target.queue=none")
    assert code == MISTAKE and "allowed: slow, quick" in printed
    assert "toy" in launch(project, "plan", "target=moon")[1]
    assert "|toy|" in launch(project, "--help")[1]


def test_every_yaml_has_its_target() -> None:
    assert list(targets()) == NAMES
    assert all(target.name == name for name, target in targets().items())
    assert len(kinds()) < len(NAMES), "one machine or several: one class"
