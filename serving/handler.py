"""One request, from its body to its answer, the same behind every adapter.

`contract.py` says what a body may be. The answer is JSON with one row per image: its logits in the
order of the package's classes, `[[0.31, -0.45, ...]]`. With the field `"output": "labels"` or
`Accept: application/json; output=labels`, a row is an object:

    {"labels": [{"label": "dog", "probability": 0.93}, ...], "set": ["dog"], "sure": true,
     "unlike": false}

`labels` are the most probable classes, 5 of them or as many as the field `"top"` says. `set` has
the classes among which the right one is for 90 % of all pictures. `unlike` says whether the picture
is unlike everything that the model was trained on. `sure` says that it isn't, and that the set has
one class. A package that was built without calibration answers null for these three. An error is
`{"error": "...", "request_id": "..."}`.
"""

import errno
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any

from serving import contract, fetch, s3
from serving.backends import Scores
from serving.contract import BUSY, RETRY, Form, Query
from serving.decoders import MEMORY, Rooms
from serving.engine import Engine
from serving.fetch import ByteLimit, Refused, RequestError
from serving.package import Package
from serving.work import Abandoned, Work
from trainer.common.errors import UserError
from trainer.images.decode import MAX_PIXELS, ImageError
from trainer.results.prediction import predictions

log = logging.getLogger("packhorse.serving")

FETCH_SECONDS = 10.0  # for one image from a URL or from S3
GONE = 499  # nginx's status for a client that hung up, for our own counters
# Passing shortages of this machine: too many open files, or full memory.
SHORT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


def _setting(default: Any, meaning: str, least: float = 1, most: float = 1 << 40) -> Any:
    return field(default=default, metadata={"help": meaning, "least": least, "most": most})


def _words(default: str, meaning: str, shape: str, allowed: str) -> Any:
    """Return a setting of words, separated by commas. shape: a regular expression for each."""
    return field(default=default, metadata={"help": meaning, "shape": shape, "allowed": allowed})


@dataclass(frozen=True)
class Settings:
    """Settings for answering requests.

    Each is a flag of `python -m serving serve`, and behind every adapter an environment variable,
    such as SERVING_MAX_BODY=1000000.
    """

    max_body: int = _setting(
        16 << 20, "bytes of a request's body, or of a picture that a URL leads to"
    )
    max_fetched: int = _setting(
        64 << 20, "bytes of all pictures that a request fetches; all requests: twice that"
    )
    max_pixels: int = _setting(
        MAX_PIXELS, "of a decoded picture (a JPEG is decoded at a fraction of its size)"
    )
    max_decoded: int = _setting(
        MEMORY, "bytes of memory for all pictures that are decoded at once, 6 to 20 a pixel"
    )
    max_pictures: int = _setting(16, "in one request", most=1024)
    seconds: float = _setting(
        30.0, "for one request; what is not answered by then gets 503", least=0.1, most=86_400
    )
    urls: bool = _setting(True, "fetch pictures from public URLs")
    examples: bool = _setting(
        False,
        "show the package's golden pictures, which are some of yours, on the page; on by default "
        "where only this machine can reach it",
    )
    s3: bool = _setting(False, "fetch pictures from S3, where this machine's role may read them")
    queue: int = _setting(
        64,
        "whole requests in progress or waiting, and as many again that fetch; "
        "those beyond it get 503 and Retry-After",
        most=1024,
    )
    connections: int = _setting(
        1024, "open at once; beyond it, idle ones are closed", least=8, most=65_536
    )
    origins: str = _words(
        "*",
        "sites whose pages may read answers",
        r"\*|https?://[A-Za-z0-9.:\[\]-]+",
        "*, or sites like https://a.example, separated by commas",
    )
    hosts: str = _words(
        "",
        "host names under which it answers, or *; by default localhost, or any where other "
        "machines can reach it",
        r"\*|[A-Za-z0-9.:\[\]_-]+",
        "*, or names like a.example, separated by commas",
    )
    workers: int = _setting(0, "pictures worked on at once; 0: one a core", least=0, most=1024)
    batch: int = _setting(
        1, "most pictures in one run of the network; more than 1 pays on GPUs", most=65_536
    )
    batch_delay: float = _setting(
        0.005, "seconds that a run may wait for its batch to fill", least=0, most=60
    )


def start_engine(package: Package, settings: Settings) -> Engine:
    """Return the engine of an adapter whose host asks for one answer after the other."""
    return Engine(package, Rooms(settings.max_pixels, settings.max_decoded))


def settings_from(environment: Mapping[str, str]) -> Settings:
    """Return the settings from the environment variables SERVING_...

    Raises UserError for a value that is not allowed.
    """
    given: dict[str, Any] = {}
    for setting in fields(Settings):
        name = f"SERVING_{setting.name.upper()}"
        if name in environment:
            given[setting.name] = convert(name, environment[name], setting)
    return Settings(**given)


def convert(name: str, text: str, setting: "Field[Any]") -> bool | int | float | str:
    """Return a setting's value from the text of a flag or a variable. Raises UserError.

    name: of the flag or variable, for the message. setting: its field of Settings.
    """
    kind = type(getattr(Settings, setting.name))
    if kind is str:
        words = [word.strip() for word in text.split(",")]
        if text and not all(re.fullmatch(setting.metadata["shape"], word) for word in words):
            raise UserError(f"{name}={text} is not allowed; allowed: {setting.metadata['allowed']}")
        return text
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
    """A request. content_type, accept: the headers, "" where there is none. id: for the log."""

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
class Scored:
    """The scores of a request's images, and how to write them."""

    scores: Scores
    form: Form
    top: int
    collecting: float  # seconds that it took to get all files


