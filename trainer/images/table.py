"""A table of labels in the place of class folders: a CSV file, as Kaggle's data sets come.

Or a data set of a person's own: code (trainer/common/own_code.py) with a function

    def pictures(root): yield of each image its path, absolute or in the folder root, its label, and
        where there are splits the one that it is of: (path, label) or (path, label, split), str.

What it yields is held to what a table is. So the data set is its images and labels, whatever code
named them.
"""

import csv
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trainer.common import own_code
from trainer.common.errors import UserError
from trainer.common.text import listed
from trainer.images import folder
from trainer.images.folder import File, ImageFolder
from trainer.images.names import OF_SYSTEM, SPLIT_NAMES, UNLISTED, class_name

# What a column may be called, in any case; of several, the first is taken.
PATH_COLUMNS = (
    "path", "filepath", "file_path", "filepaths", "image_path", "file", "filename", "file_name",
    "image", "image_name", "image_id", "img", "picture", "photo", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset", "data set", "dataset")
UNDERSTOOD = (
    "understood: columns path, label and optionally split (train, valid or test); "
    "or any two of which one is called id, image, image_id, file or filename"
)
# Separators: the last two are those of German Excel and of TSV files.
SEPARATORS = (",", ";", "\t")


class Row(NamedTuple):
    """A line of the table. column: what the one of the path is called."""

    line: int
    column: str
    path: str
    label: str
    split: str


def scan(table: Path, root: str, valid_fraction: float, index: Path | None = None) -> ImageFolder:
    """List the images that a table names, without decoding them.

    root: the folder that its paths begin in. An image may be named by its path in there, or by its
    name alone, where there is one of that name, in both cases with or without its extension.
    Without a valid split, `valid_fraction` of each class is split off train. index: as in
    `folder.scan`. Raise UserError, which names the line and the column, and Unreadable.
    """
    rows = list(_rows(table, root))
    _check_rows(table, rows)
    lying = {file.name: file for file in folder.below(root)}
    classes = tuple(sorted({row.label for row in rows if row.split == "train"}))
    labels = {name: label for label, name in enumerate(classes)}
    held: dict[str, list[File]] = {}
    named: set[str] = set()
    for row, file in _located(table, rows, root, lying):
        named.add(file.name)
        held.setdefault(row.split, []).append(replace(file, label=labels[row.label]))
    for files in held.values():
        files.sort(key=lambda file: (file.label, file.name))
    held["train"] += [
        replace(file, kind=file.kind or UNLISTED)
        for name, file in lying.items()
        if name not in named and not _is_same(file.path, table)
    ]
    places = dict.fromkeys(SPLIT_NAMES, str(table))
    return folder.assemble(classes, held, places, valid_fraction, index)


def by_class(table: Path, root: str, split: str | None = None) -> dict[str, list[File]]:
    """Return the files of each label in a table. split: only its rows; None: all.

    root: the folder that its paths begin in. Raise UserError as `scan` does, and Unreadable.
    """
    rows = [row for row in _rows(table, root) if split in (None, row.split)]
    lying = {file.name: file for file in folder.below(root)}
    found: dict[str, list[File]] = {}
    for row, file in _located(table, rows, root, lying):
        found.setdefault(row.label, []).append(file)
    return found


def _located(
    table: Path, rows: Iterable[Row], root: str, lying: Mapping[str, File]
) -> Iterator[tuple[Row, File]]:
    """Yield each row with its file. lying: the files in root, by name.

    Raise UserError for a file that is named twice; at the end, for those that aren't there.
    """
    names = _Names(root, lying)
    lines: dict[str, int] = {}  # by the image's name
    missing: list[str] = []
    for row in rows:
        name, problem = names.find(row.path)
        if name is None:
            missing.append(f"{table}, line {row.line}, column {row.column}: {row.path}: {problem}")
            continue
        if name in lines:
            raise UserError(
                f"{table}, line {row.line}: {name} was named in line {lines[name]} already; "
                "a picture has one label and one split"
            )
        lines[name] = row.line
        yield row, lying[name]
    if missing:
        raise UserError(f"{listed(missing, 1)}; correct the table, or data.root={root}")


def splits(table: Path, root: str) -> set[str]:
    """Return the splits that a table has rows of. Raise UserError."""
    return {row.split for row in _rows(table, root)}


def _is_same(path: str, table: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(table)


# --- the images that rows name ---


class _Names:
    """Finds an image by what a row says. lying: the files in root, by their path in there."""

    def __init__(self, root: str, lying: Mapping[str, File]) -> None:
        self._root = Path(root).absolute()
        self._lying = lying
        self._by_part: dict[str, list[str]] = {}
        for name, file in lying.items():
            if file.kind == OF_SYSTEM:
                continue
            path = PurePosixPath(name)
            for part in {str(path.with_suffix("")), path.name, path.stem}:
                self._by_part.setdefault(part, []).append(name)

    def find(self, said: str) -> tuple[str | None, str]:
        """Return the image's path in root; or None, and what is wrong."""
        path = unicodedata.normalize("NFC", said.replace("\\", "/"))
        path = os.path.relpath(self._root / path, self._root)
        if path.startswith(".."):
            return None, f"it lies outside of {self._root}"
        if path in self._lying:
            return path, ""
        candidates = self._by_part.get(path, [])
        if len(candidates) > 1:
            return None, f"it may be {' or '.join(sorted(candidates)[:2])}"
        if not candidates:
            return None, f"there is no such picture in {self._root}"
        return candidates[0], ""


# --- the table ---


def is_code(said: str) -> bool:
    """Return whether data.labels names code, and no table."""
    return said.endswith(".py") or (not Path(said).is_file() and own_code.is_named(said))


def _from_code(said: str, root: str) -> Iterator[tuple[int, list[str]]]:
    """Yield what the function `pictures` of a person's own code yields, as lines of a table.

    Raise UserError.
    """
    code = own_code.find("data.labels", said)
    function = getattr(own_code.load(code), "pictures", None)
    if not callable(function):
        raise UserError(
            f"{code.setting}: it defines no function pictures(root); docs/python.md says what it "
            "takes and returns"
        )
    with own_code.told(code.setting, "pictures", *code.files.values()):
        told = list(function(root))
    yield 1, ["path", "label", "split"]
    for number, row in enumerate(told, 2):
        texts = isinstance(row, tuple | list) and [
            os.fspath(each) for each in row if _is_text(each)
        ]
        if not texts or len(texts) != len(row) or len(texts) not in (2, 3):
            raise UserError(
                f"{code.setting}: pictures: item {number - 1} is {row!r}; each must be (path, "
                "label) or (path, label, split), all strings"
            )
        yield number, [*texts, "train"][:3]


def _is_text(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _rows(table: Path, root: str) -> Iterator[Row]:
    """Yield the rows of a table. Raise UserError, which names the line and the column."""
    lines = _from_code(str(table), root) if is_code(str(table)) else csv_lines(table)
    header = next(lines, (1, []))[1]
    columns = _columns(table, header)
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{table}, line {number}: it has {len(cells)} columns, and the first line "
                f"{len(header)}; put cells that hold a separator in quotes"
            )
        path, label, split = (_cell(cells, column) for column in columns)
        for name, value, column in (("path", path, columns[0]), ("label", label, columns[1])):
            if not value:
                raise UserError(
                    f"{table}, line {number}, column {header[column]}: no {name}; "
                    "fill it in, or remove the line"
                )
        where = f"{table}, line {number}, column {header[columns[1]]}"
        label = class_name(label, where)
        yield Row(number, header[columns[0]], path, label, _split(table, number, split))


def csv_lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that isn't empty. Raise UserError."""
    data = table.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{table}, line {line}: not UTF-8; save it as CSV in UTF-8 (.xlsx and .ods can't "
            "be read)"
        ) from error
    first = text.partition("\n")[0]
    separator = max(SEPARATORS, key=first.count)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator, strict=True)
    try:
        for cells in reader:
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(
            f"{table}, line {reader.line_num}: not valid CSV ({error}); save it as CSV again"
        ) from error


def _columns(table: Path, header: list[str]) -> tuple[int, int, int | None]:
    """Return where the path, the label and, if there is one, the split stand."""
    names = [cell.strip().casefold() for cell in header]
    split = next((names.index(name) for name in SPLIT_COLUMNS if name in names), None)
    path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    if path is None:
        raise UserError(
            f"{table}, line 1: no column holds the pictures' paths (its columns: "
            f"{listed(header) or 'none'}); {UNDERSTOOD}"
        )
    others = [number for number in range(len(names)) if number not in (path, split)]
    labels = [number for number in others if names[number] in LABEL_COLUMNS]
    if len(labels) != 1:
        labels = others
    if len(labels) != 1:
        columns = listed(header[number] for number in others)
        raise UserError(
            f"{table}, line 1: which column holds the label can't be told "
            f"({columns or 'there is no other than the path'}); {UNDERSTOOD}"
        )
    return path, labels[0], split


def _cell(cells: list[str], column: int | None) -> str:
    if column is None:
        return "train"
    return cells[column].strip()


def _split(table: Path, number: int, said: str) -> str:
    for split, names in SPLIT_NAMES.items():
        if said.casefold() in names:
            return split
    raise UserError(
        f"{table}, line {number}, column split: {said or 'nothing'} is not allowed; "
        "allowed: train, valid (or val, validation) and test"
    )


def _check_rows(table: Path, rows: list[Row]) -> None:
    """Raise UserError where the table has too few classes to train on."""
    trained = {row.label for row in rows if row.split == "train"}
    if len(trained) < 2:
        raise UserError(
            f"{table}: it has {len(rows)} pictures, and {len(trained)} labels in train; "
            "training needs at least two"
        )
    for row in rows:
        if row.label not in trained:
            raise UserError(
                f"{table}, line {row.line}, column label: train has no class {row.label}; "
                "add such pictures to train too, or remove the line"
            )
