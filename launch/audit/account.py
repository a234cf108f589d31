"""What the audit reads of an account: identities with their policies, and resources that may idle.

Descriptions are plain data, as AWS returns them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from launch.cloud.account_stack import as_list
from launch.cloud.session import Aws, AwsError, partition

Description = dict[str, Any]  # the answer of a Describe... call of botocore

# Every call of the audit, with its IAM action and purpose. All of them only read, and none reads
# data: no object, no log line.
CALLS = {
    ("sts", "GetCallerIdentity"): (None, "which account this is; needs no permission"),
    ("iam", "GetAccountAuthorizationDetails"): (
        "iam:GetAccountAuthorizationDetails",
        "roles, users and groups with all their policies, in one call",
    ),
    ("accessanalyzer", "ValidatePolicy"): (
        "access-analyzer:ValidatePolicy",
        "what AWS's own check says of a policy; without it a change is checked here alone",
    ),
    ("s3", "ListBuckets"): ("s3:ListAllMyBuckets", "which buckets a policy could name"),
    ("s3", "GetBucketTagging"): ("s3:GetBucketTagging", "which of them belong to a project"),
    ("sagemaker", "ListNotebookInstances"): (
        "sagemaker:ListNotebookInstances",
        "which notebooks there are, and since when they run",
    ),
    ("sagemaker", "ListEndpoints"): ("sagemaker:ListEndpoints", "which endpoints there are"),
    ("sagemaker", "DescribeEndpoint"): (
        "sagemaker:DescribeEndpoint",
        "how many machines an endpoint holds",
    ),
    ("sagemaker", "DescribeEndpointConfig"): (
        "sagemaker:DescribeEndpointConfig",
        "which machines these are",
    ),
    ("lambda", "ListFunctions"): (
        "lambda:ListFunctions",
        "which functions there are, and their role",
    ),
    ("lambda", "ListTags"): ("lambda:ListTags", "which of them belong to a project"),
    ("lambda", "ListProvisionedConcurrencyConfigs"): (
        "lambda:ListProvisionedConcurrencyConfigs",
        "environments that are kept warm and paid",
    ),
    ("ec2", "DescribeInstances"): ("ec2:DescribeInstances", "which instances there are"),
    ("ec2", "DescribeVolumes"): ("ec2:DescribeVolumes", "volumes that nothing uses"),
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
METRICS_A_CALL = 500  # GetMetricData takes no more at once
HOUR = 3600  # seconds


@dataclass(frozen=True)
class Policy:
    """A policy of an identity. arn: None where it is written into the identity itself."""

    name: str
    arn: str | None
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

    @property
    def services(self) -> list[str]:
        """The services that may assume this role, like sagemaker."""
        names: list[str] = []
        for statement in as_list(self.trust.get("Statement", [])):
            principal = statement.get("Principal", {})
            if statement.get("Effect") == "Allow" and isinstance(principal, dict):
                names += [name.split(".")[0] for name in as_list(principal.get("Service", []))]
        return names

    def allows(self, *beginnings: str) -> bool:
        """Return whether a policy allows an action with this prefix, or is AWS's for SageMaker."""
        if any(policy.by_aws and "SageMaker" in policy.name for policy in self.policies):
            return True
        return any(
            action.lower().startswith(beginnings)
            for policy in self.policies
            for statement in as_list(policy.document.get("Statement", []))
            if statement.get("Effect") == "Allow"
            for action in as_list(statement.get("Action", []))
        )


