"""Sweeps as a user starts them: real processes, really killed."""

import contextlib
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cloud import hyperparameters as codec
from launch.targets import tuner
from tests.conftest import PROJECT, QUICK, make_pictures, run_trainer, start_trainer, wait_for
from tests.soak import difference
from tests.trainer.sweep.driving import ledger
from trainer.common import stages
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.common.interrupt import Stop
from trainer.settings import search_space as space
from trainer.settings import words
from trainer.settings.config import walk
from trainer.settings.search_space import Categorical, Sweep
from trainer.sweep import batch, directory
from trainer.sweep.ledger import Grid
from trainer.training import checkpoint

FORK = "from tests.trainer.sweep.quick import fork_trials; fork_trials()"
# Notes which modules are started as processes.
NOTED = """
from pathlib import Path
from trainer.sweep import driver, process
start = process.Program.start
def noted(program, arguments, *others):
    with Path("started").open("a") as file:
        print(arguments[0], file=file)
    return start(program, arguments, *others)
process.Program.start = noted
"""
# The process that trained the batch dies as soon as it waits.
DIES = """
keep = driver.Driver.keep
def lose(self, worker):
    worker.process.terminate()
    worker.process.wait()
    keep(self, worker)
driver.Driver.keep = lose
"""
NAN = "1e30"  # a learning rate whose loss is NaN or infinite at the end of the first epoch


def command(pictures: Path, *overrides: str) -> list[str]:
    return [
        "data=folder",
        f"data.root={pictures}",
        "model=small_cnn",
        *QUICK,
        "data.augment.scale=[0.9,1]",
        *overrides,
    ]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sweep_killed(
    kills: int, rng: random.Random, cwd: Path, *arguments: str, **environment: str
) -> tuple[int, str]:
    """Kills the driver (-9) at random moments and starts it again; then lets it end. Its exit code,
    and what it said last.
    """
    for _ in range(kills):
        process = start_trainer(cwd, "-m", *arguments, **environment)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0.5, 4.0))
        process.kill()
        process.communicate()
    return run_trainer(cwd, "-m", *arguments, **environment)


def test_batched_trials_measure_what_each_measures_alone(tmp_path, pictures):
    fixed = (
        "model.freeze=backbone", "optim=sgd", "optim.warmup_epochs=0", "platform.cache=cache",
        "train.exact_shards=2", "train.tensorboard=true",
    )  # fmt: skip
    arguments = command(pictures, *fixed, "name=heads")
    ranges = ("seed=0,1", f"optim.lr=1e-2,1e-3,{NAN}")
    driver = start_trainer(tmp_path, "-m", *arguments, *ranges, before=FORK + NOTED)
    output, _ = driver.communicate(timeout=600)
    sweep = tmp_path / "runs/heads"
    assert driver.returncode == OK, output
    # One process trains them all, and goes on with the best.
    assert (tmp_path / "started").read_text().split() == ["trainer.sweep.batch"]
    # Each says where its time went.
    times = [json.loads(path.read_text())["stages"] for path in sweep.glob("*/checkpoints/times*")]
    assert len(times) >= 4 and all({"scan", "training"} <= stages.keys() for stages in times)
    states = ledger(sweep)
    ends = [states[number][0] for number in range(6)]
    assert ends == ["complete", "complete", "failed"] * 2, output
    assert re.search(r"trial 2 failed: the loss is (nan|inf) in epoch 1", output)
    (result,) = sweep.glob("*/result.json")  # of the best alone
    best = result.parent
    assert (best / "model.tar.gz").exists() and str(best.relative_to(tmp_path)) in output
    values = [value for _, value in states.values() if value is not None]
    assert states[int(best.name)][1] == max(values)
    said = (sweep / "0000/output.txt").read_text()
    assert [line for line in said.splitlines() if re.fullmatch(r"trial \d", line)] == [
        f"trial {number}" for number in range(6)
    ]
    # The same trial as a run of its own: bit for bit, and the best was not trained a second time.
    code, output = run_trainer(
        tmp_path, *command(pictures, *fixed, "name=alone"), "seed=0", "optim.lr=1e-3"
    )
    assert code == OK, output
    newest = [
        checkpoint.newest(root / "checkpoints")[1]
        for root in (sweep / "0001", tmp_path / "runs/alone")
    ]
    for part in ("network", "average", "optimizer", "best"):
        assert difference(newest[0][part], newest[1][part]) is None, part
    assert "resumed from" in (best / "output.txt").read_text()
    written = {path.parts[-3] for path in sweep.glob("*/tensorboard/*tfevents*")}
    assert {"0000", "0001", "0003", "0004"} <= written
    page = (sweep / "sweep.html").read_text()
    assert (
        "//" not in page.replace("</", "")
        and "<script" not in page
        and page.count("<circle") == 4 * 3
    )  # complete trials, by lr, seed and number


