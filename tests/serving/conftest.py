"""What the serving tests share: one small real package, and the server as a real process."""

import http.client
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.decoders import Rooms
from serving.engine import Engine
from serving.package import load
from tests.conftest import PROJECT, wait_for
from tests.packages import make_calibrated, make_network
from trainer.results.package import build


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package's directory, `package`, its archive, `model.tar.gz`, and its `pictures`.

    Read them, don't change them.
    """
    root = tmp_path_factory.mktemp("package")
    build(make_network(), make_calibrated(root / "pictures"), root / "model.tar.gz")
    with tarfile.open(root / "model.tar.gz") as tar:
        tar.extractall(root / "package", filter="data")
    return root


@pytest.fixture(scope="session")
def picture(original: Path) -> bytes:
    """The file of the first golden picture, a JPEG."""
    return (original / "package/golden/0.jpg").read_bytes()


@pytest.fixture(scope="session")
def expected(original: Path) -> np.ndarray:
    """The trained network's logits [3, classes] of the golden pictures."""
    with np.load(original / "package/golden/expected.npz") as recorded:
        return np.array(recorded["logits"])


@pytest.fixture(scope="session")
def engine(original: Path) -> Engine:
    return Engine(load(original / "package", threads=1), Rooms(25_000_000))


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`python -m serving serve`, started and listening."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        command = [sys.executable, "-P", "-m", "serving", "serve", "--port", "0", *arguments]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(PROJECT)} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_for(lambda: self._port() or self.process.poll() is not None)
        assert self.process.poll() is None, log.read_text()
        self.port = int(self._port())

    def _port(self) -> str:
        running = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return running[1] if running else ""

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """headers: with _ for -."""
        connection = self.connect()
        try:
            connection.request(
                method,
                path,
                body,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def invoke(self, body: bytes, content_type: str = "image/jpeg", **headers: str) -> Reply:
        return self.ask("POST", "/invocations", body, Content_Type=content_type, **headers)

    def invoke_json(self, asked: object, **headers: str) -> Reply:
        return self.invoke(json.dumps(asked).encode(), "application/json", **headers)

    def memory(self, which: str = "VmRSS") -> int:
        """Bytes of resident memory, with the worker's: now, or the most so far ("VmHWM")."""
        processes = [self.process.pid]
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            processes += map(int, children.read_text().split())
        statuses = [Path(f"/proc/{each}/status").read_text() for each in processes]
        sizes = [re.search(rf"{which}:\s+(\d+)", status)[1] for status in statuses]  # type: ignore[index]
        return 1024 * sum(map(int, sizes))

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.process.wait(600)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends those that are left."""
    started: list[Server] = []

    def start(*arguments: str, **environment: str) -> Server:
        started.append(Server(tmp_path / f"server{len(started)}.log", *arguments, **environment))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def server(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that many tests ask. It has no URLs to fetch but refused ones."""
    server = Server(
        tmp_path_factory.mktemp("server") / "log.txt",
        str(original / "package"),
        "--max-body",
        "1000000",
        "--max-pixels",
        "1000000",
    )
    yield server
    server.kill()
