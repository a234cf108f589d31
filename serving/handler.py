"""One request, from its body to its answer, the same behind every adapter.

The body is an image's file (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, and HEIC where pillow-heif is
installed: its first bytes tell, not its content type), or JSON:

    {"url": "https://..."}  or  {"base64": "..."}  or  {"s3": "s3://bucket/key"}      one image
    {"instances": [{"url": "https://..."}, {"base64": "..."}, ...]}                   several

The answer is JSON with one row an image: its logits in the order of the package's classes,
`[[0.31, -0.45, ...]]`. Asked with the field `"output": "labels"` or
`Accept: application/json; output=labels`, a row is an object:

    {"labels": [{"label": "dog", "probability": 0.93}, ...], "set": ["dog"], "sure": true,
     "unlike": false}

`labels` are the most probable classes, 5 of them or as many as the field `"top"` says; `set` are
those of which one is right in 90 % of all pictures; `unlike` says whether the picture is unlike
anything that was trained on, and `sure` that it isn't and the set has one class. A package that was
built without calibration answers null in the place of these three. What went wrong is
`{"error": "...", "request_id": "..."}`.
"""

import base64
import binascii
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import Field, dataclass, field, fields
from email.message import Message
from typing import Any

from serving import fetch, s3
from serving.backends import Scores
from serving.engine import Engine
from serving.fetch import ByteLimit, Refused, RequestError
from serving.package import Package
from trainer.common.errors import UserError
from trainer.images.decode import BYTES_A_PIXEL, MAX_PIXELS, ImageError
from trainer.results.prediction import predictions

log = logging.getLogger("packhorse.serving")

FETCH_SECONDS = 10.0  # for one image from a URL or from S3
RETRY_SECONDS = 1
TOP = 5
KINDS = ("url", "base64", "s3")
FILE_TYPES = (
    "application/octet-stream",
    "application/x-image",
    "application/x-www-form-urlencoded",  # what curl says of any file
)


def _setting(default: Any, meaning: str, least: float = 1, most: float = 1 << 40) -> Any:
    return field(default=default, metadata={"help": meaning, "least": least, "most": most})


@dataclass(frozen=True)
class Settings:
    """How requests are answered.

    Each is a flag of `python -m serving serve`, and behind every adapter a variable, such as
    SERVING_MAX_BODY=1000000.
    """

    max_body: int = _setting(
        16 << 20, "bytes of a request's body, or of a picture that a URL leads to"
    )
    max_fetched: int = _setting(
        64 << 20, "bytes of all pictures that a request fetches; all requests: twice that"
    )
    max_pixels: int = _setting(
        MAX_PIXELS,
        "decoded at once, of all pictures together (a JPEG is decoded at a fraction of its size): "
        f"a bound on memory, of {BYTES_A_PIXEL} bytes each",
    )
    max_pictures: int = _setting(16, "in one request")
    seconds: float = _setting(
        30.0, "for one request; what is not answered by then gets 503", least=0.1, most=86_400
    )
    urls: bool = _setting(True, "fetch pictures from public URLs")
    s3: bool = _setting(False, "fetch pictures from S3, where this machine's role may read them")
    queue: int = _setting(
        64, "requests in progress or waiting; those beyond it get 503 and Retry-After"
    )
    workers: int = _setting(0, "pictures worked on at once; 0: one a core", least=0, most=1024)
    batch: int = _setting(
        1, "most pictures in one run of the network; more than 1 pays on GPUs", most=65_536
    )
    batch_delay: float = _setting(
        0.005, "seconds that a run may wait for its batch to fill", least=0, most=60
    )


def settings_from(environment: Mapping[str, str]) -> Settings:
    """Return the settings of the variables SERVING_...

    Raises UserError for a variable whose value does not fit.
    """
    given: dict[str, Any] = {}
    for setting in fields(Settings):
        name = f"SERVING_{setting.name.upper()}"
        if name in environment:
            given[setting.name] = convert(name, environment[name], setting)
    return Settings(**given)


