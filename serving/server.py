"""Our own HTTP server: it listens, drains and ends. `app.py` says what is answered.

It listens only after the package has proven itself, so a server that answers at all is healthy.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from serving.app import App
from serving.connections import Protocol
from serving.engine import Engine
from serving.handler import Settings
from serving.names import known_hosts
from serving.package import Package
from serving.process import allow_files, spare_the_collector
from trainer.common import sessions
from trainer.common.errors import UserError

# After SIGTERM, new requests are still answered for so long: whoever sends them has yet to notice.
LAME_SECONDS = 1.0
LATE_SECONDS = 0.2  # after that, for requests on their way in open connections
DRAIN_SECONDS = 25  # for the answers under way; SageMaker kills 30 s after SIGTERM
GRACE_SECONDS = 28.0  # after SIGTERM the process is gone, whatever hangs

BACKLOG = 256  # connections that wait to be accepted
# Connections accepted in one turn of the event loop, which answers nobody meanwhile.
ACCEPTED_AT_ONCE = 4
SPARE = 192  # open files for other things than connections: fetches, decoders, libraries


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

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state)


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
        raise UserError(
            f"--host {host}: this is not an address; give one like 127.0.0.1"
        ) from error
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


def serve(
    package: Package, engine: Engine, settings: Settings, host: str, address: socket.socket
) -> None:
    """Answer until SIGTERM, SIGHUP or Ctrl-C, then end the process.

    host: as the user wrote it. address: of `bind`. Raises UserError where another process has
    begun to listen on it since.
    """
    try:
        address.listen(BACKLOG)
    except OSError as error:
        raise _no_address(error, host, address.getsockname()[1]) from error
    server = make(package, engine, settings, host)
    # uvicorn handles two of them itself while it runs, and raises them once more when it has
    # drained: this does no harm then.
    for number in sessions.heeded():
        signal.signal(number, server.handle_exit)
    spare_the_collector()
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
        http=Protocol,
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
