import asyncio
import errno
import http.client
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from serving import app as app_module
from serving import connections
from serving import server as server_module
from serving.handler import Settings
from serving.names import known_hosts
from serving.serve import main as serve_main
from tests import hostile
from tests.conftest import PROJECT, wait_for
from tests.packages import CLASSES
from tests.ports import free_port
from tests.serving.conftest import Server
from tests.serving.runtime import PUBLIC, Web
from tests.serving.test_package import change_weights, edit, edit_preprocessing, seal
from trainer.common.errors import OK, UserError


def test_a_picture_gets_its_logits_over_http(server, picture, expected):
    reply = server.invoke(picture)
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["X-Request-Id"])
    assert re.fullmatch(r"collect;dur=[\d.]+, predict;dur=[\d.]+", reply.headers["Server-Timing"])
    np.testing.assert_allclose(reply.json, expected[:1], rtol=0, atol=1e-5)


def test_labels_and_json(server, picture):
    [row] = server.invoke(picture, Accept="application/json; output=labels").json
    assert {entry["label"] for entry in row["labels"]} == set(CLASSES)
    refused = server.invoke_json(
        {"url": "http://169.254.169.254/latest/meta-data/"}, X_Request_Id="mine-1"
    )
    assert (
        refused.status == 400
        and refused.json["request_id"] == refused.headers["X-Request-Id"] == "mine-1"
    )
    assert (
        "169.254.169.254 has the address 169.254.169.254" in server.log.read_text()
    )  # told to the log, and not to the caller


def test_what_else_there_is(server):
    assert server.ask("GET", "/ping").status == 200
    page = server.ask("GET", "/")
    assert (
        page.status == 200
        and "script-src 'sha256-" in page.headers["Content-Security-Policy"]
        and b"<!doctype html>" in page.body
    )
    card = server.ask("GET", "/card").json
    assert (
        card["classes"] == list(CLASSES)
        and card["metrics"]["test_top1"] == 0.875
        and card["revision"] == "0123abc"
    )
    for method, path, status in (
        ("GET", "/invocations", 405),
        ("POST", "/ping", 405),
        ("PUT", "/", 405),
        ("GET", "/x", 404),
        ("GET", "/../x", 404),
    ):
        reply = server.ask(method, path)
        assert reply.status == status and reply.json["request_id"] == reply.headers["X-Request-Id"]


def test_head_is_answered_as_get_without_a_body(server):
    for path in ("/", "/card", "/metrics", "/ping"):
        reply = server.ask("HEAD", path)
        assert (reply.status, reply.body) == (200, b"") and int(reply.headers["Content-Length"])


def test_a_name_that_is_not_ours_is_refused_where_only_this_machine_is_listened_to(server):
    for name in (
        f"localhost:{server.port}",
        "LOCALHOST",
        "127.0.0.1:1",
        "[::1]:8080",
        "localhost.",
    ):
        assert server.ask("GET", "/card", Host=name).status == 200
    for name in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.nip.io", "10.0.0.1", ""):
        for path in ("/", "/card", "/metrics", "/nothing"):
            assert server.ask("GET", path, Host=name).status == 421
        assert server.invoke(b"", Host=name).status == 421
    assert server.ask("GET", "/ping", Host="10.0.0.1").status == 200  # as load balancers do


@pytest.mark.parametrize(
    ("host", "names", "known"),
    [
        ("127.0.0.1", "", {"localhost", "127.0.0.1", "::1"}),
        ("::1", "", {"localhost", "127.0.0.1", "::1"}),
        ("127.0.0.2", "", {"localhost", "127.0.0.1", "::1", "127.0.0.2"}),
        ("0.0.0.0", "", set()),
        ("192.168.0.5", "", set()),
        ("0.0.0.0", "A.example, [::1]", {"a.example", "::1"}),
        ("127.0.0.1", "*", set()),
    ],
)
def test_which_names_a_server_goes_by(host, names, known):
    assert known_hosts(host, Settings(hosts=names).hosts) == known


