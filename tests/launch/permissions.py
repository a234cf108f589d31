"""What each part asks of AWS: recorded calls as IAM sees them (action, resource, context), and an
evaluator that decides them offline.

The evaluator is @cloud-copilot/iam-simulate (npm, AGPL-3.0), a process of the tests and no part of
Packhorse.
"""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from launch.audit.account import CALLS
from launch.cloud.account_stack import Place
from launch.verbs.policy import PARTS, document, permissions
from tests.conftest import PROJECT

ACCOUNT, REGION, PROJECT_NAME = "123456789012", "us-east-1", "packhorse"
# All that `up` can be told, so that what it grants besides is proven too.
PARAMETERS = {
    "Image": f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/own-image",
    "PicturesBucket": "photos",
    "PicturesPrefix": "dogs/",
    "KmsKey": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/own",
    "OwnNetwork": "yes",
}
PLACE = Place(PROJECT_NAME, ACCOUNT, REGION, PARAMETERS)
BUCKET = f"{PROJECT_NAME}-{ACCOUNT}-{REGION}"
SIMULATOR = "@cloud-copilot/iam-simulate"  # its version: tests/launch/npm
OURS = {"aws:ResourceTag/project": PROJECT_NAME}
SERVICE_CALLS = Path(__file__).with_name("service_calls.yaml")


# Whose the bucket is that is asked for, which S3 tells with each request.
IN_ACCOUNT = {"aws:ResourceAccount": ACCOUNT}


@dataclass(frozen=True)
class Ask:
    """One question to IAM. by: the command, or the service, that asks."""

    action: str
    resource: str
    context: Mapping[str, str | list[str]] = field(default_factory=dict)
    by: str = ""
    on_what_is_there: bool = False  # which has tags

    @property
    def key(self) -> str:
        return json.dumps([self.action, self.resource, dict(self.context)], sort_keys=True)


def policy(part: str) -> dict[str, Any]:
    return document(permissions(part, PLACE))


def effective_policy(part: str) -> dict[str, Any]:
    """With what else is attached to the role: the notebook is a launcher too."""
    statements = permissions(part, PLACE)
    return document(
        [
            *statements,
            *(permissions("launcher", PLACE) if part == "notebook" else []),
        ]
    )


def service_side(part: str) -> list[Ask]:
    """What AWS's services ask under a part's role: the hand-written list."""
    return [
        Ask(
            ask["action"],
            ask["resource"].replace("BUCKET", BUCKET),
            ask.get("context", {}) | (IN_ACCOUNT if ask["action"].startswith("s3:") else {}),
            entry["by"],
        )
        for entry in yaml.safe_load(SERVICE_CALLS.read_text()).get(part, [])
        for ask in entry["asks"]
    ]


def unique(asks: Iterable[Ask]) -> list[Ask]:
    """Each question once, with all who ask it."""
    by_key: dict[str, list[Ask]] = {}
    for ask in asks:
        by_key.setdefault(ask.key, []).append(ask)
    return [
        Ask(
            same[0].action,
            same[0].resource,
            same[0].context,
            ", ".join(dict.fromkeys(ask.by for ask in same)),
        )
        for same in by_key.values()
    ]


# --- recorded calls, as IAM sees them ---


def asks_of(call: Mapping[str, Any], by: str) -> list[Ask]:
    """A recorded call (tests/launch/aws.py says in which form). Raises KeyError for an operation
    that is not known here.

    Which actions, resources and condition keys a call is decided by: AWS's Service Authorization
    Reference.
    """
    name, given = _named(call)
    operations = OPERATIONS if by not in ("up", "down") else OPERATIONS | DEPLOYS
    ours = (
        OURS if call["service"] == "sagemaker" and call["status"] == 200 else {}
    )  # what is not there has no tags
    return [
        Ask(
            ask.action,
            ask.resource,
            {**ask.context, **(ours if ask.on_what_is_there else {})},
            f"{by}: {name}",
        )
        for ask in operations[call["service"], name](given)
    ]


# Calls that are signed for one service and described in the model of another, where the record has
# no name for them: by their paths.
BY_PATH = {r"/endpoints/(?P<EndpointName>[^/]+)/invocations": "InvokeEndpoint"}