def test_each_trial_of_a_batch_counts_its_own_time(tmp_path, monkeypatch):
    now, begun = [100.0], []

    def train_trial(*_: object) -> dict[str, int]:
        begun.append(stages.since_start())
        now[0] += 5
        return {"best_epoch": 1}

    monkeypatch.setattr(stages, "_begun", [])
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(batch, "load", lambda path: None)
    monkeypatch.setattr(batch, "train_trial", train_trial)
    for number in range(3):
        (tmp_path / f"{number:04d}").mkdir()
    batch.train(tmp_path, [0, 1, 2])
    assert begun == [0, 0, 0]
    assert json.loads((tmp_path / "outcomes-0000.json").read_text()).keys() == {"0", "1", "2"}


def test_the_best_of_a_batch_has_its_package_also_where_the_batchs_process_is_gone(
    tmp_path, pictures
):
    arguments = command(pictures, "model.freeze=backbone", "platform.cache=cache", "name=heads")
    driver = start_trainer(
        tmp_path, "-m", *arguments, "optim.lr=1e-2,1e-3", before=FORK + NOTED + DIES
    )
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == OK, output
    assert (tmp_path / "started").read_text().split() == ["trainer.sweep.batch", "trainer"]
    assert "tried again" not in output  # it was not asked
    (package,) = tmp_path.glob("runs/heads/*/model.tar.gz")
    assert package.with_name("report.html").exists()


def test_a_batch_whose_outcomes_are_damaged_is_taken_up_again(tmp_path, pictures):
    arguments = command(pictures, "model.freeze=backbone", "platform.cache=cache", "name=heads")
    sweep = tmp_path / "runs/heads"
    for _ in range(2):
        driver = start_trainer(tmp_path, "-m", *arguments, "optim.lr=1e-2,1e-3", before=FORK)
        output, _ = driver.communicate(timeout=600)
        assert driver.returncode == OK, output
        assert [state for state, _ in ledger(sweep).values()] == ["complete", "complete"]
        # The power failed before the ledger knew of it, and took what the disk had of the outcomes.
        entries = (sweep / "trials.jsonl").read_text().splitlines(keepends=True)
        begun = [entry for entry in entries if json.loads(entry)["state"] == "running"]
        (sweep / "trials.jsonl").write_text("".join(begun))
        (sweep / "outcomes-0000.json").write_text("{")
    assert "2 continue" in output


