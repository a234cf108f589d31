"""What costs money when AWS is late, ends a machine for a reason of its own, or a machine doesn't
end by itself.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import submission
from launch.cloud.prices import Price
from launch.cloud.session import Aws
from launch.targets import attempt as notes
from launch.targets.spec import choose
from tests.conftest import make_pictures, wait_for
from tests.launch.conftest import BUCKET, CREDENTIALS, REGION, Cloud
from tests.launch.test_kills import KILLED
from trainer.common.errors import FAULT, MISTAKE, OK, RESUME, UserError


@pytest.fixture
def account(account: Cloud) -> Iterator[Cloud]:
    """An account with the foundation, which the tests share: each has its own runs."""
    yield account
    account.post("/strict/late", answers=0)
    account.post("/strict/sold_out", what="")


def machines(cloud: Cloud, run: str) -> list[dict]:
    """The run's instances, in the order of their attempts."""
    filters = [{"Name": "tag:run", "Values": [run]}]
    groups = cloud.client("ec2").describe_instances(Filters=filters)["Reservations"]
    found = [each for group in groups for each in group["Instances"]]
    return sorted(
        found,
        key=lambda each: next(tag["Value"] for tag in each["Tags"] if tag["Key"] == "attempt"),
    )


def reclaim(cloud: Cloud, run: str, number: int) -> None:
    """Takes the machine of an attempt back, once it is there."""
    assert wait_for(lambda: len(machines(cloud, run)) == number, 120)
    end(cloud, run, "Server.SpotInstanceTermination")


def end(cloud: Cloud, run: str, code: str, **more: float) -> None:
    cloud.post(
        "/strict/end_instance", instance=machines(cloud, run)[-1]["InstanceId"], code=code, **more
    )


def put(cloud: Cloud, key: str, content: object) -> None:
    cloud.client("s3").put_object(Bucket=BUCKET, Key=key, Body=json.dumps(content).encode())


def sent(cloud: Cloud, operation: str, run: str) -> list[dict]:
    calls = [call for call in cloud.calls() if call["operation"] == operation]
    return [call["parameters"] for call in calls if run in json.dumps(call["parameters"])]


def script(cloud: Cloud, instance: dict) -> str:
    found = cloud.client("ec2").describe_instance_attribute(
        InstanceId=instance["InstanceId"], Attribute="userData"
    )
    return base64.b64decode(found["UserData"]["Value"]).decode()


# --- AWS is eventually consistent ---


def test_a_machine_that_is_not_listed_yet_runs(account):
    account.post("/strict/late", answers=1000)
    assert account.launch("submit", "target=ec2", "name=unseen")[0] == OK
    code, printed = account.launch("submit", "target=ec2", "name=unseen")
    assert code == OK and "is running" in printed and "nothing is sent" in printed
    code, printed = account.launch("status")
    assert code == OK and re.search("unseen .* running", printed)
    assert len(machines(account, "unseen")) == 1
    for options in ([], ["--now"]):
        code, printed = account.launch("stop", "unseen", *options)
        assert code == OK and "asked" in printed, printed
    assert account.client("s3").head_object(Bucket=BUCKET, Key="runs/unseen/attempts/1.stop")


def test_a_wait_for_a_machine_that_is_not_listed_yet_rents_no_other(account):
    account.post("/strict/late", answers=3)
    process = account.start(
        "submit", "target=ec2", "target.spot=true", "name=patient", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: len(machines(account, "patient")) == 1, 120)
    looked = len(sent(account, "DescribeInstances", "i-"))
    assert wait_for(lambda: len(sent(account, "DescribeInstances", "i-")) > looked + 5, 120)
    put(account, "runs/patient/attempts/1.json", {"attempt": 1, "code": 0, "reason": "done"})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK, printed
    assert len(machines(account, "patient")) == 1


