"""The process beside our own server that prepares requests which take long.

Those are large bodies, pictures that other machines have, and large pictures: parsed, fetched and
decoded here, in a process with a Python lock of its own and a lower priority, they hold up no small
picture. (In threads of the server they did: whoever answers needs the lock several times, and
waits each time for whoever holds it.) A decoder that hangs or crashes takes this process along,
not the server, which starts another.

The two talk over a socket, in JSON and bytes. The server believes nothing that comes back to be
more than that.
"""

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
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
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
from serving.process import ARENAS, LARGE_BLOCK, log_to_stdout, spare_the_collector
from serving.work import Abandoned, Work
from trainer.common import sessions
from trainer.common.cpu import cores
from trainer.images.decode import Preprocessing

log = logging.getLogger("packhorse.serving")

NICENESS = 5  # a third of the processor that the server gets (sched(7))
LATE_SECONDS = 1.0  # after its deadline, for the answer that says so
LOOK_SECONDS = 0.5  # between two looks whether the other one hangs
OVERDUE_SECONDS = 10.0  # after a deadline: a process that has said nothing by then is ended
LOST = "the process that decodes had to be started again; try again"


@dataclass(frozen=True)
class Prepared:
    """A request whose pictures are decoded."""

    pixels: Sequence[NDArray[np.uint8]]  # of each image, [size, size, 3]
    form: Form
    top: int
    collecting: float  # seconds until all files were there


class Worker:
    """The process, as the server sees it: there is always one."""

    def __init__(self, preprocessing: Preprocessing, settings: Settings) -> None:
        """Start it. settings: the server's."""
        told = {"preprocessing": asdict(preprocessing), "settings": asdict(settings)}
        self._told = json.dumps(told).encode()
        self._lock = threading.Lock()
        self._life = _Life(self._told)

    def prepare(self, request: Request, body: list[bytes], work: Work) -> Prepared | Answer:
        """Return a request with its pictures decoded, or the answer that says what is wrong.

        body: the request's, in pieces, which are given away. Raises TimeoutError at the deadline,
        Abandoned, and RequestError where the process has ended meanwhile, whatever the process
        does.
        """
        with self._lock:
            if self._life.is_over():
                self._life = _Life(self._told)
            life = self._life
        number, asked = life.ask(request, body, work)
        try:
            return asked.result(work.left() + LATE_SECONDS)
        except CancelledError as error:
            raise Abandoned from error
        finally:
            body.clear()
            life.forget(number)


class _Life:
    """One life of the process, from its start to its end."""

    def __init__(self, told: bytes) -> None:
        """Start it. told: what `main` reads first."""
        ours, its = socket.socketpair()
        with its:
            self._process = sessions.Child(
                [*sessions.python(), "-m", "serving.worker", str(its.fileno())],
                pass_fds=[its.fileno()],
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OPENBLAS_NUM_THREADS": "1",
                    # As `process.share_memory_and_threads`.
                    "MALLOC_ARENA_MAX": str(ARENAS),
                    "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK),
                },
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        # What it has not answered, each with the end of its time.
        self._asked: dict[int, tuple[Future[Prepared | Answer], float]] = {}
        self._heard = time.monotonic()  # when it said something
        self._is_over = False
        # Messages, each a head and a body in pieces; None is the end.
        self._messages: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]] | None]
        self._messages = queue.SimpleQueue()
        self._connection.send_bytes(told)
        self._sender = threading.Thread(target=self._send, name="to worker", daemon=True)
        self._sender.start()
        threading.Thread(target=self._read, name="worker", daemon=True).start()

    def is_over(self) -> bool:
        """Return whether it has ended."""
        return self._is_over

    def ask(
        self, request: Request, body: list[bytes], work: Work
    ) -> "tuple[int, Future[Prepared | Answer]]":
        """Have a request prepared; return its number, and what will have it. Raise RequestError."""
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
        """Say that nobody waits for a request's answer, where there is none yet."""
        with self._lock:
            future, _ = self._asked.get(number, (None, 0.0))
        if future is not None:
            future.cancel()
            self._messages.put(({"forget": number}, []))

    def _send(self) -> None:
        """Send messages until the last one: whoever asks waits for no process that reads nothing.

        That it has ended, `_read` sees too.
        """
        with suppress(OSError):
            while message := self._messages.get():
                self._send_one(*message)

    def _send_one(self, head: dict[str, Any], body: list[bytes]) -> None:
        pieces = body.copy()
        body.clear()  # it will be there, and not here too
        self._connection.send_bytes(json.dumps(head | {"pieces": len(pieces)}).encode())
        for piece in pieces:
            self._connection.send_bytes(piece)

    def _read(self) -> None:
        """Take what it answers, until it ends. What is overdue is ended with it."""
        try:
            while True:
                if self._connection.poll(LOOK_SECONDS):
                    head = json.loads(self._connection.recv_bytes())
                    self._take(head, self._connection.recv_bytes())
                elif self._is_overdue():
                    log.error("the process that decodes hangs: it is ended, and another started")
                    self._process.kill()
        except (EOFError, OSError):
            pass  # it has ended
        except Exception as error:  # a decoder that was made to run something else may say anything
            log.error("the process that decodes answers nonsense: it is ended", exc_info=error)
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
    """The other side: what the process does with each request."""

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
        """Take a message in, and begin with what it asks."""
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
        """Return whether nothing is decoded any more."""
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
    """Prepare what the server sends, until it closes its end."""
    with suppress(OSError):
        os.nice(NICENESS)
        # It is a session of its own, and Linux may share the processor among sessions first.
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
