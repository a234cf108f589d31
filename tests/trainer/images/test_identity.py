"""A picture is its bytes, a data set its pictures and their classes, weights their tensors and what
they go through.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.trainer.images.test_cache import settle
from trainer.common import journal
from trainer.images import identity
from trainer.images.folder import scan

SPLITS = {"train": ("a", "b"), "valid": ("a", "b"), "test": ("b",)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """BMP files, which all have the same size."""
    seed = 0
    for split, classes in SPLITS.items():
        for name in classes:
            (tmp_path / "root" / split / name).mkdir(parents=True)
            for number in range(2):
                seed += 1
                pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "root" / split / name / f"{number}.bmp")
    return tmp_path / "root"


def samples(root: Path) -> list[identity.Sample]:
    return identity.samples(scan({split: str(root / split) for split in SPLITS}, 0.2))


def set_back(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(one: Path, other: Path) -> None:
    """Contents change places; sizes, names and modification times stay."""
    data, status = (one.read_bytes(), other.read_bytes()), (one.stat(), other.stat())
    one.write_bytes(data[1])
    other.write_bytes(data[0])
    set_back(one, status[0])
    set_back(other, status[1])


def replace(path: Path) -> None:
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    set_back(path, status)


# --- a data set ---


def test_a_data_set_is_its_pictures_wherever_they_lie(root, tmp_path):
    expected = identity.of_samples(samples(root))
    for change in (
        lambda: root.rename(tmp_path / "moved").rename(root),
        (root / "train/a/0.bmp").touch,
        lambda: (root / "train/a/0.bmp").rename(root / "train/a/z.bmp"),
    ):
        change()
        assert identity.of_samples(samples(root)) == expected
    shutil.copytree(root, tmp_path / "copy")
    assert identity.of_samples(samples(tmp_path / "copy")) == expected


CHANGES = {
    "replaced": (lambda root: replace(root / "train/b/1.bmp"), "1 changed: train/b/1.bmp"),
    "classes swapped": (
        lambda root: swap(root / "train/a/0.bmp", root / "train/b/0.bmp"),
        "2 changed: train/a/0.bmp, train/b/0.bmp",
    ),
    "deleted": (lambda root: (root / "valid/a/0.bmp").unlink(), "1 missing: valid/a/0.bmp"),
    "more": (
        lambda root: shutil.copy(root / "train/a/0.bmp", root / "test/b/9.bmp"),
        "1 new: test/b/9.bmp",
    ),
    "twice": (
        lambda root: shutil.copy(root / "train/a/0.bmp", root / "train/a/9.bmp"),
        "1 new: train/a/",
    ),
    "another split": (
        lambda root: (root / "valid/a/0.bmp").rename(root / "train/a/9.bmp"),
        "1 missing: valid/a/0.bmp; 1 new: train/a/9.bmp",
    ),
    "many": (
        lambda root: [replace(path) for path in sorted(root.rglob("*.bmp"))],
        "10 changed: test/b/0.bmp, test/b/1.bmp, train/a/0.bmp, ...",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_content_is_another_data_set_and_is_named(root, change):
    before = samples(root)
    do, said = CHANGES[change]
    do(root)
    after = samples(root)
    assert identity.of_samples(after) != identity.of_samples(before)
    assert said in identity.changes(before, after)


def test_the_same_data_set_has_no_changes(root):
    assert identity.changes(samples(root), reversed(samples(root))) == ""


# --- the digests of files ---


@pytest.fixture
def paths(root: Path) -> list[str]:
    return settle([str(path) for path in sorted(root.rglob("*.bmp"))])


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are read."""
    seen: list[str] = []
    of_file = identity.of_file

    def watched(path):
        seen.append(str(path))
        return of_file(path)

    monkeypatch.setattr(identity, "of_file", watched)
    return seen


def expected(paths: list[str]) -> dict[str, str]:
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def test_what_looks_unchanged_is_not_read_again(tmp_path, paths, read):
    assert identity.digests(paths, tmp_path / "index") == expected(paths)
    assert sorted(read) == sorted(paths)
    read.clear()
    replace(Path(paths[3]))  # size and mtime stay
    Path(paths[4]).touch()
    settle(paths)
    assert identity.digests(paths, tmp_path / "index") == expected(paths)
    assert sorted(read) == sorted(paths[3:5])
    read.clear()
    assert identity.digests(paths, tmp_path / "index") == expected(paths)
    assert not read


@pytest.mark.parametrize(
    "how",
    [
        lambda data: b"",
        lambda data: data[:-7],
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: re.sub(rb"[0-9a-f]{60}", b"0" * 60, data, count=2),
        lambda data: data + b"more",
        lambda data: data + journal.lines([("train", "cat", "0" * 64, "a.png"), [7, 7, 7], 5]),
    ],
)
def test_a_damaged_index_costs_time_alone(tmp_path, paths, how):
    index = tmp_path / "index"
    identity.digests(paths, index)
    (file,) = index.glob("*.index")
    file.write_bytes(how(file.read_bytes()))
    for _ in range(2):
        assert identity.digests(paths, index) == expected(paths)
    values, whole = journal.parse(file.read_bytes(), str, list, str)
    assert whole and len(values) >= len(paths)


def test_an_index_that_can_not_be_kept_costs_time_alone(tmp_path, paths):
    (tmp_path / "file").write_text("where the folder should be")
    assert identity.digests(paths, tmp_path / "file") == expected(paths)
    assert identity.digests(paths) == expected(paths)
    assert identity.digests([], tmp_path / "index") == {}


def test_touching_for_ever_does_not_grow_the_index_for_ever(tmp_path, paths):
    for _ in range(20):
        for path in paths:
            Path(path).touch()
        settle(paths)
        identity.digests(paths, tmp_path / "index")
    (file,) = (tmp_path / "index").glob("*.index")
    assert len(journal.parse(file.read_bytes(), str, list, str)[0]) <= 8 * len(paths)


# --- weights ---


def test_what_a_thread_notes_while_an_interrupted_run_saves_does_no_harm(
    tmp_path, paths, monkeypatch
):
    kept = identity.Digests(tmp_path / "digests", paths)
    kept.note(paths[0], Path(paths[0]).stat(), "first")
    lines = journal.lines

    def late(values):
        values = iter(values)
        first = next(values)
        kept.note(paths[1], Path(paths[1]).stat(), "second")
        return lines([first, *values])

    monkeypatch.setattr(journal, "lines", late)
    kept.save()
    assert identity.Digests(tmp_path / "digests", paths).known(paths[0]) == "first"


def test_weights_are_their_tensors_their_architecture_and_their_builder():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    usual = identity.of_weights(network, "net", {"timm": "1.0"})
    same = network.to(memory_format=torch.channels_last)
    assert identity.of_weights(same, "net", {"timm": "1.0"}) == usual
    network[0].padding = (0, 0)  # equal tensors
    padded = identity.of_weights(network, "net", {"timm": "1.0"})
    assert padded["weights.tensors"] == usual["weights.tensors"]
    assert padded != usual
    assert identity.of_weights(network, "net", {"timm": "1.1"}) != padded
    with torch.no_grad():
        network[1].running_mean += 1e-6
    assert identity.of_weights(network, "net", {"timm": "1.0"}) != padded


def test_half_precision_weights_have_an_identity_too():
    network = nn.Linear(2, 2).to(torch.bfloat16)
    assert len(identity.of_weights(network, "net", {})["weights.tensors"]) == 64
