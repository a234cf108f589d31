import hashlib
import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from trainer.common.errors import UserError
from trainer.images.decode import ImageError
from trainer.images.folder import find_splits, quarantine, scan
from trainer.images.identity import of_images
from trainer.images.names import LOOSE, OF_SYSTEM

SPLITS = ("train", "valid", "test")


def lay_out(root, **files):
    """Writes `files`, named by split: {path below it: bytes}. Scanning decodes nothing, so any
    bytes will do for a picture.
    """
    for split, contents in files.items():
        for name, data in contents.items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return {split: str(root / split) for split in SPLITS}


def pictures(*classes, count=3):
    return {
        f"{name}/{number}.jpg": f"{name} {number}".encode()
        for name in classes
        for number in range(count)
    }


def below(directories, split, folder):
    return [str(Path(path).relative_to(directories[split])) for path in folder.splits[split].paths]


def message_of(directories):
    with pytest.raises(UserError) as caught:
        scan(directories, 0.2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- scan ---


def test_classes_are_trains_folders_sorted_as_text(tmp_path):
    directories = lay_out(
        tmp_path, train=pictures("10", "2", "0", "1"), valid=pictures("2", "10", count=1)
    )
    folder = scan(directories, 0.2)
    assert folder.classes == ("0", "1", "10", "2")
    assert below(directories, "valid", folder) == ["10/0.jpg", "2/0.jpg"]
    assert folder.splits["valid"].labels.tolist() == [
        2,
        3,
    ]  # train's numbers, although valid lacks "0" and "1"
    assert folder.splits["valid"].labels.dtype == np.int64
    assert list(folder.splits) == ["train", "valid"]


def test_pictures_are_sorted_by_class_and_name_and_found_at_any_depth(tmp_path):
    train = {
        "b/1.PNG": b"1",
        "b/deep/er/0.tiff": b"2",
        "a/z.jpeg": b"3",
        "a/B.webp": b"4",
        "a/a.gif": b"5",
    }
    directories = lay_out(tmp_path, train=train, valid=pictures("a"))
    folder = scan(directories, 0.2)
    assert below(directories, "train", folder) == [
        "a/B.webp",
        "a/a.gif",
        "a/z.jpeg",
        "b/1.PNG",
        "b/deep/er/0.tiff",
    ]
    assert folder.splits["train"].labels.tolist() == [0, 0, 0, 1, 1]


def test_what_is_hidden_or_not_named_like_a_picture_is_ignored(tmp_path):
    junk = [
        ".ipynb_checkpoints/1.jpg",
        "__MACOSX/a/1.jpg",
        "a/.hidden.jpg",
        "a/.cache/1.jpg",
        "a/__MACOSX/1.jpg",
        "a/notes.txt",
        "a/jpg",
        "readme.jpg",
    ]
    directories = lay_out(
        tmp_path,
        train=pictures("a", "b") | dict.fromkeys(junk, b""),
        test=pictures("a") | {".DS_Store/1.jpg": b""},
    )
    folder = scan(directories, 0.2)
    assert folder.classes == ("a", "b")
    assert sum(len(folder.splits[split].paths) for split in ("train", "valid")) == 6
    assert folder.broken == ()


JUNK = ["@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__MACOSX"]
JUNK += ["#recycle", ".Trash-1000", ".ipynb_checkpoints", ".AppleDouble", "@Recycle"]


def test_what_systems_put_there_is_no_class_and_no_picture_at_any_level(tmp_path):
    inside = [f"{place}{name}/x/1.jpg" for name in JUNK for place in ("", "a/", "b/deep/")]
    junk = dict.fromkeys([*inside, "Thumbs.db", "a/desktop.ini"], b"junk")
    train, valid = pictures("a", "b"), pictures("a", count=1)
    directories = lay_out(tmp_path, train=train | junk, valid=valid | junk)
    folder = scan(directories, 0.2)
    assert folder.classes == ("a", "b")
    assert [len(folder.splits[split].paths) for split in ("train", "valid")] == [6, 1]
    assert {kind for _, kind in folder.left_out} == {OF_SYSTEM}
    for name in JUNK:  # in the root, too
        lay_out(tmp_path, **{name: {"a/1.jpg": b""}})
    assert find_splits(str(tmp_path), dict.fromkeys(SPLITS))[1] == []


def test_all_that_is_left_out_is_listed_with_its_kind(tmp_path):
    others = {
        "a/1.jxl": b"",
        "a/deep/2": b"",
        "b/notes.txt": b"",
        "loose.jpg": b"",
        "list.csv": b"",
    }
    directories = lay_out(
        tmp_path, train=pictures("a", "b") | others, valid=pictures("a"), test=pictures("b")
    )
    folder = scan(directories, 0.2)
    root = directories["train"]
    assert dict(folder.left_out) == {
        f"{root}/a/1.jxl": ".jxl",
        f"{root}/a/deep/2": "without extension",
        f"{root}/b/notes.txt": ".txt",
        f"{root}/loose.jpg": LOOSE,
        f"{root}/list.csv": LOOSE,
    }


def test_a_class_that_holds_other_files_alone_says_which(tmp_path):
    others = {f"cat/{number}.jxl": b"" for number in range(3)} | {"cat/notes": b""}
    message = message_of(lay_out(tmp_path, train=pictures("a", "b") | others))
    assert "class folder cat (it holds 3 .jxl, 1 without extension); add some" in message
    directories = lay_out(tmp_path / "2", train=pictures("a", "b"), test={"a/1.jxl": b""})
    assert "no picture in data.test (it holds 1 .jxl)" in message_of(directories)


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_the_two_ways_to_write_an_accent_are_one_class(tmp_path):
    directories = lay_out(
        tmp_path,
        train=pictures(DECOMPOSED, "b") | {f"{COMPOSED}/9.jpg": b"9"},
        valid=pictures(COMPOSED, "b"),
        test=pictures(DECOMPOSED),
    )
    folder = scan(directories, 0.2)
    assert folder.classes == ("b", COMPOSED)
    assert [split.labels.tolist() for split in folder.splits.values()] == [
        [0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1],
    ]


def test_a_copy_by_another_system_is_the_same_data_set(tmp_path):
    ours = {f"{COMPOSED}/{COMPOSED}{n}.jpg": b"%d" % n for n in range(4)} | pictures("b")
    theirs = {unicodedata.normalize("NFD", name): data for name, data in ours.items()}
    here, elsewhere = (
        scan(lay_out(tmp_path / place, train=files, valid=files), 0.2)
        for place, files in (("1", ours), ("2", theirs))
    )
    assert of_images(here) == of_images(elsewhere) and here.classes == elsewhere.classes


def test_a_class_whose_name_is_no_utf8_is_refused(tmp_path):
    directories = lay_out(tmp_path, train=pictures("a", "b"))
    Path(os.fsdecode(os.fsencode(directories["train"]) + b"/caf\xe9")).mkdir()
    message = message_of(directories)
    assert message.startswith(f"{tmp_path}/train: the class caf\\xe9 is not named in UTF-8")


@pytest.mark.parametrize("name", ["Beagle", "beagle ", "bea\ufb02e"])
def test_a_class_written_otherwise_is_named_beside_the_one_that_was_meant(tmp_path, name):
    meant = {"bea\ufb02e": "beafle"}.get(name, "beagle")
    directories = lay_out(tmp_path, train=pictures(meant, "b"), test=pictures(name))
    assert f"train has no class {name} (but {meant}, which is" in message_of(directories)


def test_linked_folders_are_followed_but_loops_are_not(tmp_path):
    directories = lay_out(
        tmp_path, train=pictures("a", "b"), valid=pictures("a", "b"), elsewhere={"more/9.jpg": b"9"}
    )
    cat = tmp_path / "train" / "a"
    (cat / "linked").symlink_to(tmp_path / "elsewhere")
    (cat / "here").symlink_to(cat)
    (cat / "up").symlink_to(tmp_path / "train")
    (cat / "top").symlink_to(tmp_path)
    (tmp_path / "train" / "itself").symlink_to("itself")
    folder = scan(directories, 0.2)
    assert below(directories, "train", folder) == [
        "a/0.jpg",
        "a/1.jpg",
        "a/2.jpg",
        "a/linked/more/9.jpg",
        "b/0.jpg",
        "b/1.jpg",
        "b/2.jpg",
    ]
    assert folder.classes == ("a", "b")


def test_what_is_no_regular_file_is_listed_and_never_opened(tmp_path):
    directories = lay_out(tmp_path, train=pictures("a", "b"))
    top = tmp_path / "train" / "a"
    os.mkfifo(top / "fifo.jpg")  # opening it would wait for ever
    (top / "device.jpg").symlink_to("/dev/zero")
    (top / "nowhere.jpg").symlink_to("gone.jpg")
    (top / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(top / "socket.jpg"))  # a socket's absolute path may be too long
    folder = scan(directories, 0.2)
    assert {Path(path).name: reason for path, reason in folder.broken} == {
        "device.jpg": "not a regular file",
        "fifo.jpg": "not a regular file",
        "loop.jpg": "too many levels of symbolic links",
        "nowhere.jpg": "no such file or directory",
        "socket.jpg": "not a regular file",
    }
    assert not any("fifo" in path for split in folder.splits.values() for path in split.paths)


# --- the split made from the content ---


def contents(split):
    return sorted(
        (int(label), Path(path).read_bytes())
        for path, label in zip(split.paths, split.labels, strict=True)
    )


def test_split_depends_on_the_content_alone(tmp_path):
    train = pictures("a", "b", count=20)
    renamed = {
        f"{Path(name).parent}/deeper/{99 - number}.png": data
        for number, (name, data) in enumerate(train.items())
    }
    first, second = (
        scan(lay_out(tmp_path / "1", train=train), 0.25),
        scan(lay_out(tmp_path / "2", train=renamed), 0.25),
    )
    for split in ("train", "valid"):
        assert contents(first.splits[split]) == contents(second.splits[split])
    for label, name in enumerate(first.classes):
        of_class = sorted(
            (data for data in train.values() if data.startswith(name.encode())),
            key=lambda data: hashlib.sha256(data).digest(),
        )
        assert {data for other, data in contents(first.splits["valid"]) if other == label} == set(
            of_class[:5]
        )
    assert np.bincount(first.splits["train"].labels).tolist() == [15, 15]


def test_adding_a_picture_moves_at_most_one_other(tmp_path):
    before = contents(
        scan(lay_out(tmp_path / "1", train=pictures("a", "b", count=20)), 0.25).splits["valid"]
    )
    after = contents(
        scan(
            lay_out(tmp_path / "2", train=pictures("a", "b", count=20) | {"a/new.jpg": b"new"}),
            0.25,
        ).splits["valid"]
    )
    assert len(set(before) ^ set(after)) <= 2


def test_equal_pictures_stay_on_one_side(tmp_path):
    train = pictures("a", "b", count=8)
    copies = {
        name.replace(".jpg", f" copy {number}.jpg"): data
        for name, data in train.items()
        for number in range(3)
    }
    folder = scan(lay_out(tmp_path, train=train | copies), 0.25)
    assert not set(contents(folder.splits["train"])) & set(contents(folder.splits["valid"]))
    assert np.bincount(folder.splits["valid"].labels).tolist() == [
        8,
        8,
    ]  # 2 of 8 different ones, 4 times each


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (3, 0.9, 2), (10, 0.3, 3)]
)
def test_split_leaves_a_picture_on_either_side(tmp_path, count, fraction, expected):
    folder = scan(lay_out(tmp_path, train=pictures("a", "b", count=count)), fraction)
    assert np.bincount(folder.splits["valid"].labels).tolist() == [expected, expected]
    assert len(folder.splits["train"].paths) == 2 * (count - expected)


