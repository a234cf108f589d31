"""Rules for buckets, notebooks, endpoints, functions and instances: who can reach them, and what they give away."""

import json
import re
from collections.abc import Iterator

from launch.audit.account import Account, Description, listed
from launch.audit.finding import Found, Severity, rule

# Values that are secrets whatever they are called, and names whose values are.
SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(ghp|gho|hf|sk)_[A-Za-z0-9]{20,}\b"
)
SECRET_NAME = re.compile(
    r"(^|[_-])(secret|password|passwd|api_?key|access_?key|private_?key|auth_?token|access_?token)([_-]|$)",
    re.IGNORECASE,
)

# No security fixes any more, in 2026-11: https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html
ENDED_RUNTIMES = {f"python{version}" for version in ("2.7", "3.6", "3.7", "3.8", "3.9", "3.10")}
ENDED_RUNTIMES |= {f"nodejs{version}.x" for version in (10, 12, 14, 16, 18, 20)}
# Platforms of notebooks on Amazon Linux 1 (ended 2023-12) and 2 (ended 2026-06).
ENDED_NOTEBOOKS = ("notebook-al1-", "notebook-al2-")

WORLD = {"0.0.0.0/0", "::/0"}
JOB_HOURS = (
    48  # a training job's time limit above this is the default of some SDK rather than a decision
)


# --- buckets ---


@rule(
    "bucket/public",
    Severity.CRITICAL,
    "Anyone on the internet can read or change what is in it: pictures, models, and what people are in them.",
)
def public_bucket(account: Account) -> Iterator[Found]:
    for bucket in account.buckets:
        ways = []
        if any(_open(statement) for statement in _allowed(bucket["Policy"])) and not _blocked(
            account, bucket, "RestrictPublicBuckets"
        ):
            ways.append("its policy allows any principal")
        if any(
            "/global/" in grant.get("Grantee", {}).get("URI", "") for grant in bucket["Grants"]
        ) and not _blocked(account, bucket, "IgnorePublicAcls"):
            ways.append("its access control list allows everyone")
        if ways:
            yield Found(
                f"bucket {bucket['Name']}",
                f"bucket {bucket['Name']} is public: {' and '.join(ways)}",
                _block(bucket),
            )


@rule(
    "bucket/unblocked",
    Severity.MEDIUM,
    "One wrong policy or object makes it public; with all four blocks set, none can.",
)
def unblocked_bucket(account: Account) -> Iterator[Found]:
    keys = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    for bucket in account.buckets:
        if missing := [key for key in keys if not _blocked(account, bucket, key)]:
            yield Found(
                f"bucket {bucket['Name']}",
                f"bucket {bucket['Name']} does not set {', '.join(missing)}",
                _block(bucket),
            )


@rule(
    "bucket/other-account",
    Severity.MEDIUM,
    "Whoever runs that account can read or replace data and models; a replaced model runs with your roles.",
)
def shared_bucket(account: Account) -> Iterator[Found]:
    for bucket in account.buckets:
        others = {
            str(name)
            for statement in _allowed(bucket["Policy"])
            for name in _aws_principals(statement)
            if name != "*" and account.id not in str(name)
        }
        if others:
            change = f"remove the statement: aws s3api get-bucket-policy --bucket {bucket['Name']}, then put-bucket-policy without it"
            yield Found(
                f"bucket {bucket['Name']}",
                f"bucket {bucket['Name']} is open to {', '.join(sorted(others))}",
                change,
            )


@rule("bucket/http", Severity.LOW, "Requests over plain HTTP can be read and changed on their way.")
def http_bucket(account: Account) -> Iterator[Found]:
    for bucket in account.buckets:
        name = bucket["Name"]
        statements = listed(bucket["Policy"].get("Statement", []))
        if not any(
            entry.get("Effect") == "Deny" and "aws:SecureTransport" in str(entry.get("Condition"))
            for entry in statements
        ):
            arn = f"arn:{account.partition}:s3:::{name}"
            deny = (
                f'{{"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["{arn}", "{arn}/*"], '
                '"Condition": {"Bool": {"aws:SecureTransport": "false"}}}'
            )
            yield Found(
                f"bucket {name}", f"bucket {name} answers plain HTTP", f"add to its policy: {deny}"
            )


@rule(
    "bucket/unversioned",
    Severity.LOW,
    "A model or picture that is overwritten or deleted by mistake is gone.",
)
def unversioned_bucket(account: Account) -> Iterator[Found]:
    for bucket in account.buckets:
        if bucket["Versioning"] != "Enabled":
            change = f"aws s3api put-bucket-versioning --bucket {bucket['Name']} --versioning-configuration Status=Enabled"
            yield Found(
                f"bucket {bucket['Name']}",
                f"bucket {bucket['Name']} keeps no earlier versions",
                change,
            )


