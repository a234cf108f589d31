"""What a driver does when trials fail, and when what it writes to does. See `trial.py`."""

import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import wait_for
from tests.trainer.sweep.driving import said_in, start, starts, states, sweep
from trainer.common import command, errors
from trainer.common.errors import (
    FAULT,
    MACHINE,
    MISTAKE,
    OK,
    RESUME,
    MachineFault,
    Unreadable,
    UserError,
)
from trainer.settings.search_space import Categorical, Sweep
from trainer.sweep import faults
from trainer.sweep import ledger as ledgers
from trainer.sweep.driver import Driver
from trainer.sweep.faults import Whose
from trainer.sweep.ledger import FAILED, Trial

TRIAL, MACHINES, OPEN = Whose.TRIAL, Whose.MACHINE, Whose.OPEN
FULL = f"exit {MACHINE} error: /runs: no space is left"
DIVERGED = f"exit {MISTAKE} error: the loss is nan in epoch 1: training diverged"
SEEDS = "seed=" + ",".join(map(str, range(6)))


def test_what_the_machine_failed_is_tried_again_and_only_that(cwd):
    script = {"0": [FULL, "ok"], "1": [DIVERGED], "2": ["signal 9", "signal 7", "ok"]}
    code, said = sweep(cwd, script, SEEDS)
    assert code == OK, said
    assert states(cwd) == ["complete", "failed", *["complete"] * 4]
    assert starts(cwd) == {0: 2, 1: 1, 2: 3, 3: 1, 4: 1, 5: 1}
    assert "trial 2: killed by SIGBUS; tried again in 0.1 s" in said


def test_a_machine_that_fails_every_trial_stops_the_sweep_and_mended_it_goes_on(cwd):
    code, said = sweep(cwd, {"0": [DIVERGED], "all": [FULL]}, SEEDS)
    assert code == RESUME and states(cwd) == ["failed", "running", "running"], said
    assert starts(cwd) == {0: 1, 1: 3, 2: 3}  # and the others weren't burnt
    assert said.splitlines()[-1] == (
        "warning: stopped by this machine, which failed each of 3 tries of trial 1, 2 "
        "(/runs: no space is left); everything is saved: start the same command again to "
        "continue"
    )
    assert (
        "/runs: no space is left (the machine&#39;s fault: it is tried again)"
        in (cwd / "runs/s/sweep.html").read_text()
    )
    code, said = sweep(cwd, {}, SEEDS)
    assert code == OK and states(cwd) == ["failed", *["complete"] * 5], said
    assert starts(cwd) == {0: 1, 1: 4, 2: 4, 3: 1, 4: 1, 5: 1}
    # What the machine failed comes last: it doesn't lock out the others.
    assert (cwd / "starts").read_text().split()[-5:] == ["0003", "0004", "0005", "0001", "0002"]


def test_a_trial_that_the_machine_fails_alone_waits_until_the_others_are_done(cwd):
    # A crash may be the trial's: it is, where the machine completes others. A kill is not.
    code, said = sweep(cwd, {"0": ["signal 9"], "1": ["signal 11"]}, SEEDS, "sweep.parallel=2")
    assert code == RESUME, said
    assert states(cwd) == ["running", "failed", *["complete"] * 4]
    assert "trial 1 failed: killed by SIGSEGV (in each of 3 tries, and others were" in said
    assert "3 tries of trial 0 (killed by SIGKILL)" in said.splitlines()[-1]


def test_a_trial_that_the_ledger_does_not_list_is_kept_aside(cwd):
    assert sweep(cwd, {}, "seed=0,1")[0] == OK
    place = cwd / "runs/s"
    for number in (1, 2):  # the second one finds the first one's place taken
        (place / "trials.jsonl").unlink()
        other = {"seed": str(8 + number)}
        (place / "0000/trial.json").write_text(json.dumps(other))
        code, said = sweep(cwd, {}, "seed=0,1")
        kept = place / f"aside/0000-{number}"
        assert code == OK and f"no longer lists: moved to {kept.relative_to(cwd)}" in said, said
        assert json.loads((kept / "trial.json").read_text()) == other
        assert (kept / "model.tar.gz").exists()
    assert states(cwd) == ["complete", "complete"]


