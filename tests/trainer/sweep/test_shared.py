"""Several drivers on one ledger, as several machines have them: real processes, really killed."""

import json
import random
from pathlib import Path

import pytest

from tests.conftest import Process, wait_for
from tests.trainer.sweep.driving import said_in, start, starts
from trainer.common.errors import MISTAKE, OK, RESUME, UserError
from trainer.sweep import optuna_ledger

SEEDS = "seed=" + ",".join(map(str, range(6)))
SHARED = (SEEDS, "sweep.lost_seconds=2")


def trials_of(storage: str) -> list[tuple[int, str, object]]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    kept = storage if "://" in storage else JournalStorage(JournalFileBackend(storage))
    study = optuna.load_study(study_name="s", storage=kept)
    return [(each.number, each.state.name, each.params.get("seed")) for each in study.trials]


def begun(cwd: Path) -> int:
    return len(said_in(cwd / "starts").split())


def kill_after(driver: Process, cwd: Path, trials: int) -> None:
    """Kills it when so many trials were started, by whichever driver."""
    assert wait_for(lambda: begun(cwd) >= trials or driver.poll() is not None)
    driver.kill()
    driver.communicate()


@pytest.mark.parametrize(
    ("engine", "kills"),
    [
        ("grid", (0, 1)),
        *(pytest.param(each, (0, 1, 0, 1), marks=pytest.mark.long) for each in ("grid", "optuna")),
    ],
)
def test_two_drivers_of_one_directory_killed_again_and_again_try_every_trial_once(
    cwd, engine, kills
):
    """kills: which of them is killed, in turn."""
    (cwd / "script.json").write_text(json.dumps({"all": ["epochs 3 0.1"]}))
    words = (
        *SHARED,
        "sweep.storage=both.journal",
        f"sweep.engine={engine}",
        "sweep.trials=6",
        "sweep.pruner=none",
    )
    rng = random.Random(engine)
    drivers: list[Process] = [start(cwd, *words) for _ in range(2)]
    for which in kills:
        kill_after(drivers[which], cwd, begun(cwd) + rng.randrange(1, 3))
        drivers[which] = start(cwd, *words)
    for driver in drivers:
        output, _ = driver.communicate(timeout=600)
        assert driver.returncode == OK and "\nbest " in output, output
    trials = trials_of(str(cwd / "both.journal"))
    # One that both began at the same moment is nobody's, and waits for a larger sweep.trials.
    trials, nobodys = trials[:6], trials[6:]
    assert all(state == "RUNNING" for _, state, _ in nobodys)
    assert [(number, state) for number, state, _ in trials] == [(n, "COMPLETE") for n in range(6)]
    if engine == "grid":
        assert [seed for _, _, seed in trials] == list(range(6))
    # What was trained is trained once, by whichever driver: each epoch has one row.
    for number in range(6):
        rows = (cwd / f"runs/s/{number:04d}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [1, 2, 3]


def test_a_database_is_shared_by_machines_without_a_common_disk(cwd):
    """What a dead one has begun, the other one takes over; other settings are refused."""
    (cwd / "script.json").write_text(json.dumps({"all": ["epochs 1 0.1"], "0": ["epochs 900 1"]}))
    storage = f"sqlite:///{cwd}/both.db"
    words = (*SHARED, f"sweep.storage={storage}")
    one = start(cwd, *words, "platform.runs=one")
    assert wait_for(lambda: begun(cwd) == 1)
    code, output = ended(start(cwd, *words, "platform.runs=other", "optim.lr=0.1"))
    assert code == MISTAKE and output.splitlines()[-1].startswith(
        f"error: {storage}: the sweep s there is another one"
    )
    two = start(cwd, *words, "platform.runs=two")
    assert wait_for(lambda: begun(cwd) == 6)
    assert two.poll() is None  # trial 0 runs elsewhere
    (cwd / "script.json").write_text(json.dumps({"all": ["ok"]}))
    one.kill()
    one.communicate()
    code, output = ended(two)
    assert code == OK and "trial 0 complete" in output, output
    assert [state for _, state, _ in trials_of(storage)] == ["COMPLETE"] * 6
    # The dead one's machine, started again, finds that nothing is left to do.
    code, output = ended(start(cwd, *words, "platform.runs=one"))
    assert code == OK and f":{cwd}/two/s/0000, trial 0" in output, output
    assert "both.db" not in (cwd / "one/s/sweep.json").read_text()  # a URL may hold a password
    assert starts(cwd) == {0: 2} | dict.fromkeys(range(1, 6), 1)


@pytest.mark.long
def test_a_driver_that_is_stopped_leaves_its_trial_to_the_other_at_once(cwd):
    (cwd / "script.json").write_text(json.dumps({"all": ["epochs 1 0.1"], "0": ["epochs 900 0.1"]}))
    words = (SEEDS, "sweep.lost_seconds=80000", "sweep.storage=both.journal")
    one = start(cwd, *words)
    assert wait_for(lambda: begun(cwd) == 1)
    two = start(cwd, *words)
    assert wait_for(lambda: begun(cwd) == 6)
    rows = len(said_in(cwd / "runs/s/0000/metrics.jsonl").splitlines())
    assert rows
    (cwd / "script.json").write_text(json.dumps({"all": [f"epochs {rows + 40} 0"]}))
    one.send_signal(15)
    assert ended(one)[0] == RESUME
    code, output = ended(two)
    assert code == OK and "trial 0 complete" in output, output
    done = (cwd / "runs/s/0000/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in done] == list(range(1, len(done) + 1))


def ended(process: Process) -> tuple[int | None, str]:
    output, _ = process.communicate(timeout=600)
    assert "Traceback" not in output, output
    return process.returncode, output


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("sqlite:////nowhere/x.db", "sweep.storage=sqlite:////nowhere/x.db: it does not answer"),
        ("nodialect://u:secret@h/d", "sweep.storage=nodialect://u:...@h/d is no database's URL"),
        ("postgresql://u:secret@h/d", "sweep.storage=postgresql://u:...@h/d needs psycopg"),
    ],
)
def test_a_storage_that_does_not_answer_is_one_line_without_its_password(
    storage, said, monkeypatch
):
    monkeypatch.setattr(optuna_ledger, "PAUSES", ())
    with pytest.raises(UserError) as error:
        optuna_ledger.opened(storage, shared=True)
    line = str(error.value)
    assert line.startswith(said) and "secret" not in line and "\n" not in line


@pytest.mark.parametrize("line", [b"\0\0", b"[1]"], ids=["zeros", "another file's"])
def test_a_damaged_journal_is_one_line_that_names_the_line(tmp_path, line):
    path = tmp_path / "optuna.journal"
    path.write_bytes(b'{"op_code": 0}\n' + line + b"\n{}\n")
    with pytest.raises(UserError, match=r"line 2 is damaged.*head -n 1"):
        optuna_ledger.opened(path, shared=False)
