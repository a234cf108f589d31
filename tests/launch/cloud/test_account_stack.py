"""The account stack's template and policies, by others' linters and by what AWS documents."""

import json
import re
import subprocess
import sys
from pathlib import Path

import parliament
import pytest
import yaml
from cloudsplaining.scan.policy_document import PolicyDocument
from policy_sentry.querying.actions import get_actions_that_support_wildcard_arns_only

from launch.cloud.account_stack import DEPLOYER, PARTS, TEMPLATE, Place, Statement, permissions
from tests.launch.permissions import PARAMETERS

MANAGED_POLICY = 6144  # characters that IAM allows
ROLE_POLICIES = 10240
# parliament wants all kinds of resources of RunInstances in one statement, and an account in the
# ARN of AWS's own SSM parameters, which has none.
MISJUDGED = {
    "RESOURCE_MISMATCH": (
        "'ec2:RunInstances'",
        "'ssm:GetParameter'",
        "'servicequotas:GetServiceQuota'",
    )
}
CASES = [("packhorse", "us-east-1"), ("a-project-of-twentyy", "ap-southeast-1")]


def document(statements: list[Statement]) -> dict[str, object]:
    return {"Version": "2012-10-17", "Statement": [statement.document for statement in statements]}


def all_statements(
    part: str, project: str = "packhorse", region: str = "us-east-1"
) -> list[Statement]:
    return permissions(part, Place(project, "123456789012", region, PARAMETERS))


def test_cfn_lint_finds_nothing():
    command = Path(sys.executable).with_name("cfn-lint")
    templates = [TEMPLATE, DEPLOYER]
    done = subprocess.run(
        [command, "--include-checks", "I", "--", *templates], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_parliament_finds_nothing(part):
    policy = parliament.analyze_policy_string(json.dumps(document(all_statements(part))))
    wrong = [
        str(finding)
        for finding in policy.findings
        if not any(action in str(finding.detail) for action in MISJUDGED.get(finding.issue, ()))
    ]
    assert wrong == []


@pytest.mark.parametrize("part", PARTS)
def test_cloudsplaining_finds_nothing_but_what_a_launcher_is_for(part):
    found = PolicyDocument(document(all_statements(part)))
    assert found.allows_privilege_escalation == []
    assert found.service_wildcard == []
    assert found.infrastructure_modification == [], "changes to anything on *"
    assert list(found.allows_data_exfiltration_actions) == []


@pytest.mark.parametrize("part", PARTS)
def test_only_actions_that_know_no_resources_are_granted_on_all(part):
    for statement in all_statements(part):
        assert not any("*" in action for action in statement.actions)
        if "*" in statement.resources:
            for action in statement.actions:
                anywhere = {
                    name.lower()
                    for name in get_actions_that_support_wildcard_arns_only(action.split(":")[0])
                }
                assert action.lower() in anywhere, action


@pytest.mark.parametrize("part", PARTS)
def test_each_statement_says_why_it_is_there(part):
    statements = all_statements(part)
    assert len({statement.sid for statement in statements}) == len(statements)
    assert all(
        len(statement.reason) > 20 and statement.reason.endswith(".") for statement in statements
    )


@pytest.mark.parametrize(("project", "region"), CASES)
def test_the_policies_are_as_short_as_iam_allows(project, region):
    statements = {
        statement.sid: statement for statement in all_statements("launcher", project, region)
    }
    machines = list(statements).index("GiveRoleToEc2")
    for part in (list(statements.values())[:machines], list(statements.values())[machines:]):
        assert len(json.dumps(document(part), separators=(",", ":"))) <= MANAGED_POLICY
    for part in ("training", "ec2", "notebook"):
        assert (
            len(json.dumps(document(all_statements(part, project, region)), separators=(",", ":")))
            <= ROLE_POLICIES
        )


def test_roles_are_passed_to_one_service_each():
    passing = [
        statement
        for part in PARTS
        for statement in all_statements(part)
        if "iam:PassRole" in statement.actions
    ]
    assert passing
    for statement in passing:
        assert statement.document["Condition"]["StringEquals"]["iam:PassedToService"] in (
            "sagemaker.amazonaws.com",
            "ec2.amazonaws.com",
        )
        assert all("*" not in resource for resource in statement.resources)


def test_everything_that_can_have_a_tag_has_the_projects():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))
    untaggable = {
        "AWS::S3::BucketPolicy",
        "AWS::IAM::Policy",
        "AWS::IAM::ManagedPolicy",
        "AWS::IAM::InstanceProfile",
    }  # in CloudFormation
    for name, resource in yaml.load(TEMPLATE.read_text(), Loader)["Resources"].items():
        tagged = {"Key": "project", "Value": "Project"} in resource["Properties"].get("Tags", [])
        assert tagged != (resource["Type"] in untaggable), name


def test_checkpoints_that_were_replaced_cost_one_day_and_their_manifests_stay():
    """A run writes them every few minutes: kept for a month they cost as much as its machine."""
    text = re.sub(r"!(\w+)", "", Path(TEMPLATE).read_text())
    bucket = yaml.safe_load(text)["Resources"]["Bucket"]["Properties"]
    rules = {rule["Id"]: rule for rule in bucket["LifecycleConfiguration"]["Rules"]}
    rule = rules["checkpoints-that-were-replaced"]
    assert (rule["Prefix"], rule["Status"]) == ("runs/", "Enabled")
    assert rule["NoncurrentVersionExpiration"] == {"NoncurrentDays": 1}
    assert int(rule["ObjectSizeGreaterThan"]) >= 10000, "a manifest says when it was saved"
