"""Our own HTTP server: /invocations and /ping as SageMaker asks for them, /metrics, and a page.

/metrics is for Prometheus, and the page to try the model. It listens only after the package has
proven itself, so a server that answers at all is healthy.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h11
import uvicorn
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.engine import Engine
from serving.fetch import RequestError
from serving.handler import Answer, Request, Settings, answer, failure, new_id
from serving.package import Package

log = logging.getLogger("packhorse.serving")

HEAD_SECONDS = 10.0  # for a request's head, or a connection is closed
BODY_SECONDS = 20.0  # for its body
BODIES = 128 << 20  # bytes of all bodies together: what the queue may hold in memory
# After SIGTERM, new requests are still answered for so long: whoever sends them has yet to notice.
LAME_SECONDS = 1.0
LATE_SECONDS = 0.2  # after that, for requests on their way in open connections
DRAIN_SECONDS = 25  # for the answers under way; SageMaker kills 30 s after SIGTERM

NO_HEADERS: Mapping[str, str] = {}

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]

REQUESTS = Counter("packhorse_requests", "Requests to /invocations, by status.", ["status"])
SECONDS = Histogram(
    "packhorse_request_seconds",
    "From head to answer.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
BATCHES = Histogram(
    "packhorse_batch_size", "Pictures in a run of the network.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
IN_PROGRESS = Gauge("packhorse_requests_in_progress", "Requests accepted and not answered yet.")


class App:
    """The ASGI application."""

    def __init__(self, package: Package, engine: Engine, settings: Settings) -> None:
        self.draining = False
        self._engine, self._settings = engine, settings
        self._accepted = 0  # requests in progress or waiting
        self._held = 0  # bytes of their bodies
        # A thread for every request in the queue: while some wait for a slow URL, the others go on.
        self._threads = ThreadPoolExecutor(max(1, settings.queue), "request")
        self._page = Path(__file__).with_name("page.html").read_bytes()
        self._page_headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy(self._page),
        }
        self._card = json.dumps(card(package)).encode()
        engine.observe = BATCHES.observe

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        match scope["method"], scope["path"]:
            case "POST", "/invocations":
                await self._invoke(scope, receive, send)
            case "GET" | "HEAD", "/ping":
                await self._ping(send)
            case "GET", "/metrics":
                kind = {"Content-Type": CONTENT_TYPE_LATEST}
                await self._send(send, 200, generate_latest(REGISTRY), kind)
            case "GET", "/card":
                await self._send(send, 200, self._card)
            case "GET", "/":
                await self._send(send, 200, self._page, self._page_headers)
            case _, "/" | "/card" | "/invocations" | "/metrics" | "/ping":
                message = "POST is for /invocations, GET for what else there is"
                await self._fail(send, RequestError(405, message))
            case _:
                await self._fail(send, RequestError(404, "there is no such page"))

    async def _ping(self, send: Send) -> None:
        if self.draining:
            await self._send(send, 503, b"{}")
        elif self._engine.hangs(self._settings.seconds):
            await self._send(send, 503, b'{"status": "every decoder hangs"}')
        else:
            await self._send(send, 200, b'{"status": "healthy"}')

    async def _invoke(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        began = time.monotonic()
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        body = bytearray()
        content_type, accept = headers.get("content-type", ""), headers.get("accept", "")
        request = Request(body, content_type, accept, new_id(headers.get("x-request-id", "")))
        self._accepted += 1
        IN_PROGRESS.inc()
        try:
            if self._accepted > self._settings.queue:
                raise RequestError(503, "too many requests are waiting; try again")
            await self._read(receive, headers, body)
            result = await asyncio.get_running_loop().run_in_executor(
                self._threads, answer, self._engine, self._settings, request
            )
        except _Gone:
            return
        except RequestError as error:
            result = failure(error, request.id)
        finally:
            self._accepted -= 1
            self._held -= len(body)
            IN_PROGRESS.dec()
        seconds = time.monotonic() - began
        REQUESTS.labels(result.status).inc()
        SECONDS.observe(seconds)
        log.info("%s %d %.0f ms %d bytes", request.id, result.status, 1000 * seconds, len(body))
        await self._answer(send, result, request.id)

    async def _read(self, receive: Receive, headers: dict[str, str], body: bytearray) -> None:
        """Fill `body`.

        Raises RequestError for one that is too large, too slow or too much for now, and _Gone.
        """
        allowed = self._settings.max_body
        length = int(headers.get("content-length", "0"))
        if length > allowed:
            raise RequestError(413, f"the body has {length:,} bytes; allowed: {allowed:,}")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > allowed:
                        raise RequestError(
                            413, f"the body has more than the allowed {allowed:,} bytes"
                        )
                    if self._held > BODIES:
                        raise RequestError(503, "too many large requests are waiting; try again")
        except TimeoutError as error:
            raise RequestError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error

    async def _fail(self, send: Send, error: RequestError) -> None:
        request_id = new_id()
        await self._answer(send, failure(error, request_id), request_id)

    async def _answer(self, send: Send, result: Answer, request_id: str) -> None:
        headers = {"X-Request-Id": request_id, **result.headers}
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
        if self.draining:
            sent["Connection"] = "close"
        pairs = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


class _Gone(Exception):
    """The client hung up before its request was whole."""


def card(package: Package) -> dict[str, Any]:
    """Return what the page says of the model."""
    return {
        "classes": list(package.classes),
        "metrics": package.metrics,
        "created": package.created,
        "revision": package.revision,
        "model": package.config.get("model.name"),
        "size": package.preprocessing.size,
    }


def policy(page: bytes) -> str:
    """Return the page's Content-Security-Policy.

    Its own script and style, by their hashes, and nothing else that runs.
    """

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src blob: data: https: http:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Protocol(H11Protocol):
    """Closes a connection whose request's head does not come, and refuses in JSON what is no HTTP.

    uvicorn waits for ever where a head trickles.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last: object = self  # no request
        self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _check_later(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._check)

    def _check(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        # uvicorn's own timer runs while a connection that has served a request is silent, and ends
        # with the first byte of the next.
        if waiting and self.cycle is self._last and self.timeout_keep_alive_task is None:
            self.transport.close()
        else:
            self._last = self.cycle
            self._check_later()

    def send_400_response(self, msg: str) -> None:
        """Answer in JSON, where uvicorn answers in plain text."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            result = failure(RequestError(400, msg), new_id())
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(result.body))),
                ("Connection", "close"),
            ]
            head = h11.Response(status_code=400, headers=headers)
            for event in (head, h11.Data(data=result.body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """Goes on answering for LAME_SECONDS after it was told to end, and says so on /ping.

    uvicorn alone stops at once. That resets connections that wait to be accepted, and drops
    requests that had not arrived in full.
    """

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: Any = None) -> None:
        """Drain, then end as uvicorn does."""
        self._app.draining = True
        await asyncio.sleep(LAME_SECONDS)
        for server in self.servers:
            waiting = [each for listener in server.sockets for each in _accept_waiting(listener)]
            server.close()
            for connection in waiting:
                await server.get_loop().connect_accepted_socket(self._protocol, connection)
        await asyncio.sleep(LATE_SECONDS)
        await super().shutdown(sockets)

    def _protocol(self) -> _Protocol:
        return _Protocol(self.config, self.server_state, self.lifespan.state)


def _accept_waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """Accept what waits: closing a listener resets the connections that it has not accepted."""
    with listener.dup() as accepting, contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = accepting.accept()
            yield connection


def serve(package: Package, engine: Engine, settings: Settings, host: str, port: int) -> None:
    """Answer until SIGTERM, SIGHUP or Ctrl-C, then end the process.

    Raises SystemExit where the port is taken.
    """
    # uvicorn raises the signal once more when it has drained: by then it has done its work.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = make(package, engine, settings, host, port)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn's own for the other two
    server.run()
    # Python would wait here for every thread, and one that hangs in a decoder can't be stopped.
    logging.shutdown()
    os._exit(0)


def make(
    package: Package, engine: Engine, settings: Settings, host: str, port: int
) -> uvicorn.Server:
    """Return the server, not yet listening. port: 0 for any that is free."""
    app = App(package, engine, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=256,
        limit_concurrency=1024,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=32 << 10,
    )
    return _Server(config, app)
