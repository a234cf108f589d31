"""What others leave where a project looks: their runs in its bucket, their tags, files that are no
notes, a machine that is stopped, a command that runs at the same time, a disk that is full.
"""

import errno
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cloud import quotas, s3
from launch.cloud.session import Aws
from tests.conftest import make_pictures
from tests.launch.conftest import BUCKET, CREDENTIALS, REGION, Cloud, founded
from trainer.common import files
from trainer.common.errors import MISTAKE, OK, UserError

FAST = ("--yes", "--every", "0.05")


@pytest.fixture
def account(account: Cloud) -> Iterator[Cloud]:
    yield account
    account.post("/strict/forget")
    account.post("/strict/late", answers=0)
    s3 = account.client("s3")
    for item in s3.list_objects_v2(Bucket=BUCKET, Prefix="runs/").get("Contents", []):
        s3.delete_object(Bucket=BUCKET, Key=item["Key"])


def launch(cloud: Cloud, *words: str) -> str:
    code, printed = cloud.launch(*words)
    assert code == OK, printed
    return printed


def machines(cloud: Cloud) -> list[dict]:
    groups = cloud.client("ec2").describe_instances()["Reservations"]
    return [each for group in groups for each in group["Instances"]]


def test_two_projects_share_a_bucket_and_no_run(account):
    account.client("s3").create_bucket(Bucket="shared")
    ours, theirs = (
        (f"target.project={name}", "target.bucket=shared") for name in ("team", "team-b")
    )
    for words in (ours, theirs):
        launch(account, "up", *words, *FAST)
    launch(account, "submit", "name=x", *theirs)
    assert re.search("x .* running", launch(account, "status", *theirs))
    assert "none yet" in launch(account, "status", *ours)
    for words in (["submit", "name=x"], ["stop", "x"], ["logs", "x"], ["fetch", "x"]):
        code, printed = account.launch(*words, *ours)
        assert code == MISTAKE and "this is a run of the project team-b" in printed, printed
    assert "x" not in launch(account, "cost", *ours).split()
    launch(account, "submit", "name=y", *ours)
    stops = account.client("s3").list_objects_v2(Bucket="shared", Prefix="runs/x/attempts/")
    assert [each["Key"] for each in stops["Contents"]] == ["runs/x/attempts/1.request.json"]


def test_down_deletes_no_bucket_that_holds_anothers_runs(account):
    theirs = ("target.project=guest", f"target.bucket={BUCKET}")
    launch(account, "up", *theirs, *FAST)
    launch(account, "submit", "name=theirs", *theirs)
    before = len(account.calls())
    code, printed = account.launch("down", *FAST)
    assert code == MISTAKE and "go with it: theirs; nothing was changed" in printed, printed
    called = {call["operation"] for call in account.calls()[before:]}
    assert not [each for each in called if re.match("Delete|Terminate|Stop|Put", each)]
    assert "nothing of guest is left" in launch(account, "down", *theirs, *FAST)


FILES = {
    "runs/.all/attempts/z/1.note.AAAA": b"",
    "runs/.all/attempts/z/1.end.e30=": b"",
    "runs/.all/attempts/z/1.state.____": b"",
    "runs/z/attempts/1.request.json": b"{not json",
    "runs/a b/attempts/1.request.json": b"[]",
    "runs/seen/attempts/1.json": b"",
    "runs/seen/output/result.json": b"[1, 2",
}


@pytest.mark.parametrize("key", FILES)
def test_a_file_that_is_none_of_ours_hides_no_run(account, key):
    launch(account, "submit", "target=ec2", "name=seen")
    account.client("s3").put_object(Bucket=BUCKET, Key=key, Body=FILES[key])
    assert re.search("seen .* running", launch(account, "status"))
    printed = launch(account, "cost")
    assert "\nseen " in f"\n{printed}", printed
    if key.endswith("request.json"):
        assert f"not shown: s3://{BUCKET}/{key}: this is not the note" in printed
    if key.startswith("runs/z/"):
        for words in (["logs", "z"], ["submit", "name=z"]):
            code, printed = account.launch(*words)
            assert code == MISTAKE and "restore an earlier version" in printed, printed


