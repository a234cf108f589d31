"""`python -m trainer [key=value ...]`: the stages of a run, in order.

--help shows the settings; Hydra's own flags (-m, --cfg job) work as everywhere.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    # First of all: much of what is imported below doesn't exist on Windows.
    sys.stderr.write(
        "error: Packhorse trains on Linux and macOS; on Windows, start the same command in WSL "
        "(wsl --install, then make setup there)\n"
    )
    sys.exit(2)

from trainer.common import sessions
from trainer.distributed.launched import one_of_several

if __name__ == "__main__":
    sessions.end_when_asked(held=one_of_several())  # before what takes seconds to import

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from trainer.common import command
from trainer.common.console import ProgressBar, loading, log, to_terminal
from trainer.common.errors import OK, RESUME, Interrupted, UserError
from trainer.common.interrupt import Stop, on_signals, on_spot_notice
from trainer.distributed.world import Ended, Lost, World, current_world
from trainer.images.datasets import find_images
from trainer.images.folder import ImageFolder
from trainer.images.identity import of_images
from trainer.images.usable import are_those, usable_images
from trainer.settings import config as settings
from trainer.settings import options
from trainer.settings.compose import CONF, explain_settings, is_hydras, resolve
from trainer.settings.config import Config
from trainer.settings.words import key_of
from trainer.training import complete, recipe
from trainer.training.run import Run, open_run
from trainer.training.stall import ended_on_stall


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_main(composed: DictConfig) -> None:
    """Train with what Hydra has composed, and exit with the code that says how it went."""
    given = list(HydraConfig.get().overrides.task)
    sys.exit(guarded(lambda: train(settings.load(composed), current_world(), given)))


def train(config: Config | None, world: World, given: Sequence[str] = ()) -> None:
    """Train one run, or this process's part of it.

    config: None if rank 0 has it. given: the typed and implied settings, as words.
    """
    with on_signals() as stop:
        config = world.share_config(config, stop)
        world.check(config.train.processes, config.train.hosts)
        for line in settings.ignored(config, sys.argv[1:]):
            log.warning(line)
        train_run(config, world, stop, given)


def train_run(config: Config, world: World, stop: Stop, given: Sequence[str]) -> None:
    """Train the run of these settings."""
    spot = on_spot_notice if config.platform.name == "ec2" else nullcontext
    with (
        open_run(config, world, stop, given) as run,
        world.connected(config.train.timeout_seconds, stop),
        spot(stop),
        ended_on_stall(config.train, world) as rescue,
    ):
        with run.stages.of("scan"):
            images = find_images(config, stop, sys.argv[1:])
        with run.stages.of("recipe"):
            run, decided = recipe.settled(run, images)
        with loading("looking at the weights"):
            run = run.resolved(images)
        result = world.broadcast_from_main(run.result)
        wrong: dict[str, str] = {}
        if result:
            check_result(run, result, images)
            promised = result["files"]
            wrong = world.broadcast_from_main(lambda: complete.lacking(run, promised))
        if result and wrong:
            world.broadcast_from_main(lambda: complete.check_can_be_made_again(run, wrong))
            log.warning("%s; rebuilding it from the checkpoints", complete.in_words(wrong))
        elif result:
            log.info("this run is complete; to train again, give another name=... or seed=...")
            run.summarize(result)
            return
        with loading():
            # imported here: a wrong setting or folder is reported before PyTorch is loaded.
            from trainer.results import early, outcome
            from trainer.training.loop import fit
            from trainer.training.training import build_training

        network = early.network(run, images)
        stop.check()
        training = build_training(run, images, network=network)
        rescue.save = training.rescue
        with training.metrics_file.tracking.closed():
            with run.stages.of("training"):
                fit(training)
            with run.stages.of("test"), ProgressBar("testing", 1):
                tested = outcome.test(training)
            if not world.is_main_process:
                return
            stop.check()
            if not result or any(complete.is_of_package(run, path) for path in wrong):
                with run.stages.of("package"):
                    outcome.build_package(training, tested)
            stop.check()
            with run.stages.of("report"), ProgressBar("report", 1):
                outcome.write_predictions(training, tested)
                outcome.write_report(training, tested, decided, result)
                result = outcome.result(training, tested, result)
            training.metrics_file.tracking.keep(complete.made(run))
            run.finish(result)
        run.summarize(result)


def check_result(run: Run, result: dict[str, Any], images: ImageFolder) -> None:
    """Raise UserError if a complete run's settings, images or file of weights have changed.

    Files that look unchanged aren't read again.
    """
    then, network = result["identity"], None
    pictures, before = then["pictures"], run.noted_pictures(then)
    alone = run.world.size == 1  # several processes check at the same time, and compare
    if not alone or before is None or not are_those(run.config, images, before, run.stop):
        images, _ = usable_images(run.config, images, run.stop, run.world)
        pictures = of_images(images)
    if run.weights_file and Path(run.weights_file).exists() and not run.knows_weights(result):
        # imported here: as above; other weights are identified by their name.
        from trainer.training.training import new_network

        network = new_network(run.config, images.classes)
    now = run.identity(pictures, network)
    if network is None:
        now |= {key: value for key, value in then.items() if key.startswith("weights.")}
    run.check_identity(then, now, images)


def guarded(work: Callable[[], None]) -> int:
    """Do the work; turn an error into one line and an exit code.

    Tell the other processes. HYDRA_FULL_ERROR=1 shows a mistake's traceback too.
    """
    try:
        work()
        return OK
    except Exception as error:
        sessions.end_as_decided()  # torchrun ends the others when the first of them has ended
        world = current_world()
        code, line = verdict(error, world)
        if command.wants_traceback(code):
            if world.size == 1:
                raise
            traceback.print_exc()
        world.tell(error, code, line, partial(log.log, command.level(error), line))
        return code


def verdict(error: Exception, world: World) -> tuple[int, str]:
    """Return the exit code of an error, and the line that the user sees."""
    if isinstance(error, Ended):
        return error.notice.code, str(error)
    if isinstance(error, Lost):
        return RESUME, world.signed(
            f"{error}; start the same command again to continue from the newest checkpoint"
        )
    code, line = command.verdict(error, explain_settings)
    if isinstance(error, Interrupted):
        return code, line
    return code, world.signed(line)


def main() -> int:
    """Run the command line's training, or its sweep; return the exit code."""
    shown, sys.argv[1:] = options.shown(sys.argv[1:])
    words = [word for word in sys.argv[1:] if word not in ("-m", "--multirun")]
    flags = any(word.startswith("-") for word in words)  # Hydra's own, --help say
    multirun = len(words) < len(sys.argv) - 1 and not flags
    # Hydra then raises its errors, instead of printing them and exiting.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sessions.end_when_asked(held=one_of_several())  # until there is something to save
    to_terminal(expendable=True, shown=shown)  # the run has a log of its own
    settings.register()
    world = current_world()
    work = partial(run, words)
    if not world.is_main_process:
        log.setLevel(logging.ERROR)
        work = partial(train, None, world)
    if multirun:
        work = partial(sweep, words)
    try:
        code = guarded(work)
    except SystemExit as end:  # of Hydra's function
        code = int(end.code or OK)
    sessions.end_as_decided()
    world.leave(code)
    return code


def run(words: list[str]) -> None:
    """Train one run, with the typed and the implied settings."""
    if answer := options.answer(words):
        print(answer)
        return
    flags = any(word.startswith("-") for word in words)  # Hydra's own, some with a value of theirs
    typed = [word for word in words if "=" in word and not word.startswith("-")] if flags else words
    resolved = resolve(typed)
    own = [word for word in words if word not in typed]
    sys.argv[1:] = own + resolved.words
    if flags or any(is_hydras(key_of(word)) for word in typed):
        hydra_main()
        return
    config = settings.load(resolved.composed)  # with a wrong setting, log nothing else
    for line in resolved.notes:
        log.info(line)
    # Hydra itself would compose twice more.
    train(config, current_world(), resolved.words)


def sweep(words: list[str]) -> None:
    """Run the sweep that was typed. Raises UserError under torchrun."""
    if current_world().size > 1:
        raise UserError(
            "-m, a sweep, starts processes of its own: give python -m trainer -m ..., "
            "without torchrun"
        )
    # imported here: a single run doesn't need the sweep's page and templates.
    from trainer.sweep import driver

    driver.run(words)


if __name__ == "__main__":
    command.leave(main(), globals())
