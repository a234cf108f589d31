"""Jobs rehearsed by AWS's own toolkit.

The weights are those made here, on one host, on several, stopped and resumed; and how failures
are told.
"""

import importlib.util
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from launch.cloud import hyperparameters as codec
from launch.cloud.request import Request
from launch.local import container_entry
from launch.local.rehearse import expected_metrics, faults_of, jobs_of, preflight, remedy
from launch.local.sagemaker import LocalSageMaker, Outcome, namespaces, scrape
from launch.planning import missing
from launch.verbs import rehearse
from tests.conftest import PROJECT, QUICK, ended, environment, start_trainer, wait_for
from trainer.common.errors import MISTAKE, OK, RESUME, UserError
from trainer.settings import config as settings
from trainer.training import checkpoint

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("sagemaker_training") is None, reason="make setup EXTRA=rehearse"
    ),
]
SETTINGS = (
    *(setting for setting in QUICK if not setting.startswith("platform")),
    "data=folder",
    "model=small_cnn",
)


def start(cwd: Path, *arguments: str, project: Path = PROJECT) -> subprocess.Popen:
    """The verb as a user starts it."""
    with (cwd / "output.txt").open("w") as output:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "launch",
                "rehearse",
                *arguments,
                "--directory",
                str(cwd / "rehearsed"),
            ],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(cwd: Path, process: subprocess.Popen) -> tuple[int, str]:
    return process.wait(timeout=300), (cwd / "output.txt").read_text()


def run(cwd: Path, *arguments: str, project: Path = PROJECT) -> tuple[int, str]:
    return finish(cwd, start(cwd, *arguments, project=project))


def packed(cwd: Path, name: str = "model.safetensors", archive: str = "model.tar.gz") -> bytes:
    """A file of the only archive of that name that the rehearsals in `cwd` have left."""
    (path,) = (cwd / "rehearsed/s3").rglob(archive)
    with tarfile.open(path) as tar:
        return tar.extractfile(name).read()


def local(cwd: Path, name: str = "model.safetensors") -> bytes:
    (path,) = cwd.glob("runs/*/model.tar.gz")
    with tarfile.open(path) as tar:
        return tar.extractfile(name).read()


def seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_the_same_command_line_gives_the_same_bits_here_and_in_the_job_also_where_it_was_stopped(
    tmp_path, pictures
):
    odd = [
        "name='a = b, \"c\" é'",
        "data.augment.scale=[0.5, 1.0]",
        "optim.lr=1e-3",
        "train.clip_norm=null",
        "train.epochs=12",
    ]
    begun = seconds_of_children()
    # Not forked: its processor time would not be a child's.
    command = (*SETTINGS, *odd, f"data.root={pictures}", "platform=local")
    code, output = ended(start_trainer(tmp_path, *command, forked=False))
    assert code == 0, output
    trained = seconds_of_children() - begun

    arguments = ["target=sagemaker", *SETTINGS, *odd, "--data", str(pictures)]
    process = start(tmp_path, *arguments)
    assert wait_for(lambda: "epoch=2 " in (tmp_path / "output.txt").read_text(), seconds=120)
    process.send_signal(signal.SIGTERM)
    code, output = finish(tmp_path, process)
    assert (
        code == RESUME and "status          Stopped" in output and "everything is saved" in output
    ), output
    (saved,) = (tmp_path / "rehearsed/s3").glob("*/runs/*/checkpoints")
    checkpoint.verify(sorted(saved.glob("step-*"))[-1])

    begun = seconds_of_children()
    code, output = run(tmp_path, *arguments)
    assert code == OK and re.search(r"resumed from \S+/checkpoints/step-", output), output
    assert packed(tmp_path) == local(tmp_path)
    # What the rehearsal adds; processor time, which other work on this machine doesn't change much.
    assert seconds_of_children() - begun - trained < 10
    assert "status          Completed" in output and re.search(
        r"metric +valid_top1 +\S+  \(\d+ values\)", output
    )
    assert "report.html" in output and "package.json" in output and "error:" not in output


