"""The audit, against a moto server: an account with the write-up's faults, and a tidy one."""

import json
import os
import urllib.request
from datetime import UTC, datetime, timedelta

import boto3
import pytest
from moto.awslambda.responses import LambdaResponse
from moto.awslambda.urls import url_paths
from moto.backends import get_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from moto.server import ThreadedMotoServer

from launch import __main__ as launch
from launch.audit.account import CALLS, needed_policy
from launch.audit.finding import RULES
from launch.verbs.audit import FOUND
from serving import __main__ as serving
from tests.conftest import PROJECT
from tests.launch.conftest import Forked, running
from tests.launch.documents import finish_bucket, rewrite_role_policies
from tests.launch.whole import WHOLE
from tests.packages import make_contents, make_network
from trainer.common.errors import MISTAKE, OK
from trainer.results.package import build

REGION = "us-east-1"
ACCOUNT = "123456789012"


def month_ago() -> datetime:
    return datetime.now(UTC) - timedelta(days=30)


WARM: dict[str, list[dict]] = {}  # provisioned concurrency by function, which moto does not know


def list_provisioned_concurrency_configs(self) -> str:
    return json.dumps({"ProvisionedConcurrencyConfigs": WARM.get(self.path.split("/")[-2], [])})


class Analyzer:
    """What moto lacks of IAM Access Analyzer: ValidatePolicy, in front of moto's server."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.denied = False
        self.findings: dict[str, dict] = {}  # by a part of the policy's text
        self.asked: list[str] = []

    def validate(self, environ, start):
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        text = json.loads(body)["policyDocument"]
        self.asked.append(text)
        if self.denied:
            headers = [("x-amzn-ErrorType", "AccessDeniedException")]
            start("403 Forbidden", headers)
            return [b'{"message": "not authorized to perform: access-analyzer:ValidatePolicy"}']
        start("200 OK", [("Content-Type", "application/json")])
        findings = [finding for part, finding in self.findings.items() if part in text]
        return [json.dumps({"findings": findings}).encode()]


ANALYZER = Analyzer()


def finding_of_aws(kind: str, code: str) -> dict:
    return {
        "findingType": kind,
        "issueCode": code,
        "findingDetails": "it says why",
        "learnMoreLink": "https://docs.aws.amazon.com/x",
        "locations": [],
    }


@pytest.fixture(scope="module")
def moto():
    plain = DomainDispatcherApplication.__call__

    def with_analyzer(self, environ, start):
        if environ["PATH_INFO"] == "/policy/validation":
            return ANALYZER.validate(environ, start)
        return plain(self, environ, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainDispatcherApplication, "__call__", with_analyzer)
        method = list_provisioned_concurrency_configs
        patch.setattr(LambdaResponse, method.__name__, method, raising=False)
        path = r"functions/(?P<function_name>[\w_-]+)/provisioned-concurrency$"
        patch.setitem(url_paths, rf"{{0}}/(?P<api_version>[^/]+)/{path}", LambdaResponse.dispatch)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        server.stop()


def forget() -> None:
    """An account with nothing in it."""
    request = urllib.request.Request(
        f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST"
    )
    urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture
def aws(moto, monkeypatch):
    """boto3 clients of a fresh account, which the audit sees too."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "ENDPOINT_URL": moto,
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "DEFAULT_REGION": REGION,
        "CONFIG_FILE": "/dev/null",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    forget()
    WARM.clear()
    ANALYZER.reset()
    return boto3.client


