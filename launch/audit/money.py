"""Rules for what costs money and does nothing: idle machines, warm environments without a caller, disks and addresses that nothing uses."""

from collections.abc import Iterator
from datetime import datetime

from launch.audit.account import Account, Description
from launch.audit.finding import Found, Severity, rule
from launch.cloud import prices

HOURS_A_MONTH = 730
IDLE_CPU = 5.0  # percent; a machine whose processor never did more in any hour did no work
# us-east-1, https://aws.amazon.com/ebs/pricing, /vpc/pricing, /lambda/pricing: estimates, as all of launch/cloud/prices.json
GP3_GB_MONTH = 0.08  # $
ADDRESS_HOUR = 0.005  # $
PROVISIONED_GB_SECOND = 0.0000041667  # $


@rule(
    "endpoint/idle",
    Severity.MEDIUM,
    "An endpoint is paid for every hour that it is up, called or not; forgotten ones are the commonest surprise on a bill.",
)
def idle_endpoint(account: Account) -> Iterator[Found]:
    for endpoint in account.endpoints:
        if endpoint["EndpointStatus"] == "InService" and _idle(
            account, endpoint, endpoint["CreationTime"]
        ):
            machines = _machines(endpoint)
            hourly = _sum(_hourly(account, kind, count) for kind, count in machines)
            place = " and ".join(f"{count} x {kind}" for kind, count in machines)
            what = f"endpoint {endpoint['EndpointName']} ({place}) had no call for {_days(account, endpoint['CreationTime'])}"
            change = f"aws sagemaker delete-endpoint --endpoint-name {endpoint['EndpointName']} (it can be deployed again from its model package)"
            yield Found(endpoint["EndpointArn"], what, change, _a_month(hourly))


@rule(
    "instance/idle", Severity.MEDIUM, "A running instance is paid by the second, whatever it does."
)
def idle_instance(account: Account) -> Iterator[Found]:
    for instance in account.instances:
        running = instance["State"]["Name"] == "running"
        if (
            running
            and account.days_since(instance["LaunchTime"]) >= account.idle_days
            and instance.get("Activity", 0.0) < IDLE_CPU
        ):
            name = instance["InstanceId"]
            what = f"instance {name} ({instance['InstanceType']}) has been idle for {_days(account, instance['LaunchTime'])}: CPU below {IDLE_CPU:g} %"
            change = f"aws ec2 terminate-instances --instance-ids {name} (or stop-instances, to keep its disk)"
            yield Found(
                account.arn("ec2", f"instance/{name}"),
                what,
                change,
                _a_month(_hourly(account, instance["InstanceType"], 1)),
            )


@rule(
    "notebook/idle",
    Severity.MEDIUM,
    "A notebook in service is paid day and night; a job trains without it.",
)
def idle_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        days = account.days_since(
            notebook["LastModifiedTime"]
        )  # the time of the last start, among others
        if notebook["NotebookInstanceStatus"] == "InService" and days >= account.idle_days:
            name = notebook["NotebookInstanceName"]
            what = f"notebook {name} ({notebook['InstanceType']}) has been in service for {days:.0f} days without a stop"
            change = f"aws sagemaker stop-notebook-instance --notebook-instance-name {name}"
            yield Found(
                notebook["NotebookInstanceArn"],
                what,
                change,
                _a_month(_hourly(account, notebook["InstanceType"], 1)),
            )


@rule("notebook/never-stops", Severity.LOW, "Nothing stops it when its user goes home.")
def restless_notebook(account: Account) -> Iterator[Found]:
    for notebook in account.notebooks:
        if not notebook.get("NotebookInstanceLifecycleConfigName"):
            what = f"notebook {notebook['NotebookInstanceName']} has no lifecycle configuration that stops it when idle"
            change = "python -m launch submit target=notebook makes one that stops itself"
            yield Found(notebook["NotebookInstanceArn"], what, change)


@rule(
    "function/warm-unused",
    Severity.MEDIUM,
    "Provisioned concurrency is paid for every second that it is set, called or not.",
)
def warm_function(account: Account) -> Iterator[Found]:
    for function in account.functions:
        count = sum(
            entry.get("RequestedProvisionedConcurrentExecutions", 0)
            for entry in function["Provisioned"]
        )
        if (
            count
            and not function.get("Activity")
            and all(_old(account, entry) for entry in function["Provisioned"])
        ):
            name = function["FunctionName"]
            cost = (
                count * function["MemorySize"] / 1024 * PROVISIONED_GB_SECOND * 3600 * HOURS_A_MONTH
            )
            what = f"function {name} keeps {count} environments warm, and had no call for {account.idle_days:g} days"
            change = "".join(
                f"aws lambda delete-provisioned-concurrency-config --function-name {name} --qualifier {entry['FunctionArn'].rsplit(':', 1)[1]}; "
                for entry in function["Provisioned"]
            )
            yield Found(function["FunctionArn"], what, change.removesuffix("; "), cost)


