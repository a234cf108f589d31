"""AWS's Lambda runtime client, run on a function's unpacked zip, and a function's neighbours.

These are the Runtime API, the endpoint, and a web server.
"""

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.conftest import wait_for

PUBLIC = "93.184.216.34"  # the function's connections to this address end at a web server here

# Runs awslambdaric with nothing to import but the zip and installed packages (-S: not this project
# either, which is installed as editable).
BOOT = f"""
import importlib, os, runpy, socket, sys
connect = socket.create_connection
def redirect(address, *arguments, **options):
    if address[0] == {PUBLIC!r}:
        address = ("127.0.0.1", int(os.environ["WEB_PORT"]))
    return connect(address, *arguments, **options)
socket.create_connection = redirect
sys.path.insert(0, os.environ["LAMBDA_TASK_ROOT"])
if "ENDPOINT_SECONDS" in os.environ:  # the real ones would take too long here
    function = importlib.import_module("lambda_function")
    function.ENDPOINT_SECONDS = float(os.environ["ENDPOINT_SECONDS"])
    function.client.cache_clear()  # it was made with the real ones
sys.argv = ["awslambdaric", sys.argv[1]]
runpy.run_module("awslambdaric", run_name="__main__")
"""


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits any more
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Neighbour:
    """An HTTP server on loopback."""

    def __init__(self, handler: type[Quiet]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class Call:
    """What InvokeEndpoint sent."""

    path: str
    content_type: str
    accept: str
    body: bytes


class Endpoint(Neighbour):
    """SageMaker's runtime. answer: of the next calls; it returns status, body, and headers."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answer: Callable[[], tuple[int, bytes, dict[str, str]]] = self._as_asked
        endpoint = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                endpoint.calls.append(
                    Call(
                        self.path, self.headers["Content-Type"], self.headers["Accept"], self.body()
                    )
                )
                status, body, headers = endpoint.answer()
                self.reply(status, body, Content_Type="application/json", **headers)

        super().__init__(Handler)

    def _as_asked(self) -> tuple[int, bytes, dict[str, str]]:
        """Logits or labels of one picture."""
        if "labels" in self.calls[-1].accept:
            return 200, b'[{"labels": [{"label": "dog", "probability": 0.9}]}]', {}
        return 200, b"[[0.25, -1.5]]", {}


class Web(Neighbour):
    """Somebody's web server. files: by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        web = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                self.reply(200, web.files[self.path]) if self.path in web.files else self.reply(404)

        super().__init__(Handler)


class Function:
    """A function's environment.

    The Runtime API: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html.
    """

    def __init__(self, code: Path, handler: str, log: Path, **environment: str) -> None:
        events: queue.Queue[tuple[str, bytes]] = queue.Queue()
        answers: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._events, self._answers = events, answers

        class Handler(Quiet):
            def do_GET(self) -> None:
                request_id, event = events.get()
                headers = {  # without the content type, the client crashes
                    "Content_Type": "application/json",
                    "Lambda_Runtime_Aws_Request_Id": request_id,
                    "Lambda_Runtime_Deadline_Ms": str(int(time.time() * 1000) + 30_000),
                    "Lambda_Runtime_Invoked_Function_Arn": (
                        "arn:aws:lambda:us-east-1:123456789012:function:function"
                    ),
                }
                self.reply(200, event, **headers)

            def do_POST(self) -> None:
                answers.put((self.path.rsplit("/", 1)[1], self.body()))  # "response", or "error"
                self.reply(202)

        self._api = Neighbour(Handler)
        self.log = log
        packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": packages,
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self._api.port}",
            "LAMBDA_TASK_ROOT": str(code),
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        with log.open("wb") as output:
            command = [sys.executable, "-S", "-c", BOOT, handler]
            self.process = subprocess.Popen(
                command, cwd=code, env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )

    def invoke(self, event: object) -> Any:
        """The function's answer. Fails where the function does."""
        request_id = str(uuid.uuid4())
        self._events.put((request_id, json.dumps(event).encode()))
        assert wait_for(lambda: not self._answers.empty() or self.process.poll() is not None), (
            self.log.read_text()
        )
        assert not self._answers.empty(), (
            f"it ended with {self.process.returncode}: {self.log.read_text()}"
        )
        kind, answer = self._answers.get()
        assert kind == "response", (answer, self.log.read_text())
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._events.put(("", b""))
        self._api.close()


def unpack(archive: bytes, directory: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        file.extractall(directory)
    return directory
