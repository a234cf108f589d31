"""Bad input as the user meets it: one line says what is wrong, where, and what to do, or a picture
is left out by name. Never a traceback.
"""

import fcntl
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import QUICK, ended, make_pictures, run_trainer, start_trainer
from trainer.common import files
from trainer.common.errors import MISTAKE, OK
from trainer.training import checkpoint

FOLDER = (
    *QUICK,
    "data=folder",
    "model=small_cnn",
    "data.root=pictures",
    "data.workers=0",
    "platform.cache=cache",
)
OFFLINE = {
    "TORCH_HOME": "torch",
    "https_proxy": "http://127.0.0.1:9",
}  # port 9: nobody answers there
IS_ROOT = os.geteuid() == 0


def check_refused(result: tuple[int, str], cwd: Path, *said: str) -> None:
    """One line, the last, says all of `said`, and nothing half-written is left."""
    code, output = result
    assert code == MISTAKE, output
    assert [
        line for line in output.splitlines() if line.startswith("error: ")
    ] == output.splitlines()[-1:], output
    assert not any(sign in output for sign in ("Traceback", "Logging error", "Exception")), output
    for part in said:
        assert part in output.splitlines()[-1]
    assert half_written(cwd) == []


def half_written(cwd: Path) -> list[Path]:
    return [
        path
        for path in cwd.rglob("*")
        if path.name.startswith(files.TEMPORARY) or path.name.endswith(".partial")
    ]


@pytest.fixture
def cwd(tmp_path: Path, pictures: Path) -> Path:
    """A working directory with an image folder of its own, `pictures`."""
    shutil.copytree(pictures, tmp_path / "pictures")
    return tmp_path


# --- folders that can't be trained on ---


def remove(*folders: str) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        for folder in folders:
            shutil.rmtree(root / folder)

    return harm


def add_folder(folder: str, *names: str) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        (root / folder).mkdir()
        for name in names:
            shutil.copy(next(root.glob("train/*/*.png")), root / folder / name)

    return harm


def empty_pictures(pattern: str) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        for path in root.glob(pattern):
            path.write_bytes(b"")

    return harm


def become_a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_bytes(b"not a folder")


def lose_the_splits(root: Path) -> None:
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    remove("train", "valid", "test")(root)


def lose_the_classes(root: Path) -> None:
    for path in root.glob("train/*/*.png"):
        path.rename(root / "train" / f"{path.parent.name}-{path.name}")
    remove("train/circle", "train/square", "train/stripe")(root)


def leave_alone(path: Path) -> None:
    pass


# What is wrong: how it comes about, overrides, what the line must say.
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    "no data.root": (
        remove("."),
        (),
        ("data.root=pictures: there is no such folder", "holds train"),
    ),
    "two names for valid": (
        add_folder("VAL"),
        (),
        ("pictures has two folders for valid", "VAL and valid", "data.valid=pictures/"),
    ),
    "two names for train": (
        add_folder("training"),
        (),
        ("pictures has two folders for train", "train and training"),
    ),
    "data.root is a file": (
        become_a_file,
        (),
        ("pictures: neither a folder nor a whole zip or tar archive", "give a folder"),
    ),
    "no splits": (
        lose_the_splits,
        (),
        (
            "pictures/train: there is no such folder",
            "circle, square, stripe",
            "give data.train=pictures",
        ),
    ),
    "no classes": (
        lose_the_classes,
        (),
        ("pictures/train: there is no class folder", "needs at least two"),
    ),
    "one class": (
        remove("train/circle", "train/square"),
        (),
        ("pictures/train: there is only one class folder, stripe", "needs at least two"),
    ),
    "an empty class": (
        add_folder("train/zebra"),
        (),
        ("pictures/train: no picture in the class folder zebra", "or remove it"),
    ),
    "a class only in valid": (
        add_folder("valid/zebra", "0.png"),
        (),
        ("pictures/valid: train has no class zebra", "remove them here"),
    ),
    "a class only in test": (
        add_folder("test/zebra", "0.png"),
        (),
        ("pictures/test: train has no class zebra", "remove them here"),
    ),
    "data.valid misspelt": (
        leave_alone,
        ("data.valid=pictures/vaild",),
        ("data.valid=pictures/vaild: there is no such folder", "give another"),
    ),
    "a class all broken": (
        empty_pictures("train/stripe/*"),
        ("data.max_broken=1",),
        (
            "class stripe: none of its training pictures",
            "pictures/train/stripe/000.png (the file is empty)",
            "and 3 more",
            "add others",
        ),
    ),
    "too many broken": (
        empty_pictures("*/*/000.png"),
        ("data.max_broken=0.2",),
        (
            "9 of 42 pictures",
            "data.max_broken=0.2",
            "pictures/train/circle/000.png (the file is empty)",
            "and 4 more",
            "allow more",
        ),
    ),
}


