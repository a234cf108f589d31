"""Ends a run that hangs, so that a rented machine doesn't wait for hours."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainer.common.console import log
from trainer.common.errors import RESUME
from trainer.common.watch import on_stall, stacks
from trainer.distributed.world import Lost, World
from trainer.settings.config import TrainConfig

PATIENCE = 60.0  # seconds that telling and saving may take: the disk itself may be what hangs
COMPILING = 3600.0  # seconds that the steps may take in which torch.compile compiles


class Rescue:
    """Saves a training whose main thread hangs, where that can be done."""

    def __init__(self) -> None:
        self.save: Callable[[], bool] | None = None  # returns whether it could


@contextmanager
def ended_on_stall(config: TrainConfig, world: World) -> Iterator[Rescue]:
    """End the process with RESUME when it hangs, after the stacks of its threads and a save."""
    rescue, seconds = Rescue(), config.stall_seconds or 0.0
    if seconds and config.compile:
        seconds = max(seconds, COMPILING)
    with on_stall(seconds, lambda: _end(rescue, world, seconds)):
        yield rescue


def _end(rescue: Rescue, world: World, seconds: float) -> None:
    latest = threading.Timer(PATIENCE, os._exit, (RESUME,))
    latest.daemon = True
    latest.start()
    try:
        # Not as a warning of several processes: those of rank 0 alone are shown.
        log.error("no progress for %g s; where its threads are:\n%s", seconds, stacks())
        saved = False
        if rescue.save is not None:
            with suppress(Exception):  # what can't be saved is not what ends it
                saved = rescue.save()
        state = "from the newest checkpoint"
        if saved:
            state = "from here: everything is saved"
        line = (
            f"stopped: no progress for {seconds:g} s (train.stall_seconds), the log has where "
            f"each thread was; start the same command again to continue {state}"
        )
        line = world.signed(line)
        world.tell(Lost(line), RESUME, line, lambda: log.error(line))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(RESUME)
