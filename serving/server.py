"""Our own HTTP server: /invocations and /ping as SageMaker asks for them, /metrics, and a page.

/metrics is for Prometheus, and the page to try the model. It listens only after the package has
proven itself, so a server that answers at all is healthy.
"""

import asyncio
import base64
import contextlib
import ctypes
import errno
import hashlib
import ipaddress
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
import uvicorn
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.contract import PREFLIGHT, RETRY, cross_origin
from serving.engine import Engine
from serving.fetch import RequestError
from serving.handler import SHORT_OF, Answer, Request, Settings, answer, failure, new_id
from serving.package import Package
from serving.work import Work
from trainer.common.errors import UserError

log = logging.getLogger("packhorse.serving")

HEAD_SECONDS = 10.0  # for a request's head, or a connection is closed
BODY_SECONDS = 20.0  # for its body
ANSWER_SECONDS = 20.0  # for a client to read what was written to it
BODIES = 64 << 20  # bytes of all bodies together: what the queue may hold in memory
# After SIGTERM, new requests are still answered for so long: whoever sends them has yet to notice.
LAME_SECONDS = 1.0
LATE_SECONDS = 0.2  # after that, for requests on their way in open connections
DRAIN_SECONDS = 25  # for the answers under way; SageMaker kills 30 s after SIGTERM
GRACE_SECONDS = 28.0  # after SIGTERM the process is gone, whatever hangs

BACKLOG = 256  # connections that wait to be accepted
FILES = 65_536  # open files that are asked for, where the system allows so many
# Of Python's lock, which a thread that computes gives to one that waits: an answer needs it several
# times. (Python's own: 5 ms.)
SWITCH_SECONDS = 0.0005
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
LARGE_BLOCK = 1 << 20  # bytes
ARENAS = 2
SPARE = 192  # of them for other things than connections: fetches, decoders, libraries
SAY_AGAIN = 60.0  # seconds after which it is said once more that there are no more files

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
IN_PROGRESS = Gauge("packhorse_requests_in_progress", "Requests whose head has come.")

# Connections accepted in one turn of the event loop, which answers nobody meanwhile.
ACCEPTED_AT_ONCE = 16
# Turns after which asyncio has told that a client hung up whose end came with its request: to read
# the end, to close, to wake who waits for it. Nothing is begun for that client.
TURNS = 3
GET = {"/", "/card", "/metrics", "/ping"}


class Slots:
    """What whole requests hold while they are worked on: one of so many, or of those that fetch.

    From any thread. Who waits for other machines holds up nobody who brings its picture along.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._working = self._fetching = 0
        self._lock = threading.Lock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold one. Raise RequestError where there is none."""
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
    def fetching(self) -> Iterator[None]:
        """Hold one of those that fetch, in the place of the other. Raise as `working`."""
        with self._lock:
            if self._fetching >= self._most:
                raise RequestError(503, "too many requests fetch pictures; try again")
            self._fetching += 1
            self._working -= 1
        try:
            yield
        finally:
            with self._lock:
                self._fetching -= 1
                self._working += 1


class _Work(Work):
    """That of a request to this server."""

    def __init__(self, seconds: float, slots: Slots) -> None:
        super().__init__(seconds)
        self._slots = slots

    @contextmanager
    def fetching(self) -> Iterator[None]:
        with self._slots.fetching():
            yield