def convert(name: str, text: str, setting: "Field[Any]") -> bool | int | float:
    """Return a setting's value, from the text of a flag or a variable. Raises UserError.

    name: what the user calls the setting. setting: its field of Settings.
    """
    kind = type(getattr(Settings, setting.name))
    if kind is bool:
        if text.lower() not in ("on", "off"):
            raise UserError(f"{name}={text} is not allowed; allowed: on or off")
        return text.lower() == "on"
    least, most = setting.metadata["least"], setting.metadata["most"]
    numbers = {int: "a whole number", float: "a number"}[kind]
    allowed = f"{numbers} from {least:g} to {most:.15g}"
    try:
        value: float = kind(text)
    except ValueError as error:
        raise UserError(f"{name}={text} is not allowed; allowed: {allowed}") from error
    if not least <= value <= most:
        raise UserError(f"{name}={text} is not allowed; allowed: {allowed}")
    return value


@dataclass(frozen=True)
class Request:
    """What came. content_type, accept: the headers, "" where there is none. id: for the log."""

    body: bytes | bytearray | str
    content_type: str
    accept: str
    id: str


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes  # JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What a request's body asks for."""

    # ("file", bytes), or one of KINDS with what the body holds for it
    sources: Sequence[tuple[str, Any]]
    output: str | None = None  # "logits" or "labels"
    top: int = TOP


def answer(engine: Engine, settings: Settings, request: Request) -> Answer:
    """Return the answer to a request, whatever goes wrong."""
    began = time.monotonic()
    end = began + settings.seconds
    try:
        query = read(request.body, request.content_type, settings)
        output = choose(query, request.accept)
        with collect(query, settings, end) as images:
            collected = time.monotonic()
            scores = engine.scores(images, end)
        predicted = time.monotonic()
        timing = (
            f"collect;dur={1000 * (collected - began):.1f}, "
            f"predict;dur={1000 * (predicted - collected):.1f}"
        )
        body = write(scores, engine.package, output, query.top)
        return Answer(200, body, {"Server-Timing": timing})
    except Exception as error:
        return failure(error, request.id)


def failure(error: Exception, request_id: str) -> Answer:
    """Return the answer to a request that failed, with its faults told and ours logged."""
    status, message, headers = 400, str(error), {}
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, ImageError):
        message = f"the picture can't be read: {error}"
    elif isinstance(error, TimeoutError):
        status, message = 503, "too busy to answer in time; try again"
    else:
        log.error("%s: a fault of ours", request_id, exc_info=error)
        status = 500
        message = "a fault of this server; its log has more under this request_id"
    if isinstance(error, Refused):
        log.warning("%s: refused to fetch: %s", request_id, error.reason)
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    body = json.dumps({"error": message, "request_id": request_id})
    return Answer(status, body.encode(), headers)


