"""What ends a session: signals to a whole group of processes, at any moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import PROJECT, environment, make_pictures, run_trainer, start_trainer
from trainer.common import sessions
from trainer.common.errors import OK, RESUME
from trainer.training import checkpoint

# --- children ---

# Started by a process that has a group of its own, in which the child still is when it is hit.
HIT_BEFORE_ITS_SESSION = """
import os, signal, sys
from trainer.common import sessions
def hit():
    for number in sessions.ENDING:
        os.kill(os.getpid(), number)  # as its group is hit, before it has a session
print(sessions.run([sys.executable, "-c", "print('lives')"], preexec_fn=hit).stdout, end="")
child = sessions.Child([sys.executable, "-c", sys.argv[1]], preexec_fn=hit)
print(child.wait(), os.getsid(0) == os.getpid())
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
ASKS = """
import sys
sys.path.insert(0, {path!r})
from trainer.common import sessions
sessions.end_when_asked()
"""


def test_a_child_lives_through_what_hits_its_group_before_it_has_a_session():
    asks = ASKS.format(path=str(PROJECT))
    done = subprocess.run(
        [sys.executable, "-c", HIT_BEFORE_ITS_SESSION, asks],
        cwd=PROJECT, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    # One that asks for the signals gets what came before, and ends in order. Nothing stays blocked.
    assert done.stdout.splitlines() == ["lives", f"{RESUME} True", "set()"], done.stderr
    assert done.stderr == "warning: stopped by SIGHUP; start the same command again\n"


def test_a_child_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        sessions.run(["sleep", "600"], timeout=0.05)


def started(place: str) -> list[str]:
    """The lines of our code that start processes without a session of their own."""
    lines = (PROJECT / place).read_text().splitlines()
    return [line for line in lines if "subprocess.run(" in line or "subprocess.Popen(" in line]


def test_all_of_a_runs_children_have_sessions_of_their_own():
    """Whoever starts a process in trainer/ does it by `sessions`, but for what is asked at once."""
    places = [path.relative_to(PROJECT) for path in (PROJECT / "trainer").rglob("*.py")]
    found = {str(place): started(str(place)) for place in places}
    del found["trainer/doctor.py"]  # which has nothing to save
    assert {place: lines for place, lines in found.items() if lines} == {}


# --- commands that have nothing to save ---

ANY = pytest.mark.parametrize("number", sessions.ENDING, ids=lambda number: number.name)


@ANY
@pytest.mark.parametrize("clear", [True, False])
def test_a_command_with_nothing_to_save_ends_in_one_line(tmp_path, number, clear):
    script = f"""
import os, tempfile
from trainer.common import sessions
sessions.end_when_asked(clear={clear})
with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
    print("said before")
    os.kill(os.getpid(), {int(number)})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (RESUME, "said before\n")
    line = f"warning: stopped by {number.name}; start the same command again\n"
    assert done.stderr == line and len(list(tmp_path.iterdir())) == (not clear)


def test_what_is_decided_stays_so_while_python_ends():
    script = """
import os, signal, sys, threading, time
from trainer.common import sessions
sessions.end_when_asked()
sessions.end_as_decided()
threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGTERM))).start()
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT).returncode == 3


MODULES = (
    "trainer",
    "trainer.doctor",
    "trainer.care",
    "trainer.checkpoint",
    "trainer.runs",
    "trainer.sweep.batch",
    "serving",
    "launch",
)


@pytest.mark.parametrize("module", MODULES)
def test_a_command_is_ready_for_signals_before_what_is_slow_to_import(module):
    name = module.replace(".", "/")
    path = PROJECT / f"{name}.py"
    if not path.exists():
        path = PROJECT / name / "__main__.py"
    before = path.read_text().split("sessions.end_when_asked(")[0]
    slow = ("import hydra", "import numpy", "import torch", "omegaconf", "trainer.training")
    assert not [word for word in slow if word in before]