def score(engine: Engine, settings: Settings, request: Request, work: Work) -> Scored:
    """Return the scores of a request's images. Raises any error."""
    began = time.monotonic()
    query = read(request.body, request.content_type, settings)
    form = contract.choose(query, request.accept)
    with collect(query, settings, work) as images:
        collecting = time.monotonic() - began
        return Scored(engine.scores(images, work), form, query.top, collecting)


def answer(
    engine: Engine,
    settings: Settings,
    request: Request,
    work: Work | None = None,
    scorer: Callable[[Engine, Settings, Request, Work], Scored] = score,
) -> Answer:
    """Return the answer to a request. Any error becomes an answer.

    work: of the request, where the caller may abandon it; None: a new one, with a deadline from
    now on. scorer: called in place of `score`.
    """
    work = work or Work(settings.seconds)
    try:
        scored = scorer(engine, settings, request, work)
        form, collecting = scored.form, scored.collecting
        predicting = time.monotonic() - work.began - collecting
        timing = f"collect;dur={1000 * collecting:.1f}, predict;dur={1000 * predicting:.1f}"
        body = write(scored.scores, engine.package, form, scored.top)
        return Answer(200, body, {"Server-Timing": timing, "Content-Type": form.content_type})
    except Exception as error:
        return failure(error, request.id)


def failure(error: Exception, request_id: str) -> Answer:
    """Return the answer to a failed request. It tells the caller's mistakes; ours are logged."""
    status, message, headers = 400, str(error), {}
    if isinstance(error, RequestError):
        status = error.status
        headers = dict(error.headers)
    elif isinstance(error, ImageError):
        message = f"the picture can't be read: {error}"
    elif isinstance(error, TimeoutError):
        status, message = 503, "too busy to answer in time; try again"
    elif isinstance(error, Abandoned):
        status, message = GONE, "the client hung up"
    elif isinstance(error, MemoryError) or getattr(error, "errno", None) in SHORT_OF:
        log.error("%s: this machine is short of memory or open files: %s", request_id, error)
        status, message = 503, "too much at once for this machine; try again"
    else:
        log.error("%s: a bug in this server", request_id, exc_info=error)
        status = 500
        message = "a fault of this server; its log has more under this request_id"
    if isinstance(error, Refused):
        log.warning("%s: refused to fetch: %s", request_id, error.reason)
    if status in BUSY:
        headers |= RETRY
    body = json.dumps({"error": message, "request_id": request_id})
    return Answer(status, body.encode(), headers)


def new_id(given: str = "") -> str:
    """Return a request's id: the caller's own, where it is safe in a log, else a new one."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given) and given.strip("-_"):
        return given
    return uuid.uuid4().hex


def read(body: bytes | bytearray | str, content_type: str, settings: Settings) -> Query:
    """Return what a body asks for. Raises RequestError."""
    if len(body) > settings.max_body:
        raise RequestError(413, f"the body has {len(body):,} bytes; allowed: {settings.max_body:,}")
    query = contract.read(body, content_type, settings.max_pictures)
    if isinstance(body, bytearray):
        body.clear()  # the pictures are copied from it: free its memory
    return query


class _Reservation(ByteLimit):
    """The bytes of one request's fetched images, counted until `close`.

    All requests together may hold twice the limit of one. Ends a fetch that nobody wants any more.
    """

    _lock = threading.Lock()
    _held = 0  # bytes, by all requests

    def __init__(self, limit: int, work: Work) -> None:
        super().__init__(limit)
        self._work = work

    def __call__(self, size: int) -> None:
        self._work.left()
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
def collect(query: Query, settings: Settings, work: Work) -> Iterator[list[bytes]]:
    """Yield the images' files, which count as held until the block ends.

    Raises RequestError, TimeoutError at the deadline, and Abandoned.
    """
    with closing(_Reservation(settings.max_fetched, work)) as reservation:
        if not any(kind in contract.ELSEWHERE for kind, _ in query.sources):
            files = [_collect(source, settings, work, reservation) for source in query.sources]
        else:
            with work.fetching():
                files = [_collect(source, settings, work, reservation) for source in query.sources]
        yield files


def _collect(source: tuple[str, Any], settings: Settings, work: Work, reserve: ByteLimit) -> bytes:
    kind, value = source
    if kind == "file":
        data: bytes = value
        return data
    if kind == "base64":
        return contract.decode_base64(value)
    if not {"url": settings.urls, "s3": settings.s3}[kind]:
        raise RequestError(
            400, f'this server does not fetch pictures by "{kind}"; send the picture\'s bytes'
        )
    seconds = min(FETCH_SECONDS, work.left())
    if kind == "s3":
        return s3.fetch(value, max_bytes=settings.max_body, deadline=seconds, reserve=reserve)
    return fetch.fetch(value, max_bytes=settings.max_body, deadline=seconds, reserve=reserve)


def write(scores: Scores, package: Package, form: Form, top: int = contract.TOP) -> bytes:
    """Return the body of an answer about N images.

    top: how many of each image's classes an answer with labels has.
    """
    rows: Sequence[Any] = scores.logits.tolist()
    if form.output == "labels":
        rows = _labels(scores, package, top)
    if form.lines:
        return contract.as_lines(rows).encode()
    return json.dumps(rows, allow_nan=False).encode()


def _labels(scores: Scores, package: Package, top: int) -> list[dict[str, Any]]:
    """Return the most probable classes of each image, and how sure they are."""
    told = predictions(package.calibration, package.classes, scores.logits, scores.distance)
    return [
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