@pytest.mark.parametrize(
    ("target", "operation"),
    [
        ("sagemaker", "CreateTrainingJob"),
        ("tuner", "CreateHyperParameterTuningJob"),
        ("notebook", "CreateNotebookInstance"),
    ],
)
def test_a_job_that_is_not_listed_yet_runs(account, target, operation):
    account.post("/strict/late", answers=1000)
    arguments = [
        f"target={target}",
        *(["sweep=head"] if target == "tuner" else []),
        f"name=unseen-{target}",
    ]
    code, printed = account.launch("submit", *arguments)
    assert code == OK, printed
    code, printed = account.launch("submit", *arguments)
    assert code == OK, printed
    assert "is running" in printed and "nothing is sent" in printed
    run = "notebook" if target == "notebook" else f"unseen-{target}"
    assert len(sent(account, operation, run)) == 1
    for verb in ("status", "logs", "cost"):
        code, printed = account.launch(verb, *([] if verb == "status" else [run]))
        assert code == OK, printed


def test_what_may_be_on_its_way_is_not_sent_otherwise(account):
    """Killed after AWS has carried it out, and started again for another machine."""
    command = ["submit", "target=ec2", "name=halfway"]
    before = len(account.calls())
    assert account.launch(*command[:-1], "name=probe")[0] == OK
    number = 1 + [call["operation"] for call in account.calls()[before:]].index("RunInstances")
    account.post("/strict/late", answers=5)
    account.post("/strict/kill", call=number, when="after")
    assert account.launch(*command)[0] == KILLED
    code, printed = account.launch(*command, "target.instance_type=g5.xlarge")
    assert code == OK, printed
    [machine] = machines(account, "halfway")
    assert machine["InstanceType"] == "g4dn.xlarge" and "sending it as recorded" in printed


def test_what_aws_has_refused_may_be_sent_otherwise(account):
    account.post(
        "/strict/refuse",
        operation="RunInstances",
        code="VcpuLimitExceeded",
        message="You have requested more vCPU capacity",
    )
    code, printed = account.launch("submit", "target=ec2", "name=refused")
    assert code == MISTAKE and "quota" in printed
    code, printed = account.launch(
        "submit", "target=ec2", "name=refused", "target.instance_type=g5.xlarge"
    )
    assert code == OK, printed
    assert [each["InstanceType"] for each in machines(account, "refused")] == ["g5.xlarge"]


# --- the network, and AWS on a bad day ---


def test_a_wait_lives_through_whatever_ends_by_itself(account):
    """It is said once, with what runs on, and that it is over."""
    process = account.start(
        "submit", "target=ec2", "target.spot=true", "name=outage", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: len(machines(account, "outage")) == 1, 120)
    looked = len(sent(account, "DescribeInstances", "i-"))
    assert wait_for(lambda: len(sent(account, "DescribeInstances", "i-")) > looked + 1, 120)
    for how, answers in (("html", 3), ("expire", 3)):
        account.post("/strict/rude", how=how, answers=answers)
    assert wait_for(lambda: account.post("/strict/left") == {"rude": 0}, 120)
    reclaim(account, "outage", 1)
    account.post("/strict/rude", how="expire", answers=2)
    assert wait_for(lambda: len(machines(account, "outage")) == 2, 120)
    put(account, "runs/outage/attempts/2.json", {"attempt": 2, "code": 0, "reason": "done"})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK and "Traceback" not in printed, printed
    [machine] = [each for each in machines(account, "outage") if each["State"]["Code"] != 48]
    assert "outage keeps running without us on i-" in printed and "for 8 h at most" in printed
    assert 1 <= printed.count("AWS answers again") <= 4 and machine["InstanceId"] in printed


@pytest.mark.parametrize(
    "how",
    [
        "html",
        "expire",
        "deny",
        # boto's own tries, with their pauses
        *(pytest.param(how, marks=pytest.mark.long) for how in ("drop", "throttle", "fault")),
    ],
)
def test_a_verb_that_does_not_wait_says_one_line(account, how):
    account.post("/strict/rude", how=how, answers=40)
    code, printed = account.launch("logs", "nothing")
    account.post("/strict/calm")
    assert code == MISTAKE and "Traceback" not in printed and "error: " in printed, printed


def test_status_shows_what_it_may_know(account):
    """A listing that is denied, and a machine of which AWS doesn't tell, hide no other row."""
    assert account.launch("submit", "target=sagemaker", "name=seen")[0] == OK
    assert account.launch("submit", "target=ec2", "name=unseen-too")[0] == OK
    for operation in ("ListEndpoints", "ListNotebookInstances"):
        account.post("/strict/rude", how="deny", answers=1, operation=operation)
    for operation in ("Search", "DescribeTrainingJob"):
        account.post("/strict/rude", how="deny", answers=9, operation=operation)
    code, printed = account.launch("status")
    account.post("/strict/calm")
    assert code == OK and re.search("unseen-too .* running", printed), printed
    assert re.search(r"seen +sagemaker +attempt 1 +not known .*AccessDenied", printed), printed
    assert "machine " in printed and "not known: sagemaker:ListEndpoints: AccessDenied" in printed


