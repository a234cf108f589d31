"""Every verb for every target, as a user types it, against AWS as a process: what is sent, what is
printed, what is left.
"""

import base64
import contextlib
import io
import json
import re
import shutil
import tarfile
import time

import botocore.session
import pytest
from botocore.serialize import create_serializer
from PIL import Image

from launch.cloud.prices import HOURS_A_MONTH, ML_GB_MONTH
from launch.estimate import START
from launch.targets.base import NAMES
from tests.conftest import make_pictures, wait_for
from tests.launch.conftest import BUCKET, REGION, Cloud
from tests.packages import make_contents, make_network
from trainer.common.errors import MISTAKE, OK
from trainer.results.package import build

READS = re.compile("Get|Head|List|Describe|Filter")
MORE = {"tuner": ["sweep=head"]}


def arguments(target: str) -> list[str]:
    return [f"target={target}", *MORE.get(target, [])]


def run_of(printed: str) -> str:
    found = re.search(r"launch logs (\S+)", printed)
    assert found, printed
    return found[1]


def as_sent(request: dict) -> dict:
    """A request in the form in which the record has it: by name, or flat where the protocol is a
    form.
    """
    if request["service"] != "ec2":
        return request["parameters"]
    model = botocore.session.get_session().get_service_model("ec2")
    parameters = request["parameters"] | {
        "UserData": base64.b64encode(request["parameters"]["UserData"].encode()).decode()
    }
    body = create_serializer("ec2").serialize_to_request(
        parameters, model.operation_model(request["operation"])
    )["body"]
    return {key: str(value) for key, value in body.items() if key not in ("Action", "Version")}


@pytest.mark.parametrize("target", NAMES)
def test_submit_sends_what_plan_shows_and_plan_changes_nothing(account, target):
    before = len(account.calls())
    code, printed = account.launch("plan", *arguments(target), "--json")
    assert code == OK, printed
    assert all(READS.match(call["operation"]) for call in account.calls()[before:])
    planned = json.loads(printed)
    assert planned["missing"] == []
    if planned["expected"]:  # to start is paid for, too
        assert planned["expected"]["seconds"] > START
    hour, hours = planned["cost"]["per_hour"], planned["cost"]["time_limit_hours"]
    assert hour > 0 and planned["cost"]["at_time_limit"] >= hour * hours - 0.01
    assert (
        "2026" in planned["cost"]["basis"]
        and REGION in planned["cost"]["basis"]
        and "estimate" in planned["cost"]["basis"]
    )
    before = len(account.calls())
    code, printed = account.launch("submit", *arguments(target))
    assert code == OK, printed
    sent = [
        call
        for call in account.calls()[before:]
        if not READS.match(call["operation"]) and call["service"] in ("sagemaker", "ec2")
    ]
    assert [(each["service"], each["operation"]) for each in planned["requests"]] == [
        (call["service"], call["operation"]) for call in sent
    ]
    assert [as_sent(each) for each in planned["requests"]] == [call["parameters"] for call in sent]
    assert "console" in printed and f"launch stop {planned['run']}" in printed

    code, printed = account.launch("submit", *arguments(target))
    assert code == OK and "nothing is sent" in printed


def test_status_lists_runs_and_what_costs_money(account):
    account.launch("submit", "target=ec2", "name=shown")
    account.launch("submit", "target=sagemaker_multi", "name=shown-too")
    code, printed = account.run("status")
    assert code == OK and "shown " in printed
    assert re.search(
        r"machine +i-\w+ +1 x g4dn.xlarge .*\$\d+\.\d+ so far, \$0.5420 an hour", printed
    )
    assert re.search(
        r"training +packhorse-shown-too-1 +4 x ml.m5.2xlarge .*\$1.8824 an hour", printed
    )
    told = json.loads(account.launch("status", "--json")[1])
    assert {"packhorse-shown-too-1"} <= {row["name"] for row in told["costs_now"]}
    assert {"shown", "shown-too"} <= {row["run"] for row in told["runs"]}


