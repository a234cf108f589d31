"""A terminal that is closed and a pipe that nobody reads: real runs go on, or save, and give the
model of an undisturbed one.
"""

import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import (
    PROJECT,
    Process,
    environment,
    make_pictures,
    run_trainer,
    start_trainer,
    wait_for,
)
from tests.forked import Forked
from tests.soak import difference, outcome
from tests.trainer.distributed.together import all_ended, together
from trainer.common.errors import OK, RESUME
from trainer.training import checkpoint

RUN = (
    "name=run", "platform=local", "platform.cache=cache",
    "data=folder", "data.root=pictures", "model=small_cnn",
    "data.size=16", "data.resize=16", "data.workers=0", "train.epochs=4", "train.batch_size=8",
    "train.threads=1", "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
)  # fmt: skip
PATIENCE = 240  # seconds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    make_pictures(directory / "pictures", {"train": 16, "valid": 8, "test": 3})
    code, output = run_trainer(directory, *RUN)
    assert code == OK, output
    return directory


@pytest.fixture
def cwd(tmp_path: Path, undisturbed: Path) -> Path:
    (tmp_path / "pictures").symlink_to(undisturbed / "pictures")
    return tmp_path


def weights(run: Path) -> bytes:
    """Those in the model package."""
    with tarfile.open(run / "model.tar.gz") as package:
        file = package.extractfile("model.safetensors")
        assert file is not None
        return file.read()


def check_equal(cwd: Path, undisturbed: Path) -> None:
    """The run has the checkpoint, best weights and package of the undisturbed one."""
    runs = cwd / "runs/run", undisturbed / "runs/run"
    assert difference(*map(outcome, runs)) is None
    assert weights(runs[0]) == weights(runs[1])


