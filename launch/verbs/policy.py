"""`python -m launch policy --for PART`: what a part of Packhorse may do in the account, and why.

It comes from the stacks' templates.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.audit.account import needed_policy
from launch.cloud import account_stack
from launch.cloud.account_stack import DEPLOYER, TEMPLATE, Place, Statement
from launch.cloud.cloudformation import load
from launch.cloud.session import bucket_name, partition
from launch.targets.spec import NO_ACCOUNT, aws_of, split_overrides
from trainer.common.errors import OK, UserError

SERVING = Path(__file__).parents[2] / "serving"

# The template of serving, and its resource, that hold each part's permissions.
SERVING_PARTS = {
    "endpoint": ("stack.yaml", "EndpointRole"),
    "lambda": ("stack.yaml", "FunctionRole"),
    "builder": ("image.yaml", "BuildRole"),
}

PARTS = {
    "launcher": (
        "whoever starts and watches jobs: plan, submit, status, logs, stop, fetch, cost, prices"
    ),
    "deployer": "whoever makes and removes the foundation: up, down",
    "training": "a SageMaker training job, and SageMaker for it",
    "ec2": "an EC2 machine that trains",
    "notebook": "the notebook: the launcher's, and its own log",
    "endpoint": "the SageMaker endpoint",
    "lambda": "the Lambda function in front of it",
    "builder": "CodeBuild, which builds the endpoint's container (serving deploy --build)",
    "audit": "python -m launch audit",
}


def permissions(part: str, place: Place) -> list[Statement]:
    """Return a part's permissions as IAM statements. part: one of PARTS."""
    project, account, region = place.project, place.account, place.region
    if part in SERVING_PARTS:
        template, resource = SERVING_PARTS[part]
        names = _serving_names(project, account, region)
        return account_stack.statements(SERVING / template, (resource,), names)
    if part == "deployer":
        told = {"Project": project, "AWS::AccountId": account, "AWS::Region": region}
        return account_stack.statements(DEPLOYER, ("DeployerPolicy",), told)
    if part == "audit":
        reason = (
            "The audit reads settings, of the whole account, since what is dangerous may lie "
            "anywhere. No action reads data, logs or code."
        )
        return [Statement(each["Sid"], reason, each) for each in needed_policy()["Statement"]]
    return account_stack.permissions(part, place)


def document(statements: Sequence[Statement]) -> dict[str, Any]:
    """Return the policy as IAM takes it."""
    return {"Version": "2012-10-17", "Statement": [statement.document for statement in statements]}


def _serving_names(project: str, account: str, region: str) -> dict[str, Any]:
    """Return the values of the parameters and resources in serving's templates.

    They are those of `python -m serving deploy` by default.
    """
    name, arn = f"{project}-serving", f"arn:{partition(region)}"
    bucket, logs = bucket_name(project, account, region), f"{arn}:logs:{region}:{account}:log-group"
    return {
        "AWS::StackName": name,
        "AWS::AccountId": account,
        "AWS::Region": region,
        "Bucket": bucket,
        "ModelArn": f"{arn}:s3:::{bucket}/serving/{name}/model.tar.gz",
        "ImageArn": f"{arn}:ecr:{region}:{account}:repository/{name}",
        "EndpointLogs.Arn": f"{logs}:/aws/sagemaker/Endpoints/{name}:*",
        "FunctionLogs.Arn": f"{logs}:/aws/lambda/{name}:*",
        "SourceFolder": f"serving/{name}/image/",
        "Repository.Arn": f"{arn}:ecr:{region}:{account}:repository/{name}-image",
        "BuildLogs.Arn": f"{logs}:/aws/codebuild/{name}-image:*",
    }


def main(arguments: Sequence[str]) -> int:
    """Print a part's policy; return the exit code."""
    targets, rest = split_overrides(arguments)
    parts = "\n".join(f"  {part:<9} {who}" for part, who in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m launch policy",
        description="Prints the policy of a part, with the reason for each statement. "
        f"The parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--for",
        dest="part",
        choices=PARTS,
        required=True,
        metavar="PART",
        help="one of those above",
    )
    parser.add_argument("--json", action="store_true", help="the policy alone, as IAM takes it")
    parser.add_argument(
        "--account", help="the account's id (default: that of the credentials, where there are any)"
    )
    parser.add_argument(
        "parameters",
        nargs="*",
        metavar="NAME=VALUE",
        help="parameters that up was given, like Image=ARN: a part may do more with some",
    )
    options = parser.parse_intermixed_args(rest)
    parameters = dict(each.partition("=")[::2] for each in options.parameters)
    unknown = ", ".join(parameters.keys() - load(TEMPLATE)["Parameters"].keys())
    if unknown:
        raise UserError(
            f"{unknown}: there is no such parameter; "
            f"allowed: {', '.join(load(TEMPLATE)['Parameters'])}"
        )
    aws = aws_of(targets)
    region = aws.configured_region
    account = options.account
    if not account:
        account = aws.account if region and aws.has_credentials() else NO_ACCOUNT
    statements = permissions(
        options.part, Place(aws.project, account, region or "us-east-1", parameters)
    )
    if options.json:
        print(json.dumps(document(statements), indent=2))
        return OK
    print(f"{options.part}: {PARTS[options.part]}")
    for statement in statements:
        print(f"\n# {statement.reason}\n{json.dumps(statement.document, indent=2)}")
    return OK
