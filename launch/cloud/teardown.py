"""Ends and deletes this project's AWS resources, except its stacks. Any may be gone already.

Every function may raise AwsError.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from launch.cloud.cloudformation import Stack
from launch.cloud.ownership import ENDED, NOT_FOUND, instances, listed, owned, stacks
from launch.cloud.session import Aws, AwsError
from trainer.common.console import log
from trainer.common.errors import UserError

SCRIPT = "NotebookInstanceLifecycleConfig"
GONE = "gone"  # the status of a notebook that SageMaker no longer has
GONE_BY = 3600  # seconds to wait for something to end


def machines(aws: Aws) -> list[dict[str, Any]]:
    """Return our EC2 instances that are not terminated."""
    return [each for each in instances(aws) if each["State"]["Name"] != "terminated"]


def volumes(aws: Aws, stopped: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return our disks that are attached to nothing or to stopped machines. stopped: their ids."""
    tagged = [{"Name": "tag:project", "Values": [aws.project]}]
    every = aws.pages("ec2", "DescribeVolumes", "Volumes", Filters=tagged)
    return [
        each
        for each in every
        if each["State"] == "available"
        or any(one["InstanceId"] in stopped for one in each.get("Attachments", []))
    ]


def placement_groups(aws: Aws) -> list[str]:
    """Return the names of our placement groups, which runs on several machines leave."""
    tagged = [{"Name": "tag:project", "Values": [aws.project]}]
    answer = aws.call("ec2", "DescribePlacementGroups", Filters=tagged)
    return [each["GroupName"] for each in answer["PlacementGroups"]]


def end_jobs(aws: Aws, every: float) -> None:
    """Stop jobs, wait for their end, and delete their records, which have the project's tag.

    every: seconds between two looks.
    """
    _end_jobs(aws, "HyperParameterTuningJob", every)  # first, so that they start no more jobs
    _end_jobs(aws, "TrainingJob", every)


def _end_jobs(aws: Aws, kind: str, every: float) -> None:
    statuses = _statuses(aws, kind)
    for name, status in statuses().items():
        if status == "InProgress":
            log.info("stopping %s", name)
            which = {f"{kind}Name": name}
            aws.find("sagemaker", f"Stop{kind}", f"{NOT_FOUND}|{ENDED}", **which)
    _until(every, lambda: not {"InProgress", "Stopping"} & set(statuses().values()), f"{kind}s")
    for name in statuses():
        aws.find("sagemaker", f"Delete{kind}", NOT_FOUND, **{f"{kind}Name": name})


def end_machines(aws: Aws, every: float, unlisted: Sequence[str] = ()) -> None:
    """Terminate instances, wait for their end, and delete unattached disks and placement groups.

    every: see `end_jobs`. unlisted: the ids of further instances that EC2 doesn't list yet.
    """
    for id in unlisted:
        log.info("terminating %s as soon as EC2 lists it", id)
        _until(every, partial(_terminate, aws, id), id)
    ids = [each["InstanceId"] for each in machines(aws)]
    if ids:
        log.info("terminating %s", ", ".join(ids))
        aws.call("ec2", "TerminateInstances", InstanceIds=ids)
        _until(every, lambda: not machines(aws), ", ".join(ids))
    for volume in volumes(aws):
        log.info("deleting the disk %s", volume["VolumeId"])
        aws.find("ec2", "DeleteVolume", r"InvalidVolume\.NotFound", VolumeId=volume["VolumeId"])
    _until(every, partial(_delete_groups, aws), "placement groups")


def _terminate(aws: Aws, id: str) -> bool:
    """Terminate an instance; return whether EC2 knows it by now."""
    unseen = r"InvalidInstanceID\.NotFound"
    return aws.find("ec2", "TerminateInstances", unseen, InstanceIds=[id]) is not None


def _delete_groups(aws: Aws) -> bool:
    return all(_delete_group(aws, name) for name in placement_groups(aws))


def _delete_group(aws: Aws, name: str) -> bool:
    """Delete a placement group; return False where EC2 still counts machines in it."""
    try:
        aws.find("ec2", "DeletePlacementGroup", r"InvalidPlacementGroup\.Unknown", GroupName=name)
    except AwsError as error:
        if error.code != "InvalidPlacementGroup.InUse":
            raise
        return False
    return True


