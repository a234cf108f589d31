"""What the audit reads of an account: plain descriptions, as AWS gives them, of what belongs to machine learning."""

import base64
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from launch.cloud.session import Aws, AwsError, partition

Description = dict[str, Any]  # what a Describe... call of botocore answers

# Every call that the audit makes, with the IAM action behind it and what it is for. All of them read, and none reads data: no object, no log line.
CALLS = {
    ("sts", "GetCallerIdentity"): (None, "which account this is; needs no permission"),
    ("iam", "GetAccountAuthorizationDetails"): (
        "iam:GetAccountAuthorizationDetails",
        "roles, users and groups with all their policies, in one call",
    ),
    ("iam", "ListAccessKeys"): ("iam:ListAccessKeys", "the age of users' keys"),
    ("s3", "ListBuckets"): ("s3:ListAllMyBuckets", "which buckets there are"),
    ("s3", "GetBucketTagging"): ("s3:GetBucketTagging", "which of them belong to a project"),
    ("s3", "GetBucketPolicy"): ("s3:GetBucketPolicy", "who may read a bucket"),
    ("s3", "GetBucketAcl"): ("s3:GetBucketAcl", "who may read a bucket by the older way"),
    ("s3", "GetPublicAccessBlock"): (
        "s3:GetBucketPublicAccessBlock",
        "whether a bucket can be made public at all",
    ),
    ("s3", "GetBucketVersioning"): (
        "s3:GetBucketVersioning",
        "whether an overwritten model is lost",
    ),
    ("s3", "GetBucketLifecycleConfiguration"): (
        "s3:GetLifecycleConfiguration",
        "whether broken uploads are paid for ever",
    ),
    ("s3control", "GetPublicAccessBlock"): (
        "s3:GetAccountPublicAccessBlock",
        "whether any bucket of the account can be made public",
    ),
    ("sagemaker", "ListNotebookInstances"): (
        "sagemaker:ListNotebookInstances",
        "which notebooks there are",
    ),
    ("sagemaker", "DescribeNotebookInstance"): (
        "sagemaker:DescribeNotebookInstance",
        "root access, network, metadata service, idle time",
    ),
    ("sagemaker", "ListEndpoints"): ("sagemaker:ListEndpoints", "which endpoints there are"),
    ("sagemaker", "DescribeEndpoint"): (
        "sagemaker:DescribeEndpoint",
        "how many machines an endpoint holds",
    ),
    ("sagemaker", "DescribeEndpointConfig"): (
        "sagemaker:DescribeEndpointConfig",
        "which machines and models",
    ),
    ("sagemaker", "DescribeModel"): ("sagemaker:DescribeModel", "a model's role and network"),
    ("sagemaker", "ListTrainingJobs"): (
        "sagemaker:ListTrainingJobs",
        "the jobs of the last 30 days",
    ),
    ("sagemaker", "DescribeTrainingJob"): (
        "sagemaker:DescribeTrainingJob",
        "their role, time limit and settings",
    ),
    ("sagemaker", "ListDomains"): ("sagemaker:ListDomains", "Studio domains"),
    ("sagemaker", "DescribeDomain"): (
        "sagemaker:DescribeDomain",
        "how Studio reaches the internet",
    ),
    ("lambda", "ListFunctions"): (
        "lambda:ListFunctions",
        "which functions there are, their role, runtime and environment",
    ),
    ("lambda", "ListTags"): ("lambda:ListTags", "which of them belong to a project"),
    ("lambda", "GetPolicy"): ("lambda:GetPolicy", "who may call a function"),
    ("lambda", "ListFunctionUrlConfigs"): (
        "lambda:ListFunctionUrlConfigs",
        "whether a function has a public URL",
    ),
    ("lambda", "ListProvisionedConcurrencyConfigs"): (
        "lambda:ListProvisionedConcurrencyConfigs",
        "environments that are kept warm and paid",
    ),
    ("ec2", "DescribeInstances"): (
        "ec2:DescribeInstances",
        "which instances there are and how they are set up",
    ),
    ("ec2", "DescribeInstanceAttribute"): ("ec2:DescribeInstanceAttribute", "secrets in user data"),
    ("ec2", "DescribeVolumes"): (
        "ec2:DescribeVolumes",
        "encryption, and volumes that nothing uses",
    ),
    ("ec2", "DescribeSecurityGroups"): ("ec2:DescribeSecurityGroups", "ports open to the world"),
    ("ec2", "DescribeAddresses"): ("ec2:DescribeAddresses", "addresses that are paid and unused"),
    ("logs", "DescribeLogGroups"): (
        "logs:DescribeLogGroups",
        "logs that are kept, and paid, for ever",
    ),
    ("cloudwatch", "GetMetricData"): ("cloudwatch:GetMetricData", "what has been idle"),
}

