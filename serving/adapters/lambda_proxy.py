"""The AWS Lambda function in front of the SageMaker endpoint: an image or its URL to a prediction.

It runs on the standard library and boto3; its zip holds this file, as `lambda_function.py`, and
`fetch.py`, nothing else. Events: a direct call with the JSON that `serving/handler.py` describes,
such as {"url": "https://..."}, and the HTTP events of function URLs and API Gateway (REST and
HTTP), whose body is that JSON or an image's file. Answers: {"statusCode", "headers", "type-result",
"body"}, the body being the endpoint's JSON, or an error's.

Environment: ENDPOINT_NAME; FETCH_URLS, who fetches a URL: "lambda" (this function, so that the
endpoint needs no network), "endpoint" or "off".
"""

import base64
import binascii
import functools
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

try:
    from serving import fetch
except ImportError:
    import fetch  # type: ignore[import-not-found, no-redef]  # in the zip it lies beside this file

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("packhorse.lambda")

# Together at most 29 s: FETCH_SECONDS + ATTEMPTS * (CONNECT_SECONDS + ENDPOINT_SECONDS), and
# botocore's pause of up to 1 s before a second attempt. The function's own time limit is 30 s
# (stack.yaml) and API Gateway's 29 s, so a caller gets this function's answer and not its
# platform's.
FETCH_SECONDS = 6.0
CONNECT_SECONDS = 1.0
ENDPOINT_SECONDS = 9.0
ATTEMPTS = 2
MAX_BODY = 6_291_456  # bytes that InvokeEndpoint takes (botocore's sagemaker-runtime model)
MAX_PICTURES = 16  # whose URLs are fetched for one request
RETRY_SECONDS = "1"

