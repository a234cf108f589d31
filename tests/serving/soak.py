"""`python -m tests.serving.soak --seconds 300` (make soak-serving): a server under nine attacks.

One client each does what a fault that was found would need, again and again, all at once; another
one asks with good pictures. It must be answered, within LATER times the 99th percentile of quiet
times, and the server's memory, its decoders' too, must stay under MEMORY. Quiet and attacked times
alternate, since this machine may have other work. Attackers, and the web server that they have
asked, have processors of their own in the world: here they get what the server leaves.
"""

import argparse
import http.client
import io
import json
import multiprocessing
import os
import socket
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from serving.bench import example
from tests import hostile
from tests.conftest import PROJECT
from tests.packages import make_contents, make_network
from tests.serving.conftest import Server
from tests.serving.runtime import PUBLIC, Web
from trainer.results.package import build

LATER = 3.0
MEMORY = 600 << 20  # bytes
NICENESS = 19  # of attackers: a seventieth of the processor that the server gets (sched(7))
PHASE = 6.0  # seconds, quiet and then attacked
PAUSE = 0.05  # seconds between two asks of the good client, and of each attacker

# Public addresses lead to a web server here, and one of them to nobody who answers.
REDIRECT = f"""
import socket
connect = socket.create_connection
def redirect(address, *rest, **more):
    if address[0] == {PUBLIC!r}:
        address = ("127.0.0.1", WEB_PORT if address[1] == 80 else SILENT_PORT)
    return connect(address, *rest, **more)
socket.create_connection = redirect
"""


def post(port: int, body: bytes, kind: str = "application/octet-stream") -> int:
    """Ask, and return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/invocations", body, {"Content-Type": kind})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def head(length: int, path: str = "/invocations") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def slow_pictures(port: int) -> None:
    """S1: files whose decoding has no bound in their pixels."""
    exif = hostile.segment(0xE1, b"Exif\0\0" + bytes(2)) * 500_000
    for body in (hostile.scans(12_000), hostile.jpeg_with(exif)):
        post(port, body)


def bodies_that_never_end(port: int) -> None:
    """S2: 64 bodies of which the last byte is missing, half of them large."""
    opened = []
    for number in range(64):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.settimeout(0.5)
        size = (1000, 1 << 20)[number % 2]
        with suppress(OSError):
            connection.sendall(head(size) + bytes(size - 1))
        opened.append(connection)
    time.sleep(1)
    for connection in opened:
        connection.close()


def clients_that_hang_up(port: int) -> None:
    """S2: 64 pictures are asked about by who does not wait."""
    body = example()
    for _ in range(64):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head(len(body)) + body)
    time.sleep(1)


def pictures_by_the_gigabyte(port: int) -> None:
    """S3: 16 URLs of 16 MB in one request."""
    asked = {"instances": [{"url": f"http://{PUBLIC}/large"}] * 16}
    post(port, json.dumps(asked).encode(), "application/json")


def silent_sockets(port: int) -> None:
    """S10: 2,000 connections, each of which asks once or never."""
    opened = []
    for number in range(2000):
        with suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", port), 1)
            if number % 2:
                connection.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            opened.append(connection)
        if number % 100 == 0:
            time.sleep(PAUSE)
    time.sleep(1)
    for connection in opened:
        connection.close()


def urls_that_never_answer(port: int) -> None:
    """Found here: 64 requests that wait for another machine held every slot."""
    body = json.dumps({"url": f"https://{PUBLIC}/"}).encode()
    opened = []
    for _ in range(64):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head(len(body)) + body)
        opened.append(connection)
    time.sleep(5)
    for connection in opened:
        connection.close()


def values_by_the_million(port: int) -> None:
    """Found here: 16 MB of JSON become a gigabyte of lists."""
    post(port, b'{"a": [' + b"[]," * 5_000_000 + b"0]}", "application/json")


def answers_that_nobody_reads(port: int) -> None:
    """Found here: a client that asks for the page and does not read it was waited for for ever."""
    opened = []
    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.settimeout(0.2)
        with suppress(OSError):
            for _ in range(200):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        opened.append(connection)
    time.sleep(2)
    for connection in opened:
        connection.close()


def large_pictures(port: int) -> None:
    """Found here: photos of 48 megapixels, 4 in a request, before those that take a moment."""
    body = json.dumps({"instances": [{"base64": LARGE}] * 4}).encode()
    post(port, body, "application/json")


def large() -> str:
    """A photo of 48 megapixels, coded so that it must be held as a whole."""
    import base64

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((8064, 6048)).save(buffer, "JPEG", progressive=True, quality=40)
    return base64.b64encode(buffer.getvalue()).decode()


LARGE = ""  # made by main, before the attackers are forked
ATTACKS: tuple[Callable[[int], None], ...] = (
    slow_pictures,
    bodies_that_never_end,
    clients_that_hang_up,
    pictures_by_the_gigabyte,
    silent_sockets,
    urls_that_never_answer,
    values_by_the_million,
    answers_that_nobody_reads,
    large_pictures,
)


def serve_large(port: Connection) -> None:
    """Be somebody's web server until the process is ended. port: told where it listens."""
    os.nice(NICENESS)
    with Web() as web:
        web.files = {"/large": bytes(16 << 20)}
        port.send(web.port)
        threading.Event().wait()


