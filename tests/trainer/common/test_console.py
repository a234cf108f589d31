"""What a person at a terminal sees of the log, and what a program does."""

import gc
import io
import logging
import re
import sys
import weakref
from contextlib import suppress
from types import ModuleType

import pytest

from trainer.common import console
from trainer.common.console import loading, log, painted
from trainer.common.stages import Stages
from trainer.settings import options
from trainer.training.epoch_table import EpochTable

ROW = {"train_loss": 1.5, "train_top1": 0.5, "valid_loss": 1.25, "valid_top1": 0.625}


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """Gives what is printed of some records. screen: whether to a terminal."""
    handlers, level = list(log.handlers), log.level

    def shown(level: int, screen: bool) -> str:
        log.handlers.clear()
        stream = Screen() if screen else io.StringIO()
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr(console.streams, "outlive", lambda expendable: None)
        console.to_terminal(shown=level)
        log.debug("a stage")
        log.info("metrics: epoch=1", extra={"for_people": "1/2  50%"})
        log.log(console.RESULT, "test accuracy")
        log.warning("look")
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    yield shown
    log.handlers[:] = handlers
    log.setLevel(level)


def test_a_terminal_shows_the_row_and_a_program_the_metric_line(shown):
    assert shown(console.USUAL, screen=False) == "metrics: epoch=1\ntest accuracy\nwarning: look\n"
    seen = shown(console.USUAL, screen=True)
    assert seen == "1/2  50%\ntest accuracy\n\033[33mwarning:\033[0m look\n"
    assert shown(console.QUIET, screen=False) == "test accuracy\nwarning: look\n"
    assert "a stage\nmetrics: epoch=1\n" in shown(console.VERBOSE, screen=True)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_refused(shown, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert "\033" not in shown(console.USUAL, screen=True)


def test_q_and_v_are_no_settings():
    assert options.shown(["a=1", "-q", "-m"]) == (console.QUIET, ["a=1", "-m"])
    assert options.shown(["--verbose"]) == (console.VERBOSE, [])
    assert options.shown(["a=1"]) == (console.USUAL, ["a=1"])


def test_the_table_marks_the_best_and_says_what_is_left():
    table, rows = EpochTable(4), []
    lines = []
    for number, best in ((1, True), (2, False), (3, True)):
        rows.append(ROW | {"epoch": number, "seconds": 2.0 * number})
        lines += table.row(rows, best, after=30.0).splitlines()
    mark, head, *lines = lines
    assert mark == "* the best so far"
    assert head.split()[0] == "epoch" and "left, about" in head
    assert [line.endswith(" *") for line in lines] == [True, False, True]
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4"]
    assert "50.0%" in lines[0] and "62.5%" in lines[0]
    # 3 epochs of 2 s, and then the rest of the run; 2 of 3 s; 1 of 4 s
    left = [re.search(r"(\d+) s(?: \*)?$", line) for line in lines]
    assert [int(each[1]) for each in left if each] == [36, 36, 34]
    solved = EpochTable(0).row([{"epoch": 0, "valid_top1": 0.5}], best=True, after=0.0)
    assert "head" in solved


@pytest.mark.parametrize(("seconds", "told"), [(9.0, "9.0 s"), (90, "1:30"), (3690, "1:01:30")])
def test_a_row_fits_a_terminal_of_80_columns(seconds, told):
    row = {"epoch": 100, "train_loss": 0.000123, "train_top1": 1.0, "valid_loss": 1.23e-5}
    row |= {"valid_top1": 1.0, "valid_top5": 1.0, "valid_f1": 1.0, "seconds": seconds}
    lines = EpochTable(120).row([row], best=True, after=seconds).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split()[:8] == [
        "100/120", "0.000123", "100.0%", "1.23e-05", "100.0%", "100.0%", "100.0%", told.split()[0],
    ]  # fmt: skip


def test_the_head_alone_tells_no_time_that_nobody_knows():
    assert "nan" not in EpochTable(3).row([{"epoch": 0, "valid_f1": float("nan")}], True, 9.0)


def test_stages_add_up_and_what_is_within_one_is_its(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("trainer.common.stages.time.monotonic", lambda: clock[0])

    def passes(seconds: float) -> None:
        clock[0] += seconds

    stages = Stages(before=2.0)
    passes(1)
    with stages.of("recipe"):
        passes(3)
        with stages.of("features"):  # for the decision
            passes(4)
    with stages.of("features"):
        passes(5)
    with pytest.raises(ValueError, match="torn"), stages.of("training"):
        passes(6)
        raise ValueError("torn")
    passes(1)
    assert stages.seconds() == {"start": 4, "recipe": 7, "features": 5, "training": 6}


def test_work_in_one_piece_gives_signs_without_a_terminal_too(shown, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    monkeypatch.setattr(console, "TICK", 0.001)
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(log, "handle", said.append)
    log.setLevel(logging.INFO)
    with console.ProgressBar("packing", 1), console.ProgressBar("within", 1):
        while not said:
            pass
    assert said[0].getMessage() == "packing: 0 s"


def test_painted_is_plain_where_nobody_looks():
    assert painted("text", "red") == "text"


def test_a_log_that_cannot_be_opened_is_named_and_leaves_nothing_to_close(tmp_path):
    path = tmp_path / "log.txt"
    path.symlink_to("/proc/self/mem")  # its end can't be found, and Python names no file
    known = len(logging._handlerList)  # what logging closes at the process's end
    with pytest.raises(OSError, match=r"log\.txt") as raised, console.also_to_file(path):
        pass
    assert len(logging._handlerList) == known, raised


def test_a_bar_counts_what_is_done_and_says_the_time_that_is_left(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(log, "handlers", [])
    with console.ProgressBar("packing pictures", 3000) as bar:
        bar.advance(1200)
        assert bar._bar is not None
        bar._bar.refresh()
    shown = screen.getvalue().split("\r")
    assert any("packing pictures  40% |" in each and "1200 of 3000, " in each for each in shown)
    assert any(each.rstrip().endswith(" left") for each in shown)
    assert "it/s" not in screen.getvalue()


def test_the_time_that_is_left_is_by_the_mean_rate(monkeypatch):
    """A sweep looks often, and seldom is a trial done."""
    screen, now = Screen(), [0]
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(console, "TICK", 3600.0)
    with console.ProgressBar("trials", 2) as bar:
        assert bar._bar is not None
        monkeypatch.setattr(bar._bar, "_time", lambda: now[0])
        bar._bar.start_t = bar._bar.last_print_t = 0.0
        for second in range(1, 61):
            now[0] = second
            bar.advance(second // 60)
    assert "1 of 2, 01:00, 01:00 left" in screen.getvalue()


def test_a_shown_command_names_python_as_the_activated_environment_does(tmp_path, monkeypatch):
    for name in ("python", "python3"):
        (tmp_path / name).symlink_to("/usr/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python3"))
    assert console.command("trainer", "name=a b") == "python -m trainer 'name=a b'"
    monkeypatch.setattr("sys.executable", "/opt/other/bin/python3")
    assert console.command("trainer").split()[0] == "/opt/other/bin/python3"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("collects", [False, True])
def test_the_collector_rests_while_modules_are_imported(monkeypatch, fails, collects):
    made_up = ModuleType("made_up")

    class Circle:
        def __init__(self) -> None:
            self.itself = self

    before = gc.isenabled()
    gc.unfreeze()
    (gc.enable if collects else gc.disable)()
    try:
        with loading():
            pass
        assert gc.get_freeze_count() == 0  # nothing was imported: trials of a sweep come here too
        with suppress(ImportError), loading():
            assert not gc.isenabled()
            monkeypatch.setitem(sys.modules, "made_up", made_up)
            if fails:
                raise ImportError
        assert gc.isenabled() is collects
        frozen = gc.get_freeze_count()
        assert frozen > 0  # what is there is not looked at again
        thrown_away = Circle()
        gone = weakref.ref(thrown_away)
        del thrown_away
        with loading():
            monkeypatch.setitem(sys.modules, "made_up_too", made_up)
        assert gone() is None
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