# --- notebooks and Studio ---


@rule(
    "notebook/root",
    Severity.HIGH,
    "Code in a notebook can change the machine under everyone who uses it next, and take its role's credentials unseen.",
)
def root_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        if notebook.get("RootAccess", "Enabled") == "Enabled":
            yield Found(
                notebook["NotebookInstanceArn"],
                f"{_notebook(notebook)} gives root access",
                _update(notebook, "--root-access Disabled"),
            )


@rule(
    "notebook/internet",
    Severity.HIGH,
    "Data can leave by a way that no network rule of yours sees, and packages come in by it.",
)
def internet_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        if notebook.get("DirectInternetAccess", "Enabled") == "Enabled":
            change = "it can't be changed: delete it and create it with --direct-internet-access Disabled --subnet-id SUBNET --security-group-ids GROUP"
            yield Found(
                notebook["NotebookInstanceArn"],
                f"{_notebook(notebook)} reaches the internet outside of your network",
                change,
            )


@rule(
    "notebook/imdsv1",
    Severity.HIGH,
    "A page or package that makes the notebook fetch a URL can read its role's credentials (server-side request forgery).",
)
def imdsv1_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        version = notebook.get("InstanceMetadataServiceConfiguration", {}).get(
            "MinimumInstanceMetadataServiceVersion", "1"
        )
        if version != "2":
            change = _update(
                notebook,
                "--instance-metadata-service-configuration MinimumInstanceMetadataServiceVersion=2",
            )
            yield Found(
                notebook["NotebookInstanceArn"],
                f"{_notebook(notebook)} answers metadata requests of version 1",
                change,
            )


@rule(
    "notebook/ended-platform",
    Severity.MEDIUM,
    "Its operating system gets no security fixes any more.",
)
def old_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        if (platform := notebook.get("PlatformIdentifier", "")).startswith(ENDED_NOTEBOOKS):
            yield Found(
                notebook["NotebookInstanceArn"],
                f"{_notebook(notebook)} runs {platform}",
                _update(notebook, "--platform-identifier notebook-al2023-v1"),
            )


@rule(
    "notebook/default-key",
    Severity.LOW,
    "With AWS's own key nobody can be kept from the disk by a key policy, and the key's use is not in your log.",
)
def keyless_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        if "KmsKeyId" not in notebook:
            change = "it can't be changed: delete it and create it with --kms-key-id KEY"
            yield Found(
                notebook["NotebookInstanceArn"],
                f"{_notebook(notebook)} encrypts its disk with AWS's own key",
                change,
            )


@rule(
    "domain/internet",
    Severity.MEDIUM,
    "Data can leave by a way that no network rule of yours sees.",
)
def internet_domain(account: Account) -> Iterator[Found]:
    for domain in account.domains:
        if domain.get("AppNetworkAccessType", "PublicInternetOnly") == "PublicInternetOnly":
            change = f"aws sagemaker update-domain --domain-id {domain['DomainId']} --app-network-access-type VpcOnly (with VPC endpoints)"
            yield Found(
                domain["DomainArn"],
                f"Studio domain {domain['DomainName']} reaches the internet outside of your network",
                change,
            )


# --- models and jobs ---


@rule(
    "model/network",
    Severity.LOW,
    "A model's container that needs no network can't send anything away, whatever is in the model.",
)
def networked_model(account: Account) -> Iterator[Found]:
    for model in account.models:
        if not model.get("EnableNetworkIsolation") and not model.get("VpcConfig"):
            change = "create the model again with EnableNetworkIsolation true, if its container downloads nothing itself"
            yield Found(
                model["ModelArn"], f"model {model['ModelName']} has the open network", change
            )


@rule(
    "job/secret",
    Severity.HIGH,
    "Hyperparameters and environment are shown to whoever may describe jobs, and are kept for ever.",
)
def secret_in_job(account: Account) -> Iterator[Found]:
    for job in account.jobs:
        for where in ("HyperParameters", "Environment"):
            if names := _secrets(job.get(where, {})):
                change = "revoke the secret, put it into Secrets Manager, and let the job fetch it"
                yield Found(
                    job["TrainingJobArn"],
                    f"training job {job['TrainingJobName']} has a secret in its {where}: {', '.join(names)}",
                    change,
                )


