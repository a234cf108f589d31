"""The format of requests and answers, the same behind every adapter.

docs/serving.md has the table. The body is an image's file, JSON, JSON Lines or a multipart form.
Where the content type doesn't tell which, the first bytes do. Standard library only: the Lambda
function's zip holds a copy of this file.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from typing import Any

from serving.fetch import RequestError

TOP = 5
KINDS = ("url", "base64", "s3")
ELSEWHERE = ("url", "s3")  # kinds of which the picture is on another machine
FAR = re.compile(rf'"({"|".join(ELSEWHERE)})"\s*:\s*"(?!(?i:data:))'.encode())
OUTPUTS = ("logits", "labels")
JSON, LINES = "application/json", "application/jsonlines"
# With these content types, the body is an image's file unless it begins as JSON does. Browsers send
# text/plain for any text, and curl the form's type for anything.
UNSAID = {
    "",
    "text/plain",
    "application/octet-stream",
    "application/x-image",
    "application/x-www-form-urlencoded",
}
LINE_TYPES = {
    LINES,
    "application/x-jsonlines",
    "application/jsonl",
    "application/ndjson",
    "application/x-ndjson",
}
# Python needs up to 70 bytes for a value of one or two characters ("[],[],"), so a body of 16 MB
# could take a gigabyte. A request about pictures has only a few values.
MAX_VALUES = 16_384
MAX_PARTS = 64  # of a form
MAX_PART_HEAD = 8_192  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
WHITE = b" \t\r\n\f\v"
ONE_PICTURE = f"a picture is an object with one text of: {', '.join(KINDS)}"
BUSY = {429, 503}
RETRY_SECONDS = "1"
RETRY = {"Retry-After": RETRY_SECONDS}


@dataclass(frozen=True)
class Query:
    """What a request's body asks for."""

    # ("file", bytes), or one of KINDS with its value in the body
    sources: Sequence[tuple[str, Any]]
    output: str | None = None  # "logits" or "labels"
    top: int = TOP
    lines: bool = False  # whether the body was JSON Lines


@dataclass(frozen=True)
class Form:
    """How an answer is written."""

    output: str  # "logits" or "labels"
    lines: bool  # one row per line, instead of a list of rows

    @property
    def content_type(self) -> str:
        """Return the answer's media type."""
        if self.lines:
            return LINES
        return JSON


def read(body: bytes | bytearray | str, content_type: str, max_pictures: int) -> Query:
    """Return what a body asks for. Raises RequestError.

    body: bytes; or a text, where a toolkit has decoded it.
    """
    data = _bytes(body)
    media_type = _media_type(content_type)
    kind = media_type.get_content_type()
    if not content_type.strip():
        kind = ""
    if not data:
        raise RequestError(
            400,
            'the file is empty; send a picture\'s bytes, or JSON like {"url": "https://..."}',
        )
    if kind == "multipart/form-data":
        return _read_form(data, media_type, max_pictures)
    if kind in LINE_TYPES:
        return _read_lines(data, max_pictures)
    if kind == JSON or kind.endswith("+json"):
        return _query(_object(data), max_pictures)
    if kind not in UNSAID and not kind.startswith("image/"):
        raise RequestError(
            415,
            f"the content type {kind!r} is not supported; allowed: application/json, "
            "application/jsonlines, multipart/form-data, or image/* with the bytes of one picture",
        )
    if data[:64].removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"{":  # no image's file begins so
        return _query(_object(data), max_pictures)
    return Query([("file", data)])


def choose(query: Query, accept: str) -> Form:
    """Return how to write the answer. Raises RequestError.

    accept: the header, "" where there is none. The body's field `output` overrides it.
    """
    for offer in filter(None, map(str.strip, accept.split(","))):
        media_type = _media_type(offer)
        kind = media_type.get_content_type()
        if kind not in (JSON, "application/*", "*/*", *LINE_TYPES):
            continue
        output = query.output or media_type.get_param("output", "logits")
        if output in OUTPUTS:
            return Form(str(output), kind in LINE_TYPES or (query.lines and kind != JSON))
    if accept.strip():
        raise RequestError(
            406,
            "only application/json and application/jsonlines can be given, "
            "with output=logits or output=labels",
        )
    return Form(query.output or "logits", query.lines)


