"""`python -m launch policy`: each part's policy, whole, with a reason for each statement."""

import json

import pytest

from launch import __main__ as launch
from launch.cloud.account_stack import Place
from launch.verbs.policy import PARTS, permissions
from trainer.common.errors import OK

ACCOUNT = "123456789012"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("part", PARTS)
def test_each_statement_has_a_reason_and_reads_as_iam_reads_it(part, capsys):
    assert launch.main(["policy", "--for", part, "--account", ACCOUNT]) == OK
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks[0] == f"{part}: {PARTS[part]}"
    for block, statement in zip(
        blocks[1:], permissions(part, Place("packhorse", ACCOUNT, "us-east-1")), strict=True
    ):
        reason, document = block.split("\n", 1)
        assert reason.removeprefix("# ").endswith(".") and len(reason) > 15
        assert json.loads(document) == statement.document
    text = "".join(blocks)
    assert "${" not in text and "!Ref" not in text and ("123456789012" in text or part == "audit")


@pytest.mark.parametrize("part", PARTS)
def test_json_is_the_policy_alone(part, capsys):
    assert launch.main(["policy", "--for", part, "--json"]) == OK
    policy = json.loads(capsys.readouterr().out)
    assert policy["Version"] == "2012-10-17" and len(
        {statement["Sid"] for statement in policy["Statement"]}
    ) == len(policy["Statement"])
    for statement in policy["Statement"]:
        actions = (
            statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        )
        assert statement["Effect"] == "Allow" and not any("*" in action for action in actions)


def test_the_project_and_region_are_the_users(capsys):
    assert (
        launch.main(
            [
                "policy",
                "--for",
                "ec2",
                "--json",
                "target.project=dogs",
                "target.region=eu-west-1",
                "--account",
                ACCOUNT,
            ]
        )
        == OK
    )
    assert f"arn:aws:s3:::dogs-{ACCOUNT}-eu-west-1/runs/*" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main(["policy", "--for", "everything"])
    assert stopped.value.code == 2 and "launcher" in capsys.readouterr().err