@rule("job/unlimited", Severity.MEDIUM, "A job that hangs is paid until its time limit.")
def unlimited_job(account: Account) -> Iterator[Found]:
    for job in account.jobs:
        hours = job.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", 86400) / 3600
        if hours > JOB_HOURS:
            change = "give StoppingCondition.MaxRuntimeInSeconds about twice what the job needs (here: target.hours)"
            yield Found(
                job["TrainingJobArn"],
                f"training job {job['TrainingJobName']} may run for {hours:.0f} hours",
                change,
            )


# --- functions ---


@rule(
    "function/public-url",
    Severity.CRITICAL,
    "Anyone who finds the URL can call it, at your cost, as often as they like.",
)
def public_url(account: Account) -> Iterator[Found]:
    for function in account.functions:
        for url in function["Urls"]:
            if url["AuthType"] == "NONE":
                change = f"aws lambda update-function-url-config --function-name {function['FunctionName']} --auth-type AWS_IAM"
                yield Found(
                    function["FunctionArn"],
                    f"function {function['FunctionName']} has a URL without authentication: {url['FunctionUrl']}",
                    change,
                )


@rule("function/public", Severity.CRITICAL, "Anyone with an AWS account can call it.")
def public_function(account: Account) -> Iterator[Found]:
    for function in account.functions:
        for statement in _allowed(function["Policy"]):
            if _open(statement) and "lambda:FunctionUrlAuthType" not in str(
                statement.get("Condition")
            ):
                change = f"aws lambda remove-permission --function-name {function['FunctionName']} --statement-id {statement.get('Sid')}"
                yield Found(
                    function["FunctionArn"],
                    f"function {function['FunctionName']} may be called by any principal",
                    change,
                )


@rule(
    "function/any-site",
    Severity.LOW,
    "Any web page can call the function in the name of whoever looks at it.",
)
def any_site(account: Account) -> Iterator[Found]:
    for function in account.functions:
        for url in function["Urls"]:
            if "*" in url.get("Cors", {}).get("AllowOrigins", []):
                change = f"aws lambda update-function-url-config --function-name {function['FunctionName']} --cors AllowOrigins=https://YOUR_SITE"
                yield Found(
                    function["FunctionArn"],
                    f"function {function['FunctionName']} answers pages of any site",
                    change,
                )


@rule(
    "function/secret",
    Severity.HIGH,
    "A function's environment is shown to whoever may list functions.",
)
def secret_in_function(account: Account) -> Iterator[Found]:
    for function in account.functions:
        if names := _secrets(function.get("Environment", {}).get("Variables", {})):
            change = "revoke the secret; use the function's role, or Secrets Manager for what is not AWS's"
            yield Found(
                function["FunctionArn"],
                f"function {function['FunctionName']} has a secret in its environment: {', '.join(names)}",
                change,
            )


@rule(
    "function/ended-runtime",
    Severity.MEDIUM,
    "Its Python or Node gets no security fixes any more, and AWS will refuse to update it.",
)
def ended_runtime(account: Account) -> Iterator[Found]:
    for function in account.functions:
        if function.get("Runtime") in ENDED_RUNTIMES:
            change = f"aws lambda update-function-configuration --function-name {function['FunctionName']} --runtime python3.13"
            yield Found(
                function["FunctionArn"],
                f"function {function['FunctionName']} runs {function['Runtime']}",
                change,
            )


# --- instances ---


@rule(
    "instance/imdsv1",
    Severity.HIGH,
    "A program on it that fetches a URL for someone hands out the instance's credentials (server-side request forgery).",
)
def imdsv1_instance(account: Account) -> Iterator[Found]:
    for instance in account.instances:
        if instance.get("MetadataOptions", {}).get("HttpTokens", "optional") != "required":
            change = f"aws ec2 modify-instance-metadata-options --instance-id {instance['InstanceId']} --http-tokens required"
            yield Found(
                _instance_arn(account, instance),
                f"instance {instance['InstanceId']} answers metadata requests of version 1",
                change,
            )


@rule(
    "instance/open-port",
    Severity.HIGH,
    "Found by scanners within minutes: a Jupyter or SSH behind it is one guessed password away.",
)
def open_port(account: Account) -> Iterator[Found]:
    for name, group in account.security_groups.items():
        permissions = [
            entry
            for entry in group["IpPermissions"]
            if _world(entry) and _port(entry) not in ("port 80", "port 443")
        ]
        if permissions:
            users = [
                entry["InstanceId"]
                for entry in account.instances
                if name in {used["GroupId"] for used in entry.get("SecurityGroups", [])}
            ]
            ports = ", ".join(_port(entry) for entry in permissions)
            what = f"security group {name} opens {ports} to the world" + (
                f" for {', '.join(users)}" if users else ""
            )
            change = f"aws ec2 revoke-security-group-ingress --group-id {name} --ip-permissions '{json.dumps(permissions)}'; log in by Session Manager"
            yield Found(account.arn("ec2", f"security-group/{name}"), what, change)