def test_what_a_newer_version_notes_besides_is_left_out(account):
    launch(account, "submit", "target=ec2", "name=newer")
    client, key = account.client("s3"), "runs/newer/attempts/1.request.json"
    noted = json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    noted["price"]["later"] = noted["later"] = 1
    client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(noted).encode())
    assert "attempt 1 at newer is running" in launch(account, "logs", "newer")


def test_a_machine_with_anothers_idea_of_an_attempt_is_shown(account):
    launch(account, "submit", "target=ec2", "name=odd")
    [machine] = machines(account)
    tag = [{"Key": "attempt", "Value": "first"}]
    account.client("ec2").create_tags(Resources=[machine["InstanceId"]], Tags=tag)
    account.post("/strict/age", instance=machine["InstanceId"], hours=100)
    assert f"machine   {machine['InstanceId']}" in launch(account, "status")


def test_the_disk_of_what_is_stopped_costs_money_and_is_shown(account):
    launch(account, "submit", "target=ec2", "name=halted", "target.disk_gb=120")
    launch(account, "submit", "target=notebook")
    [machine] = machines(account)
    account.client("ec2").stop_instances(InstanceIds=[machine["InstanceId"]])
    launch(account, "stop", "notebook")
    told = json.loads(launch(account, "status", "--json"))
    disks = {row["machines"]: row["per_hour"] for row in told["costs_now"]}
    assert disks.keys() == {f"120 GB of {machine['InstanceId']}", "20 GB"}
    # gp3, and a notebook's: dollars a GB and month.
    assert list(disks.values()) == pytest.approx([20 * 0.14 / 730, 120 * 0.08 / 730], rel=0.3)
    launch(account, "delete", "notebook", *FAST)


def test_down_ends_a_machine_that_ec2_does_not_list_yet(tmp_path):
    with founded(tmp_path / "calls.jsonl") as cloud:
        cloud.post("/strict/late", answers=30)
        launch(cloud, "submit", "target=ec2", "name=young")
        [machine] = machines(cloud)
        printed = launch(cloud, "down", *FAST)
        told = f"ends      machine {machine['InstanceId']}, which EC2 doesn't list yet"
        assert told in printed and "nothing of packhorse is left" in printed
        assert [each["State"]["Name"] for each in machines(cloud)] == ["terminated"]


def test_two_downs_at_once_both_end_well(tmp_path):
    with founded(tmp_path / "calls.jsonl") as cloud:
        for target in ("ec2", "sagemaker"):
            launch(cloud, "submit", f"target={target}", f"name=twice-{target}")
        both = [cloud.start("down", *FAST) for _ in range(3)]
        for process in both:
            printed, _ = process.communicate(120)
            assert process.returncode == OK and "nothing of packhorse is left" in printed, printed


@pytest.mark.parametrize(
    ("operation", "code", "message"),
    [
        ("GetBucketTagging", "NoSuchBucket", "The specified bucket does not exist"),
        ("ListMultipartUploads", "NoSuchBucket", "The specified bucket does not exist"),
        ("ListObjectVersions", "NoSuchBucket", "The specified bucket does not exist"),
        ("ListStackResources", "ValidationError", "Stack with id x does not exist"),
        ("DescribeStackEvents", "ValidationError", "Stack with id x does not exist"),
    ],
)
def test_what_another_down_has_deleted_meanwhile_is_gone(tmp_path, operation, code, message):
    with founded(tmp_path / "calls.jsonl") as cloud:
        cloud.post("/strict/refuse", operation=operation, code=code, message=message)
        printed = launch(cloud, "down", *FAST)
        assert "nothing of packhorse is left" in printed


