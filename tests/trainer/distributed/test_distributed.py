"""Several processes: what they compute, whatever their number. How they end is in
test_failures.py.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import make_pictures
from tests.shared import made_once
from tests.soak import difference, outcome
from tests.trainer.distributed.together import all_ended, run_together, together
from trainer.distributed.heartbeat import Heartbeat
from trainer.images.sampler import Share, epoch_batches, random_order
from trainer.training import checkpoint


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "distributed", make_runs) / "runs"


def make_runs(root: Path) -> None:
    """Train in 1, 2, 3 and 4 processes.

    23 test pictures in batches of 11: 3 batches, the last one short, which neither 2 nor 4
    processes divide.
    """
    make_pictures(root / "pictures", {"train": 16, "valid": 9, "test": 8})
    (root / "pictures/test/circle/000.png").unlink()
    run_together(root, 1, "exact", "fast", "plain", "frozen", "chain:chain:3", "fast:grown:2")
    run_together(
        root,
        2,
        "exact",
        "fast",
        "plain",
        "frozen",
        "chain:chain:4",
        "fast:again:6",
        "fast:again",
        "fast:grown",
    )
    run_together(root, 3, "exact")
    run_together(root, 4, "chain:chain")  # to its end: it is exact-4 too


def said(runs: Path, name: str, size: int) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((runs / name / f"outcome-{size}.json").read_text())
    return answer


# --- exact ---


def result(runs: Path, name: str) -> dict[str, Any]:
    """All that a run without a package has made of itself."""
    return outcome(runs / name)


@pytest.mark.parametrize("size", [2, 3])
def test_exact_mode_gives_the_same_bits_for_any_number_of_processes(runs, size):
    assert difference(result(runs, "exact-1"), result(runs, f"exact-{size}")) is None


def test_exact_mode_resumes_on_other_numbers_of_processes_to_the_same_bits(runs):
    stops = [said(runs, "chain", size) for size in (1, 2)]
    assert (
        all("the test" in stop["interrupted"] for stop in stops)
        and 0 < stops[0]["step"] < stops[1]["step"]
    )
    assert difference(result(runs, "exact-1"), result(runs, "chain")) is None
    assert "bit for bit" not in (runs / "chain/log.txt").read_text()


def test_the_number_of_processes_is_no_part_of_a_run(runs):
    names = ("exact-1", "chain")
    states = [checkpoint.newest(runs / name / "checkpoints")[1] for name in names]
    assert states[0]["facts"] == states[1]["facts"]


# --- fast ---


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoint.newest(runs / name / "checkpoints")[1]["network"]


def test_fast_mode_computes_the_gradient_of_the_whole_batch(runs):
    # 11 pictures: 6 and 5 of them, which a mean of means would weigh wrongly.
    one, two = weights(runs, "plain-1"), weights(runs, "plain-2")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    rows = [
        checkpoint.newest(runs / f"plain-{size}/checkpoints")[1]["progress"]["rows"]
        for size in (1, 2)
    ]
    assert [row["train_loss"] for row in rows[0]] == pytest.approx(
        [row["train_loss"] for row in rows[1]], rel=1e-4
    )
    assert [row["train_top1"] for row in rows[0]] == pytest.approx(
        [row["train_top1"] for row in rows[1]], abs=0.03
    )


def test_fast_mode_resumes_to_the_same_bits_on_the_same_number_of_processes(runs):
    # Rank 1 was asked to stop: all stopped at the same step.
    assert difference(result(runs, "fast-2"), result(runs, "again")) is None
    log = (runs / "again/log.txt").read_text()
    assert "resumed from" in log and "bit for bit" not in log


def test_fast_mode_on_another_number_of_processes_goes_on_from_the_same_picture_and_says_so(runs):
    stopped, log = said(runs, "grown", 1)["step"], (runs / "grown/log.txt").read_text()
    assert re.search(rf"resumed from .*, {stopped} steps done", log)
    assert "no longer bit for bit: processes was 1, is 2" in log
    assert said(runs, "grown", 2)["step"] == said(runs, "fast-2", 2)["step"]


def test_a_frozen_backbone_is_neither_trained_nor_exchanged(runs):
    one, two = weights(runs, "frozen-1"), weights(runs, "frozen-2")
    assert one.keys() == two.keys() == {"weight", "bias"}
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    assert said(runs, "frozen-2", 2)["bytes"] == 4 * (128 * 9 * 3 + 3)


# --- evaluation ---


def test_an_evaluation_counts_each_picture_once_whatever_the_number_of_processes(runs):
    equal = [said(runs, f"exact-{size}", size)["test"] for size in (1, 2, 3)]
    equal.append(said(runs, "chain", 4)["test"])
    assert equal[0] is not None and all(other == equal[0] for other in equal[1:])


@pytest.mark.parametrize(("size", "shards"), [(1, 1), (2, 2), (3, 3), (3, 7), (4, 4), (2, 5)])
def test_the_shares_of_all_processes_are_the_batches(size, shards):
    batches = epoch_batches(random_order(100, seed=0, epoch=0), 31)
    everybody = Share(0, size, shards).everybody()
    assert [shard for share in everybody for shard in share.mine] == list(range(shards))
    for batch, *parts in zip(
        batches, *(share.of_training(batches) for share in everybody), strict=True
    ):
        assert np.array_equal(np.concatenate(parts), batch)
        assert [len(part) for part in parts] == [sum(share.lengths(31)) for share in everybody]
    assert sorted(map(tuple, batches)) == sorted(
        tuple(batch) for share in everybody for batch in share.of_evaluation(batches)
    )


def test_threads_inside_pytorch_do_not_abort_a_process_at_its_end(tmp_path):
    with together([tmp_path] * 2, "tests.trainer.distributed.busy_end", forked=False) as processes:
        codes, outputs = all_ended(processes)
    assert codes == [0, 0], outputs


def test_a_silent_process_is_named(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 3)
    me, other = (Heartbeat(store, rank, 3, f"rank {rank} on here") for rank in (0, 1))
    other.watch()
    other.end()  # said who it is
    me._mine["done"] = True
    me.watch()
    me.join()
    me._heard[1]["done"] = False  # as if it had not ended in order
    me._contact = time.monotonic()
    me._at = dict.fromkeys(me._at, time.monotonic() - 60)
    assert me.missing(30) == (
        "rank 1 on here, rank 2 no longer answers: killed, hanging, or its network is gone"
    )
    assert me.missing(90) is None