def start(cwd: Path, *command: str, **streams: int) -> subprocess.Popen[bytes]:
    """The command in a session of its own. streams: stdout and stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=environment(cwd),
        start_new_session=True,
        **streams,
    )


def shown(handle: int, wanted: bytes) -> bytes:
    """What a terminal or a pipe shows until it shows `wanted`."""
    text = b""
    while wanted not in text and (more := os.read(handle, 4096)):
        text += more
    return text


def terminal() -> tuple[int, int]:
    """The end of whoever looks at it, and that of the processes in it."""
    return pty.openpty()


def pipe() -> tuple[int, int]:
    return os.pipe()


# --- gone without a signal: disown, a killed tee, `| head -1` ---


@pytest.mark.parametrize("opened", [terminal, pipe])
def test_a_run_whose_output_goes_nowhere_ends_as_if_it_were_seen(cwd, undisturbed, opened):
    looking, written = opened()
    process = Forked(cwd, ["trainer", *RUN], environment(cwd), output=written)
    os.close(written)
    assert shown(looking, b"run ").startswith(b"run run in ")
    os.close(looking)
    assert process.wait(PATIENCE) == OK
    assert "model package" in (cwd / "runs/run/log.txt").read_text()
    check_equal(cwd, undisturbed)


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
def test_each_stream_is_lost_by_itself(cwd, lost):
    looking, written = pipe()
    os.close(looking)
    kept = "stderr" if lost == "stdout" else "stdout"
    process = start(
        cwd,
        "trainer",
        *RUN,
        "train.epochs=1",
        "--cfg",
        "job",
        **{lost: written, kept: subprocess.PIPE},
    )
    os.close(written)
    said = process.communicate(timeout=PATIENCE)[0 if kept == "stdout" else 1]
    assert process.returncode == OK, said
    assert (b"epochs: 1" in said) == (kept == "stdout")
    assert b"Error" not in said and b"Exception" not in said


CLOSED = {"stdout": ">&-", "all": "<&- >&- 2>&-", "a full disk": ">/dev/full 2>&1"}


@pytest.mark.parametrize(
    "how",
    ["stdout", *(pytest.param(how, marks=pytest.mark.long) for how in ("all", "a full disk"))],
)
def test_a_run_started_without_output_trains(cwd, undisturbed, how):
    command = f'exec "{sys.executable}" -m trainer {" ".join(RUN)} {CLOSED[how]}'
    done = subprocess.run(
        ["sh", "-c", command], cwd=cwd, env=environment(cwd), capture_output=True, text=True
    )
    assert done.returncode == OK, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    check_equal(cwd, undisturbed)


# Commands that print more than a pipe holds, or print and end: what is left in a buffer is flushed
# at the very end.
COMMANDS = [
    ("trainer", "--help"),
    ("trainer.checkpoint", "ls", "nowhere"),
    ("launch", "plan", "--json"),
    ("launch", "fly"),
    ("launch", "prices"),
    ("serving", "--help"),
    ("serving", "check", "nowhere"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_whose_reader_has_gone_ends_in_order(tmp_path, command):
    looking, written = pipe()
    os.close(looking)
    unread = start(
        tmp_path, *command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.PIPE
    )
    os.close(written)
    read = start(
        tmp_path, *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    said = [process.communicate(timeout=PATIENCE)[1] for process in (unread, read)]
    assert (unread.returncode, said[0]) == (read.returncode, said[1])


def test_what_is_not_lost_but_late_is_waited_for():
    """A pipe that somebody has made non-blocking and that is full for a while."""
    script = "from trainer.common import streams; streams.outlive(); print('x' * 300_000)"
    looking, written = pipe()
    os.set_blocking(written, False)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=written)
    os.close(written)
    text = b""
    while more := os.read(looking, 1 << 16):
        text += more
    os.close(looking)
    assert process.wait(PATIENCE) == 0 and len(text) == 300_001


def test_a_full_disk_is_told_where_the_output_is_the_result(tmp_path):
    with Path("/dev/full").open("wb") as full:
        done = start(
            tmp_path,
            "launch",
            "plan",
            "--json",
            stdin=subprocess.DEVNULL,
            stdout=full.fileno(),
            stderr=subprocess.PIPE,
        )
        said = done.communicate(timeout=PATIENCE)[1]
    assert done.returncode not in (OK, RESUME) and b"No space left" in said


# --- SIGHUP: the session ends, the window is closed ---


# Has a new session take this terminal for its own: the kernel tells it when the terminal is closed.
IN_FRONT = "import fcntl, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0)"


def test_a_closed_window_saves_and_the_same_command_goes_on(cwd, undisturbed):
    looking, written = terminal()
    process = Forked(cwd, ["trainer", *RUN], environment(cwd), IN_FRONT, written)
    os.close(written)
    checkpoints = cwd / "runs/run/checkpoints"
    shown(looking, b"run ")
    assert wait_for(lambda: checkpoint.steps(checkpoints) or process.poll() is not None, PATIENCE)
    os.close(looking)
    assert process.wait(PATIENCE) == RESUME
    assert "Interrupted: SIGHUP" in (cwd / "runs/run/log.txt").read_text()
    code, output = run_trainer(cwd, *RUN)
    assert code == OK and "resumed from" in output, output
    check_equal(cwd, undisturbed)


def hang_up(process: Process) -> None:
    """As a closing terminal does: to all that were started in it."""
    os.killpg(process.pid, signal.SIGHUP)


def packing(cwd: Path) -> bool:
    return any(path.stat().st_size for path in (cwd / "cache/pixels").glob("*/*.pixels"))


def features(cwd: Path) -> bool:
    return any(path.stat().st_size for path in (cwd / "cache/features").rglob("*.f32"))


def packaging(cwd: Path) -> bool:
    return any((cwd / "runs/run").glob(".writing-*/**/package.json"))


STAGES = {
    "packing": (packing, ()),
    "features": (features, ("model.freeze=backbone", "model.cached_views=2")),
    "packaging": (packaging, ()),
}


@pytest.mark.parametrize("stage", STAGES)
def test_sighup_in_every_stage_loses_nothing(cwd, undisturbed, stage):
    reached, more = STAGES[stage]
    process = start_trainer(cwd, *RUN, *more)
    assert wait_for(lambda: reached(cwd) or process.poll() is not None, PATIENCE)
    hang_up(process)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == RESUME, output
    assert run_trainer(cwd, *RUN, *more)[0] == OK
    if not more:
        check_equal(cwd, undisturbed)


def test_several_processes_hang_up_together_and_go_on_unseen(cwd):
    """As torchrun does: it hands the signal on. Then nobody reads what they print."""
    checkpoints = cwd / "runs/run/checkpoints"
    with together([cwd] * 2, "trainer", *RUN, "train.epochs=3000") as processes:
        assert wait_for(lambda: checkpoint.steps(checkpoints), PATIENCE)
        for process in processes:
            process.send_signal(signal.SIGHUP)
        codes, outputs = all_ended(processes, PATIENCE)
    assert codes == [RESUME] * 2 and "stopped by SIGHUP" in outputs[0], outputs
    saved = checkpoint.steps(checkpoints)[-1]
    checkpoint.verify(saved)
    with together([cwd] * 2, "trainer", *RUN, "train.epochs=3000") as processes:
        for process in processes:
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
        assert wait_for(lambda: checkpoint.steps(checkpoints)[-1] > saved, PATIENCE)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE) for process in processes] == [RESUME] * 2


SWEEP = (
    "-m",
    *(word for word in RUN if not word.startswith("name=")),
    "name=sweep",
    "optim.lr=1e-3,1e-2",
)


@pytest.mark.long
def test_a_sweep_hangs_up_and_goes_on_unseen(cwd):
    process = start_trainer(cwd, *SWEEP, "train.epochs=400")
    trial = cwd / "runs/sweep/0000/checkpoints"
    assert wait_for(lambda: checkpoint.steps(trial) or process.poll() is not None, PATIENCE)
    hang_up(process)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == RESUME and "stopped by SIGHUP" in output, output
    shutil.rmtree(cwd / "runs")
    looking, written = pipe()
    os.close(looking)
    command = ["trainer", *SWEEP, "train.epochs=1"]
    unseen = Forked(cwd, command, environment(cwd), output=written)
    os.close(written)
    assert unseen.wait(PATIENCE) == OK
    assert all((cwd / f"runs/sweep/000{number}/result.json").exists() for number in range(2))


def test_what_nohup_ignores_stays_ignored(cwd, undisturbed):
    ignores = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup does
    with (cwd / "nohup.out").open("wb") as output:
        process = Forked(cwd, ["trainer", *RUN], environment(cwd), ignores, output.fileno())
    assert wait_for(lambda: packing(cwd) or process.poll() is not None, PATIENCE)
    hang_up(process)
    assert wait_for(
        lambda: checkpoint.steps(cwd / "runs/run/checkpoints") or process.poll() is not None,
        PATIENCE,
    )
    if process.poll() is None:
        hang_up(process)
    assert process.wait(PATIENCE) == OK
    check_equal(cwd, undisturbed)


def test_gone_is_seen_by_writing():
    script = """
import os, sys
from trainer.common import streams
looking, written = os.pipe()
os.dup2(written, 1)
streams.outlive()
print("seen", flush=True)
assert not streams.gone(sys.stdout)
os.close(looking)
os.close(written)
print("unseen", flush=True)
assert streams.gone(sys.stdout) and not streams.gone(sys.stderr)
os.write(1, b"and what C code writes")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
