"""What is this project's: what carries its tag `project`.

A name never decides: a job of the project `packhorse-dev` begins like one of `packhorse`, and whoever deploys names an
endpoint as they like. Where all names of a kind begin alike, that narrows what is asked about.
"""

from collections.abc import Iterator
from typing import Any

from launch.cloud.session import Aws

# In what SageMaker answers about something that is not there.
NOT_FOUND = (
    r"not found|does not exist|ResourceNotFound|RecordNotFound|Could not find"
)

# SageMaker's lists, by the kind of what is in them.
LISTS = {
    "TrainingJob": "TrainingJobSummaries",
    "HyperParameterTuningJob": "HyperParameterTuningJobSummaries",
    "NotebookInstance": "NotebookInstances",
    "NotebookInstanceLifecycleConfig": "NotebookInstanceLifecycleConfigs",
    "Endpoint": "Endpoints",
}


def listed(aws: Aws, kind: str, **filters: Any) -> Iterator[dict[str, Any]]:
    """SageMaker's things of a kind that may be ours, by their names. kind: one of LISTS. Raises AwsError."""
    if kind != "Endpoint":  # the names of all others are made in launch/targets/base.py
        filters["NameContains"] = f"{aws.project}-"
    for found in aws.pages("sagemaker", f"List{kind}s", LISTS[kind], **filters):
        if kind == "Endpoint" or found[f"{kind}Name"].startswith(f"{aws.project}-"):
            yield found


def owned(aws: Aws, kind: str, **filters: Any) -> Iterator[dict[str, Any]]:
    """SageMaker's things of a kind that are ours, as SageMaker lists them. Raises AwsError."""
    for found in listed(aws, kind, **filters):
        arn = found[f"{kind}Arn"]
        # All tags come in one answer; there is none where the thing is gone by now.
        answer = aws.find("sagemaker", "ListTags", NOT_FOUND, ResourceArn=arn, MaxResults=100)
        if answer is not None and aws.owns(answer["Tags"]):
            yield found


def owns_bucket(aws: Aws) -> bool | None:
    """Whether the bucket of the project's name is the project's; None where there is no such bucket. Raises AwsError."""
    if aws.find("s3", "HeadBucket", r"404|NoSuchBucket|NotFound", Bucket=aws.bucket) is None:
        return None
    tags = aws.find("s3", "GetBucketTagging", "NoSuchTagSet", Bucket=aws.bucket)
    return tags is not None and aws.owns(tags["TagSet"])
