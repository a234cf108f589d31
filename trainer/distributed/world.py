"""Where this process stands among those of its run, and what they do together.

One alone needs no PyTorch for it.

A run of one process has a `World`, whose methods do nothing; one of several, started by torchrun,
has a `distributed.job.Job`. How the gradients of a batch come together is a matter of its own:
`gradients`, `exact`.
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
    """What a process wants to do after a step; the largest of all processes is done by all."""

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
    """The last that a process tells the others: why it ends."""

    who: str  # "rank 1 on gpu-box"
    node: int  # of the host that it runs on
    code: int  # its exit code
    text: str
    asked: bool  # to stop, and has done so in order


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
        """Raise UserError where another number of processes or hosts runs than was asked for."""
        if processes not in (None, self.size):
            runs = "runs" if self.size == 1 else "run"
            raise UserError(f"train.processes={processes}, but {self.size} {runs}: {START}")
        if hosts not in (None, self.hosts):
            raise UserError(f"train.hosts={hosts}, but the processes run on {self.hosts}: {START}")

    def share_config(self, config: "Config | None", stop: Stop) -> "Config":
        """Give rank 0's settings to all processes; the others come with None.

        Raises Interrupted when asked to stop meanwhile.
        """
        assert config is not None
        return config

    @contextmanager
    def connected(self, timeout: float, stop: Stop) -> Iterator[None]:
        """Let the processes talk while the context lasts.

        timeout: seconds that one may keep the others waiting.

        Raises Lost, Ended or Interrupted in the place of an error that comes from another process's
        end.
        """
        yield

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """Return what rank 0's `work` returns, in all processes; the others don't do it."""
        return work()

    def check_same(self, facts: dict[str, str], stop: Stop) -> None:
        """Raise UserError in a process whose facts are not rank 0's."""

    def barrier(self, stop: Stop | None = None) -> None:
        """Wait until all processes are here, however long that takes, as long as they live.

        Raises Interrupted when asked to stop meanwhile.
        """

    def farewell(self) -> None:
        """Wait until all processes have saved what is to be saved, or have left."""

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let one process of each host through first: what it downloads, the others find."""
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
        """Return the smallest of all processes' pairs, where one has any."""
        return mine

    def gather(self, mine: "list[Tensor]") -> "list[Tensor]":
        """Return on rank 0 the tensors of all processes, elsewhere its own.

        Each process has every size-th one.
        """
        return mine

    def tell(self, error: Exception, code: int, line: str, show: Callable[[], None]) -> None:
        """Tell the other processes why this one ends.

        The user is told, by `show`, unless another process does that.
        """
        show()

    def signed(self, text: str) -> str:
        """Return `text` as the user is to see it, with the process that it comes from."""
        return text

    def leave(self, code: int) -> None:
        """End this process's part: the last thing that it does. May not return."""


@functools.cache
def current_world() -> World:
    """Return where this process stands, read from torchrun's environment."""
    if not one_of_several():
        return World()
    # imported here: only a job of several needs PyTorch to say where it stands.
    from trainer.distributed.job import Job

    return Job()
