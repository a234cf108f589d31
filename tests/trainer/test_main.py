import torch

from tests.conftest import make_pictures, run_trainer
from trainer.common.command import one_line
from trainer.common.errors import OK
from trainer.settings.compose import explain_settings

RUN = (
    "name=run",
    "data=folder",
    "model=small_cnn",
    "data.root=pictures",
    "data.size=16",
    "data.resize=16",
    "train.epochs=2",
    "train.batch_size=8",
)


def test_a_complete_run_says_so_and_trains_no_more(tmp_path):
    make_pictures(tmp_path / "pictures", {"train": 8, "valid": 3, "test": 3})
    run = (*RUN, "train.tensorboard=true")
    code, first = run_trainer(tmp_path, *run)
    assert code == OK, first
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "runs/run").rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".lock", "config.yaml")
    }
    code, second = run_trainer(tmp_path, *run)
    assert code == OK and "this run is complete" in second and "metrics:" not in second
    assert first.splitlines()[-10:] == second.splitlines()[-10:]  # the summary
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    files = {path.name for path in (tmp_path / "runs/run").iterdir()}
    assert files >= {
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "checkpoints",
        "model.tar.gz",
        "report.html",
        "result.json",
        "tensorboard",
    }


def test_without_a_valid_and_a_test_folder_a_run_still_ends_with_figures(tmp_path):
    make_pictures(tmp_path / "pictures", {"train": 8})
    code, output = run_trainer(tmp_path, *RUN, "data.valid_fraction=0.25")
    assert code == OK, output
    assert (
        "18 train, 6 valid" in output
        and "valid accuracy" in output
        and "there is no test folder" in output
    )


def test_a_full_gpu_is_a_mistake_with_a_remedy():
    line = one_line(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    )
    assert line is not None and "CUDA out of memory" in line and "train.accumulate" in line


def test_a_fault_of_ours_keeps_its_traceback():
    assert (
        one_line(RuntimeError("shapes"), explain_settings) is None
        and one_line(KeyError("x"), explain_settings) is None
        and one_line(OSError("no number"), explain_settings) is None
    )