def audit(capsys, *arguments: str) -> tuple[int, dict]:
    code = launch.main(["audit", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def allow(action, resource="*", **condition) -> dict:
    return {"Effect": "Allow", "Action": action, "Resource": resource} | (
        {"Condition": condition} if condition else {}
    )


def policy(*statements: dict) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def trust(principal, **condition) -> str:
    statement = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
    return policy(statement | ({"Condition": condition} if condition else {}))


def service(*names: str) -> dict:
    return {"Service": [f"{name}.amazonaws.com" for name in names]}


OURS = {"StringEquals": {"aws:SourceAccount": ACCOUNT}}


def make_role(iam, name, principal, *statements, condition=None, attached=()):
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust(principal, **(condition or {})))
    if statements:
        iam.put_role_policy(RoleName=name, PolicyName="own", PolicyDocument=policy(*statements))
    for arn in attached:
        iam.attach_role_policy(RoleName=name, PolicyArn=arn)
    return f"arn:aws:iam::{ACCOUNT}:role/{name}"


def make_faulty(aws) -> None:
    """What the write-up found by hand, and what else such accounts have."""
    iam, sagemaker, functions, ec2 = aws("iam"), aws("sagemaker"), aws("lambda"), aws("ec2")
    # the write-up's: full access for SageMaker's role, `*` for the function's
    training = make_role(
        iam,
        "sm-training",
        service("sagemaker"),
        condition=OURS,
        attached=["arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"],
    )
    caller = make_role(
        iam,
        "caller",
        service("lambda"),
        allow("sagemaker:InvokeEndpoint"),
        attached=["arn:aws:iam::aws:policy/AWSLambda_FullAccess"],
    )
    make_role(
        iam,
        "sm-admin",
        service("sagemaker"),
        condition=OURS,
        attached=["arn:aws:iam::aws:policy/AdministratorAccess"],
    )
    make_role(iam, "sm-root", service("sagemaker"), allow("*"), condition=OURS)
    make_role(
        iam,
        "sm-wild",
        service("sagemaker"),
        allow(["sagemaker:*", "s3:GetObject"], f"arn:aws:s3:::x/{ACCOUNT}"),
        condition=OURS,
    )
    make_role(iam, "sm-passer", service("sagemaker"), allow("iam:PassRole"), condition=OURS)
    make_role(iam, "sm-all-in-one", service("sagemaker", "lambda", "ec2"), condition=OURS)
    make_role(
        iam,
        "sm-not",
        service("sagemaker"),
        {"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"},
        condition=OURS,
    )
    make_role(
        iam,
        "sm-risky",
        service("sagemaker"),
        allow("s3:GetObject", "arn:aws:s3:::risky/*"),
        condition=OURS,
    )
    ANALYZER.findings["arn:aws:s3:::risky"] = finding_of_aws("SECURITY_WARNING", "RISKY")
    make_role(iam, "sm-forgotten", service("sagemaker"), condition=OURS)
    backend = get_backend("iam")[ACCOUNT]["aws"]
    next(role for role in backend.roles.values() if role.name == "sm-forgotten").create_date = (
        month_ago() - timedelta(days=200)
    )

    sagemaker.create_notebook_instance(
        NotebookInstanceName="lab", InstanceType="ml.t3.medium", RoleArn=training
    )
    lab = next(iter(get_backend("sagemaker")[ACCOUNT][REGION].notebook_instances.values()))
    lab.creation_time = lab.last_modified_time = month_ago()
    make_endpoint(sagemaker, training, "forgotten", "ml.g4dn.xlarge", count=2)
    get_backend("sagemaker")[ACCOUNT][REGION].endpoints[
        "forgotten"
    ].creation_time = month_ago().strftime("%Y-%m-%d %H:%M:%S")
    functions.create_function(
        FunctionName="predict",
        Runtime="python3.13",
        Role=caller,
        Handler="a.b",
        Code={"ZipFile": b"PK\x05\x06" + bytes(18)},
        Publish=True,
    )
    alias = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:predict:live"
    WARM["predict"] = [
        {
            "FunctionArn": alias,
            "RequestedProvisionedConcurrentExecutions": 3,
            "LastModified": f"{month_ago():%Y-%m-%dT%H:%M:%S}+0000",
        }
    ]

    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    started = ec2.run_instances(
        ImageId=image,
        InstanceType="g4dn.xlarge",
        MinCount=2,
        MaxCount=2,
    )
    idle, stopped = (entry["InstanceId"] for entry in started["Instances"])
    ec2.stop_instances(InstanceIds=[stopped])
    backend = get_backend("ec2")[ACCOUNT][REGION]
    backend.get_instance(idle).launch_time = month_ago().strftime("%Y-%m-%dT%H:%M:%S.000Z")
    tags = [{"ResourceType": "volume", "Tags": [{"Key": "project", "Value": "dogs"}]}]
    lost = ec2.create_volume(
        AvailabilityZone=f"{REGION}a", Size=500, Encrypted=True, TagSpecifications=tags
    )["VolumeId"]
    backend.volumes[lost].create_time = month_ago()
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    ec2.create_tags(Resources=[address], Tags=[{"Key": "project", "Value": "dogs"}])
    aws("logs").create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")


def make_endpoint(sagemaker, role, name, kind, count=1) -> None:
    sagemaker.create_model(
        ModelName=name, ExecutionRoleArn=role, PrimaryContainer={"Image": "image"}
    )
    variant = {
        "VariantName": "main",
        "ModelName": name,
        "InstanceType": kind,
        "InitialInstanceCount": count,
        "InitialVariantWeight": 1,
    }
    sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)