# Codes of AWS's errors that mean "try again", after botocore has done so.
BUSY = {"ThrottlingException", "Throttling", "TooManyRequestsException", "ModelNotReadyException"}


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Return the answer to an event, whatever goes wrong; its details are in the log alone."""
    request_id = str(context.aws_request_id)
    try:
        data, accept = read(event)
        body, content_type = prepare(data)
        return answer(event, request_id, 200, invoke(body, content_type, accept))
    except fetch.RequestError as error:
        if isinstance(error, fetch.Refused):
            log.warning("%s: refused to fetch: %s", request_id, error.reason)
        status, message = error.status, str(error)
    except Exception:
        log.exception("%s: a fault of this function", request_id)
        status, message = 500, "a fault of this function; its log has more under this request_id"
    told = json.dumps({"error": message, "request_id": request_id})
    return answer(event, request_id, status, told)


def is_http(event: Any) -> bool:
    """Return whether an event comes from a function URL or API Gateway, not from a direct call."""
    return isinstance(event, dict) and "requestContext" in event


def is_json(data: bytes) -> bool:
    """Return whether a body is JSON: many clients don't say, and no image's file begins so."""
    return data.lstrip()[:1] == b"{"


def read(event: Any) -> tuple[bytes, str]:
    """Return an event's body (an image's file, or JSON), and the media type to answer in.

    Raises RequestError.
    """
    if not isinstance(event, dict):
        raise fetch.RequestError(400, 'the event must be an object like {"url": "https://..."}')
    accept = "application/json"
    if not is_http(event):
        return json.dumps(event).encode(), accept
    headers = {
        str(name).lower(): str(value) for name, value in (event.get("headers") or {}).items()
    }
    if "output=labels" in headers.get("accept", "").replace(" ", "").lower():
        accept = "application/json; output=labels"
    body = event.get("body") or ""
    try:
        if event.get("isBase64Encoded"):
            return base64.b64decode(body), accept
        return body.encode(), accept
    except (binascii.Error, ValueError) as error:
        raise fetch.RequestError(400, "the body is not the base64 that it claims to be") from error


def prepare(data: bytes) -> tuple[bytes, str]:
    """Return the endpoint's body, with images in the place of their URLs, and its content type.

    Raises RequestError.
    """
    if not data:
        raise fetch.RequestError(
            400,
            'the request is empty; send a picture\'s bytes, or JSON like {"url": "https://..."}',
        )
    body, content_type = data, "application/octet-stream"
    if is_json(data):
        try:
            body, content_type = _fetch_urls(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise fetch.RequestError(400, "the body is not whole JSON") from error
    if len(body) > MAX_BODY:
        raise fetch.RequestError(
            413, f"the request has {len(body):,} bytes; the endpoint takes {MAX_BODY:,}"
        )
    return body, content_type


def _fetch_urls(asked: dict[str, Any]) -> tuple[bytes, str]:
    """Return the endpoint's body and content type.

    One image alone is sent as its bytes, since base64 would make it a third larger.
    """
    instances = asked.get("instances", [asked])
    by_url = []
    if isinstance(instances, list):
        by_url = [each for each in instances if isinstance(each, dict) and "url" in each]
    who = os.environ.get("FETCH_URLS", "lambda")
    if by_url and who == "off":
        raise fetch.RequestError(400, "this service fetches no URLs; send the picture's bytes")
    if by_url and who == "lambda":
        if len(by_url) > MAX_PICTURES:
            raise fetch.RequestError(
                400, f"{len(by_url)} URLs in one request; allowed: {MAX_PICTURES}"
            )
        end = time.monotonic() + FETCH_SECONDS
        if asked.keys() == {"url"}:
            return _fetch(asked["url"], end, fetch.ByteLimit(MAX_BODY)), "application/octet-stream"
        limit = fetch.ByteLimit(MAX_BODY * 3 // 4)  # in base64, 3 bytes become 4
        for instance in by_url:
            file = _fetch(instance.pop("url"), end, limit)
            instance["base64"] = base64.b64encode(file).decode()
    return json.dumps(asked).encode(), "application/json"


def _fetch(url: Any, end: float, limit: fetch.ByteLimit) -> bytes:
    if not isinstance(url, str):
        raise fetch.RequestError(400, '"url" must be a text')
    seconds = end - time.monotonic()
    file: bytes = fetch.fetch(url, max_bytes=MAX_BODY, deadline=seconds, reserve=limit)
    return file


@functools.cache
def client() -> Any:
    """Return the one client of this environment, made when it is first needed."""
    # imported here: botocore is slow to import
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ENDPOINT_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
    )
    return boto3.client("sagemaker-runtime", config=config)


def invoke(body: bytes, content_type: str, accept: str) -> str:
    """Return the endpoint's answer, JSON. Raises RequestError."""
    endpoint = os.environ["ENDPOINT_NAME"]
    runtime = client()
    # imported here: botocore is slow to import
    from botocore import exceptions

    try:
        response = runtime.invoke_endpoint(
            EndpointName=endpoint, Body=body, ContentType=content_type, Accept=accept
        )
        text: str = response["Body"].read().decode()
        return text
    except (exceptions.BotoCoreError, exceptions.ClientError) as error:
        log.error("endpoint %s: %s", endpoint, error)
        if isinstance(error, exceptions.ClientError):
            raise _failed(error.response) from error
        if isinstance(error, (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError)):
            raise fetch.RequestError(504, "the endpoint did not answer in time") from error
        raise fetch.RequestError(502, "the endpoint could not be reached") from error


def _failed(response: "Mapping[str, Any]") -> fetch.RequestError:
    """Return what an error of InvokeEndpoint means for the caller.

    A ModelError holds the answer of our server in the endpoint's container.
    """
    code = response.get("Error", {}).get("Code", "")
    status = int(response.get("OriginalStatusCode", 0))
    if code in BUSY or (code == "ModelError" and status in (429, 503)):
        return fetch.RequestError(429, "the endpoint is busy; try again")
    if code == "ModelError" and 400 <= status < 500:
        try:
            message = str(json.loads(response["OriginalMessage"])["error"])
        except (ValueError, KeyError, TypeError):
            message = "the endpoint refused the request"
        return fetch.RequestError(status, message)
    return fetch.RequestError(502, "the endpoint failed")


def answer(event: Any, request_id: str, status: int, body: str) -> dict[str, Any]:
    """Return an answer as a direct caller or an HTTP gateway takes it. body: JSON."""
    headers = {
        "Content-Type": "application/json",
        "Access-Control-Allow-Origin": "*",
        "X-Request-Id": request_id,
    }
    if status in (429, 503):
        headers["Retry-After"] = RETRY_SECONDS
    told: dict[str, Any] = {"statusCode": status, "headers": headers}
    if not is_http(event):  # API Gateway answers 502 for a field that it does not know
        told["type-result"] = str(type(body))
    return told | {"body": body}


if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "provisioned-concurrency":
    client()  # made before there is a caller to wait for it