class App:
    """The ASGI application."""

    def __init__(
        self, package: Package, engine: Engine, settings: Settings, hosts: frozenset[str]
    ) -> None:
        """Make it. hosts: names that it goes by; none: any."""
        self.draining = False
        self.connections = _Connections(settings.connections)
        self._engine, self._settings, self._hosts = engine, settings, hosts
        self._slots = Slots(settings.queue)
        self._held = 0  # bytes of all bodies
        self._coming: dict[_Body, None] = {}  # those that aren't whole, the oldest first
        # A thread for every request in the queue: while some wait for a slow URL, the others go on.
        self._threads = ThreadPoolExecutor(2 * settings.queue, "request")
        self._page = Path(__file__).with_name("page.html").read_bytes()
        self._page_headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy(self._page),
        }
        self._card = json.dumps(card(package)).encode()
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
                case "GET" | "HEAD", _ if path in GET:
                    await self._get(path, send)
                case _, "/invocations":
                    message = "a prediction is asked for by POST"
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

        A page of any site may have a name of its own that leads here (DNS rebinding), and would be
        taken for ours. Whoever balances a load asks /ping by address.
        """
        if self._hosts and path != "/ping" and _without_port(host) not in self._hosts:
            raise RequestError(
                421, "this server does not go by that name; python -m serving serve --hosts NAME"
            )

    async def _get(self, path: str, send: Send) -> None:
        if path == "/":
            await self._send(send, 200, self._page, self._page_headers)
        elif path == "/card":
            await self._send(send, 200, self._card)
        elif path == "/metrics":
            kind = {"Content-Type": CONTENT_TYPE_LATEST}
            await self._send(send, 200, generate_latest(REGISTRY), kind)
        elif self.draining:
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
            size = len(body.data)
            content_type, accept = headers.get("content-type", ""), headers.get("accept", "")
            request = Request(body.data, content_type, accept, request_id)
            with self._slots.working():
                result = await self._work(request, receive)
        except _Gone:
            return
        except RequestError as error:
            result = failure(error, request_id)
        finally:
            self._held -= body.counted
            IN_PROGRESS.dec()
        seconds = time.monotonic() - began
        REQUESTS.labels(result.status).inc()
        SECONDS.observe(seconds)
        log.info("%s %d %.0f ms %d bytes", request_id, result.status, 1000 * seconds, size)
        await self._answer(send, result, request_id, headers.get("origin", ""))

    async def _work(self, request: Request, receive: Receive) -> Answer:
        """Return the answer to a whole request. What is done for a client that leaves is ended."""
        work = _Work(self._settings.seconds, self._slots)
        gone = asyncio.ensure_future(receive())  # what comes after a whole body is its end
        gone.add_done_callback(lambda _: work.abandon())
        try:
            for _ in range(TURNS):
                await asyncio.sleep(0)
                if gone.done():
                    raise _Gone
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, answer, self._engine, self._settings, request, work
            )
        finally:
            gone.cancel()

    async def _read(self, receive: Receive, headers: dict[str, str], body: "_Body") -> None:
        """Fill `body`.

        Raises RequestError for one that is too large, too slow or too much for now, and _Gone.
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
                    body.data += chunk
                    body.counted += len(chunk)
                    self._held += len(chunk)
                    if len(body.data) > allowed:
                        raise RequestError(
                            413, f"the body has more than the allowed {allowed:,} bytes"
                        )
                    self._make_room(body)
        except TimeoutError as error:
            if body.given_up:
                raise RequestError(503, TOO_LARGE) from error
            raise RequestError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
        finally:
            del self._coming[body]

    def _make_room(self, body: "_Body") -> None:
        """Give up bodies where all together are too large: first the one that has taken longest."""
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
        if self.draining:
            sent["Connection"] = "close"
        pairs = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


TOO_LARGE = "too many large requests are waiting; try again"


class _Body:
    """A body on its way."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.counted = 0  # of its bytes, among those of all bodies
        self.given_up = False
        self.deadline: asyncio.Timeout | None = None

    def give_up(self) -> None:
        """Have it given up at once, by who reads it."""
        self.given_up = True
        self.data.clear()
        if self.deadline:
            self.deadline.reschedule(0)


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


def known_hosts(host: str, names: str) -> frozenset[str]:
    """Return the names that a server goes by; none for any.

    host: that it listens on. names: the setting.
    """
    if not names:
        if not _is_loopback(host):
            return frozenset()
        names = f"localhost,127.0.0.1,::1,{host}"
    words = frozenset(word.strip().strip("[]").lower() for word in names.split(","))
    if "*" in words:
        return frozenset()
    return words


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _without_port(host: str) -> str:
    """Return the name in a Host header."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    return name.strip("[]").rstrip(".").lower()


