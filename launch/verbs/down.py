"""`python -m launch down`: stops everything of this project, empties its bucket and deletes all that carries its tag. Lists it and asks first."""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from launch.cloud import foundation, ownership, s3
from launch.cloud.logs import SHARED_GROUPS
from launch.cloud.ownership import NOT_FOUND, instances
from launch.cloud.session import Aws
from launch.targets.spec import aws_of, split_overrides
from launch.verbs.up import confirmed, delete_stack, describe, is_ours, settled, stack_resources
from trainer.common.console import log
from trainer.common.errors import FAULT, OK

GONE_BY = 3600  # seconds after which `down` gives up waiting for something to end


def down(aws: Aws, every: float) -> int:
    """Each step may be done already by an earlier, killed `down`. Raises AwsError."""
    _end_jobs(aws, "HyperParameterTuningJob", every)  # first: stopped ones start no more trials
    _end_jobs(aws, "TrainingJob", every)
    _end_instances(aws, every)
    _end_notebooks(aws, every)
    ours = foundation.stack_name(aws.project)
    others = [name for name in stacks(aws) if name != ours]
    for name in others:  # an endpoint's, which use the bucket and come first
        aws.call("cloudformation", "DeleteStack", StackName=name)
    failed = [name for name in others if not _stack_gone(aws, name, every)]
    if ownership.owns_bucket(aws):
        log.info("s3://%s: deleted %d versions of objects", aws.bucket, s3.empty(aws))
    stack = describe(aws, ours)
    if stack is not None and is_ours(aws, stack):
        delete_stack(aws, stack, every)
        failed += [] if _stack_gone(aws, ours, every) else [ours]
    for name in failed:
        log.error(
            "%s: CloudFormation could not delete it; its events in the console say why; then start down again",
            name,
        )
    if not failed:
        log.info(
            "nothing of %s is left in account %s, %s, but for log streams",
            aws.project,
            aws.account,
            aws.region,
        )
    return FAULT if failed else OK


def stacks(aws: Aws) -> list[str]:
    """This project's CloudFormation stacks: those with its tag."""
    found = aws.pages("cloudformation", "DescribeStacks", "Stacks")
    return [
        stack["StackName"]
        for stack in found
        if aws.owns(stack.get("Tags", [])) and stack["StackStatus"] != "DELETE_COMPLETE"
    ]


def show(aws: Aws) -> None:
    """Prints all that `down` ends and deletes, and what it leaves. Raises AwsError."""
    for kind, what in (("HyperParameterTuningJob", "tuning job"), ("TrainingJob", "training job")):
        jobs = {job[f"{kind}Name"]: job[f"{kind}Status"] for job in ownership.owned(aws, kind)}
        going = [name for name, status in jobs.items() if status in ("InProgress", "Stopping")]
        for name in going:
            log.info("ends      %s %s", what, name)
        if jobs:
            log.info("deletes   the records of %d %ss", len(jobs), what)
    for machine in _machines(aws):
        log.info("ends      machine %s (%s)", machine["InstanceId"], machine["InstanceType"])
    for volume in _volumes(aws):
        log.info("deletes   disk %s (%d GB)", volume["VolumeId"], volume["Size"])
    for notebook in ownership.owned(aws, "NotebookInstance"):
        log.info("deletes   notebook %s, with its disk", notebook["NotebookInstanceName"])
    for script in ownership.owned(aws, "NotebookInstanceLifecycleConfig"):
        log.info("deletes   notebook's script %s", script["NotebookInstanceLifecycleConfigName"])
    for name in stacks(aws):
        log.info("deletes   stack %s", name)
        for resource in stack_resources(aws, name):
            if resource.get("PhysicalResourceId") not in SHARED_GROUPS:
                log.info(
                    "            %-26s %s",
                    resource["ResourceType"],
                    resource.get("PhysicalResourceId", resource["LogicalResourceId"]),
                )
    owns = ownership.owns_bucket(aws)
    if owns:
        count, size = s3.versions(aws)
        log.info(
            "deletes   every object of s3://%s, all models and pictures in it: %d versions, %.2f GB",
            aws.bucket,
            count,
            size / 1e9,
        )
    elif owns is False:
        log.info("leaves    s3://%s: it has no tag project=%s", aws.bucket, aws.project)
    log.info(
        "leaves    what jobs have logged in %s: these log groups are the whole account's",
        " and ".join(SHARED_GROUPS),
    )