def test_two_hosts_give_the_bits_of_two_processes_here(tmp_path, pictures):
    exact = ["train.exact_shards=2", "train.epochs=1"]
    code, output = run(
        tmp_path,
        "target=sagemaker_multi",
        "target.instances=2",
        *SETTINGS,
        *exact,
        "--data",
        str(pictures),
    )
    assert code == OK, output
    assert "processes: 2 on 2 hosts; exact, in 2 shards" in output
    assert (
        "algo-1 | metrics:" in output.replace("127.0.0.1", "algo-1")
        and "lost when the job ends" not in output
    )
    torchrun = [
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "trainer",
    ]
    done = subprocess.run(
        [*torchrun, *SETTINGS, *exact, f"data.root={pictures}", "platform=local"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert packed(tmp_path) == local(tmp_path)


def test_three_trials_of_the_tuner(tmp_path, pictures):
    sweep = ["sweep=lr_batch", "sweep.engine=optuna", "train.epochs=1"]
    quick = [setting for setting in SETTINGS if not setting.startswith("train.")]
    code, output = run(tmp_path, "target=tuner", *sweep, *quick, "--data", str(pictures))
    assert code == OK, output
    assert len(re.findall(r"^objective +valid_top1=[\d.]+$", output, re.MULTILINE)) == 3
    configs = sorted((tmp_path / "rehearsed").glob("*/*/output/data/config.yaml"))
    assert len(configs) == 3
    rates = [float(re.search(r"lr: (\S+)", path.read_text())[1]) for path in configs]
    sizes = [re.search(r"batch_size: (\S+)", path.read_text())[1] for path in configs]
    assert (
        len(set(rates)) == 3
        and all(1e-4 <= rate <= 1e-1 for rate in rates)
        and set(sizes) <= {"16", "32", "64"}
    )


# --- faults: one line each, that says what to change ---


@pytest.fixture(scope="module")
def planned(pictures):
    """A request as it would be sent, and what goes with it."""
    return rehearse.prepare([*SETTINGS, "target=sagemaker"], pictures)


@pytest.fixture(scope="module")
def tuned(pictures):
    return rehearse.prepare([*SETTINGS, "target=tuner", "sweep=lr_batch"], pictures)


def check(
    plan, folder, request: Request | None = None, tarball: bytes | None = None, config=None
) -> None:
    request = request or plan.requests[0]
    jobs = jobs_of(request, 1, plan.spec.region)
    preflight(
        request, jobs, tarball or plan.source, {"training": folder}, config or plan.spec.config
    )


def changed(plan, where: str, value) -> Request:
    """The plan's request with one entry set, by its path; None removes it."""
    request = deepcopy(plan.requests[0])
    *path, last = [int(part) if part.isdigit() else part for part in where.split("/")]
    node = request.parameters
    for part in path:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return request


def test_nothing_is_wrong_with_what_is_planned(planned, tuned):
    check(*planned)
    check(*tuned)


REGEX = "AlgorithmSpecification/MetricDefinitions/5/Regex"
FAULTS = {
    "wrong channel": (
        "InputDataConfig/0/ChannelName",
        "images",
        "channel images: the trainer doesn't use it; allowed: training, train, valid",
    ),
    "open prefix": (
        "InputDataConfig/0/DataSource/S3DataSource/S3Uri",
        "s3://b/data/dogs",
        "also matches every prefix that begins with it; end it with /",
    ),
    "empty channel": (
        "InputDataConfig/0/ChannelName",
        "test",
        "channel test: s3://.* holds nothing; give the folder of pictures with --data DIR",
    ),
    "no such regex": (
        REGEX,
        "accuracy: ([0-9.]+)",
        r"metric valid_\w+: .* doesn't find it in the trainer's line",
    ),
    "broken regex": (REGEX, "valid_top1=(", r"metric valid_\w+: .* is no regular expression"),
    "no group": (
        REGEX,
        r"valid_top1=\S+",
        "has 0 groups; SageMaker takes the value from exactly one",
    ),
    "out of range": (
        "HyperParameters/train.epochs",
        "-1",
        "train.epochs=-1 is not allowed; allowed: at least 0",
    ),
    "wrong type": (
        "HyperParameters/train.epochs",
        '"many"',
        "hyperparameters: train.epochs=many is of the wrong type; allowed: integer",
    ),
    "no such setting": (
        "HyperParameters/train.epoch",
        "3",
        "hyperparameters: train.epoch: there is no such setting; did you mean train.epochs",
    ),
    "no such option": (
        "HyperParameters/model",
        '"resnet51"',
        "hyperparameters: model=resnet51: there is no such option",
    ),
    "not Hydra's": (
        "HyperParameters/train.epochs",
        '"[b"',
        "hyperparameters: train.epochs=.b is of the wrong type; allowed: integer",
    ),
    "wrong checkpoints": (
        "CheckpointConfig/LocalPath",
        "/opt/ml/saved",
        "CheckpointConfig.LocalPath=/opt/ml/saved: the trainer saves to /opt/ml/checkpoints",
    ),
    "hosts by themselves": (
        "ResourceConfig/InstanceCount",
        2,
        "2 machines would each train by themselves",
    ),
    "wrong program": (
        "HyperParameters/sagemaker_program",
        '"train.py"',
        "sagemaker_program=train.py: the tarball's entry is launch/local/container_entry.py",
    ),
    "other tarball": (
        "HyperParameters/sagemaker_submit_directory",
        '"s3://b/x.tar.gz"',
        "it names another tarball than this code's",
    ),
    "no such machine": (
        "ResourceConfig/InstanceType",
        "ml.g4.huge",
        "ml.g4.huge is not one of AWS's",
    ),
    "long name": (
        "TrainingJobName",
        "x" * 70,
        "TrainingJobName: its length of 70 is above the maximum of 63",
    ),
    "no role": ("RoleArn", None, 'Missing required parameter in input: "RoleArn"'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_would_fail_says_what_to_change(planned, fault):
    where, value, line = FAULTS[fault]
    with pytest.raises(UserError, match=line) as raised:
        check(*planned, request=changed(planned[0], where, value))
    assert "\n" not in str(raised.value)


def test_each_fault_has_a_line_of_its_own():
    assert len({line for _, _, line in FAULTS.values()}) == len(FAULTS) >= 12


def test_an_objective_that_nothing_scrapes(tuned):
    where = "HyperParameterTuningJobConfig/HyperParameterTuningJobObjective/MetricName"
    with pytest.raises(
        UserError,
        match="objective accuracy: no metric of that name is scraped, so every trial would fail",
    ):
        check(*tuned, request=changed(tuned[0], where, "accuracy"))


@pytest.mark.parametrize("key", ["weights", "weights_dir"])
def test_weights_of_this_machine(planned, tmp_path, key):
    """A file of them, a folder, and a run of ours as a start."""
    plan, folder = planned
    weights = tmp_path / "resnet.pth"
    weights.touch()
    if key == "weights_dir":
        weights = tmp_path
    config = replace(plan.spec.config, model=replace(plan.spec.config.model, **{key: str(weights)}))
    place = f"/opt/ml/input/data/training/{weights.name}"
    with pytest.raises(
        UserError, match=rf"a job doesn't see this machine's files; .* give model.{key}={place}"
    ):
        check(plan, folder, config=config)
    spec = replace(plan.spec, config=config)
    (line,) = missing(None, replace(plan, spec=spec), folder)
    assert line.startswith(f"model.{key}={weights} is on this machine only")
    assert f"give model.{key}={place}" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["target=ec2"],
            "target=ec2: only SageMaker's containers are rehearsed; "
            "allowed: sagemaker, sagemaker_multi, tuner",
        ),
        (["target=sagemaker_multi", "train.device=cuda"], "ml.m5.2xlarge has no GPU"),
        (
            ["data=folder", "data.root=nowhere"],
            "nowhere: there is no such folder of pictures; give --data DIR",
        ),
        (
            ["platform.runs=/tmp/runs"],
            "platform.runs=/tmp/runs: what lies outside /opt/ml is lost when the job ends",
        ),
        (["train.epochs=-1"], "train.epochs=-1 is not allowed"),
        (["name=" + "x" * 300], "302 characters, and SageMaker allows 256"),
    ],
)
def test_a_command_line_that_would_fail_says_what_to_change(arguments, line):
    with pytest.raises(UserError, match=re.escape(line)):
        rehearse.prepare(arguments, None)


# --- faults that only show when the toolkit runs ---


def repacked(tarball: bytes, change: dict[str, str | None]) -> bytes:
    new = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(tarball)) as old,
        tarfile.open(fileobj=new, mode="w:gz") as tar,
    ):
        for member in old.getmembers():
            text = change.get(
                member.name, old.extractfile(member).read().decode(errors="surrogateescape")
            )
            if text is not None:
                member.size = len(data := text.encode(errors="surrogateescape"))
                tar.addfile(member, io.BytesIO(data))
    return new.getvalue()


