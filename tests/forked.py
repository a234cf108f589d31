"""`python -m MODULE` as a process forked from one that has imported the trainer and all it needs.

A third of a start's time.

What the command line does is the same, but for Python's own start and end.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TextIO

# As trainer/distributed/job.py has it: PyTorch reads it when it is loaded.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
FORKS = multiprocessing.get_context("forkserver")
# An exit code can be read once. Each start asks for those of all processes, so two threads would
# read the same one, and the second find none: 255.
ENDS = threading.Lock()
# All that a run imports on its way, but what an `-m trainer` runs as its own module.
FORKS.set_forkserver_preload(
    [
        "trainer.results.outcome",
        "trainer.sweep.driver",
        "trainer.training.loop",
        "trainer.training.training",
        # imported late by these, and slow
        "onnxruntime",
        "onnxscript",
        "optuna.storages",
        "torch._dynamo",
        "torch.onnx._internal.exporter._core",
        "torchmetrics.functional.classification",
        "torchvision",
        "tests.tqdm_lock",
        "tests.warm",  # last, since it freezes what is there
    ]
)


class Forked:
    """A process of its own session, with the methods of `subprocess.Popen`.

    Standard output and error come together, as text, unless they are given.
    """

    def __init__(
        self,
        cwd: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        before: str = "",
        output: int | None = None,
    ) -> None:
        """command: a module and its arguments. before: Python that runs before all else.

        output: descriptor of where standard output and error go.
        """
        if output is None:
            reading, output = os.pipe()
            self.stdout: TextIO | None = os.fdopen(reading, errors="replace")
        else:
            self.stdout, output = None, os.dup(output)
        begun, begins = FORKS.Pipe(duplex=False)
        with Connection(output, readable=False) as to, begun:
            self._process = FORKS.Process(
                target=_run, args=(str(cwd), command, dict(environment), to, before, begins)
            )
            with ENDS:
                self._process.start()
            begins.close()
            # Until it has a session and Python's own handlers, no signal acts as on a real start.
            with suppress(EOFError):
                begun.recv()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._reader: threading.Thread | None = None
        self._output = ""

    @property
    def returncode(self) -> int | None:
        with ENDS:
            return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        wait([self._process.sentinel], timeout)
        code = self.returncode
        if code is None:
            raise subprocess.TimeoutExpired("", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it has printed when it has ended, or says nothing more."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired("", timeout or 0)
        self.wait(timeout)
        return self._output, None

    def _read(self) -> None:
        if self.stdout is not None:
            with self.stdout:
                self._output = self.stdout.read()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    cwd: str,
    command: Sequence[str],
    environment: dict[str, str],
    to: Connection,
    before: str,
    begins: Connection,
) -> None:
    """Be the process that `python -m COMMAND` in `cwd` would be."""
    os.setsid()
    os.dup2(to.fileno(), 1)
    os.dup2(to.fileno(), 2)
    to.close()
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    # multiprocessing would have the child's children come from a fork server, too.
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(command)
    sys.path[:0] = [cwd, environment["PYTHONPATH"]]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        begins.close()
        exec(before, {})
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # Python itself ends by the signal; multiprocessing with a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
