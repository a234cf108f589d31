"""A table of labels in the place of class folders."""

import numpy as np
import pytest

from trainer.common.errors import UserError
from trainer.images.identity import of_images
from trainer.images.table import scan, splits


@pytest.fixture
def root(tmp_path):
    """Eight pictures as Kaggle lays them out, two without a label, and a file beside them."""
    for number in range(8):
        place = tmp_path / "train" / f"id{number}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"picture %d" % number)
    (tmp_path / "test").mkdir()
    for number in range(2):
        (tmp_path / "test" / f"t{number}.jpg").touch()
    (tmp_path / "train" / "readme").touch()
    return tmp_path


def lines(header, form, separator=","):
    rows = [form.format(id=f"id{number}", label="ab"[number % 2]) for number in range(8)]
    return "\n".join([header, *rows]).replace(",", separator) + "\n"


KAGGLE = lines("id,breed", "{id},{label}")


def written(root, text, name="labels.csv"):
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pictures(folder):
    return {
        (path.rsplit("/", 1)[1], folder.classes[label])
        for split in folder.splits.values()
        for path, label in zip(split.paths, split.labels, strict=True)
    }


EXPECTED = {(f"id{number}.jpg", "ab"[number % 2]) for number in range(8)}


@pytest.mark.parametrize(
    "text",
    [
        KAGGLE,
        lines("path,label", "train/{id}.jpg,{label}"),
        lines("label,path", "{label},train/{id}.jpg"),
        lines("Image,Id", "{id}.jpg,{label}"),
        lines("filename,class,width", "{id}.jpg,{label},400"),
        lines("index,filepaths,labels", "7,train\\{id}.jpg,{label}"),
        lines("id,breed", '"{id}","{label}"'),
        lines("id,breed", "./train/{id}, {label} "),
        lines("id,breed", "{id},{label}", ";"),
        lines("id,breed", "{id},{label}", "\t"),
        KAGGLE.replace("\n", "\r\n"),
        "\ufeff" + KAGGLE,
        KAGGLE.replace("\n", "\n\n"),
    ],
)
def test_the_forms_in_which_tables_come(root, text):
    folder = scan(written(root, text), str(root), 0.25)
    assert pictures(folder) == EXPECTED
    assert {name: len(split.paths) for name, split in folder.splits.items()} == {
        "train": 6,
        "valid": 2,
    }
    assert [(path.rsplit("/", 1)[1], kind) for path, kind in folder.left_out] == [
        ("t0.jpg", "not in the table of labels"),
        ("t1.jpg", "not in the table of labels"),
        ("readme", "without extension"),
    ]


def test_splits_are_taken_by_any_of_their_names(root):
    rows = [("id0", "a", "Train"), ("id1", "b", "training"), ("id2", "a", "val")]
    rows += [("id3", "b", "validation"), ("id4", "a", "TEST"), ("id5", "b", "test")]
    text = "id,label,split\n" + "".join(f"{','.join(row)}\n" for row in rows)
    path = written(root, text)
    folder = scan(path, str(root), 0.25)
    assert [len(folder.splits[name].paths) for name in ("train", "valid", "test")] == [2, 2, 2]
    assert splits(path, str(root)) == {"train", "valid", "test"}


def test_paths_of_this_machine_may_be_given_where_they_lie_in_the_root(root):
    text = lines("path,label", f"{root}/train/{{id}}.jpg,{{label}}")
    assert pictures(scan(written(root, text), str(root), 0.25)) == EXPECTED


def test_labels_in_two_normal_forms_are_one_class(root):
    text = "id,label\nid0,cafe\u0301\nid1,caf\u00e9\nid2,b\nid3,b\n"
    folder = scan(written(root, text), str(root), 0.5)
    assert folder.classes == ("b", "café")
    assert np.bincount(folder.splits["train"].labels).tolist() == [1, 1]


def test_what_the_pictures_are_follows_the_labels(root):
    first = scan(written(root, KAGGLE), str(root), 0.25)
    swapped = KAGGLE.replace("id0,a", "id0,b").replace("id1,b", "id1,a")
    assert of_images(scan(written(root, swapped), str(root), 0.25)) != of_images(first)
    reordered = "\n".join([*KAGGLE.split("\n")[:1], *sorted(KAGGLE.split("\n")[1:-1])[::-1], ""])
    assert of_images(scan(written(root, reordered), str(root), 0.25)) == of_images(first)


