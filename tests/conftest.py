"""What the tests share: pictures on disk, composed settings, and the trainer as a real process."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from tests.composed_once import compose_once
from tests.forked import Forked
from trainer.common.command import one_line
from trainer.settings import config as settings
from trainer.settings.compose import compose, explain_settings
from trainer.settings.config import Config

PROJECT = Path(__file__).parents[1]

# One thread: the promise of equal bits is for an equal number of threads, and small tests run
# faster so.
os.environ["OMP_NUM_THREADS"] = "1"

compose_once()

# A shell ignores SIGINT in what it starts in the background, nohup ignores SIGHUP, and every
# process started from there inherits that; here both are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The real configuration, shrunk to seconds.
QUICK = ("train.epochs=2", "train.batch_size=8", "data.size=16", "data.resize=16", "platform=local")


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at it with every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def configure() -> Callable[..., Config]:
    """Composes the project's own configuration with overrides, as the command line does."""
    settings.register()

    def configure(*overrides: str) -> Config:
        return compose(overrides)

    return configure


def refusal(*words: str) -> str | None:
    """The line with which a command line is refused, None where it is taken."""
    settings.register()
    try:
        compose(words)
    except Exception as error:
        return one_line(error, explain_settings)
    return None


def make_pictures(
    root: Path,
    per_class: dict[str, int],
    classes: tuple[str, ...] = ("circle", "square", "stripe"),
    size: int = 16,
) -> Path:
    """Write PNG class folders whose classes a small network can tell apart.

    per_class: pictures of each class, by split.
    """
    for split, count in per_class.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([label, number, *split.encode()])
                pixels = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
                pixels[:, :, label % 3] += np.uint8(80 + 60 * (label // 3))
                pixels[number % size, :, :] = 255
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 3 classes: 24 training, 9 validation and 9 test pictures.

    Read it, don't change it.
    """
    return make_pictures(tmp_path_factory.mktemp("pictures"), {"train": 8, "valid": 3, "test": 3})


def environment(cwd: Path) -> dict[str, str]:
    """This process's, for one that runs the project's own code in `cwd`, which is its HOME too."""
    own = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    return os.environ | own


Process = Forked | subprocess.Popen[str]


def start(
    cwd: Path,
    command: Sequence[str],
    variables: Mapping[str, str],
    forked: bool = True,
    before: str = "",
) -> Process:
    """Start `python -m COMMAND` in `cwd`, in a session of its own.

    Standard output and error come together. variables: all of its environment.
    forked: from a process that has imported the trainer, which is quicker; not where Python's own
    start or end is looked at. before: Python that runs in the forked process before all else.
    """
    if command[0] == "trainer":
        share_exports(cwd, command)
    if forked:
        return Forked(cwd, command, variables, before)
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_trainer(
    cwd: Path, *overrides: str, forked: bool = True, before: str = "", **variables: str
) -> Process:
    """Start the trainer as a user does. HOME lies in `cwd`: the cache is not the user's."""
    forked = forked and "PYTHONPATH" not in variables  # which Python reads as it starts
    own = environment(cwd) | variables
    return start(cwd, ["trainer", *overrides], own, forked, before)


def share_exports(cwd: Path, words: Sequence[str]) -> None:
    """Let a run there know which networks the trainer has tried to export in other tests."""
    cache = ".cache/packhorse"
    for word in words:
        if word.startswith("platform.cache="):
            cache = word.split("=", 1)[1]
    shared, own = PROJECT / ".pytest_cache/exports", cwd / cache / "exports"
    with suppress(OSError):  # of tests whose cache can't be used
        shared.mkdir(parents=True, exist_ok=True)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(shared)


def run_trainer(cwd: Path, *overrides: str, before: str = "", **variables: str) -> tuple[int, str]:
    """Its exit code and everything it printed. before: as `start` takes it."""
    return ended(start_trainer(cwd, *overrides, before=before, **variables))


def run_module(cwd: Path, *command: str, **variables: str) -> tuple[int, str]:
    """As `run_trainer`, for another module, and without credentials of whoever runs the tests."""
    own = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "HOME": str(cwd)}
    return ended(start(cwd, command, own | {"OMP_NUM_THREADS": "1"} | variables))


def ended(process: Process, seconds: float = 600) -> tuple[int, str]:
    """The exit code and all that was printed."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode is not None
    return process.returncode, output


class Metadata(BaseHTTPRequestHandler):
    """EC2's metadata service, version 2: nothing without a token, 404 until there is a notice."""

    notices: frozenset[str] = frozenset()
    answers: ClassVar[dict[str, str]] = {}  # to other paths

    def do_PUT(self):
        assert (
            self.path == "/latest/api/token"
            and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        )
        self.answer(200, b"secret-token")

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") != "secret-token":
            self.answer(401, b"")
        elif self.path.removeprefix("/latest/meta-data/") in self.notices:
            self.answer(200, b'{"action": "terminate", "time": "2026-11-23T08:22:00Z"}')
        elif said := self.answers.get(self.path.removeprefix("/latest/meta-data/")):
            self.answer(200, said.encode())
        else:
            self.answer(404, b"")

    def answer(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata(monkeypatch):
    handler = type("Handler", (Metadata,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(
        "AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    yield handler
    server.shutdown()
    server.server_close()


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> bool:
    """Return whether the condition became true.

    seconds: it never does, if not by then; as long as a busy machine may take.
    """
    for _ in range(int(seconds * 100)):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False