@pytest.mark.parametrize("wrong", FOLDERS)
def test_a_folder_that_cannot_be_trained_on_is_one_line(cwd, wrong):
    harm, overrides, said = FOLDERS[wrong]
    harm(cwd / "pictures")
    check_refused(run_trainer(cwd, *FOLDER, *overrides), cwd, *said)
    assert not list(cwd.rglob("result.json"))


# --- settings that fit no model, or not this machine ---


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


# Overrides: what the line must say.
SETTINGS = {
    "name=../elsewhere": ["name=../elsewhere is not allowed", "one directory"],
    "model=torchvision model.name=resnet49": ["model.name=resnet49 is not allowed", "resnet50"],
    "model=torchvision model.name=resnet18": [
        "model.weights=DEFAULT",
        "could not be downloaded",
        "model.weights=FILE",
        "model=small_cnn",
    ],
    "model=torchvision model.name=vit_b_32 model.weights=null": [
        "vit_b_32",
        "data.size=16",
        "Expected 224",
        "give another data.size",
    ],
    "model.weights=missing.pth": ["model.weights=missing.pth: there is no such file"],
    "model.weights=damaged.safetensors": [
        "model.weights=damaged.safetensors is damaged",
        "allowed: a state dict",
    ],
    "model.weights=bomb.pth": [
        "model.weights=bomb.pth is damaged, or holds more than tensors",
        "allowed: a state dict",
    ],
    "model.weights=other.pth": [
        "model.weights=other.pth doesn't fit the model: it lacks 0.weight",
        "check model.name",
    ],
    "train.device=cuda": ["train.device=cuda", "sees no GPU", "use train.device=cpu"],
    "train.device=cpu train.precision=fp16": [
        "train.precision=fp16 is for CUDA's GPUs",
        "allowed: auto, fp32",
    ],
    "optim.lr=1e30 optim.warmup_epochs=0": [
        "the loss is nan in epoch 1",
        "lower optim.lr (now 1e+30)",
    ],
}


@pytest.mark.parametrize(
    "damage",
    [b"Inine\n", b"\x80\x04K", b"", bytes(1000)],
    ids=["no number", "cut off", "empty", "zeros"],
)
def test_a_damaged_download_is_one_line(cwd, damage):
    (cwd / "torch/hub/checkpoints").mkdir(parents=True)
    (cwd / "torch/hub/checkpoints/resnet34-b627a593.pth").write_bytes(damage)
    done = run_trainer(cwd, *FOLDER, "model=torchvision", "model.name=resnet34", **OFFLINE)
    check_refused(
        done, cwd, "model.weights=DEFAULT", "torch/hub/checkpoints is damaged", "delete it"
    )


