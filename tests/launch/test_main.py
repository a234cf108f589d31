"""The command line itself: quick, helpful, and one line for each mistake, AWS's errors included."""

import os
import resource
import subprocess
import sys

import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ProfileNotFound,
)

from launch.__main__ import VERBS
from launch.cloud.session import explained
from launch.targets.base import NAMES
from tests.conftest import PROJECT
from trainer.common.errors import MISTAKE, OK


def launch(*arguments: str, cwd=PROJECT, **environment: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_EC2_METADATA_DISABLED": "true"
    }
    done = subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=cwd,
        env=kept | {"PYTHONPATH": str(PROJECT), "HOME": "/nonexistent"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def cpu(*command: str) -> float:
    """The least CPU seconds of three runs."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *command],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_answered_at_once_and_names_every_verb():
    assert cpu("-m", "launch", "--help") < cpu("-c", "import hydra") + 0.5
    code, printed = launch("--help")
    assert code == OK and all(f"\n  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("target", NAMES)
def test_plan_works_without_credentials(target):
    more = ["sweep=head"] if target == "tuner" else []
    code, printed = launch("plan", f"target={target}", *more)
    assert code == OK, printed
    assert (
        "000000000000" in printed
        and "missing: credentials" in printed
        and "$" in printed
        and "may touch" in printed
    )


MISTAKES = {
    ("fly",): "allowed: up, plan",
    ("plan", "target=moon"): "allowed: ec2",
    ("plan", "target.hours=0"): "above 0",
    ("plan", "optim.lrr=1"): "did you mean optim.lr",
    ("plan", "data=folder"): "--data DIR",
    ("plan", "experiment=dog_bread"): "did you mean dog_breeds?",
    ("submit", "experiment=dog_bread"): "did you mean dog_breeds?",
    ("rehearse", "experiment=dog_bread"): "did you mean dog_breeds?",
    ("plan", "+optim.eps=1e-8"): "optim.eps: there is no such setting",
    (
        "plan",
        "target=tuner",
        "model=small_cnn,resnet51",
    ): "model=resnet51: there is no such option; did you mean resnet50?",
    ("plan", "target=null"): "allowed: ec2",
    ("plan", "~target.hours"): "target.hours=VALUE",
    ("plan", "+target.eps=1"): "target.eps: there is no such setting",
    ("submit", "target=sagemaker"): "region",
    ("status", "target.region=us-east-1"): "no AWS credentials",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_with_a_remedy(arguments):
    code, printed = launch(*arguments)
    assert code == MISTAKE and MISTAKES[arguments] in printed and len(printed.splitlines()) == 1, (
        printed
    )


def client_error(code: str, message: str = "") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "RunInstances")


ERRORS = {
    "no such machine free": client_error("InsufficientInstanceCapacity"),
    "quota": client_error(
        "VcpuLimitExceeded",
        "You have requested more vCPU capacity than your current vCPU limit of 0 allows",
    ),
    "quotas": client_error(
        "ResourceLimitExceeded",
        "The account-level service limit 'ml.g4dn.xlarge for training job usage' is 0 Instances",
    ),
    "have expired": client_error("ExpiredToken"),
    "does not know these credentials": client_error("InvalidClientTokenId"),
    "wait a minute": client_error("ThrottlingException", "Rate exceeded"),
    "another region": client_error("OptInRequired"),
    "python -m launch up": client_error("NoSuchBucket"),
    "sagemaker:CreateTrainingJob": client_error(
        "AccessDeniedException",
        "User: x is not authorized to perform: sagemaker:CreateTrainingJob on resource: y",
    ),
    "policy --for launcher": client_error(
        "UnauthorizedOperation", "You are not authorized to perform this operation."
    ),
    "aws sso login": NoCredentialsError(),
    "AWS_PROFILE": ProfileNotFound(profile="nobody"),
    "target.region": NoRegionError(),
    "check the network": EndpointConnectionError(endpoint_url="https://nowhere"),
}


@pytest.mark.parametrize("remedy", ERRORS)
def test_an_error_of_aws_is_one_line_with_a_remedy(remedy):
    line = str(explained(ERRORS[remedy], "ec2:RunInstances"))
    assert remedy in line and "\n" not in line