ABSENT = re.compile(r"NoSuch|NotFound|ResourceNotFoundException|does not exist", re.IGNORECASE)
DENIED = re.compile(r"AccessDenied|Unauthorized|AuthorizationError", re.IGNORECASE)
ACCELERATED = re.compile(r"(p|g|gr|inf|trn|dl|vt)\d")  # families of instances with accelerators
JOB_DAYS = 30  # training jobs older than this say little about how the account is used


@dataclass(frozen=True)
class Policy:
    name: str
    arn: str | None  # None: written into the identity itself
    document: Description

    @property
    def by_aws(self) -> bool:
        return self.arn is not None and ":iam::aws:policy/" in self.arn


@dataclass(frozen=True)
class Identity:
    kind: str  # role, user or group
    name: str
    arn: str
    policies: tuple[Policy, ...]
    trust: Description = field(default_factory=dict)  # of a role: who may assume it
    tags: dict[str, str] = field(default_factory=dict)
    created: datetime | None = None
    used: datetime | None = None  # of a role: when it was last used
    groups: tuple[str, ...] = ()  # of a user
    keys: tuple[Description, ...] = ()  # of a user: access keys

    @property
    def services(self) -> list[str]:
        """The services that may assume this role, like sagemaker."""
        found = []
        for statement in listed(self.trust.get("Statement", [])):
            principal = statement.get("Principal", {})
            if statement.get("Effect") == "Allow" and isinstance(principal, dict):
                found += [name.split(".")[0] for name in listed(principal.get("Service", []))]
        return found


@dataclass
class Account:
    id: str
    region: str
    now: datetime
    idle_days: float  # how long something must have done nothing to be called idle
    identities: list[Identity] = field(default_factory=list)
    public_access_block: Description | None = None  # of the whole account
    buckets: list[Description] = field(default_factory=list)
    notebooks: list[Description] = field(default_factory=list)
    domains: list[Description] = field(default_factory=list)
    endpoints: list[Description] = field(default_factory=list)
    models: list[Description] = field(default_factory=list)
    jobs: list[Description] = field(default_factory=list)
    functions: list[Description] = field(default_factory=list)
    instances: list[Description] = field(default_factory=list)
    volumes: list[Description] = field(default_factory=list)
    security_groups: dict[str, Description] = field(default_factory=dict)
    addresses: list[Description] = field(default_factory=list)
    log_groups: list[Description] = field(default_factory=list)
    unread: list[str] = field(
        default_factory=list
    )  # what the caller was not allowed to see: an action and why it is needed

    @property
    def partition(self) -> str:
        return partition(self.region)

    def arn(self, service: str, resource: str) -> str:
        return f"arn:{self.partition}:{service}:{self.region}:{self.id}:{resource}"

    def days_since(self, moment: datetime) -> float:
        return (self.now - moment) / timedelta(days=1)


def listed(value: Any) -> list[Any]:
    """IAM writes one value where a list of one is meant."""
    return value if isinstance(value, list) else [value]


def needed_policy() -> Description:
    """The policy that a caller of the audit needs: to read, and nothing else."""
    actions = sorted({action for action, _ in CALLS.values() if action})
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "ReadSettings", "Effect": "Allow", "Action": actions, "Resource": "*"}
        ],
    }


class Reader:
    """Calls AWS. What the caller may not see is noted and left out, so that the rest can still be judged."""

    def __init__(self, aws: Aws) -> None:
        self.aws = aws
        self.unread: dict[str, str] = {}  # action: purpose

    def call(self, service: str, operation: str, **parameters: Any) -> Description | None:
        """The answer, or None where there is no such thing or the caller may not see it."""
        return next(
            self._answers(
                service, operation, lambda: iter([self.aws.call(service, operation, **parameters)])
            ),
            None,
        )

    def all(self, service: str, operation: str, key: str, **parameters: Any) -> list[Description]:
        """What all pages of an answer list under `key`."""
        return list(
            self._answers(
                service, operation, lambda: self.aws.pages(service, operation, key, **parameters)
            )
        )

    def _answers(
        self, service: str, operation: str, answers: Callable[[], Iterator[Description]]
    ) -> Iterator[Description]:
        action, purpose = CALLS[service, operation]
        try:
            yield from answers()
        except AwsError as error:
            if DENIED.search(error.code):
                self.unread[action or operation] = purpose
            elif not ABSENT.search(f"{error.code} {error.message}"):
                raise