def test_of_fewer_than_half_of_the_trials_none_is_the_best(cwd):
    failing = {str(number): [DIVERGED] for number in (0, 1, 3, 4)}
    code, said = sweep(cwd, failing, SEEDS)
    assert code == MISTAKE and "\nbest " not in said and "next:" not in said, said
    assert "only 2 of 6 trials were done, fewer than half, so none of them is called" in said
    page = (cwd / "runs/s/sweep.html").read_text()
    assert "fewer than half of the trials were done" in page and 'class="best"' not in page
    del failing["4"]
    shutil.rmtree(cwd / "runs")
    code, said = sweep(cwd, failing, SEEDS)
    assert (
        code == OK
        and "\nbest " in said
        and 'class="best"' in (cwd / "runs/s/sweep.html").read_text()
    )
    # Its directory deleted, the best is trained again; nothing else is.
    before = starts(cwd)
    shutil.rmtree(cwd / "runs/s/0002")
    code, said = sweep(cwd, {"2": [*["ok"] * before[2], FULL, "ok"]}, SEEDS)
    assert code == OK and (cwd / "runs/s/0002/model.tar.gz").exists(), said
    assert starts(cwd) == before | {2: before[2] + 2}


def test_pictures_that_go_away_are_no_trials_fault_and_changed_ones_stop_the_sweep(cwd):
    hidden = "import os; os.rename('pictures', 'elsewhere')"
    program = cwd / "project/trainer/__main__.py"
    program.write_text(f"{program.read_text()}\nif number == '0001': {hidden}\n")
    code, said = sweep(cwd, {"1": ["ok"]}, SEEDS)
    assert code == RESUME and states(cwd) == ["complete", "complete", "running"], said
    assert "the pictures were moved or removed: data.root=pictures" in said.splitlines()[-1]
    (cwd / "elsewhere").rename(cwd / "pictures")
    added = cwd / "pictures/train/circle/new.png"
    shutil.copy(cwd / "pictures/train/square/000.png", added)
    code, said = sweep(cwd, {}, SEEDS)
    assert code == MISTAKE and said.splitlines()[-1] == (
        "error: runs/s: the pictures have changed since this sweep began: 1 new: "
        "train/circle/new.png; restore them and start the same command again, or start a new "
        "sweep with another name=..."
    )
    assert states(cwd) == ["complete", "complete", "running"]
    added.unlink()
    code, said = sweep(cwd, {}, SEEDS)
    assert code == OK and set(states(cwd)) == {"complete"}, said
    assert max(starts(cwd).values()) == 1
    (cwd / "pictures/valid/circle/000.png").unlink()
    code, said = sweep(cwd, {}, SEEDS)  # a complete sweep doesn't name a best one of others
    assert code == MISTAKE and "1 missing: valid/circle/000.png" in said.splitlines()[-1], said


# Every write to the ledger after the FIRSTth fails, COUNT times, and leaves half a line.
TORN = """
import errno, os
from trainer.sweep import ledger
calls = 0
def fsync(handle, fsync=os.fsync):
    global calls
    calls += 1
    if {first} <= calls < {first} + {count}:
        os.ftruncate(handle, os.fstat(handle).st_size - 9)
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(handle)
ledger.os = type("os", (), {{"fsync": staticmethod(fsync)}})
"""


def test_a_ledger_on_a_full_disk_is_waited_for_and_loses_nothing(cwd):
    # Twice it is waited for; a third time, in a row, is too often.
    code, said = sweep(cwd, {}, SEEDS, before=TORN.format(first=3, count=3))
    assert code == RESUME and "; it is tried again in 0.1 s" in said, said
    assert "runs/s/trials.jsonl: no space is left" in said.splitlines()[-1]
    code, said = sweep(cwd, {}, SEEDS, before=TORN.format(first=4, count=2))
    assert code == OK and states(cwd) == ["complete"] * 6, said
    assert starts(cwd) == dict.fromkeys(range(6), 1)


def test_a_ledger_that_is_cut_off_or_damaged_costs_a_look_at_the_trials_it_hits(cwd):
    code, said = sweep(cwd, {}, SEEDS)
    journal = cwd / "runs/s/trials.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = b"\0" * 20 + b"\n"  # that trial 1 is complete
    journal.write_bytes(b"".join(lines)[:-70])  # and half a line
    rows = cwd / "runs/s/0000/metrics.jsonl"
    rows.write_bytes(rows.read_bytes() + b"\0\0\n[]\n")
    (cwd / "runs/s/0001/result.json").write_bytes(b"")
    code, said = sweep(cwd, {}, SEEDS)
    assert code == OK and "trials.jsonl: line 4 is damaged: skipping it" in said
    assert "trial 1 complete" in said and "trial 0 complete" not in said


def test_asked_to_stop_it_saves_and_goes_on(cwd):
    (cwd / "script.json").write_text(json.dumps({"all": ["epochs 4000 0.1"]}))
    process = start(cwd, SEEDS, "sweep.parallel=2")
    assert wait_for(lambda: all((cwd / f"runs/s/000{n}/metrics.jsonl").exists() for n in (0, 1)))
    other, _ = (second := start(cwd, SEEDS, "sweep.parallel=2")).communicate(timeout=600)
    assert second.returncode == MISTAKE and "another process runs this sweep" in other
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == RESUME and "start the same command again" in output
    for number in (0, 1):  # each has saved, and none was counted as failed by the machine
        assert "everything is saved" in (cwd / f"runs/s/000{number}/output.txt").read_text()
    assert states(cwd) == ["running", "running"] and "tried again" not in output


