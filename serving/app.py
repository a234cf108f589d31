"""The application behind our own server: what each path answers, and limits on open requests.

/invocations and /ping are as SageMaker requires them, /metrics is for Prometheus, and / is a page
to try the model.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving import page
from serving.connections import Connections
from serving.contract import PREFLIGHT, RETRY, cross_origin, seems_far
from serving.engine import Engine
from serving.fetch import RequestError
from serving.handler import (
    Answer,
    Request,
    Scored,
    Settings,
    answer,
    failure,
    new_id,
    score,
)
from serving.names import without_port
from serving.package import Package
from serving.work import Heavy, Work
from serving.worker import Prepared, Worker

log = logging.getLogger("packhorse.serving")

BODY_SECONDS = 20.0  # for a request's body
LIGHT = 1 << 19  # bytes; a larger body is parsed in the worker's process
GIVE_WAY_SECONDS = 0.003  # between two pieces of large bodies, while a small request is answered
BODIES = 64 << 20  # bytes of all bodies together that the queue may hold in memory
# Turns of the event loop after which asyncio reports a client that hung up right after its request:
# one to read the end, one to close, one to wake the waiting task. Then no work begins for it.
TURNS = 3
GET = {"/", "/card", "/metrics", "/ping"}
NO_HEADERS: Mapping[str, str] = {}

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Scorer = Callable[[Engine, Settings, Request, Work], Scored]

REQUESTS = Counter("packhorse_requests", "Requests to /invocations, by status.", ["status"])
SECONDS = Histogram(
    "packhorse_request_seconds",
    "From head to answer.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
BATCHES = Histogram(
    "packhorse_batch_size", "Pictures in a run of the network.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
IN_PROGRESS = Gauge("packhorse_requests_in_progress", "Requests whose head has come.")


class Slots:
    """Limits the complete requests in progress: so many here, and as many aside.

    Safe from any thread. Requests that take long or wait for other machines are aside, in the
    worker's process, so that they don't hold up requests with small pictures.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._working = self._aside = 0
        self._lock = threading.Lock()

    def are_taken(self) -> bool:
        """Return whether a request is in progress here."""
        return self._working > 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold a slot here. Raise RequestError where none is free."""
        with self._lock:
            if self._working >= self._most:
                raise RequestError(503, "too many requests are waiting; try again")
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hold a slot aside instead of the one here. Raise as `working`."""
        with self._lock:
            if self._aside >= self._most:
                message = "too many requests fetch pictures, or bring large ones; try again"
                raise RequestError(503, message)
            self._aside += 1
            self._working -= 1
        try:
            yield
        finally:
            with self._lock:
                self._aside -= 1
                self._working += 1


class _Work(Work):
    """The work of a request in this process, which fetches nothing: that is the worker's."""

    @contextmanager
    def fetching(self) -> Iterator[None]:
        raise Heavy
        yield


