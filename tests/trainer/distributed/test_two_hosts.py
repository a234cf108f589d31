"""Two hosts: network namespaces, joined by a cable that can be cut. Needs root and iproute2 (make
hosts installs it).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import environment, make_pictures, run_trainer, wait_for
from tests.soak import difference, outcome
from trainer.common.errors import OK, RESUME
from trainer.training import checkpoint

pytestmark = pytest.mark.long  # network namespaces, and two hosts that wait for each other

LIMIT = 30  # train.timeout_seconds: longer than a busy machine takes for a step
RUN = (
    "name=run", "data=folder", "data.root=pictures", "model=small_cnn",
    "data.size=16", "data.resize=16", "data.workers=0", "train.batch_size=8", "train.epochs=3000",
    "train.threads=1", "train.hosts=2", "platform=local", "platform.cache=cache",
    "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
    f"train.timeout_seconds={LIMIT}",
)  # fmt: skip
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def can_make_hosts() -> bool:
    name = f"packhorse-try-{os.getpid()}"
    if (
        shutil.which("ip") is None
        or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode
    ):
        return False
    ip("netns", "delete", name)
    return True


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces by name; in each, the end of the cable is called `cable`."""
    if not can_make_hosts():
        pytest.skip("network namespaces need root and iproute2: make hosts")
    names = [f"packhorse-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(host: str, number: int, cwd: Path, *words: str) -> subprocess.Popen[str]:
    torchrun = [
        "--nnodes=2",
        "--nproc_per_node=1",
        f"--node_rank={number}",
        f"--master_addr={ADDRESSES[0]}",
        "--master_port=29511",
    ]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "trainer.distributed.torchrun",
         *torchrun, "-m", "trainer", *RUN, *words],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_hosts_train_together_lose_each_other_and_go_on(tmp_path, hosts):
    directories = [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        make_pictures(directory / "pictures", {"train": 8, "valid": 3, "test": 3})
    checkpoints = directories[0] / "runs/run/checkpoints"

    processes = [start(host, number, directories[number]) for number, host in enumerate(hosts)]
    try:
        assert wait_for(
            lambda: len(checkpoint.steps(checkpoints)) >= 2 or processes[0].poll() is not None
        )
        ip("-n", hosts[0], "link", "set", "cable", "down")
        cut = time.monotonic()
        outputs = [process.communicate(timeout=LIMIT + 600)[0] for process in processes]
        assert time.monotonic() - cut < LIMIT + 120, "\n".join(outputs)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [RESUME] * 2, "\n".join(outputs)
    assert "2 on 2 hosts" in outputs[0]
    assert re.search("error: rank 1 on .* no longer answers", outputs[0]), outputs[0]
    assert re.search("error: rank 1 on .*: the host of rank 0 no longer answers", outputs[1]), (
        outputs[1]
    )
    saved = checkpoint.steps(checkpoints)[-1]
    checkpoint.verify(saved)
    assert not (directories[1] / "runs").exists()  # the run is rank 0's

    ip("-n", hosts[0], "link", "set", "cable", "up")
    processes = [start(host, number, directories[number]) for number, host in enumerate(hosts)]
    try:
        assert wait_for(
            lambda: checkpoint.steps(checkpoints)[-1] > saved or processes[0].poll() is not None
        )
        for process in processes:
            process.terminate()
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert re.search("resumed from .*step-", outputs[0]), outputs[0]
    assert "stopped by SIGTERM" in outputs[0] and checkpoint.steps(checkpoints)[-1] > saved, (
        outputs[0]
    )


OUTAGE = 30  # seconds
PATIENT = ("train.timeout_seconds=120", "train.exact_shards=2", "train.epochs=200")


def processes_of(host: str) -> list[int]:
    said = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
    return [int(pid) for pid in said.split()]


def test_an_outage_and_a_host_that_dies_change_no_bit(tmp_path, hosts):
    directories = [tmp_path / "first", tmp_path / "second", tmp_path / "alone"]
    for directory in directories:
        make_pictures(directory / "pictures", {"train": 8, "valid": 3, "test": 3})
    checkpoints = directories[0] / "runs/run/checkpoints"

    def started() -> list[subprocess.Popen[str]]:
        places = zip(hosts, range(2), directories[:2], strict=True)
        return [start(host, number, directory, *PATIENT) for host, number, directory in places]

    def goes_on(processes: list[subprocess.Popen[str]]) -> None:
        """Wait for a checkpoint that isn't there yet."""
        before = checkpoint.steps(checkpoints)[-1:]
        assert wait_for(
            lambda: checkpoint.steps(checkpoints)[-1:] > before or processes[0].poll() is not None
        )
        assert processes[0].poll() is None, processes[0].communicate()[0]

    processes = started()
    try:
        goes_on(processes)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        time.sleep(OUTAGE)  # less than they have patience for
        ip("-n", hosts[1], "link", "set", "cable", "up")
        goes_on(processes)
        for pid in processes_of(hosts[1]):
            os.kill(pid, signal.SIGKILL)
        output, _ = processes[0].communicate(timeout=600)
        processes[1].communicate()
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == RESUME, output
    assert re.search("error: rank 1 on .* no longer answers", output) and "Traceback" not in output

    processes = started()
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [OK] * 2, "\n".join(outputs)
    assert "resumed from" in outputs[0]
    words = [word for word in (*RUN, *PATIENT) if not word.startswith("train.hosts")]
    code, output = run_trainer(directories[2], *words)
    assert code == OK, output
    runs = [outcome(place / "runs/run") for place in (directories[0], directories[2])]
    assert difference(*runs) is None
