"""The command line itself: quick, helpful, and one line for each mistake, AWS's errors included."""

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.exceptions import (
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError

from launch.__main__ import VERBS, main
from launch.cloud.session import Aws, explained
from launch.targets.base import NAMES
from tests.conftest import PROJECT
from tests.launch.conftest import Forked
from trainer.common.errors import MISTAKE, OK


def launch(*arguments: str, **environment: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    kept |= {
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": "/nonexistent",
        "PYTHONPATH": str(PROJECT),
    }
    forked = Forked(main, arguments, PROJECT, kept | environment)
    output, _ = forked.communicate()
    assert forked.returncode is not None
    return forked.returncode, output


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
    code, printed = launch("plan", f"target={target}", *more, "--full")
    assert code == OK, printed
    assert (
        "000000000000" in printed
        and "missing: credentials" in printed
        and "$" in printed
        and "may touch" in printed
    )


MISTAKES = {
    ("fly",): "allowed: up, plan",
    ("plan", "target=moon"): "allowed: box, ec2",
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
    ("plan", "target=null"): "allowed: box, ec2",
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


ERRORS = {
    "aws sso login": NoCredentialsError(),
    "AWS_PROFILE": ProfileNotFound(profile="nobody"),
    "target.region": NoRegionError(),
    "check the network": EndpointConnectionError(endpoint_url="https://nowhere"),
    "nobody can be asked here": EOFError("Enter MFA code"),
    "credential_process": json.JSONDecodeError("Expecting value", "hello", 0),
    "a whole address": ValueError("Invalid endpoint: localhost:99"),
    "it didn't come from AWS": ResponseParserError("not well-formed"),
}


@pytest.mark.parametrize("remedy", ERRORS)
def test_whatever_goes_wrong_before_aws_answers_is_one_line_with_a_remedy(remedy):
    line = str(explained(ERRORS[remedy], "ec2:RunInstances"))
    assert remedy in line and "\n" not in line


class WebPage(BaseHTTPRequestHandler):
    """What answers in the place of AWS in a hotel."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        page = b"<html><body><p>Welcome</p></body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815 (http.server's names)

    def log_message(self, *arguments: object) -> None:
        pass


PROFILES = """
[profile keys]
[profile mfa]
role_arn = arn:aws:iam::123456789012:role/x
source_profile = keys
mfa_serial = arn:aws:iam::123456789012:mfa/me
[profile process]
credential_process = echo hello
"""
KEYS = "[keys]\naws_access_key_id = a\naws_secret_access_key = b\n"
# Of a user's machine: its profile, the verb, and what is said of it.
MACHINES = {
    "MFA": ("mfa", ["status"], "asks for an MFA code, and nobody can be asked here"),
    "no JSON": ("process", ["status"], "correct credential_process"),
    "no scheme": ("keys", ["status"], "Invalid endpoint: localhost:99"),
    "a page for XML": ("keys", ["up", "--yes"], "cloudformation:DescribeStacks: the answer is"),
    "a page for JSON": ("keys", ["prices", "--refresh"], "the answer is a web page"),
}


@pytest.mark.parametrize("kind", MACHINES)
def test_a_users_machine_that_is_not_ready_is_one_line(kind, tmp_path):
    profile, verb, said = MACHINES[kind]
    (tmp_path / "config").write_text(PROFILES)
    (tmp_path / "credentials").write_text(KEYS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), WebPage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    if kind == "no scheme":
        address = "localhost:99"
    code, printed = launch(
        *verb,
        AWS_CONFIG_FILE=str(tmp_path / "config"),
        AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"),
        AWS_PROFILE=profile,
        AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=address,
    )
    server.shutdown()
    server.server_close()
    assert code == MISTAKE and said in printed and len(printed.splitlines()) == 1, printed


def test_what_an_mfa_code_was_given_for_is_where_the_aws_cli_keeps_it(tmp_path, monkeypatch):
    """The CLI's own session, of an hour ago: nobody is asked for another code."""
    (tmp_path / "config").write_text(PROFILES)
    (tmp_path / "credentials").write_text(KEYS)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mfa")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    given = {
        "RoleArn": "arn:aws:iam::123456789012:role/x",
        "SerialNumber": "arn:aws:iam::123456789012:mfa/me",
    }
    key = hashlib.sha1(json.dumps(given, sort_keys=True).encode()).hexdigest()
    session = {
        "AccessKeyId": "ASIACLI",
        "SecretAccessKey": "s",
        "SessionToken": "t",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{key}.json").write_text(json.dumps({"Credentials": session}))
    monkeypatch.setattr("launch.cloud.session.CLI_CACHE", tmp_path / "cache")
    aws = Aws("packhorse", "us-east-1")
    assert aws.has_credentials()
    assert aws.client("sts")._request_signer._credentials.access_key == "ASIACLI"