@pytest.mark.parametrize("overrides", SETTINGS)
def test_a_setting_that_cannot_work_is_one_line(cwd, overrides):
    (cwd / "damaged.safetensors").write_bytes(bytes(range(250)) * 4)
    (cwd / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save(torch.nn.Linear(2, 2).state_dict(), cwd / "other.pth")
    said = SETTINGS[overrides]
    check_refused(
        run_trainer(cwd, *FOLDER, *overrides.split(), CUDA_VISIBLE_DEVICES="", **OFFLINE),
        cwd,
        *said,
    )
    assert not (cwd / "exploded").exists()


# --- pictures that can't be used ---


def encoded(kind: str, **options: object) -> bytes:
    """A picture of 64 x 64 pixels of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be that large, and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


BROKEN = {
    "half.jpg": half(encoded("JPEG")),
    "half.png": half(encoded("PNG")),
    "half.webp": half(encoded("WEBP")),
    "half.gif": half(encoded("GIF")),
    "half.tif": half(encoded("TIFF")),
    "half.bmp": half(encoded("BMP")),
    "garbage.webp": b"RIFF\x64\x00\x00\x00WEBPVP8 " + bytes(90),
    "garbage.tiff": b"II\x2a\x00" + b"\xff" * 90,
    "empty.jpg": b"",
    "text.jpg": b"<html>404 Not Found</html>",
    "bomb.png": png_header(60_000, 60_000),
}


NEVER_OPENED = {"fifo.jpg", "loop.jpg", "nowhere.jpg", "device.jpg"}
NOT_TEXT = (
    {"0\udcff.jpg": "0\\udcff.jpg"} if sys.platform == "linux" else {}
)  # the byte 255, and how it is shown; elsewhere names must be text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A run, `mine`, over all kinds of broken pictures: its working directory, exit code and
    output.
    """
    cwd = tmp_path_factory.mktemp("finished")
    folder = make_pictures(cwd / "pictures", {"train": 8, "valid": 3, "test": 3}) / "train/circle"
    for name, data in BROKEN.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "fifo.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("gone.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    for name in NOT_TEXT:
        (folder / name).touch()
    # What is no picture, or hidden, is listed too.
    (folder / "folder.jpg").mkdir()
    (folder / "notes.txt").touch()
    for hidden in ("train/.ipynb_checkpoints", "valid/__MACOSX"):
        shutil.copytree(cwd / "pictures/test/square", cwd / "pictures" / hidden)
    return cwd, *run_trainer(cwd, *FOLDER, "data.max_broken=0.5", "name=mine")


def test_broken_pictures_are_left_out_by_name_and_the_run_goes_on(finished):
    cwd, code, output = finished
    assert code == OK, output
    assert not any(sign in output for sign in ("Traceback", "Logging error", "error: "))
    lines = (cwd / "runs/mine/quarantine.txt").read_text().splitlines()
    reasons = {Path(path).name: reason for path, reason in (line.split("\t") for line in lines)}
    others = {"notes.txt": ".txt"}
    others |= dict.fromkeys(
        [".ipynb_checkpoints", "__MACOSX"], "hidden, or made by an operating system"
    )
    assert {name: reasons.pop(name) for name in others} == others
    assert reasons.keys() == {*BROKEN, *NEVER_OPENED, *NOT_TEXT.values()}
    assert all(reasons.values())
    assert reasons["bomb.png"].startswith("60000 x 60000 pixels are too many")
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["text.jpg"].startswith("not a JPEG")
    assert reasons["fifo.jpg"] == reasons["device.jpg"] == "not a regular file"
    assert reasons["nowhere.jpg"] == "no such file or directory"
    for text in (output, (cwd / "runs/mine/log.txt").read_text()):
        assert "3 classes" in text
        assert text.count("left out: pictures/train/circle/") == 10
        counts = (
            f"{len(reasons)} that can't be used, 2 hidden, or made by an operating system, 1 .txt"
        )
        assert f"left out: {counts}; see runs/mine/quarantine.txt" in text


# --- run directories ---


def test_a_file_in_the_place_of_a_directory_is_one_line(cwd):
    (cwd / "file").touch()
    said = ["file/", "a file is in the place of its directory", "platform.runs=DIR"]
    check_refused(run_trainer(cwd, *FOLDER, "platform.runs=file"), cwd, *said)


def test_a_cache_that_can_not_be_made_is_said_and_the_run_goes_on(cwd):
    (cwd / "file").touch()
    code, output = run_trainer(cwd, *FOLDER, "platform.cache=file")
    assert code == OK, output
    (line,) = (line for line in output.splitlines() if line.startswith("warning: pictures are"))
    for part in ("decoded in each epoch", "a file is in the place", "platform.cache=DIR"):
        assert part in line


def test_a_run_that_another_process_has_is_one_line(cwd):
    (cwd / "runs/mine").mkdir(parents=True)
    with (cwd / "runs/mine/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refused(
            run_trainer(cwd, *FOLDER, "name=mine"),
            cwd,
            "runs/mine: another process trains in this run",
            "another name=...",
        )


# Overrides under which an unfinished run must not go on: what the line must say.
CHANGED = {
    "data.root=pictures": [
        "runs/mine/checkpoints: the pictures have changed since this run began: 1 missing: "
        "train/circle/000.png",
        "restore them",
    ],
    "seed=1": [
        "runs/mine/checkpoints: this run began with other settings (seed: 0 then, 1 now)",
        "another name=...",
    ],
}


@pytest.mark.parametrize("change", CHANGED)
def test_going_on_with_something_else_is_one_line(cwd, finished, change):
    shutil.copytree(finished[0] / "runs", cwd / "runs")
    (cwd / "runs/mine/result.json").unlink()  # as if it had been killed at the very end
    (cwd / "pictures/train/circle/000.png").unlink()
    overrides = ["data.max_broken=0.5", f"data.root={finished[0]}/pictures", "name=mine", change]
    check_refused(run_trainer(cwd, *FOLDER, *overrides), cwd, *CHANGED[change])


# --- no permission ---


# Root may do everything; without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) it is bound by
# the files' modes like any owner (capabilities(7)). They go from this process by capset, of which
# the header is version 3, and from all that it starts by prctl's PR_CAPBSET_DROP (24).
BOUND = """
import ctypes
system = ctypes.CDLL(None, use_errno=True)
for capability in (1, 2):
    assert system.prctl(24, capability, 0, 0, 0) == 0
header, kept = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert system.capget(header, kept) == 0
kept[0] &= ~6
kept[1] &= ~6
assert system.capset(header, kept) == 0
"""

# What may not be touched: its mode, overrides, what the line must say.
FORBIDDEN = {
    "runs": (0o555, [], ["runs/mine: permission denied", "platform.runs=DIR"]),
    "pictures/train/square": (
        0,
        [],
        ["pictures/train/square: permission denied", "give this user access"],
    ),
    "pictures/test/square/000.png": (
        0,
        ["data.max_broken=1"],
        ["pictures/test/square/000.png: permission denied", "give this user access"],
    ),
    "clothes": (
        0o555,
        ["data=fashion_mnist", "data.root=clothes/here"],
        ["clothes/", "permission denied", "data.root=DIR"],
    ),
}


@pytest.mark.skipif(
    IS_ROOT and sys.platform != "linux",
    reason="root is bound by no permission, and elsewhere than on Linux nothing binds it",
)
@pytest.mark.parametrize("path", FORBIDDEN)
def test_what_may_not_be_read_or_written_is_one_line(cwd, path):
    mode, overrides, said = FORBIDDEN[path]
    for folder in ("runs", "clothes"):
        (cwd / folder).mkdir()
    (cwd / path).chmod(mode)
    before = ""
    if IS_ROOT:
        before = BOUND
    result = run_trainer(cwd, *FOLDER, "name=mine", *overrides, before=before)
    (cwd / path).chmod(0o700)
    check_refused(result, cwd, *said)


# --- no space ---


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, kilobytes: int) -> None:
        """Makes it as large as what it holds, and so much more."""
        status = os.statvfs(self.path)
        used = (status.f_blocks - status.f_bfree) * status.f_bsize
        subprocess.run(
            ["mount", "-o", f"remount,size={used + 1024 * kilobytes}", str(self.path)], check=True
        )