def test_of_two_ups_at_once_one_says_to_wait(account):
    message = "Stack [x] already exists and cannot be created again with the changeSet [y]."
    account.post(
        "/strict/refuse", operation="CreateChangeSet", code="ValidationError", message=message
    )
    code, printed = account.launch("up", "target.project=second", *FAST)
    assert code == MISTAKE and "another command is changing the same stack now" in printed


def archive(name: str) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as made:
        made.addfile(tarfile.TarInfo(name))
    return held.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no archive", archive("a")[:40], archive("../../out")], ids=range(4)
)
def test_an_archive_that_no_job_has_left_is_one_line(account, tmp_path, content):
    launch(account, "submit", "target=sagemaker", "name=packed")
    account.post("/strict/end", job="packhorse-packed-1", status="Completed")
    key = "runs/packed/output/packhorse-packed-1/output/output.tar.gz"
    account.client("s3").put_object(Bucket=BUCKET, Key=key, Body=content)
    code, printed = account.launch("fetch", "packed", cwd=tmp_path)
    assert code == MISTAKE and "no archive of a job" in printed, printed
    assert "Traceback" not in printed and not (tmp_path.parent / "out").exists()


# --- names ---


@pytest.mark.parametrize(
    ("name", "why"),
    [("a\nb", "control character"), ("a\x01b", "control"), ("犬" * 80, "960 b")],
)
def test_a_name_that_s3_can_not_keep_is_refused_before(tmp_path, name, why):
    folder = tmp_path / "dogs"
    place = folder / "train" / (f"{name}/" * 5 if len(name) > 9 else "")
    place.mkdir(parents=True)
    (place / f"{name}.png").write_bytes(b"1")
    with pytest.raises(UserError, match=why):
        s3.files_of(folder)


@pytest.mark.parametrize("name", [" a b ", "a%2Fb+c&d", "a'b\"c", "a*?[x]", "ü ", "n" * 200])
def test_any_other_name_comes_back_as_it_was(account, tmp_path, monkeypatch, name):
    for key, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": account.url}).items():
        monkeypatch.setenv(key, value)
    (tmp_path / "dogs/train").mkdir(parents=True)
    (tmp_path / f"dogs/train/{name}.png").write_bytes(b"1")
    aws = Aws("packhorse", REGION)
    s3.upload_folder(aws, tmp_path / "dogs", "runs/names/")
    s3.download(aws, s3.listing(aws, "runs/names/"), tmp_path / "back")
    assert [path.name for path in (tmp_path / "back/train").iterdir()] == [f"{name}.png"]


# --- a full disk ---


def test_a_full_disk_loses_what_is_kept_for_later_and_nothing_else(account, tmp_path, monkeypatch):
    """No run hangs on what plan and submit remember of pictures and quotas."""
    pictures = make_pictures(tmp_path / "dogs", {"train": 2, "valid": 1})
    full: list[str] = []

    def write(path: Path, *rest: object) -> None:
        full.append(path.name)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(quotas, "NUMBERS", tmp_path / "quotas.json")
    monkeypatch.setattr(s3, "DIGESTS", tmp_path / "digests")
    words = ("target=sagemaker", "data=folder", "--data", str(pictures), "name=full")
    assert "quota     ml.g4dn.xlarge" in launch(account, "plan", *words)
    assert "sent attempt 1 at full" in launch(account, "submit", *words)
    assert not (tmp_path / "quotas.json").exists()


def test_a_full_disk_is_named_where_a_model_is_fetched(account, tmp_path, monkeypatch):
    for key, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": account.url}).items():
        monkeypatch.setenv(key, value)
    aws = Aws("packhorse", REGION)
    s3.write(aws, "runs/large/output/model.tar.gz", b"1")
    client = aws.client("s3")

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(client, "download_file", fill)
    listed = s3.listing(aws, "runs/large/output/")
    with pytest.raises(OSError, match=r"No space left .*model\.tar\.gz"):
        s3.download(aws, listed, tmp_path)