def run_plain(tmp_path: Path, planned, tarball: bytes) -> list[str]:
    """Return what is said of the plan's job with another tarball, run without namespaces."""
    plan, folder = planned
    uri = plan.spec.uri("source", f"{sha256(tarball).hexdigest()}.tar.gz")
    (job,) = jobs_of(plan.requests[0], 1, plan.spec.region)
    job = replace(
        job,
        hyperparameters=job.hyperparameters
        | {"sagemaker_submit_directory": codec.encode_value(uri)},
    )
    local = LocalSageMaker(tmp_path, isolated=False)
    local.upload(uri, tarball)
    channels = {"training": folder}
    return faults_of(job, local.run(job, channels), channels)


def test_a_requirement_that_cannot_be_had(tmp_path, planned):
    tarball = repacked(planned[0].source, {"requirements.txt": "hydra-core>=99\n"})
    (line,) = run_plain(tmp_path, planned, tarball)
    assert line.endswith(
        "requirements.txt: hydra-core>=99 is not installed here; "
        "correct it in pyproject.toml, or install it"
    )


@pytest.mark.skipif(
    namespaces() is None,
    reason="without namespaces an editable install fills in for what the tarball lacks",
)
def test_a_module_that_is_missing_in_the_tarball(tmp_path, pictures):
    project = tmp_path / "project"
    for name in ("trainer", "launch", "serving", "conf", ".ci"):
        shutil.copytree(
            PROJECT / name,
            project / name,
            ignore=shutil.ignore_patterns("__pycache__", "loader.py"),
        )
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, project)
    code, output = run(tmp_path, *SETTINGS, "--data", str(pictures), project=project)
    assert code == MISTAKE
    assert (
        "No module named 'trainer.images.loader'; "
        "trainer.images.loader is not in the tarball: name it in launch/cloud/source.py"
        in output.splitlines()[-1]
    )
    (failure,) = (tmp_path / "rehearsed").glob("*/*/output/failure")
    assert (
        len(failure.read_text()) <= 1024 and 'File "trainer/' in failure.read_text()
    )  # the frames that lead to it