@contextmanager
def disk(path: Path) -> Iterator[Disk]:
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]).returncode:
        pytest.skip("this machine's root may not mount a file system")
    try:
        (path / "other").write_bytes(b"x")  # a size of 0 would mean no limit
        yield Disk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


# The room goes while the run is under way: at the start it is enough.
LATER = "from trainer.results import early; early.check_room = lambda *arguments: None"

needs_mount = pytest.mark.skipif(
    sys.platform != "linux" or not IS_ROOT,
    reason="a small file system must be mounted, as root on Linux",
)


@needs_mount
def test_a_disk_too_small_for_the_pictures_is_one_line(cwd):
    with disk(cwd / "clothes") as clothes:
        clothes.leave(100)
        result = run_trainer(cwd, *FOLDER, "data=fashion_mnist", "data.root=clothes/here")
        check_refused(result, cwd, "clothes/here", "no space is left", "data.root=DIR")


@needs_mount
def test_a_full_disk_is_one_line_at_every_stage_and_with_room_the_run_goes_on(cwd):
    command = (*FOLDER, "name=mine", "platform.package=models/model.tar.gz")
    with disk(cwd / "runs") as runs, disk(cwd / "models") as models:
        # One checkpoint has 4 MB, the best weights 1 MB, the package with all that it is made of 4
        # MB, the report some 30 KB.
        stages = [
            (0, 0, "runs/mine/log.txt"),
            (7_000, 0, "runs/mine/checkpoints/step-00000006-evaluated"),
            (20_000, 1_000, "models/model.tar.gz"),
            (12, 20_000, "runs/mine/report.html"),
        ]
        for room, room_of_models, full in stages:
            runs.leave(room)
            models.leave(room_of_models)
            result = ended(start_trainer(cwd, *command, before=LATER))
            check_refused(result, cwd, f"{full}: no space is left", "platform.runs=DIR")
            if "checkpoints" in full:
                assert [path.name for path in checkpoint.steps(cwd / "runs/mine/checkpoints")] == [
                    "step-00000003-evaluated"
                ]
                checkpoint.verify(cwd / "runs/mine/checkpoints/step-00000003-evaluated")
        runs.leave(1_000)
        models.leave(1_000)
        result = run_trainer(cwd, *command)
        check_refused(
            result, cwd, "models: the model package will take", "free some", "platform.runs"
        )
        models.leave(20_000)
        code, output = run_trainer(cwd, *command)
        assert code == OK, output
        assert (cwd / "runs/mine/result.json").exists()
