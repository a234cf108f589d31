"""Limits on connections: how many, for how long, and which are closed to make room."""

import asyncio
import errno
import logging
import math
import os
import re
import time
from collections.abc import Callable

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.fetch import RequestError
from serving.handler import failure, new_id

log = logging.getLogger("packhorse.serving")

HEAD_SECONDS = 10.0  # for a request's head; then the connection is closed
ANSWER_SECONDS = 20.0  # for a client to read an answer
KEPT_SECONDS = 75.0  # between two requests
LATE_SECONDS = 2.0  # of silence when the server ends: a request may still be on its way
SWEEP_SECONDS = 0.5  # between two looks at all connections
HEAD_BYTES = 32 << 10  # of a request's head, and of the framing of a chunked body
TURN_SECONDS = 0.005  # between two requests that were sent without waiting for the answer
SAY_AGAIN = 60.0  # seconds until the log says again that no more files can be opened

HEAD_END = re.compile(rb"\n\r?\n")  # the parser refuses those without \r
# The server speaks no other protocol. After this header the parser would take a body for part of
# one.
UPGRADE = re.compile(rb"(?i)\nupgrade:")


class Connections:
    """The open connections; the one that has been silent for longest comes first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.draining = False
        self._newest = -math.inf  # time.monotonic, when it came
        self._all: dict[Protocol, None] = {}
        self._said = -SAY_AGAIN
        self._next_turn = 0.0

    def add(self, connection: "Protocol") -> None:
        """Add a connection; where there are too many, close one without a request."""
        self._newest = time.monotonic()
        if len(self._all) >= self.most:
            self._close_one()
        self._all[connection] = None

    def has_come_within(self, seconds: float) -> bool:
        """Return whether a connection was added in the last `seconds`."""
        return time.monotonic() < self._newest + seconds

    def remove(self, connection: "Protocol") -> None:
        """Remove a connection."""
        self._all.pop(connection, None)

    def touch(self, connection: "Protocol") -> None:
        """Note that a connection has sent something."""
        if self._all.pop(connection, self) is None:
            self._all[connection] = None

    async def watch(self) -> None:
        """Close connections that take too long. Runs for ever.

        One look at all of them every SWEEP_SECONDS costs less than a timer for each.
        """
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for connection in [*self._all]:
                connection.grow_older()

    def wait_for_turn(self, go: Callable[[], None]) -> None:
        """Call `go` in the next turn, for a connection that sends requests ahead of the answers.

        All such connections together have one turn in TURN_SECONDS: a client that sends a thousand
        requests and reads no answer takes only a small part of the event loop.
        """
        loop = asyncio.get_running_loop()
        self._next_turn = max(self._next_turn, loop.time()) + TURN_SECONDS
        loop.call_at(self._next_turn, go)

    def make_room(self, short: OSError) -> None:
        """Close a connection where no other can be accepted, and log that now and then."""
        if time.monotonic() > self._said + SAY_AGAIN:
            self._said = time.monotonic()
            log.error(
                "no connection can be accepted (%s): closing the oldest idle ones; "
                "allow more files with ulimit -n, or fewer --connections",
                os.strerror(short.errno or errno.EMFILE),
            )
        self._close_one()

    def _close_one(self) -> None:
        """Close the connection that has been silent for longest.

        First one between two requests; where there is none, one whose body is incomplete.
        """
        for is_free in (Protocol.asks_nothing, Protocol.sends_a_body):
            for connection in self._all:
                if is_free(connection):
                    del self._all[connection]
                    connection.transport.abort()
                    return


class _Ahead(Exception):
    """Another request begins in the data of a chunked body: it came ahead of its turn."""


class Protocol(HttpToolsProtocol):
    """Parses one request at a time, limits its size and time, and answers bad HTTP in JSON.

    uvicorn parses everything received at once, has no limit for a head, and waits for ever where a
    head trickles in or a client doesn't read an answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # As in uvicorn, without the addresses: they take two system calls, and nobody uses them.
        self.connections.add(self)
        self.transport, self.flow, self.scheme = transport, FlowControl(transport), "http"
        # Received and not yet parsed. A piece of a large body is all of it, and never copied.
        self._come = b""
        self._searched = 0  # bytes of it that were searched for a head's end
        self._is_whole = True  # whether the last parsed request is complete
        self._left: int | None = 0  # bytes of its body still to come; None: it is chunked
        self._framing = 0  # bytes of framing in a chunked body since its last own byte
        self._waits = False  # for its turn
        self._age = 0  # sweeps since its current state began
        self._open: Connections = self.config.app.connections  # type: ignore[union-attr]
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._open.touch(self)
        was_idle = self._is_idle()
        self._come += data
        self._parse()
        if was_idle and not self._is_idle():
            self._age = 0

    def _parse(self) -> None:
        """Parse what was received, up to the end of a request that isn't answered yet."""
        try:
            while self._come and not self._waits and not self.transport.is_closing():
                if self._is_whole and not self.asks_nothing():
                    self.flow.pause_reading()
                    return
                piece = self._next_piece()
                if not piece:
                    return
                self._feed(piece)
        except httptools.HttpParserError:
            if self._is_whole and self._left is None:
                super().shutdown()  # as soon as the previous request is answered
            else:
                self.send_400_response("Invalid HTTP request received.")

    def _next_piece(self) -> bytes:
        """Take a complete head, or the received part of a body, from the received bytes."""
        is_head = self._is_whole
        if is_head:
            self._left = 0
            size = self._size_of_head()
        else:
            size = len(self._come) if self._left is None else min(self._left, len(self._come))
        piece, self._come = self._come[:size], self._come[size:]
        return UPGRADE.sub(b"\nnot-upgraded:", piece) if is_head else piece

    def _size_of_head(self) -> int:
        """Return the size of the received head, 0 where it is incomplete."""
        if not self._searched:
            self._come = self._come.lstrip(b"\r\n")
        found = HEAD_END.search(self._come, self._searched)
        size = found.end() if found else len(self._come)
        if size > HEAD_BYTES or (size and not self._come[:1].isupper()):
            raise httptools.HttpParserError
        self._searched = 0 if found else max(0, size - 2)
        return size if found else 0

    def _feed(self, piece: bytes) -> None:
        """Parse a piece. Raise HttpParserError."""
        if self._left:
            self._left -= len(piece)
        self._framing += len(piece)
        self.parser.feed_data(piece)
        if self._framing > HEAD_BYTES:
            raise httptools.HttpParserError

    def on_message_begin(self) -> None:
        if self._left is None:
            raise _Ahead
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._left is not None:  # not behind a chunked body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuse what the parser accepts: other versions and codings, a missing or second Host."""
        values: dict[bytes, list[bytes]] = {}
        for name, value in self.headers:
            values.setdefault(name, []).append(value)
        version, names = self.parser.get_http_version(), len(values.get(b"host", ()))
        if (version, names) not in (("1.1", 1), ("1.0", 1), ("1.0", 0)):
            raise httptools.HttpParserError
        coding = values.get(b"transfer-encoding")
        if coding and coding[0].lower() != b"chunked":
            raise httptools.HttpParserError
        super().on_headers_complete()
        self._is_whole, self._framing = False, 0
        self._left = None if coding else int(values.get(b"content-length", [b"0"])[0])

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_whole = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # Without uvicorn's timer: `grow_older` closes the connection.
        self.server_state.total_requests += 1
        self._age = 0
        if self._come and not self.transport.is_closing():
            self.flow.pause_reading()
            self._waits = True
            self._open.wait_for_turn(self._take_turn)
        elif not self.transport.is_closing():
            self.flow.resume_reading()

    def _take_turn(self) -> None:
        self._waits = False
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self._parse()

    def asks_nothing(self) -> bool:
        """Return whether the connection is between two requests, or before its first."""
        return self.cycle is None or self.cycle.response_complete

    def sends_a_body(self) -> bool:
        """Return whether its request is incomplete."""
        return not self._is_whole

    def _is_idle(self) -> bool:
        """Return whether no byte of a next request has come."""
        return self.asks_nothing() and self._is_whole and not self._come

    def pause_writing(self) -> None:
        """Start the time that the client has to read the answer."""
        super().pause_writing()
        self._age = 0

    def grow_older(self) -> None:
        """Close the connection where it takes too long. Called in each sweep."""
        self._age += 1
        if self._age * SWEEP_SECONDS > self._patience():
            self.transport.abort() if self.flow.write_paused else self.transport.close()

    def _patience(self) -> float:
        """Return how many seconds its current state may last."""
        if self.flow.write_paused:
            return ANSWER_SECONDS
        if not self.asks_nothing():
            return math.inf  # the application has its own limits
        if not self._is_idle():
            return HEAD_SECONDS
        if self._open.draining:
            return LATE_SECONDS
        return HEAD_SECONDS if self.cycle is None else KEPT_SECONDS

    def shutdown(self) -> None:
        """Close the connection after its request; without one, `grow_older` closes it."""
        if not self.asks_nothing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer in JSON, where uvicorn answers in plain text."""
        if self._is_whole or not self.cycle.response_started:
            result = failure(RequestError(400, msg), new_id())
            headers = (
                b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[400] + headers % len(result.body) + result.body)
        self.transport.close()
