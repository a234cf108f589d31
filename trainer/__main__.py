"""`python -m trainer [key=value ...]`: the stages of a run, in order. Hydra's own flags (--help, -m, --cfg job) work as everywhere."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import hydra
from omegaconf import DictConfig

from trainer.common.console import log, to_terminal
from trainer.common.errors import (
    FAULT,
    MEMORY_FULL,
    MISTAKE,
    OK,
    RESUME,
    Interrupted,
    UserError,
    machine_fault,
)
from trainer.common.interrupt import on_signals, on_spot_notice
from trainer.distributed.world import Ended, Lost, World, current_world
from trainer.images.datasets import find_images
from trainer.settings import config as settings
from trainer.settings.compose import CONF, resolve
from trainer.settings.config import Config
from trainer.settings.hydra_errors import CONFIG_ERRORS, explain
from trainer.training.run import check_identity, open_run

WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_main(composed: DictConfig) -> None:
    sys.exit(guarded(lambda: train(settings.load(composed), current_world())))


def train(config: Config | None, world: World) -> None:
    """Train one run, or this process's part of it. config: None where rank 0 has it."""
    config = world.share_config(config)
    world.check(config.train.processes, config.train.hosts)
    for line in settings.ignored(config, sys.argv[1:]):
        log.warning(line)

    started = time.monotonic()
    spot = on_spot_notice if config.platform.name == "ec2" else nullcontext
    with (
        on_signals() as stop,
        open_run(config, world, stop) as run,
        world.connected(config.train.timeout_seconds, stop),
        spot(stop),
    ):
        images = find_images(config)
        world.check_same({"the pictures": images.fingerprint}, stop)
        run = run.resolved(images)
        result = world.broadcast_from_main(run.result)
        if result:
            check_identity(result["identity"], run.identity(images), run.directory)
            log.info("this run is complete; to train once more, give another name=... or seed=...")
            run.summarize(result)
            return
        # Imported here: a wrong setting or folder is answered before PyTorch is loaded.
        from trainer.results import outcome
        from trainer.training.loop import fit
        from trainer.training.training import build_training

        training = build_training(run, images)
        fit(training)
        tested = outcome.test(training)
        if not world.is_main_process:
            return
        outcome.build_package(training, tested)
        outcome.write_report(training, tested)
        result = outcome.result(training, tested, seconds=time.monotonic() - started)
        run.finish(result)
        run.summarize(result)


def guarded(work: Callable[[], None]) -> int:
    """Runs, and turns what went wrong into one line and an exit code (trainer/common/errors.py). HYDRA_FULL_ERROR=1 shows a mistake's traceback too."""
    try:
        work()
        return OK
    except Exception as error:
        code, line = verdict(error)
        if code == FAULT or (code == MISTAKE and WANTS_TRACEBACK):
            if current_world().size == 1:
                raise
            traceback.print_exc()
        level = logging.WARNING if isinstance(error, Interrupted) else logging.ERROR
        current_world().tell(error, code, line, partial(log.log, level, line))
        return code


def verdict(error: Exception) -> tuple[int, str]:
    """The exit code for what went wrong, and the line that the user sees."""
    if isinstance(error, Interrupted):
        return (
            RESUME,
            f"stopped by {error}; everything is saved: the same command goes on from here",
        )
    if isinstance(error, Ended):
        return error.notice.code, str(error)
    if isinstance(error, Lost):
        return RESUME, current_world().signed(
            f"{error}; the same command goes on from the newest checkpoint"
        )
    line = one_line(error)
    return (
        (FAULT, current_world().signed(f"{type(error).__name__}: {error}"))
        if line is None
        else (MISTAKE, current_world().signed(line))
    )


def one_line(error: Exception) -> str | None:
    """What the user can mend, in one line; None for a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CONFIG_ERRORS):
        return explain(error, settings.keys())
    if (
        type(error).__name__ == "OutOfMemoryError"
    ):  # torch's; it is not imported for the sake of its name
        return f"the GPU's memory is full ({str(error).split('. ')[0]}); lower train.batch_size, or split the batches with train.accumulate=2 or more"
    if isinstance(error, MemoryError):
        return MEMORY_FULL
    return machine_fault(error) if isinstance(error, OSError) else None


def main() -> int:
    words = [word for word in sys.argv[1:] if word not in ("-m", "--multirun")]
    multirun = len(words) < len(sys.argv) - 1 and not any(
        word.startswith("-") for word in words
    )  # Hydra's other flags, --help say, are its own
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra then raises its errors, instead of printing them and exiting
    )
    # Until there is something to save, Ctrl-C ends the process: a KeyboardInterrupt inside an import is swallowed by some C extensions.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    to_terminal(expendable=True)  # the run has a log of its own
    settings.register()
    if not current_world().is_main_process:
        log.setLevel(logging.ERROR)
    try:
        code = guarded(work(words, multirun))
    except SystemExit as end:  # of Hydra's function
        code = int(end.code or OK)
    current_world().leave(code)
    return code


def work(words: list[str], multirun: bool) -> Callable[[], None]:
    if multirun:
        return partial(sweep, words)
    return (
        partial(run, words)
        if current_world().is_main_process
        else partial(train, None, current_world())
    )


def run(words: list[str]) -> None:
    """One run, by Hydra: it gets what was typed and what that implies."""
    flags = any(word.startswith("-") for word in words)  # Hydra's own, some with a value of theirs
    typed = [word for word in words if "=" in word and not word.startswith("-")] if flags else words
    resolved = resolve(typed)
    place = words.index(typed[0]) if typed else len(words)
    sys.argv[1:] = (
        words[:place] + resolved.words[: len(resolved.words) - len(typed)] + words[place:]
    )
    if not flags:
        settings.load(resolved.composed)  # a wrong setting is all that is said
        for line in resolved.notes:
            log.info(line)
    hydra_main()


def sweep(words: list[str]) -> None:
    if current_world().size > 1:
        raise UserError(
            "-m, a sweep, starts processes of its own: give python -m trainer -m ..., without torchrun"
        )
    from trainer.sweep import (
        driver,  # imports the sweep's page and its templates, which one run doesn't need
    )

    driver.run(words)


if __name__ == "__main__":
    sys.exit(main())
