"""Training and tuning jobs as data: what AWS's model takes, and what the container will need."""

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from launch.cloud import hyperparameters as codec
from launch.cloud.request import check
from launch.targets import sagemaker, tuner
from launch.targets.base import Spec
from launch.targets.spec import load_config, load_target, run_id
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings import search_space as space


def make_spec(*overrides, target=(), data=None, **fields):
    chosen = load_target(target or ["target=sagemaker"])
    config, name = load_config(chosen, list(overrides), data)
    return Spec(
        chosen,
        config,
        tuple(overrides),
        run_id(chosen, config, name, overrides),
        "123456789012",
        "us-east-1",
        name,
        "ab" * 32,
        "0123abc",
        **fields,
    )


def test_a_training_job_as_a_whole():
    spec = make_spec(
        "optim.lr=1e-3",
        "name='my run'",
        target=["target=sagemaker", "target.spot=true", "target.hours=2", "target.wait_hours=3"],
    )
    request = sagemaker.training_job(spec)
    check(request)
    job = request.parameters
    assert job["HyperParameters"] == {
        "optim.lr": "1e-3",
        "name": "\"'my run'\"",
        "sagemaker_program": '"launch/local/container_entry.py"',
        "sagemaker_submit_directory": (
            f'"s3://packhorse-123456789012-us-east-1/source/{"ab" * 32}.tar.gz"'
        ),
        "sagemaker_region": '"us-east-1"',
    }
    assert (
        job["AlgorithmSpecification"]["TrainingImage"]
        == "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker"
    )
    assert job["AlgorithmSpecification"]["MetricDefinitions"] == settings.metric_definitions()
    assert job["RoleArn"] == "arn:aws:iam::123456789012:role/packhorse-training-us-east-1"
    assert (
        job["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 10800}
        and job["EnableManagedSpotTraining"]
    )
    assert (
        job["CheckpointConfig"]["LocalPath"]
        == spec.config.platform.checkpoints
        == "/opt/ml/checkpoints"
    )
    assert (
        job["CheckpointConfig"]["S3Uri"]
        == f"s3://packhorse-123456789012-us-east-1/runs/{spec.run}/checkpoints"
    )
    assert "InputDataConfig" not in job  # the pictures ship with the trainer
    assert job["Environment"]["PACKHORSE_REVISION"] == "0123abc"
    assert {"Key": "project", "Value": "packhorse"} in job["Tags"] and {
        "Key": "run",
        "Value": spec.run,
    } in job["Tags"]


def test_pictures_come_by_a_channel_whatever_the_laptop_calls_their_folder(tmp_path):
    spec = make_spec("data=folder", f"data.root={tmp_path}/dogs", target=["target=sagemaker"])
    job = sagemaker.training_job(spec).parameters
    assert job["InputDataConfig"][0]["ChannelName"] == "training"
    assert job["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"].endswith("/data/dogs/")
    assert [key for key in job["HyperParameters"] if not key.startswith("sagemaker_")] == ["data"]


def test_several_machines_are_started_by_torchrun():
    job = sagemaker.training_job(make_spec(target=["target=sagemaker_multi"])).parameters
    assert job["ResourceConfig"]["InstanceCount"] == 4 and job["AlgorithmSpecification"][
        "TrainingImage"
    ].endswith(":2.13-cpu-amzn2023-sagemaker")
    started = job["HyperParameters"]
    assert started["sagemaker_torch_distributed_enabled"] == "true"
    assert (
        started["sagemaker_distribution_instance_groups"] == '["homogeneousCluster"]'
        and started["sagemaker_instance_type"] == '"ml.m5.2xlarge"'
    )


@pytest.mark.parametrize("target", ["sagemaker", "sagemaker_multi", "tuner"])
def test_every_target_passes_awss_own_model(target):
    sweep = ["sweep=lr_batch"] if target == "tuner" else []
    for attempt in (1, 99):
        spec = make_spec(*sweep, "name=" + "n" * 60, target=[f"target={target}"], attempt=attempt)
        check(tuner.tuning_job(spec) if target == "tuner" else sagemaker.training_job(spec))


def test_a_search_by_hyperband_that_learns_from_others_and_ends_when_it_is_good():
    spec = make_spec(
        "sweep=lr_batch",
        "sweep.engine=optuna",
        "sweep.sampler=random",
        "train.epochs=9",
        target=[
            "target=tuner",
            "target.warm_start=packhorse-a-1,packhorse-b-1",
            "target.patience=5",
            "target.goal=0.9",
        ],
    )
    request = tuner.tuning_job(spec)
    check(request)
    tuning = request.parameters["HyperParameterTuningJobConfig"]
    assert tuning["Strategy"] == "Hyperband" and tuning["TrainingJobEarlyStoppingType"] == "Off"
    bounds = tuning["StrategyConfig"]["HyperbandStrategyConfig"]
    assert bounds == {"MinResource": 1, "MaxResource": 9}
    assert tuning["TuningJobCompletionCriteria"] == {
        "BestObjectiveNotImproving": {"MaxNumberOfTrainingJobsNotImproving": 5},
        "TargetObjectiveMetricValue": 0.9,
    }
    parents = request.parameters["WarmStartConfig"]["ParentHyperParameterTuningJobs"]
    names = [each["HyperParameterTuningJobName"] for each in parents]
    assert names == ["packhorse-a-1", "packhorse-b-1"]


def test_a_tuning_job_has_the_sweeps_own_ranges():
    spec = make_spec(
        "sweep=lr_batch",
        "sweep.engine=optuna",
        "sweep.trials=9",
        "sweep.parallel=3",
        "optim=sgd",
        target=["target=tuner"],
    )
    request = tuner.tuning_job(spec)
    check(request)
    tuning, job = (
        request.parameters["HyperParameterTuningJobConfig"],
        request.parameters["TrainingJobDefinition"],
    )
    assert (
        tuning["Strategy"] == "Bayesian"
        and tuning["TrainingJobEarlyStoppingType"] == "Auto"
        and tuning["RandomSeed"] == 0
    )
    assert tuning["HyperParameterTuningJobObjective"] == {
        "Type": "Maximize",
        "MetricName": "valid_top1",
    }
    assert tuning["ResourceLimits"] == {"MaxNumberOfTrainingJobs": 9, "MaxParallelTrainingJobs": 3}
    assert tuning["ParameterRanges"] == {
        "ContinuousParameterRanges": [
            {
                "Name": "optim.lr",
                "MinValue": "0.0001",
                "MaxValue": "0.1",
                "ScalingType": "Logarithmic",
            }
        ],
        "CategoricalParameterRanges": [{"Name": "train.batch_size", "Values": ["16", "32", "64"]}],
    }
    # What is tuned is not given twice, and the sweep is the tuner's business.
    assert [key for key in job["StaticHyperParameters"] if not key.startswith("sagemaker_")] == [
        "optim"
    ]
    assert (
        "ContainerEntrypoint" not in job["AlgorithmSpecification"] and "TrainingJobName" not in job
    )


def test_a_single_value_takes_its_setting_out_of_the_space_as_it_does_here():
    request = tuner.tuning_job(
        make_spec(
            "sweep=lr_batch", "sweep.engine=optuna", "train.batch_size=8", target=["target=tuner"]
        )
    )
    assert (
        "CategoricalParameterRanges"
        not in request.parameters["HyperParameterTuningJobConfig"]["ParameterRanges"]
    )
    assert (
        request.parameters["TrainingJobDefinition"]["StaticHyperParameters"]["train.batch_size"]
        == "8"
    )


def test_a_grid_has_the_points_that_it_has_here():
    spec = make_spec("sweep=lr_batch", "sweep.objective=valid_loss", target=["target=tuner"])
    tuning = tuner.tuning_job(spec).parameters["HyperParameterTuningJobConfig"]
    assert (
        tuning["Strategy"] == "Grid" and tuning["ResourceLimits"]["MaxNumberOfTrainingJobs"] == 12
    )
    assert tuning["HyperParameterTuningJobObjective"]["Type"] == "Minimize"
    assert tuning["ParameterRanges"]["CategoricalParameterRanges"][0] == {
        "Name": "optim.lr",
        "Values": ["0.0001", "0.001", "0.01", "0.1"],
    }


@pytest.mark.parametrize(
    ("key", "text", "values"),
    [
        ("model.weights", "null,'a b.pth'", [None, "a b.pth"]),
        ("data.augment.flip", "true,false", [True, False]),
        ("data.augment.scale", "[0.5,1],[0.8,1.0]", [[0.5, 1.0], [0.8, 1.0]]),
        ("optim.name", "adamw,sgd", ["adamw", "sgd"]),
        ("train.epochs", "2,3", [2, 3]),
    ],
)
def test_choices_come_out_as_the_types_that_went_in(configure, key, text, values):
    spec = make_spec("sweep=lr_batch", target=["target=tuner"])
    sweep = replace(space.load(spec.config), space=(space.parameter(key, text, spec.config),))
    (entry,) = tuner.parameter_ranges(sweep)["CategoricalParameterRanges"]
    for carried, value in zip(entry["Values"], values, strict=True):
        found = {
            name: found
            for name, found, _ in settings.walk(configure(*codec.decode({key: carried})))
        }[key]
        assert found == value and type(found) is type(value)


def test_integers_are_sampled_as_integers():
    spec = make_spec("sweep=lr_batch", "sweep.engine=optuna", target=["target=tuner"])
    sweep = replace(
        space.load(spec.config),
        space=(space.parameter("train.epochs", "interval(2,9)", spec.config),),
    )
    assert tuner.parameter_ranges(sweep) == {
        "IntegerParameterRanges": [
            {"Name": "train.epochs", "MinValue": "2", "MaxValue": "9", "ScalingType": "Linear"}
        ]
    }


@pytest.mark.parametrize(
    ("overrides", "target", "message"),
    [
        (
            ["train.device=cuda"],
            ["target=sagemaker_multi"],
            "train.device=cuda: ml.m5.2xlarge has no GPU; give target.instance_type=ml.g4dn.xlarge",
        ),
        (
            ["platform.package=/tmp/model"],
            ["target=sagemaker"],
            "platform.package=/tmp/model: what lies outside /opt/ml is lost",
        ),
        (
            ["platform.checkpoints=/opt/ml/elsewhere"],
            ["target=sagemaker"],
            "SageMaker keeps /opt/ml/checkpoints only",
        ),
        (
            ["sweep=lr_batch"],
            ["target=tuner", "target.instances=2"],
            "a trial of the tuner trains on one machine",
        ),
        ([], ["target=tuner"], "the sweep has nothing to try"),
    ],
)
def test_what_such_a_job_cannot_do(overrides, target, message):
    with pytest.raises(UserError, match=re.escape(message)):
        spec = make_spec(*overrides, target=target)
        tuner.tuning_job(spec) if "tuner" in target[0] else sagemaker.training_job(spec)


def test_images_by_region():
    target = load_target(["target=sagemaker"])
    assert (
        sagemaker.image(target, "cn-north-1")
        == "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/pytorch:2.13-cu133-amzn2023-sagemaker"
    )
    assert sagemaker.image(replace(target, image="mine:1"), "moon-1") == "mine:1"
    with pytest.raises(
        UserError, match=r"region moon-1: .* give one of AWS's for PyTorch as target.image=URI"
    ):
        sagemaker.image(target, "moon-1")


# os.write: the signal may come while the first line is still being written, and print must not be
# entered twice.
TRAINER = """
import os, signal, sys, time
def stop(*_):
    time.sleep(0.5)
    os.write(1, b"saved\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"training\\n")
time.sleep(60)
"""


def test_sigterm_reaches_the_trainer_and_the_container_waits_for_it(tmp_path):
    toolkit = tmp_path / "train"  # as the real one: no handler, a child, its exit code
    child = shlex.quote(TRAINER)
    toolkit.write_text(
        f"#!/bin/bash\n{shlex.quote(sys.executable)} -c {child}; code=$?\n"
        "echo toolkit saw $code\nexit 1\n"
    )
    toolkit.chmod(0o755)
    command = [*sagemaker.ENTRYPOINT, sagemaker.ON_STOP]
    assert all(len(part) <= 256 and "\n" not in part for part in command)
    container = subprocess.Popen(
        command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True
    )
    assert container.stdout.readline() == "training\n"
    container.send_signal(signal.SIGTERM)
    output, _ = container.communicate(timeout=600)
    assert output == "saved\ntoolkit saw 75\n" and container.returncode == 1