def test_a_role_that_was_just_made_is_waited_for(account, monkeypatch):
    monkeypatch.setattr(submission, "IAM_PAUSE", 0.01)
    for target in ("ec2", "sagemaker"):
        account.post("/strict/slow_iam", calls=3)
        code, printed = account.launch("submit", f"target={target}", f"name=young-{target}")
        assert code == OK and printed.count("a new role takes a moment") == 1, printed


def test_the_first_machine_is_waited_for_or_a_line_says_where_there_are_some(account):
    account.post("/strict/sold_out", what="g4dn.xlarge .* spot")
    words = ["submit", "target=ec2", "target.spot=true", "name=first"]
    code, printed = account.launch(*words)
    assert code == MISTAKE and "InsufficientInstanceCapacity" in printed, printed
    assert "g4dn.xlarge is offered in us-east-1a" in printed and "use1-az2 9/10" in printed
    assert "on demand (target.spot=false) it is $0.542 an hour" in printed and "--wait" in printed
    process = account.start(*words, "--wait", "--every", "0.02")
    asked = len(sent(account, "RunInstances", "first"))
    assert wait_for(lambda: len(sent(account, "RunInstances", "first")) > asked + 8, 120)
    account.post("/strict/sold_out", what="")
    assert wait_for(lambda: len(machines(account, "first")) == 1, 120)
    put(account, "runs/first/attempts/1.json", {"attempt": 1, "code": 0, "reason": "done"})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK and "trying again in" in printed, printed


# --- a retry knows what the first try knew ---


def test_the_next_machine_gets_what_the_first_one_got(account, tmp_path):
    """Also when the folder of pictures is gone by then, and AWS has a newer image."""
    pictures = make_pictures(tmp_path / "dogs", {"train": 2, "valid": 1})
    settings = [
        "data=folder",
        "data.workers=0",
        "train.epochs=3",
        "target.spot=true",
        "target.hours=5",
        "target.disk_gb=120",
    ]
    process = account.start(
        "submit",
        "target=ec2",
        "name=kept",
        *settings,
        "--data",
        str(pictures),
        "--wait",
        "--every",
        "0.1",
    )
    assert wait_for(lambda: len(machines(account, "kept")) == 1, 120)
    shutil.rmtree(pictures)
    reclaim(account, "kept", 1)
    assert wait_for(lambda: len(machines(account, "kept")) == 2, 120)
    put(account, "runs/kept/attempts/2.json", {"attempt": 2, "code": 0, "reason": "done"})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK, printed
    first, second = machines(account, "kept")
    assert script(account, second) == script(account, first).replace("attempt=1\n", "attempt=2\n")
    assert first["ImageId"] == second["ImageId"] and second["InstanceLifecycle"] == "spot"


def test_a_run_goes_on_by_its_name_alone(account, tmp_path):
    """Also when its folders are gone, and with a higher ceiling."""
    pictures = make_pictures(tmp_path / "dogs", {"train": 2, "valid": 1})
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/resnet18.pth").write_bytes(b"weights")
    code, printed = account.launch(
        "submit", "target=ec2", "target.disk_gb=120", "name=by-name", "data=folder",
        "data.workers=0", f"model.weights_dir={tmp_path}/weights", "--data", str(pictures),
    )  # fmt: skip
    assert code == OK, printed
    put(account, "runs/by-name/attempts/1.json", {"attempt": 1, "code": 75, "reason": "SIGTERM"})
    shutil.rmtree(tmp_path / "dogs")
    shutil.rmtree(tmp_path / "weights")
    code, printed = account.launch("submit", "by-name", "target.disk_gb=200")
    assert code == MISTAKE and "target.disk_gb=200: by-name continues as it was" in printed, printed
    code, printed = account.launch("submit", "by-name", "target.max_dollars=9")
    assert code == OK, printed
    first, second = (script(account, each).splitlines() for each in machines(account, "by-name"))
    differ = [line for line in second if line not in first]
    assert differ == ["attempt=2"] or (differ[0] == "attempt=2" and "limit=" in differ[1]), differ
    key = "runs/by-name/attempts/2.request.json"
    noted = json.loads(account.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read())
    assert noted["ceiling"] == 9 and noted["words"]["target"]["disk_gb"] == 120


