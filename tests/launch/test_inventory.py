"""How many calls a look at many runs takes, and that it tells what a look at each would."""

import base64
import dataclasses
import json
from datetime import timedelta
from typing import Any

import pytest

from launch.cloud import s3
from launch.cloud.prices import Price
from launch.cloud.session import Aws
from launch.targets import attempt as notes
from launch.targets.attempt import END, INDEX, Attempt, attempt_key
from tests.launch.conftest import BUCKET, CREDENTIALS, REGION, Cloud
from trainer.common.errors import OK

RUNS = 250
CALLS = 12
OLD = timedelta(days=3)
ROLE = f"arn:aws:iam::123456789012:role/packhorse-training-{REGION}"


@pytest.fixture
def aws(account, monkeypatch):
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": account.url}).items():
        monkeypatch.setenv(name, value)
    return Aws("packhorse", REGION)


def attempt(run: str, target: str, id: str | None, age: timedelta) -> Attempt:
    machine = {"ec2": "g4dn.xlarge"}.get(target, "ml.m5.large")
    when = (notes.now() - age).isoformat()
    return Attempt(
        run=run,
        number=1,
        target=target,
        instance_type=machine,
        instances=1,
        spot=False,
        hours=8.0,
        job=f"packhorse-{run}-1",
        price=Price(machine, 0.5, 0.2, "2026-11-20, us-east-1, the table"),
        requests=[],
        identity={"optim.lr": 0.1},
        noted=when,
        id=id,
        sent=when,
        per_hour=0.53,
        ceiling=4.25,
        asked=when,
        words={"overrides": ["optim.lr=0.1"] * 20},
    )


def make_job(account: Cloud, name: str) -> None:
    account.client("sagemaker").create_training_job(
        TrainingJobName=name,
        AlgorithmSpecification={"TrainingImage": "image", "TrainingInputMode": "File"},
        RoleArn=ROLE,
        OutputDataConfig={"S3OutputPath": f"s3://{BUCKET}/runs/one/output"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
        HyperParameters={"name": "x"},
        Tags=[{"Key": "project", "Value": "packhorse"}],
    )


def last_word(run: str, code: int) -> dict[str, str]:
    """What a machine writes at its end, as user_data.sh does."""
    text = json.dumps({"attempt": 1, "code": code, "reason": "done"})
    name = base64.urlsafe_b64encode(text.encode()).decode()
    return {attempt_key(run, 1, "json"): text, f"{INDEX}{run}/1.{END}.{name}": ""}


def status(account: Cloud) -> tuple[dict[str, Any], list[str]]:
    """What `status` says, and the calls it made."""
    before = len(account.calls())
    code, printed = account.launch("status", "--json")
    assert code == OK, printed
    document = printed[printed.index("{") :]  # below what is said on standard error
    return json.loads(document), [call["operation"] for call in account.calls()[before:]]


def test_a_look_at_hundreds_of_runs_takes_a_dozen_calls(account, aws):
    """Half of them jobs, half machines; some run, most ended long ago, some without a word."""
    jobs = [f"job-{number}" for number in range(RUNS // 2)]
    boxes = [f"box-{number}" for number in range(RUNS // 2)]
    written: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "write", lambda aws, key, data: written.update({key: data.decode()}))
        for run in jobs:
            notes.note(aws, attempt(run, "sagemaker", f"arn:{run}", OLD))
        for number, run in enumerate(boxes):
            notes.note(aws, attempt(run, "ec2", f"i-{number:017x}", OLD))
    for run in boxes[3:]:
        written |= last_word(run, 0)
    make_job(account, "one")
    states = {f"packhorse-{run}-1": "Completed" for run in jobs[2:]}
    states |= {f"packhorse-{run}-1": "InProgress" for run in jobs[:2]}
    account.post("/strict/many", bucket=BUCKET, objects=written, job="one", jobs=states)
    status(account)  # looks for those without a word, and notes what it found
    document, calls = status(account)
    assert len(calls) <= CALLS, calls
    told = {each["run"]: each for each in document["runs"]}
    assert told.keys() == {*jobs, *boxes}
    phases = {run: each["state"] for run, each in told.items()}
    assert {phases[run] for run in jobs[2:] + boxes[3:]} == {"complete"}
    assert {phases[run] for run in boxes[:3]} == {"failed"}, "it said nothing, and is forgotten"
    assert {phases[run] for run in jobs[:2]} == {"running"}
    assert {told[run]["dollars"] for run in jobs[2:]} == {0.25}, "what SageMaker bills"
    assert {row["name"] for row in document["costs_now"]} >= {f"packhorse-{jobs[0]}-1"}


def test_what_an_earlier_version_noted_is_read_from_its_notes(account, aws):
    """It stands in no index, nor does an attempt whose run is in there by its next one alone."""
    for number in (1, 2):
        old = dataclasses.replace(attempt("older", "ec2", "i-1", OLD), number=number)
        s3.write(aws, old.key, old.dumps())
    assert [each.attempt.number for each in notes.every(aws) if each.attempt.run == "older"] == [
        1,
        2,
    ]
    notes.note(aws, dataclasses.replace(old, number=3))
    found = [each.attempt.number for each in notes.every(aws) if each.attempt.run == "older"]
    assert found == [1, 2, 3]


def test_the_newest_entry_of_an_attempt_counts(account, aws):
    first = attempt("twice", "ec2", None, OLD)
    assert notes.claim(aws, first) and not notes.claim(aws, first)
    notes.note(aws, dataclasses.replace(first, id="i-2"))
    [noted] = [each for each in notes.every(aws) if each.attempt.run == "twice"]
    assert noted.attempt == dataclasses.replace(first, id="i-2", identity={}, words={})


def test_what_is_denied_hides_no_other_row(account):
    """A job and a machine run; each time another listing is refused, and says so."""
    account.post("/strict/forget")
    for target in ("ec2", "sagemaker"):
        assert account.launch("submit", f"target={target}", f"name=row-{target}")[0] == OK
    shown: dict[str, tuple[set[str], dict[str, str]]] = {
        "Search": ({"machine"}, {"row-ec2": "running", "row-sagemaker": "running"}),
        "ListObjectsV2": ({"machine", "training"}, {}),
        "DescribeInstances": (
            {"training"},
            {"row-ec2": "not known", "row-sagemaker": "running"},
        ),
    }
    for denied, (kinds, states) in shown.items():
        account.post("/strict/rude", how="deny", answers=9, operation=denied)
        document, _ = status(account)
        account.post("/strict/calm")
        rows = {row["kind"] for row in document["costs_now"]}
        told = {each["run"]: each["state"] for each in document["runs"]}
        assert rows == kinds and told.items() >= states.items(), denied
        assert denied in str(document["not_known"])
