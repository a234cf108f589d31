import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import PROJECT, run_module
from tests.soak import difference
from tests.trainer.common.test_files import failing
from trainer.common import files
from trainer.common.errors import UserError
from trainer.training import checkpoint


def state(step: int = 1) -> dict:
    """After an evaluation."""
    weights = {"weight": torch.arange(6.0).view(2, 3) * step, "count": torch.tensor(step)}
    progress = {"epoch": step, "step": step, "best": {"epoch": 1, "value": 0.5}}
    return {
        "network": weights,
        "progress": progress,
        "best": {"network": {name: each + 1 for name, each in weights.items()}},
    }


FILES = ("tensors.safetensors", "state.json", "best.safetensors", "best.json", "manifest.json")


def test_a_state_comes_back_as_it_was(tmp_path):
    before = state() | {
        "values": [
            1,
            2.5,
            float("inf"),
            None,
            True,
            "text",
            {"nested": torch.tensor([1, 2], dtype=torch.int64)},
        ]
    }
    before["network"]["channels_last"] = torch.randn(2, 3, 4, 4).to(
        memory_format=torch.channels_last
    )
    after = checkpoint.load(checkpoint.save(tmp_path, "step-00000001", before))
    assert after["values"][:6] == before["values"][:6]
    assert torch.equal(after["values"][6]["nested"], before["values"][6]["nested"])
    for name, tensor in before["network"].items():
        assert (
            torch.equal(after["network"][name], tensor)
            and after["network"][name].dtype == tensor.dtype
        )
        assert after["network"][name].stride() == tensor.stride()
    assert torch.equal(after["best"]["network"]["weight"], before["best"]["network"]["weight"])


def test_what_is_no_tensor_is_of_the_moment_of_the_freeze():
    live = state() | {"rows": [{"epoch": 1}]}
    copy = checkpoint.freeze(live)
    live["progress"]["step"] = 2
    live["progress"]["later"] = True
    live["rows"][0]["epoch"] = 2
    live["rows"].append({"epoch": 3})
    frozen = copy(None).state()
    assert frozen["progress"] == state()["progress"]
    assert frozen["rows"] == [{"epoch": 1}]


def test_before_the_first_evaluation_there_are_no_best_weights(tmp_path):
    assert (
        checkpoint.load(checkpoint.save(tmp_path, "step-00000001", state() | {"best": None}))[
            "best"
        ]
        is None
    )


def test_floats_keep_every_bit(tmp_path):
    numbers = [0.1 + 0.2, 1e-310, -0.0, 2.0**60 + 1]
    path = checkpoint.save(tmp_path, "step-00000001", state() | {"numbers": numbers})
    assert [number.hex() for number in checkpoint.load(path)["numbers"]] == [
        number.hex() for number in numbers
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_a_directory_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty, Path.unlink, put_a_directory_there])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, file, harm, caplog):
    checkpoint.save(tmp_path, "step-00000001", state(1))
    newest = checkpoint.save(tmp_path, "step-00000002", state(2))
    harm(newest / file)
    # A changed bit in the manifest may make another file look wrong.
    with pytest.raises(
        checkpoint.Damaged,
        match="step-00000002" if (harm, file) == (flip_a_bit, "manifest.json") else file,
    ):
        checkpoint.verify(newest)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[0].name == "step-00000001"
    assert found[1]["progress"]["step"] == 1


def test_where_all_are_damaged_nothing_starts_from_zero(tmp_path):
    for step in (1, 2):
        empty(checkpoint.save(tmp_path, f"step-{step:08d}", state(step)) / "state.json")
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("bit", [0, 3, 6])
def test_any_changed_bit_of_a_manifest_costs_one_checkpoint_at_most(tmp_path, bit):
    checkpoint.save(tmp_path, "step-00000001", state(1))
    manifest = checkpoint.save(tmp_path, "step-00000002", state(2)) / "manifest.json"
    data = manifest.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        manifest.write_bytes(changed)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        step = found[1]["progress"]["step"]
        assert torch.equal(found[1]["network"]["count"], torch.tensor(step))


def test_a_file_in_the_place_of_a_checkpoint_is_passed_over_and_replaced(tmp_path):
    checkpoint.save(tmp_path, "step-00000001", state(1))
    (tmp_path / "step-00000002").write_text("no directory")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[0].name == "step-00000001"
    checkpoint.verify(checkpoint.save(tmp_path, "step-00000002", state(2)))


@pytest.mark.parametrize("missing", [["manifest.json"], ["tensors.safetensors"], FILES])
def test_checkpoints_that_were_cut_off_are_none(tmp_path, missing, caplog):
    for file in missing:
        (checkpoint.save(tmp_path, "step-00000001", state()) / file).unlink()
    assert checkpoint.newest(tmp_path) is None
    assert "not copied whole" in caplog.text


