"""Several processes: how they end. Real processes, really stopped and killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import environment, make_pictures, run_trainer, wait_for
from tests.trainer.distributed.together import all_ended, together
from trainer.common.errors import MISTAKE, OK, RESUME
from trainer.training import checkpoint

pytestmark = pytest.mark.long  # processes are lost, and waited for

LIMIT = 30  # train.timeout_seconds: longer than a busy machine takes for a step
RUN = (
    "name=run", "data=folder", "data.root=pictures", "model=small_cnn",
    "data.size=16", "data.resize=16", "data.workers=0", "train.batch_size=8", "train.threads=1",
    "platform=local", "platform.cache=cache", "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
    f"train.timeout_seconds={LIMIT}",
)  # fmt: skip
LONG = (*RUN, "train.epochs=3000")


@pytest.fixture
def directory(tmp_path) -> Path:
    make_pictures(tmp_path / "pictures", {"train": 8, "valid": 3, "test": 3})
    return tmp_path


def steps(directory: Path) -> list[Path]:
    return checkpoint.steps(directory / "runs/run/checkpoints")


def errors(outputs: list[str]) -> list[str]:
    return [
        line for output in outputs for line in output.splitlines() if line.startswith("error: ")
    ]


def test_one_is_asked_to_stop_and_all_do_then_one_hangs_and_the_other_ends_in_time(directory):
    with together([directory] * 2, "trainer", *LONG) as processes:
        assert wait_for(lambda: len(steps(directory)) >= 2)
        processes[1].send_signal(signal.SIGTERM)
        codes, outputs = all_ended(processes, 60)
    assert codes == [RESUME] * 2, "\n".join(outputs)
    assert re.search("stopped by SIGTERM .rank 1 on .*start the same command again", outputs[0])
    assert not outputs[1]
    saved = steps(directory)[-1]
    checkpoint.verify(saved)

    with together([directory] * 2, "trainer", *LONG) as processes:
        assert wait_for(lambda: steps(directory)[-1] > saved)
        processes[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        output, _ = processes[0].communicate(timeout=600)
        assert time.monotonic() - started < LIMIT + 120
    assert processes[0].returncode == RESUME and "resumed from" in output, output
    assert re.search(
        "error: rank 1 on .* no longer answers: .*continue from the newest checkpoint", output
    )
    checkpoint.verify(steps(directory)[-1])


def test_the_error_of_the_process_that_fails_is_the_one_that_is_seen(directory):
    other = directory / "other"
    make_pictures(other / "pictures", {"train": 8, "valid": 3, "test": 4})
    with together([directory, other], "trainer", *RUN) as processes:
        codes, outputs = all_ended(processes, 60)
    assert codes == [MISTAKE] * 2, "\n".join(outputs)
    assert len(errors(outputs)) == 1 and re.match(
        "error: rank 1 on .*: the pictures: .* here, .* at rank 0", errors(outputs)[0]
    )
    assert not (other / "runs").exists()
    assert re.search("rank 1 on .*: the pictures", (directory / "runs/run/log.txt").read_text())


def test_a_wrong_setting_is_said_once(directory):
    with together([directory] * 2, "trainer", *RUN, "optim.lr=-1") as processes:
        codes, outputs = all_ended(processes, 60)
    assert codes == [MISTAKE] * 2, "\n".join(outputs)
    assert len(errors(outputs)) == 1 and "optim.lr=-1" in errors(outputs)[0]


def test_fewer_processes_than_asked_for_are_a_mistake(directory):
    code, output = run_trainer(directory, *RUN, "train.processes=2")
    assert (
        code == MISTAKE and "train.processes=2, but 1 runs: torchrun --nproc_per_node=N" in output
    )


def workers(torchrun: int) -> list[int]:
    """Its processes, by rank."""
    found = subprocess.run(
        ["pgrep", "-P", str(torchrun), "-f", "trainer"], capture_output=True, text=True
    ).stdout.split()
    return sorted(
        (int(child) for child in found),
        key=lambda child: "LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_text(),
    )


@contextmanager
def torchrun(directory: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.distributed.torchrun", "--nproc_per_node=2",
         "--standalone", *command],
        cwd=directory,
        env=environment(directory),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def test_torchrun_brings_a_killed_process_back(directory):
    with torchrun(
        directory,
        "--max-restarts=1",
        "-m",
        "trainer",
        *RUN,
        "train.epochs=40",
        "train.exact_shards=2",
    ) as process:
        assert wait_for(lambda: len(steps(directory)) >= 2)
        one, other = workers(process.pid)
        os.kill(other, signal.SIGKILL)
        assert wait_for(lambda: gone(one), LIMIT + 120), "the other process is still there"
        (code,), (output,) = all_ended([process], 180)
    assert code == OK, output
    assert (
        re.search("error: rank 1 on .* no longer answers", output)
        and "resumed from" in output
        and "test accuracy" in output
    )


# What ends the job, when it has saved twice: the signal, and to whom.
ENDS = {
    "Ctrl-C": (signal.SIGINT, "the group", "stopped by SIGINT"),
    "the terminal closes": (signal.SIGHUP, "the group", "stopped by SIGHUP"),
    "asked to stop": (signal.SIGTERM, "torchrun", "stopped by SIGTERM"),
    "a rank is lost": (signal.SIGKILL, "rank 1", "rank 1 was killed by SIGKILL"),
}


@pytest.mark.parametrize("how", ENDS)
def test_torchrun_ends_as_its_processes_do(directory, how):
    number, whom, line = ENDS[how]
    with torchrun(directory, "-m", "trainer", *LONG) as process:
        assert wait_for(lambda: len(steps(directory)) >= 2)
        if whom == "the group":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if whom == "torchrun" else workers(process.pid)[1], number)
        (code,), (output,) = all_ended([process], 600)
    assert code == RESUME, output
    assert line in output and "Traceback" not in output and "torch/" not in output, output
    checkpoint.verify(steps(directory)[-1])


def test_torchrun_says_a_wrong_setting_once(directory):
    with torchrun(directory, "-m", "trainer", *RUN, "optim.lr=-1") as process:
        (code,), (output,) = all_ended([process], 600)
    assert code == MISTAKE
    assert output.startswith("error: optim.lr=-1") and len(output.splitlines()) == 1, output


def test_no_process_outlives_torchrun(directory):
    with torchrun(directory, "-m", "trainer", *LONG, "train.exact_shards=2") as process:
        assert wait_for(lambda: len(steps(directory)) >= 2)
        one, other = workers(process.pid)
        process.kill()
        assert wait_for(lambda: gone(one) and gone(other), LIMIT + 120)
        assert "the end of torchrun" in (directory / "runs/run/log.txt").read_text()
    checkpoint.verify(steps(directory)[-1])
