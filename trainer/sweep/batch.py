"""Trials in one process, one after the other.

`python -m trainer.sweep.batch`, as the driver starts it: it loads what trials need, and then does
what it reads from standard input, one request a line (`process.Request`), until that ends.

A head on cached features trains in seconds, so separate processes would spend most of their time
starting. Each trial goes through the same loop as a run of its own, up to its last epoch. Only the
best trial is tested and packaged: it goes on as the run that it is, in the same process where that
is still there.
"""

import dataclasses
import json
import os
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.common import sessions

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import

from omegaconf import OmegaConf

from trainer.common import command, files, stages
from trainer.common.console import log, to_terminal
from trainer.common.errors import OK
from trainer.common.interrupt import Stop, on_signals
from trainer.distributed.world import World
from trainer.images.datasets import find_images
from trainer.results import early
from trainer.settings import config as settings
from trainer.settings.compose import explain_settings
from trainer.settings.config import Config
from trainer.sweep.process import BATCH_LOCK, Request
from trainer.training.loop import fit
from trainer.training.run import open_run
from trainer.training.stall import ended_on_stall
from trainer.training.training import Diverged, build_training


def train(directory: Path, numbers: list[int]) -> None:
    """Train the trials of a sweep, and write all their outcomes at once.

    Raises Interrupted when asked to stop.
    """
    outcomes: dict[int, dict[str, Any]] = {}
    places = {number: directory / f"{number:04d}" for number in numbers}
    with on_signals() as stop, ExitStack() as locks:
        for place in places.values():
            assert locks.enter_context(files.locked(place, name=BATCH_LOCK)), place
        for number, place in places.items():
            log.info("trial %d", number)
            stages.begin()
            outcomes[number] = train_trial(load(place / "config.yaml"), stop)
    files.write(directory / f"outcomes-{numbers[0]:04d}.json", json.dumps(outcomes))


def train_trial(config: Config, stop: Stop) -> dict[str, Any]:
    """Train one trial to its end, and return its outcome.

    A loss that is not finite is the trial's failure, not the batch's.
    """
    with open_run(config, World(), stop) as run, ended_on_stall(config.train, World()) as rescue:
        with run.stages.of("scan"):
            images = find_images(config)
        # Only the best trial checks the images, once it is one: otherwise each would repeat it.
        run = dataclasses.replace(run.resolved(images), looks=False)
        training = build_training(run, images, network=early.network(run, images))
        rescue.save = training.rescue
        try:
            with run.stages.of("training"):
                fit(training)
        except Diverged as error:
            return {"failed": str(error)}
        assert training.progress.best is not None
        return {"best_epoch": training.progress.best["epoch"]}


def load(path: Path) -> Config:
    """Return the settings that a run's config.yaml holds."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return settings.from_dict(values)


def answer(request: Request) -> int:
    """Do what the driver asks for; return the exit code. A run leaves with its own."""
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    if words := request.get("run"):
        stages.begin()
        sys.argv[1:] = words
        runpy.run_module("trainer", run_name="__main__", alter_sys=True)  # which leaves
    directory, numbers = Path(request["sweep"]), request["trials"]
    return command.guarded(lambda: train(directory, numbers), log.log, explain_settings)


def main() -> int:
    """Do what is asked for on standard input, up to what fails; return its exit code, or OK."""
    to_terminal(expendable=True)  # each trial has a log of its own
    code = OK
    for line in sys.stdin:
        code = answer(json.loads(line))
        if code != OK:
            break
        sessions.end_when_asked()  # there is nothing to save
    sessions.end_as_decided()
    return code


if __name__ == "__main__":
    command.leave(main(), globals())