def decode_base64(text: str) -> bytes:
    """Return the bytes that base64 encodes. Raises RequestError.

    The text may be a data: URL, have white space, the URL-safe characters - and _, and no padding.
    """
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise RequestError(400, "a data: URL must hold base64: data:image/jpeg;base64,...")
    try:
        packed = text.encode("ascii").translate(FROM_URL_SAFE, WHITE).rstrip(b"=")
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, '"base64" does not hold base64') from error


def as_lines(rows: Sequence[Any]) -> str:
    """Return an answer's rows as JSON Lines."""
    return "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)


def rows_of(text: str, pictures: int, output: str) -> list[Any]:
    """Return the rows of an answer about so many pictures. Raises ValueError for anything else.

    A row of logits is a list of finite numbers; one of labels is an object with `labels`.
    """
    rows = json.loads(text)
    if not isinstance(rows, list) or len(rows) != pictures:
        raise ValueError(f"not a list of {pictures} rows")
    is_row = {"logits": _is_logits, "labels": _is_labels}[output]
    if not all(map(is_row, rows)):
        raise ValueError(f"a row holds no {output}")
    return rows


def cross_origin(origins: str, origin: str) -> dict[str, str]:
    """Return the headers of an answer that let pages of other sites read it.

    origins: sites whose pages may, separated by commas; "*": all. origin: of the page that asks.
    """
    allowed = [each.strip().rstrip("/") for each in origins.split(",")]
    exposed = {"Access-Control-Expose-Headers": "X-Request-Id, Retry-After, Server-Timing"}
    if "*" in allowed:
        return {"Access-Control-Allow-Origin": "*", **exposed}
    if origin and origin in allowed:
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **exposed}
    return {"Vary": "Origin"}


# The answer to a browser's CORS preflight, which it sends before any request that is not a plain
# form. "*" covers all headers but Authorization.
PREFLIGHT: Mapping[str, str] = {
    "Access-Control-Allow-Methods": "POST, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization, Content-Type",
    "Access-Control-Max-Age": "7200",
}


def check_method(method: str) -> None:
    """Raise RequestError for any method but POST."""
    if method != "POST":
        raise RequestError(405, "ask for a prediction by POST", {"Allow": "POST, OPTIONS"})


def _bytes(body: bytes | bytearray | str) -> bytes:
    if not isinstance(body, str):
        return bytes(body)
    try:
        return body.encode()
    except UnicodeEncodeError as error:
        raise RequestError(400, "the body is not valid UTF-8") from error


def _media_type(text: str) -> Message:
    """Return a header like `application/json; output=labels`, parsed."""
    message = Message()
    message["Content-Type"] = text.encode("ascii", "replace").decode()
    return message


def _object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a body or in a line of one. Raises RequestError."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError(400, f"the JSON has more than {MAX_VALUES:,} values")
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not JSON, though it begins or is named so") from error
    if not isinstance(asked, dict):
        raise RequestError(400, 'the JSON must be an object like {"url": "https://..."}')
    return asked


def _query(asked: Mapping[str, Any], max_pictures: int) -> Query:
    """Return what an object asks for. Unknown keys are ignored."""
    instances: Any = [asked]
    if asked.get("instances") is not None:
        instances = asked["instances"]
        if _named(asked):
            raise RequestError(400, f'either "instances" or one picture; {ONE_PICTURE}')
    if not isinstance(instances, list) or not 1 <= len(instances) <= max_pictures:
        raise RequestError(400, f'"instances" must be a list of 1 to {max_pictures} objects')
    output, top = _choices(asked)
    return Query([_source(instance) for instance in instances], output, top)


def _choices(asked: Mapping[str, Any]) -> tuple[str | None, int]:
    """Return the fields `output` and `top`. Raises RequestError."""
    output, top = asked.get("output"), asked.get("top")
    if top is None:
        top = TOP
    if output not in (None, *OUTPUTS):
        raise RequestError(400, '"output" must be "logits" or "labels"')
    if type(top) is not int or top < 1:
        raise RequestError(400, '"top" must be a whole number from 1')
    return output, top


