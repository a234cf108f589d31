"""The request for an EC2 instance and the script in it, as data."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cloud import request, source
from launch.targets import ec2_request
from launch.targets.base import Spec
from launch.targets.spec import load_config, load_target, run_id
from trainer.common.errors import UserError

IMAGE = "ami-0123456789abcdef0"


def make_spec(*overrides: str, **settings: object) -> Spec:
    target = load_target(
        ["target=ec2", *(f"target.{key}={value}" for key, value in settings.items())]
    )
    config, name = load_config(target, overrides)
    return Spec(
        target,
        config,
        overrides,
        run_id(target, config, name, overrides),
        "123456789012",
        "eu-central-1",
        name,
        "5e" * 32,
        None,
        extras=tuple(source.extras(config)),
    )


def run_instances(spec: Spec) -> dict[str, object]:
    pinned = replace(spec, target=replace(spec.target, image=IMAGE))
    [made] = spec.kind.requests(pinned)
    request.check(made)
    assert (made.service, made.operation) == ("ec2", "RunInstances")
    return made.parameters


def test_it_ends_and_stays_closed() -> None:
    spec = make_spec()
    made = run_instances(spec)
    assert made["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert made["MetadataOptions"] == {
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "HttpEndpoint": "enabled",
    }
    ebs = {"VolumeSize": 100, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    assert made["BlockDeviceMappings"] == [{"DeviceName": "/dev/xvda", "Ebs": ebs}]
    assert made["IamInstanceProfile"] == {"Name": "packhorse-ec2-eu-central-1"}
    assert (made["ImageId"], made["InstanceType"], made["MinCount"], made["MaxCount"]) == (
        IMAGE,
        "g4dn.xlarge",
        1,
        1,
    )
    # No key pair, and no security group: the VPC's default one lets nothing in from outside.
    assert (
        not {
            "KeyName",
            "SecurityGroups",
            "SecurityGroupIds",
            "NetworkInterfaces",
            "InstanceMarketOptions",
            "SubnetId",
        }
        & made.keys()
    )
    assert [each["ResourceType"] for each in made["TagSpecifications"]] == [
        "instance",
        "volume",
        "network-interface",
    ]
    for each in made["TagSpecifications"]:
        tags = {tag["Key"]: tag["Value"] for tag in each["Tags"]}
        assert tags == {
            "Name": spec.job_name,
            "project": "packhorse",
            "run": spec.run,
            "attempt": "1",
        }


def test_spot_and_subnet() -> None:
    made = run_instances(
        make_spec(
            spot=True, subnet="subnet-0123456789abcdef0", instance_type="g5.xlarge", disk_gb=200
        )
    )
    spot = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
    assert made["InstanceMarketOptions"] == {"MarketType": "spot", "SpotOptions": spot}
    assert "spot-instances-request" in [each["ResourceType"] for each in made["TagSpecifications"]]
    assert (made["SubnetId"], made["InstanceType"]) == ("subnet-0123456789abcdef0", "g5.xlarge")


def test_the_client_token_stands_for_attempt_and_content() -> None:
    spec = make_spec()
    token = run_instances(spec)["ClientToken"]
    assert token == run_instances(make_spec())["ClientToken"]
    others = [
        replace(spec, attempt=2),
        replace(spec, source="6f" * 32),
        make_spec(hours=1),
        make_spec("seed=1"),
        make_spec(spot=True),
    ]
    tokens = {token, *(run_instances(other)["ClientToken"] for other in others)}
    assert len(tokens) == 1 + len(others)
    longest = replace(spec, run="r" * 48, attempt=999)
    assert max(len(each) for each in [*tokens, run_instances(longest)["ClientToken"]]) <= 64


NASTY = [
    "a b",
    "it's",
    '"',
    "$HOME",
    "$(touch x)",
    "`id`",
    "\\",
    "\n",
    "*",
    "!",
    "~",
    "é 犬",
    "@SETTINGS@",
    ")",
    "#",
    ";",
    "&&",
    "-n",
    "",
]


def test_bash_reads_the_settings_as_they_were_written(tmp_path: Path) -> None:
    """Whatever a value holds, bash gives it back, and nothing runs."""
    spec = make_spec("data=folder", "data.root=dogs", "model=resnet50")
    spec = replace(spec, overrides=tuple(f"name={value}" for value in NASTY), weights="closed")
    settings = ec2_request.user_data(spec).split("\n\n")[1]
    shown = subprocess.run(
        [
            "bash",
            "-euc",
            settings + '\nprintf "%s\\0" "$limit" "$grace" "$data" "$data_root" "$extras" '
            '"$weights" "$weights_root" "${arguments[@]}"',
        ],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    expected = [
        "28800",
        "300",
        "s3://packhorse-123456789012-eu-central-1/data/dogs",
        "/opt/dlami/nvme/data/dogs",
        "train",
        "closed",
        "/opt/dlami/nvme/data/closed",
        *ec2_request.arguments(spec),
    ]
    assert shown.stdout.decode().split("\0")[:-1] == expected
    assert expected[7 : 7 + len(NASTY)] == list(spec.overrides)
    assert not list(tmp_path.iterdir())


def test_where_things_lie_is_not_the_users_to_say(configure) -> None:
    spec = make_spec("data=folder", "platform.run_dir=/elsewhere", "name=mine", "data.root=dogs")
    config = configure(*ec2_request.arguments(spec))
    assert (config.platform.name, config.platform.run_dir, config.name) == (
        "ec2",
        "/opt/dlami/nvme/runs/mine",
        "mine",
    )
    assert config.data.root == "/opt/dlami/nvme/data/dogs"


@pytest.mark.parametrize("run", ["1e5", "true", "null", "007"])
def test_a_run_whose_name_reads_as_a_number(run: str, configure) -> None:
    config = configure(*ec2_request.arguments(replace(make_spec(), run=run)))
    assert (config.name, config.platform.run_dir) == (run, f"/opt/dlami/nvme/runs/{run}")


def test_the_extras_that_a_run_needs() -> None:
    assert "\nextras=timm,tensorboard\n" in ec2_request.user_data(
        make_spec("model=torchvision", "model.name=timm/resnet18", "train.tensorboard=true")
    )


def test_the_script_fits_and_is_clean() -> None:
    script = ec2_request.user_data(make_spec("model.name='it is'", spot=True))
    assert len(script.encode()) < 12288, "the rest is for settings"
    checked = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "-"],
        input=script,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_a_script_that_is_too_long() -> None:
    spec = replace(make_spec(), overrides=("name=" + "x" * 16384,))
    with pytest.raises(UserError, match="EC2 allows 16384; put settings into a file"):
        ec2_request.user_data(spec)


def test_the_instance_knows_the_revision_of_its_code() -> None:
    script = ec2_request.user_data(replace(make_spec(), revision="0123abc-dirty"))
    assert "revision=0123abc-dirty\n" in script and "PACKHORSE_REVISION=$revision" in script
    assert "revision=''\n" in ec2_request.user_data(make_spec())


@pytest.mark.parametrize(
    ("began", "written", "idle", "is_idle"),
    [
        (100, None, 60, True),  # it trains, and has never written anything
        (100, 10, 60, False),
        (100, 70, 60, True),
        (10, 100, 60, False),  # what it wrote is from before this boot
        (300, 300, 60, False),  # so is that it trains: it is being set up again
        (None, None, 60, False),
        (100, 100, 0, False),
    ],
)
def test_a_training_that_writes_nothing_is_idle(tmp_path, began, written, idle, is_idle) -> None:
    """Seconds ago; the machine has booted 200 seconds ago."""
    now = time.time()
    (tmp_path / "run").mkdir()
    for path, ago in ((tmp_path / "training", began), (tmp_path / "run/log.txt", written)):
        if ago is not None:
            path.touch()
            os.utime(path, (now - ago, now - ago))
    script = ec2_request.user_data(make_spec(idle_minutes=idle / 60))
    [function] = re.findall(r"^idles\(\) \{\n.*?^\}\n", script, re.MULTILINE | re.DOTALL)
    assert f"\nidle={idle}\n" in script
    places = f"scratch={tmp_path} directory={tmp_path}/run booted={int(now) - 200}"
    places += f" idle={idle} index=0"
    done = subprocess.run(["bash", "-uc", f"{places}\n{function}idles"])
    assert (done.returncode == 0) == is_idle