def enter(
    tmp_path: Path, hyperparameters: dict[str, str], **environment: str
) -> tuple[int, str, str]:
    """The container's entry by itself: its exit code, what it printed, and the failure file."""
    (tmp_path / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    places = {
        "SM_INPUT_CONFIG_DIR": str(tmp_path),
        "SM_OUTPUT_DIR": str(tmp_path),
        "SM_MODEL_DIR": str(tmp_path),
        "SM_OUTPUT_DATA_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, PROJECT / "launch/local/container_entry.py", "--toolkits", "arguments"],
        env={"HOME": str(tmp_path)} | places | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    failure = tmp_path / "failure"
    return (
        done.returncode,
        done.stdout + done.stderr,
        failure.read_text() if failure.exists() else "",
    )


def test_a_mistake_that_the_trainer_sees_is_the_failure(tmp_path):
    code, output, failure = enter(tmp_path, {"model": '"resnet51"'})
    assert (
        code == MISTAKE
        and failure.startswith("model=resnet51: there is no such option; did you mean resnet50?")
        and f"error: {failure}" in output
    )


def test_channels_that_the_trainer_has_no_use_for(tmp_path):
    channels = {"SM_CHANNELS": '["images"]', "SM_CHANNEL_IMAGES": str(tmp_path)}
    assert enter(tmp_path, {}, **channels)[2].startswith(
        "channel images: the trainer doesn't use it"
    )
    (tmp_path / "failure").unlink()
    (tmp_path / "none").mkdir()
    channels = {"SM_CHANNELS": '["training"]', "SM_CHANNEL_TRAINING": str(tmp_path / "none")}
    assert re.match(
        r"channel training: \S+ holds nothing; upload the pictures",
        enter(tmp_path, {}, **channels)[2],
    )
    (tmp_path / "failure").unlink()
    wheels = {"SM_CHANNELS": '["wheels"]', "SM_CHANNEL_WHEELS": str(tmp_path)}  # pip's, not ours
    assert enter(tmp_path, {"data": '"folder"'}, **wheels)[2].startswith(
        "data=folder: the job has no channel with pictures"
    )


def test_the_first_failure_of_a_host_stays(tmp_path):
    (tmp_path / "failure").write_text("rank 0 was first")
    assert enter(tmp_path, {"model": '"resnet51"'})[2] == "rank 0 was first"


def test_trials_keep_their_checkpoints_apart(tmp_path, monkeypatch):
    (tmp_path / "hyperparameters.json").write_text(
        '{"_tuning_objective_metric": "valid_top1", "optim.lr": "0.5"}'
    )
    monkeypatch.setenv("PACKHORSE_CHECKPOINTS", "/opt/ml/checkpoints")
    environment = {"SM_INPUT_CONFIG_DIR": str(tmp_path), "TRAINING_JOB_NAME": "tune-001"}
    assert container_entry.overrides(environment) == ["optim.lr=0.5"]
    assert os.environ["PACKHORSE_CHECKPOINTS"] == "/opt/ml/checkpoints/tune-001"


NOISY = """
import sys, pathlib
pathlib.Path("results.txt").write_text("my results")
print("accuracy: 0.9")
"""


def test_a_script_that_writes_outside_and_prints_no_metrics(tmp_path, planned):
    lines = run_plain(
        tmp_path, planned, repacked(planned[0].source, {"launch/local/container_entry.py": NOISY})
    )
    assert (
        "code/results.txt lies outside /opt/ml's model, output/data and checkpoints: "
        "lost when the job ends" in lines[0]
    )
    assert re.search(
        "the log has no line for the metrics epoch, lr, .* "
        "print them with trainer.settings.config.metric_line",
        lines[1],
    )
    assert "model.tar.gz is empty" in lines[2]


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (
            'ExecuteUserScriptError:\nExitCode -9\nErrorMessage ""',
            "killed, most likely for memory: take a larger target.instance_type",
        ),
        ("ExecuteUserScriptError:\nExitCode -11", "crashed in native code"),
        (
            "Framework Error: \nbotocore.exceptions.ClientError: "
            "An error occurred (404) when calling the HeadObject operation",
            "upload it before",
        ),
        (
            "Framework Error: \ntarfile.ReadError: not a gzip file",
            "can't be unpacked: build it with launch/cloud/source.py",
        ),
        ("Framework Error: \nsomething else", "something else; see the log"),
        (None, "the container ended without a message"),
    ],
)
def test_remedies_for_what_the_toolkit_says(failure, line):
    assert line in remedy(Outcome([1], False, False, 1.0, failure, [], {}))


