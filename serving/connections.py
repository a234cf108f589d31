"""Connections: how many, for how long, and which make room for others."""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.fetch import RequestError
from serving.handler import SHORT_OF, failure, new_id

log = logging.getLogger("packhorse.serving")

HEAD_SECONDS = 10.0  # for a request's head, or a connection is closed
ANSWER_SECONDS = 20.0  # for a client to read what was written to it
NO_REQUEST = object()  # not the connection itself: a circle is left to the garbage collector
TURN_SECONDS = 0.005  # between two requests that were sent before the last one was answered
SAY_AGAIN = 60.0  # seconds after which it is said once more that there are no more files


class Connections:
    """The open connections, in the order of when something last came from them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._all: dict[Protocol, None] = {}
        self._said = -SAY_AGAIN
        self._next_turn = 0.0

    def add(self, connection: "Protocol") -> None:
        """Add one, and close one that asks nothing where there are too many."""
        if len(self._all) >= self.most:
            self._close_one()
        self._all[connection] = None

    def remove(self, connection: "Protocol") -> None:
        """Forget one."""
        self._all.pop(connection, None)

    def touch(self, connection: "Protocol") -> None:
        """Say that something came from it."""
        if self._all.pop(connection, self) is None:
            self._all[connection] = None

    def wait_for_turn(self, go: Callable[[], None]) -> None:
        """Have `go` called in the turn of a connection that sends requests in advance.

        There is one such turn in TURN_SECONDS, for all together: who sends a thousand requests and
        reads no answer takes a small part of the event loop.
        """
        loop = asyncio.get_running_loop()
        self._next_turn = max(self._next_turn, loop.time()) + TURN_SECONDS
        loop.call_at(self._next_turn, go)

    def _close_one(self) -> None:
        """Close the one that has been silent for longest.

        Those between two requests come first, then those whose body isn't whole.
        """
        for is_free in (Protocol.asks_nothing, Protocol.sends_a_body):
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


class Protocol(H11Protocol):
    """Closes a connection whose request's head does not come, and refuses in JSON what is no HTTP.

    uvicorn waits for ever where a head trickles, and for whoever does not read its answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last: object = NO_REQUEST
        self._unread: asyncio.TimerHandle | None = None
        self._has_answered = self._waits = False
        self._open: Connections = self.config.app.connections  # type: ignore[union-attr]
        self._open.add(self)
        self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._open.remove(self)
        self.resume_writing()
        super().connection_lost(exc)
        # asyncio's transport keeps bound methods of its own: a circle, left to the garbage
        # collector, which stops everybody while it frees thousands (2,000 closed at once: 16 to
        # 70 ms in one collection; without the circles 1 ms). No public call breaks it: set_protocol
        # binds anew. So whatever refers back is taken out, by no name of asyncio's.
        for name, value in vars(self.transport).items():
            if getattr(value, "__self__", None) is self.transport:
                setattr(self.transport, name, None)

    def data_received(self, data: bytes) -> None:
        self._open.touch(self)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._has_answered = True
        super().on_response_complete()
        self._has_answered = False

    def handle_events(self) -> None:
        if self._has_answered and self.conn.trailing_data[0]:
            self.flow.pause_reading()
            self._has_answered, self._waits = False, True
            self._open.wait_for_turn(self._take_turn)
        elif not self._waits:
            super().handle_events()

    def _take_turn(self) -> None:
        self._waits = False
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()

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