def _named(instance: Mapping[str, Any]) -> list[str]:
    """Return the kinds of source that an object names. Many clients write null for none."""
    return [kind for kind in KINDS if instance.get(kind) is not None]


def _source(instance: Any) -> tuple[str, Any]:
    if not isinstance(instance, dict):
        raise RequestError(400, ONE_PICTURE)
    named = _named(instance)
    if len(named) != 1 or not isinstance(instance[named[0]], str):
        raise RequestError(400, ONE_PICTURE)
    return _of_kind(named[0], instance[named[0]])


def seems_far(body: bytes) -> bool:
    """Return whether an object in a body seems to name a picture on another machine.

    The body isn't parsed, so this may miss one (whose key is written with escapes, or in a form).
    """
    return FAR.search(body) is not None


def _of_kind(kind: str, value: str) -> tuple[str, str]:
    if kind == "url" and value[:5].lower() == "data:":
        return "base64", value
    return kind, value


def _read_lines(data: bytes, max_pictures: int) -> Query:
    """Return what JSON Lines ask for: an object per picture, `output` and `top` in the first."""
    lines = [line for line in data.split(b"\n", max_pictures + 1) if line.strip()]
    if not 1 <= len(lines) <= max_pictures:
        raise RequestError(
            400,
            f"JSON Lines must be 1 to {max_pictures} objects a request; in a batch transform, "
            "Strategy=SingleRecord sends one",
        )
    objects = [_object(line) for line in lines]
    output, top = _choices(objects[0])
    return Query([_source(each) for each in objects], output, top, lines=True)


def _read_form(data: bytes, media_type: Message, max_pictures: int) -> Query:
    """Return what a multipart form asks for (RFC 7578): files, and fields as in JSON."""
    sources: list[tuple[str, Any]] = []
    fields: dict[str, Any] = {}
    for head, value in _parts(data, media_type.get_param("boundary")):
        name = head.get_param("name", header="content-disposition")
        is_file = head.get_filename() is not None or head.get_content_maintype() in (
            "image",
            "application",
        )
        if is_file:
            if value or head.get_filename():  # a browser sends "" where no file was chosen
                sources.append(("file", value))
        elif name in KINDS:
            sources.append(_of_kind(str(name), _text(value)))
        elif name == "output":
            fields["output"] = _text(value)
        elif name == "top":
            fields["top"] = _number(_text(value))
    if not 1 <= len(sources) <= max_pictures:
        raise RequestError(400, f"the form must have 1 to {max_pictures} pictures")
    output, top = _choices(fields)
    return Query(sources, output, top)


def _parts(data: bytes, boundary: Any) -> list[tuple[Message, bytes]]:
    """Return the head and content of each part of a form. Raises RequestError."""
    broken = RequestError(400, "the multipart form is not whole, or its boundary is missing")
    if not isinstance(boundary, str) or not boundary.isascii() or not boundary:
        raise broken
    mark = b"\r\n--" + boundary.encode()
    _, *pieces = (b"\r\n" + data).split(mark, MAX_PARTS + 1)
    parts: list[tuple[Message, bytes]] = []
    for piece in pieces:
        if piece.startswith(b"--"):
            return parts
        if len(parts) == MAX_PARTS:
            raise RequestError(400, f"the form has more than {MAX_PARTS} parts")
        begin = piece.find(b"\r\n")
        end = piece.find(b"\r\n\r\n", max(begin, 0), MAX_PART_HEAD)
        if begin < 0 or end < 0:
            raise broken
        head = piece[begin + 2 : max(end, begin + 2)].decode("utf-8", "replace")
        parts.append((HeaderParser().parsestr(head), piece[end + 4 :]))
    raise broken


def _text(value: bytes) -> str:
    try:
        return value.decode().strip()
    except UnicodeDecodeError as error:
        raise RequestError(400, "a field of the form is no text") from error


def _number(text: str) -> Any:
    """Return a whole number, or the text, which the caller then refuses."""
    if text.isdecimal() and len(text) < 10:
        return int(text)
    return text


def _is_logits(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(map(_is_finite, row))


def _is_labels(row: Any) -> bool:
    labels = row.get("labels") if isinstance(row, dict) else None
    return isinstance(labels, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("label"), str)
        and _is_finite(each.get("probability"))
        for each in labels
    )


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