def test_an_image_that_is_withdrawn_between_plan_and_submit_is_named(account):
    own = account.client("ec2").register_image(Name="own", RootDeviceName="/dev/sda1")["ImageId"]
    words = ["target=ec2", "name=withdrawn"]
    code, printed = account.launch("plan", *words, f"target.image={own}")
    assert code == OK, printed
    code, message = "InvalidAMIID.NotFound", f"The image id '[{own}]' does not exist"
    account.post("/strict/refuse", operation="RunInstances", code=code, message=message)
    result, printed = account.launch("submit", *words, f"target.image={own}")
    assert result == MISTAKE and code in printed, printed
    assert "correct target.image, or leave it out" in printed
    assert len(sent(account, "RunInstances", own)) == 1, "no other zone has it"
    assert account.launch("submit", *words)[0] == OK
    [machine] = machines(account, "withdrawn")
    assert machine["ImageId"] != own


@pytest.mark.parametrize("code", ["InvalidAMIID.NotFound", "InvalidAMIID.Unavailable"])
def test_an_image_that_is_withdrawn_before_a_replacement_ends_the_wait_and_not_the_run(
    account, code
):
    run = f"image-{code.rpartition('.')[2].lower()}"
    words = ["submit", "target=ec2", "target.spot=true", f"name={run}"]
    process = account.start(*words, "--wait", "--every", "0.1")
    assert wait_for(lambda: len(machines(account, run)) == 1, 120)
    account.post("/strict/refuse", operation="RunInstances", code=code, message="The image id")
    reclaim(account, run, 1)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == MISTAKE and code in printed, printed
    assert "submit is given all its settings again" in printed and "Traceback" not in printed
    code, printed = account.launch(*words)
    assert code == OK and "sent attempt 2" in printed, printed
    assert [each["State"]["Name"] for each in machines(account, run)] == ["terminated", "running"]


# --- the reason of an end ---


@pytest.mark.parametrize(
    ("reason", "code", "phase"),
    [
        ("Client.UserInitiatedShutdown", RESUME, "stopped"),
        ("Client.InstanceInitiatedShutdown", FAULT, "failed"),
        ("Server.InternalError", FAULT, "failed"),
    ],
)
def test_a_machine_that_was_not_reclaimed_is_not_replaced(account, reason, code, phase):
    run = f"ended-{reason.split('.')[1].lower()}"
    process = account.start(
        "submit", "target=ec2", "target.spot=true", f"name={run}", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: len(machines(account, run)) == 1, 120)
    end(account, run, reason)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code and f"attempt 1 at {run} is {phase}" in printed, printed
    assert len(machines(account, run)) == 1


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("Client.VolumeLimitExceeded", "the account's quota of disks is full"),
        ("Client.InternalError", "mostly the key of its disk"),
        ("Client.InvalidKMSKey.InvalidState", "mostly the key of its disk"),
        ("Client.InvalidSnapshot.NotFound", "its owner has deleted it"),
    ],
)
def test_a_machine_that_ends_at_once_says_what_to_do(account, reason, remedy):
    run = f"at-once-{reason.split('.')[1].lower()}"
    assert account.launch("submit", "target=ec2", f"name={run}")[0] == OK
    end(account, run, reason)
    code, printed = account.launch("logs", run)
    [line] = [line for line in printed.splitlines() if line.startswith(f"attempt 1 at {run}")]
    assert code == OK and "is failed" in line and remedy in line, printed
    assert "$0.00" in account.launch("cost", run)[1]