def test_whose_pages_may_read_answers_is_a_setting(start, original, picture):
    server = start(str(original / "package"), "--origins", "https://a.example,https://b.example")
    for origin, allowed in (("https://b.example", "https://b.example"), ("https://c", None)):
        asked = server.ask("OPTIONS", "/invocations", Origin=origin)
        assert asked.status == 204
        for reply in (
            asked,
            server.invoke(picture, Origin=origin),
            server.invoke(b"", Origin=origin),
        ):
            assert reply.headers["Access-Control-Allow-Origin"] == allowed
            assert reply.headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Origin" not in server.ask("GET", "/card").headers


def test_metrics_count_requests(server, picture):
    def count(status: int) -> float:
        line = re.search(
            rf'packhorse_requests_total{{status="{status}"}} ([\d.]+)',
            server.ask("GET", "/metrics").body.decode(),
        )
        return float(line[1]) if line else 0

    before = count(200), count(400)
    server.invoke(picture)
    server.invoke(b"no picture")
    assert (count(200), count(400)) == (before[0] + 1, before[1] + 1)
    text = server.ask("GET", "/metrics").body.decode()
    assert (
        "process_resident_memory_bytes" in text and 'packhorse_batch_size_bucket{le="1.0"}' in text
    )


def test_one_connection_serves_many_requests(server, picture):
    connection = server.connect()
    for body, status in ((picture, 200), (b"x", 400), (picture, 200)):
        connection.request("POST", "/invocations", body, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        assert answer.status == status
        answer.read()
    connection.close()


# --- limits ---


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(server, picture, chunked):
    body = iter([b"x" * 100_000] * 11) if chunked else b"x" * 1_100_000
    connection = server.connect()
    connection.request(
        "POST", "/invocations", body, {"Content-Type": "image/jpeg"}, encode_chunked=chunked
    )
    answer = connection.getresponse()
    assert (
        answer.status == 413
        and b"allowed" in answer.read()
        and b"1,000,000" in server.invoke(b"x" * 1_000_001).body
    )
    connection.close()
    assert server.invoke(picture).status == 200


def test_a_picture_of_too_many_pixels_is_refused_without_being_decoded(server, tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    before = server.memory()
    reply = server.invoke((tmp_path / "bomb.png").read_bytes(), "image/png")
    assert reply.status == 400 and "too many" in reply.json["error"]
    assert server.memory() < before + (30 << 20)


def test_a_file_that_would_take_minutes_is_refused_and_holds_up_nobody(server, picture):
    for name, (make, reason) in hostile.REFUSED.items():
        body = make()
        if len(body) <= 1_000_000:  # what this server takes
            reply = server.invoke(body, "application/octet-stream")
            assert reply.status == 400 and reason in reply.json["error"], (name, reply.body)
    assert server.invoke(picture).status == 200


POST = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01",  # TLS
        b"GET / HTTP/1.1\r\nHost: a\r\nA\x00: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 40_000,
        b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 40_000 + b"\r\n\r\n",
        # How long a body is, in two ways or in none.
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: +1\r\n\r\n1",
        POST + b"Content-Length: 1, 1\r\n\r\n1",
        POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n1",
        POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"1\nx\r\n0\r\n\r\n",
        CHUNKED + b"1 \r\nx\r\n0\r\n\r\n",
        CHUNKED + b"0\r\nA: " + b"a" * 40_000,  # behind the body
        CHUNKED + b"1;" + b"a" * 40_000,
    ],
    ids=lambda request_: repr(request_[-60:])[2:-1],
)
def test_what_is_no_http_gets_400_as_json(server, request_):
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(request_)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 400 and len(json.loads(answer.read())["request_id"]) == 32
        assert not connection.recv(1)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_requests_that_are_sent_in_advance_are_answered_in_turn(server, size):
    sent = (
        b"\r\n"
        + (POST + b"Content-Length: 8\r\n\r\n\r\n\r\n\r\n\r\n")
        + b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
        + (POST + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 1\r\n\r\n1")
        + b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
        + (CHUNKED + b"3\r\n\r\n1\r\n0\r\n\r\n")
    )
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), size):
            connection.sendall(sent[start : start + size])
        assert statuses_of(connection, 5) == [400, 200, 400, 404, 400]


def test_what_follows_a_chunked_body_neither_changes_nor_joins_its_request(server, picture):
    """Fields behind it, and a request that came with it: after the answer the connection ends."""
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(picture), picture)
    trailer = b"Accept: application/json; output=labels\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(CHUNKED + chunk + trailer + b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert isinstance(json.loads(answer.read())[0][0], float)
        assert not connection.recv(1)