@rule(
    "instance/secret",
    Severity.HIGH,
    "User data is shown to whoever may describe instances, and to every program on the instance.",
)
def secret_in_user_data(account: Account) -> Iterator[Found]:
    for instance in account.instances:
        if SECRET_VALUE.search(instance["UserData"]):
            change = "revoke the key; give the instance a role instead (an instance profile)"
            yield Found(
                _instance_arn(account, instance),
                f"instance {instance['InstanceId']} has a secret in its user data",
                change,
            )


@rule(
    "volume/unencrypted",
    Severity.MEDIUM,
    "Whoever gets a snapshot of it reads pictures and models.",
)
def unencrypted_volume(account: Account) -> Iterator[Found]:
    for volume in account.volumes:
        if not volume["Encrypted"]:
            place = ", ".join(entry["InstanceId"] for entry in volume["Attachments"]) or "nothing"
            change = f"aws ec2 enable-ebs-encryption-by-default; then copy a snapshot with --encrypted and make the volume anew ({volume['VolumeId']})"
            yield Found(
                account.arn("ec2", f"volume/{volume['VolumeId']}"),
                f"volume {volume['VolumeId']} of {place} is not encrypted",
                change,
            )


@rule(
    "instance/untagged", Severity.LOW, "Nobody can tell whose it is, nor whether it may be ended."
)
def untagged_instance(account: Account) -> Iterator[Found]:
    for instance in account.instances:
        if not any(tag["Key"] == "project" for tag in instance.get("Tags", [])):
            change = f"aws ec2 create-tags --resources {instance['InstanceId']} --tags Key=project,Value=NAME"
            yield Found(
                _instance_arn(account, instance),
                f"instance {instance['InstanceId']} has no tag `project`",
                change,
            )


# --- reading descriptions ---


def _allowed(policy: Description) -> list[Description]:
    return [
        entry for entry in listed(policy.get("Statement", [])) if entry.get("Effect") == "Allow"
    ]


def _aws_principals(statement: Description) -> list[str]:
    principal = statement.get("Principal", {})
    return [principal] if isinstance(principal, str) else listed(principal.get("AWS", []))


def _open(statement: Description) -> bool:
    """Whether a statement is for any principal, and no condition holds it to an account, organisation, network or source."""
    narrowing = re.compile(r"aws:(source|principal)|s3:dataaccesspoint", re.IGNORECASE)
    return "*" in _aws_principals(statement) and not narrowing.search(
        str(statement.get("Condition", ""))
    )


def _blocked(account: Account, bucket: Description, key: str) -> bool:
    return any(
        block and block.get(key)
        for block in (account.public_access_block, bucket["PublicAccessBlock"])
    )


def _block(bucket: Description) -> str:
    blocks = "BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true"
    return f"aws s3api put-public-access-block --bucket {bucket['Name']} --public-access-block-configuration {blocks}"


def _notebook(notebook: Description) -> str:
    return f"notebook {notebook['NotebookInstanceName']}"


def _update(notebook: Description, change: str) -> str:
    name = f"--notebook-instance-name {notebook['NotebookInstanceName']}"
    return f"aws sagemaker stop-notebook-instance {name}; aws sagemaker update-notebook-instance {name} {change}"


def _secrets(values: dict[str, str]) -> list[str]:
    """The names whose values are secrets; the values themselves are never shown."""
    return sorted(
        name
        for name, value in values.items()
        if SECRET_VALUE.search(value)
        or (SECRET_NAME.search(name) and value and not value.startswith("arn:"))
    )


def _instance_arn(account: Account, instance: Description) -> str:
    return account.arn("ec2", f"instance/{instance['InstanceId']}")


def _world(permission: Description) -> bool:
    ranges = [entry["CidrIp"] for entry in permission.get("IpRanges", [])] + [
        entry["CidrIpv6"] for entry in permission.get("Ipv6Ranges", [])
    ]
    return bool(WORLD & set(ranges))


def _port(permission: Description) -> str:
    if permission["IpProtocol"] == "-1":
        return "all ports"
    first, last = permission.get("FromPort"), permission.get("ToPort")
    return f"port {first}" if first == last else f"ports {first}-{last}"
