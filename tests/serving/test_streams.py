"""The server in a terminal that goes away.

It goes on, and a hang-up lets it drain as SIGTERM does.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.serving.conftest import Server
from trainer.common.errors import OK


class Shown(Server):
    """A server that writes to a terminal, or a pipe, that is closed once its port is known."""

    def __init__(self, opened: tuple[int, int], *arguments: str) -> None:
        looking, written = opened
        command = [sys.executable, "-P", "-m", "serving", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
        os.close(written)
        text = b""
        while not (running := re.search(rb"running on http://127\.0\.0\.1:(\d+)\D", text)):
            part = os.read(looking, 4096)
            assert part, text  # the server has ended
            text += part
        self.port = int(running[1])
        os.close(looking)


@pytest.mark.parametrize("opened", [pty.openpty, os.pipe])
def test_a_server_that_nobody_looks_at_goes_on_serving(original, picture, opened):
    server = Shown(opened(), str(original / "package"))
    try:
        statuses = [
            server.invoke(body).status for body in (picture, b"no picture", picture)
        ]  # each is a line of its log
        assert statuses == [200, 400, 200] and server.ask("GET", "/ping").status == 200
        assert server.stop() == OK
    finally:
        server.kill()


def test_a_hang_up_lets_the_server_drain(start, original, picture):
    server = start(str(original / "package"))
    waiting = server.connect()
    waiting.putrequest("POST", "/invocations")
    waiting.putheader("Content-Length", str(len(picture)))
    waiting.endheaders()
    while b"packhorse_requests_in_progress 1.0" not in server.ask("GET", "/metrics").body:
        threading.Event().wait(0.01)
    server.process.send_signal(signal.SIGHUP)
    waiting.send(picture)
    assert waiting.getresponse().status == 200
    waiting.close()
    assert server.process.wait(60) == OK


def test_under_nohup_a_hang_up_is_nothing(original, picture, tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        server = Server(tmp_path / "log.txt", str(original / "package"))
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        server.process.send_signal(signal.SIGHUP)
        assert server.invoke(picture).status == 200
        assert server.stop() == OK
    finally:
        server.kill()
