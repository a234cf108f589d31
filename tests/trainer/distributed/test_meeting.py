"""Several processes that have not met yet: what ends one of them ends all, and soon."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ended, make_pictures, start
from tests.ports import free_port
from tests.trainer.distributed.together import all_ended, rank_environment
from trainer.common.errors import MISTAKE, OK, RESUME
from trainer.distributed import heartbeat
from trainer.distributed.heartbeat import Heartbeat

RUN = (
    "trainer", "name=run", "data=folder", "data.root=pictures", "model=small_cnn",
    "data.size=16", "data.resize=16", "platform=local", "train.threads=1",
)  # fmt: skip
# However long the other one takes to hear it, on a busy machine.
PATIENT = """
from trainer.distributed import heartbeat, job
heartbeat.SILENT = job.FAREWELL_SECONDS = 600
"""
# Has a process hit when it calls a function the first time, before it has met the others.
HIT = """
import os
from trainer.{module} import {name} as real
import trainer.{module}
def function(*arguments, **options):
    os.kill(os.getpid(), {number})
    return real(*arguments, **options)
trainer.{module}.{name} = function
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("meeting")
    make_pictures(root / "pictures", {"train": 8, "valid": 3})
    return root


def hit(module: str, name: str, number: signal.Signals) -> str:
    return HIT.format(module=module, name=name, number=int(number))


@pytest.mark.parametrize(
    ("rank", "place", "number"),
    [
        (0, ("settings.options", "answer"), signal.SIGTERM),
        (1, ("settings.config", "register"), signal.SIGHUP),
    ],
)
def test_a_signal_before_they_have_met_ends_all_of_them(directory, rank, place, number):
    """Also the one that comes when the first has already said why it ends."""
    port = free_port()
    before = [PATIENT, PATIENT]
    before[rank] += hit(*place, number)
    before[1 - rank] += "import time; time.sleep(1)"
    processes = [
        start(directory, RUN, rank_environment(directory, each, 2, port), before=before[each])
        for each in range(2)
    ]
    codes, outputs = all_ended(processes, 900)
    assert codes == [RESUME, RESUME], outputs
    said = "".join(outputs).splitlines()
    stops = [line for line in said if "stopped by" in line]
    assert len(stops) == 1 and f"stopped by {number.name}" in stops[0], outputs
    assert not [line for line in said if line.startswith("error: ") or "Traceback" in line]


@pytest.mark.parametrize(("words", "expected"), [("train.epochs=0", MISTAKE), ("--help", OK)])
def test_what_rank_0_alone_has_to_say_keeps_nobody(directory, words, expected):
    port = free_port()
    processes = [
        start(
            directory,
            ("trainer", words),
            rank_environment(directory, rank, 2, port),
            before=PATIENT,
        )
        for rank in range(2)
    ]
    codes, outputs = all_ended(processes, 500)
    assert codes == [expected, expected] and outputs[1] == "", outputs


def test_a_process_that_waits_for_rank_0_says_so_and_hears_signals(directory):
    variables = rank_environment(directory, 1, 2, free_port()) | {"LOCAL_RANK": "0"}
    before = "from trainer.distributed import job; job.FAREWELL_SECONDS = 0.1"
    process = start(directory, RUN, variables, before=before)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(r"waiting for rank 0 at 127\.0\.0\.1:\d+\n", line)
    process.send_signal(signal.SIGINT)
    code, output = ended(process, 900)
    assert code == RESUME and re.fullmatch("warning: stopped by SIGINT; .*\n", output), output


@pytest.mark.parametrize("taken", [True, False])
def test_a_port_that_rank_0_can_not_have_is_one_line(directory, taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if taken else 70_000
        code, output = ended(start(directory, RUN, rank_environment(directory, 0, 2, port)), 900)
    assert code == MISTAKE and len(output.splitlines()) == 1, output
    assert re.match(rf"error: 127.0.0.1:{port}: rank 0 can't listen there; give MASTER", output)


def test_a_store_that_has_gone_is_known_before_the_timeout(monkeypatch):
    """PyTorch's connection doesn't come back, however long it is waited for."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)

    class Gone:
        """A store whose host has ended."""

        def clone(self) -> "Gone":
            return self

        def set(self, key: str, value: str) -> None:
            raise torch.distributed.DistNetworkError("Broken pipe")

    me = Heartbeat(Gone(), 1, 2, "rank 1 on here")
    assert me.missing(1e9) is None
    me.watch()
    while me.missing(1e9) is None:
        time.sleep(0.01)
    assert str(me.missing(1e9)).startswith("the host of rank 0 no longer answers")
    me._mine["done"] = True
    me.join()