class Reader:
    """Calls AWS. Records and leaves out what the caller may not read; the rest is still checked."""

    def __init__(self, aws: Aws) -> None:
        self.aws = aws
        self.unread: dict[str, str] = {}  # action: purpose

    def call(self, service: str, operation: str, **parameters: Any) -> Description:
        """Return the answer; {} if it doesn't exist or the caller may not read it."""

        def answers() -> Iterator[Description]:
            yield self.aws.call(service, operation, **parameters)

        return next(self._allowed(service, operation, answers), {})

    def all(self, service: str, operation: str, key: str, **parameters: Any) -> list[Description]:
        """Return what all pages of an answer list under `key`."""

        def answers() -> Iterator[Description]:
            return self.aws.pages(service, operation, key, **parameters)

        return list(self._allowed(service, operation, answers))

    def _allowed(
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


@dataclass
class Account:
    """One region of an account. idle_days: without use for so long, a resource is idle."""

    id: str
    region: str
    now: datetime
    idle_days: float
    reader: Reader
    identities: list[Identity] = field(default_factory=list)
    buckets: list[Description] = field(default_factory=list)
    notebooks: list[Description] = field(default_factory=list)
    endpoints: list[Description] = field(default_factory=list)
    functions: list[Description] = field(default_factory=list)
    instances: list[Description] = field(default_factory=list)
    volumes: list[Description] = field(default_factory=list)
    addresses: list[Description] = field(default_factory=list)
    log_groups: list[Description] = field(default_factory=list)

    @property
    def unread(self) -> list[str]:
        """What the caller was not allowed to see: an action, and why it is needed."""
        return [f"{action}: {why}" for action, why in sorted(self.reader.unread.items())]

    @property
    def partition(self) -> str:
        return partition(self.region)

    def arn(self, service: str, resource: str) -> str:
        return f"arn:{self.partition}:{service}:{self.region}:{self.id}:{resource}"

    def days_since(self, moment: datetime) -> float:
        return (self.now - moment) / timedelta(days=1)

    def aws_validates(self, document: str) -> list[Description] | None:
        """Return AWS's findings in an identity's policy (JSON); None if the caller may not ask."""
        action, _ = CALLS["accessanalyzer", "ValidatePolicy"]
        if action in self.reader.unread:
            return None
        findings = self.reader.all(
            "accessanalyzer",
            "ValidatePolicy",
            "findings",
            policyDocument=document,
            policyType="IDENTITY_POLICY",
        )
        return None if action in self.reader.unread else findings


def needed_policy() -> Description:
    """Return the policy that a caller of the audit needs: read access only."""
    actions = sorted({action for action, _ in CALLS.values() if action})
    statement = {"Sid": "ReadSettings", "Effect": "Allow", "Action": actions, "Resource": "*"}
    return {"Version": "2012-10-17", "Statement": [statement]}


def read(aws: Aws, idle_days: float, everything: bool) -> Account:
    """Return the account of the caller in one region.

    everything: also what does not belong to machine learning. Raise AwsError, except for a missing
    permission.
    """
    reader = Reader(aws)
    account = Account(aws.account, aws.region, datetime.now(UTC), idle_days, reader)
    account.identities = list(_identities(reader))
    account.buckets = reader.all("s3", "ListBuckets", "Buckets")
    account.notebooks = reader.all("sagemaker", "ListNotebookInstances", "NotebookInstances")
    account.endpoints = list(_endpoints(reader))
    account.functions = _functions(reader)
    account.instances = _instances(reader)
    account.volumes = reader.all("ec2", "DescribeVolumes", "Volumes")
    # This one does not come in pages.
    account.addresses = reader.call("ec2", "DescribeAddresses").get("Addresses", [])
    account.log_groups = reader.all("logs", "DescribeLogGroups", "logGroups")
    if not everything:
        _keep_machine_learning(account)
    _read_activity(account)
    return account


def _identities(reader: Reader) -> Iterator[Identity]:
    def details(key: str, kind: str) -> list[Description]:
        return reader.all("iam", "GetAccountAuthorizationDetails", key, Filter=[kind])

    documents = {}
    for policy in details("Policies", "LocalManagedPolicy"):  # AWS's own are known by their names
        for version in policy["PolicyVersionList"]:
            if version["IsDefaultVersion"]:
                documents[policy["Arn"]] = version["Document"]

    for kind in ("Role", "User", "Group"):
        for detail in details(f"{kind}DetailList", kind):
            if detail["Path"].startswith("/aws-service-role/"):
                continue  # AWS's own, which nobody else may change
            attached = [
                Policy(
                    entry["PolicyName"], entry["PolicyArn"], documents.get(entry["PolicyArn"], {})
                )
                for entry in detail["AttachedManagedPolicies"]
            ]
            inline = [
                Policy(entry["PolicyName"], None, entry["PolicyDocument"])
                for entry in detail.get(f"{kind}PolicyList", [])
            ]
            yield Identity(
                kind.lower(),
                detail[f"{kind}Name"],
                detail["Arn"],
                (*attached, *inline),
                trust=detail.get("AssumeRolePolicyDocument", {}),
                tags=_tags(detail),
                created=detail["CreateDate"],
                used=detail.get("RoleLastUsed", {}).get("LastUsedDate"),
                groups=tuple(detail.get("GroupList", [])),
            )


def _endpoints(reader: Reader) -> Iterator[Description]:
    for entry in reader.all("sagemaker", "ListEndpoints", "Endpoints"):
        endpoint = reader.call("sagemaker", "DescribeEndpoint", EndpointName=entry["EndpointName"])
        if endpoint:
            name = endpoint["EndpointConfigName"]
            config = reader.call("sagemaker", "DescribeEndpointConfig", EndpointConfigName=name)
            yield endpoint | {"Config": config}


def _functions(reader: Reader) -> list[Description]:
    functions = reader.all("lambda", "ListFunctions", "Functions")
    for function in functions:
        tags = reader.call("lambda", "ListTags", Resource=function["FunctionArn"])
        function["Tags"] = tags.get("Tags", {})
        function["Provisioned"] = reader.all(
            "lambda",
            "ListProvisionedConcurrencyConfigs",
            "ProvisionedConcurrencyConfigs",
            FunctionName=function["FunctionName"],
        )
    return functions


def _instances(reader: Reader) -> list[Description]:
    states = ["pending", "running", "stopping", "stopped"]
    alive = [{"Name": "instance-state-name", "Values": states}]
    reservations = reader.all("ec2", "DescribeInstances", "Reservations", Filters=alive)
    return [instance for group in reservations for instance in group["Instances"]]


def _read_activity(account: Account) -> None:
    """Set "Activity" of endpoints, functions and instances that CloudWatch has measured.

    It is the largest value of an hour in the last idle_days: calls, or percent of the CPU.
    """
    watched: list[tuple[Description, Description]] = []  # a resource, and a metric of it

    def watch(resource: Description, metric: str, statistic: str, *names: str, **more: str) -> None:
        namespace, name = metric.rsplit("/", 1)
        dimensions = {name: resource[name] for name in names} | more
        entries = [{"Name": key, "Value": value} for key, value in dimensions.items()]
        measured = {"Namespace": namespace, "MetricName": name, "Dimensions": entries}
        watched.append((resource, {"Metric": measured, "Period": HOUR, "Stat": statistic}))

    for endpoint in account.endpoints:
        for variant in endpoint.get("ProductionVariants", []):
            name = variant["VariantName"]
            calls = "AWS/SageMaker/Invocations"
            watch(endpoint, calls, "Sum", "EndpointName", VariantName=name)
    for function in account.functions:
        watch(function, "AWS/Lambda/Invocations", "Sum", "FunctionName")
    for instance in account.instances:
        watch(instance, "AWS/EC2/CPUUtilization", "Maximum", "InstanceId")

    for first in range(0, len(watched), METRICS_A_CALL):
        part = watched[first : first + METRICS_A_CALL]
        results = account.reader.all(
            "cloudwatch",
            "GetMetricData",
            "MetricDataResults",
            MetricDataQueries=[
                {"Id": f"m{number}", "MetricStat": metric}
                for number, (_, metric) in enumerate(part)
            ],
            StartTime=account.now - timedelta(days=account.idle_days),
            EndTime=account.now,
        )
        for result in results:
            resource, _ = part[int(result["Id"].removeprefix("m"))]
            if result["Values"]:
                resource["Activity"] = max(resource.get("Activity", 0.0), *result["Values"])


# --- what belongs to machine learning ---


def _keep_machine_learning(account: Account) -> None:
    """Keep only what belongs to machine learning.

    These are SageMaker's resources, those tagged with a project, accelerated instances, and
    everything that shares a role with them.
    """
    callers = {entry.arn for entry in account.identities if entry.allows("sagemaker:", "*")}
    account.functions = [
        entry
        for entry in account.functions
        if "project" in entry["Tags"] or entry["Role"] in callers
    ]
    roles = {
        entry.arn
        for entry in account.identities
        if "project" in entry.tags or entry.allows("sagemaker:")
    }
    account.instances = [
        entry
        for entry in account.instances
        if "project" in _tags(entry)
        or ACCELERATED.match(entry["InstanceType"])
        or _role_of(entry) in roles
    ]
    # Roles of SageMaker's notebooks, jobs and models trust SageMaker.
    used = {entry["Role"] for entry in account.functions} | set(map(_role_of, account.instances))
    groups = {entry.name for entry in account.identities if entry.kind == "group"}
    groups &= {entry.name for entry in account.identities if entry.allows("sagemaker:")}
    account.identities = [
        entry
        for entry in account.identities
        if entry.arn in roles | used or "sagemaker" in entry.services or groups & set(entry.groups)
    ]
    account.buckets = [
        entry
        for entry in account.buckets
        if "sagemaker" in entry["Name"] or "project" in _bucket_tags(account, entry["Name"])
    ]
    kept = {entry["InstanceId"] for entry in account.instances}
    account.volumes = [
        entry
        for entry in account.volumes
        if "project" in _tags(entry)
        or any(attachment["InstanceId"] in kept for attachment in entry["Attachments"])
    ]
    account.addresses = [entry for entry in account.addresses if "project" in _tags(entry)]
    logs = {f"/aws/lambda/{entry['FunctionName']}" for entry in account.functions}
    account.log_groups = [
        entry
        for entry in account.log_groups
        if entry["logGroupName"].startswith("/aws/sagemaker/") or entry["logGroupName"] in logs
    ]


def _role_of(instance: Description) -> str:
    """Return the ARN of an instance's role, if its profile has the role's name."""
    profile: str = instance.get("IamInstanceProfile", {}).get("Arn", "")
    return profile.replace(":instance-profile/", ":role/")


def _bucket_tags(account: Account, name: str) -> dict[str, str]:
    answer = account.reader.call("s3", "GetBucketTagging", Bucket=name)
    return _tags({"Tags": answer.get("TagSet", [])})


def _tags(description: Description) -> dict[str, str]:
    tags: Iterable[Description] = description.get("Tags", [])
    return {tag["Key"]: tag["Value"] for tag in tags}
