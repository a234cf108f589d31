"""`python -m serving plan ... destroy` in forks, against moto behind tests/serving/aws.py."""

import contextlib
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

from serving import __main__ as command_line
from serving.deploy import bundle, image
from serving.deploy.release import (
    Place,
    Remote,
    _holds,
    build,
    idle_price,
    template,
    with_image,
)
from serving.package import load
from tests.conftest import PROJECT, wait_for
from tests.launch.conftest import Forked, running
from tests.serving.keys import make_key
from tests.serving.runtime import Endpoint, Function, Neighbour, Quiet, unpack
from trainer.common.errors import RESUME, UserError
from trainer.common.serving_code import FOR_HEIC, REQUIREMENTS

IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dogs/serving:1"
BUCKET = "packhorse-123456789012-us-east-1"
NAME = "packhorse-serving"
PLACE = Place(NAME, "packhorse", BUCKET, "123456789012")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    record = tmp_path_factory.mktemp("aws") / "calls.jsonl"
    with running(record, "tests.serving.aws") as cloud:
        yield cloud


@pytest.fixture
def cloud(server):
    """An account with nothing in it but the project's bucket."""
    server.reset()
    s3 = server.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    return server


@pytest.fixture
def serving(cloud):
    def serving(*arguments, **environment):
        """Exit code, standard output and standard error."""
        forked = Forked(
            command_line.main,
            [str(argument) for argument in arguments],
            PROJECT,
            cloud.environment() | environment,
            apart=True,
        )
        output, error = forked.communicate()
        return forked.returncode, output, error

    return serving


@pytest.fixture(scope="session")
def package(original):
    return original / "model.tar.gz"


@pytest.fixture(scope="session")
def other_package(package, tmp_path_factory):
    """A package with other bytes; what they unpack to does not matter here."""
    path = tmp_path_factory.mktemp("other") / "model.tar.gz"
    path.write_bytes(gzip.compress(gzip.decompress(package.read_bytes()), 1))
    return path


def calls_that_change(cloud):
    reads = ("Describe", "List", "Get", "Head", "Filter")
    return [call["operation"] for call in cloud.calls() if not call["operation"].startswith(reads)]


# --- the whole way ---


def test_from_nothing_to_service_to_a_new_model_to_nothing(
    cloud, serving, package, other_package, picture, tmp_path
):
    code, output, error = serving("plan", package, "--image", IMAGE)
    assert (code, error) == (0, "")
    assert "add      AWS::SageMaker::Endpoint" in output and re.search(
        r"\$83\.95  1 x ml\.m5\.large", output
    ), output
    assert calls_that_change(cloud) == ["CreateBucket", "PutBucketVersioning"], (
        "a plan changes nothing"
    )

    code, output, error = serving("deploy", package, "--image", IMAGE)
    assert code == 2 and "--yes" in error, "nobody was asked"
    code, output, error = serving("deploy", package, "--image", IMAGE, "--yes")
    assert code == 0, error + output
    first = _check_account(cloud)

    cloud.client("cloudwatch").put_metric_alarm(
        AlarmName=f"{NAME}-2-errors",  # of another deployment
        Namespace="AWS/SageMaker",
        MetricName="Invocation5XXErrors",
        Statistic="Sum",
        Period=60,
        EvaluationPeriods=1,
        Threshold=1,
        ComparisonOperator="GreaterThanThreshold",
    )
    code, output, error = serving("status")
    assert code == 0, error
    alarms = re.findall(r"^alarm +(.+): ", output, re.MULTILINE)
    assert sorted(alarms) == [f"{NAME}-{what}" for what in ("errors", "function", "latency")]
    cloud.client("cloudwatch").delete_alarms(AlarmNames=[f"{NAME}-2-errors"])
    assert re.search(
        r"endpoint +InService.*\ninstances +1 of ml\.m5\.large, 1 wanted, 1 to 3\n", output
    ), output
    assert "version 1, 3 of 3 environments warm" in output and "$3.05 a day" in output, output

    # The function that was uploaded, under AWS's runtime client, with an endpoint that echoes.
    s3 = cloud.client("s3")
    location = cloud.client("cloudformation").describe_stacks(StackName=NAME)["Stacks"][0][
        "Parameters"
    ]
    parameters = {each["ParameterKey"]: each["ParameterValue"] for each in location}
    archive = s3.get_object(Bucket=parameters["Bucket"], Key=parameters["CodeKey"])["Body"].read()
    (tmp_path / "dog.jpg").write_bytes(picture)
    with endpoint_and_function(archive, tmp_path) as (endpoint, environment):
        labels = json.dumps([{"labels": [{"label": "dog", "probability": 0.9}]}])
        endpoint.answer = lambda: (200, labels.encode(), {})
        code, output, error = serving("invoke", tmp_path / "dog.jpg", "--labels", **environment)
        assert (code, output) == (0, f"{labels}\n"), error
        asked = endpoint.calls[-1]
        assert (asked.body, asked.accept) == (picture, "application/json; output=labels")
        endpoint.answer = lambda: (200, b"[[0.25, -1.5]]", {})
        code, output, error = serving("invoke", "http://169.254.169.254/", **environment)
        assert code == 2 and error.startswith("400: ") and "not allowed" in error
        code, output, error = serving("invoke", "--endpoint", tmp_path / "dog.jpg", **environment)
        assert (code, output) == (0, "[[0.25, -1.5]]\n") and endpoint.calls[-1].body == picture

    code, output, error = serving("deploy", "--yes")
    assert (code, output.splitlines()[-1]) == (0, "nothing to change"), error + output
    before = len(calls_that_change(cloud))
    code, output, error = serving("plan", other_package)
    assert code == 0 and re.search(r"ModelDigest +\w+  \(was \w+\)", output), error + output
    assert calls_that_change(cloud)[before:] == ["CreateChangeSet", "DeleteChangeSet"], (
        "what a plan made is gone"
    )
    code, output, error = serving("deploy", other_package, "--yes")
    assert code == 0, error + output
    changes = re.findall(r"(?:modify|replace) +AWS::\S+ +(\w+)", output)
    assert set(changes) == {"EndpointRole", "Model", "EndpointConfig", "Endpoint"}, output
    second = _check_account(cloud)
    assert second != first, "a new model has a new configuration, so the endpoint is updated"

    code, output, error = serving("destroy", "--yes")
    assert code == 0, error + output
    assert s3.list_object_versions(Bucket=BUCKET).get("Versions", []) == []
    assert cloud.client("logs").describe_log_groups()["logGroups"] == []
    assert cloud.client("lambda").list_functions()["Functions"] == []
    assert cloud.client("iam").list_roles()["Roles"] == []
    assert cloud.client("cloudwatch").describe_alarms()["MetricAlarms"] == []
    assert (
        cloud.client("application-autoscaling").describe_scalable_targets(
            ServiceNamespace="sagemaker"
        )["ScalableTargets"]
        == []
    )
    sagemaker = cloud.client("sagemaker")
    assert (
        not sagemaker.list_endpoints()["Endpoints"]
        and not sagemaker.list_endpoint_configs()["EndpointConfigs"]
    )
    assert not sagemaker.list_models()["Models"]
    code, output, error = serving("status")
    assert code == 2 and "python -m serving deploy makes it" in error


