"""The process beside our own server that prepares requests which take long.

Such requests have large bodies, large pictures, or pictures on other machines. They are parsed,
fetched and decoded here, in a process with its own Python lock and a lower priority, so they don't
hold up small pictures. (In threads of the server they did: to answer a request a thread needs the
lock several times, and each time waits for the thread that holds it.) A decoder that hangs or
crashes ends this process, not the server, which starts another.

The two talk over a socket, in JSON and bytes. The server treats whatever comes back as mere data.
"""

import asyncio
import itertools
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving import contract, handler
from serving.contract import Form
from serving.decoders import Preparation, Rooms
from serving.fetch import RequestError
from serving.handler import Answer, Request, Settings
from serving.process import ARENAS, KEPT, LARGE_BLOCK, log_to_stdout, spare_the_collector
from serving.work import Abandoned, Work
from trainer.common import sessions
from trainer.common.cpu import cores
from trainer.images.decode import Preprocessing

log = logging.getLogger("packhorse.serving")

NICENESS = 5  # gets a third of the processor time that the server gets (sched(7))
LATE_SECONDS = 1.0  # after a deadline, for the answer that says so to arrive
LOOK_SECONDS = 0.5  # between two checks whether the other process hangs
OVERDUE_SECONDS = 10.0  # after a deadline; a process that is still silent then is killed
LOST = "the server had to restart its decoding process; try again"


@dataclass(frozen=True)
class Prepared:
    """A request whose pictures are decoded."""

    pixels: Sequence[NDArray[np.uint8]]  # of each image, [size, size, 3]
    form: Form
    top: int
    collecting: float  # seconds that it took to get all files


class Worker:
    """The process as the server sees it: when it ends, the next request starts another."""

    def __init__(self, preprocessing: Preprocessing, settings: Settings) -> None:
        """Start the process. settings: the server's."""
        told = {"preprocessing": asdict(preprocessing), "settings": asdict(settings)}
        self._told = json.dumps(told).encode()
        self._lock = threading.Lock()
        self._life = _Life(self._told)

    async def prepare(self, request: Request, body: list[bytes], work: Work) -> Prepared | Answer:
        """Return a request with its pictures decoded, or the answer that says what is wrong.

        body: the request's, in pieces; the list is emptied. Whatever the process does, this raises
        TimeoutError at the deadline, Abandoned, and RequestError where the process has ended
        meanwhile.
        """
        if self._life.is_over():
            await asyncio.to_thread(self._start_another)
        life = self._life
        number, asked = life.ask(request, body, work)
        try:
            async with asyncio.timeout(work.left() + LATE_SECONDS):
                return await asyncio.wrap_future(asked)
        except asyncio.CancelledError as error:
            if not asked.cancelled():
                raise
            raise Abandoned from error
        finally:
            body.clear()
            life.forget(number)

    def _start_another(self) -> None:
        with self._lock:
            if self._life.is_over():
                self._life = _Life(self._told)