def new_id(given: str = "") -> str:
    """Return a request's id: the caller's own, where it is harmless in a log."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given) and given.strip("-_"):
        return given
    return uuid.uuid4().hex


def read(body: bytes | bytearray | str, content_type: str, settings: Settings) -> Query:
    """Return what a body asks for. Raises RequestError."""
    kind = _media_type(content_type).get_content_type()
    if len(body) > settings.max_body:
        raise RequestError(413, f"the body has {len(body):,} bytes; allowed: {settings.max_body:,}")
    if kind == "application/json" or kind.endswith("+json"):
        return _read_json(body, settings)
    if not content_type or kind.startswith("image/") or kind in FILE_TYPES:
        return Query([("file", body)])
    raise RequestError(
        415,
        f"the content type {kind!r} is not supported; allowed: application/json, "
        "or image/* with the bytes of one picture",
    )


def _read_json(body: bytes | bytearray | str, settings: Settings) -> Query:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not JSON, though its content type says so") from error
    if not isinstance(asked, dict):
        raise RequestError(400, 'the JSON must be an object like {"url": "https://..."}')
    output, top = asked.pop("output", None), asked.pop("top", TOP)
    if output not in (None, "logits", "labels"):
        raise RequestError(400, '"output" must be "logits" or "labels"')
    if type(top) is not int or top < 1:
        raise RequestError(400, '"top" must be a whole number from 1')
    instances = [asked]
    if asked.keys() == {"instances"}:
        instances = asked["instances"]
    if not isinstance(instances, list) or not 1 <= len(instances) <= settings.max_pictures:
        raise RequestError(
            400, f'"instances" must be a list of 1 to {settings.max_pictures} objects'
        )
    return Query([_source(instance) for instance in instances], output, top)


def _source(instance: Any) -> tuple[str, Any]:
    if isinstance(instance, dict) and len(instance) == 1:
        [(kind, value)] = instance.items()
        if kind in KINDS and isinstance(value, str):
            return kind, value
    raise RequestError(400, f"a picture is an object with one text of: {', '.join(KINDS)}")


def choose(query: Query, accept: str) -> str:
    """Return the output's kind, "logits" or "labels". Raises RequestError."""
    for offer in filter(None, map(str.strip, accept.split(","))):
        media_type = _media_type(offer)
        if media_type.get_content_type() in ("application/json", "application/*", "*/*"):
            output = query.output or media_type.get_param("output", "logits")
            if output in ("logits", "labels"):
                return str(output)
    if accept.strip():
        raise RequestError(
            406, "only application/json can be given, with output=logits or output=labels"
        )
    return query.output or "logits"


def _media_type(text: str) -> Message:
    """Return a header like `application/json; output=labels`, taken apart."""
    message = Message()
    message["Content-Type"] = text
    return message


class _Reservation(ByteLimit):
    """The bytes of one request's fetched images, held by this process until it is closed.

    All requests together may hold twice the limit of one.
    """

    _lock = threading.Lock()
    _held = 0  # bytes, by all requests

    def __call__(self, size: int) -> None:
        super().__call__(size)
        with self._lock:
            if self._held + size > 2 * self.limit:
                self.taken -= size
                raise RequestError(503, "too many pictures are being fetched; try again")
            _Reservation._held += size

    def close(self) -> None:
        with self._lock:
            _Reservation._held -= self.taken


@contextmanager
def collect(query: Query, settings: Settings, end: float) -> Iterator[list[bytes]]:
    """Give the images' files, which count as held until the block ends.

    Raises RequestError, and TimeoutError after `end` (on time.monotonic()).
    """
    with closing(_Reservation(settings.max_fetched)) as reservation:
        yield [_collect(source, settings, end, reservation) for source in query.sources]


def _collect(source: tuple[str, Any], settings: Settings, end: float, reserve: ByteLimit) -> bytes:
    kind, value = source
    if kind == "file":
        return bytes(value)
    if kind == "base64":
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(400, '"base64" does not hold base64') from error
    if not {"url": settings.urls, "s3": settings.s3}[kind]:
        raise RequestError(
            400, f'this server does not fetch pictures by "{kind}"; send the picture\'s bytes'
        )
    if kind == "s3":
        return s3.fetch(value, max_bytes=settings.max_body, reserve=reserve)
    seconds = min(FETCH_SECONDS, end - time.monotonic())
    return fetch.fetch(value, max_bytes=settings.max_body, deadline=seconds, reserve=reserve)


def write(scores: Scores, package: Package, output: str, top: int = TOP) -> bytes:
    """Return what the package's network says of N images as JSON.

    output: "logits", or "labels": `top` of each image's classes, and how sure they are.
    """
    if output == "logits":
        return json.dumps(scores.logits.tolist(), allow_nan=False).encode()
    told = predictions(package.calibration, package.classes, scores.logits, scores.distance)
    rows = [
        {
            "labels": [
                {"label": label, "probability": probability}
                for label, probability in zip(
                    each.labels[:top], each.probabilities[:top], strict=True
                )
            ],
            "set": each.members,
            "sure": each.sure,
            "unlike": each.unlike,
        }
        for each in told
    ]
    return json.dumps(rows, allow_nan=False).encode()
