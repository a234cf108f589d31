"""Several processes as one job, started as torchrun starts them, without what torchrun does when
one ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import Process, ended, environment, start
from tests.ports import free_port


def rank_environment(cwd: Path, rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives to a process of a job on one host."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return environment(cwd) | {name: str(value) for name, value in names.items()}


@contextmanager
def together(
    directories: Sequence[Path], *command: str, forked: bool = True
) -> Iterator[list[Process]]:
    """A process in each of the directories: rank 0 in the first. None outlives the context.

    forked: as in tests/conftest.py's start_trainer.
    """
    port, size = free_port(), len(directories)
    environments = [rank_environment(cwd, rank, size, port) for rank, cwd in enumerate(directories)]
    processes = [
        start(cwd, command, variables, forked)
        for cwd, variables in zip(directories, environments, strict=True)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def all_ended(processes: Sequence[Process], seconds: float = 120) -> tuple[list[int], list[str]]:
    """The exit codes and what was printed."""
    codes, outputs = zip(*[ended(process, seconds) for process in processes], strict=True)
    return list(codes), list(outputs)


def run_together(cwd: Path, size: int, *scenarios: str) -> None:
    """Runs tests.trainer.distributed.one_of_many in `size` processes, which must all end well."""
    with together([cwd] * size, "tests.trainer.distributed.one_of_many", *scenarios) as processes:
        codes, outputs = all_ended(processes)
    assert codes == [0] * size, "\n".join(outputs)