def test_cut_off_and_damaged_is_still_damage(tmp_path):
    empty(checkpoint.save(tmp_path, "step-00000001", state(1)) / "state.json")
    (checkpoint.save(tmp_path, "step-00000002", state(2)) / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_of_another_version_is_one_line(tmp_path):
    path = checkpoint.save(tmp_path, "step-00000001", state()) / "manifest.json"
    path.write_text(path.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 1'))
    with pytest.raises(
        UserError, match=r"another version of Packhorse wrote this checkpoint.*another name="
    ):
        checkpoint.newest(tmp_path)


def test_what_is_there_already_is_left_alone_and_anything_else_of_its_name_is_replaced(tmp_path):
    path = checkpoint.save(tmp_path, "step-00000001", state())
    written = (path / "manifest.json").stat().st_ino
    checkpoint.save(tmp_path, "step-00000001", state())
    assert (path / "manifest.json").stat().st_ino == written
    for other in (
        state() | {"facts": "another run's"},
        state() | {"best": state(2)["best"]},
        state() | {"best": None},
    ):
        checkpoint.save(tmp_path, "step-00000001", other)
        assert difference(checkpoint.load(path), other) is None
        assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"]


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch, caplog):
    for step in range(1, 5):
        checkpoint.save(tmp_path, f"step-{step:08d}", state(step))
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "step-00000001":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert checkpoint.prune(tmp_path, 2, set()) == [tmp_path / "step-00000002"]
    assert "step-00000001: an old checkpoint that can't be deleted" in caplog.text


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EINTR", "EMFILE"])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_what_fails_once_is_saved_all_the_same(tmp_path, monkeypatch, call, name):
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    where = os if call == "fsync" else Path
    number = getattr(errno, name)
    monkeypatch.setattr(where, call, failing(number, 2, getattr(where, call)))
    path = checkpoint.save(tmp_path, "step-00000001", state())
    assert difference(checkpoint.load(path), state()) is None
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_for_good_names_the_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    checkpoint.save(tmp_path, "step-00000001", state(1))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="step-00000002") as raised:
        checkpoint.save(tmp_path, "step-00000002", state(2))
    assert raised.value.filename == str(tmp_path / "step-00000002")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_checkpoints_that_can_not_be_listed_are_not_missing(tmp_path, monkeypatch, number):
    path = checkpoint.save(tmp_path, "step-00000001", state())
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "listdir", failing(number, 2, os.listdir))
    assert checkpoint.steps(tmp_path) == [path]
    monkeypatch.setattr(os, "listdir", failing(number))
    with pytest.raises(UserError, match=r"again|give this user"):
        checkpoint.newest(tmp_path)


def test_prune_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, f"step-{step:08d}", state(step))
    checkpoint.prune(tmp_path, 2, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_prune_counts_good_checkpoints_only(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, f"step-{step:08d}", state(step))
    empty(tmp_path / "step-00000004" / "state.json")
    checkpoint.prune(tmp_path, 2, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_prune_leaves_everything_while_good_ones_are_few(tmp_path):
    for step in range(1, 4):
        checkpoint.save(tmp_path, f"step-{step:08d}", state(step))
    for step in (1, 2):
        empty(tmp_path / f"step-{step:08d}" / "state.json")
    assert checkpoint.prune(tmp_path, 2, set()) == []
    assert len(checkpoint.steps(tmp_path)) == 3


def test_the_state_before_and_after_an_evaluation_have_names_in_order():
    names = [
        checkpoint.step_name(9, False),
        checkpoint.step_name(9, True),
        checkpoint.step_name(10, False),
    ]
    assert names == sorted(names) and len(set(names)) == 3


def test_a_crafted_pickle_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    path = checkpoint.save(tmp_path, "step-00000001", state())
    for file in ("tensors.safetensors", "state.json"):
        (path / file).write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {
        file: checkpoint._describe((path / file).read_bytes()) for file in manifest["files"]
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="a small file system must be mounted, as root on Linux",
)
@pytest.mark.parametrize("room", [0, 4, 12, 40, 400])
def test_a_full_disk_keeps_what_was_there(tmp_path, room):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        checkpoint.save(disk, "step-00000001", state(1))
        large = state(2) | {"large": torch.zeros(500 * 256)}
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "filler").write_bytes(b"x" * (free - room * 1024))
        with pytest.raises(OSError) as caught:
            checkpoint.save(disk, "step-00000002", large)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "step-00000001"]
        checkpoint.verify(disk / "step-00000001")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def command(*arguments: str) -> tuple[int, str]:
    return run_module(PROJECT, "trainer.checkpoint", *arguments)


def test_the_command_lists_verifies_and_prunes(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        checkpoint.save(root, f"step-{step:08d}", state(step))
    code, output = command("ls", str(tmp_path))
    assert code == 0 and output.count("best so far") == 3
    code, output = command("verify", str(tmp_path))
    assert code == 0 and output.count("  ok") == 3
    assert command("prune", str(tmp_path), "--keep", "1")[0] == 0
    assert [path.name for path in checkpoint.steps(root)] == ["step-00000003"]
    flip_a_bit(root / "step-00000003" / "best.safetensors")
    code, output = command("verify", str(tmp_path))
    assert code == 2 and "best.safetensors is damaged" in output
    put_a_directory_there(root / "step-00000003" / "state.json")
    for verb in ("ls", "verify"):
        code, output = command(verb, str(tmp_path))
        assert code == 2 and "DAMAGED" in output and "Traceback" not in output
    code, output = command("ls", str(tmp_path / "elsewhere"))
    assert code == 2 and "no checkpoints here" in output and "Traceback" not in output
