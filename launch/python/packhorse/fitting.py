"""`fit`: train as `python -m trainer` does, in a process of its own, and look at what came out.

In a process of its own, since a training sets what is a whole process's: PyTorch's threads and
deterministic kernels, the random numbers, signals (in the main thread alone), a GPU's memory. So a
notebook stays as it was, the same call goes on with its own run after a kernel was restarted, and
the bits are those of the command.
"""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packhorse.model import Model
from trainer.common import sessions
from trainer.common.command import one_line
from trainer.common.console import shows_bars
from trainer.common.errors import OK, PROJECT, RESUME, UserError
from trainer.results.text import percent
from trainer.settings import config
from trainer.settings.compose import explain_settings, resolve
from trainer.settings.words import override
from trainer.training.run import places, read_result

LAST = 40  # lines of what was printed, of which one says why it ended


@dataclass(frozen=True)
class Run:
    """A complete run. directory: with its report, log and checkpoints. package: its model."""

    directory: Path
    package: Path

    @property
    def result(self) -> dict[str, Any]:
        """What result.json holds. Raise UserError where the run is not complete (any more)."""
        result = read_result(self.directory)
        if result is None:
            raise UserError(
                f"{self.directory}: this run isn't complete; call fit again to finish it"
            )
        return result

    @property
    def metrics(self) -> dict[str, float]:
        """Top-1, top-5 and macro F1 (0..1) and the loss, on test, or on valid without one."""
        result = self.result
        return {name: result[name] for name in ("top1", "top5", "f1", "loss")}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one an epoch, and one of test."""
        lines = (self.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def report(self) -> Path:
        """The page to look at, one file."""
        return self.directory / "report.html"

    @property
    def model(self) -> Model:
        """The model of this run, proven and ready to predict."""
        return Model.load(self.package)

    def _repr_html_(self) -> str:
        result = self.result
        rows = {
            f"accuracy on {result['split']}": percent(result["top1"]),
            "macro F1": percent(result["f1"]),
            "pictures": f"{result['pictures']:,}",
            "best epoch": f"{result['best_epoch']} of {result['epochs']}",
        }
        lines = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{value}</td></tr>"
            for name, value in rows.items()
        )
        name, page = html.escape(str(self.directory)), html.escape(str(self.report))
        return f"<p><b>{name}</b> (<a href='{page}'>report</a>)</p><table>{lines}</table>"


def fit(root: str | os.PathLike[str] | None = None, **settings: Any) -> Run:
    """Train on the pictures in `root`, and return the run when it is complete.

    root: a folder, an archive or None, as data.root (None: the pictures that ship). settings: as
    on the command line, nested or dotted: `train={"epochs": 5}`, `**{"train.epochs": 5}`,
    `model="resnet50"`, `name="first"`. The same call goes on with its own run, and returns at once
    where that is complete. It prints what the command does. Ctrl-C (the notebook's stop button)
    saves, and raises KeyboardInterrupt then. Raise UserError.
    """
    words = _words(root, settings)
    config.register()
    try:
        resolved = config.load(resolve(words).composed)
    except Exception as error:
        line = one_line(error, explain_settings)
        if line is None:
            raise
        raise UserError(line) from error
    _, directory, _, package = places(resolved)
    child, output = _start(words)
    code, said = _followed(child, output)
    if code != OK:
        raise UserError(_reason(code, said, directory))
    return Run(directory.absolute(), package.absolute())


def _words(root: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> list[str]:
    """Return the settings as the words of a command line."""
    words = [] if root is None else [override("data.root", os.fspath(root))]
    return words + [override(key, _plain(value)) for key, value in _flat(settings)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """Return a value as settings have it: paths as text, tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


# --- the process ---


def _start(words: list[str]) -> tuple["subprocess.Popen[Any]", int]:
    """Start the trainer; return it, and where its output can be read.

    On a terminal, and in a notebook, the output is a terminal's, with bars.
    """
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    if shows_bars(sys.stdout):
        output, its = os.openpty()
        attributes = termios.tcgetattr(its)
        attributes[1] &= ~termios.OPOST  # line breaks stay as they are
        termios.tcsetattr(its, termios.TCSANOW, attributes)
        termios.tcsetwinsize(its, (24, shutil.get_terminal_size((100, 24)).columns))
    else:
        output, its = os.pipe()
    try:
        child = sessions.Child(
            [*sessions.python(), "-m", "trainer", *words],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its,
        )
    finally:
        os.close(its)
    return child, output


def _followed(child: "subprocess.Popen[Any]", output: int) -> tuple[int, list[str]]:
    """Print what the process prints until it ends; return its exit code and its last lines.

    Raise KeyboardInterrupt when it has saved and ended.
    """
    last: deque[str] = deque([""], LAST)
    pressed: KeyboardInterrupt | None = None
    text = _read(output)
    while True:
        try:
            for part in text:
                print(part, end="", flush=True)
                first, *others = part.split("\n")
                last[-1] += first
                last.extend(others)
            child.wait()
            break
        except KeyboardInterrupt as error:
            if pressed:
                child.kill()
            pressed = error
            child.send_signal(signal.SIGTERM)
            text = _read(output)
    os.close(output)
    if pressed:
        raise pressed
    return child.wait(), [line.rsplit("\r", 1)[-1] for line in last]


def _read(output: int) -> Iterator[str]:
    decoder = getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            data = os.read(output, 1 << 16)
        except OSError:  # Linux says so where no process has the terminal any more
            return
        if not data:
            return
        yield decoder.decode(data)


def _reason(code: int, said: list[str], directory: Path) -> str:
    """Return the one line that says why it ended."""
    starts = ("error: ", "warning: ") if code == RESUME else ("error: ",)
    for line in reversed(said):
        for start in starts:
            if line.startswith(start):
                return line.removeprefix(start)
    shown = next((line for line in reversed(said) if line.strip()), "")
    return f"training ended with exit code {code} ({shown}); {directory / 'log.txt'} says more"