def test_the_metrics_that_a_run_prints_follow_from_its_settings_and_folder(planned, tmp_path):
    def missing(folder: Path, *overrides: str) -> set[str]:
        plan, _ = rehearse.prepare([*SETTINGS, "target=sagemaker", *overrides], folder)
        (job,) = jobs_of(plan.requests[0], 1, plan.spec.region)
        return set(settings.METRICS) - set(expected_metrics(job, {"training": folder}))

    _, folder = planned
    assert missing(folder) == set()
    assert missing(folder, "data.augment.mixup=0.2") == {"train_top1"}
    shutil.copytree(folder, tmp_path / "images", ignore=shutil.ignore_patterns("test"))
    untested = {f"test_{name}" for name in ("loss", "top1", "top5", "f1")}
    assert missing(tmp_path / "images") == untested
    table = tmp_path / "images/labels.csv"
    table.write_text("path,label,split\n1.png,a,train\n2.png,b,train\n3.png,a,test\n")
    assert missing(tmp_path / "images", "data.labels=labels.csv") == set()


def test_metrics_are_scraped_from_lines_of_several_hosts():
    printed = settings.metric_line({"epoch": 2, "lr": 1e-5, "valid_top1": 0.5})
    scraped = scrape([f"algo-1 | {printed}", "algo-2 | nothing"], settings.metric_definitions())
    assert scraped == {"epoch": [2.0], "lr": [1e-5], "valid_top1": [0.5]}


def test_mistakes_are_the_exit_code_and_one_line(tmp_path):
    code, output = run(tmp_path, "train.epoch=3")
    assert (
        code == MISTAKE
        and output.startswith(
            "error: train.epoch: there is no such setting; did you mean train.epochs"
        )
        and output.count("\n") == 1
    )
