"""The AWS Lambda function in front of the SageMaker endpoint: an image or its URL to a prediction.

It needs only the standard library and boto3. Its zip holds this file, as `lambda_function.py`, and
what it imports of `serving`. `lambda_events.py` describes the events, `contract.py` what they may
ask. Answers: {"statusCode", "headers", "type-result", "body"}; the body is the endpoint's JSON, or
an error.

Environment: ENDPOINT_NAME; FETCH_URLS, who fetches a URL: "lambda" (this function, so that the
endpoint needs no network), "endpoint" or "off"; SERVING_ORIGINS, as in `serving/handler.py`.
"""

import base64
import functools
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from serving import contract, fetch
from serving.adapters import lambda_events as events
from serving.contract import Form, Query
from serving.fetch import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger("packhorse.lambda")

# Together at most 29 s: FETCH_SECONDS + ATTEMPTS * (CONNECT_SECONDS + ENDPOINT_SECONDS), and
# botocore's pause of up to 1 s before a second attempt. The function's own time limit is 30 s
# (stack.yaml) and API Gateway's 29 s, so a caller gets an answer from this function, not from its
# platform.
FETCH_SECONDS = 6.0
CONNECT_SECONDS = 1.0
ENDPOINT_SECONDS = 9.0
ATTEMPTS = 2
MAX_BODY = 6_291_456  # bytes that InvokeEndpoint takes (botocore's sagemaker-runtime model)
MAX_PICTURES = 16  # in one request
MAX_ANSWER = 6 << 20  # bytes: Lambda's limit for an answer (6 MB)
FETCHERS = ("lambda", "endpoint", "off")

# AWS's error codes that mean "try again"; botocore has tried again already.
BUSY = {"ThrottlingException", "Throttling", "TooManyRequestsException", "ModelNotReadyException"}


def handler(event: Any, context: Any) -> Any:
    """Return the answer to an event. Any error becomes an answer; its details are only logged."""
    request_id = str(context.aws_request_id)
    origins = os.environ.get("SERVING_ORIGINS", "*")
    headers: Mapping[str, str] = {}
    try:
        asked = events.read(event)
        if asked.method == "OPTIONS":
            return events.preflight(event, request_id, origins)
        query = contract.read(asked.body, asked.content_type, MAX_PICTURES)
        form = contract.choose(query, asked.accept)
        body = predict(query, form)
        status, headers = 200, {"Content-Type": form.content_type}
    except RequestError as error:
        if isinstance(error, fetch.Refused):
            log.warning("%s: refused to fetch: %s", request_id, error.reason)
        status, headers = error.status, error.headers
        body = json.dumps({"error": str(error), "request_id": request_id})
    except Exception:
        log.exception("%s: a fault of this function", request_id)
        message = "a fault of this function; its log has more under this request_id"
        status, body = 500, json.dumps({"error": message, "request_id": request_id})
    headers = {**events.allowed(event, origins), **headers}
    return events.answer(event, request_id, status, body, headers)


def check_environment() -> None:
    """Raise ValueError, in one line, where the function could answer no request."""
    if not os.environ.get("ENDPOINT_NAME"):
        raise ValueError("the variable ENDPOINT_NAME is not set: it names the endpoint to ask")
    who = os.environ.get("FETCH_URLS", "lambda")
    if who not in FETCHERS:
        raise ValueError(f"FETCH_URLS={who} is not allowed; allowed: {', '.join(FETCHERS)}")


def predict(query: Query, form: Form) -> str:
    """Return the endpoint's answer, written as the form says. Raises RequestError."""
    body, content_type = prepare(query)
    accept = contract.JSON
    if form.output == "labels":
        accept += "; output=labels"
    text = invoke(body, content_type, accept)
    try:
        rows = contract.rows_of(text, len(query.sources), form.output)
    except (ValueError, RecursionError) as error:
        log.error(
            "endpoint %s: its answer has the wrong form (%s)", os.environ["ENDPOINT_NAME"], error
        )
        raise RequestError(502, "the endpoint's answer has the wrong form") from error
    if form.lines:
        return contract.as_lines(rows)
    return text


