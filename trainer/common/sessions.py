"""The signals that end sessions: to a command, and to everything started in its terminal.

Standard library only, and quick to import: a command asks here before it imports what is slow. A
copy travels in the model package.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from trainer.common.errors import RESUME

# They reach whole process groups, when a terminal, a session or a machine ends.
ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def heeded() -> list[signal.Signals]:
    """Return the signals that ask this process to stop.

    A closed terminal's SIGHUP is one, unless nohup has it ignored.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [each for each in ENDING if each != signal.SIGHUP or not ignored]


def end_when_asked(clear: bool = False, held: bool = False) -> None:
    """Let a signal end this process with RESUME and one line, as long as it has nothing to save.

    clear: whether to close what is open and remove what is temporary. Not while modules are
    imported: an exception in the middle is swallowed by some C extensions, and leaves others half
    imported. So without it the process ends where it stands.
    held: whether a signal waits until `heed` lets it through: of one of several processes, which
    can't yet tell the others why it ends, and whose end they would not see.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(Exception):  # it may be in the middle of a print
            sys.stdout.flush()
        name = signal.Signals(number).name
        line = f"warning: stopped by {name}; start the same command again\n"
        with suppress(OSError):
            if os.isatty(2):
                line = f"\r\033[K{line}"  # in the place of a progress bar
            os.write(2, line.encode())
        if clear:
            sys.exit(RESUME)
        os._exit(RESUME)

    for number in heeded():
        signal.signal(number, end)
    if held:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    else:
        heed()


def heed() -> None:
    """Let signals through, also those that have come while they were held."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def end_as_decided() -> None:
    """Ignore further signals, so that they don't change the exit code: all work is done.

    Python's shutdown takes a while, and would restore the signals' default, which is to kill.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


class Child(subprocess.Popen[Any]):
    """A process in a session of its own: what ends this one's session is for this one to handle.

    A signal may come before the child has made its session. So it starts with these signals
    blocked, and has them blocked until it asks for them (`end_when_asked`).
    """

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """options: those of subprocess.Popen."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            super().__init__(command, start_new_session=True, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def python() -> list[str]:
    """Return how a command begins that starts this Python again.

    What lies in the current directory can't take the place of a module. Where this one writes no
    bytecode, beside a package's code say, neither does the other.
    """
    command = [sys.executable, "-P"]
    if sys.dont_write_bytecode:
        command.append("-B")
    return command


def run(
    command: Sequence[str], timeout: float | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Return what a `Child` has printed, and its exit code, when it has ended.

    timeout: seconds, after which it is killed and subprocess.TimeoutExpired raised.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Child(command, text=True, errors="replace", **pipes, **options) as child:
        try:
            output, errors = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, output, errors)