# Rule: what the finding must name. Those that the write-up found by hand come first.
SEEDED = {
    "role/full-access": ["sm-training", "caller"],
    "role/wildcard-resource": ["caller"],
    "role/wildcard-action": ["sm-wild"],
    "role/everything": ["sm-admin", "sm-root"],
    "role/pass-role": ["sm-passer"],
    "role/shared": ["sm-all-in-one"],
    "role/not-action": ["sm-not"],
    "role/unused": ["sm-forgotten"],
    "notebook/idle": ["lab"],
    "endpoint/idle": ["forgotten"],
    "function/warm-unused": ["3 environments"],
    "instance/idle": ["g4dn.xlarge"],
    "instance/stopped": ["i-"],
    "volume/unattached": ["500 GB"],
    "address/unused": ["address"],
    "logs/for-ever": ["/aws/sagemaker/TrainingJobs"],
    "role/aws-warning": ["sm-risky"],
}


def test_every_seeded_fault_is_found(aws, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    forget()
    make_faulty(aws)
    code, report = audit(capsys, "--html", str(tmp_path / "audit.html"))
    assert code == FOUND
    found = {}
    for finding in report["findings"]:
        found.setdefault(finding["rule"], []).append(f"{finding['resource']} {finding['what']}")
        assert finding["why"] and finding["change"]
    missed = {
        (rule, name)
        for rule, names in SEEDED.items()
        for name in names
        if not any(name in text for text in found.get(rule, []))
    }
    assert not missed, report
    assert set(SEEDED) == set(RULES), "a rule without a fault to find"
    assert next(finding for finding in report["findings"] if finding["rule"] == "endpoint/idle")[
        "dollars_a_month"
    ] == pytest.approx(2 * 0.7364 * 730)
    page = (tmp_path / "audit.html").read_text()
    assert "sm-training" in page and "<script" not in page


def test_a_finding_names_the_exact_change(aws, capsys):
    make_role(
        aws("iam"),
        "caller",
        service("lambda"),
        allow(["sagemaker:InvokeEndpoint", "sagemaker:ListEndpoints"]),
    )
    make_endpoint(
        aws("sagemaker"),
        make_role(aws("iam"), "serving", service("sagemaker"), condition=OURS),
        "dogs",
        "ml.m5.large",
    )
    _, report = audit(capsys)
    [finding] = [
        finding for finding in report["findings"] if finding["rule"] == "role/wildcard-resource"
    ]
    command, document = finding["change"].split(" --policy-document ")
    assert command == "aws iam put-role-policy --role-name caller --policy-name own"
    assert json.loads(document.strip("'"))["Statement"] == [
        allow(
            ["sagemaker:InvokeEndpoint"], [f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/dogs"]
        ),
        allow(["sagemaker:ListEndpoints"]),
    ]
    aws("iam").put_role_policy(
        RoleName="caller", PolicyName="own", PolicyDocument=document.strip("'")
    )
    assert "role/wildcard-resource" not in [
        finding["rule"] for finding in audit(capsys)[1]["findings"]
    ]


NOT_IAM = {"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"}


def change_of(report: dict, rule: str) -> str:
    [change] = [each["change"] for each in report["findings"] if each["rule"] == rule]
    return change


def document_of(change: str) -> dict:
    return json.loads(change.split(" --policy-document ")[1].strip("'"))


def test_what_allows_all_but_a_list_gets_no_policy_of_every_action(aws, capsys):
    """A role with NotAction once gave three changes of a megabyte, with Action beside NotAction."""
    make_role(
        aws("iam"),
        "odd",
        service("sagemaker"),
        NOT_IAM,
        allow("sagemaker:InvokeEndpoint"),
        condition=OURS,
    )
    _, report = audit(capsys)
    rules = [finding["rule"] for finding in report["findings"]]
    assert sorted(rules) == ["role/not-action", "role/wildcard-resource"]
    assert change_of(report, "role/not-action").startswith("name the actions and resources in")
    kept, narrowed = document_of(change_of(report, "role/wildcard-resource"))["Statement"]
    assert kept == NOT_IAM
    endpoint = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/ENDPOINTNAME"
    assert narrowed == allow(["sagemaker:InvokeEndpoint"], [endpoint])


def test_a_statement_that_is_split_keeps_its_sid_once(aws, capsys):
    both = allow(["sagemaker:InvokeEndpoint", "sagemaker:ListEndpoints"]) | {"Sid": "Call"}
    make_role(aws("iam"), "caller", service("lambda"), both)
    statements = document_of(change_of(audit(capsys)[1], "role/wildcard-resource"))["Statement"]
    assert [statement.get("Sid") for statement in statements] == ["Call", None]


def test_a_change_that_nobody_could_read_is_said_and_not_shown(aws, capsys):
    every = [f"sagemaker:{verb}*" for verb in ("Create", "Delete", "Update", "Describe")]
    make_role(aws("iam"), "wide", service("sagemaker"), allow(every), condition=OURS)
    change = change_of(audit(capsys)[1], "role/wildcard-resource")
    assert "the exact policy is not shown: it would have " in change and len(change) < 400


def test_a_change_that_aws_would_refuse_is_not_shown(aws, capsys):
    make_role(aws("iam"), "caller", service("lambda"), allow("sagemaker:InvokeEndpoint"))
    # Of the policy that is proposed, not of the one that is there.
    ANALYZER.findings["ENDPOINTNAME"] = finding_of_aws("ERROR", "INVALID")
    change = change_of(audit(capsys)[1], "role/wildcard-resource")
    assert "not shown: AWS would refuse it: it says why" in change


def test_without_leave_to_ask_aws_a_policy_is_checked_here_and_that_is_said_once(aws, capsys):
    for name in ("one", "two"):
        make_role(aws("iam"), name, service("lambda"), allow("sagemaker:InvokeEndpoint"))
    ANALYZER.denied = True
    code, report = audit(capsys)
    assert [entry.split(": ")[0] for entry in report["unread"]] == [
        "access-analyzer:ValidatePolicy"
    ]
    assert code == FOUND and len(ANALYZER.asked) == 1
    changes = [each["change"] for each in report["findings"]]
    assert len(changes) == 2 and all("ENDPOINTNAME" in change for change in changes)


def test_what_works_is_not_idle(aws, capsys):
    iam, sagemaker, cloudwatch = aws("iam"), aws("sagemaker"), aws("cloudwatch")
    make_endpoint(
        sagemaker,
        make_role(iam, "serving", service("sagemaker"), condition=OURS),
        "busy",
        "ml.m5.large",
    )
    get_backend("sagemaker")[ACCOUNT][REGION].endpoints[
        "busy"
    ].creation_time = month_ago().strftime("%Y-%m-%d %H:%M:%S")
    assert "endpoint/idle" in [finding["rule"] for finding in audit(capsys)[1]["findings"]]
    dimensions = [
        {"Name": "EndpointName", "Value": "busy"},
        {"Name": "VariantName", "Value": "main"},
    ]
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    call = {
        "MetricName": "Invocations",
        "Dimensions": dimensions,
        "Value": 1,
        "Timestamp": hour_ago,
    }
    cloudwatch.put_metric_data(Namespace="AWS/SageMaker", MetricData=[call])
    assert "endpoint/idle" not in [finding["rule"] for finding in audit(capsys)[1]["findings"]]


def test_only_machine_learning_unless_all_is_asked_for(aws, capsys):
    make_role(aws("iam"), "web", service("ecs"), allow("*"))
    assert audit(capsys)[1]["findings"] == []
    code, report = audit(capsys, "--all")
    resources = {finding["resource"] for finding in report["findings"]}
    assert code == FOUND and resources == {f"arn:aws:iam::{ACCOUNT}:role/web"}


def test_what_may_not_be_seen_is_said_and_fails(aws, cloud, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    cloud.client("logs").create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")
    cloud.post("/strict/refuse", operation="DescribeVolumes", code="UnauthorizedOperation")
    cloud.post(
        "/strict/refuse",
        operation="ListFunctions",
        code="AccessDenied",
        message="User: guest is not authorized to perform: lambda:ListFunctions",
    )
    code, report = audit(capsys)
    assert [entry.split(":")[1] for entry in report["unread"]] == [
        "DescribeVolumes",
        "ListFunctions",
    ]
    assert code == FOUND and [finding["rule"] for finding in report["findings"]] == [
        "logs/for-ever"
    ], "the rest is still judged"


def test_what_up_and_deploy_make_has_nothing_above_low(aws, capsys, monkeypatch, tmp_path):
    build(make_network(), make_contents(tmp_path / "pictures"), tmp_path / "model.tar.gz")
    with running(tmp_path / "calls.jsonl", WHOLE) as cloud:
        monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
        image = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/dogs/serving:1"
        for main, command in (
            (launch.main, ["up", "--yes", "--every", "0.05"]),
            (serving.main, ["deploy", str(tmp_path / "model.tar.gz"), "--image", image, "--yes"]),
        ):
            done = Forked(main, command, PROJECT, cloud.environment())
            output, _ = done.communicate()
            assert done.returncode == OK, output
        finish_bucket(cloud)
        rewrite_role_policies(cloud)
        code, report = audit(capsys)
    assert code == OK and report["unread"] == []
    assert [finding for finding in report["findings"] if finding["severity"] != "low"] == []
    assert not any(
        finding["rule"].startswith(("role/", "function/", "endpoint/"))
        for finding in report["findings"]
    )


def test_the_exit_code_follows_the_threshold(aws, capsys):
    aws("logs").create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")
    assert audit(capsys)[0] == OK
    assert audit(capsys, "--fail-on", "low")[0] == FOUND
    assert launch.main(["audit", "train.epochs=3"]) == MISTAKE


def test_it_prints_the_policy_it_needs_without_an_account(capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert launch.main(["audit", "--policy"]) == OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == needed_policy()
    actions = printed["Statement"][0]["Action"]
    assert actions and all(
        action.split(":")[1].startswith(("Get", "List", "Describe", "Validate"))
        for action in actions
    )
    assert not {"s3:GetObject", "logs:GetLogEvents", "lambda:GetFunction"} & set(actions), (
        "settings, never data or code"
    )
    assert {action for action, _ in CALLS.values() if action} == set(actions)
