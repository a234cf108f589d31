"""Rules for idle resources that cost money.

Idle machines, warm environments without a caller, disks and addresses that nothing uses.
"""

import shlex
from collections.abc import Iterator
from datetime import datetime

from launch.audit.account import Account, Description
from launch.audit.finding import Finding, Severity, rule
from launch.cloud.prices import (
    ADDRESS_HOUR,
    GP3_GB_MONTH,
    HOURS_A_MONTH,
    PROVISIONED_GB_SECOND,
    price,
)

IDLE_CPU = 5.0  # percent: below that in every hour, a machine did no work


@rule(
    "endpoint/idle",
    Severity.MEDIUM,
    "An endpoint costs money every hour that it is up, called or not; forgotten ones are the "
    "most common surprise on a bill.",
)
def idle_endpoint(account: Account) -> Iterator[Finding]:
    for endpoint in account.endpoints:
        created = endpoint["CreationTime"]
        in_service = endpoint["EndpointStatus"] == "InService"
        if not in_service or not _old(account, created) or endpoint.get("Activity"):
            continue
        machines = _machines(endpoint)
        place = " and ".join(f"{count} x {kind}" for kind, count in machines)
        name = endpoint["EndpointName"]
        yield Finding(
            endpoint["EndpointArn"],
            f"endpoint {name} ({place}) had no call for {_days(account, created)}",
            f"aws sagemaker delete-endpoint --endpoint-name {shlex.quote(name)} "
            "(it can be deployed again from its model package)",
            _a_month(account, machines),
        )


@rule(
    "instance/idle",
    Severity.MEDIUM,
    "A running instance costs money every second, whatever it does.",
)
def idle_instance(account: Account) -> Iterator[Finding]:
    for instance in account.instances:
        launched = instance["LaunchTime"]
        running = instance["State"]["Name"] == "running"
        busy = instance.get("Activity", 0.0) >= IDLE_CPU
        if not running or not _old(account, launched) or busy:
            continue
        name, kind = instance["InstanceId"], instance["InstanceType"]
        yield Finding(
            account.arn("ec2", f"instance/{name}"),
            f"instance {name} ({kind}) has been idle for {_days(account, launched)}: "
            f"CPU below {IDLE_CPU:g}%",
            f"aws ec2 terminate-instances --instance-ids {shlex.quote(name)} "
            "(or stop-instances, to keep its disk)",
            _a_month(account, [(kind, 1)]),
        )


@rule(
    "notebook/idle",
    Severity.MEDIUM,
    "A notebook in service costs money day and night; a job trains without it.",
)
def idle_notebook(account: Account) -> Iterator[Finding]:
    for notebook in account.notebooks:
        started = notebook["LastModifiedTime"]  # the time of the last start, among others
        if notebook["NotebookInstanceStatus"] != "InService" or not _old(account, started):
            continue
        name, kind = notebook["NotebookInstanceName"], notebook["InstanceType"]
        days = account.days_since(started)
        yield Finding(
            notebook["NotebookInstanceArn"],
            f"notebook {name} ({kind}) has been in service for {days:.0f} days without a stop",
            f"aws sagemaker stop-notebook-instance --notebook-instance-name {shlex.quote(name)}",
            _a_month(account, [(kind, 1)]),
        )


@rule(
    "function/warm-unused",
    Severity.MEDIUM,
    "Provisioned concurrency costs money every second that it is set, called or not.",
)
def warm_function(account: Account) -> Iterator[Finding]:
    for function in account.functions:
        warm = function["Provisioned"]
        count = sum(entry.get("RequestedProvisionedConcurrentExecutions", 0) for entry in warm)
        changed = [datetime.fromisoformat(entry["LastModified"]) for entry in warm]
        old = all(_old(account, moment) for moment in changed)
        if not count or not old or function.get("Activity"):
            continue
        name, gigabytes = function["FunctionName"], function["MemorySize"] / 1024
        delete = "aws lambda delete-provisioned-concurrency-config "
        delete += f"--function-name {shlex.quote(name)}"
        qualifiers = [entry["FunctionArn"].rsplit(":", 1)[1] for entry in warm]
        yield Finding(
            function["FunctionArn"],
            f"function {name} keeps {count} environments warm, "
            f"and had no call for {account.idle_days:g} days",
            "; ".join(f"{delete} --qualifier {qualifier}" for qualifier in qualifiers),
            count * gigabytes * PROVISIONED_GB_SECOND * 3600 * HOURS_A_MONTH,
        )


