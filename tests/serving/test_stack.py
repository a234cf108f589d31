"""The template as AWS's and security's linters see it, and what the issue asks of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cloudsplaining.scan.policy_document import PolicyDocument
from parliament import analyze_policy_string

from launch.cloud.cloudformation import load
from serving.adapters import lambda_proxy
from serving.deploy import image
from serving.deploy.release import NO_ACCOUNT, TEMPLATE, references, resources, template

NAME = "packhorse-serving"
GROUP = f"arn:aws:logs:us-east-1:{NO_ACCOUNT}:log-group"
ARN = {
    "EndpointLogs": f"{GROUP}:/aws/sagemaker/Endpoints/{NAME}:*",
    "FunctionLogs": f"{GROUP}:/aws/lambda/{NAME}:*",
    "BuildLogs": f"{GROUP}:/aws/codebuild/{NAME}-image:*",
    "Repository": f"arn:aws:ecr:us-east-1:{NO_ACCOUNT}:repository/{NAME}-image",
}
PSEUDO = {
    "AWS::StackName": NAME,
    "AWS::Region": "us-east-1",
    "AWS::AccountId": NO_ACCOUNT,
    "AWS::Partition": "aws",
}
DEFAULTS = {name: str(body.get("Default", "")) for name, body in template()["Parameters"].items()}
VALUES = DEFAULTS | {
    "ModelArn": "arn:aws:s3:::dogs/serving/model.tar.gz",
    "ImageArn": f"arn:aws:ecr:us-east-1:{NO_ACCOUNT}:repository/dogs",
    "Bucket": "dogs",
    "SourceFolder": f"serving/{NAME}/image/",
}


def resolve(node):
    """A part of the template with its functions carried out, Fn::If taken as true."""
    if isinstance(node, list):
        return [resolve(value) for value in node]
    if not isinstance(node, dict):
        return node
    [(key, value), *rest] = node.items()
    if not rest and key == "Ref":
        return VALUES[value]
    if not rest and key == "Fn::Sub":
        return re.sub(r"\$\{([\w:]+)\}", lambda part: (PSEUDO | VALUES)[part[1]], value)
    if not rest and key == "Fn::GetAtt":
        return ARN[value[0]]
    if not rest and key == "Fn::If":
        return resolve(value[1])
    return {name: resolve(inner) for name, inner in node.items()}


def policies():
    for role in ("EndpointRole", "FunctionRole"):
        for policy in resolve(template()["Resources"][role]["Properties"]["Policies"]):
            yield pytest.param(policy["PolicyDocument"], id=f"{role}-{policy['PolicyName']}")
    [policy] = resolve(load(image.TEMPLATE)["Resources"]["BuildRole"]["Properties"]["Policies"])
    yield pytest.param(policy["PolicyDocument"], id="BuildRole")


def properties(name):
    return template()["Resources"][name]["Properties"]


@pytest.mark.parametrize("path", [TEMPLATE, image.TEMPLATE], ids=lambda path: path.name)
def test_cfn_lint_finds_nothing(path):
    done = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), "--include-checks", "W", "--", path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("policy", list(policies()))
def test_the_policy_linters_find_nothing(policy):
    findings = analyze_policy_string(json.dumps(policy)).findings
    assert [finding.issue for finding in findings] == []
    document = PolicyDocument(policy)
    assert document.allows_privilege_escalation == []
    assert document.allows_data_exfiltration_actions == []
    assert document.infrastructure_modification == []


@pytest.mark.parametrize("policy", list(policies()))
def test_a_star_stands_only_where_the_action_has_no_resource_level(policy):
    for statement in policy["Statement"]:
        actions = (
            [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        )
        assert not any("*" in action for action in actions)
        if statement["Resource"] == "*":
            assert actions in (["ecr:GetAuthorizationToken"], ["cloudwatch:PutMetricData"])
            assert (
                actions != ["cloudwatch:PutMetricData"]
                or "cloudwatch:namespace" in statement["Condition"]["StringEquals"]
            )
        else:
            assert "*" not in statement["Resource"].removesuffix(":*").removesuffix(
                "/captured/*"
            ).removesuffix("/image/*")


def test_the_function_may_call_one_endpoint_and_nothing_can_make_a_log_group():
    text = json.dumps(resolve(properties("FunctionRole")["Policies"]))
    assert (
        '"sagemaker:InvokeEndpoint", '
        f'"Resource": "arn:aws:sagemaker:us-east-1:{NO_ACCOUNT}:endpoint/{NAME}"' in text
    )
    assert "CreateLogGroup" not in TEMPLATE.read_text()


def test_the_write_ups_numbers_are_the_defaults():
    wanted = {
        "MinInstances": "1",
        "MaxInstances": "3",
        "InvocationsPerInstance": "25",
        "ScaleOutCooldown": "180",
        "ScaleInCooldown": "300",
        "ProvisionedConcurrency": "3",
        "FunctionUrl": "off",
    }
    assert wanted.items() <= DEFAULTS.items()
    tracking = properties("ScalingPolicy")["TargetTrackingScalingPolicyConfiguration"]
    assert tracking == {
        "PredefinedMetricSpecification": {
            "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"
        },
        "TargetValue": {"Ref": "InvocationsPerInstance"},
        "ScaleOutCooldown": {"Ref": "ScaleOutCooldown"},
        "ScaleInCooldown": {"Ref": "ScaleInCooldown"},
    }
    target = properties("ScalableTarget")
    assert (target["MinCapacity"], target["MaxCapacity"]) == (
        {"Ref": "MinInstances"},
        {"Ref": "MaxInstances"},
    )
    assert target["ScalableDimension"] == "sagemaker:variant:DesiredInstanceCount"
    warm = properties("Alias")["ProvisionedConcurrencyConfig"]["Fn::If"]
    assert warm[:2] == [
        "Warm",
        {"ProvisionedConcurrentExecutions": {"Ref": "ProvisionedConcurrency"}},
    ]


def test_an_update_is_blue_green_and_rolled_back_by_both_alarms():
    deployment = properties("Endpoint")["DeploymentConfig"]
    assert deployment["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"][
        "WaitIntervalInSeconds"
    ] == {"Ref": "BakeSeconds"}
    alarms = [
        alarm["AlarmName"]["Ref"] for alarm in deployment["AutoRollbackConfiguration"]["Alarms"]
    ]
    assert alarms == ["ErrorAlarm", "LatencyAlarm"]
    for name in ("Model", "EndpointConfig"):
        assert "EndpointRelease" in set(references(properties(name))), (
            "it can only be replaced under another name"
        )
    assert properties("Version")["Description"] == {
        "Ref": "FunctionRelease"
    } and "FunctionRelease" in set(references(properties("Function")))


def test_the_url_is_off_signed_and_of_the_alias():
    url = properties("Url")
    assert (url["AuthType"], url["Qualifier"]) == ("AWS_IAM", "live")
    assert "Url" not in resources(DEFAULTS) and "Url" in resources(DEFAULTS | {"FunctionUrl": "on"})


def test_each_setting_makes_just_what_it_needs():
    everything = set(template()["Resources"])
    asked_for = {"Url", "Email", "Board"}
    assert set(resources(DEFAULTS)) == everything - asked_for
    assert set(resources(DEFAULTS | {"MaxInstances": "1"})) == everything - asked_for - {
        "ScalableTarget",
        "ScalingPolicy",
    }
    function = {"FunctionLogs", "FunctionRole", "Function", "Version", "Alias"}
    watched = {"FunctionFaults", "FunctionAlarm", "Topic"}
    assert set(resources(DEFAULTS | {"Door": "lambda"})) == function | watched
    more = {"AlarmEmail": "a@b.example", "Dashboard": "on"}
    assert set(resources(DEFAULTS | more)) - set(resources(DEFAULTS)) == {"Email", "Board"}
    theirs = {"AlarmTopic": "arn:aws:sns:us-east-1:123456789012:ours", "AlarmEmail": "a@b.example"}
    assert not {"Topic", "Email"} & set(resources(DEFAULTS | theirs))


def test_every_alarm_tells_somebody_and_the_functions_faults_are_counted():
    alarms = [
        body["Properties"]
        for body in template()["Resources"].values()
        if body["Type"] == "AWS::CloudWatch::Alarm"
    ]
    topic = [{"Fn::If": ["HasOwnTopic", {"Ref": "Topic"}, {"Ref": "AlarmTopic"}]}]
    assert len(alarms) == 3
    assert all(alarm["AlarmActions"] == alarm["OKActions"] == topic for alarm in alarms)
    [made] = properties("FunctionFaults")["MetricTransformations"]
    [watched] = [
        metric["MetricStat"]["Metric"]
        for metric in properties("FunctionAlarm")["Metrics"]
        if metric["Id"] == "faults"
    ]
    assert watched["Namespace"] == made["MetricNamespace"]
    assert watched["MetricName"] == made["MetricName"]
    assert properties("Function")["LoggingConfig"]["LogFormat"] == "JSON"  # what the filter reads


def test_the_dashboard_is_json():
    body = properties("Board")["DashboardBody"]["Fn::Sub"]
    assert len(json.loads(body)["widgets"]) == 4


def test_the_endpoint_has_a_network_only_where_it_fetches():
    assert properties("Model")["EnableNetworkIsolation"] == {
        "Fn::If": ["EndpointFetches", False, True]
    }


def test_the_function_answers_before_its_time_is_up():
    proxy = lambda_proxy
    longest = (
        proxy.FETCH_SECONDS + proxy.ATTEMPTS * (proxy.CONNECT_SECONDS + proxy.ENDPOINT_SECONDS) + 1
    )
    assert longest < 29 < properties("Function")["Timeout"]


def test_every_parameter_is_used_and_described():
    used = set(references(template()["Resources"]))
    for name, body in template()["Parameters"].items():
        assert body["Description"]
        assert name in used | set(references(list(template()["Conditions"].values()))), name
    assert len(TEMPLATE.read_bytes()) < 51_200  # CloudFormation's limit for a template in a call


def test_every_number_has_two_bounds():
    for name, body in template()["Parameters"].items():
        if body["Type"] == "Number" and "AllowedValues" not in body:
            assert body["MinValue"] <= body["Default"] <= body["MaxValue"] < 10**7, name