def test_a_job_that_sagemaker_has_no_machine_for_is_asked_for_again(account):
    process = account.start(
        "submit", "target=sagemaker", "name=crowded", "--wait", "--every", "0.05"
    )
    assert wait_for(lambda: sent(account, "DescribeTrainingJob", "packhorse-crowded-1"), 120)
    why = "CapacityError: Unable to provision requested ML compute capacity."
    account.post("/strict/end", job="packhorse-crowded-1", status="Failed", why=why)
    assert wait_for(lambda: sent(account, "CreateTrainingJob", "packhorse-crowded-2"), 120)
    assert wait_for(lambda: sent(account, "DescribeTrainingJob", "packhorse-crowded-2"), 120)
    account.post("/strict/end", job="packhorse-crowded-2", status="Completed")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK and "attempt 1 found no machine free" in printed, printed


def test_a_job_that_a_limit_has_stopped_says_which(account):
    assert account.launch("submit", "target=sagemaker", "target.spot=true", "name=waited")[0] == OK
    why = "MaxWaitTimeExceeded"
    account.post("/strict/end", job="packhorse-waited-1", status="Stopped", why=why)
    code, printed = account.launch("logs", "waited")
    assert code == OK and "is stopped (MaxWaitTimeExceeded: target.wait_hours is over" in printed


def test_what_a_job_logs_last_is_shown_though_it_comes_late(account):
    assert account.launch("submit", "target=sagemaker", "name=tardy")[0] == OK
    process = account.start("logs", "tardy", "--follow", "--every", "0.1")
    assert wait_for(lambda: sent(account, "FilterLogEvents", "tardy"), 120)
    job = {"job": "packhorse-tardy-1", "status": "Completed"}
    account.post("/strict/end", **job, log="the last line")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == OK and printed.count("the last line") == 1, printed
    assert account.launch("logs", "tardy")[1].count("the last line") == 1


@pytest.mark.parametrize(
    ("told", "reason", "phase"),
    [
        ({"code": 75, "reason": "spot notice"}, "Client.InstanceInitiatedShutdown", "reclaimed"),
        ({"code": 143, "reason": "spot notice"}, "Client.InstanceInitiatedShutdown", "reclaimed"),
        ({"code": 75, "reason": "SIGTERM"}, "Server.SpotInstanceTermination", "reclaimed"),
        ({"code": 75, "reason": "SIGTERM"}, "Client.UserInitiatedShutdown", "stopped"),
        ({"code": 75, "reason": "interrupted"}, "Client.InstanceInitiatedShutdown", "stopped"),
        ({"code": 1, "reason": "failed"}, "Client.InstanceInitiatedShutdown", "failed"),
        ({"code": 75, "reason": "asked to stop"}, "Server.SpotInstanceTermination", "stopped"),
    ],
)
def test_what_a_machine_said_last_and_why_aws_ended_it(account, told, reason, phase):
    run = (
        f"told-{told['code']}-{told['reason'].replace(' ', '-')}-{reason.split('.')[1][:8]}".lower()
    )
    assert account.launch("submit", "target=ec2", "target.spot=true", f"name={run}")[0] == OK
    end(account, run, reason)
    put(account, f"runs/{run}/attempts/1.json", {"attempt": 1, **told})
    code, printed = account.launch("logs", run)
    assert code == OK and f"attempt 1 at {run} is {phase}" in printed, printed


def test_a_stop_at_once_is_noted_so_that_no_wait_replaces_the_machine(account):
    process = account.start(
        "submit", "target=ec2", "target.spot=true", "name=halted", "--wait", "--every", "0.1"
    )
    assert wait_for(lambda: len(machines(account, "halted")) == 1, 120)
    assert account.launch("stop", "halted", "--now")[0] == OK
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == RESUME and "is stopped" in printed, printed
    assert account.client("s3").head_object(Bucket=BUCKET, Key="runs/halted/attempts/1.stop")
    end(account, "halted", "Server.SpotInstanceTermination")
    assert "is stopped" in account.launch("logs", "halted")[1], "whatever AWS says afterwards"


def test_an_end_that_ec2_has_forgotten_is_no_reclaim(account):
    assert account.launch("submit", "target=ec2", "target.spot=true", "name=forgotten")[0] == OK
    [machine] = machines(account, "forgotten")
    account.post("/strict/forget_instance", instance=machine["InstanceId"])
    key = "runs/forgotten/attempts/1.request.json"
    noted = json.loads(account.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read())
    put(
        account,
        key,
        noted | {"noted": "2026-01-01T00:00:00+00:00", "sent": "2026-01-01T00:00:00+00:00"},
    )
    code, printed = account.launch("logs", "forgotten")
    assert code == OK and "is failed (ended without a message" in printed
    put(account, "runs/forgotten/log.txt", "written a moment ago")
    assert "is running" in account.launch("logs", "forgotten")[1]


