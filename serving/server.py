"""Our own HTTP server: it listens, drains and ends. `app.py` has the answers.

It listens only after the package is verified, so a server that answers at all is healthy.
"""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Coroutine
from typing import Any

import uvicorn

from serving.app import App
from serving.connections import Protocol
from serving.engine import Engine
from serving.handler import SHORT_OF, Settings
from serving.names import known_hosts
from serving.package import Package
from serving.process import allow_files, spare_the_collector
from trainer.common import sessions
from trainer.common.errors import UserError

# After SIGTERM the server answers new requests for so long: clients have yet to notice its end.
LAME_SECONDS = 1.0
HANDSHAKE_SECONDS = 0.2  # for connections that have begun, once no new one can begin
DRAIN_SECONDS = 25  # for the answers under way; SageMaker kills 30 s after SIGTERM
GRACE_SECONDS = 28.0  # after SIGTERM; then the process ends, whatever hangs

BACKLOG = 256  # connections that wait to be accepted
# Connections accepted in one turn of the event loop: it answers no request meanwhile.
ACCEPTED_AT_ONCE = 4
AGAIN_SECONDS = 0.01  # until the next try to accept, where no more files could be opened
SO_ATTACH_FILTER = 26  # socket(7); Python has no name for it
# In the kernel's language for filters (bpf(4)): drop a packet whose 14th byte has the flag SYN.
DROP_SYN = struct.pack(
    "=" + 4 * "HBBI",
    *(0x30, 0, 0, 13),  # load the byte
    *(0x45, 0, 1, 2),  # without the flag: skip one
    *(0x06, 0, 0, 0),  # drop
    *(0x06, 0, 0, 2**32 - 1),  # keep all of it
)
SPARE = 192  # open files that are not connections: fetches, decoders, libraries


class _Server(uvicorn.Server):
    """Accepts connections itself, and goes on for LAME_SECONDS after the signal to end.

    uvicorn alone stops at once, which resets connections that wait to be accepted, and drops
    requests that have not arrived in full. uvloop alone accepts and closes connections where no
    more files can be opened, and logs nothing.
    """

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio keeps only weak references to them

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log the address. sockets: one."""
        assert sockets
        [self._listener] = sockets
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        await super().startup([])
        self._accept_on()
        self._keep(self._app.connections.watch())
        self.config.port = self._listener.getsockname()[1]
        self._log_started_message([self._listener])

    def _accept_on(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, ACCEPTED_AT_ONCE)

    def _accept(self, most: int) -> None:
        """Accept at most so many of the connections that wait."""
        loop = asyncio.get_running_loop()
        for _ in range(most):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in SHORT_OF:  # an error of the new connection (accept(2))
                    return
                self._app.connections.make_room(error)
                loop.remove_reader(self._listener)
                loop.call_later(AGAIN_SECONDS, self._accept_on)
                return
            self._keep(loop.connect_accepted_socket(self._protocol, connection))

    def _keep(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end. End the process after GRACE_SECONDS, whatever hangs then."""
        if not self.should_exit:
            watch = threading.Timer(GRACE_SECONDS, os._exit, (0,))
            watch.daemon = True
            watch.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Drain, then end as uvicorn does."""
        self._app.connections.draining = True
        await asyncio.sleep(LAME_SECONDS)
        refuse_new(self._listener)
        await asyncio.sleep(HANDSHAKE_SECONDS)
        asyncio.get_running_loop().remove_reader(self._listener)
        self._accept(sys.maxsize)
        await super().shutdown(sockets)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state)


def refuse_new(listener: socket.socket) -> None:
    """Let no new connection begin, while those that have begun can still be accepted.

    To close a listener resets each connection that has come since the last was accepted. So before
    that, a filter drops the packets that ask for a connection (SYN). Their clients ask again after
    a second.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(DROP_SYN, len(DROP_SYN))
        told = struct.pack("HP", len(DROP_SYN) // 8, ctypes.addressof(program))
        with contextlib.suppress(OSError):  # not a real Linux kernel, as in some sandboxes
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, told)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address, and does not listen yet. Raises UserError.

    So the user learns of a mistake before the package is loaded, and no client waits meanwhile.
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
        "or end the process that has it"
    )


def serve(
    package: Package, engine: Engine, settings: Settings, host: str, address: socket.socket
) -> None:
    """Answer until SIGTERM, SIGHUP or Ctrl-C, then end the process.

    host: as the user wrote it. address: from `bind`. Raises UserError where another process has
    begun to listen on it since.
    """
    try:
        address.listen(BACKLOG)
    except OSError as error:
        raise _no_address(error, host, address.getsockname()[1]) from error
    server = make(package, engine, settings, host)
    # uvicorn handles two of these signals itself while it runs, and raises them once more when it
    # has drained: the handler does no harm then.
    for number in sessions.heeded():
        signal.signal(number, server.handle_exit)
    spare_the_collector()
    server.run([address])
    # Python would wait here for every thread, and one that hangs in a decoder can't be stopped.
    logging.shutdown()
    os._exit(0)


def make(package: Package, engine: Engine, settings: Settings, host: str) -> uvicorn.Server:
    """Return the server, not yet listening. Its `run` takes the socket from `bind`."""
    app = App(package, engine, settings, known_hosts(host, settings.hosts))
    app.connections.most = max(8, min(settings.connections, allow_files() - SPARE))
    config = uvicorn.Config(
        app,
        host=host,
        http=Protocol,
        loop="uvloop",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return _Server(config, app)
