"""Where a team looks: a run that is killed and goes on is one run there, with each step once."""

import importlib.util
import json
import math
import random
import struct
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import QUICK, ended, run_trainer, start_trainer
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.training import tracking
from trainer.training.metrics import MetricsFile
from trainer.training.tracking import TensorBoard, Tracking, log_records

ROWS = [{"epoch": 1, "step": 3, "valid_loss": 0.5}, {"epoch": 2, "step": 6, "valid_loss": 0.25}]


def shown_by_tensorboard(directory: Path) -> list[tuple[int, str, float]]:
    """All that a person sees there: each scalar of each file."""
    files = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    return [
        (event.step, value.tag, value.simple_value)
        for path in sorted(directory.glob("*tfevents*"))
        for event in files.LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def test_what_a_resumed_run_trains_again_is_in_tensorboard_once(tmp_path):
    first = MetricsFile(tmp_path / "metrics.jsonl", Tracking([TensorBoard(tmp_path / "board")]))
    for row in ROWS:
        first.append(row)
    (tmp_path / "board/events.out.tfevents.0.torn").write_bytes(b"\x18\0\0\0torn")
    again = TensorBoard(tmp_path / "board")
    again._path = tmp_path / "board/events.out.tfevents.9.again"  # as of another process
    second = MetricsFile(tmp_path / "metrics.jsonl", Tracking([again]))
    second.restore(ROWS[:1])  # of a checkpoint before the kill
    second.append(ROWS[1])
    second.append({"epoch": 2, "step": 6, "test_top1": 0.5})
    assert sorted(shown_by_tensorboard(tmp_path / "board")) == sorted(
        (row["step"], name, value)
        for row in [*ROWS, {"step": 6, "test_top1": 0.5}]
        for name, value in row.items()
        if name != "step" or "valid_loss" in row
    )


class Tracker:
    """A server that is away for a while."""

    name = "a tracker"

    def __init__(self):
        self.away, self.rows, self.said = False, [], []

    def _answer(self):
        if self.away:
            raise ConnectionError("Connection refused\nby the host")

    def begin(self):
        self._answer()
        return lambda step, name: False

    def add(self, step, values):
        self._answer()
        self.rows.append((step, values))

    def keep(self, paths):
        self._answer()

    def close(self, complete):
        self.said.append(complete)


def test_what_a_tracker_missed_is_sent_when_it_is_back(tmp_path, caplog):
    tracker = Tracker()
    file = MetricsFile(tmp_path / "metrics.jsonl", Tracking([tracker]))
    file.tracking.begin()
    tracker.away = True
    file.append(ROWS[0])
    file.append(ROWS[1])
    tracker.away = False
    file.append({"epoch": 2, "step": 6, "test_top1": 1.0})
    assert tracker.rows == [(3, ROWS[0]), (6, ROWS[1]), (6, {"test_top1": 1.0})]
    assert caplog.text.count("a tracker didn't get everything: Connection refused by the host") == 1


def test_a_tracker_that_is_away_when_a_run_goes_on_ends_nothing(tmp_path):
    tracker = Tracker()
    tracker.away = True
    file = MetricsFile(tmp_path / "metrics.jsonl", Tracking([tracker]))
    file.restore(ROWS[:1])
    tracker.away = False
    file.append(ROWS[1])
    assert [step for step, _ in tracker.rows] == [3, 6]


def test_a_tracker_that_is_away_before_a_run_is_one_line():
    tracker = Tracker()
    tracker.away = True
    with pytest.raises(UserError, match=r"^a tracker: Connection refused by the host$"):
        Tracking([tracker]).begin()


@pytest.mark.parametrize("raised", [False, True])
def test_how_a_run_was_left_is_told(raised):
    tracker = Tracker()
    trackers = Tracking([tracker])
    trackers.begin()
    with pytest.raises(UserError) if raised else pytest.MonkeyPatch.context():  # noqa: SIM117
        with trackers.closed():
            if raised:
                raise UserError("stopped")
    assert tracker.said == [not raised]


def test_a_tracker_that_was_never_open_is_not_closed():
    tracker = Tracker()
    with Tracking([tracker]).closed():
        pass
    assert tracker.said == []


# --- W&B's file ---


def written(records: list[bytes]) -> bytes:
    """As LevelDB's log_writer.cc writes records, after W&B's 7 bytes."""
    data = b":W&B\xe1\xbe\x00"
    for record in records:
        begin = True
        while begin or record:
            left = tracking.BLOCK - len(data) % tracking.BLOCK
            if left < tracking.HEAD:
                data += bytes(left)
                continue
            part, record = record[: left - tracking.HEAD], record[left - tracking.HEAD :]
            kind = {(True, False): 1, (True, True): 2, (False, True): 3, (False, False): 4}
            data += struct.pack("<IHB", 0, len(part), kind[begin, bool(record)]) + part
            begin = False
    return data


def test_records_are_read_across_blocks_and_as_far_as_they_are_whole():
    rng = random.Random(0)
    sizes = [0, 1, 32754, 32755, 32760, 100_000, *rng.sample(range(70_000), 30)]
    records = [rng.randbytes(size) for size in sizes]
    data = written(records)
    assert list(log_records(data)) == records
    cut = list(log_records(data[: len(data) // 2]))
    assert cut == records[: len(cut)]
    assert list(log_records(b"")) == []


# --- the real ones ---

SETTINGS = (*QUICK, "name=one", "model=small_cnn", "train.epochs=3", "checkpoint.max_cost=1e-9")
KILLED = """
import os, pathlib
from trainer.training import metrics
real = metrics.MetricsFile.append
def append(self, row):
    real(self, row)
    if row["epoch"] == 2:  # sent, and in no checkpoint yet
        os.kill(os.getpid(), 9)
metrics.MetricsFile.append = append
"""


@pytest.mark.long
@pytest.mark.filterwarnings("default::DeprecationWarning")  # MLflow's, of its database
@pytest.mark.parametrize(
    ("package", "word"),
    [
        ("mlflow", "train.mlflow=sqlite:///mlflow.db"),
        ("wandb", "train.wandb=team"),
        ("tensorboard", "train.tensorboard=true"),
    ],
)
def test_a_killed_run_is_one_run_with_each_step_once(tmp_path, pictures, package, word):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed; make trackers installs it")
    words = (*SETTINGS, f"data.root={pictures}", word)
    variables = {"WANDB_MODE": "offline"}
    process = start_trainer(tmp_path, *words, before=KILLED, **variables)
    assert ended(process)[0] == -9
    code, said = run_trainer(tmp_path, *words, **variables)
    assert code == OK, said
    assert "resumed from" in said or "epoch=1" in said
    assert "didn't get" not in said
    lines = (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = {row["step"] for row in rows}
    assert len(steps) == 3
    counted = SHOWN[package](tmp_path)
    assert set(counted.values()) == {1}
    assert {step for step, name in counted if name == "valid_loss"} == steps
    assert code == run_trainer(tmp_path, *words, **variables)[0]  # complete: adds nothing
    assert SHOWN[package](tmp_path) == counted


def in_mlflow(root: Path) -> Counter[tuple[int, str]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name != "Default"]
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert run.data.params["train.batch_size"] == "8"
    kept = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert {"model.tar.gz", "report.html", "predictions.csv", "config.yaml"} <= kept
    assert "test_top1" in run.data.metrics
    return Counter(
        (each.step, name)
        for name in run.data.metrics
        for each in client.get_metric_history(run.info.run_id, name)
    )


def in_wandb(root: Path) -> Counter[tuple[int, str]]:
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(root.glob("runs/one/wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # one run, in two pieces
    records = [Record.FromString(data) for path in files for data in log_records(path.read_bytes())]
    kinds = Counter(record.WhichOneof("record_type") for record in records)
    assert kinds["artifact"] + kinds["request"] > 0
    tested = {
        item.key
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert "test_top1" in tested
    return Counter(
        (record.history.step.num, item.key or item.nested_key[0])
        for record in records
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    )


def in_tensorboard(root: Path) -> Counter[tuple[int, str]]:
    shown = shown_by_tensorboard(root / "runs/one/tensorboard")
    assert all(math.isfinite(value) for _, _, value in shown)
    return Counter((step, name) for step, name, _ in shown)


SHOWN = {"mlflow": in_mlflow, "wandb": in_wandb, "tensorboard": in_tensorboard}


@pytest.mark.parametrize(("package", "word"), [("mlflow", "mlflow=x"), ("wandb", "wandb=x")])
def test_a_missing_library_is_one_line(tmp_path, pictures, package, word):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    code, said = run_trainer(tmp_path, *SETTINGS, f"data.root={pictures}", f"train.{word}")
    assert code == MISTAKE
    assert f"train.{package} needs {package}: " in said