def read(aws: Aws, idle_days: float, everything: bool) -> Account:
    """Reads the account of the caller in one region.

    idle_days: how long something must have done nothing to be called idle. everything: also what does not belong to machine learning.
    Raises AwsError, except where the caller may not see something.
    """
    reader = Reader(aws)
    account = Account(aws.account, aws.region, datetime.now(UTC), idle_days)
    account.identities = list(_identities(reader))
    answer = reader.call("s3control", "GetPublicAccessBlock", AccountId=account.id)
    account.public_access_block = answer and answer["PublicAccessBlockConfiguration"]
    account.buckets = _buckets(reader)
    _read_sagemaker(reader, account)
    account.functions = _functions(reader)
    account.instances = _instances(reader)
    account.volumes = reader.all("ec2", "DescribeVolumes", "Volumes")
    account.security_groups = {
        group["GroupId"]: group
        for group in reader.all("ec2", "DescribeSecurityGroups", "SecurityGroups")
    }
    account.addresses = (reader.call("ec2", "DescribeAddresses") or {}).get(
        "Addresses", []
    )  # in one page
    account.log_groups = reader.all("logs", "DescribeLogGroups", "logGroups")
    if not everything:
        _keep_machine_learning(account)
    _read_activity(reader, account)
    account.unread = [f"{action}: {purpose}" for action, purpose in sorted(reader.unread.items())]
    return account


def _identities(reader: Reader) -> Iterator[Identity]:
    def details(key: str, *kinds: str) -> list[Description]:
        return reader.all("iam", "GetAccountAuthorizationDetails", key, Filter=list(kinds))

    documents = {
        policy["Arn"]: next(
            version["Document"]
            for version in policy["PolicyVersionList"]
            if version["IsDefaultVersion"]
        )
        for policy in details(
            "Policies", "LocalManagedPolicy"
        )  # AWS's own are known by their names
    }

    def policies(detail: Description, inline: str) -> tuple[Policy, ...]:
        attached = [
            Policy(entry["PolicyName"], entry["PolicyArn"], documents.get(entry["PolicyArn"], {}))
            for entry in detail["AttachedManagedPolicies"]
        ]
        return (
            *attached,
            *(
                Policy(entry["PolicyName"], None, entry["PolicyDocument"])
                for entry in detail.get(inline, [])
            ),
        )

    for role in details("RoleDetailList", "Role"):
        if not role["Path"].startswith(
            "/aws-service-role/"
        ):  # AWS's own, which nobody else may change
            yield Identity(
                "role",
                role["RoleName"],
                role["Arn"],
                policies(role, "RolePolicyList"),
                trust=role["AssumeRolePolicyDocument"],
                tags=_tags(role.get("Tags", [])),
                created=role["CreateDate"],
                used=role.get("RoleLastUsed", {}).get("LastUsedDate"),
            )
    for user in details("UserDetailList", "User"):
        yield Identity(
            "user",
            user["UserName"],
            user["Arn"],
            policies(user, "UserPolicyList"),
            tags=_tags(user.get("Tags", [])),
            created=user["CreateDate"],
            groups=tuple(user.get("GroupList", [])),
            keys=tuple(
                reader.all("iam", "ListAccessKeys", "AccessKeyMetadata", UserName=user["UserName"])
            ),
        )
    for group in details("GroupDetailList", "Group"):
        yield Identity(
            "group", group["GroupName"], group["Arn"], policies(group, "GroupPolicyList")
        )


def _buckets(reader: Reader) -> list[Description]:
    buckets = []
    for entry in reader.all("s3", "ListBuckets", "Buckets"):
        name = entry["Name"]
        policy = reader.call("s3", "GetBucketPolicy", Bucket=name)
        block = reader.call("s3", "GetPublicAccessBlock", Bucket=name)
        buckets.append(
            {
                "Name": name,
                "Tags": _tags(
                    (reader.call("s3", "GetBucketTagging", Bucket=name) or {}).get("TagSet", [])
                ),
                "Policy": _document((policy or {}).get("Policy")),
                "Grants": (reader.call("s3", "GetBucketAcl", Bucket=name) or {}).get("Grants", []),
                "PublicAccessBlock": block and block["PublicAccessBlockConfiguration"],
                "Versioning": (reader.call("s3", "GetBucketVersioning", Bucket=name) or {}).get(
                    "Status"
                ),
                "Lifecycle": (
                    reader.call("s3", "GetBucketLifecycleConfiguration", Bucket=name) or {}
                ).get("Rules", []),
            }
        )
    return buckets


