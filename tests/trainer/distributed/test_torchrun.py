"""What torchrun's end means: the exit code of the process that ended the job, and no traceback.

Real processes under it are in test_failures.py.
"""

import signal
import subprocess
import time

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from tests.conftest import PROJECT
from trainer.common.errors import FAULT, MISTAKE, OK, RESUME
from trainer.distributed import torchrun


def ended(*codes: int) -> ChildFailedError:
    """What torchrun raises, when processes have ended with these codes one after the other."""
    now = int(time.time())
    failures = {}
    for rank, code in enumerate(codes):
        failures[rank] = ProcessFailure(rank, 1000 + rank, code, "<N/A>")
        failures[rank].timestamp = now + rank
    return ChildFailedError("trainer", failures)


ENDS = {
    "well": (None, OK, ""),
    "a mistake, and the others follow": (ended(MISTAKE, RESUME), MISTAKE, ""),
    "asked to stop": (ended(RESUME), RESUME, ""),
    "a fault": (ended(FAULT, -signal.SIGTERM), FAULT, ""),
    "killed": (ended(-signal.SIGKILL, RESUME), RESUME, "rank 0 was killed by SIGKILL"),
    "torchrun is asked": (SignalException("", signal.SIGTERM), RESUME, ""),
    "nobody comes": (RendezvousTimeoutError("too late\nlong"), MISTAKE, "can't reach each other"),
    "no network": (DistNetworkError("no route"), MISTAKE, "can't reach each other: no route"),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_exit_code_is_that_of_the_process_that_ended_the_job(how, monkeypatch, capsys, caplog):
    error, code, line = ENDS[how]

    def main(arguments: list[str]) -> None:
        assert arguments[-2:] == ["-m", "trainer"]
        if error is not None:
            raise error

    monkeypatch.setattr(torchrun.run, "main", main)
    monkeypatch.setattr(torchrun, "to_terminal", lambda expendable: None)
    assert torchrun.main(["-m", "trainer"]) == code
    assert len(caplog.messages) == bool(line) and line in "".join(caplog.messages)
    assert "long" not in caplog.text


def test_a_fault_of_torchrun_itself_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(torchrun.run, "main", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torchrun.main([])


@pytest.mark.parametrize("ignored", [True, False])
def test_what_nohup_ignores_torchrun_ignores_too(ignored, monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    try:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert torchrun._signals() == ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"] * ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_make_starts_several_processes_by_it():
    said = subprocess.run(
        ["make", "-n", "-o", ".venv/train", "train", "GPUS=3"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "-m trainer.distributed.torchrun --standalone --nproc_per_node=3 -m trainer" in said
