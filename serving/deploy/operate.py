"""`python -m serving status | invoke | logs`: what is deployed, asked how it is and what it says."""

import argparse
import base64
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.cloud.prices import table
from launch.cloud.session import Aws
from serving.deploy import prices
from serving.deploy import stack as stacks
from serving.deploy.release import idle_price
from trainer.common import streams
from trainer.common.errors import FAULT, OK, UserError

FOLLOW = 2.0  # seconds between two looks at the logs
MAX_CALL = 6_291_456  # bytes of a call to Lambda or to an endpoint


def status(options: argparse.Namespace) -> int:
    aws = Aws(options.project, options.region)
    stack = stacks.deployed(aws, options.name)
    parameters = stacks.parameters(stack)
    print(
        f"stack {options.name} in account {aws.account}, {aws.region}: {stack['StackStatus']}, since {_day(stack['CreationTime'])}"
    )
    instances = None
    if parameters["Door"] == "endpoint":
        instances = _endpoint_status(aws, options.name, parameters)
    _function_status(aws, options.name, parameters)
    items = idle_price(parameters, aws.region, instances)
    days = (datetime.now(UTC) - stack["CreationTime"]).total_seconds() / 86400
    month = sum(item.month or 0 for item in items)
    unknown = (
        ", without what has no known price" if any(item.month is None for item in items) else ""
    )
    day = month / prices.HOURS * 24
    print(
        f"cost         {prices.dollars(day)} a day as it stands, about {prices.dollars(day * days)} in {days:.1f} days so far"
    )
    print(f"             (an estimate of {table()['date']}; requests are extra{unknown})")
    return OK


def _endpoint_status(aws: Aws, name: str, parameters: Mapping[str, str]) -> int:
    """How many instances there are."""
    endpoint = aws.find(
        "sagemaker", "DescribeEndpoint", "Could not find|not exist", EndpointName=name
    )
    if endpoint is None:
        print("endpoint     none")
        return 0
    variant = endpoint.get("ProductionVariants", [{}])[0]
    instances = int(variant.get("CurrentInstanceCount", 0))
    desired = variant.get("DesiredInstanceCount", instances)
    why = f": {endpoint['FailureReason']}" if endpoint.get("FailureReason") else ""
    print(
        f"endpoint     {endpoint['EndpointStatus']}{why}, changed {_day(endpoint['LastModifiedTime'])}, model {parameters['ModelUrl']}"
    )
    print(
        f"instances    {instances} of {parameters['InstanceType']}, {desired} wanted, {parameters['MinInstances']} to {parameters['MaxInstances']}"
    )
    alarms = aws.call("cloudwatch", "DescribeAlarms", AlarmNamePrefix=f"{name}-")["MetricAlarms"]
    for alarm in alarms:
        print(f"alarm        {alarm['AlarmName']}: {alarm['StateValue']}")
    return instances


def _function_status(aws: Aws, name: str, parameters: Mapping[str, str]) -> None:
    alias = aws.find("lambda", "GetAlias", "NotFound", FunctionName=name, Name="live")
    shown = f"version {alias['FunctionVersion']}" if alias else "none"
    if alias and parameters["ProvisionedConcurrency"] != "0":
        warm = (
            aws.find(
                "lambda",
                "GetProvisionedConcurrencyConfig",
                "NotFound",
                FunctionName=name,
                Qualifier="live",
            )
            or {}
        )
        shown += f", {warm.get('AvailableProvisionedConcurrentExecutions', 0)} of {parameters['ProvisionedConcurrency']} environments warm"
    print(f"function     {shown}")


def _day(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def invoke(options: argparse.Namespace) -> int:
    aws = Aws(options.project, options.region)
    source: str = options.source
    is_url = re.match(r"https?://", source) is not None
    picture = b"" if is_url else _read(source)
    output = {"output": "labels"} if options.labels else {}
    if options.endpoint and not is_url:
        accept = "application/json" + ("; output=labels" if options.labels else "")
        request = {"Body": picture, "ContentType": "application/octet-stream", "Accept": accept}
        return _invoke_endpoint(aws, options.name, request)
    asked = {"url": source} if is_url else {"base64": base64.b64encode(picture).decode()}
    body = json.dumps(asked | output).encode()
    if len(body) > MAX_CALL:
        raise UserError(
            f"{source}: {len(body):,} bytes as JSON, and a call takes {MAX_CALL:,}; give a smaller picture, or its URL"
        )
    if options.endpoint:
        return _invoke_endpoint(
            aws,
            options.name,
            {"Body": body, "ContentType": "application/json", "Accept": "application/json"},
        )
    response = aws.call(
        "lambda", "Invoke", FunctionName=options.name, Qualifier="live", Payload=body
    )
    answer = json.loads(response["Payload"].read())
    if "FunctionError" in response:
        print(
            f"the function failed: {answer.get('errorMessage', answer)}; python -m serving logs has more",
            file=sys.stderr,
        )
        return FAULT
    if answer["statusCode"] != 200:
        raise UserError(f"{answer['statusCode']}: {answer['body']}")
    print(answer["body"])
    return OK


def _read(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise UserError(
            f"{source}: {error.strerror}; give a picture's file, or a URL that begins with http:// or https://"
        ) from error


def _invoke_endpoint(aws: Aws, name: str, request: dict[str, Any]) -> int:
    response = aws.call("sagemaker-runtime", "InvokeEndpoint", EndpointName=name, **request)
    print(response["Body"].read().decode())
    return OK


def logs(options: argparse.Namespace) -> int:
    aws = Aws(options.project, options.region)
    stack = stacks.deployed(aws, options.name)
    groups = {"function": f"/aws/lambda/{options.name}"}
    if stacks.parameters(stack)["Door"] == "endpoint":
        groups["endpoint"] = f"/aws/sagemaker/Endpoints/{options.name}"
    since = int((time.time() - 60 * options.minutes) * 1000)
    shown: set[str] = set()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            events = [
                (event, who)
                for who, group in groups.items()
                for event in _log_events(aws, group, since)
                if event["eventId"] not in shown
            ]
            for event, who in sorted(events, key=lambda pair: int(pair[0]["timestamp"])):
                shown.add(event["eventId"])
                since = max(
                    since, event["timestamp"] - 60_000
                )  # events may arrive late, and out of order
                moment = datetime.fromtimestamp(event["timestamp"] / 1000, UTC)
                print(f"{moment:%Y-%m-%dT%H:%M:%S}Z {who} {event['message'].rstrip()}", flush=True)
            if not options.follow or streams.gone(sys.stdout):
                break
            time.sleep(FOLLOW)
    return OK


def _log_events(aws: Aws, group: str, since: int) -> Iterator[dict[str, Any]]:
    return aws.pages("logs", "FilterLogEvents", "events", logGroupName=group, startTime=since)
