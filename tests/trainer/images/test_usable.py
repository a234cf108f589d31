"""What is left out is counted in one line and listed in full."""

import logging

import pytest

from trainer.common.console import log
from trainer.images.folder import ImageFolder
from trainer.images.names import LOOSE, OF_SYSTEM
from trainer.images.usable import report_left_out


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_all_that_is_left_out_is_one_line_and_a_list(tmp_path, said):
    broken = tuple((f"a/{number}.jpg", "the file is empty") for number in range(12))
    left_out = (("a/1.jxl", ".jxl"), ("a/2.jxl", ".jxl"), ("x.jpg", LOOSE), ("@eaDir", OF_SYSTEM))
    path = tmp_path / "quarantine.txt"
    report_left_out(ImageFolder((), {}, broken, left_out), path)
    assert path.read_text().splitlines() == [f"{a}\t{b}" for a, b in broken + left_out]
    *named, last = said()
    assert [line for _, line in named] == [f"left out: {a} ({b})" for a, b in broken[:10]]
    assert last == (
        "WARNING",
        "left out: 12 that can't be used, 2 .jxl, 1 loose (in no class folder), 1 hidden, or "
        f"made by an operating system; see {path}",
    )


def test_nobody_is_warned_of_what_systems_put_there(tmp_path, said):
    path = tmp_path / "quarantine.txt"
    report_left_out(ImageFolder((), {}, (), (("a/.DS_Store", OF_SYSTEM),)), path)
    assert said() == [("INFO", f"left out: 1 hidden, or made by an operating system; see {path}")]


def test_nothing_left_out_is_no_line_and_an_empty_list(tmp_path, said):
    report_left_out(ImageFolder((), {}, ()), tmp_path / "quarantine.txt")
    assert said() == [] and (tmp_path / "quarantine.txt").read_text() == ""
