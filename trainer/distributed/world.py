"""This process's place among the processes of its run, and what they do together.

A run of one process has a `World`, whose methods do nothing and need no PyTorch. A run of several,
started by torchrun, has a `distributed.job.Job`. `gradients` and `exact` combine the gradients of
a batch.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

from trainer.common.errors import PackhorseError, UserError
from trainer.common.interrupt import Stop
from trainer.distributed.launched import one_of_several

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.settings.config import Config

T = TypeVar("T")

START = (
    "torchrun --nproc_per_node=N -m trainer (make train GPUS=N) starts N on this host, "
    "--nnodes=M on each of M hosts"
)


class Action(IntEnum):
    """What a process wants to do after a step; all do the largest that any process wants."""

    GO = 0
    SAVE = 1
    STOP = 2


class Lost(PackhorseError):
    """A process of the job no longer answers. The message names it."""


class Ended(PackhorseError):
    """Another process has ended the job, for a reason of its own."""

    def __init__(self, notice: "ExitNotice") -> None:
        super().__init__(f"{notice.who}: {notice.text}")
        self.notice = notice


@dataclass(frozen=True)
class ExitNotice:
    """The last message of a process to the others: why it ends."""

    who: str  # "rank 1 on gpu-box"
    node: int  # of the host that it runs on
    code: int  # its exit code
    text: str
    asked: bool  # whether it was asked to stop, and saved before it ended


class World:
    """One process alone."""

    rank = 0
    size = 1
    local_rank = 0  # among the processes of this host
    local_size = 1
    hosts = 1

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0, which logs and writes the run's directory."""
        return self.rank == 0

    def check(self, processes: int | None, hosts: int | None) -> None:
        """Raise UserError where the number of processes or hosts isn't the one asked for."""
        if processes not in (None, self.size):
            runs = "runs" if self.size == 1 else "run"
            raise UserError(f"train.processes={processes}, but {self.size} {runs}: {START}")
        if hosts not in (None, self.hosts):
            raise UserError(f"train.hosts={hosts}, but the processes run on {self.hosts}: {START}")

    def share_config(self, config: "Config | None", stop: Stop) -> "Config":
        """Return rank 0's settings in all processes. config: None in the others.

        Raises Interrupted when asked to stop meanwhile.
        """
        assert config is not None
        return config

    @contextmanager
    def connected(self, timeout: float, stop: Stop) -> Iterator[None]:
        """Let the processes talk while the context lasts.

        timeout: seconds that a process may keep the others waiting.

        Where an error comes from the end of another process, raises Lost, Ended or Interrupted
        instead.
        """
        yield

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """Return in all processes what `work` returns on rank 0, which alone does it."""
        return work()

    def check_same(self, facts: dict[str, str], stop: Stop) -> None:
        """Raise UserError in a process whose facts differ from rank 0's."""

    def barrier(self, stop: Stop | None = None) -> None:
        """Wait until all processes are here. It waits as long as they live.

        Raises Interrupted when asked to stop meanwhile.
        """

    def farewell(self) -> None:
        """Wait until each process has saved, or has ended."""

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let one process of each host go first: the others find its downloads on the disk."""
        yield

    def all_reduce_max(self, action: Action) -> Action:
        """Return the largest action of all processes."""
        return action

    def interrupt(self, stop: Stop) -> None:
        """Raise Interrupted in all processes, with the reason of the one that was asked."""
        stop.check()

    def rounds(self, batches: Iterable[T], stop: Stop) -> Iterator[T]:
        """Yield the batches of this process.

        Raises Interrupted in all processes at the same round.
        """
        for batch in batches:
            stop.check()
            yield batch

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Return the sums of all processes' values."""
        return values

    def first(self, mine: tuple[int, float] | None) -> tuple[int, float] | None:
        """Return the smallest of all processes' pairs, None where no process has one."""
        return mine

    def gather(self, mine: "list[Tensor]") -> "list[Tensor]":
        """Return on rank 0 the tensors of all processes, in order; elsewhere the process's own.

        mine: every size-th of them.
        """
        return mine

    def tell(self, error: Exception, code: int, line: str, show: Callable[[], None]) -> None:
        """Tell the other processes why this one ends.

        Tell the user too, by `show`, unless another process does that.
        """
        show()

    def signed(self, text: str) -> str:
        """Return `text` as the user sees it: with the name of this process, unless it is rank 0."""
        return text

    def leave(self, code: int) -> None:
        """Leave the job: the last call of a process. May not return."""


@functools.cache
def current_world() -> World:
    """Return this process's place, read from torchrun's environment variables."""
    if not one_of_several():
        return World()
    # imported here: only a job of several processes needs PyTorch for this.
    from trainer.distributed.job import Job

    return Job()
