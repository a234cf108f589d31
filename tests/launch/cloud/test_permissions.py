"""Least privilege, proven.

Every call is allowed by its part's policy, nothing can be taken from a policy without a call
failing, and dangerous calls are denied to every part.
"""

import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cloud.account_stack import as_list
from launch.verbs.policy import PARTS
from tests.conftest import PROJECT
from tests.launch import documents
from tests.launch.conftest import running
from tests.launch.permissions import (
    ACCOUNT,
    BUCKET,
    PARAMETERS,
    REGION,
    Ask,
    Evaluator,
    beyond,
    effective_policy,
    find_evaluator,
    grants,
    narrowed,
    policy,
    service_side,
    unique,
    widened,
    without,
)
from tests.launch.whole import WHOLE
from tests.shared import made_once
from trainer.common.errors import OK


@pytest.fixture(scope="session")
def evaluator() -> Iterator[Evaluator]:
    evaluator = find_evaluator()
    if isinstance(evaluator, str):
        if os.environ.get("CI"):
            pytest.fail(f"{evaluator}; CI proves least privilege")
        pytest.skip(evaluator)
    yield evaluator
    evaluator.close()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ask]]:
    """What each part asks of AWS: recorded from the running commands, and the services' by hand."""
    folder = made_once(tmp_path_factory, "recorded-calls", record_calls)
    recorded = pickle.loads((folder / "asks").read_bytes())
    return {part: unique([*recorded.get(part, []), *service_side(part)]) for part in PARTS}


