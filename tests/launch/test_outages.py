"""AWS in the middle of an answer or of a wait: a listing that is throttled half-way, credentials
that expire. Nothing is taken for gone, and one line says what to do.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.credentials import SSOProvider
from botocore.tokens import SSOTokenProvider

from launch.cloud import session
from launch.cloud.remedies import CREDENTIALS
from launch.verbs import down
from tests.conftest import wait_for
from tests.launch import conftest
from tests.launch.aws import CONTINUED
from tests.launch.cloud.test_ownership import make_disk, make_endpoint
from tests.launch.conftest import BUCKET, Cloud, founded
from trainer.common.errors import MISTAKE, OK

OURS = [{"Key": "project", "Value": "packhorse"}]
RUNS = ("b1", "b2", "s1", "s2")
THROTTLED = "AWS asks for fewer calls: wait a minute"


@pytest.fixture(autouse=True)
def no_second_tries(monkeypatch):
    """What boto's own tries, with their pauses, come to in the end."""
    monkeypatch.setattr(session, "ATTEMPTS", 1)
    monkeypatch.setattr(session, "HURRIED", (1, 8))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """An account in which two of each kind run."""
    with founded(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        fill(cloud)
        yield cloud


@pytest.fixture
def account(server: Cloud) -> Iterator[Cloud]:
    yield server
    server.post("/strict/calm")
    server.post("/strict/pages", size=0)


def fill(cloud: Cloud) -> None:
    for run in RUNS:
        target = "ec2" if run[0] == "b" else "sagemaker"
        code, printed = cloud.launch("submit", f"target={target}", f"name={run}")
        assert code == OK, printed
    for number in (1, 2):
        make_endpoint(cloud, f"packhorse-{number}", OURS)
        make_disk(cloud, OURS)


def in_pages(cloud: Cloud, *words: str) -> tuple[str, set[str]]:
    """What a verb prints where each page holds one thing, and the listings that it turned."""
    cloud.post("/strict/pages", size=1)
    before = len(cloud.calls())
    _, printed = cloud.launch(*words)
    calls = cloud.calls()[before:]
    turned = {call["operation"] for call in calls if call["parameters"].keys() & CONTINUED}
    return printed, turned


def throttled(cloud: Cloud, operation: str, *words: str) -> tuple[int, str]:
    """What a verb says where the second page of a listing is refused."""
    cloud.post("/strict/rude", how="throttle", answers=99, operation=operation, later=True)
    code, printed = cloud.launch(*words)
    cloud.post("/strict/calm")
    assert "Traceback" not in printed and THROTTLED in printed, printed
    return code, printed


# What status shows of each listing, and what doesn't hang on it.
LISTED = {
    "DescribeInstances": ("machine", {"b1", "b2"}),
    "ListTrainingJobs": ("training", {"s1", "s2"}),
    "Search": ("training", {"s1", "s2"}),
    "ListEndpoints": ("endpoint", set()),
    "ListObjectsV2": ("", set(RUNS)),
}


def test_status_shows_all_but_what_was_throttled_half_way(account):
    _, turned = in_pages(account, "status")
    assert turned == LISTED.keys()
    for operation, (kind, runs) in LISTED.items():
        code, printed = throttled(account, operation, "status", "--json")
        told = json.loads(printed[printed.index("{\n") :])
        assert code == OK and operation in str(told["not_known"]), printed
        rows = {row["kind"] for row in told["costs_now"]}
        assert rows == {"machine", "training", "endpoint", "disk"} - {kind}, operation
        states = {each["run"]: each["state"] for each in told["runs"]}
        if operation == "ListObjectsV2":
            assert states == {}
        else:
            assert states == {run: "not known" if run in runs else "running" for run in RUNS}
        _, printed = throttled(account, operation, "status")
        assert "none yet" not in printed and "nothing by the hour" not in printed


def test_cost_sums_the_others_and_says_which_it_leaves_out(account):
    _, turned = in_pages(account, "cost")
    assert turned == LISTED.keys() - {"ListEndpoints"}
    for operation in turned:
        code, printed = throttled(account, operation, "cost")
        left_out = set(re.findall(r"^not in the sum: (\w+):", printed, re.M))
        assert code == MISTAKE, "the sum is not whole"
        if operation == "ListObjectsV2":
            assert "in all" not in printed
        else:
            assert left_out == LISTED[operation][1] and "in all" in printed, printed
            assert set(re.findall(r"^(\w\d) ", printed, re.M)) == set(RUNS) - left_out


def test_a_verb_for_one_run_does_its_work_or_nothing(account):
    """Which machines are past their limits is another question, and holds up nobody."""
    _, turned = in_pages(account, "stop")
    assert turned == {"DescribeInstances", "ListTrainingJobs", "Search", "ListObjectsV2"}
    for operation in turned:
        before = len(account.calls())
        code, printed = throttled(account, operation, "stop")
        assert code == MISTAKE and len(re.findall("^error: ", printed, re.M)) == 1, printed
        called = [call["operation"] for call in account.calls()[before:]]
        assert not [each for each in called if re.match("Stop|Terminate|Put|Delete", each)]
    code, printed = throttled(account, "DescribeInstances", "logs", "s1")
    assert code == OK and "attempt 1 at s1 is running" in printed


def test_down_takes_nothing_for_gone_and_the_same_command_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(down, "show", lambda *_: None)  # it would be refused before anything ends
    command = ("down", "--yes", "--every", "0.05")
    with founded(tmp_path / "calls.jsonl") as cloud:
        fill(cloud)
        cloud.post("/strict/pages", size=1)
        for operation in ("ListTrainingJobs", "DescribeInstances"):
            code, printed = throttled(cloud, operation, *command)
            assert code == MISTAKE and f":{operation}: " in printed, printed
            assert "what is left costs money: start the same down again" in printed
            assert "nothing of packhorse is left" not in printed
        cloud.post("/strict/pages", size=0)
        code, printed = cloud.launch(*command)
        assert code == OK and "nothing of packhorse is left" in printed
        assert cloud.client("sagemaker").list_training_jobs()["TrainingJobSummaries"] == []
        states = {
            each["State"]["Name"]
            for group in cloud.client("ec2").describe_instances()["Reservations"]
            for each in group["Instances"]
        }
        assert states == {"terminated"} and cloud.client("s3").list_buckets()["Buckets"] == []


# --- credentials that expire ---

START = "https://company.awsapps.com/start"
PROFILES = f"""
[profile legacy]
sso_start_url = {START}
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = Researcher

[sso-session company]
sso_start_url = {START}
sso_region = us-east-1

[profile current]
sso_session = company
sso_account_id = 123456789012
sso_role_name = Researcher

[profile process]
credential_process = cat TOKENS/process.json
"""
LOGIN = "aws sso login --profile "
# By profile: the exception that botocore raises, and the remedy.
EXPIRED = {
    "legacy": ("The SSO session associated with this profile has expired", f"{LOGIN}legacy"),
    "current": ("Token has expired and refresh failed", f"{LOGIN}current"),
    "process": ("No such file", "sign in (aws sso login, aws configure)"),
}


class SignedIn:
    """A person who signs in with a profile, and whose token expires."""

    def __init__(self, profile: str, folder: Path) -> None:
        self.profile, self._folder = profile, folder
        self.sign_in()

    def sign_in(self, days: int = 1) -> None:
        until = f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
        token = {"accessToken": "t", "expiresAt": until, "startUrl": START, "region": "us-east-1"}
        for name in (START, "company"):
            file = self._folder / f"{hashlib.sha1(name.encode()).hexdigest()}.json"
            file.write_text(json.dumps(token))
        keys = {"AccessKeyId": "testing", "SecretAccessKey": "testing", "SessionToken": "t"}
        soon = f"{datetime.now(UTC) + timedelta(minutes=1):%Y-%m-%dT%H:%M:%SZ}"
        process = self._folder / "process.json"
        process.write_text(json.dumps({"Version": 1, "Expiration": soon} | keys))
        if days < 0:
            process.unlink()

    def expire(self) -> None:
        self.sign_in(days=-1)


@pytest.fixture(params=EXPIRED)
def person(request, tmp_path, monkeypatch) -> SignedIn:
    monkeypatch.setattr(SSOProvider, "_SSO_TOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(SSOTokenProvider, "_SSO_TOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "config").write_text(PROFILES.replace("TOKENS", str(tmp_path)))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delitem(conftest.CREDENTIALS, name)
    monkeypatch.setitem(conftest.CREDENTIALS, "AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setitem(conftest.CREDENTIALS, "AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setitem(conftest.CREDENTIALS, "AWS_PROFILE", request.param)
    return SignedIn(request.param, tmp_path)


@pytest.mark.parametrize("verb", ["submit", "logs"])
def test_who_waits_is_told_once_to_sign_in_and_waits_on(account, person, verb):
    run = f"{verb}-{person.profile}"
    words = ["submit", "target=ec2", "target.spot=true", f"name={run}"]
    if verb == "logs":
        assert account.launch(*words)[0] == OK
        words = ["logs", run, "--follow"]
    process = account.start(*words, *(["--wait"] if verb == "submit" else []), "--every", "0.05")
    key = f"runs/{run}/attempts/1"
    assert wait_for(lambda: (BUCKET, f"{key}.json") in asked_for(account), 60)
    person.expire()
    said, remedy = EXPIRED[person.profile]
    assert wait_for(lambda: "keeps running" in process.so_far(), 60), process.so_far()
    word = json.dumps({"attempt": 1, "code": 0, "reason": "done"}).encode()
    account.client("s3").put_object(Bucket=BUCKET, Key=f"{key}.json", Body=word)
    person.sign_in()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == OK, printed
    assert printed.count(remedy) == 1 and said in printed and "Traceback" not in printed, printed
    assert f"{run} keeps running without us on i-" in printed and "AWS answers again" in printed


def asked_for(cloud: Cloud) -> set[tuple[str, str]]:
    calls = [call["parameters"] for call in cloud.calls() if call["operation"] == "GetObject"]
    return {(call["Bucket"], call["Key"]) for call in calls}


def test_a_verb_that_does_not_wait_says_how_to_sign_in(account, person):
    person.expire()
    for words in (["status"], ["down", "--yes"], ["stop", "b1"], ["cost"], ["submit", "b1"]):
        before = len(account.calls())
        code, printed = account.launch(*words)
        said, remedy = EXPIRED[person.profile]
        assert code == MISTAKE and len(printed.splitlines()) == 1, printed
        assert said in printed and remedy in printed
        assert len(account.calls()) == before


def test_credentials_of_the_environment_are_not_renewed_by_a_profile(account):
    account.post("/strict/rude", how="expire", answers=9)
    code, printed = account.launch("status")
    assert code == MISTAKE and "ExpiredToken" in printed and "AWS_ACCESS_KEY_ID and" in printed
    assert "start the same command again" in printed and len(printed.splitlines()) == 1


def test_a_down_that_expires_half_way_says_that_things_are_left(tmp_path):
    with founded(tmp_path / "calls.jsonl") as cloud:
        assert cloud.launch("submit", "target=ec2", "name=x")[0] == OK
        cloud.post("/strict/rude", how="expire", answers=1, operation="TerminateInstances")
        code, printed = cloud.launch("down", "--yes", "--every", "0.05")
        assert code == MISTAKE and "what is left costs money: start the same down" in printed
        code, printed = cloud.launch("down", "--yes", "--every", "0.05")
        assert code == OK and "nothing of packhorse is left" in printed


def test_profiles_that_lead_to_each_other_have_no_command_and_an_end(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text("[profile a]\nsource_profile = b\n[profile b]\nsource_profile = a\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "a")
    assert session.sign_in() == CREDENTIALS
