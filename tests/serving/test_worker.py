"""The process that prepares what takes long: where it hangs or is killed, the server goes on."""

import asyncio
import json
import os
import signal
import threading
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

from serving import worker as worker_module
from serving.fetch import RequestError
from serving.handler import Answer, Request, Settings
from serving.work import Abandoned, Work
from serving.worker import Prepared, Worker
from tests.conftest import wait_for
from tests.serving.conftest import Server


@pytest.fixture(scope="module")
def worker(engine) -> Worker:
    return Worker(engine.package.preprocessing, Settings(urls=False, workers=1))


def asked(body: bytes, pieces: int = 3) -> tuple[Request, list[bytes]]:
    size = len(body) // pieces + 1
    parts = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return Request(b"", "", "application/json; output=labels", "mine"), parts


def prepare(worker: Worker, request: Request, body: list[bytes], work: Work) -> Prepared | Answer:
    return asyncio.run(worker.prepare(request, body, work))


def pid_of(worker: Worker) -> int:
    return worker._life._process.pid


def test_it_prepares_as_the_server_would(worker, engine, picture):
    body = json.dumps({"instances": [{"base64": b64encode(picture).decode()}] * 2, "top": 2})
    prepared = prepare(worker, *asked(body.encode()), Work(600))
    assert isinstance(prepared, Prepared)
    assert (prepared.form.output, prepared.top) == ("labels", 2)
    for pixels in prepared.pixels:
        np.testing.assert_array_equal(pixels, engine.package.prepare(picture))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"no picture", 400, "can't be read"),
        (b'{"url": "http://a.example"}', 400, "does not fetch"),
        (b'{"a": [' + b"[]," * 20_000, 400, "more than 16,384 values"),
    ],
)
def test_what_is_wrong_is_the_answer_that_the_server_would_give(worker, body, status, said):
    answer = prepare(worker, *asked(body), Work(600))
    assert isinstance(answer, Answer) and answer.status == status
    told = json.loads(answer.body)
    assert said in told["error"] and told["request_id"] == "mine"


def test_where_it_is_killed_who_waits_is_told_and_the_next_one_has_another(worker, picture):
    before = pid_of(worker)
    os.kill(before, signal.SIGSTOP)
    failed: list[int] = []

    def ask() -> None:
        with pytest.raises(RequestError) as caught:
            prepare(worker, *asked(picture), Work(600))
        failed.append(caught.value.status)

    waiting = [threading.Thread(target=ask) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert wait_for(lambda: len(worker._life._asked) == 3)
    os.kill(before, signal.SIGKILL)
    for thread in waiting:
        thread.join()
    assert failed == [503] * 3
    assert isinstance(prepare(worker, *asked(picture), Work(600)), Prepared)
    assert pid_of(worker) != before


def test_one_that_hangs_is_ended_after_the_deadline(worker, picture, monkeypatch):
    """Also where whoever asked has been told at the deadline, and waits no more."""
    monkeypatch.setattr(worker_module, "OVERDUE_SECONDS", 1.0)
    monkeypatch.setattr(worker_module, "LATE_SECONDS", 0.0)
    before = pid_of(worker)
    os.kill(before, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        prepare(worker, *asked(picture), Work(0.5))
    assert wait_for(worker._life.is_over)
    assert isinstance(prepare(worker, *asked(picture), Work(600)), Prepared)
    assert pid_of(worker) != before


@pytest.fixture
def stopped(worker, picture):
    """One that takes nothing in."""
    assert isinstance(prepare(worker, *asked(picture), Work(600)), Prepared)  # another may begin
    pid = pid_of(worker)
    os.kill(pid, signal.SIGSTOP)
    yield worker
    os.kill(pid, signal.SIGCONT)
    assert wait_for(lambda: not worker._life._asked)  # each is answered, wanted or not


@pytest.mark.parametrize("size", [0, 8 << 20], ids=["small", "more than its pipe holds"])
def test_who_hangs_up_waits_for_nothing(stopped, picture, size):
    work = Work(600)
    threading.Timer(0.1, work.abandon).start()
    request, body = asked(picture + bytes(size))
    with pytest.raises(Abandoned):
        prepare(stopped, request, body, work)
    assert not body  # nobody's body is kept


def test_the_deadline_holds_where_its_pipe_is_full(stopped, picture):
    for _ in range(2):  # the second one can't be sent at all
        with pytest.raises(TimeoutError):
            prepare(stopped, *asked(picture + bytes(8 << 20)), Work(0.2))


def test_one_that_answers_nonsense_is_ended(worker, picture, monkeypatch):
    life = worker._life
    monkeypatch.setattr(type(life), "_take", lambda *_: {}["nothing"])
    with pytest.raises(RequestError, match="restart its decoding process"):
        prepare(worker, *asked(picture), Work(600))
    assert life.is_over()


def child_of(server: Server) -> int:
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    [child] = [int(pid) for task in tasks for pid in task.read_text().split()]
    return child


def test_where_it_hangs_the_server_says_so_at_the_deadline(original, tmp_path):
    server = Server(tmp_path / "log.txt", str(original / "package"), "--seconds", "0.5")
    child = child_of(server)
    try:
        os.kill(child, signal.SIGSTOP)
        reply = server.invoke_json({"url": "http://a.example/1.jpg"})
        assert reply.status == 503 and "in time" in reply.json["error"]
        assert reply.headers["Retry-After"]
    finally:
        os.kill(child, signal.SIGCONT)
        server.kill()


def test_the_server_ends_it_with_itself(original, tmp_path):
    server = Server(tmp_path / "log.txt", str(original / "package"))
    try:
        child = child_of(server)
    finally:
        server.kill()
    assert wait_for(lambda: not Path(f"/proc/{child}").exists())