@pytest.mark.long
def test_a_sweep_of_processes_ends_though_it_is_killed_and_trials_fail_and_conf_is_edited(
    tmp_path, pictures
):
    project = tmp_path / "project"
    for name in ("trainer", "serving", "conf"):
        shutil.copytree(
            PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    arguments = command(
        pictures,
        "name=processes",
        "platform.cache=cache",
        "sweep.parallel=2",
        f"optim.lr=1e-3,{NAN}",
        "model.weights=null,no_such.pth",
    )
    sweep = tmp_path / "runs/processes"
    first = start_trainer(tmp_path, "-m", *arguments, PYTHONPATH=str(project))
    assert wait_for(lambda: (sweep / "0000/metrics.jsonl").exists() and rows(sweep / "0000"))
    first.kill()
    first.communicate()
    settings = project / "conf/optim/adamw.yaml"
    settings.write_text(
        settings.read_text().replace("momentum: 0.9", "momentum: 0.8")
    )  # what is frozen stays as it was

    code, output = sweep_killed(1, random.Random(0), tmp_path, *arguments, PYTHONPATH=str(project))
    assert code == MISTAKE and "only 1 of 4 trials were done" in output, output
    states = ledger(sweep)
    assert {number: state for number, (state, _) in states.items()} == {
        0: "complete",
        1: "failed",
        2: "failed",
        3: "failed",
    }, output
    reasons = {
        entry["number"]: entry["reason"]
        for entry in map(json.loads, (sweep / "trials.jsonl").read_text().splitlines())
    }
    assert (
        "training diverged" in reasons[2]
        and "no_such.pth: there is no such file" in reasons[1]
        and "no_such.pth" in reasons[3]
    )
    assert {
        yaml.safe_load(path.read_text())["optim"]["momentum"]
        for path in sweep.glob("*/config.yaml")
    } == {0.9}


def trials_of(sweep: Path) -> list[Any]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(sweep / "optuna.journal"))),
    )
    return study.get_trials()


SAMPLED = command(
    Path("pictures"), "model.freeze=backbone", "sweep.engine=optuna", "sweep.trials=6",
    "sweep.together=3", "name=sampled", "platform.cache=cache",
    "optim.lr=tag(log,interval(1e-4,1e-1))", "train.label_smoothing=interval(0,0.2)",
    "train.batch_size=interval(4,8)", "optim.name=adamw,sgd",
)  # fmt: skip


@pytest.mark.long
def test_a_sampled_sweep_killed_at_random_is_the_undisturbed_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for cwd in (killed, whole):
        make_pictures(cwd / "pictures", {"train": 8, "valid": 3, "test": 3})
    undisturbed = start_trainer(whole, "-m", *SAMPLED)
    code, output = sweep_killed(3, random.Random(1), killed, *SAMPLED)
    assert code == OK, output
    undisturbed.communicate(timeout=600)
    trials, expected = trials_of(killed / "runs/sampled"), trials_of(whole / "runs/sampled")
    assert [trial.number for trial in trials] == list(range(6)), output
    assert [(trial.params, trial.state, trial.value) for trial in trials] == [
        (trial.params, trial.state, trial.value) for trial in expected
    ]


def test_three_engines_hold_the_same_space(tmp_path, configure):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from trainer.sweep.optuna_ledger import Optuna

    fixed, swept = space.split(SAMPLED)
    sweep = space.load(configure(*fixed), swept, fixed)
    expected: dict[str, Any] = {
        "optim.lr": (
            float,
            FloatDistribution(1e-4, 1e-1, log=True),
            ("Continuous", "0.0001", "0.1", "Logarithmic"),
        ),
        "train.label_smoothing": (
            float,
            FloatDistribution(0.0, 0.2),
            ("Continuous", "0.0", "0.2", "Linear"),
        ),
        "train.batch_size": (int, IntDistribution(4, 8), ("Integer", "4", "8", "Linear")),
        "optim.name": (
            str,
            CategoricalDistribution(["adamw", "sgd"]),
            ("Categorical", "adamw", "sgd"),
        ),
    }
    grid = Grid(tmp_path / "trials.jsonl", sweep).points
    assert len(grid) == 4 * 4 * 4 * 2
    sampled = Optuna(tmp_path / "optuna.journal", sweep)
    trials = [sampled.ask().params for _ in range(6)]
    for params in grid + trials:
        assert {key: type(value) for key, value in params.items()} == {
            key: kind for key, (kind, _, _) in expected.items()
        }
    for trial in sampled.study.get_trials():
        assert trial.distributions == {
            key: distribution for key, (_, distribution, _) in expected.items()
        }

    ranges = tuner.parameter_ranges(sweep)
    theirs = {
        each["Name"]: (
            kind.removesuffix("ParameterRanges"),
            *each.get(
                "Values", [each.get("MinValue"), each.get("MaxValue"), each.get("ScalingType")]
            ),
        )
        for kind, several in ranges.items()
        for each in several
    }
    assert {
        key: tuple(codec.decode_value(part) for part in parts) for key, parts in theirs.items()
    } == {key: parts for key, (_, _, parts) in expected.items()}
    for params in trials:  # a value travels to SageMaker's container as text, and is the same there
        carried = codec.decode(
            {key: codec.encode_value(words.text(value)) for key, value in params.items()}
        )
        composed = {key: value for key, value, _ in walk(configure(*fixed, *carried))}
        assert {key: composed[key] for key in params} == params