def _check_account(cloud):
    """What the write-up asks for, in the account. The endpoint configuration's name."""
    scaling = cloud.client("application-autoscaling")
    [target] = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert target["ResourceId"] == f"endpoint/{NAME}/variant/main"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 3)
    [policy] = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert (
        float(tracking["TargetValue"]),
        int(tracking["ScaleOutCooldown"]),
        int(tracking["ScaleInCooldown"]),
    ) == (25, 180, 300)
    warm = cloud.client("lambda").get_provisioned_concurrency_config(
        FunctionName=NAME, Qualifier="live"
    )
    assert warm["RequestedProvisionedConcurrentExecutions"] == 3
    sagemaker = cloud.client("sagemaker")
    config = sagemaker.describe_endpoint(EndpointName=NAME)["EndpointConfigName"]
    [variant] = sagemaker.describe_endpoint_config(EndpointConfigName=config)["ProductionVariants"]
    model = sagemaker.describe_model(ModelName=variant["ModelName"])["PrimaryContainer"]
    bucket, _, key = model["ModelDataUrl"].removeprefix("s3://").partition("/")
    assert cloud.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"] > 0
    environment = cloud.client("lambda").get_function_configuration(FunctionName=NAME)[
        "Environment"
    ]["Variables"]
    assert environment["ENDPOINT_NAME"] == NAME
    groups = {
        group["logGroupName"]: group["retentionInDays"]
        for group in cloud.client("logs").describe_log_groups()["logGroups"]
    }
    assert groups == {f"/aws/lambda/{NAME}": 30, f"/aws/sagemaker/Endpoints/{NAME}": 30}
    return config


@contextlib.contextmanager
def endpoint_and_function(archive, tmp_path):
    """An endpoint, and an environment in which Invoke and InvokeEndpoint lead to real ones here."""
    with Endpoint() as endpoint:
        settings = {
            "ENDPOINT_NAME": NAME,
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.url,
            "WEB_PORT": "9",
        }
        function = Function(
            unpack(archive, tmp_path / "zip"),
            "lambda_function.handler",
            tmp_path / "log.txt",
            **settings,
        )

        class Handler(Quiet):
            def do_POST(self):
                assert self.path == f"/2015-03-31/functions/{NAME}/invocations?Qualifier=live"
                self.reply(200, json.dumps(function.invoke(json.loads(self.body()))).encode())

        try:
            with Neighbour(Handler) as lambda_:
                yield (
                    endpoint,
                    {
                        "AWS_ENDPOINT_URL_LAMBDA": lambda_.url,
                        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.url,
                    },
                )
        finally:
            function.close()


def test_a_creation_that_fails_says_why_and_leaves_nothing(cloud, serving, package):
    cloud.post(
        "/strict/fail",
        resource="Endpoint",
        reason="The account-level service limit 'ml.m5.large for endpoint usage' is 0 Instances",
    )
    code, _, error = serving("deploy", package, "--image", IMAGE, "--yes")
    assert code == 2 and error.count("\n") == 1, error
    assert (
        "DELETE_COMPLETE; Endpoint: The account-level service limit" in error
        and "only its uploads are left" in error
    )
    assert serving("status")[0] == 2


