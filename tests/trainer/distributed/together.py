"""Several processes as one job, started as torchrun starts them, without what torchrun does when
one ends.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import environment
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
def together(directories: Sequence[Path], *command: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A process in each of the directories: rank 0 in the first. None outlives the context."""
    port, size = free_port(), len(directories)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=cwd,
            env=rank_environment(cwd, rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, cwd in enumerate(directories)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(
    processes: Sequence[subprocess.Popen[str]], seconds: float = 120
) -> tuple[list[int], list[str]]:
    """The exit codes and what was printed."""
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def run_together(cwd: Path, size: int, *scenarios: str) -> None:
    """Runs tests.trainer.distributed.one_of_many in `size` processes, which must all end well."""
    with together([cwd] * size, "tests.trainer.distributed.one_of_many", *scenarios) as processes:
        codes, outputs = ended(processes)
    assert codes == [0] * size, "\n".join(outputs)