def _read_sagemaker(reader: Reader, account: Account) -> None:
    def described(
        listing: str, key: str, describe: str, name: str, **parameters: Any
    ) -> list[Description]:
        found = (
            reader.call("sagemaker", describe, **{name: entry[name]})
            for entry in reader.all("sagemaker", listing, key, **parameters)
        )
        return [entry for entry in found if entry]

    account.notebooks = described(
        "ListNotebookInstances",
        "NotebookInstances",
        "DescribeNotebookInstance",
        "NotebookInstanceName",
    )
    account.domains = described("ListDomains", "Domains", "DescribeDomain", "DomainId")
    account.endpoints = described("ListEndpoints", "Endpoints", "DescribeEndpoint", "EndpointName")
    since = account.now - timedelta(days=JOB_DAYS)
    account.jobs = described(
        "ListTrainingJobs",
        "TrainingJobSummaries",
        "DescribeTrainingJob",
        "TrainingJobName",
        CreationTimeAfter=since,
    )
    models = set()
    for endpoint in account.endpoints:
        config = (
            reader.call(
                "sagemaker",
                "DescribeEndpointConfig",
                EndpointConfigName=endpoint["EndpointConfigName"],
            )
            or {}
        )
        endpoint["Config"] = config
        models |= {
            variant["ModelName"]
            for variant in config.get("ProductionVariants", [])
            if "ModelName" in variant
        }
    account.models = [
        model
        for name in sorted(models)
        if (model := reader.call("sagemaker", "DescribeModel", ModelName=name))
    ]


def _functions(reader: Reader) -> list[Description]:
    functions = reader.all("lambda", "ListFunctions", "Functions")
    for function in functions:
        name = function["FunctionName"]
        policy = reader.call("lambda", "GetPolicy", FunctionName=name)
        function["Policy"] = _document((policy or {}).get("Policy"))
        function["Tags"] = (
            reader.call("lambda", "ListTags", Resource=function["FunctionArn"]) or {}
        ).get("Tags", {})
        function["Urls"] = reader.all(
            "lambda", "ListFunctionUrlConfigs", "FunctionUrlConfigs", FunctionName=name
        )
        function["Provisioned"] = reader.all(
            "lambda",
            "ListProvisionedConcurrencyConfigs",
            "ProvisionedConcurrencyConfigs",
            FunctionName=name,
        )
    return functions


def _instances(reader: Reader) -> list[Description]:
    alive = [
        {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}
    ]
    instances = [
        entry
        for group in reader.all("ec2", "DescribeInstances", "Reservations", Filters=alive)
        for entry in group["Instances"]
    ]
    for instance in instances:
        answer = (
            reader.call(
                "ec2",
                "DescribeInstanceAttribute",
                InstanceId=instance["InstanceId"],
                Attribute="userData",
            )
            or {}
        )
        instance["UserData"] = _user_data(answer.get("UserData", {}).get("Value", ""))
    return instances


def _user_data(encoded: str) -> str:
    data = base64.b64decode(encoded)
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):  # it only began like gzip
            return ""
    return data.decode(errors="replace")


def _read_activity(reader: Reader, account: Account) -> None:
    """Adds "Activity" to endpoints, functions and instances: the metric's value over the last idle_days, None where CloudWatch has none."""
    watched: list[tuple[Description, str, str, str, dict[str, str]]] = [
        *(
            (
                endpoint,
                "AWS/SageMaker",
                "Invocations",
                "Sum",
                {"EndpointName": endpoint["EndpointName"], "VariantName": variant["VariantName"]},
            )
            for endpoint in account.endpoints
            for variant in endpoint.get("ProductionVariants", [])
        ),
        *(
            (
                function,
                "AWS/Lambda",
                "Invocations",
                "Sum",
                {"FunctionName": function["FunctionName"]},
            )
            for function in account.functions
        ),
        *(
            (
                instance,
                "AWS/EC2",
                "CPUUtilization",
                "Maximum",
                {"InstanceId": instance["InstanceId"]},
            )
            for instance in account.instances
        ),
    ]
    period = 3600
    start = account.now - timedelta(days=account.idle_days)
    for first in range(0, len(watched), 500):  # GetMetricData takes 500 metrics at once
        queries = []
        for number, (_, namespace, metric, statistic, dimensions) in enumerate(
            watched[first : first + 500]
        ):
            names = [{"Name": name, "Value": value} for name, value in dimensions.items()]
            stat = {
                "Metric": {"Namespace": namespace, "MetricName": metric, "Dimensions": names},
                "Period": period,
                "Stat": statistic,
            }
            queries.append({"Id": f"m{number}", "MetricStat": stat})
        for result in reader.all(
            "cloudwatch",
            "GetMetricData",
            "MetricDataResults",
            MetricDataQueries=queries,
            StartTime=start,
            EndTime=account.now,
        ):
            if result["Values"]:
                what = watched[first + int(result["Id"][1:])][0]
                what["Activity"] = max(what.get("Activity", 0.0), *result["Values"])