def again(attack: Callable[[int], None], port: int) -> None:
    """Attack until the process is ended."""
    os.nice(NICENESS)
    while True:
        with suppress(OSError, http.client.HTTPException):
            attack(port)
        time.sleep(PAUSE)


class Good:
    """The client that asks with a good picture, and looks at /ping and at the memory."""

    def __init__(self, server: Server) -> None:
        self.server, self.body = server, example()
        self.most = 0  # bytes of memory
        self.refused: list[str] = []
        self.slowest_ping = 0.0

    def ask(self, seconds: float) -> list[float]:
        """Ask for so long, and return the seconds that each answer took."""
        took = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                status = post(self.server.port, self.body)
            except (OSError, http.client.HTTPException) as error:
                self.refused.append(repr(error))
                continue
            took.append(time.monotonic() - began)
            if status != 200:
                self.refused.append(str(status))
            began = time.monotonic()
            assert self.server.ask("GET", "/ping").status == 200
            self.slowest_ping = max(self.slowest_ping, time.monotonic() - began)
            self.most = max(self.most, memory(self.server.process.pid))
            time.sleep(PAUSE)
        return took


def memory(pid: int) -> int:
    """Bytes of resident memory of a process and of the children of its threads."""
    total = 0
    pids = [pid]
    for each in pids:
        with suppress(OSError, IndexError):
            for children in Path(f"/proc/{each}/task").glob("*/children"):
                pids += map(int, children.read_text().split())
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * 4096
    return total


def soak(server: Server, seconds: float, attacks: tuple[Callable[[int], None], ...]) -> Good:
    """Ask in quiet and in attacked times, and print what came. Raises AssertionError."""
    good = Good(server)
    quiet: list[float] = []
    attacked: list[float] = []
    good.ask(3)
    for number in range(max(1, round(seconds / PHASE))):
        quiet += good.ask(PHASE / 2)
        attackers = [
            multiprocessing.get_context("fork").Process(target=again, args=(each, server.port))
            for each in attacks
        ]
        for each in attackers:
            each.start()
        attacked += good.ask(PHASE)
        for each in attackers:
            each.kill()
            each.join()
        time.sleep(2)
        print(
            f"{number + 1:3}  p99 quiet {1000 * p99(quiet):.0f} ms, "
            f"attacked {1000 * p99(attacked):.0f} ms; {good.most >> 20} MiB at most; "
            f"{len(attacked)} answers, refused: {len(good.refused)}; "
            f"slowest ping {1000 * good.slowest_ping:.0f} ms",
            flush=True,
        )
    assert not good.refused, good.refused[:5]
    assert good.most < MEMORY, f"{good.most:,} bytes"
    assert p99(attacked) <= LATER * p99(quiet), (p99(attacked), p99(quiet))
    assert "Traceback" not in server.log.read_text()
    return good


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * len(seconds))]


def main() -> None:
    global LARGE
    parser = argparse.ArgumentParser(prog="python -m tests.serving.soak")
    parser.add_argument("--seconds", type=float, default=300.0, help="attacked (default 300)")
    parser.add_argument("--only", help="one attack, by its name")
    options = parser.parse_args()
    attacks = tuple(each for each in ATTACKS if options.only in (None, each.__name__))
    LARGE = large()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        told, tells = fork.Pipe(duplex=False)
        web = fork.Process(target=serve_large, args=(tells,), daemon=True)
        web.start()
        silent = socket.create_server(("127.0.0.1", 0), backlog=1024)
        place = Path(scratch)
        ports = {"WEB_PORT": told.recv(), "SILENT_PORT": silent.getsockname()[1]}
        script = REDIRECT
        for name, port in ports.items():
            script = script.replace(name, str(port))
        (place / "sitecustomize.py").write_text(script)
        build(make_network(), make_contents(place / "pictures"), place / "model.tar.gz")
        with tarfile.open(place / "model.tar.gz") as tar:
            tar.extractall(place / "package", filter="data")
        server = Server(place / "log.txt", str(place / "package"), PYTHONPATH=f"{place}:{PROJECT}")
        try:
            soak(server, options.seconds, attacks)
            began = time.monotonic()
            assert server.stop() == 0
            print(f"drained in {time.monotonic() - began:.1f} s")
        finally:
            server.kill()
            web.kill()


if __name__ == "__main__":
    sys.exit(main())
