"""AWS Lambda's events as HTTP requests, and answers in the form that the event's sender expects.

A function is called directly, with the JSON that `contract.py` describes, or with an HTTP request
from a function URL or an HTTP API (payload format 2.0), a REST API (1.0) or an Application Load
Balancer, whose headers may come as lists. Standard library only: the zip of the function in front
of an endpoint holds a copy of this file.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from serving.contract import BUSY, JSON, PREFLIGHT, RETRY, check_method, cross_origin
from serving.fetch import RequestError


@dataclass(frozen=True)
class Asked:
    """The request in an event. headers: by their names in lower case."""

    method: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        """Return the body's media type, "" where it is not given."""
        return self.headers.get("content-type", "")

    @property
    def accept(self) -> str:
        """Return the media types that the answer may have, "" for any."""
        return self.headers.get("accept", "")


def read(event: Any) -> Asked:
    """Return the request in an event. Raise RequestError."""
    if not isinstance(event, dict):
        raise RequestError(400, 'the event must be an object like {"url": "https://..."}')
    if not is_http(event):
        return Asked("POST", {"content-type": JSON}, json.dumps(event).encode())
    method = _method(event)
    if method != "OPTIONS":
        check_method(method)
    return Asked(method, _headers(event), _body(event))


def is_http(event: Any) -> bool:
    """Return whether an event is an HTTP request, and not a direct call."""
    return isinstance(event, dict) and "requestContext" in event


def answer(event: Any, request_id: str, status: int, body: str, more: Mapping[str, str]) -> Any:
    """Return an answer in the form that the event's sender expects.

    body: JSON, or JSON Lines where `more` says so. more: further headers.
    """
    headers = {"Content-Type": JSON, "X-Request-Id": request_id, **more}
    if status in BUSY:
        headers |= RETRY
    told: dict[str, Any] = {"statusCode": status}
    if _is_load_balancer(event):
        phrase = HTTPStatus(status).phrase
        told |= {"statusDescription": f"{status} {phrase}", "isBase64Encoded": False}
        if "multiValueHeaders" in event:  # a load balancer that sends lists accepts only lists
            lists = {name: [value] for name, value in headers.items()}
            return told | {"multiValueHeaders": lists, "body": body}
    if not is_http(event):  # API Gateway answers 502 for a field that it does not know
        told["type-result"] = str(type(body))
    return told | {"headers": headers, "body": body}


def preflight(event: Any, request_id: str, origins: str) -> Any:
    """Return the answer to a browser's CORS preflight."""
    return answer(event, request_id, 204, "", {**PREFLIGHT, **allowed(event, origins)})


def allowed(event: Any, origins: str) -> dict[str, str]:
    """Return the headers that let the asking page read the answer. origins: the setting."""
    origin = ""
    if is_http(event):
        origin = _headers(event).get("origin", "")
    return cross_origin(origins, origin)


def _is_load_balancer(event: Any) -> bool:
    if not is_http(event):
        return False
    context = event["requestContext"]
    return isinstance(context, dict) and "elb" in context


def _method(event: dict[str, Any]) -> str:
    context = event["requestContext"]
    method = event.get("httpMethod")
    if isinstance(context, dict) and isinstance(context.get("http"), dict):
        method = context["http"].get("method", method)
    if not isinstance(method, str):
        return "POST"  # a test event has no method
    return method.upper()


def _headers(event: dict[str, Any]) -> dict[str, str]:
    """Return the headers. Where one comes several times, the values are joined (RFC 9110, 5.3)."""
    headers: dict[str, str] = {}
    for field in ("multiValueHeaders", "headers"):
        given = event.get(field)
        if not isinstance(given, dict):
            continue
        for name, value in given.items():
            if isinstance(value, list):
                value = ", ".join(map(str, value))
            if value is not None:
                headers.setdefault(name.lower(), str(value))
    return headers


def _body(event: dict[str, Any]) -> bytes:
    body = event.get("body")
    if body is None:
        return b""
    if not isinstance(body, str):
        raise RequestError(400, "the event's body must be a text")
    try:
        if event.get("isBase64Encoded"):
            return base64.b64decode(body)
        return body.encode()
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, "the body is not the base64 that it claims to be") from error
