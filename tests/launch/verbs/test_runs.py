"""The runs of this machine and those in the bucket, in one table."""

import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from launch.targets import attempt as notes
from launch.verbs.overview import FIGURES
from tests.launch.conftest import BUCKET, CREDENTIALS, Cloud
from tests.launch.test_inventory import attempt, last_word, make_job
from tests.launch.test_inventory import aws as aws  # the fixture, of this module's account
from tests.trainer.results.test_runs import make as make  # a run of this machine
from trainer.common.errors import MISTAKE, OK

SETTINGS = {"data.source": "folder", "model.name": "resnet18", "optim.lr": 0.1, "optim.name": "sgd"}
RESULT = {"split": "test", "top1": 0.8, "pictures": 200, "best_epoch": 1, "epochs": 2}
URI = f"s3://{BUCKET}/runs"


def submitted(run: str, target: str, **settings: Any) -> notes.Attempt:
    identity = SETTINGS | settings | {"target": target, "data": "dogs-0123456789abcdef"}
    sent = attempt(run, target, f"arn:{run}", timedelta(days=3))
    return dataclasses.replace(sent, identity=identity)


def shown(account: Cloud, cwd: Path, *words: str) -> tuple[str, list[str]]:
    """What `runs` prints, and the calls it made."""
    before = len(account.calls())
    code, printed = account.launch("runs", *words, cwd=cwd)
    assert code == OK, printed
    return printed, [call["operation"] for call in account.calls()[before:]]


def test_runs_in_the_bucket_stand_beside_those_of_this_machine(account, aws, make, tmp_path):
    assert "no run yet" not in shown(account, tmp_path, "--json", str(make("x").parent))[0]
    boxes = [f"box-{number}" for number in range(6)]
    written: dict[str, str] = {}
    for number, run in enumerate(boxes):
        notes.note(aws, submitted(run, "ec2", **{"optim.lr": 0.01} if number == 0 else {}))
        written |= last_word(run, 0) | {f"runs/{run}/output/result.json": json.dumps(RESULT)}
    rows = '{"epoch": 1, "valid_top1": 0.75}\n{"epoch": 2, "valid_top1": 0.9}\n'
    written["runs/box-0/output/metrics.jsonl"] = rows
    notes.note(aws, submitted("job", "sagemaker"))
    make_job(account, "packhorse-job-1")
    account.post("/strict/many", bucket=BUCKET, objects=written, job="packhorse-job-1", jobs={})
    account.post(
        "/strict/end",
        job="packhorse-job-1",
        status="Completed",
        hours=2,
        billed=3600,
        metrics={"test_top1": 0.625, "valid_top1": 0.5, "epoch": 7},
    )
    make("here", "data.root=/photos/dogs", "model.name=resnet18", test=0.9)

    printed, first = shown(account, tmp_path)
    table = printed[printed.index("date ") :]  # below what is said on standard error
    lines = {
        line.split(" runs/")[-1].split("/runs/")[-1].split()[0]: line
        for line in table.splitlines()[1:]
    }
    assert lines.keys() == {*boxes, "job", "here", "x"}
    told = f"dogs resnet18 75.0% 80.0% 74 to 85 2 $36.00 complete {URI}/box-0"
    assert told in " ".join(lines["box-0"].split())
    assert "optim.lr=0.01" in lines["box-0"] and "optim.lr" not in lines["box-1"]
    assert "50.0% 62.5% 7 2 h 0 min $0.50 complete" in " ".join(lines["job"].split())
    assert "$" not in lines["here"] and "$" in lines["job"]

    again, calls = shown(account, tmp_path)
    assert again[again.index("date ") :] == table
    assert len(calls) <= 12 and "GetObject" in first, calls
    assert calls.count("GetObject") == 1, "settings and figures are kept in one object"

    s3 = account.client("s3")
    kept = json.loads(s3.get_object(Bucket=BUCKET, Key=FIGURES)["Body"].read())
    kept["box-1"] |= {"attempt": kept["box-1"]["attempt"] - 1, "test": 0.1}
    for before in (b"{torn", json.dumps(kept).encode()):  # the second of an attempt before
        s3.put_object(Bucket=BUCKET, Key=FIGURES, Body=before)
        assert shown(account, tmp_path)[0].endswith(table)
    assert URI not in shown(account, tmp_path, "--local")[0]

    # What was fetched lies here, and stands there once.
    told = {"uri": f"{URI}/box-0", "dollars": 0.01}
    fetched = make("fetched", "data.root=/photos/dogs", "model.name=resnet18", test=0.8)
    (fetched / "rented.json").write_text(json.dumps(told))
    printed, _ = shown(account, tmp_path, "--local")
    assert "$0.01 " in next(line for line in printed.splitlines() if "fetched" in line)
    printed, _ = shown(account, tmp_path, "--json")
    rows = json.loads(printed[printed.index("[\n") :])
    mine = [row for row in rows if row["uri"] == f"{URI}/box-0"]
    assert [Path(row["path"]).name for row in mine] == ["fetched"]
    assert mine[0]["dollars"] == pytest.approx(36, abs=0.1), "what it cost by now"

    shown(account, tmp_path, "--html")
    page = (tmp_path / "runs/index.html").read_text()
    assert "Accuracy against dollars" in page and "box-3" in page


def test_what_is_denied_hides_no_run_of_this_machine(account, make, tmp_path):
    make("here", "data.root=/photos/dogs", "model.name=resnet18", test=0.9)
    account.post("/strict/rude", how="denied", answers=40)
    printed, _ = shown(account, tmp_path)
    account.post("/strict/calm")
    assert printed.count("the runs in the bucket are not shown: ") == 1
    assert "runs/here" in printed


def test_who_has_no_credentials_sees_the_runs_of_this_machine(make, tmp_path, monkeypatch, account):
    make("here", "data.root=/photos/dogs", "model.name=resnet18", test=0.9)
    for name in CREDENTIALS:
        monkeypatch.setitem(CREDENTIALS, name, "")
    monkeypatch.setitem(CREDENTIALS, "AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(CREDENTIALS, "AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setitem(CREDENTIALS, "AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    printed, calls = shown(account, tmp_path)
    assert calls == [] and "bucket" not in printed and "runs/here" in printed


def test_a_target_that_is_not_allowed_is_a_mistake(account, make, tmp_path):
    make("here", "data.root=/photos/dogs", "model.name=resnet18")
    code, printed = account.launch("runs", "target.nowhere=x", cwd=tmp_path)
    assert code == MISTAKE and "target.nowhere" in printed and "Traceback" not in printed