def test_replacements_that_get_no_further_have_an_end(account):
    """Every new checkpoint starts the count again; a machine that AWS never had is no
    replacement.
    """
    process = account.start(
        "submit", "target=ec2", "target.spot=true", "name=vain", "--wait", "--every", "0.02"
    )
    assert wait_for(lambda: len(machines(account, "vain")) == 1, 120)
    end(account, "vain", "Server.InsufficientInstanceCapacity")
    reclaim(account, "vain", 2)
    assert wait_for(lambda: len(machines(account, "vain")) == 3, 120)
    put(account, "runs/vain/checkpoints/step-00000010/manifest.json", {})
    for number in range(3, 8):
        reclaim(account, "vain", number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == MISTAKE, printed
    assert "4 machines in a row were taken back" in printed and "found no machine free" in printed
    assert len(machines(account, "vain")) == 7


def test_a_machine_that_could_not_reach_the_bucket_is_heard_on_its_console(account):
    assert account.launch("submit", "target=ec2", "name=silent")[0] == OK
    end(account, "silent", "Client.InstanceInitiatedShutdown")
    code, printed = account.launch("logs", "silent")
    assert code == OK and "without a note" in printed and "console: " in printed, printed


def test_of_two_machines_the_one_that_has_the_attempt_counts(account):
    assert account.launch("submit", "target=ec2", "name=twins")[0] == OK
    [late] = machines(account, "twins")
    assert account.launch("submit", "target=ec2", "name=owner")[0] == OK
    [owner] = machines(account, "owner")
    account.client("s3").put_object(
        Bucket=BUCKET, Key="runs/twins/attempts/1.machine", Body=owner["InstanceId"].encode()
    )
    end(account, "twins", "Client.InstanceInitiatedShutdown")
    assert "attempt 1 at twins is running" in account.launch("logs", "twins")[1], late


def test_stop_without_a_name_stops_what_is_going(monkeypatch):
    """Not the newest, which may have ended; and asks which where several are going."""
    names = ("old", "older", "newest")
    every = {name: noted(name, f"2026-11-2{day}") for day, name in enumerate(names)}
    monkeypatch.setattr(notes, "every", lambda aws: [notes.Noted(each) for each in every.values()])
    monkeypatch.setattr(notes, "latest", lambda aws, run: every[run])
    aws = Aws("packhorse", REGION)
    assert choose(aws, [], lambda each: each.attempt.run == "older").run == "older"
    assert choose(aws, [], lambda each: False).run == "newest"
    assert choose(aws, []).run == "newest"
    with pytest.raises(UserError, match="2 runs are active: old, older; name one of them"):
        choose(aws, [], lambda each: each.attempt.run != "newest")


def noted(run: str, when: str) -> notes.Attempt:
    price = Price("g4dn.xlarge", 0.5, 0.2, "")
    of_machine = ("ec2", "g4dn.xlarge", 1, False, 8.0, f"packhorse-{run}-1", price, [], {}, when)
    return notes.Attempt(run, 1, *of_machine)


# --- past the limit ---


def test_what_is_past_its_limit_is_said_first_and_ended(account):
    assert account.launch("submit", "target=ec2", "name=past")[0] == OK
    assert account.launch("submit", "target=ec2", "name=within")[0] == OK
    [machine] = machines(account, "past")
    account.post("/strict/age", instance=machine["InstanceId"], hours=100)
    line = f"OVERDUE: run past on {machine['InstanceId']}, 92.0 h past its 8 h limit, $54.2"
    verbs = {
        "status": ["--json"],
        "logs": ["within"],
        "cost": ["past"],
        "plan": ["target=ec2", "name=other"],
        "submit": ["target=ec2", "name=past"],
        "fetch": ["within"],
        "stop": ["within"],
    }
    for verb, arguments in verbs.items():
        code, printed = account.launch(verb, *arguments)
        assert printed.startswith(line) and "-m launch status --end" in printed, printed
    code, printed = account.launch("status", "--end")
    assert code == OK and printed.startswith(line), printed
    assert machines(account, "past")[0]["State"]["Name"] == "terminated"
    assert machines(account, "within")[0]["State"]["Name"] == "running"
    assert "OVERDUE" not in account.launch("status")[1]


def test_a_wait_ends_what_is_past_its_limit(account):
    process = account.start(
        "submit",
        "target=ec2",
        "target.spot=true",
        "target.hours=2",
        "name=watched",
        "--wait",
        "--every",
        "0.1",
    )
    assert wait_for(lambda: len(machines(account, "watched")) == 1, 120)
    account.post("/strict/age", instance=machines(account, "watched")[0]["InstanceId"], hours=3)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == RESUME and "OVERDUE" in printed, printed
    assert [each["State"]["Name"] for each in machines(account, "watched")] == ["terminated"]


# --- every GPU that is paid for ---


@pytest.mark.parametrize(
    ("target", "machine", "processes"),
    [
        ("ec2", "g4dn.12xlarge", 4),
        ("ec2", "p4d.24xlarge", 8),
        ("ec2", "g4dn.xlarge", 1),
        ("sagemaker", "ml.g4dn.12xlarge", 4),
        ("sagemaker", "ml.g5.48xlarge", 8),
        ("sagemaker", "ml.g4dn.xlarge", 1),
        ("tuner", "ml.g5.12xlarge", 4),
        ("sagemaker_multi", "ml.g4dn.12xlarge", 16),
    ],
)
def test_every_gpu_of_a_machine_trains(account, target, machine, processes):
    more = ["sweep=head"] if target == "tuner" else []
    code, printed = account.launch(
        "plan", f"target={target}", f"target.instance_type={machine}", *more, "--json"
    )
    assert code == OK, printed
    planned = json.loads(printed[printed.index("{") :])
    assert (f"{processes} processes" in planned["cost"]["machines"]) == (processes > 1)
    if target != "ec2":
        parameters = planned["requests"][0]["parameters"]
        started = (
            parameters.get("HyperParameters")
            or parameters["TrainingJobDefinition"]["StaticHyperParameters"]
        )
        assert ("sagemaker_torch_distributed_enabled" in started) == (processes > 1)


def test_the_settings_say_how_many_processes(account):
    arguments = ["plan", "target=sagemaker", "target.instance_type=ml.g4dn.12xlarge"]
    for alone in ("train.processes=1", "train.device=cpu"):
        code, printed = account.launch(*arguments, alone)
        assert code == OK and "processes" not in printed.split("costs")[1].split("next:")[0], (
            printed
        )
    code, printed = account.launch(*arguments, "train.processes=3")
    assert code == MISTAKE and "train.processes=3" in printed and "4 would run" in printed


def test_one_more_attempt_at_a_complete_run_begins_without_its_result(account, tmp_path):
    """With the result it would be complete at once, and the machine paid for nothing."""
    assert account.launch("submit", "target=ec2", "name=more")[0] == OK
    put(account, "runs/more/attempts/1.json", {"attempt": 1, "code": 0, "reason": "done"})
    for name in ("result.json", "model.tar.gz", "metrics.jsonl"):
        put(account, f"runs/more/output/{name}", {})
    end(account, "more", "Client.InstanceInitiatedShutdown")
    code, printed = account.launch("submit", "target=ec2", "name=more")
    assert code == OK and "nothing is sent" in printed and len(machines(account, "more")) == 1
    code, printed = account.launch("submit", "target=ec2", "name=more", "--again")
    assert code == OK and len(machines(account, "more")) == 2, printed

    # The part of the machine's script that brings what was saved, by AWS's own command line.
    text = script(account, machines(account, "more")[-1])
    restore = text[text.index("restore() {") : text.index("upload() {")]
    places = f"scratch={tmp_path} directory={tmp_path}/run s3_run=s3://{BUCKET}/runs/more\n"
    environment = CREDENTIALS | {
        "AWS_ENDPOINT_URL": account.url,
        "AWS_DEFAULT_REGION": REGION,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    subprocess.run(["bash", "-euc", f"{places}{restore}\nrestore"], env=environment, check=True)
    assert [path.name for path in (tmp_path / "run").glob("*.*")] == ["metrics.jsonl"]