def statuses_of(connection: socket.socket, count: int) -> list[int]:
    """The statuses of so many answers, one after the other."""
    statuses = []
    with connection.makefile("rb") as file:
        for _ in range(count):
            statuses.append(int(file.readline().split()[1]))
            headers = http.client.parse_headers(file)
            file.read(int(headers["Content-Length"]))
    return statuses


# The decoder of GIF hangs in this server, until there is a file.
HANG = """
import os, time
from PIL import GifImagePlugin
prepare = GifImagePlugin.GifImageFile.load_prepare
def hang(self):
    while not os.path.exists(RELEASED):
        time.sleep(0.01)
    prepare(self)
GifImagePlugin.GifImageFile.load_prepare = hang
"""
GIF = hostile.encoded(Image.new("RGB", (48, 32)), "GIF")


@pytest.fixture
def start_hanging(start, original, tmp_path):
    """Starts a server in which a GIF hangs until the path `released`, beside it, is there."""

    def start_hanging(*options: str) -> Server:
        script = HANG.replace("RELEASED", repr(str(tmp_path / "released")))
        (tmp_path / "sitecustomize.py").write_text(script)
        package = str(original / "package")
        return start(package, *options, PYTHONPATH=f"{tmp_path}:{PROJECT}")

    return start_hanging


def in_progress(server: Server, count: int) -> bool:
    metric = f"packhorse_requests_in_progress {count}.0".encode()
    return metric in server.ask("GET", "/metrics").body


def half_a_request(server: Server, size: int) -> http.client.HTTPConnection:
    """A connection whose request's body has come but for its last byte."""
    connection = server.connect()
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Length", str(size))
    connection.endheaders(bytes(size - 1))
    return connection


