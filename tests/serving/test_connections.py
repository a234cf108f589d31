"""What keeps the event loop free: no circles of closed connections, and large bodies in turns."""

import asyncio
import gc
import socket
import time
import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
import uvloop

from serving.app import GIVE_WAY_SECONDS, App, Slots, _Body
from serving.connections import Connections, Protocol
from serving.contract import seems_far
from serving.handler import Answer, Request, Settings
from serving.process import spare_the_collector


async def _application(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1"],
    ids=["nothing", "half a body"],
)
def test_a_closed_connection_leaves_nothing_to_the_collector(sent):
    made: list[weakref.ref[Any]] = []

    async def ask() -> None:
        app: Any = _application
        app.connections = Connections(8)
        config = uvicorn.Config(app, http=Protocol, log_config=None, interface="asgi3")
        config.load()
        config.app = config.loaded_app = app
        state = uvicorn.server.ServerState()

        def protocol() -> Protocol:
            opened = Protocol(config, state, {})
            made.append(weakref.ref(opened))
            return opened

        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        transport, _ = await loop.connect_accepted_socket(protocol, accepted)
        made.append(weakref.ref(transport))
        client.sendall(sent)
        while sent and not state.tasks:
            await asyncio.sleep(0)
        client.close()
        del transport, _, accepted
        while state.connections or state.tasks:
            await asyncio.sleep(0)
        for _ in range(5):  # what was scheduled meanwhile
            await asyncio.sleep(0)
        assert [each() for each in made] == [None, None]

    gc.disable()
    try:
        uvloop.run(ask())
    finally:
        gc.enable()


def test_one_large_body_goes_on_in_a_turn_of_the_event_loop():
    async def most_in_a_turn() -> int:
        app = waiting_app()
        gone_on = 0

        async def body() -> None:
            nonlocal gone_on
            await App._wait_for_turn(app)
            gone_on += 1

        bodies = [asyncio.ensure_future(body()) for _ in range(5)]
        most = before = 0
        while not all(each.done() for each in bodies):
            await asyncio.sleep(0)
            most, before = max(most, gone_on - before), gone_on
        return most

    assert asyncio.run(most_in_a_turn()) == 1


def waiting_app() -> Any:
    return SimpleNamespace(_turn=asyncio.Lock(), _slots=Slots(1), connections=Connections(1))


def test_a_large_body_waits_where_a_small_request_is_answered():
    async def seconds() -> float:
        app = waiting_app()
        with app._slots.working():
            waited = await seconds_waited(app)
        assert not app._slots.are_taken()
        return waited

    assert asyncio.run(seconds()) >= GIVE_WAY_SECONDS - time.get_clock_info("monotonic").resolution


def test_a_large_body_waits_where_a_connection_has_just_come(monkeypatch: pytest.MonkeyPatch):
    async def seconds() -> float:
        app = waiting_app()
        app.connections.add(cast(Protocol, object()))
        return await seconds_waited(app)

    monkeypatch.setattr("serving.app.GIVE_WAY_SECONDS", 0.2)
    assert asyncio.run(seconds()) >= 0.19


async def seconds_waited(app: Any) -> float:
    began = time.perf_counter()
    await App._wait_for_turn(app)
    return time.perf_counter() - began


def test_a_piece_of_a_large_body_is_not_copied():
    connection: Any = SimpleNamespace(_come=bytes(1 << 18), _is_whole=False, _left=1 << 20)
    come = connection._come
    assert Protocol._next_piece(connection) is come
    assert connection._come == b""


@pytest.mark.parametrize(
    ("body", "is_far"),
    [
        (b'{"url": "https://a.example/1.jpg"}', True),
        (b'{"instances": [{"s3" : "s3://bucket/1.jpg"}]}', True),
        (b'{"url": "data:image/jpeg;base64,AAAA"}', False),
        (b'{"url": "Data:image/jpeg;base64,AAAA"}', False),
        (b'{"base64": "AAAA"}', False),
    ],
)
def test_a_picture_elsewhere_is_known_before_its_body_is_parsed(body: bytes, is_far: bool):
    assert seems_far(body) == is_far


def test_a_picture_elsewhere_takes_no_thread_until_it_has_come():
    async def answered(content: bytes) -> tuple[Answer, int]:
        threads = 0

        async def in_thread(*_: object) -> Answer:
            nonlocal threads
            threads += 1
            return Answer(200, b"here")

        async def prepare(*_: object) -> Answer:
            return Answer(200, b"aside")

        app: Any = SimpleNamespace(
            _settings=Settings(),
            _slots=Slots(1),
            _worker=SimpleNamespace(prepare=prepare),
            _in_thread=in_thread,
        )
        body = _Body()
        body.chunks, body.size = [content], len(content)
        with app._slots.working():
            answer = await App._work(app, Request(b"", "", "", "mine"), body, asyncio.Event().wait)
        return answer, threads

    far, threads = asyncio.run(answered(b'{"url": "https://a.example/1.jpg"}'))
    assert (far.body, threads) == (b"aside", 0)
    near, threads = asyncio.run(answered(b'{"base64": "AAAA"}'))
    assert (near.body, threads) == (b"here", 1)


def test_collections_leave_out_what_the_libraries_have_made():
    gc.unfreeze()
    spare_the_collector()
    assert gc.get_freeze_count() > 1000
