"""Which AWS resources are this project's: those with its tag `project`.

A name never decides: the job names of the project `packhorse-dev` begin like those of `packhorse`,
and users name endpoints as they like. Where all names of a kind begin alike, the beginning narrows
the search.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from launch.cloud.remedies import DENIED
from launch.cloud.session import Aws, AwsError

# How SageMaker answers about a resource that doesn't exist.
NOT_FOUND = r"not found|does not exist|ResourceNotFound|RecordNotFound|Could not find"
# SageMaker's code where a Stop comes after the end, or just before it: its listing was late.
ENDED = "ValidationException"
NO_BUCKET = r"404|NoSuchBucket|NotFound"  # how S3 answers about a bucket that doesn't exist

# The key of the list in SageMaker's answer, by the kind of its items.
LISTS = {
    "TrainingJob": "TrainingJobSummaries",
    "HyperParameterTuningJob": "HyperParameterTuningJobSummaries",
    "NotebookInstance": "NotebookInstances",
    "NotebookInstanceLifecycleConfig": "NotebookInstanceLifecycleConfigs",
    "Endpoint": "Endpoints",
}
LARGEST_PAGE = 100  # of SageMaker's lists
BEHIND = timedelta(hours=1)  # how late SageMaker's search index may be
JOBS = ("TrainingJob", "HyperParameterTuningJob")  # their names follow from name=...


def listed(aws: Aws, kind: str, **filters: Any) -> Iterator[dict[str, Any]]:
    """Yield SageMaker's things of a kind that may be ours, by their names. Raise AwsError.

    kind: one of LISTS.
    """
    if kind != "Endpoint":  # this project's targets name all others
        filters["NameContains"] = f"{aws.project}-"
    for thing in aws.pages("sagemaker", f"List{kind}s", LISTS[kind], **filters):
        if kind == "Endpoint" or thing[f"{kind}Name"].startswith(f"{aws.project}-"):
            yield thing


def owned(aws: Aws, kind: str, **filters: Any) -> Iterator[dict[str, Any]]:
    """Yield SageMaker's things of a kind that are ours, as SageMaker lists them. Raise AwsError."""
    for thing in listed(aws, kind, **filters):
        if _has_our_tag(aws, thing[f"{kind}Arn"]):
            yield thing


def training_jobs(aws: Aws) -> dict[str, dict[str, Any]]:
    """Return our training jobs by name, trials too, as SageMaker describes them. Raise AwsError.

    Two listings suffice for any number of jobs. The index of Search may be late, so where it
    disagrees with the list of running jobs, SageMaker is asked about the job itself.
    """
    ours = {"Name": "Tags.project", "Operator": "Equals", "Value": aws.project}
    found = aws.pages(
        "sagemaker",
        "Search",
        "Results",
        Resource="TrainingJob",
        SearchExpression={"Filters": [ours]},
        # IAM requires this condition (sagemaker:SearchVisibilityCondition): only our own jobs.
        VisibilityConditions=[{"Key": "Tags.project", "Value": aws.project}],
        PaginationConfig={"PageSize": LARGEST_PAGE},
    )
    jobs = {job["TrainingJobName"]: job for each in found if (job := each.get("TrainingJob"))}
    jobs = {name: job for name, job in jobs.items() if aws.owns(job.get("Tags", []))}
    running = {
        job["TrainingJobName"]: job
        for job in listed(
            aws,
            "TrainingJob",
            StatusEquals="InProgress",
            PaginationConfig={"PageSize": LARGEST_PAGE},
        )
    }
    for name in jobs.keys() | running.keys():
        searched = name in jobs and jobs[name]["TrainingJobStatus"] == "InProgress"
        if searched == (name in running):
            continue
        # Search would show an older job of ours by now, so this one is another project's.
        if name not in jobs and datetime.now(UTC) - running[name]["CreationTime"] > BEHIND:
            continue
        job = aws.find("sagemaker", "DescribeTrainingJob", NOT_FOUND, TrainingJobName=name)
        if job is not None and (name in jobs or _has_our_tag(aws, job["TrainingJobArn"])):
            jobs[name] = job
    return jobs


def _has_our_tag(aws: Aws, arn: str) -> bool:
    """Return whether a SageMaker resource is ours; False where it is gone by now."""
    # All tags come in one answer.
    answer = aws.find("sagemaker", "ListTags", NOT_FOUND, ResourceArn=arn, MaxResults=100)
    return answer is not None and aws.owns(answer["Tags"])


def anothers(aws: Aws, kind: str, name: str) -> str | None:
    """Return in words which other project owns the SageMaker job of this name.

    None where it is this project's, or so new that SageMaker doesn't show it yet. kind: one of
    JOBS. Raise AwsError.
    """
    try:
        thing = aws.find("sagemaker", f"Describe{kind}", NOT_FOUND, **{f"{kind}Name": name})
        if thing is None:
            return None
        arn = thing[f"{kind}Arn"]
        tags = aws.call("sagemaker", "ListTags", ResourceArn=arn, MaxResults=100)["Tags"]
    except AwsError as error:
        if not re.fullmatch(DENIED, error.code):
            raise
        return "another project, since this user may not look at it"
    if aws.owns(tags):
        return None
    projects = [f"the project {tag['Value']}" for tag in tags if tag["Key"] == "project"]
    return " ".join(projects) or "no project: it has no tag of one"


def instances(aws: Aws, *filters: tuple[str, str]) -> list[dict[str, Any]]:
    """Return our EC2 instances, as EC2 describes them, newest first. Raise AwsError.

    filters: EC2's, each a name and a value.
    """
    all_filters = [
        {"Name": name, "Values": [value]}
        for name, value in (("tag:project", aws.project), *filters)
    ]
    reservations = aws.pages("ec2", "DescribeInstances", "Reservations", Filters=all_filters)
    machines = [each for group in reservations for each in group["Instances"]]
    return sorted(machines, key=lambda each: each["LaunchTime"], reverse=True)


def stacks(aws: Aws) -> list[str]:
    """Return the names of our CloudFormation stacks. Raise AwsError."""
    return [
        stack["StackName"]
        for stack in aws.pages("cloudformation", "DescribeStacks", "Stacks")
        if aws.owns(stack.get("Tags", [])) and stack["StackStatus"] != "DELETE_COMPLETE"
    ]


def owns_bucket(aws: Aws) -> bool | None:
    """Return whether the bucket of the project's name is ours; None where there is none.

    Raise AwsError.
    """
    if aws.find("s3", "HeadBucket", NO_BUCKET, Bucket=aws.bucket) is None:
        return None
    absent = f"NoSuchTagSet|{NO_BUCKET}"  # another command may delete it now
    tags = aws.find("s3", "GetBucketTagging", absent, Bucket=aws.bucket)
    return tags is not None and aws.owns(tags["TagSet"])