def end_notebooks(aws: Aws, every: float) -> None:
    """Stop notebooks, wait for their end, and delete them, then their scripts."""
    statuses = _statuses(aws, "NotebookInstance")

    def status_of(name: str) -> str:
        return statuses().get(name, GONE)

    for name in statuses():
        _delete_notebook(aws, name, partial(status_of, name), every)
    for script in list(owned(aws, SCRIPT)):
        _delete_script(aws, script[f"{SCRIPT}Name"])


def delete_notebook(aws: Aws, name: str, every: float) -> None:
    """Stop a notebook, then delete it and its scripts, if they exist."""

    def status() -> str:
        which = {"NotebookInstanceName": name}
        found = aws.find("sagemaker", "DescribeNotebookInstance", NOT_FOUND, **which)
        return GONE if found is None else str(found["NotebookInstanceStatus"])

    _delete_notebook(aws, name, status, every)
    _delete_script(aws, name)
    log.info("%s is deleted", name)


def _delete_notebook(aws: Aws, name: str, status: Callable[[], str], every: float) -> None:
    """Stop a notebook, wait, and delete it. status: returns its status at SageMaker, or GONE."""

    def has_stopped() -> bool:
        seen = status()
        if seen == "InService":  # not before: SageMaker can't stop a notebook that is starting
            log.info("stopping %s", name)
            which = {"NotebookInstanceName": name}
            aws.find("sagemaker", "StopNotebookInstance", f"{NOT_FOUND}|{ENDED}", **which)
        return seen in ("Stopped", "Failed", "Deleting", GONE)

    _until(every, has_stopped, name)
    if status() in ("Stopped", "Failed"):
        log.info("deleting %s", name)
        aws.find("sagemaker", "DeleteNotebookInstance", NOT_FOUND, NotebookInstanceName=name)
    _until(every, lambda: status() == GONE, name)


def _delete_script(aws: Aws, name: str) -> None:
    """Delete a notebook's scripts, if they exist."""
    aws.find("sagemaker", f"Delete{SCRIPT}", NOT_FOUND, **{f"{SCRIPT}Name": name})


@dataclass(frozen=True)
class Holder:
    """A user, group or role of the account that a policy of ours was attached to by hand."""

    kind: str  # User, Group or Role
    name: str
    policy: str  # its ARN

    def __str__(self) -> str:
        return f"policy {self.policy.rpartition('/')[2]} from the {self.kind.lower()} {self.name}"


def holders(aws: Aws) -> list[Holder]:
    """Return who has policies of our stacks attached, except the stacks' own roles.

    `up` tells the user to attach the launcher's; CloudFormation can't delete an attached policy.
    """
    resources = [each for name in stacks(aws) for each in Stack(aws, name).resources()]
    made = {each.get("PhysicalResourceId") for each in resources}
    found = []
    for each in resources:
        if each["ResourceType"] != "AWS::IAM::ManagedPolicy":
            continue
        policy = each["PhysicalResourceId"]
        answer = aws.find("iam", "ListEntitiesForPolicy", "NoSuchEntity", PolicyArn=policy) or {}
        for kind in ("User", "Group", "Role"):
            names = [entity[f"{kind}Name"] for entity in answer.get(f"Policy{kind}s", [])]
            found += [Holder(kind, name, policy) for name in names if name not in made]
    return found


def detach(aws: Aws, holder: Holder) -> None:
    """Detach a policy of ours from its holder."""
    who = {f"{holder.kind}Name": holder.name, "PolicyArn": holder.policy}
    aws.find("iam", f"Detach{holder.kind}Policy", "NoSuchEntity", **who)


def _statuses(aws: Aws, kind: str) -> Callable[[], dict[str, str]]:
    """Return a function that asks for the status, by name, of the resources that are ours now."""
    ours = {thing[f"{kind}Name"] for thing in owned(aws, kind)}

    def ask() -> dict[str, str]:
        return {
            thing[f"{kind}Name"]: thing[f"{kind}Status"]
            for thing in listed(aws, kind)
            if thing[f"{kind}Name"] in ours
        }

    return ask


def _until(every: float, is_done: Callable[[], bool], what: str) -> None:
    """Wait until `is_done` returns True. Raise UserError after GONE_BY seconds."""
    end = time.monotonic() + GONE_BY
    while not is_done():
        if time.monotonic() >= end:
            raise UserError(
                f"{what}: not gone after {GONE_BY // 60} minutes; its page in AWS's console says "
                "why; then start the same command again"
            )
        time.sleep(every)