def leave_results(cloud: Cloud, prefix: str, package: bytes, top1: float) -> None:
    """What SageMaker leaves in the bucket after a training job."""
    s3 = cloud.client("s3")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {
            "result.json": json.dumps({"top1": top1}),
            "report.html": "<html>",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/model.tar.gz", Body=package)
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/output.tar.gz", Body=packed.getvalue())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("package")
    build(make_network(), make_contents(root / "pictures"), root / "model.tar.gz")
    return (root / "model.tar.gz").read_bytes()


def write_log(cloud: Cloud, stream: str, *lines: str) -> None:
    logs = cloud.client("logs")
    group = "/aws/sagemaker/TrainingJobs"
    with contextlib.suppress(logs.exceptions.ResourceAlreadyExistsException):
        logs.create_log_group(logGroupName=group)  # as SageMaker does for an account's first job
    logs.create_log_stream(logGroupName=group, logStreamName=stream)
    now = int(time.time() * 1000)
    logs.put_log_events(
        logGroupName=group,
        logStreamName=stream,
        logEvents=[
            {"timestamp": now + number, "message": line} for number, line in enumerate(lines)
        ],
    )


def test_a_training_job_is_followed_to_its_end_and_fetched(account, package, tmp_path):
    process = account.start(
        "submit", "target=sagemaker", "name=followed", "--wait", "--every", "0.1"
    )
    job = "packhorse-followed-1"
    assert wait_for(
        lambda: any(
            call["operation"] == "DescribeTrainingJob"
            and call["parameters"]["TrainingJobName"] == job
            for call in account.calls()
        ),
        60,
    )
    write_log(account, f"{job}/algo-1-1", "epoch 1", "epoch 2")
    write_log(account, f"{job}0/algo-1-1", "another job's")
    account.post(
        "/strict/end", job=job, status="Completed", hours=2, billed=3600, metrics={"test_top1": 0.8}
    )
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == OK, printed
    assert "epoch 1\nepoch 2\n" in printed and "another" not in printed and "is complete" in printed

    leave_results(account, f"runs/followed/output/{job}/output", package, 0.8)
    code, printed = account.launch("fetch", "followed", "--to", str(tmp_path / "here"))
    assert code == OK, printed
    assert (tmp_path / "here/report.html").read_text() == "<html>" and (
        tmp_path / "here/model.tar.gz"
    ).read_bytes() == package
    before = len(account.calls())
    assert account.launch("fetch", "followed", "--to", str(tmp_path / "here"))[0] == OK
    assert "GetObject model.tar.gz" not in [
        f"{call['operation']} {call['parameters'].get('Key', '')[-12:]}"
        for call in account.calls()[before:]
    ]
    leave_results(account, f"runs/followed/output/{job}/output", package[:-1000], 0.8)
    assert account.launch("fetch", "followed", "--to", str(tmp_path / "there"))[0] != OK

    code, printed = account.launch("cost", "followed", "--json")
    [cost] = json.loads(printed)
    hour = 0.7364 + 50 * ML_GB_MONTH / HOURS_A_MONTH
    assert (
        cost["dollars"] == pytest.approx(hour)
        and cost["accuracy"] == 0.8
        and cost["per_point"] == pytest.approx(hour / 80)
    )
    code, printed = account.launch("submit", "target=sagemaker", "name=followed")
    assert code == OK and "is complete" in printed and "nothing is sent" in printed
    code, printed = account.launch("submit", "target=sagemaker", "name=followed", "train.epochs=3")
    assert code == MISTAKE and "train.epochs: None then, 3 now" in printed
    code, printed = account.launch("submit", "target=ec2", "name=followed")
    assert code == MISTAKE and "another name" in printed


def test_a_job_that_is_stopped_goes_on_as_the_next_attempt(account):
    account.launch("submit", "target=sagemaker", "name=stopped")
    code, printed = account.launch("stop", "stopped")
    assert code == OK and "asked SageMaker to stop packhorse-stopped-1" in printed
    code, printed = account.launch("stop", "stopped")
    assert code == OK and "stopping already" in printed
    code, printed = account.launch("submit", "target=sagemaker", "name=stopped")
    assert code == OK and "attempt 2" in printed
    jobs = [
        call["parameters"]
        for call in account.calls()
        if call["operation"] == "CreateTrainingJob"
        and "stopped" in call["parameters"]["TrainingJobName"]
    ]
    assert [job["TrainingJobName"] for job in jobs] == [
        "packhorse-stopped-1",
        "packhorse-stopped-2",
    ]
    assert jobs[0]["CheckpointConfig"] == jobs[1]["CheckpointConfig"]


def instance_of(cloud: Cloud, run: str) -> list[dict]:
    filters = [{"Name": "tag:run", "Values": [run]}]
    return [
        each
        for group in cloud.client("ec2").describe_instances(Filters=filters)["Reservations"]
        for each in group["Instances"]
    ]


def test_a_reclaimed_spot_machine_is_asked_for_again(account):
    """Its first attempt loses its machine, AWS has no other at first, and the second attempt comes
    to the end.
    """
    process = account.start(
        "submit", "target=ec2", "target.spot=true", "name=spot", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: instance_of(account, "spot"))
    s3 = account.client("s3")
    s3.put_object(Bucket=BUCKET, Key="runs/spot/log.txt", Body=b"first\nsecond\nhalf a li")
    [first] = instance_of(account, "spot")
    account.post(
        "/strict/refuse",
        operation="RunInstances",
        code="InsufficientInstanceCapacity",
        message="There is no Spot capacity",
    )
    account.post(
        "/strict/end_instance", instance=first["InstanceId"], code="Server.SpotInstanceTermination"
    )
    assert wait_for(lambda: len(instance_of(account, "spot")) == 2)
    s3.put_object(
        Bucket=BUCKET, Key="runs/spot/log.txt", Body=b"first\nsecond\nhalf a line\nlast\n"
    )
    s3.put_object(
        Bucket=BUCKET, Key="runs/spot/output/result.json", Body=json.dumps({"top1": 0.9}).encode()
    )
    s3.put_object(
        Bucket=BUCKET,
        Key="runs/spot/attempts/2.json",
        Body=b'{"attempt": 2, "code": 0, "reason": "done"}',
    )
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == OK, printed
    assert (
        "asking for another" in printed
        and "no Spot capacity" in printed
        and printed.rstrip().endswith("is complete (done, exit code 0)")
    )
    assert "half a line\nlast\n" in printed
    tokens = {each["ClientToken"] for each in instance_of(account, "spot")}
    assert len(tokens) == 2
    code, printed = account.launch("cost", "spot", "--json")
    assert (
        code == OK
        and json.loads(printed)[0]["attempts"] == 2
        and json.loads(printed)[0]["accuracy"] == 0.9
    )


def test_a_machine_is_asked_to_stop_or_terminated(account):
    account.launch("submit", "target=ec2", "name=halt")
    code, printed = account.launch("stop", "halt")
    assert code == OK and account.client("s3").head_object(
        Bucket=BUCKET, Key="runs/halt/attempts/1.stop"
    )
    code, printed = account.launch("stop", "halt", "--now")
    assert code == OK and instance_of(account, "halt")[0]["State"]["Name"] == "terminated"
    code, printed = account.launch("logs", "halt")
    assert code == OK and "attempt 1 at halt is stopped" in printed


def uploaded(cloud: Cloud, prefix: str = "data/") -> dict[str, str]:
    """ETags by key."""
    found = cloud.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {item["Key"]: item["ETag"] for item in found}


def prefix_of(cloud: Cloud, job: str) -> str:
    """Where the pictures of a training job lie in the bucket."""
    sent = cloud.client("sagemaker").describe_training_job(TrainingJobName=job)
    uri = sent["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    return uri.removeprefix(f"s3://{BUCKET}/")


def test_pictures_lie_under_their_content_and_none_are_ever_removed(account, tmp_path):
    pictures = make_pictures(tmp_path / "dogs", {"train": 3, "valid": 1})
    (pictures / "train/.hidden").write_bytes(b"x")
    (pictures / "large.bin").write_bytes(bytes(9 * 2**20))
    command = [
        "submit",
        "target=sagemaker",
        "data=folder",
        "--data",
        str(pictures),
        "data.workers=0",
    ]
    planned = json.loads(account.launch("plan", *command[1:], "name=first", "--json")[1])
    code, printed = account.launch(*command, "name=first")
    assert code == OK and "13 of 13 files to upload" in printed
    first = prefix_of(account, "packhorse-first-1")
    assert (
        first.startswith("data/dogs-")
        and planned["uploads"]["data"] == f"s3://{BUCKET}/{first.rstrip('/')}"
    )
    visible = {path.relative_to(pictures).as_posix() for path in pictures.rglob("[!.]*.*")}
    assert {key.removeprefix(first) for key in uploaded(account, first)} == visible
    before = uploaded(account, first)

    # The copy of a colleague shares them; an upload that was cut short is completed; another name
    # lies beside it.
    shutil.copytree(pictures, tmp_path / "colleague/dogs")
    account.client("s3").delete_object(Bucket=BUCKET, Key=f"{first}large.bin")
    code, printed = account.launch(*command[:4], str(tmp_path / "colleague/dogs"), "name=second")
    assert (
        code == OK
        and "1 of 13 files to upload" in printed
        and prefix_of(account, "packhorse-second-1") == first
    )

    # A picture less and another one changed: the running job's pictures stay as they are.
    (pictures / "train/circle/000.png").unlink()
    shutil.copy(pictures / "train/circle/002.png", pictures / "train/circle/001.png")
    code, printed = account.launch(*command, "name=third")
    assert code == OK and "12 of 12 files to upload" in printed
    assert (
        prefix_of(account, "packhorse-third-1") not in ("", first)
        and uploaded(account, first) == before
    )
    code, printed = account.launch(*command, "name=first")
    assert code == MISTAKE and "give the same again, or another name" in printed, (
        "the run began with other pictures"
    )


def test_a_folder_of_weights_is_uploaded_beside_the_pictures(account, tmp_path):
    pictures = make_pictures(tmp_path / "dogs", {"train": 2, "valid": 1})
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/resnet18.pth").write_bytes(b"weights")
    command = (
        "submit", "target=sagemaker", "data=folder", "--data", str(pictures),
        f"model.weights_dir={tmp_path}/closed", "name=weights",
    )  # fmt: skip
    code, printed = account.launch(*command)
    assert code == OK and "closed: 1 of 1 files to upload" in printed, printed
    sent = account.client("sagemaker").describe_training_job(TrainingJobName="packhorse-weights-1")
    channels = {
        each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"]
        for each in sent["InputDataConfig"]
    }
    assert channels.keys() == {"training", "weights"}
    prefix = channels["weights"].removeprefix(f"s3://{BUCKET}/")
    assert uploaded(account, prefix).keys() == {f"{prefix}resnet18.pth"}
    assert "model.weights_dir" not in sent["HyperParameters"]


def test_two_folders_of_one_name_never_share_a_prefix(account, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        make_pictures(tmp_path / name / "images", {"train": 2, "valid": 1})
        Image.new("RGB", (32, 32), colour).save(tmp_path / name / "images/train/circle/only.png")
    for name in ("a", "b"):
        code, printed = account.launch(
            "submit",
            "target=sagemaker",
            "data=folder",
            "--data",
            str(tmp_path / name / "images"),
            f"name={name}-images",
        )
        assert code == OK, printed
    a, b = (prefix_of(account, f"packhorse-{name}-images-1") for name in ("a", "b"))
    assert a != b and a.startswith("data/images-") and b.startswith("data/images-")
    for name, prefix in (("a", a), ("b", b)):
        files = {
            path.relative_to(tmp_path / name / "images").as_posix()
            for path in (tmp_path / name).rglob("*.png")
        }
        assert {key.removeprefix(prefix) for key in uploaded(account, prefix)} == files
    # Without a name the run is another one too.
    runs = [
        json.loads(
            account.launch(
                "plan", "data=folder", "--data", str(tmp_path / name / "images"), "--json"
            )[1]
        )["run"]
        for name in ("a", "b")
    ]
    assert runs[0] != runs[1]

    code, printed = account.launch(
        "plan", "target=sagemaker", "data=folder", "data.root=/elsewhere/images", "--json"
    )
    [missing] = json.loads(printed)["missing"]
    assert "data/images/ is empty" in missing and all(
        prefix.split("/")[1] in missing for prefix in (a, b)
    )
    assert (
        account.launch("submit", "target=sagemaker", "data=folder", "data.root=/elsewhere/images")[
            0
        ]
        == MISTAKE
    )
    code, printed = account.launch(
        "submit", "target=sagemaker", "data=folder", f"data.root={b.split('/')[1]}", "name=b-again"
    )
    assert code == OK and prefix_of(account, "packhorse-b-again-1") == b, (
        "pictures that are there, without the folder"
    )


@pytest.mark.parametrize(
    ("fault", "said"), [("gone", "there is no such folder"), ("empty", "it holds no files")]
)
def test_a_folder_without_pictures_is_refused_before_anything_is_sent(
    account, tmp_path, fault, said
):
    if fault == "empty":
        (tmp_path / "dogs").mkdir()
    for verb in ("plan", "submit"):
        code, printed = account.launch(
            verb, "target=sagemaker", "data=folder", "--data", str(tmp_path / "dogs")
        )
        assert code == MISTAKE and said in printed and "Traceback" not in printed


def test_a_tuning_job_is_watched_and_its_best_trial_fetched(account):
    code, printed = account.launch("submit", "target=tuner", "sweep=head", "name=tuned")
    assert code == OK, printed
    [tuning] = [
        call["parameters"]["HyperParameterTuningJobName"]
        for call in account.calls()
        if "tuned" in str(call["parameters"]) and "Tuning" in call["operation"]
    ][:1]
    write_log(account, f"{tuning}-001-0123abcd/algo-1-1", "a trial's line")
    code, printed = account.launch("logs", "tuned")
    assert code == OK and "001-0123abcd/algo-1-1: a trial's line" in printed
    code, printed = account.launch("fetch", "tuned")
    assert code == MISTAKE and "no trial has ended" in printed
    code, printed = account.launch("stop", "tuned")
    assert code == OK and account.launch("status", "--json")[0] == OK


def test_a_stopped_notebook_is_started_again(account):
    account.launch("submit", "target=notebook")
    assert account.launch("stop", "notebook")[0] == OK
    before = len(account.calls())
    code, printed = account.launch("submit", "target=notebook")
    assert code == OK, printed
    assert "StartNotebookInstance" in [call["operation"] for call in account.calls()[before:]]


def test_a_notebook_that_sagemaker_stops_already_is_stopped(account):
    """Its description may be late: the second Stop is refused, and is done all the same."""
    account.launch("submit", "target=notebook")
    name = "packhorse-notebook-1"
    refusal = f"Status (Stopping) not in ([InService]). Unable to transition {name}"
    account.post(
        "/strict/refuse", operation="StopNotebookInstance", code="ValidationException",
        message=refusal,
    )  # fmt: skip
    code, printed = account.launch("stop", "notebook")
    assert code == OK and "has ended meanwhile, or is about to" in printed, printed
    # One that starts can't be stopped, and is not said to be.
    account.post("/strict/starting", notebook=name, answers=1)
    code, printed = account.launch("stop", "notebook")
    assert code == MISTAKE and "Status (Pending)" in printed and "in some minutes" in printed
    account.client("sagemaker").list_notebook_instances()  # it has started
    account.client("sagemaker").list_notebook_instances()
    account.post(
        "/strict/refuse", operation="StopNotebookInstance", code="ValidationException",
        message=refusal,
    )  # fmt: skip
    code, printed = account.launch("delete", "notebook", "--yes", "--every", "0.05")
    assert code == OK and f"{name} is deleted" in printed, printed
    assert account.launch("submit", "target=notebook")[0] == OK


def test_a_job_that_ends_before_it_is_stopped_has_ended(account):
    assert account.launch("submit", "target=sagemaker", "name=race")[0] == OK
    account.post(
        "/strict/refuse", operation="StopTrainingJob", code="ValidationException",
        message="The request was rejected because the training job is in status Completed.",
    )  # fmt: skip
    code, printed = account.launch("stop", "race")
    assert code == OK and "packhorse-race-1 has ended meanwhile" in printed, printed


def test_the_notebook_becomes_what_is_asked_for_is_opened_and_deleted(cloud):
    cloud.launch("up", "--yes", "--every", "0.05")
    submit = ("submit", "target=notebook", "target.disk_gb=30", "target.idle_minutes=30")
    assert cloud.launch(*submit[:2])[0] == OK
    code, printed = cloud.launch(*submit)
    assert code == MISTAKE and "VolumeSizeInGB 20, now 30" in printed and "stop it first" in printed
    assert cloud.launch("stop", "notebook")[0] == OK
    for _ in range(2):  # the second time it runs as it is asked for
        code, printed = cloud.launch(*submit)
        assert code == OK, printed
    sagemaker, name = cloud.client("sagemaker"), "packhorse-notebook-1"
    made = sagemaker.describe_notebook_instance(NotebookInstanceName=name)
    assert made["VolumeSizeInGB"] == 30 and made["NotebookInstanceStatus"] == "InService"
    scripts = sagemaker.describe_notebook_instance_lifecycle_config(
        NotebookInstanceLifecycleConfigName=name
    )
    assert "idle_minutes=30\n" in base64.b64decode(scripts["OnStart"][0]["Content"]).decode()
    code, printed = cloud.launch("connect", "notebook")
    assert code == OK and printed.startswith(f"https://{name}.notebook.us-east-1")
    code, printed = cloud.launch("delete", "notebook")
    assert code == MISTAKE and "with its disk" in printed and "--yes" in printed
    code, printed = cloud.launch("delete", "notebook", "--yes", "--every", "0.05")
    assert code == OK and sagemaker.list_notebook_instances()["NotebookInstances"] == []
    code, printed = cloud.launch("submit", "target=notebook")
    assert code == OK and "attempt 2" in printed, "it is gone, and not too young to be seen"


def test_a_box_is_a_machine_with_a_shell_a_limit_and_a_price(account):
    code, printed = account.launch("plan", "target=box", "target.hours=2", "name=shell")
    assert code == OK and "at most 2 h" in printed and "$1.08 at the time limit" in printed
    code, printed = account.launch("submit", "target=box", "target.hours=2", "name=shell")
    assert code == OK and "launch fetch" not in printed, printed
    [machine] = instance_of(account, "shell")
    sent = next(
        call["parameters"]
        for call in reversed(account.calls())
        if call["operation"] == "RunInstances"
    )
    script = base64.b64decode(sent["UserData"]).decode()
    assert "limit=7200\n" in script and "shutdown -h" in script and "trainer" not in script
    code, printed = account.launch("connect", "shell", "--show")
    shell = f"aws ssm start-session --target {machine['InstanceId']} --region {REGION}\n"
    assert code == OK and printed == shell
    code, printed = account.launch("stop", "shell")
    assert code == OK and instance_of(account, "shell")[0]["State"]["Name"] == "terminated"
    code, printed = account.launch("connect", "shell")
    assert code == MISTAKE and "start it first" in printed
    code, printed = account.launch("delete", "shell", "--yes")
    assert code == MISTAKE and "it costs nothing once it has ended" in printed


def test_down_leaves_nothing(cloud, tmp_path):
    """After a submit of every target. What is stopped at AWS keeps its record for a while: an
    instance is listed as terminated.
    """
    for arguments_ in (
        ["up", "--yes", "--every", "0.05"],
        *(["submit", *arguments(target)] for target in NAMES),
    ):
        code, printed = cloud.launch(*arguments_)
        assert code == OK, printed
    cloud.client("s3").put_object(Bucket=BUCKET, Key="runs/x/log.txt", Body=b"1")
    cloud.client("s3").put_object(Bucket=BUCKET, Key="runs/x/log.txt", Body=b"2")
    code, printed = cloud.launch("down")
    assert code == MISTAKE and "--yes" in printed, "nobody there to ask"
    code, printed = cloud.launch("down", "--yes", "--every", "0.05")
    assert code == OK, printed
    tagged = cloud.client("resourcegroupstaggingapi").get_resources(
        TagFilters=[{"Key": "project", "Values": ["packhorse"]}]
    )["ResourceTagMappingList"]
    terminated = [
        each["InstanceId"]
        for group in cloud.client("ec2").describe_instances()["Reservations"]
        for each in group["Instances"]
    ]
    assert [
        each["ResourceARN"]
        for each in tagged
        if each["ResourceARN"].split("/")[-1] not in terminated
    ] == []
    assert all(
        each["State"]["Name"] == "terminated"
        for group in cloud.client("ec2").describe_instances()["Reservations"]
        for each in group["Instances"]
    )
    sagemaker, iam = cloud.client("sagemaker"), cloud.client("iam")
    assert (
        sagemaker.list_training_jobs()["TrainingJobSummaries"] == []
        and sagemaker.list_notebook_instances()["NotebookInstances"] == []
    )
    assert sagemaker.list_hyper_parameter_tuning_jobs()["HyperParameterTuningJobSummaries"] == []
    assert (
        iam.list_roles()["Roles"] == []
        and iam.list_policies(Scope="Local")["Policies"] == []
        and iam.list_instance_profiles()["InstanceProfiles"] == []
    )
    assert (
        cloud.client("s3").list_buckets()["Buckets"] == []
        and cloud.client("logs").describe_log_groups()["logGroups"] == []
    )
    assert cloud.client("cloudformation").describe_stacks()["Stacks"] == []
    assert cloud.launch("down", "--yes", "--every", "0.05")[0] == OK, (
        "a second one finds nothing to do"
    )


def test_up_twice_changes_nothing_and_asks_before_it_does(account, cloud):
    code, printed = account.launch("up")
    assert code == OK and "nothing to change" in printed
    code, printed = cloud.launch("up")
    assert code == MISTAKE and "AWS::IAM::Role" in printed and "--yes" in printed
    assert cloud.client("iam").list_roles()["Roles"] == []
    code, printed = cloud.launch("up", "Nonsense=1", "--yes")
    assert code == MISTAKE and "Nonsense" in printed and "InstanceTypes" in printed


def test_without_a_foundation_submit_says_what_to_do(cloud):
    code, printed = cloud.launch("submit", "target=sagemaker")
    assert code == MISTAKE and "python -m launch up" in printed
    assert all(READS.match(call["operation"]) for call in cloud.calls())
    code, printed = cloud.launch("status")
    assert code == MISTAKE and "python -m launch up" in printed
