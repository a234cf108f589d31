"""What a run reports of itself, also where a disk doesn't take it."""

import errno
import json
import threading

import pytest

from trainer.training.metrics import MetricsFile
from trainer.training.tracking import TensorBoard, Tracking

ROWS = [{"epoch": 1, "step": 3, "valid_loss": 0.5}, {"epoch": 2, "step": 6, "valid_loss": 0.25}]


def test_rows_are_scalars_for_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = MetricsFile(tmp_path / "metrics.jsonl", Tracking([TensorBoard(tmp_path / "board")]))
    threads = threading.active_count()
    for row in ROWS:
        file.append(row)
    assert threading.active_count() == threads
    shown = accumulators.EventAccumulator(str(tmp_path / "board")).Reload()
    found = [(each.step, each.value) for each in shown.Scalars("valid_loss")]
    assert found == [(3, 0.5), (6, 0.25)]
    assert list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())) == ROWS


def test_what_tensorboard_can_not_be_given_is_said_once_and_ends_nothing(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "board").write_text("a file is where its directory should be")
    file = MetricsFile(tmp_path / "metrics.jsonl", Tracking([TensorBoard(tmp_path / "board")]))
    for row in ROWS:
        file.append(row)
    assert caplog.text.count("TensorBoard didn't get everything: ") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_row_that_can_not_be_written_names_its_file(tmp_path):
    file = MetricsFile(tmp_path / "missing/metrics.jsonl", Tracking())
    with pytest.raises(OSError, match=r"metrics.jsonl") as raised:
        file.append(ROWS[0])
    assert raised.value.errno == errno.ENOENT