def test_a_class_of_one_picture_stays_in_train(tmp_path):
    folder = scan(lay_out(tmp_path, train=pictures("a") | pictures("b", count=1)), 0.5)
    assert folder.splits["valid"].labels.tolist() == [0, 0]
    assert np.bincount(folder.splits["train"].labels).tolist() == [1, 1]


# --- folders that can't be trained on ---


def test_missing_train_says_what_is_expected(tmp_path):
    message = message_of(lay_out(tmp_path))
    assert message.startswith(
        f"{tmp_path}/train: there is no such folder; data.root must hold train"
    )


def test_class_folders_in_the_root_itself_are_recognised(tmp_path):
    lay_out(tmp_path, beagle={"1.jpg": b""}, boxer={"1.jpg": b""}, docs={"1.txt": b""})
    message = message_of({split: str(tmp_path / split) for split in SPLITS})
    assert "itself has class folders (beagle, boxer)" in message
    assert f"data.train={tmp_path}," in message


def a_file_for_train(root):
    (root / "train").write_bytes(b"")


def a_file_for_valid(root):
    lay_out(root, train=pictures("a", "b"))
    (root / "valid").write_bytes(b"")


def no_class_folders(root):
    lay_out(root, train={"1.jpg": b""})


def one_class(root):
    lay_out(root, train=pictures("a"))