def test_asked_to_stop_in_a_pause_it_stops_at_once(cwd):
    (cwd / "script.json").write_text(json.dumps({"all": [FULL]}))
    process = start(cwd, SEEDS, before="driver.PAUSES = (3000.0,)")
    assert wait_for(lambda: "tried again in 3000" in said_in(cwd / "runs/s/log.txt"))
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == RESUME and "start the same command again" in output


@pytest.mark.parametrize(
    ("code", "said", "memory_was_short", "whose", "reason"),
    [
        (MISTAKE, "x\nerror: the GPU's memory is full\n", False, TRIAL, "the GPU's memory is full"),
        (MACHINE, "error: /runs: no space is left", False, MACHINES, "/runs: no space is left"),
        # Somebody stopped this process alone, or it stalled.
        (RESUME, "warning: stopped by x", False, MACHINES, "stopped by x"),
        (-9, "", False, MACHINES, "killed by SIGKILL"),
        # Linux's own word that memory was short: whether this trial was to blame, others tell.
        (-9, "", True, OPEN, "this machine's memory was full, and Linux killed it"),
        (-11, "", False, OPEN, "killed by SIGSEGV"),
        (-40, "", False, MACHINES, "killed by signal 40"),
        (
            FAULT,
            "torch.AcceleratorError: CUDA error: ECC\nCompile with X",
            False,
            OPEN,
            "torch.Acc",
        ),
        (FAULT, "KeyError: 'x'", False, TRIAL, "KeyError: 'x'"),
        (3, "", False, TRIAL, "exit code 3"),
    ],
)
def test_whose_fault_an_end_is(code, said, memory_was_short, whose, reason):
    fault = faults.judge(code, said, memory_was_short)
    assert fault.whose is whose and fault.reason.startswith(reason)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), MACHINE),
        (OSError(errno.EIO, "Input/output error"), MACHINE),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/runs/x"), MISTAKE),
        (Unreadable("/data/1.png: it can't be read"), MACHINE),
        (MachineFault("the disk is too small"), MACHINE),
        (UserError("training diverged"), MISTAKE),
        (MemoryError(), MISTAKE),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MISTAKE),
        (KeyError("x"), FAULT),
    ],
)
def test_a_trial_says_by_its_exit_code_that_the_machine_failed_it(error, code, monkeypatch):
    monkeypatch.delenv(errors.TRIAL, raising=False)
    assert command.verdict(error)[0] == (MISTAKE if code == MACHINE else code)
    monkeypatch.setenv(errors.TRIAL, "0")
    assert command.verdict(error)[0] == code


def test_memory_that_was_short_is_asked_of_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "VMSTAT", tmp_path / "vmstat")
    assert faults.memory_kills() == 0
    (tmp_path / "vmstat").write_text("oom_kill_disable 4\noom_kill 3\n")
    assert faults.memory_kills() == 3


def test_a_journals_torn_line_is_cut_off_and_no_other(tmp_path):
    path = tmp_path / "journal"
    for data, left in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"ab", b"")):
        path.write_bytes(data)
        ledgers.mend(path)
        assert path.read_bytes() == left
    space = (Categorical("seed", (1, 2, 3)),)
    kept = Sweep("grid", "valid_top1", 8, 1, 1, "random", "none", 4, 0, space)
    path.write_text('{"number": 1, "state": "complete", "value": 1.0, "reason": ""}\n')
    assert ledgers.Grid(path, kept).ask() == ledgers.Trial(0, {"seed": 1})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b'"0"', b'{"0": 3}', b'{"0": null}', b'{"x": {"failed": "y"}}'],
)
def test_outcomes_of_another_kind_tell_nothing_and_those_beside_them_count(tmp_path, content):
    made: Any = object.__new__(Driver)
    told: list[tuple[int, str, str]] = []
    made.directory = tmp_path
    made.ledger = SimpleNamespace(
        trials=lambda: [Trial(number, {}) for number in (0, 1)], holds=lambda number: True
    )
    made.tell = lambda trial, state, reason: told.append((trial.number, state, reason))
    (tmp_path / "outcomes-0000.json").write_bytes(content)
    (tmp_path / "outcomes-0001.json").write_text('{"1": {"failed": "the loss is nan"}}')
    made.settle_outcomes()
    assert told == [(1, FAILED, "the loss is nan")]