class App:
    """The ASGI application."""

    def __init__(
        self, package: Package, engine: Engine, settings: Settings, hosts: frozenset[str]
    ) -> None:
        """hosts: names under which it answers; empty: any."""
        self.connections = Connections(settings.connections)
        self._engine, self._settings, self._hosts = engine, settings, hosts
        self._slots = Slots(settings.queue)
        self._worker = Worker(package.preprocessing, settings)
        self._held = 0  # bytes of all bodies
        self._coming: dict[_Body, None] = {}  # incomplete bodies, the oldest first
        self._turn = asyncio.Lock()  # lets one large body be read at a time
        # A thread for every request in the queue, and for those that come back from aside.
        self._threads = _started(2 * settings.queue)
        self._page = page.read()
        self._page_headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": page.policy(self._page),
        }
        self._card = json.dumps(page.card(package, settings)).encode()
        offered = page.examples(package, settings)
        self._examples = {f"/{address}": example for address, example in offered.items()}
        engine.observe = BATCHES.observe

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        method, path = scope["method"], scope["path"]
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._check_host(headers.get("host", ""), path)
            match method, path:
                case "POST", "/invocations":
                    await self._invoke(headers, receive, send)
                case "OPTIONS", "/invocations":
                    allowed = cross_origin(self._settings.origins, headers.get("origin", ""))
                    await self._send(send, 204, b"", {**PREFLIGHT, **allowed})
                case "GET" | "HEAD", _ if path in GET or path in self._examples:
                    await self._get(path, send)
                case _, "/invocations":
                    message = "ask for a prediction by POST"
                    raise RequestError(405, message, {"Allow": "POST, OPTIONS"})
                case _ if path in GET:
                    message = f"{path} is read by GET; POST is for /invocations"
                    raise RequestError(405, message, {"Allow": "GET, HEAD"})
                case _:
                    raise RequestError(404, "there is no such page")
        except RequestError as error:
            request_id = new_id()
            await self._answer(send, failure(error, request_id), request_id)

    def _check_host(self, host: str, path: str) -> None:
        """Raise RequestError for a name that is not ours.

        Any site may let its own name point to this server (DNS rebinding); a browser would then
        treat the site's pages as ours. /ping takes any name: load balancers ask by address.
        """
        if self._hosts and path != "/ping" and without_port(host) not in self._hosts:
            raise RequestError(
                421,
                "this server has another name; allow yours: python -m serving serve --hosts NAME",
            )

    async def _get(self, path: str, send: Send) -> None:
        if path == "/":
            await self._send(send, 200, self._page, self._page_headers)
        elif path == "/card":
            await self._send(send, 200, self._card)
        elif path in self._examples:
            content_type, data = self._examples[path]
            await self._send(send, 200, data, {"Content-Type": content_type})
        elif path == "/metrics":
            kind = {"Content-Type": CONTENT_TYPE_LATEST}
            await self._send(send, 200, generate_latest(REGISTRY), kind)
        elif self.connections.draining:
            await self._send(send, 503, b'{"status": "draining"}', RETRY)
        elif self._engine.hangs(self._settings.seconds):
            await self._send(send, 503, b'{"status": "every decoder hangs"}', RETRY)
        else:
            await self._send(send, 200, b'{"status": "healthy"}')

    async def _invoke(self, headers: dict[str, str], receive: Receive, send: Send) -> None:
        began = time.monotonic()
        request_id = new_id(headers.get("x-request-id", ""))
        body = _Body()
        IN_PROGRESS.inc()
        size = 0
        try:
            await self._read(receive, headers, body)
            size = body.size
            content_type, accept = headers.get("content-type", ""), headers.get("accept", "")
            request = Request(b"", content_type, accept, request_id)
            with self._slots.working():
                result = await self._work(request, body, receive)
        except _Gone:
            return
        except Exception as error:
            result = failure(error, request_id)
        finally:
            self._held -= body.counted
            IN_PROGRESS.dec()
        seconds = time.monotonic() - began
        REQUESTS.labels(result.status).inc()
        SECONDS.observe(seconds)
        log.info("%s %d %.0f ms %d bytes", request_id, result.status, 1000 * seconds, size)
        await self._answer(send, result, request_id, headers.get("origin", ""))

    async def _work(self, request: Request, body: "_Body", receive: Receive) -> Answer:
        """Return the answer to a complete request. When its client hangs up, the work is abandoned.

        request: without its body.
        """
        work = _Work(self._settings.seconds)
        gone = asyncio.ensure_future(receive())  # after a complete body comes the client's end
        gone.add_done_callback(lambda _: work.abandon())
        try:
            for _ in range(TURNS):
                await asyncio.sleep(0)
                if gone.done():
                    raise _Gone
            if body.size <= LIGHT:
                whole = b"".join(body.chunks)
                # The worker fetches. Who finds that out in a thread here has parsed the body in
                # vain: 64 at once kept Python's lock from the others for 15 to 30 ms.
                if not seems_far(whole):
                    with suppress(Heavy):
                        return await self._in_thread(replace(request, body=whole), work, score)
            with self._slots.aside():
                prepared = await self._worker.prepare(request, body.chunks, work)
            if isinstance(prepared, Answer):
                return prepared
            return await self._in_thread(request, work, partial(_score_prepared, prepared))
        finally:
            gone.cancel()

    async def _in_thread(self, request: Request, work: Work, scorer: Scorer) -> Answer:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, answer, self._engine, self._settings, request, work, scorer
        )

    async def _read(self, receive: Receive, headers: dict[str, str], body: "_Body") -> None:
        """Read the request's body into `body`.

        Raises RequestError where it is too large, too slow or too much for now, and _Gone.
        """
        allowed = self._settings.max_body
        length = int(headers.get("content-length", "0"))
        if length > allowed:
            raise RequestError(413, f"the body has {length:,} bytes; allowed: {allowed:,}")
        self._coming[body] = None
        try:
            async with asyncio.timeout(BODY_SECONDS) as body.deadline:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    if chunk:
                        body.chunks.append(chunk)
                    body.size += len(chunk)
                    body.counted += len(chunk)
                    self._held += len(chunk)
                    if body.size > allowed:
                        raise RequestError(
                            413, f"the body has more than the allowed {allowed:,} bytes"
                        )
                    self._make_room(body)
                    if more and max(length, body.size) > LIGHT:
                        await self._wait_for_turn()
        except TimeoutError as error:
            if body.given_up:
                raise RequestError(503, TOO_LARGE) from error
            raise RequestError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
        finally:
            del self._coming[body]

    async def _wait_for_turn(self) -> None:
        """Let only one large body be read in each turn of the event loop, after small requests.

        A piece of 256 KB takes half a millisecond. Meanwhile nothing else has the event loop, and
        hardly anything Python's lock. A small request needs both several times: it took 10 to 22 ms
        beside a body of 16 MB. One may also be about to come, on a new connection.
        """
        async with self._turn:
            small = self._slots.are_taken() or self.connections.has_come_within(GIVE_WAY_SECONDS)
            await asyncio.sleep(GIVE_WAY_SECONDS if small else 0)

    def _make_room(self, body: "_Body") -> None:
        """Give up bodies where all together are too large, the oldest first."""
        for other in self._coming:
            if self._held <= BODIES:
                return
            if other is not body and not other.given_up and other.counted:
                other.give_up()
                self._held -= other.counted
                other.counted = 0
        if self._held > BODIES:
            raise RequestError(503, TOO_LARGE)

    async def _answer(self, send: Send, result: Answer, request_id: str, origin: str = "") -> None:
        headers = {
            "X-Request-Id": request_id,
            **cross_origin(self._settings.origins, origin),
            **result.headers,
        }
        await self._send(send, result.status, result.body, headers)

    async def _send(
        self, send: Send, status: int, body: bytes, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        sent = {
            "Content-Type": "application/json",
            "X-Content-Type-Options": "nosniff",
            **headers,
            "Content-Length": str(len(body)),
        }
        if status == 204:
            del sent["Content-Type"], sent["Content-Length"]
        if self.connections.draining:
            sent["Connection"] = "close"
        pairs = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


def _score_prepared(
    prepared: Prepared, engine: Engine, settings: Settings, request: Request, work: Work
) -> Scored:
    scores = engine.run(prepared.pixels, work)
    return Scored(scores, prepared.form, prepared.top, prepared.collecting)


def _started(threads: int) -> ThreadPoolExecutor:
    """Return so many threads, all started: starting one later would hold up the event loop."""
    pool = ThreadPoolExecutor(threads, "request")
    all_run = threading.Barrier(threads)
    for _ in range(threads):
        pool.submit(all_run.wait)
    return pool


TOO_LARGE = "too many large requests are waiting; try again"


class _Body:
    """A body that is being received."""

    def __init__(self) -> None:
        # As they came: to join the chunks of a large body would hold up the event loop.
        self.chunks: list[bytes] = []
        self.size = 0  # bytes
        self.counted = 0  # bytes of it that count towards those of all bodies
        self.given_up = False
        self.deadline: asyncio.Timeout | None = None

    def give_up(self) -> None:
        """Drop the chunks, and make its reader give up at once."""
        self.given_up = True
        self.chunks.clear()
        if self.deadline:
            self.deadline.reschedule(0)


class _Gone(Exception):
    """The client hung up before its request was complete, or before work on it began."""