def an_empty_class(root):
    lay_out(root, train=pictures("a", "b") | {"cat/notes.txt": b""})


def a_class_of_broken_links(root):
    lay_out(root, train=pictures("a", "b"))
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "1.jpg").symlink_to("gone.jpg")


def an_empty_test(root):
    lay_out(root, train=pictures("a", "b"))
    (root / "test").mkdir()


def a_class_that_only_valid_has(root):
    lay_out(root, train=pictures("a", "b"), valid=pictures("a", "cat"))


def a_class_that_only_test_has(root):
    lay_out(root, train=pictures("a", "b"), test=pictures("a", "cat"))


def single_pictures(root):
    lay_out(root, train=pictures("a", "b", count=1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (a_file_for_train, "/train: not a folder"),
        (a_file_for_valid, "/valid: data.valid is not a folder"),
        (no_class_folders, "/train: there is no class folder"),
        (one_class, "/train: there is only one class folder, a"),
        (an_empty_class, "/train: no picture in the class folder cat"),
        (a_class_of_broken_links, "/train: no picture in the class folder cat"),
        (an_empty_test, "/test: no picture in data.test"),
        (a_class_that_only_valid_has, "/valid: train has no class cat"),
        (a_class_that_only_test_has, "/test: train has no class cat"),
        (single_pictures, "/train: no class has two different pictures"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_one_clear_line(tmp_path, make, expected):
    make(tmp_path)
    assert message_of({split: str(tmp_path / split) for split in SPLITS}).startswith(
        f"{tmp_path}{expected}"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    directories = lay_out(tmp_path, train=pictures("a", "b"))
    (tmp_path / "train" / "b").chmod(0)
    try:
        assert message_of(directories).startswith(f"{tmp_path}/train/b: permission denied")
    finally:
        (tmp_path / "train" / "b").chmod(0o700)


# --- quarantine ---


def refuse(*endings):
    def check(path):
        if path.endswith(endings):
            raise ImageError(f"broken {Path(path).name}")

    return check


def ignore(done, total):
    pass


@pytest.fixture
def folder(tmp_path):
    return scan(
        lay_out(tmp_path, train=pictures("a", "b", count=60), valid=pictures("a", "b", count=20)),
        0.2,
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_quarantine_leaves_out_what_is_broken_whatever_the_threads(folder, workers):
    left = quarantine(folder, refuse("/7.jpg", "/30.jpg"), workers, 0.1, ignore)
    names = [
        "train/a/30.jpg",
        "train/a/7.jpg",
        "train/b/30.jpg",
        "train/b/7.jpg",
        "valid/a/7.jpg",
        "valid/b/7.jpg",
    ]
    assert [(str(Path(*Path(path).parts[-3:])), reason) for path, reason in left.broken] == [
        (name, f"broken {Path(name).name}") for name in names
    ]
    assert np.bincount(left.splits["train"].labels).tolist() == [58, 58]
    assert left.splits["train"].paths == tuple(
        path for path in folder.splits["train"].paths if not path.endswith(("/7.jpg", "/30.jpg"))
    )
    assert [folder.classes[label] for label in left.splits["valid"].labels] == [
        Path(path).parts[-2] for path in left.splits["valid"].paths
    ]


def test_more_broken_pictures_than_allowed_are_counted_and_named(folder):
    assert len(quarantine(folder, refuse("5.jpg"), 2, 0.1, ignore).broken) == 16
    with pytest.raises(UserError) as caught:
        quarantine(folder, refuse("5.jpg"), 2, 0.09, ignore)
    message = str(caught.value)
    assert message.startswith(
        "16 of 160 pictures can't be used, more than data.max_broken=0.09 allows: /"
    )
    assert message.count(".jpg (broken ") == 5
    assert message.endswith(
        "/train/a/5.jpg (broken 5.jpg) and 11 more; fix or remove them, or allow more"
    )


def test_what_scan_found_broken_counts_too(tmp_path):
    directories = lay_out(
        tmp_path, train=pictures("a", "b", count=10), valid=pictures("a", "b", count=2)
    )
    (tmp_path / "train" / "a" / "nowhere.jpg").symlink_to("gone.jpg")
    folder = scan(directories, 0.2)
    assert quarantine(folder, refuse(), 0, 1 / 25, ignore).broken == folder.broken
    with pytest.raises(
        UserError,
        match=r"1 of 25 pictures can't be used, .*nowhere.jpg \(no such file or directory\); fix",
    ):
        quarantine(folder, refuse(), 0, 0.03, ignore)


def test_a_class_left_without_training_pictures_is_named(folder):
    with pytest.raises(
        UserError,
        match=r"class b: none of its training pictures .*/b/0.jpg \(broken 0.jpg\).* and 55 more",
    ):
        quarantine(
            folder, lambda path: refuse(".jpg")(path) if "/train/b/" in path else None, 2, 1, ignore
        )


def test_a_split_left_without_pictures_is_named(folder):
    with pytest.raises(UserError, match=r"data.valid: none of its pictures can be used"):
        quarantine(
            folder, lambda path: refuse(".jpg")(path) if "/valid/" in path else None, 2, 1, ignore
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_rises_to_the_total(folder, workers):
    seen = []
    quarantine(folder, refuse(), workers, 0, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (160, 160)
    assert seen == sorted(seen) and len(seen) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_may_end_the_work_early(folder, workers):
    class Enough(Exception):
        pass

    checked = []

    def stop(done, total):
        raise Enough

    with pytest.raises(Enough):
        quarantine(folder, checked.append, workers, 0, stop)
    assert len(checked) < 160


def test_a_fault_that_is_not_the_pictures_is_not_hidden(folder):
    def full_disk(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        quarantine(folder, full_disk, 2, 1, ignore)
