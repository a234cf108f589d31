"""The AWS Lambda function in front of the SageMaker endpoint: takes a picture or its URL, and answers with the endpoint's prediction.

It runs on the standard library and boto3; its zip holds this file and `fetch.py`, nothing else. Events: a direct call with the JSON that
`serving/handler.py` describes, such as {"url": "https://..."}, and the HTTP events of function URLs and API Gateway (REST and HTTP), whose body is
that JSON or a picture's file. Answers: {"statusCode", "headers", "type-result", "body"}, the body being the endpoint's JSON, or an error's.

Environment: ENDPOINT_NAME; FETCH_URLS, who fetches a URL: "lambda" (this function, so that the endpoint needs no network), "endpoint" or "off".
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
    from collections.abc import Callable, Mapping

log = logging.getLogger("packhorse.lambda")

# Together at most 29 s: FETCH_SECONDS + ATTEMPTS * (CONNECT_SECONDS + ENDPOINT_SECONDS) + botocore's pause of up to 1 s before a second attempt.
# The function's own time limit is 30 s (stack.yaml) and API Gateway's 29 s, so a caller gets this function's answer and not its platform's.
FETCH_SECONDS = 6.0
CONNECT_SECONDS = 1.0
ENDPOINT_SECONDS = 9.0
ATTEMPTS = 2
MAX_BODY = 6_291_456  # bytes that InvokeEndpoint takes (botocore's sagemaker-runtime model)
MAX_PICTURES = 16  # whose URLs are fetched for one request
RETRY_SECONDS = "1"

# Codes of AWS's errors that mean "try again", after botocore has done so.
BUSY = {"ThrottlingException", "Throttling", "TooManyRequestsException", "ModelNotReadyException"}


class Problem(Exception):
    """A request that gets no prediction: the status, and what the caller may read about it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Lambda's entry. Never raises: whatever goes wrong is an answer with a status, and its details are in this function's log alone."""
    request_id = str(context.aws_request_id)
    try:
        data, accept = read(event)
        body, content_type = prepare(data, request_id)
        return answer(event, request_id, 200, invoke(body, content_type, accept))
    except Problem as problem:
        status, message = problem.status, str(problem)
    except Exception:
        log.exception("%s: a fault of this function", request_id)
        status, message = 500, "a fault of this function; its log has more under this request_id"
    return answer(
        event, request_id, status, json.dumps({"error": message, "request_id": request_id})
    )


def is_http(event: Any) -> bool:
    """Whether the event comes from a function URL or API Gateway, and not from a direct call."""
    return isinstance(event, dict) and "requestContext" in event


def read(event: Any) -> tuple[bytes, str]:
    """The body (a picture's file, or JSON), and the media type that is wanted back. Raises Problem."""
    if not isinstance(event, dict):
        raise Problem(400, 'the event must be an object like {"url": "https://..."}')
    if not is_http(event):
        return json.dumps(event).encode(), "application/json"
    headers = {
        str(name).lower(): str(value) for name, value in (event.get("headers") or {}).items()
    }
    labels = "output=labels" in headers.get("accept", "").replace(" ", "").lower()
    body = event.get("body") or ""
    try:
        data = base64.b64decode(body) if event.get("isBase64Encoded") else body.encode()
    except (binascii.Error, ValueError) as error:
        raise Problem(400, "the body is not the base64 that it claims to be") from error
    return data, f"application/json{'; output=labels' if labels else ''}"


def prepare(data: bytes, request_id: str) -> tuple[bytes, str]:
    """The body for the endpoint, with pictures in the place of their URLs, and its content type. Raises Problem."""
    if not data:
        raise Problem(
            400,
            'the request is empty; send a picture\'s bytes, or JSON like {"url": "https://..."}',
        )
    body, content_type = data, "application/octet-stream"
    if (
        data.lstrip()[:1] == b"{"
    ):  # JSON: no picture's file begins so, and many clients don't say what they send
        try:
            body, content_type = _fetch_urls(json.loads(data), request_id)
        except (ValueError, RecursionError) as error:
            raise Problem(400, "the body is not whole JSON") from error
    if len(body) > MAX_BODY:
        raise Problem(413, f"the request has {len(body):,} bytes; the endpoint takes {MAX_BODY:,}")
    return body, content_type


def _fetch_urls(asked: dict[str, Any], request_id: str) -> tuple[bytes, str]:
    """One picture alone is sent as its bytes, since base64 would make it a third larger."""
    pictures = asked.get("instances", [asked])
    places = (
        [picture for picture in pictures if isinstance(picture, dict) and "url" in picture]
        if isinstance(pictures, list)
        else []
    )
    who = os.environ.get("FETCH_URLS", "lambda")
    if places and who == "off":
        raise Problem(400, "this service fetches no URLs; send the picture's bytes")
    if places and who == "lambda":
        if len(places) > MAX_PICTURES:
            raise Problem(400, f"{len(places)} URLs in one request; allowed: {MAX_PICTURES}")
        end = time.monotonic() + FETCH_SECONDS
        alone = asked.keys() == {"url"}
        reserve = _limit(MAX_BODY if alone else MAX_BODY * 3 // 4)  # in base64, 3 bytes become 4
        for picture in places:
            file = _fetch(picture.pop("url"), end, request_id, reserve)
            if alone:
                return file, "application/octet-stream"
            picture["base64"] = base64.b64encode(file).decode()
    return json.dumps(asked).encode(), "application/json"


def _limit(allowed: int) -> "Callable[[int], None]":
    """What counts the bytes of a request's pictures. It raises Problem above `allowed`."""
    taken = 0

    def reserve(size: int) -> None:
        nonlocal taken
        taken += size
        if taken > allowed:
            raise Problem(413, f"the pictures have together more than {allowed:,} bytes")

    return reserve


def _fetch(url: Any, end: float, request_id: str, reserve: "Callable[[int], None]") -> bytes:
    if not isinstance(url, str):
        raise Problem(400, '"url" must be a text')
    try:
        seconds = end - time.monotonic()
        return fetch.fetch(url, max_bytes=MAX_BODY, deadline=seconds, reserve=reserve)
    except fetch.FetchError as error:
        if isinstance(error, fetch.Refused):
            log.warning("%s: refused to fetch: %s", request_id, error.reason)
        raise Problem(400, str(error)) from error


@functools.cache
def client() -> Any:
    """The one client of this environment, made when it is first needed; botocore is slow to import."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    return boto3.client(
        "sagemaker-runtime",
        config=Config(
            connect_timeout=CONNECT_SECONDS, read_timeout=ENDPOINT_SECONDS, retries=retries
        ),
    )


def invoke(body: bytes, content_type: str, accept: str) -> str:
    """The endpoint's answer, JSON. Raises Problem."""
    endpoint = os.environ["ENDPOINT_NAME"]
    runtime = client()
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        ReadTimeoutError,
    )

    try:
        response = runtime.invoke_endpoint(
            EndpointName=endpoint, Body=body, ContentType=content_type, Accept=accept
        )
        text: str = response["Body"].read().decode()
        return text
    except (ReadTimeoutError, ConnectTimeoutError) as error:
        log.error("endpoint %s: %s", endpoint, error)
        raise Problem(504, "the endpoint did not answer in time") from error
    except ClientError as error:
        log.error("endpoint %s: %s", endpoint, error)
        raise _problem(error.response) from error
    except BotoCoreError as error:
        log.error("endpoint %s: %s", endpoint, error)
        raise Problem(502, "the endpoint could not be reached") from error


def _problem(response: "Mapping[str, Any]") -> Problem:
    """What an error of InvokeEndpoint means for the caller. A ModelError holds the answer of our server in the endpoint's container."""
    code = response.get("Error", {}).get("Code", "")
    status = int(response.get("OriginalStatusCode", 0))
    if code in BUSY or (code == "ModelError" and status in (429, 503)):
        return Problem(429, "the endpoint is busy; try again")
    if code == "ModelError" and 400 <= status < 500:
        try:
            return Problem(status, str(json.loads(response["OriginalMessage"])["error"]))
        except (ValueError, KeyError, TypeError):
            return Problem(status, "the endpoint refused the request")
    return Problem(502, "the endpoint failed")


def answer(event: Any, request_id: str, status: int, body: str) -> dict[str, Any]:
    """As a direct caller and an HTTP gateway take it. body: JSON."""
    headers = {
        "Content-Type": "application/json",
        "Access-Control-Allow-Origin": "*",
        "X-Request-Id": request_id,
    }
    if status in (429, 503):
        headers["Retry-After"] = RETRY_SECONDS
    # API Gateway answers 502 for a field that it does not know.
    return (
        {"statusCode": status, "headers": headers}
        | ({} if is_http(event) else {"type-result": str(type(body))})
        | {"body": body}
    )


if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "provisioned-concurrency":
    client()  # made before there is a caller to wait for it
