"""The runs so far in a table, and whether one is better than another."""

import fcntl
import hashlib
import json
from pathlib import Path

import pytest

from trainer import runs as command
from trainer.common.errors import UserError
from trainer.results import runs
from trainer.results.runs import Comparison
from trainer.settings.config import data_name


@pytest.fixture
def make(tmp_path, configure):
    """Writes what a run leaves: settings, metrics and, where it is complete, a result."""

    def make(name: str, *words: str, test: float | None = None, epochs: int = 2) -> Path:
        from omegaconf import OmegaConf

        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(OmegaConf.to_yaml(configure(*words)))
        rows = [{"epoch": each, "valid_top1": 0.5 + each / 10} for each in range(1, epochs + 1)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "metrics.jsonl").write_text(text + '{"epoch": 3, "val')
        if test is not None:
            result = {"split": "test", "top1": test, "pictures": 200, "best_epoch": 1}
            result |= {"seconds": 71.0}
            digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
            (path / "result.json").write_text(json.dumps(result | {"sha256": digest}))
        return path

    return make


def test_the_table_tells_runs_apart(make, tmp_path):
    make("a", "data.root=/photos/dogs.zip", "model.name=resnet18", test=0.8)
    make("b", "data.root=/photos/dogs.zip", "model.name=resnet18", "optim.lr=0.01", test=0.9)
    make("c", "data.root=/photos/dogs.zip", "model.name=resnet18")
    head, *lines = runs.table(runs.find(tmp_path / "runs")).splitlines()
    by_name = {line.split("/runs/")[1].split()[0]: line for line in lines}
    assert head.split()[:5] == ["date", "data", "model", "valid", "test"]
    assert "dogs  resnet18  60.0%  80.0%  74 to 85" in by_name["a"]
    assert "1 min 11 s" in by_name["a"]
    assert "complete" in by_name["a"]
    assert by_name["b"].endswith("optim.lr=0.01")
    assert by_name["a"].endswith("/a")
    assert "stopped" in by_name["c"]
    assert " 70.0% " in by_name["c"]  # its best epoch so far


def test_a_run_that_a_process_has_is_running(make):
    path = make("a", "data.root=/photos")
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = runs.read(path)
    assert running is not None
    assert running.state == runs.RUNNING


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\0"])
def test_what_is_no_run_is_passed_over(tmp_path, text):
    path = tmp_path / "runs/x"
    path.mkdir(parents=True)
    assert runs.find(tmp_path / "runs") == []
    (path / "config.yaml").write_text(text)
    for name in ("metrics.jsonl", "result.json"):
        (path / name).write_text(text)
    runs.table(runs.find(tmp_path / "runs"))  # whatever it shows, it shows something


def test_a_missing_folder_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="there is no such folder; a first run makes it"):
        runs.find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "root", "name"),
    [
        ("folder", "/photos/my dogs.zip", "my-dogs"),
        ("folder", "/photos/Dogs.TAR.gz", "Dogs"),
        ("folder", "/photos/..", "folder"),
        ("folder", "/photos/äöü", "äöü"),
        ("pets", "/photos/dogs", "pets"),
    ],
)
def test_a_data_set_is_called_as_its_folder_is(source, root, name):
    assert data_name(source, root) == name


# --- two runs ---


# SciPy's binomtest(first, first + second).pvalue, 1.17.
P_VALUES = [
    (0, 0, 1.0),
    (1, 0, 1.0),
    (3, 9, 0.14599609375),
    (40, 40, 1.0),
    (5, 30, 2.2361520677804947e-05),
]


@pytest.mark.parametrize(("first", "second", "p"), P_VALUES)
def test_the_p_value_is_that_of_the_binomial_test(first, second, p):
    assert Comparison(10, first, second, 5).p == pytest.approx(p)
    assert Comparison(10, second, first, 5).p == pytest.approx(p)


def predicted(path: Path, hits: str) -> Path:
    """A run whose predictions are right (+) or wrong."""
    path.mkdir()
    rows = [f"{number}.jpg,{str(hit == '+').lower()}" for number, hit in enumerate(hits)]
    (path / "predictions.csv").write_text("\n".join(["path,correct", *rows, ""]))
    return path


def test_two_runs_are_compared_picture_by_picture(tmp_path):
    a, b = predicted(tmp_path / "a", "++--+-"), predicted(tmp_path / "b", "+-+++-")
    result = runs.compare(a, b)
    assert (result.both, result.first, result.second, result.neither) == (2, 1, 2, 1)
    assert command.told(a, b, result) == (
        f"{b} is better than {a} by 16.7 points: not distinguishable on 6 pictures "
        "(2 right that the other has wrong, 1 the other way round; p = 1)"
    )
    assert "equally good" in command.told(a, a, runs.compare(a, a))
    clear = Comparison(50, 30, 5, 15)
    assert f"{a} is better than {b} by 25.0 points: a difference that chance seldom makes" in (
        command.told(a, b, clear)
    )


def test_runs_of_other_pictures_are_not_compared(tmp_path):
    a, b = predicted(tmp_path / "a", "++-"), predicted(tmp_path / "b", "++")
    with pytest.raises(UserError, match=r"other pictures \(3 and 2, 2 of them the same\)"):
        runs.compare(a, b)
    with pytest.raises(UserError, match=r"it has no predictions\.csv"):
        runs.compare(a, tmp_path)
    (b / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="it is no table of a run's predictions"):
        runs.compare(a, b)