class _Life:
    """One life of the process, from its start to its end."""

    def __init__(self, told: bytes) -> None:
        """Start the process. told: the first message, which `main` reads."""
        ours, its = socket.socketpair()
        with its:
            self._process = sessions.Child(
                [*sessions.python(), "-m", "serving.worker", str(its.fileno())],
                pass_fds=[its.fileno()],
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OPENBLAS_NUM_THREADS": "1",
                    # As in `process.share_memory_and_threads`.
                    "MALLOC_ARENA_MAX": str(ARENAS),
                    "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK),
                    "MALLOC_TRIM_THRESHOLD_": str(KEPT),
                },
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        # Unanswered requests, each with its deadline.
        self._asked: dict[int, tuple[Future[Prepared | Answer], float]] = {}
        self._heard = time.monotonic()  # when the process last answered
        self._is_over = False
        # Messages to send, each a head and a body in pieces; None is the end.
        self._messages: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]] | None]
        self._messages = queue.SimpleQueue()
        self._connection.send_bytes(told)
        self._sender = threading.Thread(target=self._send, name="to worker", daemon=True)
        self._sender.start()
        threading.Thread(target=self._read, name="worker", daemon=True).start()

    def is_over(self) -> bool:
        """Return whether the process has ended."""
        return self._is_over

    def ask(
        self, request: Request, body: list[bytes], work: Work
    ) -> "tuple[int, Future[Prepared | Answer]]":
        """Send a request; return its number, and the future of its result. Raise RequestError."""
        future: Future[Prepared | Answer] = Future()
        with self._lock:
            if self._is_over:
                raise RequestError(503, LOST)
            number = next(self._numbers)
            self._asked[number] = future, work.end
        work.add(future)
        head = {
            "number": number,
            "seconds": work.left(),
            "content_type": request.content_type,
            "accept": request.accept,
            "id": request.id,
        }
        self._messages.put((head, body))
        return number, future

    def forget(self, number: int) -> None:
        """Tell the process to give a request up, where it has not answered yet."""
        with self._lock:
            future, _ = self._asked.get(number, (None, 0.0))
        if future is not None:
            future.cancel()
            self._messages.put(({"forget": number}, []))

    def _send(self) -> None:
        """Send messages until the last one, so that a caller never waits for a hanging process.

        Where the process ends, `_read` notices it too.
        """
        with suppress(OSError):
            while message := self._messages.get():
                self._send_one(*message)

    def _send_one(self, head: dict[str, Any], body: list[bytes]) -> None:
        pieces = body.copy()
        body.clear()  # the other process will have the body: free it here
        self._connection.send_bytes(json.dumps(head | {"pieces": len(pieces)}).encode())
        for piece in pieces:
            self._connection.send_bytes(piece)

    def _read(self) -> None:
        """Read the answers until the process ends. Kill it where an answer is overdue."""
        try:
            while True:
                if self._connection.poll(LOOK_SECONDS):
                    head = json.loads(self._connection.recv_bytes())
                    self._take(head, self._connection.recv_bytes())
                elif self._is_overdue():
                    log.error("the decoding process hangs: killing it, and starting another")
                    self._process.kill()
        except (EOFError, OSError):
            pass  # the process has ended
        except Exception as error:  # an exploited decoder may send anything
            log.error("the decoding process answers nonsense: killing it", exc_info=error)
        with self._lock:
            self._is_over = True
            left = [future for future, _ in self._asked.values()]
        self._process.kill()
        self._process.wait()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(RequestError(503, LOST))
        self._messages.put(None)
        self._sender.join()
        self._connection.close()

    def _take(self, head: dict[str, Any], data: bytes) -> None:
        with self._lock:
            self._heard = time.monotonic()
            future, _ = self._asked.pop(head["number"])
        if not future.set_running_or_notify_cancel():
            return
        if "status" in head:
            future.set_result(Answer(head["status"], data, head["headers"]))
            return
        pixels = np.frombuffer(data, np.uint8).reshape(head["shape"])
        form = Form(head["output"], head["lines"])
        future.set_result(Prepared([*pixels], form, head["top"], head["collecting"]))

    def _is_overdue(self) -> bool:
        before = time.monotonic() - OVERDUE_SECONDS
        with self._lock:
            return any(self._heard < end < before for _, end in self._asked.values())


class _Preparer:
    """The process's side: it prepares each request."""

    def __init__(self, connection: Connection, told: dict[str, Any]) -> None:
        self._connection, self._settings = connection, Settings(**told["settings"])
        settings = self._settings
        rooms = Rooms(settings.max_pixels, settings.max_decoded)
        preprocessing = Preprocessing(**told["preprocessing"])
        self.preparation = Preparation(preprocessing, rooms, settings.workers or cores())
        self._threads = ThreadPoolExecutor(settings.queue, "prepare")
        self._sending = threading.Lock()
        self._works: dict[int, Work] = {}

    def take(self) -> None:
        """Read a message, and begin what it asks for."""
        head = json.loads(self._connection.recv_bytes())
        if "forget" in head:
            work = self._works.get(head["forget"])
            if work is not None:
                work.abandon()
            return
        body = bytearray().join(self._connection.recv_bytes() for _ in range(head["pieces"]))
        work = self._works[head["number"]] = Work(head["seconds"])
        request = Request(body, head["content_type"], head["accept"], head["id"])
        self._threads.submit(self._answer, head["number"], request, work)

    def hangs(self) -> bool:
        """Return whether every decoding thread hangs."""
        return self.preparation.hangs(self._settings.seconds)

    def _answer(self, number: int, request: Request, work: Work) -> None:
        try:
            head, data = self._prepare(request, work)
        except Exception as error:
            failed = handler.failure(error, request.id)
            head, data = {"status": failed.status, "headers": {**failed.headers}}, failed.body
        del self._works[number]
        with self._sending, suppress(OSError):
            self._connection.send_bytes(json.dumps({"number": number, **head}).encode())
            self._connection.send_bytes(data)

    def _prepare(self, request: Request, work: Work) -> tuple[dict[str, Any], bytes]:
        began = time.monotonic()
        work.left()
        query = handler.read(request.body, request.content_type, self._settings)
        form = contract.choose(query, request.accept)
        with handler.collect(query, self._settings, work) as images:
            collecting = time.monotonic() - began
            pixels = np.stack([*self.preparation.pixels(images, work)])
        head = {"shape": pixels.shape, "output": form.output, "lines": form.lines}
        return head | {"top": query.top, "collecting": collecting}, pixels.tobytes()


def main() -> None:
    """Prepare the requests that the server sends, until it closes the connection."""
    with suppress(OSError):
        os.nice(NICENESS)
        # The process is in its own session, and Linux may divide the processor by session first.
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    log_to_stdout()
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        preparer = _Preparer(connection, json.loads(connection.recv_bytes()))
        spare_the_collector()
        while not preparer.hangs():
            if connection.poll(LOOK_SECONDS):
                preparer.take()
    # Python would wait for its threads, and one that hangs in a decoder can't be stopped.
    os._exit(0)


if __name__ == "__main__":
    main()
