"""What can't be read now is no broken picture: it is tried again, then the run stops by name, and
loses nothing.
"""

import errno
import io
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import run_trainer, start_trainer, wait_for
from tests.trainer.common.test_streams import RUN, check_equal, packing
from tests.trainer.common.test_streams import cwd as cwd
from tests.trainer.common.test_streams import undisturbed as undisturbed
from trainer.common import files
from trainer.common.errors import MISTAKE, OK, Unreadable, machine_fault
from trainer.images import cache
from trainer.images.folder import ImageFolder, read_shrunk, scan
from trainer.training import checkpoint

# Lets calls fail in the trainer's process as on a broken disk or network. A line of FAULTS is the
# end of a path, the error, and the first and the last of the times that it is opened at which it
# fails.
FAILING = """
import builtins, errno, io, os
faults = [[*line.split(), 0] for line in os.environ["FAULTS"].splitlines()]
opened = io.open

def faulty(file, *rest, **more):
    for fault in faults:
        end, name, first, last, count = fault
        if isinstance(file, (str, os.PathLike)) and os.fspath(file).endswith(end):
            fault[-1] += 1
            if int(first) <= fault[-1] <= int(last):
                number = getattr(errno, name)
                raise OSError(number, os.strerror(number), os.fspath(file))
    return opened(file, *rest, **more)

io.open = builtins.open = faulty
"""
ALWAYS = 1_000_000


def failing(*faults: str) -> dict[str, str]:
    """How to start a trainer in which opening a file fails: failing("003.png EIO 1 1", ...)."""
    return {"before": FAILING, "FAULTS": "\n".join(faults)}


def check_stopped(result: tuple[int, str], *said: str) -> None:
    code, output = result
    assert code == MISTAKE and "left out" not in output and "Traceback" not in output, output
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and all(part in last for part in said), output


def test_one_error_on_one_picture_of_a_resumed_run_changes_nothing(cwd, undisturbed):
    process = start_trainer(cwd, *RUN)
    checkpoints = cwd / "runs/run/checkpoints"
    assert wait_for(lambda: checkpoint.steps(checkpoints) or process.poll() is not None, 240)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (cwd / "runs/run/result.json").unlink(
        missing_ok=True
    )  # had it been complete, it goes on all the same
    shutil.rmtree(cwd / "cache")  # as on another spot machine
    once = [
        f"train/circle/00{number}.png {name} 1 1"
        for number, name in enumerate(("EIO", "ESTALE", "EMFILE", "ENOENT"))
    ]
    code, output = run_trainer(cwd, *RUN, **failing(*once))
    assert code == OK and "left out" not in output and "resumed from" in output, output
    check_equal(cwd, undisturbed)


def test_an_error_that_stays_ends_the_run_by_name_and_mended_it_goes_on(cwd, undisturbed):
    broken = failing(f"valid/square/002.png ESTALE 1 {ALWAYS}")
    check_stopped(
        run_trainer(cwd, *RUN, **broken),
        "pictures/valid/square/002.png",
        "stale file handle",
        "same command again",
    )
    assert packing(cwd)  # what was packed before it stays
    assert run_trainer(cwd, *RUN)[0] == OK
    check_equal(cwd, undisturbed)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_error_within_an_epoch_costs_nothing_that_was_trained(cwd, undisturbed, split):
    # Without a cache each picture is read for the check, for its size, then once an epoch.
    command = (*RUN, "data.cache=none", "checkpoint.minutes=1000")
    broken = failing(f"{split}/stripe/001.png EIO 4 {ALWAYS}")
    check_stopped(
        run_trainer(cwd, *command, **broken), f"{split}/stripe/001.png", "input/output error"
    )
    found = checkpoint.newest(cwd / "runs/run/checkpoints")
    assert found is not None
    epoch, batch = (found[1]["progress"][key] for key in ("epoch", "batch"))
    assert (epoch, batch) == (1, 6) if split == "valid" else epoch == 1 and 0 < batch < 6
    code, output = run_trainer(cwd, *command)
    assert code == OK and "resumed from" in output, output
    check_equal(cwd, undisturbed)


