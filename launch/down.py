"""`python -m launch down`: stops everything of this project, empties its bucket and deletes all that carries its tag. Asks first."""

import argparse
import time
from collections.abc import Callable, Sequence

from launch import foundation, runs, s3
from launch.aws import Aws
from launch.runs import NOT_FOUND
from launch.spec import aws_of, split_overrides
from launch.status import rented
from launch.up import confirmed, describe, settled
from trainer.console import log
from trainer.errors import FAULT, OK

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
    if aws.find("s3", "HeadBucket", r"404|NoSuchBucket|NotFound", Bucket=aws.bucket) is not None:
        log.info("s3://%s: deleted %d versions of objects", aws.bucket, s3.empty(aws))
    if describe(aws, ours) is not None:
        aws.call("cloudformation", "DeleteStack", StackName=ours)
        failed += [] if _stack_gone(aws, ours, every) else [ours]
    for name in failed:
        log.error("%s: CloudFormation could not delete it; its events in the console say why; then start down again", name)
    if not failed:
        log.info("nothing of %s is left in account %s, %s", aws.project, aws.account, aws.region)
    return FAULT if failed else OK


def stacks(aws: Aws) -> list[str]:
    """This project's CloudFormation stacks: those with its tag."""
    found = aws.pages("cloudformation", "DescribeStacks", "Stacks")
    tag = {"Key": "project", "Value": aws.project}
    return [stack["StackName"] for stack in found if tag in stack.get("Tags", []) and stack["StackStatus"] != "DELETE_COMPLETE"]


def _stack_gone(aws: Aws, name: str, every: float) -> bool:
    log.info("deleting the stack %s", name)
    return settled(aws, name, every) is None


def _end_jobs(aws: Aws, kind: str, every: float) -> None:
    """Stops the jobs of a kind, then deletes their records, which carry the tag. kind: TrainingJob or HyperParameterTuningJob."""
    prefix = f"{aws.project}-"

    def jobs() -> dict[str, str]:
        found = aws.pages("sagemaker", f"List{kind}s", f"{kind}Summaries", NameContains=prefix)
        return {job[f"{kind}Name"]: job[f"{kind}Status"] for job in found if job[f"{kind}Name"].startswith(prefix)}

    for name, status in jobs().items():
        if status == "InProgress":
            log.info("stopping %s", name)
            aws.find("sagemaker", f"Stop{kind}", f"{NOT_FOUND}|ValidationException", **{f"{kind}Name": name})  # it may have ended meanwhile
    _until(lambda: not {"InProgress", "Stopping"} & set(jobs().values()), every)
    for name in jobs():
        aws.find("sagemaker", f"Delete{kind}", NOT_FOUND, **{f"{kind}Name": name})


def _end_instances(aws: Aws, every: float) -> None:
    def alive() -> list[str]:
        return [each["InstanceId"] for each in runs.instances(aws) if each["State"]["Name"] != "terminated"]

    if found := alive():
        log.info("terminating %s", ", ".join(found))
        aws.call("ec2", "TerminateInstances", InstanceIds=found)
        _until(lambda: not alive(), every)
    for volume in aws.pages("ec2", "DescribeVolumes", "Volumes", Filters=[{"Name": "tag:project", "Values": [aws.project]}]):
        if volume["State"] == "available":
            log.info("deleting the disk %s", volume["VolumeId"])
            aws.find("ec2", "DeleteVolume", r"InvalidVolume\.NotFound", VolumeId=volume["VolumeId"])


def _end_notebooks(aws: Aws, every: float) -> None:
    def notebooks() -> dict[str, str]:
        found = aws.pages("sagemaker", "ListNotebookInstances", "NotebookInstances", NameContains=aws.project)
        return {
            each["NotebookInstanceName"]: each["NotebookInstanceStatus"]
            for each in found
            if each["NotebookInstanceName"].startswith(f"{aws.project}-")
        }

    for name, status in notebooks().items():
        if status in ("InService", "Pending", "Updating"):
            log.info("stopping %s", name)
            aws.call("sagemaker", "StopNotebookInstance", NotebookInstanceName=name)
    _until(lambda: all(status in ("Stopped", "Failed", "Deleting") for status in notebooks().values()), every)
    for name, status in notebooks().items():
        if status != "Deleting":
            log.info("deleting %s", name)
            aws.call("sagemaker", "DeleteNotebookInstance", NotebookInstanceName=name)
    _until(lambda: not notebooks(), every)
    scripts = aws.pages("sagemaker", "ListNotebookInstanceLifecycleConfigs", "NotebookInstanceLifecycleConfigs", NameContains=aws.project)
    for script in scripts:
        name = script["NotebookInstanceLifecycleConfigName"]
        if name.startswith(f"{aws.project}-"):
            aws.call("sagemaker", "DeleteNotebookInstanceLifecycleConfig", NotebookInstanceLifecycleConfigName=name)


def _until(done: Callable[[], bool], every: float) -> None:
    end = time.monotonic() + GONE_BY
    while not done() and time.monotonic() < end:
        time.sleep(every)


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch down", description=__doc__)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="how often to look whether things have ended (default 5)")
    options = parser.parse_intermixed_args(rest)
    aws = aws_of(targets)
    for row in rented(aws):
        log.info("ends      %s %s (%s)", row.kind, row.name, row.machines)
    for name in stacks(aws):
        log.info("deletes   stack %s", name)
    log.info("deletes   every object of s3://%s, all models and pictures in it", aws.bucket)
    if not confirmed(f"Delete all of {aws.project} in account {aws.account}, {aws.region}?", options.yes):
        log.info("nothing was changed")
        return OK
    return down(aws, options.every)