def test_leave_waits_for_no_thread_but_does_what_was_registered():
    script = """
import atexit, threading, time
from trainer.common.command import leave
threading.Thread(target=time.sleep, args=(600,)).start()
atexit.register(print, "registered")
try:
    leave(4, {"a module": "that a program runs within itself"})
except SystemExit as end:
    print(end.code)
leave(3, globals())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (3, "4\nregistered\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "delay"),
    [
        (("trainer.doctor", "data.root=pictures"), 0.7),
        *(
            pytest.param((command, *words), delay, marks=pytest.mark.long)
            for command, *words in (
                ("trainer", "data.root=pictures"),
                ("trainer.care", "pictures"),
                ("trainer.doctor", "data.root=pictures"),
            )
            for delay in (0.2, 1, 2, 4, 8)
        ),
    ],
)
def test_ctrl_c_to_a_group_never_shows_a_traceback(tmp_path, words, delay):
    make_pictures(tmp_path / "pictures", {"train": 8, "valid": 3})
    process = subprocess.Popen(
        [sys.executable, "-m", *words, "model=small_cnn"],
        cwd=tmp_path, env=environment(tmp_path), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    time.sleep(delay)  # any moment is as good as another
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    # At the very first Python itself has not yet read a line of ours.
    early = "trainer/" not in output and (
        process.returncode == -signal.SIGINT or "init_import_site" in output
    )
    assert process.returncode in (OK, RESUME) or early, output
    assert early or "Traceback" not in output, output


# --- a run, hit as a group in each of its stages ---

RUN = (
    "name=run", "platform=local", "platform.cache=cache",
    "data=folder", "data.root=pictures", "model=small_cnn",
    "data.size=16", "data.resize=16", "data.workers=1", "train.epochs=2", "train.batch_size=8",
    "train.threads=1", "checkpoint.minutes=1e-4", "checkpoint.max_cost=1",
)  # fmt: skip
# Stages by a function that begins each: its module and name, and the words that it needs.
STAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "scan": ("trainer.images.folder", "scan", ()),
    "early": ("trainer.results.early", "check_room", ()),
    "packing": ("trainer.images.cache", "_threads", ()),
    "features": ("trainer.network.features", "compute",
                 ("model.freeze=backbone", "model.cached_views=1")),
    "epoch": ("trainer.training.loop", "train_one_step", ()),
    "evaluation": ("trainer.training.loop", "predict", ()),
    "test": ("trainer.results.outcome", "load_best", ()),
    "export": ("trainer.results.graph", "to_onnx", ()),
    "self-test": ("trainer.results.package", "_self_test", ()),
    "archive": ("trainer.results.package", "_archive", ()),
}  # fmt: skip
# Has the whole group hit when the function is called the first time, wherever it was imported to.
HIT = """
import importlib, os, sys
real, hit = getattr(importlib.import_module({module!r}), {name!r}), []
def function(*arguments, **options):
    if not hit:
        hit.append(True)
        os.killpg(0, {number})
    return real(*arguments, **options)
for module in list(sys.modules.values()):
    if getattr(module, {name!r}, None) is real:
        setattr(module, {name!r}, function)
"""


@pytest.fixture(scope="module")
def pictures_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sessions")
    return make_pictures(root / "pictures", {"train": 8, "valid": 3, "test": 3})


QUICK = ("self-test",)


@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=() if stage in QUICK else pytest.mark.long) for stage in STAGES],
)
def test_a_group_that_is_hit_in_any_stage_saves_and_goes_on(tmp_path, pictures_here, stage):
    (tmp_path / "pictures").symlink_to(pictures_here)
    module, name, words = STAGES[stage]
    number = sessions.ENDING[list(STAGES).index(stage) % len(sessions.ENDING)]
    before = HIT.format(module=module, name=name, number=int(number))
    process = start_trainer(tmp_path, *RUN, *words, before=before)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == RESUME, output
    assert f"stopped by {number.name}; everything is saved" in output.splitlines()[-1]
    if stage == "self-test":
        code, output = run_trainer(tmp_path, *RUN, *words)
        assert code == OK, output
    assert list((tmp_path / "runs").rglob(".writing-*")) == []
    saved = checkpoint.steps(tmp_path / "runs/run/checkpoints")
    assert bool(saved) == (list(STAGES).index(stage) > 3)


def test_a_second_ctrl_c_counts_only_after_a_first(tmp_path):
    """SIGTERM or a spot notice, and then Ctrl-C: the run still saves."""
    script = """
import os, signal
from trainer.common.interrupt import on_signals
with on_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.reason, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGTERM\n")


def test_a_signal_that_is_held_counts_when_it_is_heeded():
    """Of one of several processes, which must tell the others first."""
    script = """
import os, signal
from trainer.common import sessions
from trainer.common.interrupt import on_signals
sessions.end_when_asked(held=True)
os.kill(os.getpid(), signal.SIGTERM)
print("lives", flush=True)
with on_signals() as stop:
    print(stop.reason, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (RESUME, "lives\nSIGTERM\n"), done.stderr