def _stack_gone(aws: Aws, name: str, every: float) -> bool:
    log.info("deleting the stack %s", name)
    return settled(aws, name, every) is None


def _end_jobs(aws: Aws, kind: str, every: float) -> None:
    """Stops the jobs of a kind, then deletes their records, which carry the tag. kind: TrainingJob or HyperParameterTuningJob."""
    ours = {job[f"{kind}Name"] for job in ownership.owned(aws, kind)}

    def jobs() -> dict[str, str]:
        found = {job[f"{kind}Name"]: job[f"{kind}Status"] for job in ownership.listed(aws, kind)}
        return {name: status for name, status in found.items() if name in ours}

    for name, status in jobs().items():
        if status == "InProgress":
            log.info("stopping %s", name)
            aws.find(
                "sagemaker",
                f"Stop{kind}",
                f"{NOT_FOUND}|ValidationException",
                **{f"{kind}Name": name},
            )  # it may have ended meanwhile
    _until(lambda: not {"InProgress", "Stopping"} & set(jobs().values()), every)
    for name in jobs():
        aws.find("sagemaker", f"Delete{kind}", NOT_FOUND, **{f"{kind}Name": name})


def _machines(aws: Aws) -> list[dict[str, Any]]:
    return [each for each in instances(aws) if each["State"]["Name"] != "terminated"]


def _volumes(aws: Aws) -> list[dict[str, Any]]:
    """Disks that are attached to nothing."""
    tagged = [{"Name": "tag:project", "Values": [aws.project]}]
    return [
        each
        for each in aws.pages("ec2", "DescribeVolumes", "Volumes", Filters=tagged)
        if each["State"] == "available"
    ]


def _end_instances(aws: Aws, every: float) -> None:
    if found := [each["InstanceId"] for each in _machines(aws)]:
        log.info("terminating %s", ", ".join(found))
        aws.call("ec2", "TerminateInstances", InstanceIds=found)
        _until(lambda: not _machines(aws), every)
    for volume in _volumes(aws):
        log.info("deleting the disk %s", volume["VolumeId"])
        aws.find("ec2", "DeleteVolume", r"InvalidVolume\.NotFound", VolumeId=volume["VolumeId"])


def _end_notebooks(aws: Aws, every: float) -> None:
    ours = {each["NotebookInstanceName"] for each in ownership.owned(aws, "NotebookInstance")}

    def notebooks() -> dict[str, str]:
        found = {
            each["NotebookInstanceName"]: each["NotebookInstanceStatus"]
            for each in ownership.listed(aws, "NotebookInstance")
        }
        return {name: status for name, status in found.items() if name in ours}

    for name, status in notebooks().items():
        if status in ("InService", "Pending", "Updating"):
            log.info("stopping %s", name)
            aws.call("sagemaker", "StopNotebookInstance", NotebookInstanceName=name)
    _until(
        lambda: all(status in ("Stopped", "Failed", "Deleting") for status in notebooks().values()),
        every,
    )
    for name, status in notebooks().items():
        if status != "Deleting":
            log.info("deleting %s", name)
            aws.call("sagemaker", "DeleteNotebookInstance", NotebookInstanceName=name)
    _until(lambda: not notebooks(), every)
    kind = "NotebookInstanceLifecycleConfig"
    for script in ownership.owned(aws, kind):
        aws.call("sagemaker", f"Delete{kind}", **{f"{kind}Name": script[f"{kind}Name"]})


def _until(done: Callable[[], bool], every: float) -> None:
    end = time.monotonic() + GONE_BY
    while not done() and time.monotonic() < end:
        time.sleep(every)


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch down", description=__doc__)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--every",
        type=float,
        default=5,
        metavar="SECONDS",
        help="how often to look whether things have ended (default 5)",
    )
    options = parser.parse_intermixed_args(rest)
    aws = aws_of(targets)
    show(aws)
    if not confirmed(
        f"Delete all of {aws.project} in account {aws.account}, {aws.region}?", options.yes
    ):
        log.info("nothing was changed")
        return OK
    return down(aws, options.every)