def prepare(query: Query) -> tuple[bytes, str]:
    """Return the body for the endpoint, with images instead of their URLs, and its content type.

    A single image is sent as its bytes: base64 would make it a third larger. Raises RequestError.
    """
    sources = _fetched(query.sources)
    if len(sources) == 1 and query.top == contract.TOP:
        kind, value = sources[0]
        if kind == "base64":
            kind, value = "file", contract.decode_base64(value)
        if kind == "file":
            return _checked(value), "application/octet-stream"
    asked: dict[str, Any] = {"instances": [_instance(*source) for source in sources]}
    asked |= {"output": query.output, "top": query.top}
    return _checked(json.dumps(asked).encode()), contract.JSON


def _instance(kind: str, value: Any) -> dict[str, str]:
    if kind == "file":
        return {"base64": base64.b64encode(value).decode()}
    return {kind: value}


def _checked(body: bytes) -> bytes:
    if len(body) > MAX_BODY:
        raise RequestError(
            413, f"the request has {len(body):,} bytes; the endpoint takes {MAX_BODY:,}"
        )
    return body


def _fetched(sources: "Sequence[tuple[str, Any]]") -> list[tuple[str, Any]]:
    """Return the sources with files instead of URLs, where this function fetches them."""
    who = os.environ.get("FETCH_URLS", "lambda")
    if all(kind != "url" for kind, _ in sources) or who == "endpoint":
        return [*sources]
    if who == "off":
        raise RequestError(
            400, 'this service does not fetch pictures by "url"; send the picture\'s bytes'
        )
    end = time.monotonic() + FETCH_SECONDS
    limit = fetch.ByteLimit(MAX_BODY)
    if len(sources) > 1:
        limit = fetch.ByteLimit(MAX_BODY * 3 // 4)  # in base64, 3 bytes become 4
    return [
        ("file", _fetch(value, end, limit)) if kind == "url" else (kind, value)
        for kind, value in sources
    ]


def _fetch(url: str, end: float, limit: fetch.ByteLimit) -> bytes:
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise RequestError(400, f"the URLs gave no whole answers within {FETCH_SECONDS:g} s")
    return fetch.fetch(url, max_bytes=MAX_BODY, deadline=seconds, reserve=limit)


@functools.cache
def client() -> Any:
    """Return the one client of this environment."""
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
        text: str = response["Body"].read(MAX_ANSWER).decode("utf-8", "replace")
        return text
    except (exceptions.BotoCoreError, exceptions.ClientError) as error:
        log.error("endpoint %s: %s", endpoint, error)
        if isinstance(error, exceptions.ClientError):
            raise _failed(error.response) from error
        if isinstance(error, (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError)):
            raise RequestError(504, "the endpoint did not answer in time") from error
        raise RequestError(502, "the endpoint could not be reached") from error


def _failed(response: "Mapping[str, Any]") -> RequestError:
    """Return what an error of InvokeEndpoint means for the caller.

    A ModelError contains the answer of our server in the endpoint's container.
    """
    code = response.get("Error", {}).get("Code", "")
    status = int(response.get("OriginalStatusCode", 0))
    if code in BUSY or (code == "ModelError" and status in (429, 503)):
        return RequestError(429, "the endpoint is busy; try again")
    if code == "ModelError" and 400 <= status < 500:
        try:
            message = str(json.loads(response["OriginalMessage"])["error"])
        except (ValueError, KeyError, TypeError):
            message = "the endpoint refused the request"
        return RequestError(status, message)
    return RequestError(502, "the endpoint failed")


if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    check_environment()
    # Before the first request: Lambda gives a function more CPU at its start than in its calls, and
    # no caller waits for a provisioned start.
    client()