def _named(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Operation and parameters. Raises KeyError where the operation is not known."""
    if call["operation"] != "?":
        return call["operation"], call["parameters"]
    for pattern, name in BY_PATH.items():
        if match := re.fullmatch(pattern, call["parameters"]["path"]):
            return name, match.groupdict()
    raise KeyError(call)


def _arn(service: str, resource: str) -> str:
    return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{resource}"


def _s3(action: str, bucket_level: bool = False) -> Callable[[Mapping[str, Any]], list[Ask]]:
    def asks(given: Mapping[str, Any]) -> list[Ask]:
        bucket = f"arn:aws:s3:::{given['Bucket']}"
        if not bucket_level:
            keys = given.get("Keys") or [given["Key"]]
            return [Ask(f"s3:{action}", f"{bucket}/{key}") for key in keys]
        context = {
            f"s3:{name.lower()}": given[name] for name in ("Prefix", "Delimiter") if given.get(name)
        }
        return [Ask(f"s3:{action}", bucket, context if action.startswith("ListBucket") else {})]

    return asks


def _sagemaker(
    action: str, kind: str | None = None, key: str = ""
) -> Callable[[Mapping[str, Any]], list[Ask]]:
    def asks(given: Mapping[str, Any]) -> list[Ask]:
        if kind is None:
            return [Ask(f"sagemaker:{action}", "*")]
        return [
            Ask(
                f"sagemaker:{action}",
                _arn("sagemaker", f"{kind}/{given[key]}"),
                on_what_is_there=True,
            )
        ]

    return asks


def _creates(action: str, kind: str, key: str) -> Callable[[Mapping[str, Any]], list[Ask]]:
    """A call that makes something of SageMaker's.

    With a role, machines and tags it takes the right to pass and to tag too.
    """

    def asks(given: Mapping[str, Any]) -> list[Ask]:
        definition = given.get("TrainingJobDefinition", given)
        tags = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in given.get("Tags", [])}
        context: dict[str, Any] = dict(tags)
        chosen = definition.get("HyperParameterTuningResourceConfig", {}).get("InstanceConfigs")
        config = definition.get("ResourceConfig", definition)
        if machines := chosen or config.get("InstancePreferences") or [config]:
            names = [each["InstanceType"] for each in machines if "InstanceType" in each]
            if names:
                context["sagemaker:InstanceTypes"] = names
        if kind == "notebook-instance":
            context["sagemaker:RootAccess"] = given.get("RootAccess", "Enabled")
            context["sagemaker:DirectInternetAccess"] = given.get("DirectInternetAccess", "Enabled")
            metadata = given.get("InstanceMetadataServiceConfiguration", {})
            context["sagemaker:MinimumInstanceMetadataServiceVersion"] = metadata.get(
                "MinimumInstanceMetadataServiceVersion", "1"
            )
        arn = _arn("sagemaker", f"{kind}/{given[key]}")
        asks = [Ask(f"sagemaker:{action}", arn, context)]
        if tags:
            asks.append(Ask("sagemaker:AddTags", arn, tags | {"sagemaker:TaggingAction": action}))
        if role := definition.get("RoleArn"):
            asks.append(
                Ask("iam:PassRole", role, {"iam:PassedToService": "sagemaker.amazonaws.com"})
            )
        return asks

    return asks


def _everything(action: str) -> Callable[[Mapping[str, Any]], list[Ask]]:
    """An action that knows no resources."""
    return lambda given: [Ask(action, "*")]


def _run_instances(given: Mapping[str, Any]) -> list[Ask]:
    """RunInstances is decided once for each thing that it makes or uses.

    The parameters are flat, as on the wire.
    """
    tags: dict[str, dict[str, str]] = {}
    for name, value in given.items():
        if match := re.fullmatch(r"TagSpecification\.(\d+)\.Tag\.(\d+)\.Key", name):
            kind = given[f"TagSpecification.{match[1]}.ResourceType"]
            tags.setdefault(kind, {})[f"aws:RequestTag/{value}"] = given[
                f"TagSpecification.{match[1]}.Tag.{match[2]}.Value"
            ]
    group = given.get("Placement.GroupName")
    profile = f"arn:aws:iam::{ACCOUNT}:instance-profile/{given['IamInstanceProfile.Name']}"
    instance = {
        "ec2:InstanceType": given["InstanceType"],
        "ec2:MetadataHttpTokens": given.get("MetadataOptions.HttpTokens", "optional"),
        "ec2:InstanceProfile": profile,
    }
    made = {
        "instance": ("i-0123456789abcdef0", instance),
        "volume": ("vol-0123456789abcdef0", {}),
        "network-interface": ("eni-0123456789abcdef0", {}),
    }
    if given.get("InstanceMarketOptions.MarketType") == "spot":
        made["spot-instances-request"] = ("sir-01234567", {})
    asks = [Ask("ec2:RunInstances", f"arn:aws:ec2:{REGION}::image/{given['ImageId']}")]
    asks += [
        Ask("ec2:RunInstances", _arn("ec2", used))
        for used in (
            f"subnet/{given.get('SubnetId', 'subnet-01234567')}",
            "security-group/sg-01234567",
        )
    ]
    if group is not None:
        asks.append(Ask("ec2:RunInstances", _arn("ec2", f"placement-group/{group}"), OURS))
    for kind, (identifier, context) in made.items():
        arn = _arn("ec2", f"{kind}/{identifier}")
        asks.append(Ask("ec2:RunInstances", arn, context | tags.get(kind, {})))
        if kind in tags:
            asks.append(
                Ask("ec2:CreateTags", arn, tags[kind] | {"ec2:CreateAction": "RunInstances"})
            )
    asks.append(
        Ask(
            "iam:PassRole",
            f"arn:aws:iam::{ACCOUNT}:role/{given['IamInstanceProfile.Name']}",
            {"iam:PassedToService": "ec2.amazonaws.com"},
        )
    )
    return asks


def _make_placement_group(given: Mapping[str, Any]) -> list[Ask]:
    """With its tags, which are all given at its start."""
    arn = _arn("ec2", f"placement-group/{given['GroupName']}")
    names = [name for name in given if name.endswith(".Key")]
    tags = {
        f"aws:RequestTag/{given[name]}": given[name.removesuffix("Key") + "Value"] for name in names
    }
    return [
        Ask("ec2:CreatePlacementGroup", arn, tags),
        Ask("ec2:CreateTags", arn, tags | {"ec2:CreateAction": "CreatePlacementGroup"}),
    ]


def _terminate(given: Mapping[str, Any]) -> list[Ask]:
    """Our own machines, which carry our tag: nobody else's id comes into this call."""
    machines = [value for name, value in given.items() if name.startswith("InstanceId.")]
    return [
        Ask("ec2:TerminateInstances", _arn("ec2", f"instance/{machine}"), OURS)
        for machine in machines
    ]


def _search(given: Mapping[str, Any]) -> list[Ask]:
    """Held to what the search says that it may see."""
    seen = {
        f"sagemaker:SearchVisibilityCondition/{each['Key']}/EqualsIfExists": each["Value"]
        for each in given.get("VisibilityConditions", [])
    }
    return [Ask("sagemaker:Search", "*", seen)]


def _nothing(given: Mapping[str, Any]) -> list[Ask]:
    return []


TRAINING, TUNING = (
    ("training-job", "TrainingJobName"),
    ("hyper-parameter-tuning-job", "HyperParameterTuningJobName"),
)
NOTEBOOK = ("notebook-instance", "NotebookInstanceName")
SCRIPT = ("notebook-instance-lifecycle-config", "NotebookInstanceLifecycleConfigName")

OPERATIONS: dict[tuple[str, str], Callable[[Mapping[str, Any]], list[Ask]]] = {
    ("sts", "GetCallerIdentity"): _nothing,  # every caller may ask who it is
    ("s3", "HeadBucket"): _s3("ListBucket", bucket_level=True),
    ("s3", "ListObjectsV2"): _s3("ListBucket", bucket_level=True),
    ("s3", "ListObjectVersions"): _s3("ListBucketVersions", bucket_level=True),
    ("s3", "GetObject"): _s3("GetObject"),
    ("s3", "HeadObject"): _s3("GetObject"),
    ("s3", "PutObject"): _s3("PutObject"),
    ("s3", "CreateMultipartUpload"): _s3("PutObject"),
    ("s3", "UploadPart"): _s3("PutObject"),
    ("s3", "CompleteMultipartUpload"): _s3("PutObject"),
    ("s3", "DeleteObject"): _s3("DeleteObject"),
    ("s3", "DeleteObjects"): _s3("DeleteObject"),
    ("sagemaker", "CreateTrainingJob"): _creates("CreateTrainingJob", *TRAINING),
    ("sagemaker", "CreateHyperParameterTuningJob"): _creates(
        "CreateHyperParameterTuningJob", *TUNING
    ),
    ("sagemaker", "CreateNotebookInstance"): _creates("CreateNotebookInstance", *NOTEBOOK),
    ("sagemaker", "CreateNotebookInstanceLifecycleConfig"): _creates(
        "CreateNotebookInstanceLifecycleConfig", *SCRIPT
    ),
    **{
        ("sagemaker", f"{verb}TrainingJob"): _sagemaker(f"{verb}TrainingJob", *TRAINING)
        for verb in ("Describe", "Stop")
    },
    **{
        ("sagemaker", f"{verb}HyperParameterTuningJob"): _sagemaker(
            f"{verb}HyperParameterTuningJob", *TUNING
        )
        for verb in ("Describe", "Stop")
    },
    ("sagemaker", "ListTrainingJobsForHyperParameterTuningJob"): _sagemaker(
        "ListTrainingJobsForHyperParameterTuningJob", *TUNING
    ),
    **{
        ("sagemaker", f"{verb}NotebookInstance"): _sagemaker(f"{verb}NotebookInstance", *NOTEBOOK)
        for verb in ("Describe", "Start", "Stop")
    },
    **{
        ("sagemaker", name): _sagemaker(name, *NOTEBOOK)
        for name in (
            "CreatePresignedNotebookInstanceUrl",
            "DeleteNotebookInstance",
            "UpdateNotebookInstance",
        )
    },
    **{
        ("sagemaker", f"{verb}NotebookInstanceLifecycleConfig"): _sagemaker(
            f"{verb}NotebookInstanceLifecycleConfig", *SCRIPT
        )
        for verb in ("Delete", "Update")
    },
    ("sagemaker", "DescribeNotebookInstanceLifecycleConfig"): _sagemaker(
        "DescribeNotebookInstanceLifecycleConfig", *SCRIPT
    ),
    ("sagemaker", "DescribeEndpoint"): _sagemaker("DescribeEndpoint", "endpoint", "EndpointName"),
    ("sagemaker", "DescribeEndpointConfig"): _sagemaker(
        "DescribeEndpointConfig", "endpoint-config", "EndpointConfigName"
    ),
    ("sagemaker", "InvokeEndpoint"): _sagemaker("InvokeEndpoint", "endpoint", "EndpointName"),
    **{
        ("sagemaker", name): _sagemaker(name)
        for name in (
            "ListEndpoints",
            "ListHyperParameterTuningJobs",
            "ListNotebookInstances",
            "ListTrainingJobs",
        )
    },
    ("sagemaker", "Search"): _search,
    ("sagemaker", "ListTags"): lambda given: [
        Ask("sagemaker:ListTags", given["ResourceArn"], on_what_is_there=True)
    ],
    ("ec2", "RunInstances"): _run_instances,
    ("ec2", "CreatePlacementGroup"): _make_placement_group,
    ("ec2", "DeletePlacementGroup"): lambda given: [
        Ask("ec2:DeletePlacementGroup", _arn("ec2", f"placement-group/{given['GroupName']}"), OURS)
    ],
    ("ec2", "TerminateInstances"): _terminate,
    **{
        ("ec2", name): _everything(f"ec2:{name}")
        for name in (
            "DescribeInstances",
            "DescribeInstanceTypeOfferings",
            "DescribeRouteTables",
            "DescribeSecurityGroups",
            "DescribeSpotPriceHistory",
            "DescribeSubnets",
            "DescribeVolumes",
            "GetSpotPlacementScores",
        )
    },
    **{
        ("servicequotas", name): _everything(f"servicequotas:{name}")
        for name in ("GetAWSDefaultServiceQuota", "ListServiceQuotas")
    },
    ("servicequotas", "GetServiceQuota"): lambda given: [
        Ask(
            "servicequotas:GetServiceQuota",
            _arn("servicequotas", f"{given['ServiceCode']}/{given['QuotaCode']}"),
        )
    ],
    ("ec2", "GetConsoleOutput"): lambda given: [
        Ask("ec2:GetConsoleOutput", _arn("ec2", f"instance/{given['InstanceId']}"), OURS)
    ],
    ("ssm", "GetParameter"): lambda given: [
        Ask("ssm:GetParameter", f"arn:aws:ssm:{REGION}::parameter{given['Name']}")
    ],
    ("logs", "FilterLogEvents"): lambda given: [
        Ask("logs:FilterLogEvents", _arn("logs", f"log-group:{given['logGroupName']}:*"))
    ],
    ("pricing", "GetProducts"): _everything("pricing:GetProducts"),
}


DEPLOYS: dict[tuple[str, str], Callable[[Mapping[str, Any]], list[Ask]]] = {
    **{
        ("cloudformation", name): lambda given, name=name: [
            Ask(
                f"cloudformation:{name}",
                _arn("cloudformation", f"stack/{given['StackName']}/0123"),
            )
        ]
        for name in (
            "CreateChangeSet",
            "DeleteChangeSet",
            "DeleteStack",
            "DescribeChangeSet",
            "DescribeStackEvents",
            "ExecuteChangeSet",
            "ListStackResources",
        )
    },
    ("cloudformation", "DescribeStacks"): _everything("cloudformation:DescribeStacks"),
    ("s3", "GetBucketTagging"): _s3("GetBucketTagging", bucket_level=True),
    ("s3", "ListMultipartUploads"): _s3("ListBucketMultipartUploads", bucket_level=True),
    ("s3", "AbortMultipartUpload"): _s3("AbortMultipartUpload"),
    ("s3", "DeleteObjects"): _s3("DeleteObjectVersion"),  # by their versions alone
    **{
        ("sagemaker", f"List{kind}s"): _sagemaker(f"List{kind}s")
        for kind in ("HyperParameterTuningJob", "NotebookInstanceLifecycleConfig")
    },
    ("sagemaker", "DeleteTrainingJob"): _sagemaker("DeleteTrainingJob", *TRAINING),
    ("sagemaker", "DeleteHyperParameterTuningJob"): _sagemaker(
        "DeleteHyperParameterTuningJob", *TUNING
    ),
    ("ec2", "DescribePlacementGroups"): _everything("ec2:DescribePlacementGroups"),
    ("ec2", "DeleteVolume"): lambda given: [
        Ask("ec2:DeleteVolume", _arn("ec2", f"volume/{given['VolumeId']}"), OURS)
    ],
    ("iam", "ListEntitiesForPolicy"): lambda given: [
        Ask("iam:ListEntitiesForPolicy", given["PolicyArn"])
    ],
    **{
        ("iam", f"Detach{kind}Policy"): lambda given, kind=kind: [
            Ask(
                f"iam:Detach{kind}Policy",
                f"arn:aws:iam::{ACCOUNT}:{kind.lower()}/{given[f'{kind}Name']}",
                {"iam:PolicyARN": given["PolicyArn"]},
            )
        ]
        for kind in ("Group", "User")
    },
}


def audit_asks(call: Mapping[str, Any]) -> list[Ask]:
    """A recorded call of the audit.

    Its actions are granted on everything, since it looks for what should not be there.
    """
    names = {"monitoring": "cloudwatch", "access-analyzer": "accessanalyzer"}  # as they sign
    service, name = names.get(call["service"], call["service"]), call["operation"]
    action, _ = CALLS[service, name]
    return [Ask(action, "*", {}, f"audit: {name}")] if action else []


# --- deciding ---


class Evaluator:
    """One process, which reads what AWS's actions are once."""

    def __init__(self, package: Path) -> None:
        script = Path(__file__).with_name("evaluate.mjs")
        self._process = subprocess.Popen(
            ["node", str(script), str(package)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._process.communicate()

    def decide(self, questions: Sequence[tuple[dict[str, Any], Ask]]) -> list[bool]:
        """Return whether each policy allows what is asked.

        Raise AssertionError where the evaluator refuses the question itself.
        """
        policies = {
            json.dumps(each, sort_keys=True): f"p{number}"
            for number, each in enumerate(each for each, _ in questions)
        }
        asked = [
            {
                "policy": policies[json.dumps(each, sort_keys=True)],
                "action": ask.action,
                "resource": ask.resource,
                "context": dict(ask.context),
            }
            for each, ask in questions
        ]
        given = json.dumps(
            {
                "account": ACCOUNT,
                "policies": {name: json.loads(text) for text, name in policies.items()},
                "asks": asked,
            }
        )
        # The ARN of a parameter of AWS's own has no account, which the evaluator takes for no
        # parameter's ARN.
        given = given.replace(f":ssm:{REGION}::parameter/", f":ssm:{REGION}:aws:parameter/")
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.write(f"{given}\n")
        self._process.stdin.flush()
        answered = self._process.stdout.readline()
        assert answered, self._process.stderr.read()
        answers = json.loads(answered)
        refused = [
            (ask.action, ask.resource, dict(ask.context), answer)
            for (_, ask), answer in zip(questions, answers, strict=True)
            if answer not in (True, False)
        ]
        assert not refused, refused
        return answers


def find_evaluator() -> Evaluator | str:
    """Return the evaluator that `.ci/setup dev` installed; or why there is none."""
    package = PROJECT / ".venv/npm/node_modules" / SIMULATOR
    if not (package / "package.json").exists() or not shutil.which("node"):
        return (
            f"{SIMULATOR} is not installed: .ci/setup dev installs it where there are node and npm"
        )
    return Evaluator(package)


# --- what a policy would be with less in it ---


@dataclass(frozen=True)
class Grant:
    """One action on one resource of a statement."""

    sid: str
    reason: str
    action: str
    resource: str


def grants(part: str) -> list[Grant]:
    return [
        Grant(statement.sid, statement.reason, action, resource)
        for statement in permissions(part, PLACE)
        for action in statement.actions
        for resource in statement.resources
        if _fits(action, resource)
    ]


def without(policy: dict[str, Any], grant: Grant) -> dict[str, Any]:
    """The policy less one action on one resource; whatever else the statement grants stays."""
    statements = []
    for statement in policy["Statement"]:
        actions, resources = _listed(statement["Action"]), _listed(statement["Resource"])
        if statement["Sid"] != grant.sid:
            statements.append(statement)
            continue
        if others := [action for action in actions if action != grant.action]:
            statements.append(statement | {"Action": others})
        if others := [resource for resource in resources if resource != grant.resource]:
            statements.append(
                statement | {"Sid": f"{grant.sid}Rest", "Action": grant.action, "Resource": others}
            )
    return {**policy, "Statement": statements}


def narrowed(policy: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The policy with one value less in a condition that lists several, each in turn.

    Not the lists of machines, which the owner chooses.
    """
    for number, statement in enumerate(policy["Statement"]):
        for test, keys in statement.get("Condition", {}).items():
            for key, values in keys.items():
                if isinstance(values, list) and key.lower() not in (
                    "sagemaker:instancetypes",
                    "ec2:instancetype",
                ):
                    for value in values:
                        less = copy.deepcopy(policy)
                        less["Statement"][number]["Condition"][test][key] = [
                            other for other in values if other != value
                        ]
                        yield f"{statement['Sid']}: {key} {value}", less


# --- what lies just beyond what a policy grants ---


OTHER = "website"  # a name that is nobody's here
# EC2 numbers these itself: their tags decide, and not their names.
NUMBERED = re.compile(
    r"arn:aws:ec2:[^:]*:\d*:"
    r"(instance|volume|network-interface|subnet|security-group|image|spot-instances-request)/.*"
)


def beyond(rights: dict[str, Any], ask: Ask) -> Iterator[Ask]:
    """The same call outside of each thing that bounds it: another's, or with another value."""
    conditions = _conditions(rights, ask)
    for key, value in ask.context.items():
        if ("Null", key.lower()) in conditions:
            less = {name: each for name, each in ask.context.items() if name != key}
            yield Ask(ask.action, ask.resource, less)
        if any(test != "Null" and name == key.lower() for test, name in conditions):
            other = f"{OTHER}/" if key == "s3:prefix" else OTHER
            changed = [other] if isinstance(value, list) else other
            yield Ask(ask.action, ask.resource, {**ask.context, key: changed})
    if ask.resource == "*" or NUMBERED.fullmatch(ask.resource):
        return
    *start, name = ask.resource.split(":", 5)
    for other in _others(name, start[2]):
        if other != name:
            yield Ask(ask.action, ":".join([*start, other]), ask.context)


def _conditions(rights: dict[str, Any], ask: Ask) -> set[tuple[str, str]]:
    """What bounds a call, beside its resource: tests, and the context keys that they are of."""
    return {
        (test, key.lower())
        for statement in rights["Statement"]
        if ask.action in _listed(statement["Action"])
        and any(fnmatchcase(ask.resource, each) for each in _listed(statement["Resource"]))
        for test, keys in statement.get("Condition", {}).items()
        for key in keys
    }


def _others(name: str, service: str) -> list[str]:
    """Names like one, of things that aren't there for the project. name: the end of an ARN."""
    if service == "s3":
        bucket, _, key = name.partition("/")
        if not key:
            return [OTHER]
        return [f"{OTHER}/{key}", f"{bucket}/{OTHER}/{key.partition('/')[2]}"]
    others = [
        re.sub(rf"{PROJECT_NAME}[\w-]*", OTHER, name),
        re.sub(r"(?<=log-group:)[^:]+", OTHER, name),
    ]
    return others if set(others) != {name} else [re.sub(r"(?<=[/:]).*", OTHER, name, count=1)]


def widened(rights: dict[str, Any]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The policy less one bound, each in turn: a condition, or the end of a resource's name.

    With the number of the statement, and the bound in words.
    """
    for number, statement in enumerate(rights["Statement"]):
        for test, keys in statement.get("Condition", {}).items():
            for key in keys:
                wider = copy.deepcopy(rights)
                del wider["Statement"][number]["Condition"][test][key]
                yield number, f"{statement['Sid']}: {test} {key}", wider
        for place, resource in enumerate(_listed(statement["Resource"])):
            *start, name = resource.split(":", 5)
            kind = re.match(r"[^/]+/(?=[^*])" if "s3" in start else r"[\w-]+[/:]", name)
            if resource == "*" or name == f"{kind[0] if kind else ''}*":
                continue
            wider = copy.deepcopy(rights)
            resources = _listed(wider["Statement"][number]["Resource"])
            resources[place] = ":".join([*start, f"{kind[0] if kind else ''}*"])
            wider["Statement"][number]["Resource"] = resources
            yield number, f"{statement['Sid']}: {resource}", wider


# Resources of an action that the Service Authorization Reference leaves out, and the user guide
# asks for: "Spot Instance permissions".
NOT_LISTED = {"ec2:RunInstances": (_arn("ec2", "spot-instances-request/*"),)}


def _fits(action: str, resource: str) -> bool:
    """Return whether the action can be held to such a resource at all.

    A statement may name several kinds for several actions.
    """
    from launch.audit.policies import resource_forms

    patterns = [
        re.sub(r"\\\$\\\{\w+\\\}", "[^:]*", re.escape(form)) for form in resource_forms(action)
    ]
    # A log group's ARN ends in `:*`, which stands for the group and for each of its streams.
    forms = {resource, resource.removesuffix(":*"), re.sub(r":\*$", ":log-stream:*", resource)}
    return (
        resource == "*"
        or resource in NOT_LISTED.get(action, ())
        or any(re.fullmatch(pattern, form) for pattern in patterns for form in forms)
    )


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


assert set(PARTS) >= set(yaml.safe_load(SERVICE_CALLS.read_text()))
