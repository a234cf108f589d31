"""What the launch tests share: AWS as a process (tests/launch/aws.py), and the command line as a
user starts it.
"""

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import boto3
import pytest

import tests.tqdm_lock  # noqa: F401 (it gives forks a lock of their own)
from launch import __main__ as command_line
from launch.cloud import account_stack, cloudformation, quotas, s3, source
from launch.cloud.request import core_session
from launch.targets.base import targets
from launch.targets.spec import load_config, load_target
from tests.conftest import PROJECT, wait_for
from trainer.common.errors import OK

REGION = "us-east-1"
BUCKET = f"packhorse-123456789012-{REGION}"  # of the account that moto has
SERVICES = ("cloudformation", "ec2", "iam", "logs", "s3", "sagemaker", "ssm", "sts")
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}

# For `Cloud.launch`: imported here once, and not by each process.
for verb in command_line.VERBS:
    import_module(f"launch.verbs.{verb}")
targets()


@dataclass
class Cloud:
    """The fake AWS, by its URL."""

    url: str
    record: Path  # tests/launch/aws.py says in which form
    _clients: dict[str, Any] = field(default_factory=dict)
    _started: list["Forked"] = field(default_factory=list)

    def post(self, path: str, **parameters: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(parameters).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")

    def reset(self) -> None:
        self.post("/moto-api/reset")
        self.post("/strict/reset")

    def calls(self) -> list[dict[str, Any]]:
        """Those that are written whole: the last line may be on its way."""
        *lines, _ = self.record.read_text().split("\n")
        return [json.loads(line) for line in lines]

    def client(self, service: str) -> Any:
        if service not in self._clients:
            keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
            self._clients[service] = boto3.client(
                service, region_name=REGION, endpoint_url=self.url, **keys
            )
        return self._clients[service]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return kept | CREDENTIALS | {"AWS_ENDPOINT_URL": self.url, "PYTHONPATH": str(PROJECT)}

    def run(self, *arguments: str) -> tuple[int, str]:
        """The command line as a user starts it: its exit code and all it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "launch", *arguments],
            cwd=PROJECT,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout

    def start(self, *arguments: str, cwd: Path = PROJECT) -> "Forked":
        """Start it in a process forked from this one, which has imported everything already: half
        the time. It has a name by which AWS can kill it.
        """
        self._started.append(Forked(command_line.main, arguments, cwd, self.environment()))
        return self._started[-1]

    def end(self) -> None:
        """Kill what a test that failed has left: it holds pipes of this process open."""
        for forked in self._started:
            forked.kill()

    def launch(self, *arguments: str, cwd: Path = PROJECT) -> tuple[int, str]:
        """As `run`, forked. A signal's code is negative."""
        forked = self.start(*arguments, cwd=cwd)
        output, _ = forked.communicate()
        assert forked.returncode is not None
        return forked.returncode, output


class Forked:
    """A command line in a fork of this process, with as much of Popen as the tests use."""

    def __init__(
        self,
        main: Callable[[Sequence[str]], int],
        arguments: Sequence[str],
        cwd: Path,
        environment: dict[str, str],
        apart: bool = False,
    ) -> None:
        """main: returns the exit code. apart: standard error comes by itself."""
        do_once()
        self.returncode: int | None = None
        # Closed by `communicate`.
        self._output = self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        if apart:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._pid = os.fork()
        if self._pid:
            return
        code = 1
        try:
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment | {"AWS_SDK_UA_APP_ID": f"pid-{os.getpid()}"})
            source.build = lambda extras, **lock: tarball(tuple(extras), **lock)
            sys.stdin = io.StringIO()
            sys.stdout, sys.stderr = self._output, self._errors
            os.dup2(sys.stdout.fileno(), 1)  # for its own children
            os.dup2(sys.stderr.fileno(), 2)
            code = main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            self._output.flush()
            self._errors.flush()
            os._exit(code)

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self._pid, signal.SIGKILL)
            wait_for(self._ended)

    def so_far(self) -> str:
        """What it has printed by now."""
        return os.pread(self._output.fileno(), 2**20, 0).decode()

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for its end; return all that it has printed."""
        ended = wait_for(self._ended, timeout)
        self.kill()
        output = _all_of(self._output)
        errors = "" if self._errors is self._output else _all_of(self._errors)
        assert ended, f"it has not ended in {timeout} s:\n{output}{errors}"
        return output, errors

    def _ended(self) -> bool:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return bool(pid)


def _all_of(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


tarball = functools.cache(source.build)


@functools.cache
def do_once() -> None:
    """Do what every command does once, for all that are forked: read models and a grammar, and
    pack the code.
    """
    session = boto3.session.Session(
        "testing", "testing", region_name=REGION, botocore_session=core_session()
    )
    for service in SERVICES:
        session.client(service)
    for words in ([], *([f"target={name}"] for name in targets())):
        load_config(load_target(words), ["optim.lr=1"])
    cloudformation.load(account_stack.TEMPLATE)
    tarball(())
    tarball(("timm",))
    # What is there already, a child's garbage collector need not look at, nor copy its memory so.
    gc.collect()
    gc.freeze()


@functools.cache
def stand_ins() -> subprocess.Popen[str]:
    """The process from which AWS is forked, as long as this one lives."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.stand_ins"],
        cwd=PROJECT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )

    def end() -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    atexit.register(end)
    return process


@contextlib.contextmanager
def running(record: Path, module: str = "tests.launch.aws") -> Iterator[Cloud]:
    """AWS as a process. module: another one whose `main` is AWS."""
    process = stand_ins()
    assert process.stdin is not None and process.stdout is not None
    print(module, record, file=process.stdin, flush=True)
    pid, url = (process.stdout.readline().strip() for _ in range(2))
    try:
        cloud = Cloud(url, record)
        try:
            yield cloud
        finally:
            cloud.end()
    finally:
        os.kill(int(pid), signal.SIGKILL)  # a zombie from then on: no other process gets its number


@contextlib.contextmanager
def founded(record: Path) -> Iterator[Cloud]:
    """An account with the foundation."""
    with running(record) as cloud:
        cloud.reset()
        code, printed = cloud.launch("up", "--yes", "--every", "0.05")
        assert code == OK, printed
        yield cloud


@pytest.fixture(autouse=True, scope="session")
def own_digests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is known of the tests' pictures and quotas doesn't go into the user's cache."""
    s3.DIGESTS = tmp_path_factory.mktemp("cache") / "digests"
    quotas.NUMBERS = s3.DIGESTS.with_name("quotas.json")


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """An account with the foundation, which the tests of a module share: each has its own runs."""
    with founded(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        yield cloud


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with running(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        yield cloud


@pytest.fixture
def cloud(server: Cloud) -> Cloud:
    """An account with nothing in it."""
    server.reset()
    return server