def record_calls(folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    with (
        running(folder / "calls.jsonl", WHOLE) as cloud,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cloud.environment().items():
            patch.setenv(name, value)
        recorded = documents.record(cloud, home, patch)
    (folder / "asks").write_bytes(pickle.dumps(recorded))


@pytest.mark.parametrize("part", PARTS)
def test_every_call_is_allowed(part, asked, evaluator):
    # The notebook starts jobs, so it has the launcher's policies too.
    rights = effective_policy(part)
    answers = evaluator.decide([(rights, ask) for ask in asked[part]])
    assert asked[part] and not [
        ask for ask, allowed in zip(asked[part], answers, strict=True) if not allowed
    ]


@pytest.mark.parametrize("part", PARTS)
def test_nothing_can_be_taken_away(part, asked, evaluator):
    """Each action on each resource is needed by a call, and so is each value of a condition."""
    rights = policy(part)
    allowed = [
        ask
        for ask, yes in zip(
            asked[part], evaluator.decide([(rights, ask) for ask in asked[part]]), strict=True
        )
        if yes
    ]
    less = [
        (f"{grant.sid}: {grant.action} on {grant.resource}", without(rights, grant), grant.action)
        for grant in grants(part)
    ]
    less += [(what, rest, None) for what, rest in narrowed(rights)]
    questions = [
        (what, rest, ask)
        for what, rest, action in less
        for ask in allowed
        if action in (None, ask.action)
    ]
    answers = evaluator.decide([(rest, ask) for _, rest, ask in questions])
    missed = {what for (what, _, _), yes in zip(questions, answers, strict=True) if not yes}
    assert not [what for what, _, _ in less if what not in missed], "granted, and never used"


# What a part may do to things of any name, and why: regular expressions over ACTION RESOURCE.
OF_ANY_NAME = {
    "launcher": {
        r"servicequotas:GetServiceQuota .*": "a quota is nobody's",
        r"sagemaker:(ListTags|DescribeEndpoint|DescribeEndpointConfig) .*:endpoint(-config)?/.*": (
            "whoever deploys names an endpoint; its tag decides"
        ),
    },
    "deployer": {
        rf"s3:(DeleteObjectVersion|AbortMultipartUpload) arn:aws:s3:::{BUCKET}/.*": (
            "down empties the bucket"
        ),
        r"iam:Detach(User|Group)Policy .*": "from whoever has it; the policy is ours",
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_granted_beyond_what_is_asked_for(part, asked, evaluator):
    """Each call is denied on something of another's, and for another value of each condition.

    And each bound of each statement is what denies one of these.
    """
    rights = policy(part)
    answers = evaluator.decide([(rights, ask) for ask in asked[part]])
    allowed = [ask for ask, yes in zip(asked[part], answers, strict=True) if yes]
    others = unique([other for ask in allowed for other in beyond(rights, ask)])
    answers = evaluator.decide([(rights, ask) for ask in others])
    wide = [ask for ask, yes in zip(others, answers, strict=True) if yes]
    known = OF_ANY_NAME.get(part, {})
    told = [f"{ask.action} {ask.resource}" for ask in wide]
    assert [line for line in told if not any(re.fullmatch(each, line) for each in known)] == []
    assert all(any(re.fullmatch(each, line) for line in told) for each in known)

    denied = [ask for ask, yes in zip(others, answers, strict=True) if not yes]
    questions = [
        (what, wider, ask)
        for number, what, wider in widened(rights)
        for ask in denied
        if ask.action in as_list(rights["Statement"][number]["Action"])
    ]
    answers = evaluator.decide([(wider, ask) for _, wider, ask in questions])
    noticed = {what for (what, _, _), yes in zip(questions, answers, strict=True) if yes}
    assert [what for _, what, _ in widened(rights) if what not in noticed] == []


# --- what nobody may do ---

OTHER = "999999999999"


def arn(service: str, resource: str, account: str = ACCOUNT) -> str:
    return f"arn:aws:{service}:{REGION}:{account}:{resource}"


MACHINE = {
    "ec2:InstanceType": "g4dn.xlarge",
    "ec2:MetadataHttpTokens": "required",
    "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/packhorse-ec2-us-east-1",
    "aws:RequestTag/project": "packhorse",
}
INSTANCE = arn("ec2", "instance/i-0fedcba9876543210")
NOTEBOOK = {
    "aws:RequestTag/project": "packhorse",
    "sagemaker:InstanceTypes": ["ml.t3.medium"],
    "sagemaker:RootAccess": "Disabled",
    "sagemaker:MinimumInstanceMetadataServiceVersion": "2",
    "sagemaker:DirectInternetAccess": "Enabled",
}

TAG = {"aws:RequestTag/project": "packhorse"}
JOB = TAG | {"sagemaker:InstanceTypes": ["ml.m5.large"]}
DEV = {"aws:ResourceTag/project": "packhorse-dev"}
DEV_JOB = arn("sagemaker", "training-job/packhorse-dev-r-1")
DEV_TUNING = arn("sagemaker", "hyper-parameter-tuning-job/packhorse-dev-r-1")
DEV_NOTEBOOK = arn("sagemaker", "notebook-instance/packhorse-dev-notebook-1")

DANGEROUS = {
    # data
    "read another bucket": Ask("s3:GetObject", "arn:aws:s3:::payroll/2026.csv"),
    "write to another bucket": Ask("s3:PutObject", "arn:aws:s3:::payroll/2026.csv"),
    "list another bucket": Ask("s3:ListBucket", "arn:aws:s3:::payroll"),
    "list every bucket of the project's name elsewhere": Ask(
        "s3:ListBucket", f"arn:aws:s3:::packhorse-{OTHER}-{REGION}"
    ),
    "search the jobs of all": Ask("sagemaker:Search", "*"),
    "search another project's jobs": Ask(
        "sagemaker:Search",
        "*",
        {"sagemaker:SearchVisibilityCondition/Tags.project/EqualsIfExists": "packhorse-dev"},
    ),
    "delete the bucket": Ask("s3:DeleteBucket", f"arn:aws:s3:::{BUCKET}"),
    "make the bucket public": Ask("s3:PutBucketPolicy", f"arn:aws:s3:::{BUCKET}"),
    "lift the block of public access": Ask(
        "s3:PutBucketPublicAccessBlock", f"arn:aws:s3:::{BUCKET}"
    ),
    "give an object to another account": Ask(
        "s3:PutObjectAcl", f"arn:aws:s3:::{BUCKET}/runs/r/output/model.tar.gz"
    ),
    "delete an old version for good": Ask(
        "s3:DeleteObjectVersion", f"arn:aws:s3:::{BUCKET}/runs/r/output/model.tar.gz"
    ),
    "delete a picture that a job may be reading": Ask(
        "s3:DeleteObject", f"arn:aws:s3:::{BUCKET}/data/dogs-0123456789abcdef/train/a/1.jpg"
    ),
    "delete a run's model": Ask(
        "s3:DeleteObject", f"arn:aws:s3:::{BUCKET}/runs/r/output/model.tar.gz"
    ),
    "replace a deployed model": Ask(
        "s3:PutObject", f"arn:aws:s3:::{BUCKET}/serving/packhorse-serving/model.tar.gz"
    ),
    "switch versioning off": Ask("s3:PutBucketVersioning", f"arn:aws:s3:::{BUCKET}"),
    # rights
    "pass another role": Ask(
        "iam:PassRole",
        f"arn:aws:iam::{ACCOUNT}:role/Administrator",
        {"iam:PassedToService": "sagemaker.amazonaws.com"},
    ),
    "pass the training role to Lambda": Ask(
        "iam:PassRole",
        f"arn:aws:iam::{ACCOUNT}:role/packhorse-training-us-east-1",
        {"iam:PassedToService": "lambda.amazonaws.com"},
    ),
    "pass EC2's role to SageMaker": Ask(
        "iam:PassRole",
        f"arn:aws:iam::{ACCOUNT}:role/packhorse-ec2-us-east-1",
        {"iam:PassedToService": "sagemaker.amazonaws.com"},
    ),
    "become another role": Ask("sts:AssumeRole", f"arn:aws:iam::{ACCOUNT}:role/Administrator"),
    "give itself a policy": Ask(
        "iam:PutRolePolicy", f"arn:aws:iam::{ACCOUNT}:role/packhorse-training-us-east-1"
    ),
    "attach full access": Ask(
        "iam:AttachRolePolicy",
        f"arn:aws:iam::{ACCOUNT}:role/packhorse-training-us-east-1",
        {"iam:PolicyARN": "arn:aws:iam::aws:policy/AdministratorAccess"},
    ),
    "change its own policy": Ask(
        "iam:CreatePolicyVersion", f"arn:aws:iam::{ACCOUNT}:policy/packhorse-launcher-us-east-1"
    ),
    "make a user's key": Ask("iam:CreateAccessKey", f"arn:aws:iam::{ACCOUNT}:user/ann"),
    "make a linked role for any service": Ask(
        "iam:CreateServiceLinkedRole",
        f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/ec2.amazonaws.com/AWSServiceRoleForX",
        {"iam:AWSServiceName": "ec2.amazonaws.com"},
    ),
    # machines
    "rent a p4d": Ask("ec2:RunInstances", INSTANCE, MACHINE | {"ec2:InstanceType": "p4d.24xlarge"}),
    "rent an untagged machine": Ask(
        "ec2:RunInstances",
        INSTANCE,
        {key: value for key, value in MACHINE.items() if key != "aws:RequestTag/project"},
    ),
    "rent a machine with IMDSv1": Ask(
        "ec2:RunInstances", INSTANCE, MACHINE | {"ec2:MetadataHttpTokens": "optional"}
    ),
    "rent a machine with another profile": Ask(
        "ec2:RunInstances",
        INSTANCE,
        MACHINE | {"ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/Administrator"},
    ),
    "terminate another project's machine": Ask(
        "ec2:TerminateInstances", INSTANCE, {"aws:ResourceTag/project": "website"}
    ),
    "terminate an untagged machine": Ask("ec2:TerminateInstances", INSTANCE),
    "tag another's machine as ours": Ask(
        "ec2:CreateTags", INSTANCE, {"aws:RequestTag/project": "packhorse"}
    ),
    "open a port": Ask(
        "ec2:AuthorizeSecurityGroupIngress", arn("ec2", "security-group/sg-01234567")
    ),
    "give a running machine another role": Ask("ec2:AssociateIamInstanceProfile", INSTANCE),
    "copy a disk to another account": Ask(
        "ec2:ModifySnapshotAttribute", f"arn:aws:ec2:{REGION}::snapshot/snap-01234567"
    ),
    # SageMaker
    "train on a p4d": Ask(
        "sagemaker:CreateTrainingJob",
        arn("sagemaker", "training-job/packhorse-r-1"),
        JOB | {"sagemaker:InstanceTypes": ["ml.p4d.24xlarge"]},
    ),
    "train on a p4d beside a cheap one": Ask(
        "sagemaker:CreateTrainingJob",
        arn("sagemaker", "training-job/packhorse-r-1"),
        JOB | {"sagemaker:InstanceTypes": ["ml.m5.large", "ml.p4d.24xlarge"]},
    ),
    "train without saying on what": Ask(
        "sagemaker:CreateTrainingJob", arn("sagemaker", "training-job/packhorse-r-1"), TAG
    ),
    "train in another project's name": Ask(
        "sagemaker:CreateTrainingJob", arn("sagemaker", "training-job/website-1"), JOB
    ),
    "stop another project's job": Ask(
        "sagemaker:StopTrainingJob", arn("sagemaker", "training-job/website-1")
    ),
    # beside a project whose name begins like ours: packhorse-dev
    "train without a tag": Ask(
        "sagemaker:CreateTrainingJob", DEV_JOB, {"sagemaker:InstanceTypes": ["ml.m5.large"]}
    ),
    "train with packhorse-dev's tag": Ask(
        "sagemaker:CreateTrainingJob", DEV_JOB, JOB | {"aws:RequestTag/project": "packhorse-dev"}
    ),
    "tune without a tag": Ask(
        "sagemaker:CreateHyperParameterTuningJob",
        DEV_TUNING,
        {"sagemaker:InstanceTypes": ["ml.m5.large"]},
    ),
    "stop packhorse-dev's job": Ask("sagemaker:StopTrainingJob", DEV_JOB, DEV),
    "stop another team's job whose name begins like ours": Ask(
        "sagemaker:StopTrainingJob", DEV_JOB
    ),
    "make packhorse-dev's job look like ours": Ask("sagemaker:AddTags", DEV_JOB, TAG),
    "delete packhorse-dev's job": Ask("sagemaker:DeleteTrainingJob", DEV_JOB, DEV),
    "stop packhorse-dev's tuning job": Ask(
        "sagemaker:StopHyperParameterTuningJob", DEV_TUNING, DEV
    ),
    "start packhorse-dev's notebook": Ask("sagemaker:StartNotebookInstance", DEV_NOTEBOOK, DEV),
    "stop packhorse-dev's notebook": Ask("sagemaker:StopNotebookInstance", DEV_NOTEBOOK, DEV),
    "stop another team's notebook whose name begins like ours": Ask(
        "sagemaker:StopNotebookInstance", DEV_NOTEBOOK
    ),
    "call packhorse-dev's endpoint": Ask(
        "sagemaker:InvokeEndpoint", arn("sagemaker", "endpoint/packhorse-serving-dev"), DEV
    ),
    "terminate packhorse-dev's machine": Ask("ec2:TerminateInstances", INSTANCE, DEV),
    "rent a machine with packhorse-dev's tag": Ask(
        "ec2:RunInstances", INSTANCE, MACHINE | {"aws:RequestTag/project": "packhorse-dev"}
    ),
    "read packhorse-dev's bucket": Ask(
        "s3:GetObject", f"arn:aws:s3:::packhorse-dev-{ACCOUNT}-{REGION}/runs/r/output/model.tar.gz"
    ),
    "pass packhorse-dev's role": Ask(
        "iam:PassRole",
        f"arn:aws:iam::{ACCOUNT}:role/packhorse-dev-training",
        {"iam:PassedToService": "sagemaker.amazonaws.com"},
    ),
    "make a notebook with root": Ask(
        "sagemaker:CreateNotebookInstance",
        arn("sagemaker", "notebook-instance/packhorse-notebook"),
        NOTEBOOK | {"sagemaker:RootAccess": "Enabled"},
    ),
    "make a notebook with IMDSv1": Ask(
        "sagemaker:CreateNotebookInstance",
        arn("sagemaker", "notebook-instance/packhorse-notebook"),
        NOTEBOOK | {"sagemaker:MinimumInstanceMetadataServiceVersion": "1"},
    ),
    "open another's notebook": Ask(
        "sagemaker:CreatePresignedNotebookInstanceUrl",
        arn("sagemaker", "notebook-instance/website"),
    ),
    "make a notebook without saying on what": Ask(
        "sagemaker:CreateNotebookInstance",
        arn("sagemaker", "notebook-instance/packhorse-notebook"),
        {key: value for key, value in NOTEBOOK.items() if key != "sagemaker:InstanceTypes"},
    ),
    "make an endpoint": Ask(
        "sagemaker:CreateEndpoint", arn("sagemaker", "endpoint/packhorse-serving")
    ),
    "delete the endpoint": Ask(
        "sagemaker:DeleteEndpoint", arn("sagemaker", "endpoint/packhorse-serving")
    ),
    "call another endpoint": Ask("sagemaker:InvokeEndpoint", arn("sagemaker", "endpoint/website")),
    # logs, code, secrets
    "delete the log": Ask(
        "logs:DeleteLogGroup", arn("logs", "log-group:/aws/sagemaker/TrainingJobs:*")
    ),
    "change how long the account's logs are kept": Ask(
        "logs:PutRetentionPolicy", arn("logs", "log-group:/aws/sagemaker/TrainingJobs:*")
    ),
    "delete a job's log": Ask(
        "logs:DeleteLogStream",
        arn("logs", "log-group:/aws/sagemaker/TrainingJobs:log-stream:packhorse-r-1/algo-1"),
    ),
    "write another project's log": Ask(
        "logs:PutLogEvents", arn("logs", "log-group:/aws/lambda/website:log-stream:x")
    ),
    "change the function's code": Ask(
        "lambda:UpdateFunctionCode", arn("lambda", "function:packhorse-serving")
    ),
    "open the function to anyone": Ask(
        "lambda:AddPermission", arn("lambda", "function:packhorse-serving")
    ),
    "replace the container's image": Ask(
        "ecr:PutImage", arn("ecr", "repository/packhorse-serving")
    ),
    "delete the image that was built": Ask(
        "ecr:BatchDeleteImage", arn("ecr", "repository/packhorse-serving-image")
    ),
    "start a build": Ask(
        "codebuild:StartBuild", arn("codebuild", "project/packhorse-serving-image")
    ),
    "read a secret": Ask(
        "secretsmanager:GetSecretValue", arn("secretsmanager", "secret:database-AbCdEf")
    ),
    "read a parameter": Ask("ssm:GetParameter", arn("ssm", "parameter/database/password")),
    "run a command on a machine": Ask("ssm:SendCommand", INSTANCE),
    "decrypt with a key": Ask(
        "kms:Decrypt", arn("kms", "key/01234567-89ab-cdef-0123-456789abcdef")
    ),
}


# The audit looks at everything, and at settings alone.
CURIOUS = {
    "look at packhorse-dev's job": Ask("sagemaker:DescribeTrainingJob", DEV_JOB, DEV),
    "look at packhorse-dev's trials": Ask(
        "sagemaker:ListTrainingJobsForHyperParameterTuningJob", DEV_TUNING, DEV
    ),
    "look at packhorse-dev's endpoint": Ask(
        "sagemaker:DescribeEndpoint", arn("sagemaker", "endpoint/packhorse-dev-serving"), DEV
    ),
    "look at another team's endpoint": Ask(
        "sagemaker:DescribeEndpoint", arn("sagemaker", "endpoint/website")
    ),
}


def test_there_are_forty_dangerous_calls_and_more():
    assert len(DANGEROUS) >= 40 and len({ask.key for ask in DANGEROUS.values()}) == len(DANGEROUS)


# What the deployer is there for, on the project's own things: all else is denied to it too.
DEPLOYS = [
    "delete the bucket",
    "make the bucket public",
    "lift the block of public access",
    "delete an old version for good",
    "switch versioning off",
    "change its own policy",
]


@pytest.mark.parametrize("part", PARTS)
def test_dangerous_calls_are_denied(part, evaluator):
    answers = evaluator.decide([(effective_policy(part), ask) for ask in DANGEROUS.values()])
    allowed = [what for what, allowed in zip(DANGEROUS, answers, strict=True) if allowed]
    assert allowed == (DEPLOYS if part == "deployer" else [])


def test_a_deployer_makes_no_role_that_the_boundary_does_not_hold(evaluator):
    role = f"arn:aws:iam::{ACCOUNT}:role/packhorse-training-us-east-1"
    asks = [
        Ask(f"iam:{action}", role, context)
        for action in ("CreateRole", "PutRolePolicy", "AttachRolePolicy")
        for context in ({}, {"iam:PermissionsBoundary": "arn:aws:iam::aws:policy/PowerUserAccess"})
    ]
    asks += [
        Ask("iam:DeleteRolePermissionsBoundary", role),
        Ask("iam:CreatePolicyVersion", f"arn:aws:iam::{ACCOUNT}:policy/packhorse-boundary"),
        Ask("iam:CreatePolicyVersion", f"arn:aws:iam::{ACCOUNT}:policy/packhorse-deployer"),
    ]
    assert not any(evaluator.decide([(policy("deployer"), ask) for ask in asks]))


@pytest.mark.parametrize("part", [part for part in PARTS if part != "audit"])
def test_other_projects_things_are_not_looked_at(part, evaluator):
    answers = evaluator.decide([(effective_policy(part), ask) for ask in CURIOUS.values()])
    assert [what for what, allowed in zip(CURIOUS, answers, strict=True) if allowed] == []


def test_the_evaluator_would_allow_them(evaluator):
    """So that a denial above says something about our policies."""
    everything = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
    }
    assert all(evaluator.decide([(everything, ask) for ask in (DANGEROUS | CURIOUS).values()]))


# --- the proof's own footing ---


def test_the_list_by_hand_has_each_aws_command_of_the_machines_script():
    parts = ("user_data.sh", "uploads.sh")
    script = "".join((PROJECT / "launch/targets" / name).read_text() for name in parts)
    script = script.replace("\\\n", " ")
    commands = {
        " ".join(found.split())
        for found in re.findall(r"(?<=[^#\w])(aws [a-z0-9-]+ [^;|&>)\n]+)", script)
    }
    listed = [
        ask.by.removeprefix("user_data.sh: ")
        for ask in service_side("ec2")
        if ask.by.startswith("user_data.sh: ")
    ]
    assert [
        command for command in commands if not any(command.startswith(known) for known in listed)
    ] == []
    assert [
        known for known in listed if not any(command.startswith(known) for command in commands)
    ] == []


def test_what_iam_gets_is_what_is_proven(tmp_path, evaluator):
    """The template as moto's CloudFormation carries it out, against the policies read from it."""
    with running(tmp_path / "calls.jsonl", WHOLE) as cloud:
        told = [f"{name}={value}" for name, value in PARAMETERS.items()]
        code, printed = cloud.launch("up", "--yes", "--every", "0.05", *told)
        assert code == OK, printed
        iam = cloud.client("iam")
        for part in ("training", "ec2", "notebook"):
            role = f"packhorse-{part}-us-east-1"
            made = [
                statement
                for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
                for statement in documents.role_policy(cloud, role, name)["Statement"]
            ]
            assert by_sid({"Statement": made}) == by_sid(policy(part))
        found = []
        for name in ("packhorse-launcher-us-east-1", "packhorse-launcher-ec2-us-east-1"):
            found += iam.get_policy_version(
                PolicyArn=f"arn:aws:iam::{ACCOUNT}:policy/{name}", VersionId="v1"
            )["PolicyVersion"]["Document"]["Statement"]
        assert statements({"Statement": found}) == statements(policy("launcher"))


def by_sid(document: dict) -> dict[str, dict]:
    return {statement["Sid"]: statement for statement in statements(document)}


def statements(document: dict) -> list[dict]:
    return json.loads(json.dumps(document["Statement"]))


def test_the_page_shows_the_proof(asked):
    page = (PROJECT / "docs" / "security.md").read_text()
    assert documents.between(page, "permissions") == documents.permissions_table(asked), (
        "python -m tests.launch.documents writes it"
    )
    assert documents.between(page, "dangerous") == documents.bullets(DANGEROUS)
    assert documents.between(page, "rules") == documents.rules_table()
