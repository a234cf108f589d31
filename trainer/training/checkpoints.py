"""The checkpoints of one training: what goes in, when, and how many stay."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.common import files
from trainer.common.console import log
from trainer.common.threads import work_alone
from trainer.common.watch import SLOW, watch
from trainer.settings.config import CheckpointConfig
from trainer.training import checkpoint


class Checkpoints:
    """Written in the background, one at a time, by rank 0 alone.

    take: returns the state to save, with references to live tensors, which must not change before
    `settle` has returned. noted: called after each write, in the background. writes: False in the
    other processes, where nothing here does anything.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        take: Callable[[], dict[str, Any]],
        noted: Callable[[], None],
        writes: bool,
    ) -> None:
        self.root, self.keep, self.writes = root, config.keep, writes
        self.cadence = checkpoint.Cadence(config.minutes, config.max_cost)
        self.good: set[str] = set()  # names known to be whole: written or verified by this process
        # The best weights so far, and where they were evaluated: they lie in each checkpoint.
        self._best: Future[checkpoint.Snapshot] | None = None
        self._newest: Future[checkpoint.Snapshot] | None = None
        self._take, self._noted = take, noted
        # Two threads: a disk that is slow must not hold a copy.
        self._copier = ThreadPoolExecutor(1, "snapshot", initializer=work_alone)
        self._copies: list[Future[checkpoint.Snapshot]] = []
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def keep_best(self, weights: dict[str, Tensor], environment: dict[str, Any]) -> None:
        """Copy the weights that the next checkpoints hold as the best, in the background."""
        if self.writes:
            old = None if self._is_writing() else self._best
            self._best = self._copy({"network": weights, "environment": environment}, old)

    def best(self) -> dict[str, Any] | None:
        """Return the best weights so far, and where they were evaluated; None in the beginning."""
        return self._best.result().state() if self._best else None

    def go_on_from(self, path: Path, state: dict[str, Any]) -> None:
        """Take the best weights from a checkpoint that was found whole."""
        self.good.add(path.name)
        self.begin_with(state)

    def begin_with(self, state: dict[str, Any]) -> None:
        """Take the best weights of a state, another run's perhaps."""
        if self.writes and state["best"] is not None:
            self._best = self._copy(state["best"], None)

    def save_beginning(self, epoch: int) -> None:
        """Keep the state in which an epoch begins, until the next one, beside the checkpoints.

        epoch: from 0.
        """
        if not self.writes:
            return
        self.wait()
        checkpoint.write(self.root, _beginning(epoch), checkpoint.snapshot(self._take()))
        for old in self.root.glob("epoch-*"):
            if old.name != _beginning(epoch):
                files.remove(old)

    def beginning(self, epoch: int) -> dict[str, Any] | None:
        """Return the state that `save_beginning` kept; None, and why, where it can't be read."""
        self.wait()
        try:
            return checkpoint.load(self.root / _beginning(epoch))
        except checkpoint.Damaged as error:
            log.warning("%s", error)
            return None

    def go_back(self, step: int) -> None:
        """Save the state of a training that went back to `step`, and forget what was after it."""
        self.save()
        self.wait()
        kept = checkpoint.step_name(step, evaluated=True)
        for path in checkpoint.steps(self.root):
            if self.writes and path.name > kept:
                self.good.discard(path.name)
                files.remove(path)

    def due(self, epoch_ends: bool = False) -> bool:
        """Return whether to save now."""
        return self.writes and not self._is_writing() and self.cadence.due(epoch_ends)

    def save_if_due(self, epoch_ends: bool = False) -> None:
        """Save, where it is time to."""
        if self.due(epoch_ends):
            self.save()

    def save(self) -> None:
        """Have the state copied and written, in the background.

        But no weights that are no longer finite: the loss of the next step will tell, and the
        checkpoint before them is the one to go on from. Waits for the write before it, and raises
        what that raised.
        """
        if not self.writes:
            return
        self.wait()
        state = self._take()
        progress = state["progress"]
        name = checkpoint.step_name(progress["step"], evaluated=progress["batch"] == 0)
        self._newest = self._copy(state, self._newest)
        self._writing = self._writer.submit(self._write, name, self._newest, self._best)

    def settle(self) -> None:
        """Return when the tensors of the state may change: what is copied of them is."""
        while self._copies:
            self._copies.pop().result()

    def _copy(
        self, state: dict[str, Any], old: Future[checkpoint.Snapshot] | None
    ) -> Future[checkpoint.Snapshot]:
        """Begin to copy a state. old: a snapshot that nobody needs any more, for its memory."""
        memory = old.result().data if old else None
        copy = self._copier.submit(checkpoint.freeze(state), memory)
        self._copies.append(copy)
        return copy

    def _is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Return when the last snapshot is on disk.

        Raises OSError where it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with watch.over(SLOW):  # a disk in the network may be
                writing.result()

    def _write(
        self,
        name: str,
        newest: Future[checkpoint.Snapshot],
        best: Future[checkpoint.Snapshot] | None,
    ) -> None:
        started = time.monotonic()
        if not newest.result().finite:
            return
        checkpoint.write(self.root, name, newest.result(), best.result() if best else None)
        self._noted()
        self.good.add(name)
        checkpoint.prune(self.root, self.keep, self.good)
        self.cadence.saved(time.monotonic() - started)


def _beginning(epoch: int) -> str:
    return f"epoch-{epoch:08d}"