def test_an_update_that_an_alarm_rolls_back_says_so_and_the_old_model_stays(
    cloud, serving, package, other_package
):
    assert serving("deploy", package, "--image", IMAGE, "--yes")[0] == 0
    before = cloud.client("sagemaker").describe_endpoint(EndpointName=NAME)["EndpointConfigName"]
    cloud.post(
        "/strict/fail", resource="Endpoint", reason="Alarm packhorse-serving-errors went into ALARM"
    )
    code, _, error = serving("deploy", other_package, "--yes")
    assert code == 2 and error.count("\n") == 1, error
    assert (
        "UPDATE_ROLLBACK_COMPLETE; Endpoint: Alarm packhorse-serving-errors" in error
        and "stays in service" in error
    )
    assert (
        cloud.client("sagemaker").describe_endpoint(EndpointName=NAME)["EndpointConfigName"]
        == before
    )
    code, _, error = serving("deploy", other_package, "--yes")
    assert code == 0, "the next try finds its way: " + error


def test_nothing_is_left_of_a_deploy_that_nobody_confirms(cloud, serving, package, other_package):
    assert serving("deploy", package, "--image", IMAGE, "--yes")[0] == 0
    code, _, error = serving("deploy", other_package)
    assert code == 2 and "--yes" in error
    assert cloud.client("cloudformation").list_change_sets(StackName=NAME)["Summaries"] == []


