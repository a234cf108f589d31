"""Our own HTTP server: it listens, drains and ends. `app.py` says what is answered.

It listens only after the package has proven itself, so a server that answers at all is healthy.
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

# After SIGTERM, new requests are still answered for so long: whoever sends them has yet to notice.
LAME_SECONDS = 1.0
HANDSHAKE_SECONDS = 0.2  # then no new connection begins; those that have begun have so long
DRAIN_SECONDS = 25  # for the answers under way; SageMaker kills 30 s after SIGTERM
GRACE_SECONDS = 28.0  # after SIGTERM the process is gone, whatever hangs

BACKLOG = 256  # connections that wait to be accepted
# Connections accepted in one turn of the event loop, which answers nobody meanwhile.
ACCEPTED_AT_ONCE = 4
AGAIN_SECONDS = 0.01  # after which one is accepted again, where files had run out
SO_ATTACH_FILTER = 26  # socket(7); Python has no name for it
# In the kernel's language for filters (bpf(4)): drop a packet whose 14th byte has the flag SYN.
DROP_SYN = struct.pack(
    "=" + 4 * "HBBI",
    *(0x30, 0, 0, 13),  # load the byte
    *(0x45, 0, 1, 2),  # without the flag: skip one
    *(0x06, 0, 0, 0),  # drop
    *(0x06, 0, 0, 2**32 - 1),  # keep all of it
)
SPARE = 192  # open files for other things than connections: fetches, decoders, libraries


class _Server(uvicorn.Server):
    """Accepts connections itself, and goes on for LAME_SECONDS after it was told to end.

    uvicorn alone stops at once. That resets connections that wait to be accepted, and drops
    requests that had not arrived in full. uvloop alone accepts and closes connections where files
    run out, and says nothing.
    """

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio holds no task by itself

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where. sockets: one."""
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
        """Accept so many connections, or those that wait."""
        loop = asyncio.get_running_loop()
        for _ in range(most):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in SHORT_OF:  # of the connection that came, as accept(2) says
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
        """Begin to end, and be gone after GRACE_SECONDS, whatever hangs by then."""
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
    """Have no other connection begin, while those that have begun can still be accepted.

    Closing a listener resets each connection that has come since the last was accepted. So before
    that, a filter drops the packets that ask for one (SYN). Who sent it asks again after a second.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(DROP_SYN, len(DROP_SYN))
        told = struct.pack("HP", len(DROP_SYN) // 8, ctypes.addressof(program))
        with contextlib.suppress(OSError):  # a kernel of another make, as in some sandboxes
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, told)


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
