"""`python -m trainer [key=value ...]`: the stages of a run, in order. Hydra's own flags (--help, -m, --cfg job) work as everywhere."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig

from trainer import config as settings
from trainer.console import log, to_terminal
from trainer.datasets import find_pictures
from trainer.errors import MISTAKE, OK, RESUME, Interrupted, UserError, machine_fault
from trainer.explain import CONFIG_ERRORS, explain
from trainer.interrupt import on_signals, on_spot_notice
from trainer.run import check_identity, open_run

CONF = str(Path(__file__).parents[1] / "conf")
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def hydra_main(composed: DictConfig) -> None:
    sys.exit(guarded(lambda: train(composed)))


def train(composed: DictConfig) -> None:
    config = settings.load(composed)
    for line in settings.ignored(config, sys.argv[1:]):
        log.warning(line)

    started = time.monotonic()
    with on_signals() as stop, open_run(config) as run, on_spot_notice(stop) if config.platform.name == "ec2" else nullcontext():
        found = find_pictures(config)
        if result := run.result():
            check_identity(result["identity"], config, found.fingerprint, run.directory)
            log.info("this run is complete; to train once more, give another name=... or seed=...")
            run.summarize(result)
            return
        # Imported here: a wrong setting or folder is answered before PyTorch is loaded.
        from trainer import metrics, stages
        from trainer.loop import fit

        machine = stages.prepare_machine(config)
        network = stages.make_network(config, found, machine)  # before the pictures are read: a missing weights file costs no time
        found, read = stages.read_pictures(config, found, run, stop)
        feed = stages.make_feed(config, found, read, machine)
        batches = stages.cache_features(config, network, feed, machine, stop)
        learner = stages.make_learner(config, network, batches, machine)
        ledger = metrics.Ledger(run.directory / "metrics.jsonl", run.directory / "tensorboard" if config.train.tensorboard else None)
        checkpoints, progress = stages.resume(config, run, learner, ledger, found, machine)
        fit(learner, batches, config, progress, ledger, checkpoints, stop)
        tested = stages.test(run, network, learner, feed, progress, ledger, stop)
        stages.build_package(config, run, network, feed, tested, progress)
        stages.write_report(config, run, feed, tested, progress, machine)
        result = stages.result(config, found, tested, progress, seconds=time.monotonic() - started)
        run.finish(result)
        run.summarize(result)


def guarded(work: Callable[[], None]) -> int:
    """Runs, and turns what went wrong into one line and an exit code (trainer/errors.py). HYDRA_FULL_ERROR=1 shows a mistake's traceback too."""
    try:
        work()
        return OK
    except Interrupted as reason:
        log.warning("stopped by %s; everything is saved: the same command goes on from here", reason)
        return RESUME
    except Exception as error:
        line = one_line(error)
        if line is None or WANTS_TRACEBACK:
            raise
        log.error(line)
        return MISTAKE


def one_line(error: Exception) -> str | None:
    """What the user can mend, in one line; None for a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, CONFIG_ERRORS):
        return explain(error, settings.keys())
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported for the sake of its name
        return f"the GPU's memory is full ({str(error).split('. ')[0]}); lower train.batch_size, or split the batches with train.accumulate=2 or more"
    return machine_fault(error) if isinstance(error, OSError) else None


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, instead of printing them and exiting
    # Until there is something to save, Ctrl-C ends the process: a KeyboardInterrupt inside an import is swallowed by some C extensions.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    to_terminal()
    settings.register()
    return guarded(hydra_main)


if __name__ == "__main__":
    sys.exit(main())
