"""Requests are held to AWS's own model before they are sent, further than botocore does."""

import re

import pytest

from launch.cloud.request import Request, check
from trainer.common.errors import UserError

GOOD = {
    "TrainingJobName": "a-1",
    "RoleArn": "arn:aws:iam::000000000000:role/x",
    "AlgorithmSpecification": {"TrainingInputMode": "File"},
    "OutputDataConfig": {"S3OutputPath": "s3://a"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        (
            {"TrainingJobName": "a" * 64},
            "TrainingJobName: its length of 64 is above the maximum of 63",
        ),
        ({"TrainingJobName": "a_1"}, "TrainingJobName: 'a_1' doesn't match [a-zA-Z0-9]"),
        ({"RoleArn": 3}, "Invalid type for parameter RoleArn"),
        (
            {"AlgorithmSpecification": {}},
            'Missing required parameter in AlgorithmSpecification: "TrainingInputMode"',
        ),
        ({"Nonsense": 1}, 'Unknown parameter in input: "Nonsense"'),
        (
            {"RetryStrategy": {"MaximumRetryAttempts": 31}},
            "RetryStrategy.MaximumRetryAttempts: 31 is above the maximum of 30",
        ),
        ({"RetryStrategy": {"MaximumRetryAttempts": 0}}, "valid min value: 1"),
        (
            {"HyperParameters": {"k": "x" * 2501}},
            "HyperParameters[k]: its length of 2501 is above the maximum of 2500",
        ),
        (
            {"HyperParameters": {"k": "two\nlines"}},
            r"HyperParameters[k]: 'two\nlines' doesn't match .*",
        ),
        (
            {"Tags": [{"Key": "a", "Value": "b"}] * 51},
            "Tags: its length of 51 is above the maximum of 50",
        ),
        (
            {"Tags": [{"Key": "a", "Value": "café 1"}]},
            None,
        ),  # a pattern with Unicode's categories, which Python's expressions lack
        (
            {"ResourceConfig": {"InstanceType": "ml.g4dn.xlrge"}},
            "ml.g4dn.xlrge is not one of AWS's",
        ),
        ({"ResourceConfig": {"InstanceType": "ml.g4dn.xlrge"}}, "like ml.g4dn.xlarge"),
    ],
)
def test_what_aws_would_refuse(change, message):
    request = Request("sagemaker", "CreateTrainingJob", GOOD | change)
    if message is None:
        check(request)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check(request)