# --- every way in which pictures are read, and every error ---


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


def fail(
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    end: str,
    error: OSError | MemoryError,
    times: int,
) -> None:
    """Has module.name fail for paths that end so, as often."""
    call = getattr(module, name)
    left = [times]

    def failing(*arguments, **more):
        if (
            arguments
            and isinstance(arguments[0], str | os.PathLike)
            and os.fspath(arguments[0]).endswith(end)
            and left[0]
        ):
            left[0] -= 1
            raise error
        return call(*arguments, **more)

    monkeypatch.setattr(module, name, failing)


def listing(folder: ImageFolder) -> dict[str, tuple[str, ...]]:
    return {name: split.paths for name, split in folder.splits.items()}


def scanned(pictures: Path, tmp_path: Path) -> object:
    """valid is split off train by content, so that each file of train is read."""
    folder = scan({name: str(pictures / name) for name in ("train", "nowhere", "test")}, 0.2)
    return listing(folder), folder.broken


def decoded(pictures: Path, tmp_path: Path) -> object:
    return read_shrunk(str(pictures / "train/circle/001.png"), 16, "bilinear").tobytes()


def packed(pictures: Path, tmp_path: Path) -> object:
    path = str(pictures / "train/circle/001.png")
    store = cache.PixelCache(tmp_path / "cache", 16, "bilinear")
    result = store.pack([path], 2, lambda done, total: None)
    return result(path).tobytes(), dict(result.broken)


ERRORS = [
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOMEM,
    errno.EMFILE,
    errno.EACCES,
    errno.ENOENT,
    errno.EREMOTEIO,
]
READERS = [scanned, decoded, packed]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "number", [*ERRORS, None], ids=[*map(errno.errorcode.get, ERRORS), "MemoryError"]
)
def test_no_error_makes_a_picture_broken(monkeypatch, no_pauses, pictures, tmp_path, read, number):
    def error() -> OSError | MemoryError:
        return MemoryError() if number is None else OSError(number, os.strerror(number))

    expected = read(pictures, tmp_path / "good")
    where = (io, "open", "train/circle/001.png")
    with monkeypatch.context() as patch:
        fail(patch, *where, error(), times=2)
        assert read(pictures, tmp_path / "again") == expected
    fail(monkeypatch, *where, error(), times=ALWAYS)
    with pytest.raises(Unreadable, match=r"train/circle/001\.png: ") as caught:
        read(pictures, tmp_path / "never")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["stat", "scandir"])
def test_a_folder_that_can_not_be_listed_now_is_not_missing(
    monkeypatch, no_pauses, pictures, module
):
    """valid would otherwise be made from train, or a class be lost, without a word."""
    directories = {name: str(pictures / name) for name in ("train", "valid", "test")}
    expected = listing(scan(directories, 0.2))
    with monkeypatch.context() as patch:
        fail(patch, os, module, "/valid", OSError(errno.EIO, "Input/output error"), times=2)
        assert listing(scan(directories, 0.2)) == expected
    fail(monkeypatch, os, module, "/valid", OSError(errno.EIO, "Input/output error"), times=ALWAYS)
    with pytest.raises(Unreadable, match=re.escape(f"{pictures}/valid: the disk")):
        scan(directories, 0.2)


def test_errors_of_the_machine_have_a_line_of_their_own():
    for number in (
        errno.EIO,
        errno.ESTALE,
        errno.ENOENT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ETIMEDOUT,
    ):
        line = machine_fault(OSError(number, os.strerror(number), "place"))
        assert (
            line is not None
            and line.startswith("place: ")
            and "same command again" in line
            and "\n" not in line
        )
    assert machine_fault(OSError(errno.ETIMEDOUT, "timed out")) is None  # of a socket