def test_whole_requests_beyond_the_queue_get_503_and_when_to_try_again(
    start_hanging, picture, tmp_path
):
    server = start_hanging("--queue", "2", "--seconds", "600", "--workers", "1")
    unfinished = [half_a_request(server, 1000) for _ in range(5)]  # they hold up nobody
    assert wait_for(lambda: in_progress(server, 5))
    assert server.invoke(picture).status == 200
    replies = []
    ask = lambda: replies.append(server.invoke(GIF).status)  # noqa: E731
    waiting = [threading.Thread(target=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    assert wait_for(lambda: in_progress(server, 7))
    assert wait_for(lambda: server.invoke(picture).status == 503)
    refused = server.invoke(picture)
    assert refused.headers["Retry-After"] == "1" and "request_id" in refused.json
    assert server.ask("GET", "/ping").status == 200
    (tmp_path / "released").touch()
    for thread in waiting:
        thread.join()
    assert replies == [200, 200]
    for connection in unfinished:
        connection.send(b"x")
        assert connection.getresponse().status == 400  # no picture, but an answer
        connection.close()


def test_a_slow_picture_holds_up_no_quick_one(start_hanging, picture):
    """Its thread is replaced, until too many hang: then /ping says so, and the drain is in time."""
    server = start_hanging("--seconds", "1", "--workers", "1")
    for _ in range(3):  # the first thread, and the two that may be replaced
        assert server.ask("GET", "/ping").status == 200
        assert server.invoke(picture).status == 200
        assert server.invoke(GIF).status == 503
    assert server.invoke(picture).status == 503
    assert wait_for(lambda: server.ask("GET", "/ping").status == 503)
    assert server.stop() == 0


def test_what_a_client_has_asked_that_hung_up_is_not_done(start_hanging, picture, tmp_path):
    server = start_hanging("--queue", "8", "--seconds", "600", "--workers", "1")
    asked = []
    for _ in range(8):
        connection = server.connect()
        connection.request("POST", "/invocations", GIF)
        asked.append(connection)
    assert wait_for(lambda: server.invoke(picture).status == 503)
    for connection in asked:
        connection.close()
    assert wait_for(lambda: in_progress(server, 0))
    assert server.invoke(picture).status == 200  # their slots are free again
    (tmp_path / "released").touch()
    metrics = server.ask("GET", "/metrics").body.decode()
    assert 'packhorse_requests_total{status="499"} 8.0' in metrics
    assert "packhorse_batch_size_count 1.0" in metrics  # the network saw the good one alone


def test_bodies_that_do_not_come_to_their_end_make_room_for_those_that_do(start, original, picture):
    server = start(str(original / "package"))
    size = 16 << 20
    before = server.memory("VmHWM")
    unfinished = [half_a_request(server, size) for _ in range(6)]  # 64 MB are held at most
    assert server.invoke(picture + bytes(1 << 20)).status == 200
    statuses = [connection.getresponse().status for connection in unfinished[:2]]
    assert statuses == [503, 503]
    unfinished[-1].send(b"x")
    assert unfinished[-1].getresponse().status == 400
    assert server.memory("VmHWM") < before + (200 << 20)
    for connection in unfinished:
        connection.close()


def test_connections_that_ask_nothing_make_room_for_those_that_do(start, original, picture):
    server = start(str(original / "package"), "--connections", "8")
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    asked_once = [server.connect() for _ in range(20)]
    for connection in asked_once:
        connection.request("GET", "/ping")
        assert connection.getresponse().read() == b'{"status": "healthy"}'
    unfinished = [half_a_request(server, 100) for _ in range(20)]
    for _ in range(3):
        assert server.invoke(picture).status == 200
        assert server.ask("GET", "/ping").status == 200
    for connection in (*silent, *asked_once, *unfinished):
        connection.close()


def test_where_open_files_run_out_one_line_says_so(original, picture, tmp_path):
    server = Server(tmp_path / "log.txt", str(original / "package"))
    try:
        # Fewer than it saw when it started, so that its own limit of connections is no help.
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (100, 100))
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
        assert server.invoke(picture).status == 200
        for connection in silent:
            connection.close()
        log = server.log.read_text()
        assert "Traceback" not in log and log.count("no connection can be accepted") == 1
    finally:
        server.kill()


# Public addresses lead to a web server here.
REDIRECT = """
import socket
connect = socket.create_connection
def redirect(address, *rest, **more):
    return connect(("127.0.0.1", WEB_PORT) if address[0] == PUBLIC else address, *rest, **more)
socket.create_connection = redirect
"""


def test_fetched_pictures_have_a_bound_in_sum(start, original, picture, tmp_path):
    with Web() as web:
        redirect = REDIRECT.replace("WEB_PORT", str(web.port)).replace("PUBLIC", repr(PUBLIC))
        # A busy machine has as long as it needs.
        patient = "import serving.handler\nserving.handler.FETCH_SECONDS = 600\n"
        (tmp_path / "sitecustomize.py").write_text(redirect + patient)
        options = ("--seconds", "600")
        server = start(str(original / "package"), *options, PYTHONPATH=f"{tmp_path}:{PROJECT}")
        web.files = {"/large": bytes(16 << 20), "/small": picture}
        large = {"instances": [{"url": f"http://{PUBLIC}/large"}] * 16}
        before = server.memory("VmRSS")
        replies = []
        ask = lambda: replies.append(server.invoke_json(large))  # noqa: E731
        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        # 2 GiB were asked for: 64 MiB is what a request may hold, 128 MiB what all of them may.
        assert server.memory("VmHWM") < before + (256 << 20)
        for reply in replies:
            assert reply.status in (413, 503), reply.body
            assert ("Retry-After" in reply.headers) == (reply.status == 503)
        alone = server.invoke_json(large)
        assert alone.status == 413 and "more than 67,108,864 bytes" in alone.json["error"]
        small = {"instances": [{"url": f"http://{PUBLIC}/small"}] * 16}
        assert server.invoke_json(small).status == 200  # all that was held was given back


def test_one_slow_url_does_not_hold_up_the_others(start, original, picture, tmp_path):
    """The resolver of this server hangs for one name, as a slow name server would make it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\nask = socket.getaddrinfo\n"
        "def getaddrinfo(host, *rest, **more):\n"
        "    time.sleep(8 if host == 'slow.example' else 0)\n"
        "    return ask(host, *rest, **more)\n"
        "socket.getaddrinfo = getaddrinfo\n"
    )
    server = start(
        str(original / "package"), "--seconds", "1.5", PYTHONPATH=f"{tmp_path}:{PROJECT}"
    )
    replies: list[int] = []
    slow = [
        threading.Thread(
            target=lambda: replies.append(
                server.invoke_json({"url": "http://slow.example/"}).status
            )
        )
        for _ in range(8)
    ]
    for thread in slow:
        thread.start()
    assert wait_for(
        lambda: b"packhorse_requests_in_progress 8.0" in server.ask("GET", "/metrics").body
    )
    assert server.invoke(picture).status == 200
    assert not replies
    for thread in slow:
        thread.join()
    assert len(replies) == 8 and {*replies} <= {400, 503}


@pytest.fixture
def impatient(engine, monkeypatch):
    """The port of a server in this process that waits 0.25 s for a head and 0.5 s for a body."""
    monkeypatch.setattr(connections, "SWEEP_SECONDS", 0.05)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.25)
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.25)
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.5)
    made = server_module.make(engine.package, engine, Settings(queue=8), "127.0.0.1")
    address = server_module.bind("127.0.0.1", 0)
    thread = threading.Thread(target=made.run, args=([address],))
    thread.start()
    assert wait_for(lambda: made.started)
    yield address.getsockname()[1]
    made.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    "before",
    [b"", b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["first request", "second request"],
)
def test_a_connection_whose_head_trickles_is_closed(impatient, before):
    with socket.create_connection(("127.0.0.1", impatient), 5) as connection:
        connection.sendall(before + b"POST /invocations HTTP/1.1\r\nA: ")
        assert wait_for(lambda: is_closed(connection))


def is_closed(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"a")
    except OSError:
        return True
    return False


def test_a_connection_whose_answers_nobody_reads_is_closed(impatient):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", impatient))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)

        assert wait_for(lambda: is_closed(connection))


def test_a_connection_between_two_requests_is_kept(impatient, picture):
    connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=600)
    connection.request("GET", "/ping")
    connection.getresponse().read()
    kept = connection.sock
    time.sleep(1.0)  # several times what a head may take
    connection.request("POST", "/invocations", picture, {"Content-Type": "image/jpeg"})
    assert connection.getresponse().status == 200 and connection.sock is kept
    connection.close()


def test_a_body_that_does_not_come_gets_408(impatient):
    connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=600)
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"a")
    answer = connection.getresponse()
    assert answer.status == 408 and b"did not arrive" in answer.read()
    connection.close()


# --- health ---


def unsealed(package: Path) -> None:
    edit_preprocessing(package, interpolation="bicubic")


def interpolation(package: Path) -> None:
    edit_preprocessing(package, interpolation="bicubic")
    seal(package)


def weight(package: Path) -> None:
    def nudge(weights: np.ndarray) -> np.ndarray:
        changed = weights.copy()
        changed.flat[np.abs(changed).argmax()] *= 3
        return changed

    change_weights(package, nudge)
    seal(package)


def order(package: Path) -> None:
    edit(package, classes=["dog", "café", "hen"])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unsealed, "package.json was changed"),
        (interpolation, "pixel values are off"),
        (order, "package.json was changed"),
        (weight, "logits are off"),
        (
            lambda package: change_weights(package, lambda weights: -weights),
            "model.onnx was changed",
        ),
    ],
)
def test_a_changed_package_never_becomes_healthy(original, tmp_path, harm, message):
    package = Path(shutil.copytree(original / "package", tmp_path / "package"))
    harm(package)
    port = free_port()
    command = [sys.executable, "-m", "serving", "serve", str(package), "--port", str(port)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert "running" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.tar.gz"], "nowhere.tar.gz: there is no such file or directory"),
        ([], "runs/: there is no model package; train one (make train)"),
        (["--urls", "maybe", "x"], "--urls=maybe is not allowed; allowed: on or off"),
        (["--max-body", "1e6", "x"], "--max-body=1e6 is not allowed; allowed: a whole number"),
        (["--batch", "0", "x"], "--batch=0 is not allowed; allowed: a whole number from 1 to"),
        (["--seconds", "nan", "x"], "--seconds=nan is not allowed; allowed: a number from 0.1"),
        (
            ["--workers", "-1", "x"],
            "--workers=-1 is not allowed; allowed: a whole number from 0 to",
        ),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "serving", "serve", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


# --- the end ---


def test_sigterm_under_load_answers_every_accepted_request(start, original, picture):
    """None of the clients may lose an answer.

    They go on until they are told that the connection ends, or none is to be had.
    """
    server = start(str(original / "package"))
    statuses: list[int] = []
    lost: list[str] = []

    def ask_on(keep: bool) -> None:
        connection = server.connect()
        while True:
            try:
                connection.connect() if connection.sock is None else None
            except ConnectionRefusedError:
                return
            try:
                connection.request(
                    "POST",
                    "/invocations",
                    picture,
                    {"Content-Type": "image/jpeg"} | ({} if keep else {"Connection": "close"}),
                )
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                return
            statuses.append(answer.status)
            if keep and answer.headers["Connection"] == "close":
                return

    clients = [threading.Thread(target=ask_on, args=(number % 4 > 0,)) for number in range(8)]
    for client in clients:
        client.start()
    assert wait_for(lambda: len(statuses) > 30)
    began = time.monotonic()
    code = server.stop()
    for client in clients:
        client.join()
    assert not lost and set(statuses) == {200}
    assert code == 0 and time.monotonic() - began < 20


def test_no_connection_begins_once_new_ones_are_refused(engine):
    """Else one could begin after the last was accepted, and closing the listener would reset it."""
    with server_module.bind("127.0.0.1", 0) as listener, socket.socket() as late:
        listener.listen()
        begun = socket.create_connection(listener.getsockname())
        server_module.refuse_new(listener)
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.connect(listener.getsockname())
        accepted, _ = listener.accept()
        begun.sendall(b"asked")
        assert accepted.recv(5) == b"asked"
        accepted.close()
        begun.close()


@pytest.fixture
def ending(engine):
    """A server in this process, and its port; it is told to end, and ends."""
    made = server_module.make(engine.package, engine, Settings(queue=8), "127.0.0.1")
    address = server_module.bind("127.0.0.1", 0)
    thread = threading.Thread(target=made.run, args=([address],))
    thread.start()
    assert wait_for(lambda: made.started)
    yield made, address.getsockname()[1]
    made.should_exit = True
    thread.join()


@pytest.mark.parametrize("before", [b"", b"POST /invocations HTTP/1.1\r\nHo"])
def test_a_request_that_comes_late_in_an_accepted_connection_is_answered(
    ending, monkeypatch, before
):
    made, port = ending
    monkeypatch.setattr(connections, "LATE_SECONDS", 600.0)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 600.0)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(before)
        made.should_exit = True
        assert wait_for(lambda: not listens(port))
        connection.sendall(POST[len(before) :] + b"Content-Length: 1\r\n\r\n1")
        assert statuses_of(connection, 1) == [400]
        assert not connection.recv(1)


def test_connections_that_ask_nothing_do_not_keep_it_from_its_end(ending, monkeypatch):
    made, port = ending
    monkeypatch.setattr(connections, "LATE_SECONDS", 0.0)
    with (
        socket.create_connection(("127.0.0.1", port)) as fresh,
        socket.create_connection(("127.0.0.1", port)) as used,
    ):
        used.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        assert statuses_of(used, 1) == [200]
        made.should_exit = True
        assert not fresh.recv(1) and not used.recv(1)


def test_a_request_on_its_way_at_sigterm_is_still_read_and_answered(start, original, picture):
    server = start(str(original / "package"))
    connection = server.connect()
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Length", str(len(picture)))
    connection.endheaders(picture[:100])
    assert wait_for(
        lambda: b"packhorse_requests_in_progress 1.0" in server.ask("GET", "/metrics").body
    )
    server.process.terminate()
    assert wait_for(
        lambda: server.ask("GET", "/ping").status == 503
    )  # whoever balances the load is told
    connection.send(picture[100:])
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert server.process.wait(600) == 0


def test_a_port_that_is_taken_is_told_before_the_package_is_read(tmp_path, server):
    """In one line, as other mistakes are; here in this process."""
    for words, said in (
        (["--port", str(server.port)], f"--port {server.port}: address already in use; give"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid: this is not an address"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7 --port 8080: cannot assign requested"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            serve_main(["serve", str(tmp_path / "nothing"), *words])


def test_an_address_that_another_took_while_the_package_was_read_is_told(engine):
    """Two servers that are started at once both have it, before either listens."""
    ours = server_module.bind("127.0.0.1", 0)
    port = ours.getsockname()[1]
    with ours, server_module.bind("127.0.0.1", port) as other:
        other.listen()
        with pytest.raises(UserError, match=f"--port {port}: address already in use; give"):
            server_module.serve(engine.package, engine, Settings(), "127.0.0.1", ours)


def test_while_one_drains_another_takes_its_place(start, original, picture):
    first = start(str(original / "package"))
    unfinished = half_a_request(first, 1000)
    assert wait_for(lambda: in_progress(first, 1))
    first.process.terminate()
    assert wait_for(lambda: not listens(first.port))
    second = start(str(original / "package"), "--port", str(first.port))
    assert second.invoke(picture).status == 200
    unfinished.send(b"x")
    assert unfinished.getresponse().status in (400, 408)  # an answer, on a busy machine a late one
    assert first.process.wait(600) == 0
    assert second.invoke(picture).status == 200


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def test_after_the_grace_the_process_is_gone_whatever_hangs(original, tmp_path):
    """Here the event loop itself stands still when it is told to end."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def late(event, arguments):\n"
        "    if event == 'socket.bind' and 'serving.server' in sys.modules:\n"
        "        import time\n"
        "        server = sys.modules['serving.server']\n"
        "        server.GRACE_SECONDS = 0.5\n"
        "        server._Server.shutdown = lambda *arguments, **more: time.sleep(3600)\n"
        "sys.addaudithook(late)\n"
    )
    server = Server(
        tmp_path / "log.txt", str(original / "package"), PYTHONPATH=f"{tmp_path}:{PROJECT}"
    )
    try:
        assert server.stop() == 0
    finally:
        server.kill()


