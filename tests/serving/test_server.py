import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving import server as server_module
from serving.handler import Settings
from serving.serve import main as serve_main
from tests import hostile
from tests.conftest import PROJECT, wait_for
from tests.packages import CLASSES
from tests.ports import free_port
from tests.serving.runtime import PUBLIC, Web
from tests.serving.test_package import change_weights, edit, edit_preprocessing, seal
from trainer.common.errors import OK


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


def test_what_is_no_http_gets_400_as_json(server, picture):
    for request in (
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\x00: b\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
            connection.sendall(request)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 400 and len(json.loads(answer.read())["request_id"]) == 32
    assert server.invoke(picture).status == 200


def test_requests_beyond_the_queue_get_503_and_when_to_try_again(start, original, picture):
    server = start(str(original / "package"), "--queue", "2")
    waiting = [server.connect() for _ in range(2)]
    for connection in waiting:  # accepted, and their bodies are awaited
        connection.putrequest("POST", "/invocations")
        connection.putheader("Content-Length", str(len(picture)))
        connection.endheaders()
    metric = b"packhorse_requests_in_progress 2.0"
    assert wait_for(lambda: metric in server.ask("GET", "/metrics").body)
    refused = server.invoke(picture)
    assert (refused.status, refused.headers["Retry-After"]) == (
        503,
        "1",
    ) and "request_id" in refused.json
    assert server.ask("GET", "/ping").status == 200
    for connection in waiting:
        connection.send(picture)
        assert connection.getresponse().status == 200
    assert server.invoke(picture).status == 200


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
        (tmp_path / "sitecustomize.py").write_text(redirect)
        server = start(str(original / "package"), PYTHONPATH=f"{tmp_path}:{PROJECT}")
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
    assert replies == [400] * 8


@pytest.fixture
def impatient(engine, monkeypatch):
    """The port of a server in this process that waits 0.25 s for a head and 0.5 s for a body."""
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.25)
    monkeypatch.setattr(server_module, "BODY_SECONDS", 0.5)
    made = server_module.make(engine.package, engine, Settings(), "127.0.0.1", 0)
    thread = threading.Thread(target=made.run)
    thread.start()
    assert wait_for(lambda: made.started)
    yield made.servers[0].sockets[0].getsockname()[1]
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

        def closed() -> bool:
            try:
                connection.sendall(b"a")
            except OSError:
                return True
            return False

        assert wait_for(closed)


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


def test_a_decoder_that_hangs_is_told_by_ping_and_does_not_outlive_the_drain(
    start, original, tmp_path
):
    """No file is known that does this; here the decoder of GIF hangs for an hour."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nfrom PIL import GifImagePlugin\n"
        "GifImagePlugin.GifImageFile.load_prepare = lambda self: time.sleep(3600)\n"
    )
    options = ("--seconds", "0.5", "--workers", "2")
    server = start(str(original / "package"), *options, PYTHONPATH=f"{tmp_path}:{PROJECT}")
    gif = hostile.encoded(Image.new("RGB", (48, 32)), "GIF")
    assert server.invoke(gif, "image/gif").status == 503
    assert server.ask("GET", "/ping").status == 200  # one decoder is left
    assert server.invoke(gif, "image/gif").status == 503
    assert wait_for(lambda: server.ask("GET", "/ping").status == 503)
    assert server.stop() == 0


def test_a_port_that_is_taken_ends_the_server(original, server):
    command = [
        sys.executable,
        "-m",
        "serving",
        "serve",
        str(original / "package"),
        "--port",
        str(server.port),
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "address already in use" in done.stdout


def test_each_flag_and_variable_reaches_what_it_sets(original, monkeypatch):
    reached = {}
    monkeypatch.setattr("serving.serve.load_for_command", lambda *arguments: None)
    monkeypatch.setattr("serving.serve.Engine", lambda package, **made: reached.update(made))
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
        assert [reached[name] for name in ("max_pixels", "workers", "batch", "delay")] == [
            others[name] for name in ("max_pixels", "workers", "batch", "batch_delay")
        ]


def other(default: bool | float) -> bool | float:
    """A value of the same type that is not the default."""
    if isinstance(default, bool):
        return not default
    return default + 1


def written(value: bool | float) -> str:
    if isinstance(value, bool):
        return {True: "on", False: "off"}[value]
    return str(value)