def test_logs_of_both_parts_come_in_order(cloud, serving):
    given = {"Door": "endpoint", "FunctionRelease": "1"}
    body = {
        "Resources": {"A": {"Type": "AWS::SQS::Queue"}},
        "Parameters": {name: {"Type": "String"} for name in given},
    }
    cloud.client("cloudformation").create_stack(
        StackName=NAME,
        Tags=[{"Key": "project", "Value": "packhorse"}],
        TemplateBody=json.dumps(body),
        Parameters=[{"ParameterKey": key, "ParameterValue": each} for key, each in given.items()],
    )
    now = int(time.time() * 1000)
    logs = cloud.client("logs")
    for group, texts in {
        f"/aws/lambda/{NAME}": {0: "one", 2: "three"},
        f"/aws/sagemaker/Endpoints/{NAME}": {1: "two"},
    }.items():
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName="s")
        events = [
            {"timestamp": now - 5000 + 1000 * second, "message": text}
            for second, text in texts.items()
        ]
        logs.put_log_events(logGroupName=group, logStreamName="s", logEvents=events)
    code, output, error = serving("logs")
    assert code == 0, error
    shown = [["function", "one"], ["endpoint", "two"], ["function", "three"]]
    assert [line.split()[1:] for line in output.splitlines()] == shown

    command = [sys.executable, "-u", "-P", "-m", "serving", "logs", "--follow"]
    process = subprocess.Popen(command, env=cloud.environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert [process.stdout.readline().split()[1:] for _ in range(3)] == shown
        logs.put_log_events(
            logGroupName=f"/aws/lambda/{NAME}",
            logStreamName="s",
            logEvents=[{"timestamp": int(time.time() * 1000), "message": "four"}],
        )
        assert process.stdout.readline().split()[1:] == ["function", "four"]
        process.send_signal(signal.SIGINT)
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.communicate()


# --- an image built in the account ---


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr(image, "EVERY", 0.02)


def started(cloud):
    """The builds that were started, as StartBuild was asked for them."""
    return [call["parameters"] for call in cloud.calls() if call["operation"] == "StartBuild"]


def deployed_image(cloud, name=NAME):
    [stack] = cloud.client("cloudformation").describe_stacks(StackName=name)["Stacks"]
    [value] = [
        each["ParameterValue"] for each in stack["Parameters"] if each["ParameterKey"] == "Image"
    ]
    return value


def stacks(cloud):
    listed = cloud.client("cloudformation").describe_stacks()["Stacks"]
    return sorted(stack["StackName"] for stack in listed)


BUILT = re.compile(
    r"123456789012\.dkr\.ecr\.us-east-1\.amazonaws\.com/packhorse-serving-image@sha256:[0-9a-f]{64}"
)


def test_an_image_is_built_once_deployed_by_its_digest_and_removed(
    cloud, serving, package, quick_looks
):
    boundary = "arn:aws:iam::123456789012:policy/packhorse-boundary"
    cloud.client("cloudformation").create_stack(
        StackName="packhorse-foundation",
        Tags=[{"Key": "project", "Value": "packhorse"}],
        TemplateBody=json.dumps(
            {
                "Parameters": {"PermissionsBoundary": {"Type": "String"}},
                "Resources": {"A": {"Type": "AWS::SQS::Queue"}},
            }
        ),
        Parameters=[{"ParameterKey": "PermissionsBoundary", "ParameterValue": boundary}],
    )
    before = calls_that_change(cloud)
    code, output, error = serving("plan", package, "--build")
    assert (code, error) == (0, "")
    assert (
        "CodeBuild in this account: some minutes at $0.005 each; ECR keeps it for $0.10" in output
    )
    assert "stack packhorse-serving-image: new; serving/image.yaml, SHA-256 " in output
    assert "add      AWS::CodeBuild::Project" in output
    assert calls_that_change(cloud) == before

    code, output, error = serving("deploy", package, "--build", "--yes")
    assert (code, error) == (0, ""), error + output
    phases = [line.strip() for line in output.splitlines() if re.fullmatch("  [A-Z_]+", line)]
    assert phases == [
        "QUEUED",
        "PROVISIONING",
        "DOWNLOAD_SOURCE",
        "PRE_BUILD",
        "BUILD",
        "COMPLETED",
    ]
    address = deployed_image(cloud)
    assert BUILT.fullmatch(address) and f"built {address}" in output
    role = cloud.client("iam").get_role(RoleName="packhorse-serving-image")["Role"]
    assert role["PermissionsBoundary"]["PermissionsBoundaryArn"] == boundary
    [asked] = started(cloud)
    bucket, _, key = asked["sourceLocationOverride"].partition("/")
    assert (bucket, key.startswith(f"serving/{NAME}/image/")) == (BUCKET, True)
    sent = cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    with zipfile.ZipFile(io.BytesIO(sent)) as source:
        assert {name: source.read(name) for name in source.namelist()} == image.context()
    [variables] = [{each["name"]: each["value"] for each in asked["environmentVariablesOverride"]}]
    tag = image.recipe(PLACE, "onnx").tag
    assert variables == {"TAG": tag, "RUNTIME": "onnxruntime"}

    code, output, error = serving("deploy", "--build", "--yes")
    assert (code, output.splitlines()[-1]) == (0, "nothing to change"), error + output
    assert f"built already: {address}" in output
    # Another image of the same source, where the stack that builds is as it should be.
    gpu = ["--set", "Backend=cuda", "--set", "InstanceType=ml.g4dn.xlarge"]
    code, output, error = serving("deploy", "--build", *gpu, "--set", "MaxInstances=1", "--yes")
    assert code == 0, error + output
    [_, asked] = started(cloud)
    runtime = {"name": "RUNTIME", "value": "onnxruntime-gpu[cuda,cudnn]"}
    assert runtime in asked["environmentVariablesOverride"]
    assert BUILT.fullmatch(deployed_image(cloud)) and deployed_image(cloud) != address
    left = cloud.client("cloudformation").list_change_sets(StackName=NAME)["Summaries"]
    assert [each for each in left if each["ExecutionStatus"] == "AVAILABLE"] == []

    code, output, error = serving("destroy", "--yes")
    assert code == 0, error + output
    assert re.search(r"remove AWS::ECR::Repository +packhorse-serving-image\n", output), output
    assert "remove every image in this repository" in output
    assert "removed: the image, the stack, and 3 objects" in output
    assert stacks(cloud) == ["packhorse-foundation"]
    assert cloud.client("ecr").describe_repositories()["repositories"] == []
    assert cloud.client("codebuild").list_projects()["projects"] == []
    assert cloud.client("logs").describe_log_groups()["logGroups"] == []
    assert cloud.client("iam").list_roles()["Roles"] == []
    assert cloud.client("s3").list_object_versions(Bucket=BUCKET).get("Versions", []) == []


@pytest.mark.parametrize("status", ["FAILED", "TIMED_OUT", "STOPPED"])
def test_a_build_that_fails_shows_the_end_of_its_log_and_deploys_nothing(
    cloud, serving, package, quick_looks, status
):
    cloud.post("/strict/build", status=status)
    code, output, error = serving("deploy", package, "--build", "--yes")
    assert code == 2 and error.count("\n") == 1, error
    reason = f"{status} in BUILD; Error while executing command: docker push. Reason: {status}"
    assert reason in error and "nothing was deployed" in error
    assert "aws logs tail /aws/codebuild/packhorse-serving-image --log-stream-names" in error
    shown = output.splitlines()[-20:]
    assert shown[0] == "  layer 11" and shown[-1].startswith("  denied: User is not authorized")
    assert stacks(cloud) == ["packhorse-serving-image"]
    code, _, error = serving("deploy", package, "--build", "--yes")  # it is mended by now
    assert code == 0, error
    assert len(started(cloud)) == 2


def test_an_image_that_somebody_else_has_pushed_meanwhile_is_taken(
    cloud, serving, package, quick_looks
):
    cloud.post("/strict/build", status="raced")
    code, output, error = serving("deploy", package, "--build", "--yes")
    assert code == 0, error + output
    assert BUILT.fullmatch(deployed_image(cloud))


@pytest.mark.parametrize("when", ["the build", "the deployment"])
def test_after_a_kill_nothing_is_built_twice(
    cloud, serving, package, quick_looks, monkeypatch, when
):
    with monkeypatch.context() as patch:
        if when == "the build":
            patch.setattr(image, "_follow", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        else:
            patch.setattr("serving.deploy._begin", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        assert serving("deploy", package, "--build", "--yes")[0] == -signal.SIGKILL
    code, output, error = serving("plan", package, "--build")
    assert code == 0, error
    said = "being built by packhorse-serving-image:" if when == "the build" else "built already: "
    assert said in output, output
    code, output, error = serving("deploy", package, "--build", "--yes")
    assert code == 0, error + output
    assert BUILT.fullmatch(deployed_image(cloud)) and len(started(cloud)) == 1


def test_an_image_that_was_built_while_somebody_was_asked_is_taken(
    cloud, serving, package, quick_looks, monkeypatch
):
    assert serving("deploy", package, "--build", "--yes")[0] == 0
    find, answers = image.Image.find, [None]
    monkeypatch.setattr(image.Image, "find", lambda self: answers.pop() if answers else find(self))
    code, output, error = serving("deploy", "--build", "--yes")
    assert (code, output.splitlines()[-1]) == (0, "nothing else to change"), error + output
    assert len(started(cloud)) == 1


def test_a_stack_that_another_deploy_is_making_is_waited_for(
    cloud, serving, package, quick_looks, monkeypatch
):
    cloud.post("/strict/build", status="FAILED")
    assert serving("deploy", package, "--build", "--yes")[0] == 2
    describe, busy = image.ImageStack.describe, [None] * 6

    def described(self):
        answer = describe(self)
        if busy:
            busy.pop()
            answer["StackStatus"] = "CREATE_IN_PROGRESS"
        return answer

    monkeypatch.setattr(image.ImageStack, "describe", described)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    code, output, error = serving("deploy", package, "--build", "--yes")
    assert code == 0, error + output
    assert "packhorse-serving-image: CREATE_IN_PROGRESS; serving/image.yaml" in output


def test_what_an_interrupted_build_leaves_is_said_and_destroy_stops_it(
    cloud, package, serving, quick_looks
):
    cloud.post("/strict/build", status="stuck")
    arguments = ["deploy", str(package), "--build", "--yes"]
    forked = Forked(command_line.main, arguments, PROJECT, cloud.environment(), apart=True)
    try:
        assert wait_for(lambda: started(cloud))
        # By then it looks whether the build goes on.
        assert wait_for(
            lambda: [call for call in cloud.calls() if call["operation"] == "BatchGetBuilds"]
        )
        os.kill(forked._pid, signal.SIGINT)
        _, error = forked.communicate()
    finally:
        forked.kill()
    assert forked.returncode == RESUME
    assert error == (
        "interrupted; packhorse-serving-image:00000000 keeps running, an hour at most (aws "
        "codebuild stop-build --id packhorse-serving-image:00000000 ends it); "
        "the same command goes on with it\n"
    )
    code, output, error = serving("destroy", "--yes")
    assert code == 0, error + output
    assert "StopBuild" in calls_that_change(cloud) and stacks(cloud) == []


def test_a_build_that_may_not_be_started_is_one_line_with_whom_to_ask(
    cloud, serving, package, quick_looks
):
    message = "User: x is not authorized to perform: codebuild:StartBuild on resource: y"
    for code, said in (
        ("AccessDeniedException", "ask who administers the account for it: `serving deploy`"),
        ("AccountLimitExceededException", "the account's quota of builds at the same time"),
    ):
        cloud.post("/strict/refuse", operation="StartBuild", code=code, message=message)
        done, _, error = serving("deploy", package, "--build", "--yes")
        assert done == 2 and said in error and error.count("\n") == 1, error


def test_the_stack_that_builds_follows_its_template(
    cloud, serving, package, quick_looks, monkeypatch, tmp_path
):
    body = image.TEMPLATE.read_text()
    old = tmp_path / "image.yaml"
    old.write_text(body.replace("RetentionInDays: 30", "RetentionInDays: 14"))
    cloud.post("/strict/build", status="FAILED")
    with monkeypatch.context() as patch:
        patch.setattr(image, "TEMPLATE", old)
        assert serving("deploy", package, "--build", "--yes")[0] == 2
    code, _, error = serving("deploy", package, "--build", "--yes")
    assert code == 0, error
    which = {"logGroupNamePrefix": "/aws/codebuild/"}
    [group] = cloud.client("logs").describe_log_groups(**which)["logGroups"]
    assert group["retentionInDays"] == 30


def test_a_stack_of_another_project_is_neither_built_in_nor_removed(cloud, serving, package):
    name = "packhorse-serving-image"
    cloud.client("cloudformation").create_stack(
        StackName=name, TemplateBody=json.dumps({"Resources": {"A": {"Type": "AWS::SQS::Queue"}}})
    )
    code, _, error = serving("deploy", package, "--build", "--yes")
    assert code == 2 and f"stack {name} in account 123456789012" in error
    assert "no deployment's image of the project packhorse" in error and error.count("\n") == 1
    assert serving("deploy", package, "--image", IMAGE, "--yes")[0] == 0
    code, output, error = serving("destroy", "--yes")
    assert code == 0 and "image" not in output, error + output
    assert stacks(cloud) == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", IMAGE], "--build: it makes the image that --image names"),
        (["--set", f"Image={IMAGE}"], "--build: it makes the image that --image names"),
        (["--mode", "lambda"], "--build: with --mode lambda no container is used"),
        (["--set", "Backend=torch"], "has nothing for --set Backend=torch; take onnx or cuda"),
        (["--set", "Backend=cuda"], "ml.m5.large has no GPU"),
        (["--set", "InstanceType=ml.g4dn.xlarge"], "nothing here uses its GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_built_is_refused_in_one_line(package, arguments, message, capsys):
    code = command_line.main(["plan", str(package), "--build", *arguments, "--region", "us-east-1"])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error


def test_a_tag_is_the_digest_of_the_source_and_of_what_runs_the_network(monkeypatch):
    first = image.recipe(PLACE, "onnx")
    assert image.recipe(PLACE, "onnx") == first, "equal files give equal bytes"
    assert re.fullmatch("[0-9a-f]{32}", first.tag)
    assert image.recipe(PLACE, "cuda").tag != first.tag
    contents = image.context() | {"serving/app.py": b"changed"}
    monkeypatch.setattr(image, "context", lambda: contents)
    assert image.recipe(PLACE, "onnx").tag != first.tag
    # An endpoint's own release follows from the image: another digest is another configuration.
    release = build(PLACE, Remote("s3://b/k", "x"), {"Image": first.address}, {})
    by_digest = with_image(release, f"{first.repository}@sha256:{'0' * 64}")
    assert by_digest.parameters["EndpointRelease"] != release.parameters["EndpointRelease"]
    given = {"Image": by_digest.parameters["Image"]}
    assert by_digest == build(PLACE, Remote("s3://b/k", "x"), given, {})


# --- mistakes, each one line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "MaxInstance=4"], "did you mean MaxInstances?"),
        (["--set", "MaxInstances=many"], "a whole number"),
        (["--set", "MinInstances=0"], "a whole number, 1 to 100"),
        (["--set", "MaxInstances=101"], "a whole number, 1 to 100"),
        (["--set", "ProvisionedConcurrency=1001"], "a whole number, 0 to 1000"),
        (["--set", "MinInstances=5"], "MaxInstances=3 is below MinInstances=5"),
        (["--set", "InstanceType=ml.t3.medium"], "endpoints don't run on it; try one of"),
        (["--set", "FunctionUrl=maybe"], "allowed: on, off"),
        (["--set", "CodeKey=x"], "there is no such setting"),
        (["--set", "MaxInstances"], "write NAME=VALUE"),
        (["--mode", "window"], "allowed: endpoint, lambda"),
        (["--image", "dogs:latest"], "no image in ECR"),
        (["--name", "Dogs"], "lower-case"),
        (["--set", "InstanceType=ml.g4dn.xlarge"], "nothing here uses its GPU"),
        (["--set", "InstanceType=ml.p3.2xlarge"], "nothing here uses its GPU"),
        (["--set", "InstanceType=ml.c7g.large"], "it has ARM processors"),
        (["--set", "InstanceType=ml.r7gd.large"], "it has ARM processors"),
        (["--set", "InstanceType=ml.inf2.xlarge"], "nothing here uses its chips"),
        (["--set", "InstanceType=ml.trn1.2xlarge"], "nothing here uses its chips"),
        (["--set", "InstanceType=ml.t2.medium"], "doesn't scale burstable types; --set MaxInst"),
        (["--set", "Backend=cuda"], "ml.m5.large has no GPU"),
        (["--image", IMAGE.replace("us-east-1", "eu-west-1")], "takes one of us-east-1 only"),
        (["--set", "Origins=everybody"], "a text that matches"),
        (["--set", "CanaryPercent=10"], "--set MinInstances=2 too"),
        (["--set", "ReservedConcurrency=2"], "3 are kept warm already"),
        (["--set", "SnapStart=on"], "--set ProvisionedConcurrency=0 too"),
        (["--set", "RayServeApp=x:y"], "there is no such setting"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_anything_is_sent(package, arguments, message, capsys):
    from serving.__main__ import main

    code = main(
        [
            "plan",
            str(package),
            *(["--image", IMAGE] if "--image" not in arguments else []),
            *arguments,
            "--region",
            "us-east-1",
        ]
    )
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "given",
    [
        {"InstanceType": "ml.g4dn.xlarge", "Backend": "cuda"},
        {"InstanceType": "ml.g6e.xlarge", "Backend": "torch"},
        {"InstanceType": "ml.t2.medium", "MaxInstances": "1"},
        {"InstanceType": "ml.c6i.large"},
        {"InstanceType": "ml.p5en.48xlarge", "Backend": "cuda"},
    ],
)
def test_what_can_work_is_planned(given):
    release = build(PLACE, Remote("s3://b/k", "x"), {"Image": IMAGE, **given}, {})
    assert given.items() <= release.parameters.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deploy", "--image", IMAGE, "--yes"], "which model?"),
        (["deploy", "s3://nowhere/model.tar.gz", "--image", IMAGE, "--yes"], "no such object"),
        (["deploy", "absent.tar.gz", "--yes"], "absent.tar.gz: there is no such file"),
        (["plan", "s3://bucket", "--image", IMAGE], "s3://bucket: this names no object; write"),
        (["plan", "s3://bucket/", "--image", IMAGE], "s3://bucket/: this names no object"),
        (["status", "--region", "mars-1"], "--region mars-1: AWS has no such region"),
        (["plan", "--region", "us-east1"], "did you mean us-east-1?"),
        (["status", "--name", "other"], "there is no stack other"),
        (["invoke", "absent.jpg"], "give a picture's file"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_said_in_one_line(serving, package, arguments, message):
    code, _, error = serving(
        *[str(package) if argument == "PACKAGE" else argument for argument in arguments]
    )
    assert code == 2 and message in error and error.count("\n") == 1, error


def test_a_refusal_of_aws_is_one_line_with_what_to_do(cloud, serving, package):
    cloud.post(
        "/strict/refuse",
        operation="CreateStack",
        code="AccessDenied",
        message="User: x is not authorized to perform: cloudformation:CreateStack",
    )
    code, _, error = serving("deploy", package, "--image", IMAGE, "--yes")
    assert code == 2 and error.count("\n") == 1 and "ask who administers the account" in error, (
        error
    )


def test_a_missing_bucket_is_said_with_what_makes_it(cloud, serving, package):
    code, _, error = serving("deploy", package, "--image", IMAGE, "--yes", "--project", "zoo")
    assert code == 2 and "python -m launch up" in error and error.count("\n") == 1, error


def test_a_damaged_package_is_not_deployed(serving, package, tmp_path):
    (tmp_path / "model.tar.gz").write_bytes(package.read_bytes()[:-2000])
    code, _, error = serving("deploy", tmp_path / "model.tar.gz", "--image", IMAGE, "--yes")
    assert (
        code == 2 and error.startswith(f"{tmp_path}/model.tar.gz: ") and error.count("\n") == 1
    ), error


def test_a_model_that_another_key_has_signed_is_not_deployed(tmp_path, package, capsys):
    make_key(tmp_path / "key.pem")
    make_key(tmp_path / "other.pem")
    signed = tmp_path / "signed.tar.gz"
    sign = ["sign", str(package), "--key", str(tmp_path / "key.pem"), "--to", str(signed)]
    assert command_line.main(sign) == 0
    capsys.readouterr()
    plan = ("plan", "--image", IMAGE, "--region", "us-east-1", "--signed-by")
    assert command_line.main([*plan, str(tmp_path / "key.pub"), str(signed)]) == 0
    assert re.search(r"^  SignedBy +MF\S{120,}$", capsys.readouterr().out, re.MULTILINE)
    for model, said in ((package, "it isn't signed"), (signed, "by another key")):
        assert command_line.main([*plan, str(tmp_path / "other.pub"), str(model)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_key_of_a_deployment_reaches_a_container_of_ones_own_and_stays(package):
    container = template()["Resources"]["Model"]["Properties"]["PrimaryContainer"]
    checks = {"Condition": "ChecksSignature"}
    own = build(PLACE, package, {"Image": IMAGE, "SignedBy": "MF=="}, {}).parameters
    set_to = container["Environment"]["SERVING_SIGNED_BY"]["Fn::If"]
    assert set_to[:2] == ["ChecksSignature", {"Ref": "SignedBy"}] and _holds(checks, own)
    assert build(PLACE, None, {}, own).parameters["SignedBy"] == "MF=="
    aws = {**own, "RayServeApp": "serving.ray_app:app"}  # it runs the code of the archive itself
    assert not _holds(checks, aws) and not _holds(checks, {**own, "SignedBy": ""})


def test_a_plan_needs_no_credentials(package, tmp_path, monkeypatch):
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(PROJECT),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-P", "-m", "serving", "plan", str(package), "--image", IMAGE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (
        "no AWS credentials" in done.stdout
        and "account 000000000000" in done.stdout
        and "together" in done.stdout
    )


# --- the release ---


def test_names_follow_from_the_content_and_from_nothing_else(package, other_package):
    def names(model=package, deployed=(), **given):
        values = build(PLACE, model, {"Image": IMAGE, **given}, dict(deployed)).parameters
        return values["EndpointRelease"], values["FunctionRelease"]

    endpoint, function = names()
    assert names() == (endpoint, function)
    for change in (
        {"model": other_package},
        {"InstanceType": "ml.c5.large"},
        {"Image": IMAGE + "0"},
        {"MinInstances": "2"},
        {"model": Remote("s3://a/b", "1")},
    ):
        assert names(**change)[0] != endpoint, change
        assert names(**change)[1] == function, change
    for change in (
        {"Memory": "512"},
        {"LogDays": "7"},
        {"ProvisionedConcurrency": "1"},
        {"MaxInstances": "9"},
    ):
        assert names(**change)[0] == endpoint, change
    assert names(Memory="512")[1] != function
    assert names(MaxInstances="9")[1] == function
    both = names(FetchUrls="endpoint")
    assert both[0] != endpoint and both[1] != function
    assert names(Remote("s3://a/b", "1"))[0] != names(Remote("s3://a/b", "2"))[0], (
        "new content at the same place"
    )


def test_what_is_not_given_stays_as_it_is_deployed(package):
    first = build(
        PLACE, package, {"Image": IMAGE, "MaxInstances": "7", "Memory": "512"}, {}
    ).parameters
    assert build(PLACE, None, {}, first).parameters == first
    changed = build(PLACE, None, {"MaxInstances": "2"}, first).parameters
    assert {name for name in first if first[name] != changed[name]} == {"MaxInstances"}


def test_the_function_with_the_model_needs_no_endpoint_and_costs_next_to_nothing_at_rest(
    package, monkeypatch
):
    monkeypatch.setattr(
        bundle, "libraries", lambda *more, architecture: {"numpy/__init__.py": b""}
    )  # pip's index is not for tests
    release = build(PLACE, package, {"Door": "lambda"}, {})
    assert (
        release.parameters["Memory"] == "2048"
        and release.parameters["ProvisionedConcurrency"] == "0"
    )
    [alarms] = idle_price(release.parameters, "us-east-1")
    assert (alarms.what, alarms.month) == ("alarms on 3 metrics", pytest.approx(0.3))
    assert [upload.what for upload in release.uploads] == ["the function with the model"]
    with pytest.raises(UserError, match="which model"):
        build(PLACE, None, {"Door": "endpoint", "Image": IMAGE}, release.parameters)
    too_much = {"large": bytes(bundle.MAX_UNPACKED)}
    monkeypatch.setattr(bundle, "libraries", lambda *more, architecture: too_much)
    with pytest.raises(UserError, match="--mode endpoint"):
        build(PLACE, package, {"Door": "lambda"}, {})


def test_without_an_image_the_endpoint_is_awss_and_its_archive_brings_what_that_lacks(
    package, monkeypatch, tmp_path
):
    brought = {"numpy/__init__.py": b"", "numpy.libs/a.so": b"a"}
    monkeypatch.setattr(bundle, "libraries", lambda *more: brought)  # pip's index is not for tests
    release = build(PLACE, package, {}, {})
    given = release.parameters
    assert given["Image"] == (
        "763104351884.dkr.ecr.us-east-1.amazonaws.com/ray:serve-ml-sagemaker-cpu-v1.1.0"
    )
    assert given["ImageArn"] == "arn:aws:ecr:us-east-1:763104351884:repository/ray"
    assert given["RayServeApp"] == "serving.ray_app:app"
    [model] = [upload for upload in release.uploads if upload.what == "the model package"]
    assert build(PLACE, package, {}, {}).parameters == given, "equal packages give equal bytes"
    with tarfile.open(fileobj=io.BytesIO(model.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    assert (tmp_path / "code/serving/ray_app.py").is_file()
    # The image would install it from a network, which an isolated endpoint hasn't.
    assert not (tmp_path / "code/requirements.txt").exists()
    assert not [*tmp_path.rglob("*.safetensors")]
    load(tmp_path)  # every file of it is listed, with its SHA-256

    own = build(PLACE, package, {"Image": IMAGE}, given).parameters
    assert own["RayServeApp"] == ""
    with pytest.raises(UserError, match=r"another container needs the model\.tar\.gz again"):
        build(PLACE, None, {"Image": IMAGE}, given)
    with pytest.raises(UserError, match="is built here and needs the file"):
        build(PLACE, Remote("s3://b/model.tar.gz", "x"), {}, {})


def test_the_libraries_are_pinned_by_hash_in_the_versions_of_the_constraints():
    constraints = (PROJECT / "constraints.txt").read_text().splitlines()
    lines = [line.split() for line in bundle.LIBRARIES.read_text().splitlines() if "==" in line]
    pinned = {name: hashes for name, *hashes in lines if not name.startswith("#")}
    assert {name.split("==")[0] for name in pinned} == {*REQUIREMENTS, *FOR_HEIC}
    for name, hashes in pinned.items():
        assert name in constraints
        assert len({*hashes}) == 2  # of both processors
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes)


def test_the_function_reads_heic_where_its_model_was_trained_on_it(tmp_path):
    for text, expected in (("pillow>=11\n", ()), ("pillow-heif>=1.1\n", ("pillow-heif",))):
        with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
            entry = tarfile.TarInfo("code/requirements.txt")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
        assert bundle._needed(tmp_path / "model.tar.gz") == expected


def test_what_an_idle_month_costs():
    defaults = {
        name: str(body.get("Default", "")) for name, body in template()["Parameters"].items()
    }
    items = idle_price(defaults, "us-east-1")
    np.testing.assert_allclose(
        [item.month for item in items], [0.115 * 730, 3 * 0.25 * 730 * 3600 * 0.0000041667, 0.7]
    )
    unknown = idle_price(defaults | {"InstanceType": "ml.z9.large"}, "us-east-1")
    assert unknown[0].month is None


@pytest.mark.parametrize(
    ("name", "tags", "arguments"),
    [
        ("payroll", [], ["--name", "payroll"]),
        ("packhorse-serving", [{"Key": "project", "Value": "website"}], []),
        ("dogs", [{"Key": "project", "Value": "packhorse-dev"}], ["--name", "dogs"]),
        (
            "packhorse-foundation",
            [{"Key": "project", "Value": "packhorse"}],
            ["--name", "packhorse-foundation"],
        ),
    ],
)
def test_a_stack_that_is_no_deployment_of_the_project_is_left_alone(
    cloud, serving, package, name, tags, arguments
):
    cloudformation = cloud.client("cloudformation")
    body = json.dumps({"Resources": {"Queue": {"Type": "AWS::SQS::Queue"}}})
    cloudformation.create_stack(StackName=name, TemplateBody=body, Tags=tags)
    before = calls_that_change(cloud)
    for command in (
        ["plan", package, "--image", IMAGE],
        ["deploy", package, "--image", IMAGE, "--yes"],
        ["status"],
        ["logs"],
        ["destroy", "--yes"],
    ):
        code, output, error = serving(*command, *arguments)
        assert (
            code == 2
            and f"stack {name} in account 123456789012" in error
            and "give another --name" in error
        ), output + error
    assert calls_that_change(cloud) == before
    assert [stack["StackName"] for stack in cloudformation.describe_stacks()["Stacks"]] == [name]