def test_a_sigterm_just_before_it_serves_ends_it(original, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def late(event, arguments):\n"
        "    if event == 'socket.bind' and 'serving.server' in sys.modules:\n"
        "        end = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        sys.modules['serving.server'].spare_the_collector = end\n"
        "sys.addaudithook(late)\n"
    )
    command = [sys.executable, "-P", "-m", "serving", "serve", "--port", "0"]
    done = subprocess.run(
        [*command, str(original / "package")],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{PROJECT}"},
        timeout=600,
    )
    assert done.returncode == 0


def test_each_flag_and_variable_reaches_what_it_sets(original, monkeypatch):
    reached = {}
    monkeypatch.setattr("serving.serve.load_for_command", lambda *arguments: None)
    monkeypatch.setattr("serving.server.bind", lambda *arguments: None)
    monkeypatch.setattr(
        "serving.serve.Engine",
        lambda package, rooms, **made: reached.update(made, rooms=(rooms.pixels, rooms.memory)),
    )
    monkeypatch.setattr(
        "serving.server.serve", lambda package, engine, settings, *place: reached.update(s=settings)
    )
    others = {entry.name: other(getattr(Settings(), entry.name)) for entry in fields(Settings)}
    texts = {name: written(value) for name, value in others.items()}
    flags = [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]
    variables = {f"SERVING_{name.upper()}": text for name, text in texts.items()}
    for words, given in ((flags, {}), ([], variables)):
        reached.clear()
        for name, text in given.items():
            monkeypatch.setenv(name, text)
        assert serve_main(["serve", "package", *words]) == OK
        assert reached["s"] == Settings(**others)
        assert reached["rooms"] == (others["max_pixels"], others["max_decoded"])
        assert [reached[name] for name in ("workers", "batch", "delay")] == [
            others[name] for name in ("workers", "batch", "batch_delay")
        ]


def other(default: bool | float | str) -> bool | float | str:
    """A value of the same type that is not the default."""
    if isinstance(default, str):
        return {"*": "https://a.example", "": "a.example"}[default]
    if isinstance(default, bool):
        return not default
    return default + 1


def written(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return {True: "on", False: "off"}[value]
    return str(value)


def test_a_connection_that_can_not_be_accepted_closes_no_other_one(engine, monkeypatch):
    """accept(2) hands on what went wrong in the network: no file is missing."""
    made = server_module.make(engine.package, engine, Settings(queue=8), "127.0.0.1")
    closed: list[OSError] = []
    monkeypatch.setattr(made._app.connections, "make_room", closed.append)

    def accept() -> None:
        raise OSError(errno.EPROTO, "Protocol error")

    async def accept_one() -> None:
        made._listener = SimpleNamespace(accept=accept)
        made._accept(4)

    asyncio.run(accept_one())
    assert closed == []