@rule(
    "volume/unattached",
    Severity.MEDIUM,
    "A disk is paid by its size until it is deleted, also when its instance is long gone.",
)
def unattached_volume(account: Account) -> Iterator[Found]:
    for volume in account.volumes:
        if (
            not volume["Attachments"]
            and account.days_since(volume["CreateTime"]) >= account.idle_days
        ):
            name = volume["VolumeId"]
            change = f"aws ec2 delete-volume --volume-id {name} (aws ec2 create-snapshot --volume-id {name} first, to keep it at a lower price)"
            what = f"volume {name} ({volume['Size']} GB) is attached to nothing"
            yield Found(
                account.arn("ec2", f"volume/{name}"), what, change, volume["Size"] * GP3_GB_MONTH
            )


@rule("instance/stopped", Severity.LOW, "A stopped instance costs nothing, but its disks do.")
def stopped_instance(account: Account) -> Iterator[Found]:
    for instance in account.instances:
        name = instance["InstanceId"]
        size = sum(
            volume["Size"]
            for volume in account.volumes
            for entry in volume["Attachments"]
            if entry["InstanceId"] == name
        )
        if instance["State"]["Name"] == "stopped" and size:
            change = f"aws ec2 terminate-instances --instance-ids {name}"
            yield Found(
                account.arn("ec2", f"instance/{name}"),
                f"instance {name} is stopped and keeps {size} GB of disk",
                change,
                size * GP3_GB_MONTH,
            )


@rule(
    "address/unused",
    Severity.LOW,
    "A public address is paid by the hour, more so when nothing uses it.",
)
def unused_address(account: Account) -> Iterator[Found]:
    for address in account.addresses:
        if "AssociationId" not in address and "AllocationId" in address:
            name = address["AllocationId"]
            change = f"aws ec2 release-address --allocation-id {name}"
            what = f"address {address['PublicIp']} is attached to nothing"
            yield Found(
                account.arn("ec2", f"elastic-ip/{name}"), what, change, ADDRESS_HOUR * HOURS_A_MONTH
            )


@rule("logs/for-ever", Severity.LOW, "Logs without a limit are kept, and paid, for ever.")
def endless_logs(account: Account) -> Iterator[Found]:
    for group in account.log_groups:
        if "retentionInDays" not in group:
            name = group["logGroupName"]
            change = f"aws logs put-retention-policy --log-group-name {name} --retention-in-days 30"
            yield Found(
                account.arn("logs", f"log-group:{name}"),
                f"log group {name} keeps its logs for ever",
                change,
            )


@rule(
    "bucket/unfinished-uploads",
    Severity.LOW,
    "The parts of an upload that broke are invisible in listings and paid for ever.",
)
def unfinished_uploads(account: Account) -> Iterator[Found]:
    for bucket in account.buckets:
        if not any(
            "AbortIncompleteMultipartUpload" in entry and entry.get("Status") == "Enabled"
            for entry in bucket["Lifecycle"]
        ):
            name = bucket["Name"]
            rules = '{"Rules": [{"ID": "abort", "Status": "Enabled", "Filter": {}, "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}]}'
            change = f"aws s3api put-bucket-lifecycle-configuration --bucket {name} --lifecycle-configuration '{rules}' (besides its present rules)"
            yield Found(
                f"bucket {name}", f"bucket {name} never clears the parts of broken uploads", change
            )


def _idle(account: Account, entry: Description, since: datetime) -> bool:
    return account.days_since(since) >= account.idle_days and not entry.get("Activity")


def _days(account: Account, since: datetime) -> str:
    """How long at least: CloudWatch was asked for no more than idle_days."""
    return f"{account.idle_days:g} days (up for {account.days_since(since):.0f})"


def _old(account: Account, provisioned: Description) -> bool:
    return (
        account.days_since(datetime.fromisoformat(provisioned["LastModified"])) >= account.idle_days
    )


def _machines(endpoint: Description) -> list[tuple[str, int]]:
    counts = {
        entry["VariantName"]: entry.get("CurrentInstanceCount")
        for entry in endpoint.get("ProductionVariants", [])
    }
    variants = endpoint["Config"].get("ProductionVariants", [])
    return [
        (entry["InstanceType"], counts.get(entry["VariantName"]) or entry["InitialInstanceCount"])
        for entry in variants
        if "InstanceType" in entry
    ]


def _hourly(account: Account, instance_type: str, count: int) -> float | None:
    price = prices.price(instance_type, account.region).on_demand
    return None if price is None else price * count


def _sum(values: Iterator[float | None]) -> float | None:
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


def _a_month(hourly: float | None) -> float | None:
    return None if hourly is None else hourly * HOURS_A_MONTH