class _Connections:
    """The open connections, in the order of when something last came from them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._all: dict[_Protocol, None] = {}
        self._said = -SAY_AGAIN

    def add(self, connection: "_Protocol") -> None:
        """Add one, and close one that asks nothing where there are too many."""
        if len(self._all) >= self.most:
            self._close_one()
        self._all[connection] = None

    def remove(self, connection: "_Protocol") -> None:
        """Forget one."""
        self._all.pop(connection, None)

    def touch(self, connection: "_Protocol") -> None:
        """Say that something came from it."""
        if self._all.pop(connection, self) is None:
            self._all[connection] = None

    def _close_one(self) -> None:
        """Close the one that has been silent for longest.

        Those between two requests come first, then those whose body isn't whole.
        """
        for is_free in (_Protocol.asks_nothing, _Protocol.sends_a_body):
            for connection in self._all:
                if is_free(connection):
                    del self._all[connection]
                    connection.transport.abort()
                    return

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say in one line where files have run out, not for each connection that waits."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in SHORT_OF:
            loop.default_exception_handler(context)
            return
        self._close_one()
        if time.monotonic() > self._said + SAY_AGAIN:
            self._said = time.monotonic()
            log.error(
                "no connection can be accepted (%s): the oldest that ask nothing are closed; "
                "allow more files with ulimit -n, or fewer --connections",
                os.strerror(error.errno or errno.EMFILE),
            )


class _Protocol(H11Protocol):
    """Closes a connection whose request's head does not come, and refuses in JSON what is no HTTP.

    uvicorn waits for ever where a head trickles, and for whoever does not read its answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last: object = self  # no request
        self._unread: asyncio.TimerHandle | None = None
        self._open: _Connections = self.config.app.connections  # type: ignore[union-attr]
        self._open.add(self)
        self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._open.remove(self)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._open.touch(self)
        super().data_received(data)

    def asks_nothing(self) -> bool:
        """Return whether it is between two requests, or before its first."""
        return self.cycle is None or self.cycle.response_complete

    def sends_a_body(self) -> bool:
        """Return whether its request isn't whole."""
        return bool(self.cycle and self.cycle.more_body)

    def pause_writing(self) -> None:
        """Give the client so long to read what was written."""
        super().pause_writing()
        self._unread = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Forget that it did not read."""
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def _check_later(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._check)

    def _check(self) -> None:
        # uvicorn's own timer runs while a connection that has served a request is silent, and ends
        # with the first byte of the next.
        silent = self.asks_nothing() and self.timeout_keep_alive_task is None
        if silent and self.cycle is self._last:
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        asyncio.get_running_loop().set_exception_handler(self._app.connections.handle)
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)
        if sockets:
            self.config.port = sockets[0].getsockname()[1]
            self._log_started_message(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end, and be gone after GRACE_SECONDS, whatever hangs by then."""
        if not self.should_exit:
            watch = threading.Timer(GRACE_SECONDS, os._exit, (0,))
            watch.daemon = True
            watch.start()
        super().handle_exit(sig, frame)

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


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, and does not listen yet. Raises UserError.

    So a mistake is told before the package is loaded, and nobody is kept waiting meanwhile.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: this is no address; give one like 127.0.0.1") from error
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        return made
    except OSError as error:
        made.close()
        raise _no_address(error, host, port) from error


def _no_address(error: OSError, host: str, port: int) -> UserError:
    reason = os.strerror(error.errno or errno.EADDRINUSE).lower()
    return UserError(
        f"--host {host} --port {port}: {reason}; give another --port (0: any free one), "
        "or end what has it"
    )


def allow_files() -> int:
    """Raise the soft limit of open files, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return FILES
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def share_memory_and_threads() -> None:
    """Have memory given back at once, and waiting threads woken soon. Before threads start.

    glibc keeps what was freed in an arena a thread, and from a first large block on also large
    blocks: while one client sent requests of 16 URLs, the server held up to 419 MiB; with this,
    155 to 224 (2 cores, glibc 2.36).
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than with glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, ARENAS)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def serve(
    package: Package, engine: Engine, settings: Settings, host: str, address: socket.socket
) -> None:
    """Answer until SIGTERM, SIGHUP or Ctrl-C, then end the process.

    host: as the user wrote it. address: of `bind`. Raises UserError where another process has
    begun to listen on it since.
    """
    # uvicorn raises the signal once more when it has drained: by then it has done its work.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = make(package, engine, settings, host)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn's own for the other two
    try:
        address.listen(BACKLOG)
    except OSError as error:
        raise _no_address(error, host, address.getsockname()[1]) from error
    server.run([address])
    # Python would wait here for every thread, and one that hangs in a decoder can't be stopped.
    logging.shutdown()
    os._exit(0)


def make(package: Package, engine: Engine, settings: Settings, host: str) -> uvicorn.Server:
    """Return the server, not yet listening; `run` takes what `bind` returned."""
    app = App(package, engine, settings, known_hosts(host, settings.hosts))
    app.connections.most = max(8, min(settings.connections, allow_files() - SPARE))
    config = uvicorn.Config(
        app,
        host=host,
        http=_Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,  # asyncio takes it for both; `startup` sets the other
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=32 << 10,
    )
    return _Server(config, app)