@rule(
    "volume/unattached",
    Severity.MEDIUM,
    "A disk costs money by its size until it is deleted, even when its instance is long gone.",
)
def unattached_volume(account: Account) -> Iterator[Finding]:
    for volume in account.volumes:
        if volume["Attachments"] or not _old(account, volume["CreateTime"]):
            continue
        name = volume["VolumeId"]
        yield Finding(
            account.arn("ec2", f"volume/{name}"),
            f"volume {name} ({volume['Size']} GB) is attached to nothing",
            f"aws ec2 delete-volume --volume-id {shlex.quote(name)} "
            f"(aws ec2 create-snapshot --volume-id {shlex.quote(name)} first, "
            "to keep it at a lower price)",
            volume["Size"] * GP3_GB_MONTH,
        )


@rule("instance/stopped", Severity.LOW, "A stopped instance costs nothing, but its disks do.")
def stopped_instance(account: Account) -> Iterator[Finding]:
    sizes: dict[str, int] = {}  # GB, by instance
    for volume in account.volumes:
        for entry in volume["Attachments"]:
            instance_id = entry["InstanceId"]
            sizes[instance_id] = sizes.get(instance_id, 0) + volume["Size"]
    for instance in account.instances:
        name = instance["InstanceId"]
        if instance["State"]["Name"] == "stopped" and name in sizes:
            yield Finding(
                account.arn("ec2", f"instance/{name}"),
                f"instance {name} is stopped and keeps {sizes[name]} GB of disk",
                f"aws ec2 terminate-instances --instance-ids {shlex.quote(name)}",
                sizes[name] * GP3_GB_MONTH,
            )


@rule(
    "address/unused",
    Severity.LOW,
    "A public address costs money by the hour, whether anything uses it or not.",
)
def unused_address(account: Account) -> Iterator[Finding]:
    for address in account.addresses:
        name = address.get("AllocationId")
        if name and "AssociationId" not in address:
            yield Finding(
                account.arn("ec2", f"elastic-ip/{name}"),
                f"address {address['PublicIp']} is attached to nothing",
                f"aws ec2 release-address --allocation-id {shlex.quote(name)}",
                ADDRESS_HOUR * HOURS_A_MONTH,
            )


@rule(
    "logs/for-ever",
    Severity.LOW,
    "Logs without a limit are kept for ever, and so cost money for ever.",
)
def endless_logs(account: Account) -> Iterator[Finding]:
    for group in account.log_groups:
        if "retentionInDays" not in group:
            name = group["logGroupName"]
            yield Finding(
                account.arn("logs", f"log-group:{name}"),
                f"log group {name} keeps its logs for ever",
                f"aws logs put-retention-policy --log-group-name {shlex.quote(name)} "
                "--retention-in-days 30",
            )


def _old(account: Account, since: datetime) -> bool:
    return account.days_since(since) >= account.idle_days


def _days(account: Account, since: datetime) -> str:
    """Return the least time: CloudWatch was asked for idle_days only."""
    return f"{account.idle_days:g} days (up for {account.days_since(since):.0f})"


def _machines(endpoint: Description) -> list[tuple[str, int]]:
    """Return the instance types behind an endpoint, and how many of each are up."""
    variants = endpoint.get("ProductionVariants", [])
    up = {entry["VariantName"]: entry.get("CurrentInstanceCount") for entry in variants}
    return [
        (entry["InstanceType"], up.get(entry["VariantName"]) or entry["InitialInstanceCount"])
        for entry in endpoint["Config"].get("ProductionVariants", [])
        if "InstanceType" in entry
    ]


def _a_month(account: Account, machines: list[tuple[str, int]]) -> float | None:
    """Return the machines' dollars a month; None if a price is unknown."""
    total = 0.0
    for kind, count in machines:
        hourly = price(kind, account.region).on_demand
        if hourly is None:
            return None
        total += hourly * count
    return total * HOURS_A_MONTH
