"""`python -m serving status | invoke | logs`: the deployment's state, predictions and logs."""

import argparse
import base64
import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.cloud.cloudformation import parameters_of
from launch.cloud.logs import LogReader
from launch.cloud.prices import HOURS_A_MONTH, price
from launch.cloud.session import Aws
from serving.deploy.release import idle_price
from serving.deploy.stack import ServingStack
from trainer.common import streams
from trainer.common.errors import FAULT, OK, UserError
from trainer.common.paths import expanded
from trainer.common.text import dollars

FOLLOW = 2.0  # seconds between two looks at the logs
MAX_CALL = 6_291_456  # bytes of a call to Lambda or to an endpoint


def status(options: argparse.Namespace) -> int:
    """Print what is deployed, its state and its cost."""
    aws = Aws(options.project, options.region)
    serving = ServingStack(aws, options.name)
    stack = serving.deployed()
    parameters = parameters_of(stack)
    print(
        f"stack {options.name} in account {aws.account}, {aws.region}: "
        f"{stack['StackStatus']}, since {_day(stack['CreationTime'])}"
    )
    instances = None
    if parameters["Door"] == "endpoint":
        instances = _endpoint_status(aws, options.name, parameters)
    _print_alarms(serving)
    _function_status(aws, options.name, parameters)
    items = idle_price(parameters, aws.region, instances)
    days = (datetime.now(UTC) - stack["CreationTime"]).total_seconds() / 86400
    day = sum(item.month or 0 for item in items) / HOURS_A_MONTH * 24
    unknown = ""
    if any(item.month is None for item in items):
        unknown = ", and what has no known price isn't counted"
    print(
        f"cost         {dollars(day)} a day as it stands, "
        f"about {dollars(round(day * days, 2))} in {days:.1f} days so far"
    )
    basis = price(parameters["InstanceType"], aws.region).basis
    print(f"             ({basis}; requests are extra{unknown})")
    return OK


def _endpoint_status(aws: Aws, name: str, parameters: Mapping[str, str]) -> int:
    """Print the endpoint's state, and return how many instances it has."""
    absent = "Could not find|not exist"
    endpoint = aws.find("sagemaker", "DescribeEndpoint", absent, EndpointName=name)
    if endpoint is None:
        print("endpoint     none")
        return 0
    variant = endpoint.get("ProductionVariants", [{}])[0]
    instances = int(variant.get("CurrentInstanceCount", 0))
    desired = variant.get("DesiredInstanceCount", instances)
    status = endpoint["EndpointStatus"]
    if endpoint.get("FailureReason"):
        status += f": {endpoint['FailureReason']}"
    print(
        f"endpoint     {status}, changed {_day(endpoint['LastModifiedTime'])}, "
        f"model {parameters['ModelUrl']}"
    )
    print(
        f"instances    {instances} of {parameters['InstanceType']}, {desired} wanted, "
        f"{parameters['MinInstances']} to {parameters['MaxInstances']}"
    )
    return instances


def _print_alarms(stack: ServingStack) -> None:
    """Print the state of the stack's own alarms, by the stack: names of others may begin alike."""
    names = [
        each["PhysicalResourceId"]
        for each in stack.resources()
        if each["ResourceType"] == "AWS::CloudWatch::Alarm"
        and each.get("PhysicalResourceId")  # it has none while it is being created
    ]
    if not names:
        return
    alarms = stack.aws.call("cloudwatch", "DescribeAlarms", AlarmNames=names)["MetricAlarms"]
    for alarm in alarms:
        print(f"alarm        {alarm['AlarmName']}: {alarm['StateValue']}")


def _function_status(aws: Aws, name: str, parameters: Mapping[str, str]) -> None:
    alias = aws.find("lambda", "GetAlias", "NotFound", FunctionName=name, Name="live")
    if alias is None:
        print("function     none")
        return
    warm = ""
    if parameters["ProvisionedConcurrency"] != "0":
        operation, which = "GetProvisionedConcurrencyConfig", {"Qualifier": "live"}
        config = aws.find("lambda", operation, "NotFound", FunctionName=name, **which) or {}
        available = config.get("AvailableProvisionedConcurrentExecutions", 0)
        warm = f", {available} of {parameters['ProvisionedConcurrency']} environments warm"
    print(f"function     version {alias['FunctionVersion']}{warm}")


def _day(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def invoke(options: argparse.Namespace) -> int:
    """Print the answer of the function, or of the endpoint itself, to an image or its URL."""
    aws = Aws(options.project, options.region)
    source: str = options.source
    is_url = re.match(r"https?://", source) is not None
    image = b"" if is_url else _read(source)
    if options.endpoint and not is_url:
        accept = "application/json; output=labels" if options.labels else "application/json"
        request = {"Body": image, "ContentType": "application/octet-stream", "Accept": accept}
        return _invoke_endpoint(aws, options.name, request)
    question = {"url": source} if is_url else {"base64": base64.b64encode(image).decode()}
    if options.labels:
        question["output"] = "labels"
    body = json.dumps(question).encode()
    if len(body) > MAX_CALL:
        raise UserError(
            f"{source}: {len(body):,} bytes as JSON, and a call takes {MAX_CALL:,}; "
            "give a smaller picture, or its URL"
        )
    if options.endpoint:
        kinds = dict.fromkeys(("ContentType", "Accept"), "application/json")
        return _invoke_endpoint(aws, options.name, {"Body": body, **kinds})
    which = {"FunctionName": options.name, "Qualifier": "live"}
    response = aws.call("lambda", "Invoke", **which, Payload=body)
    answer = json.loads(response["Payload"].read())
    if "FunctionError" in response:
        message = answer.get("errorMessage", answer)
        print(f"the function failed: {message}; python -m serving logs has more", file=sys.stderr)
        return FAULT
    if answer["statusCode"] != 200:
        raise UserError(f"{answer['statusCode']}: {answer['body']}")
    print(answer["body"])
    return OK


def _read(source: str) -> bytes:
    try:
        return Path(expanded(source)).read_bytes()
    except OSError as error:
        raise UserError(
            f"{source}: {error.strerror}; give a picture's file, "
            "or a URL that begins with http:// or https://"
        ) from error


def _invoke_endpoint(aws: Aws, name: str, request: dict[str, Any]) -> int:
    response = aws.call("sagemaker-runtime", "InvokeEndpoint", EndpointName=name, **request)
    print(response["Body"].read().decode())
    return OK


def logs(options: argparse.Namespace) -> int:
    """Print what the function and the endpoint logged, in order; with --follow until Ctrl-C."""
    aws = Aws(options.project, options.region)
    stack = ServingStack(aws, options.name).deployed()
    groups = {"function": f"/aws/lambda/{options.name}"}
    if parameters_of(stack)["Door"] == "endpoint":
        groups["endpoint"] = f"/aws/sagemaker/Endpoints/{options.name}"
    since = int((time.time() - 60 * options.minutes) * 1000)
    readers = {who: LogReader(aws, group, since=since) for who, group in groups.items()}
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            events = [(event, who) for who, reader in readers.items() for event in reader.read()]
            for event, who in sorted(events, key=lambda pair: int(pair[0]["timestamp"])):
                moment = datetime.fromtimestamp(event["timestamp"] / 1000, UTC)
                print(f"{moment:%Y-%m-%dT%H:%M:%S}Z {who} {event['message'].rstrip()}", flush=True)
            if not options.follow or streams.gone(sys.stdout):
                break
            time.sleep(FOLLOW)
    return OK