def test_pruning_ends_poor_trials_early(tmp_path):
    from trainer.sweep.optuna_ledger import Optuna

    sweep = Sweep(
        "optuna",
        "valid_top1",
        8,
        1,
        1,
        "random",
        "halving",
        4,
        0,
        (Categorical("seed", ([1], [2])),),
    )
    book = Optuna(tmp_path / "journal", sweep)
    ended = []
    while trial := book.ask():
        assert trial.params["seed"] in ([1], [2])
        worth = 0.9 - 0.1 * trial.number
        stopped = any(book.report(trial.number, epoch, worth) for epoch in range(1, 9))
        book.tell(trial.number, "pruned" if stopped else "complete", worth)
        book = Optuna(tmp_path / "journal", sweep)  # as after a kill
        ended.append(stopped)
    assert not ended[0] and any(ended[1:])
    assert [trial.state for trial in book.trials()] == [
        "pruned" if stopped else "complete" for stopped in ended
    ]


def test_a_wrong_sweep_is_one_line_before_anything_is_made(tmp_path, pictures):
    for overrides, said in (
        (["optim.lr=1e-3"], "nothing to try"),
        (["optim.lr=-1,1"], "above 0"),
        (["model=resnet99,small_cnn"], "model=resnet99"),
        (["optim.lr=1,2", "data.root=nowhere"], "nowhere"),
        (["optim.lr=1,2", "experiment=dog_bread"], "experiment=dog_bread"),
        (["optim.lr=1,2", "++train.epohs=3"], "train.epohs"),
        (["experiment=dog_breeds,dog_bread"], "experiment=dog_bread"),
    ):
        code, output = run_trainer(tmp_path, "-m", *command(pictures, *overrides))
        lines = [line for line in output.splitlines() if "data.root is given 2 times" not in line]
        assert code == MISTAKE and said in output and len(lines) == 1, output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"settings": []}'])
def test_what_is_no_sweep_is_one_line(tmp_path, configure, text):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.json").write_text(text)
    config = configure("name=s", f"platform.runs={tmp_path}")
    with pytest.raises(UserError, match=r"sweep.json is damaged: restore a copy, or"):
        directory.opened(config, [], {"seed": "1,2"}, Stop()).__enter__()


@pytest.mark.long
def test_a_setting_that_must_be_given_may_be_the_one_that_is_swept(tmp_path):
    for name in ("one", "two"):
        make_pictures(tmp_path / name, {"train": 8, "valid": 3})
    given = ["model=small_cnn", *QUICK, "train.epochs=1", "name=swept", "platform.cache=cache"]
    code, output = run_trainer(tmp_path, "-m", "data.root=one,two", *given)
    assert code == OK and "data=folder: " in output, output
    assert {state for state, _ in ledger(tmp_path / "runs/swept").values()} == {"complete"}