# --- what belongs to machine learning ---


def _keep_machine_learning(account: Account) -> None:
    """Leaves SageMaker's own things, those tagged with a project, accelerated instances, and whatever shares a role or a bucket with them."""
    callers = {entry.arn for entry in account.identities if _mentions(entry, "sagemaker:", "*")}
    account.functions = [
        entry
        for entry in account.functions
        if "project" in entry["Tags"] or entry["Role"] in callers
    ]
    profiles = {
        entry.arn
        for entry in account.identities
        if "project" in entry.tags or _mentions(entry, "sagemaker:")
    }
    account.instances = [
        entry
        for entry in account.instances
        if "project" in _tags(entry.get("Tags", []))
        or ACCELERATED.match(entry["InstanceType"])
        or entry.get("IamInstanceProfile", {})
        .get("Arn", "")
        .replace(":instance-profile/", ":role/")
        in profiles
    ]
    used = {entry.get("RoleArn") for entry in (*account.notebooks, *account.jobs)} | {
        entry.get("ExecutionRoleArn") for entry in account.models
    }
    used |= {
        entry.get("DefaultUserSettings", {}).get("ExecutionRole") for entry in account.domains
    } | {entry["Role"] for entry in account.functions}
    used |= {
        entry.get("IamInstanceProfile", {}).get("Arn", "").replace(":instance-profile/", ":role/")
        for entry in account.instances
    }
    groups = {
        entry.name
        for entry in account.identities
        if entry.kind == "group" and _mentions(entry, "sagemaker:")
    }
    account.identities = [
        entry
        for entry in account.identities
        if entry.arn in used
        or "project" in entry.tags
        or "sagemaker" in entry.services
        or _mentions(entry, "sagemaker:")
        or groups & set(entry.groups)
    ]
    texts = [
        str(policy.document)
        for entry in account.identities
        for policy in entry.policies
        if not policy.by_aws
    ]
    texts += [
        str((entry.get("InputDataConfig"), entry.get("OutputDataConfig"))) for entry in account.jobs
    ] + [str(entry) for entry in account.models]
    account.buckets = [
        entry
        for entry in account.buckets
        if "project" in entry["Tags"]
        or "sagemaker" in entry["Name"]
        or any(re.search(rf"[:/]{re.escape(entry['Name'])}\b(?!-)", text) for text in texts)
    ]
    instances = {entry["InstanceId"] for entry in account.instances}
    account.volumes = [
        entry
        for entry in account.volumes
        if "project" in _tags(entry.get("Tags", []))
        or any(attachment["InstanceId"] in instances for attachment in entry["Attachments"])
    ]
    attached = {
        group["GroupId"] for entry in account.instances for group in entry.get("SecurityGroups", [])
    }
    attached |= {group for entry in account.notebooks for group in entry.get("SecurityGroups", [])}
    account.security_groups = {
        name: group for name, group in account.security_groups.items() if name in attached
    }
    account.addresses = [
        entry for entry in account.addresses if "project" in _tags(entry.get("Tags", []))
    ]
    names = {f"/aws/lambda/{entry['FunctionName']}" for entry in account.functions}
    account.log_groups = [
        entry
        for entry in account.log_groups
        if entry["logGroupName"].startswith("/aws/sagemaker/") or entry["logGroupName"] in names
    ]


def _mentions(identity: Identity, *beginnings: str) -> bool:
    """Whether a policy allows an action that begins so, or is one of AWS's for SageMaker."""
    return any(policy.by_aws and "SageMaker" in policy.name for policy in identity.policies) or any(
        action.lower().startswith(beginnings)
        for policy in identity.policies
        for statement in listed(policy.document.get("Statement", []))
        if statement.get("Effect") == "Allow"
        for action in listed(statement.get("Action", []))
    )


def _tags(tags: Iterable[Description]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in tags}


def _document(text: str | None) -> Description:
    document: Description = json.loads(text) if text else {}
    return document
