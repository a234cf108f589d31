"""`python -m launch down`: end and delete everything of this project, and empty its bucket.

It lists all of it and asks first.
"""

import argparse
from collections.abc import Sequence

from launch.cloud import ownership, s3, teardown
from launch.cloud.account_stack import AccountStack
from launch.cloud.cloudformation import Stack
from launch.cloud.confirm import confirmed
from launch.cloud.logs import SHARED_GROUPS
from launch.cloud.session import Aws, AwsError
from launch.targets import attempt as notes
from launch.targets.spec import aws_of, split_overrides
from launch.verbs.arguments import add_every
from trainer.common.console import log
from trainer.common.errors import FAULT, OK, UserError
from trainer.common.text import listed


def down(aws: Aws, every: float) -> int:
    """End and delete everything; return the exit code. Raise AwsError.

    An earlier, killed `down` may have done some steps already. every: seconds between two checks.
    """
    teardown.end_jobs(aws, every)
    teardown.end_machines(aws, every, unlisted(aws))
    teardown.end_notebooks(aws, every)
    ours = AccountStack(aws, every)
    # The stacks of endpoints use the bucket, so they come first.
    others = [Stack(aws, name, every) for name in ownership.stacks(aws) if name != ours.name]
    for stack in others:
        stack.delete()
    remaining = [stack for stack in others if not _is_gone(stack)]
    if ownership.owns_bucket(aws):
        log.info("s3://%s: deleted %d versions of objects", aws.bucket, s3.empty(aws))
    described = ours.describe()
    if described is not None and ours.is_ours(described):
        for holder in teardown.holders(aws):
            log.info("detaching %s", holder)
            teardown.detach(aws, holder)
        ours.mark_events()
        ours.delete_ours(described)
        if not _is_gone(ours):
            remaining.append(ours)
    for stack in remaining:
        reasons = "; ".join(stack.failures()) or "its events in the console say why"
        log.error(
            "%s: CloudFormation could not delete it: %s; fix that, then start down again",
            stack.name,
            reasons,
        )
    if remaining:
        return FAULT
    log.info(
        "nothing of %s is left in account %s, %s, but for log streams",
        aws.project,
        aws.account,
        aws.region,
    )
    return OK


def unlisted(aws: Aws) -> list[str]:
    """Return the machines that were rented of late and EC2 doesn't list yet. Raise AwsError."""
    if aws.find("s3", "HeadBucket", ownership.NO_BUCKET, Bucket=aws.bucket) is None:
        return []
    # EC2 lists for an hour what has ended, which is as long as an attempt is young.
    known = {each["InstanceId"] for each in ownership.instances(aws)}
    noted = [each.attempt.id or "" for each in notes.young(aws) if each.word is None]
    return [id for id in noted if id.startswith("i-") and id not in known]


def _is_gone(stack: Stack) -> bool:
    log.info("deleting the stack %s", stack.name)
    return stack.settle() is None


def show(aws: Aws, owns: bool | None) -> None:
    """Print everything that `down` ends and deletes, and what it leaves. Raise AwsError.

    owns: whether the bucket is ours; None: there is none.
    """
    for kind, what in (("HyperParameterTuningJob", "tuning job"), ("TrainingJob", "training job")):
        jobs = {job[f"{kind}Name"]: job[f"{kind}Status"] for job in ownership.owned(aws, kind)}
        for name, status in jobs.items():
            if status in ("InProgress", "Stopping"):
                log.info("ends      %s %s", what, name)
        if jobs:
            log.info("deletes   the records of %d %ss", len(jobs), what)
    for machine in teardown.machines(aws):
        log.info("ends      machine %s (%s)", machine["InstanceId"], machine["InstanceType"])
    for id in unlisted(aws):
        log.info("ends      machine %s, which EC2 doesn't list yet", id)
    for volume in teardown.volumes(aws):
        log.info("deletes   disk %s (%d GB)", volume["VolumeId"], volume["Size"])
    for group in teardown.placement_groups(aws):
        log.info("deletes   placement group %s", group)
    for notebook in ownership.owned(aws, "NotebookInstance"):
        log.info("deletes   notebook %s, with its disk", notebook["NotebookInstanceName"])
    for script in ownership.owned(aws, "NotebookInstanceLifecycleConfig"):
        log.info("deletes   notebook's script %s", script["NotebookInstanceLifecycleConfigName"])
    for holder in teardown.holders(aws):
        log.info("detaches  %s", holder)
    for name in ownership.stacks(aws):
        log.info("deletes   stack %s", name)
        for resource in Stack(aws, name).resources():
            physical = resource.get("PhysicalResourceId")
            if physical and physical not in SHARED_GROUPS:
                log.info("            %-26s %s", resource["ResourceType"], physical)
    if owns:
        count, size = s3.versions(aws)
        log.info(
            "deletes   every object of s3://%s, all models and pictures in it: "
            "%d versions, %.2f GB",
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


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch down", description=__doc__)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_every(parser, 5, "how often to look whether things have ended")
    options = parser.parse_intermixed_args(rest)
    aws = aws_of(targets)
    owns = ownership.owns_bucket(aws)
    others = notes.of_others(aws) if owns else []
    if others:
        raise UserError(
            f"s3://{aws.bucket} holds runs of other projects too, which would go with it: "
            f"{listed(others)}; nothing was changed: let their owners fetch and delete them "
            "(aws s3 rm --recursive, below runs/RUN and runs/.all/attempts/RUN), then start down "
            "again"
        )
    show(aws, owns)
    if not confirmed(
        f"Delete all of {aws.project} in account {aws.account}, {aws.region}?", options.yes
    ):
        log.info("nothing was changed")
        return OK
    try:
        return down(aws, options.every)
    except AwsError as error:
        raise UserError(
            f"{error}; not all of {aws.project} has ended yet, and what is left costs money: "
            "start the same down again"
        ) from error
