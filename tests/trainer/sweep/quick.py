"""A driver whose trials are forked from it, instead of started: a third of the time.

What a trial does is the same, but that it runs the project's code and not the sweep's copy of it.
"""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import IO

from tqdm import tqdm

import tests.tqdm_lock  # noqa: F401 (it gives forks a lock of their own)
from trainer.common import sessions
from trainer.common.console import log
from trainer.sweep import process


class Child:
    """As much of trainer.common.sessions.Child as a driver uses."""

    def __init__(
        self,
        command: Sequence[str],
        stdin: int,
        stdout: IO[bytes] | int,
        stderr: int,
        env: dict[str, str],
        preexec_fn: Callable[[], None],
    ) -> None:
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        if stdin == subprocess.PIPE:
            stdin, writing = os.pipe()
            self.stdin = os.fdopen(writing, "wb")
        output = os.open(os.devnull, os.O_WRONLY) if isinstance(stdout, int) else stdout.fileno()
        sys.stdout.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, sessions.ENDING)
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number in [output] * isinstance(stdout, int) + [stdin] * (stdin >= 0):
                os.close(number)
            return
        code = 1
        try:
            os.setsid()
            preexec_fn()
            if stdin >= 0:
                os.dup2(stdin, 0)
                sys.stdin = os.fdopen(0, closefd=False)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            # What is the driver's: its log, its bar, its locks.
            log.handlers.clear()
            tqdm._instances.clear()  # type: ignore[attr-defined]
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.environ.clear()
            os.environ.update(env)
            sys.argv = list(command[command.index("-m") + 1 :])
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork_trials() -> None:
    """Let the driver in this process fork its trials."""
    vars(process)["sessions"] = SimpleNamespace(Child=Child, python=sessions.python)
