"""A sweep's directory, and the code and settings that are frozen in it."""

import hashlib
import json
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common import files
from trainer.common.console import also_to_file, log
from trainer.common.errors import PROJECT, UserError
from trainer.common.git import revision
from trainer.common.interrupt import Stop
from trainer.common.objects import parsed
from trainer.images.datasets import find_images
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings import words
from trainer.settings.compose import check_options
from trainer.settings.config import Config
from trainer.sweep.pictures import are_swept

SOURCE = ("trainer", "serving", "conf")  # the code of a run
FREE = ("sweep.trials", "sweep.parallel", "sweep.lost_seconds")  # may change when a sweep continues
DRIVERS = 1000  # drivers that may share one directory


@dataclass(frozen=True)
class Directory:
    """A sweep's directory, locked for this process. frozen: what its sweep.json holds."""

    path: Path
    frozen: dict[str, Any]
    slot: int = 0  # which of the drivers that share it

    @property
    def driver(self) -> str:
        """Return the name of this driver in a shared ledger: the same when it is started again.

        Before the slash it is of the directory.
        """
        return f"{self.frozen.get('id', '')[:8]}/{self.slot}@{socket.gethostname()}"


@contextmanager
def opened(
    config: Config, fixed: list[str], swept: dict[str, str], stop: Stop
) -> Iterator[Directory]:
    """Yield the sweep's directory.

    If it is new, check the sweep and make it. Raises UserError if another process runs it without
    sharing it, or if it began with other settings.
    """
    asked: dict[str, Any] = {
        "settings": sorted(
            word for word in fixed if words.key_of(word) not in (*FREE, "name", "sweep.storage")
        ),
        "ranges": swept,
    }
    directory = Path(config.platform.runs) / (config.name or sweep_name(config, asked))
    known = directory / "sweep.json"
    if not known.exists():
        check(config, fixed, swept, stop)
    directory.mkdir(parents=True, exist_ok=True)
    shared = config.sweep.storage is not None
    with slot(directory, shared) as number, also_to_file(directory / log_name(number)):
        with files.locked(directory, stop.check, name=".lock-begin"):
            if not known.exists():
                inputs = [path for path in settings.inputs(config) if Path(path).exists()]
                freeze(directory, asked | {"shared": shared, "inputs": inputs})
        frozen = parsed(known.read_bytes())
        if frozen is None or asked.keys() - frozen.keys():
            raise UserError(
                f"{known} is damaged: restore a copy, or start a new sweep with another name=..."
            )
        if changed := words_of(asked) ^ words_of(frozen):
            raise UserError(
                f"{directory}: this sweep began with other settings "
                f"({', '.join(sorted(changed))}); give the same, or another name=..."
            )
        if shared != frozen.get("shared", False):
            began = "without" if shared else "with"
            raise UserError(
                f"{directory}: this sweep began {began} sweep.storage, where its ledger lies; "
                "give the same, or another name=..."
            )
        log.info("sweep %s in %s", directory.name, directory)
        yield Directory(directory, frozen, number)


@contextmanager
def slot(directory: Path, shared: bool) -> Iterator[int]:
    """Lock the directory for this driver; yield this driver's number among those that share it.

    Raise UserError where another process has it.
    """
    with ExitStack() as stack:
        for number in range(DRIVERS if shared else 1):
            name = f".lock-{number}" if number else ".lock"
            if stack.enter_context(files.locked(directory, name=name)):
                yield number
                return
        raise UserError(
            f"{directory}: another process runs this sweep; wait for it, or give this one "
            "another name=...; several share one with sweep.storage=FILE"
        )


def log_name(number: int) -> str:
    """Return the name of a driver's log."""
    return f"log-{number}.txt" if number else "log.txt"


def sweep_name(config: Config, asked: dict[str, Any]) -> str:
    """Return a name for a sweep without one.

    It comes from the command line, not from the composed settings, so the same command finds its
    sweep after conf/ was edited.
    """
    text = json.dumps([asked, settings.places(config.data)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"sweep-{config.data.source}-{digest[:8]}"


def words_of(asked: dict[str, Any]) -> set[str]:
    """Return the sweep's request as words of a command line."""
    return {*asked["settings"], *(f"{key}={text}" for key, text in asked["ranges"].items())}


def check(config: Config, fixed: list[str], swept: dict[str, str], stop: Stop) -> None:
    """Raise UserError for what would fail every trial.

    These are ranges that don't fit, options that don't exist, a folder without images.
    """
    sweep = space.load(config, swept, fixed)
    check_options(sweep, fixed, swept)
    keys = {parameter.key for parameter in sweep.space}
    for key in ("processes", "hosts"):
        count = getattr(config.train, key)
        if f"train.{key}" in keys or (count or 1) > 1:
            raise UserError(
                f"train.{key}={count}: each trial of a sweep is one process; leave this out "
                "(sweep.parallel=2 trains two trials at once)"
            )
    if not are_swept(sweep):
        find_images(config, stop, fixed)


def freeze(directory: Path, asked: dict[str, Any]) -> None:
    """Copy the code and conf/ as they are now.

    sweep.json, written last, says that they are complete.
    """
    files.sweep(directory)
    shutil.rmtree(directory / "source", ignore_errors=True)
    temporary = directory / f"{files.TEMPORARY}source"
    for name in SOURCE:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, temporary / name, ignore=ignored)
    temporary.rename(directory / "source")
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    frozen = asked | {"revision": revision(), "began": began, "id": uuid.uuid4().hex}
    files.write(directory / "sweep.json", json.dumps(frozen))