REFUSED = {
    "no path": ("foo,bar\n1,2\n", "no column holds the pictures' paths (its columns: foo, bar)"),
    "no header": ("id0.jpg,a\nid1.jpg,b\n", "line 1: no column holds the pictures' paths"),
    "one-hot": ("id,healthy,rust\nid0,0,1\n", "line 1: which column holds the label can't be told"),
    "no label column": ("id\nid0\n", "line 1: which column holds the label can't be told (there"),
    "empty": ("", "line 1: no column holds"),
    "a short line": (f"{KAGGLE}id1\n", "line 10: it has 1 columns, and the first line 2"),
    "no label": (f"{KAGGLE}id1,\n", "line 10, column breed: no label"),
    "no name": (f"{KAGGLE},a\n", "line 10, column id: no path"),
    "twice": (f"{KAGGLE}id3,a\n", "line 10: train/id3.jpg was named in line 5 already"),
    "missing": (f"{KAGGLE}zz,a\nzzz,b\n", "line 10, column id: zz: there is no such picture in "),
    "outside": (f"{KAGGLE}../x.jpg,a\n", "line 10, column id: ../x.jpg: it lies outside of "),
    "absolute": (f"{KAGGLE}/etc/passwd,a\n", "column id: /etc/passwd: it lies outside of "),
    "a folder": (f"{KAGGLE}train,a\n", "line 10, column id: train: there is no such picture in "),
    "split": ("id,label,split\nid0,a,other\n", "line 2, column split: other is not allowed"),
    "no split": ("id,label,split\nid0,a,\n", "line 2, column split: nothing is not allowed"),
    "one class": ("id,label\nid0,a\nid1,a\n", "it has 2 pictures, and 1 labels in train"),
    "class of test": (
        "id,label,split\nid0,a,train\nid1,b,train\nid2,c,test\n",
        "line 4, column label: train has no class c",
    ),
    "quotes": (f'{KAGGLE}"id1,a\n', "line 10: not valid CSV"),
    "no text": (b"id,breed\nid0,\xe4\n", "line 2: not UTF-8"),
    "UTF-16": (KAGGLE.encode("utf-16"), "line 1: not UTF-8"),
    "control": (f"{KAGGLE}id1,a\x07\n", "line 10, column breed: the class 'a\\x07' has control"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_any_other_form_is_one_line_that_names_line_and_column(root, text, reason):
    path = written(root, text)
    with pytest.raises(UserError) as caught:
        scan(path, str(root), 0.25)
    assert str(caught.value).startswith(f"{path}") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_two_pictures_have_is_refused(root):
    (root / "test" / "id0.jpg").touch()
    with pytest.raises(UserError, match=r"line 2.*id0: it may be test/id0.jpg or train/id0.jpg"):
        scan(written(root, KAGGLE), str(root), 0.25)
    text = lines("id,breed", "train/{id},{label}")
    assert pictures(scan(written(root, text), str(root), 0.25)) == EXPECTED


CODE = """
from pathlib import Path

def pictures(root):
    for path in Path(root).glob("train/*.jpg"):
        number = int(path.stem[2:])
        yield path, "ab"[number % 2], "test" if number > 5 else "train"
"""


def test_code_of_ones_own_names_the_pictures_as_a_table_does(root):
    code = written(root, CODE, "mine.py")
    rows = [
        f"id{number},{'ab'[number % 2]},{'test' if number > 5 else 'train'}" for number in range(8)
    ]
    table = written(root, "\n".join(["id,label,split", *rows, ""]))
    images = scan(code, str(root), 0.5)
    assert pictures(images) == EXPECTED
    assert of_images(images) == of_images(scan(table, str(root), 0.5))
    assert splits(code, str(root)) == {"train", "test"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "it defines no function pictures"),
        ("def pictures(root):\n  return 1 / 0", ", line 2: pictures: ZeroDivisionError"),
        ("def pictures(root):\n  yield 'a.jpg'", "item 1 is 'a.jpg'; each must be (path"),
        ("def pictures(root):\n  yield 'a.jpg', 7", "item 1 is ('a.jpg', 7)"),
        ("def pictures(root):\n  yield 'no.jpg', 'a'\n  yield 'n.jpg', 'b'", "there is no such"),
    ],
)
def test_code_that_keeps_no_contract_is_one_line(root, tmp_path, text, reason):
    with pytest.raises(UserError) as error:
        scan(written(tmp_path, text, "mine.py"), str(root), 0.5)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert "mine.py" in str(error.value)
