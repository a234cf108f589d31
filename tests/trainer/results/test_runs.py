"""The runs so far in a table, and whether one is better than another."""

import fcntl
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.trainer.results.test_report import CHROMIUM, FLAGS, Page
from trainer import runs as command
from trainer.common import text as words
from trainer.common.errors import UserError
from trainer.results import predecessor, runs
from trainer.results.runs import Comparison
from trainer.settings.config import data_name
from trainer.training.run import _signed


@pytest.fixture
def make(tmp_path, configure):
    """Writes what a run leaves: settings, metrics and, where it is complete, a result."""

    def make(name: str, *words: str, test: float | None = None, epochs: int = 2) -> Path:
        from omegaconf import OmegaConf

        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(OmegaConf.to_yaml(configure(*words)))
        rows = [{"epoch": each, "valid_top1": 0.5 + each / 10} for each in range(1, epochs + 1)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        torn = '[3]\n{"epoch": 3, "val'
        (path / "metrics.jsonl").write_text(text + torn)
        if test is not None:
            result = {"split": "test", "top1": test, "pictures": 200, "best_epoch": 1}
            result |= {"seconds": 71.0}
            digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
            (path / "result.json").write_text(json.dumps(result | {"sha256": digest}))
        return path

    return make


def test_the_table_tells_runs_apart(make, tmp_path):
    make("a", "data.root=/photos/dogs.zip", "model.name=resnet18", test=0.8)
    make("b", "data.root=/photos/dogs.zip", "model.name=resnet18", "optim.lr=0.01", test=0.9)
    make("c", "data.root=/photos/dogs.zip", "model.name=resnet18")
    head, *lines = runs.table(runs.find(tmp_path / "runs")).splitlines()
    by_name = {line.split("/runs/")[1].split()[0]: line for line in lines}
    assert head.split()[:5] == ["date", "data", "model", "valid", "test"]
    assert "dogs  resnet18  60.0%  80.0%  74 to 85" in by_name["a"]
    assert "1 min 11 s" in by_name["a"]
    assert "complete" in by_name["a"]
    assert by_name["b"].endswith("optim.lr=0.01")
    assert by_name["a"].endswith("/a")
    assert "stopped" in by_name["c"]
    assert " 70.0% " in by_name["c"]  # its best epoch so far
    head, *lines = runs.table(runs.find(tmp_path / "runs"), width=80).splitlines()
    assert head.split() == ["date", "valid", "test", "95%", "epochs", "time", "state"]
    assert lines.count("  differs by optim.lr=0.01") == 1 and len(lines) == 7
    assert f"  {tmp_path}/runs/a  dogs  resnet18" in lines
    assert all(len(line) <= 80 for line in (head, *lines) if str(tmp_path) not in line)


def test_a_run_that_a_process_has_is_running(make):
    path = make("a", "data.root=/photos")
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = runs.read(path)
    assert running is not None
    assert running.state == runs.RUNNING


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\0"])
def test_what_is_no_run_is_passed_over(tmp_path, text):
    path = tmp_path / "runs/x"
    path.mkdir(parents=True)
    assert runs.find(tmp_path / "runs") == []
    (path / "config.yaml").write_text(text)
    for name in ("metrics.jsonl", "result.json"):
        (path / name).write_text(text)
    runs.table(runs.find(tmp_path / "runs"))  # whatever it shows, it shows something


def test_a_missing_folder_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="there is no such folder; a first run makes it"):
        runs.find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "root", "name"),
    [
        ("folder", "/photos/my dogs.zip", "my-dogs"),
        ("folder", "/photos/Dogs.TAR.gz", "Dogs"),
        ("folder", "/photos/..", "folder"),
        ("folder", "/photos/äöü", "äöü"),
        ("pets", "/photos/dogs", "pets"),
    ],
)
def test_a_data_set_is_called_as_its_folder_is(source, root, name):
    assert data_name(source, root) == name


# --- two runs ---


# SciPy's binomtest(first, first + second).pvalue, 1.17.
P_VALUES = [
    (0, 0, 1.0),
    (1, 0, 1.0),
    (3, 9, 0.14599609375),
    (40, 40, 1.0),
    (5, 30, 2.2361520677804947e-05),
]


@pytest.mark.parametrize(("first", "second", "p"), P_VALUES)
def test_the_p_value_is_that_of_the_binomial_test(first, second, p):
    assert Comparison(10, first, second, 5).p == pytest.approx(p)
    assert Comparison(10, second, first, 5).p == pytest.approx(p)


def predicted(path: Path, hits: str) -> Path:
    """A run whose predictions are right (+) or wrong."""
    path.mkdir()
    rows = [f"{number}.jpg,{str(hit == '+').lower()}" for number, hit in enumerate(hits)]
    (path / "predictions.csv").write_text("\n".join(["path,correct", *rows, ""]))
    return path


def test_two_runs_are_compared_picture_by_picture(tmp_path):
    a, b = predicted(tmp_path / "a", "++--+-"), predicted(tmp_path / "b", "+-+++-")
    result = runs.compare(a, b)
    assert (result.both, result.first, result.second, result.neither) == (2, 1, 2, 1)
    assert command.told(a, b, result) == (
        f"{b} is better than {a} by 16.7 points: not distinguishable on 6 pictures "
        "(2 right that the other has wrong, 1 the other way round; p = 1)"
    )
    assert "equally good" in command.told(a, a, runs.compare(a, a))
    clear = Comparison(50, 30, 5, 15)
    assert (
        f"{a} is better than {b} by 25.0 points: chance alone rarely gives such a difference"
        in (command.told(a, b, clear))
    )


def test_runs_of_other_pictures_are_not_compared(tmp_path):
    a, b = predicted(tmp_path / "a", "++-"), predicted(tmp_path / "b", "++")
    with pytest.raises(UserError, match=r"different pictures \(3 and 2, 2 of them the same\)"):
        runs.compare(a, b)
    with pytest.raises(UserError, match=r"it has no predictions\.csv"):
        runs.compare(a, tmp_path)
    (b / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of a run's predictions"):
        runs.compare(a, b)


def test_the_page_sorts_runs_and_says_which_none_beats(make, tmp_path):
    for name, test, seconds in (("slow", 0.9, 100), ("quick", 0.8, 10), ("beaten", 0.7, 50)):
        path = make(name, "data.root=/photos/<dogs>", "model.name=resnet18", test=test)
        result = json.loads((path / "result.json").read_text()) | {"seconds": seconds}
        del result["sha256"]
        (path / "result.json").write_text(json.dumps(_signed(result)))
    make("other", "data.root=/photos/cats", "model.name=resnet18")
    (tmp_path / "runs/quick/report.html").touch()
    command.write_page(tmp_path / "runs")
    page = Page((tmp_path / "runs/index.html").read_text())
    circles = {each["class"] for each in page.attributes("circle")}
    dots = re.findall(
        r'class="(front|beaten)".*?<title>(\w+):', (tmp_path / "runs/index.html").read_text()
    )
    assert circles == {"front", "beaten"}
    assert set(dots) == {("front", "slow"), ("front", "quick"), ("beaten", "beaten")}
    links = [each["href"] for each in page.attributes("a")]
    assert links == ["quick/report.html"]
    assert "valid 60.0%" not in page.text and "90.0%" in page.text
    assert {each.get("aria-sort") for each in page.attributes("th")} == {None, "descending"}
    assert len([each for each in page.attributes("path") if "curve" in each["class"]]) == 4


def test_the_run_before_is_the_newest_on_the_same_pictures(make, tmp_path):
    first = make("first", "data.root=/photos/dogs", "model.name=resnet18", test=0.6)
    make("cats", "data.root=/photos/cats", "model.name=resnet18", test=0.9)
    now = make("now", "data.root=/photos/dogs", "model.name=resnet18", "optim.lr=0.01")
    config = dict(runs.read(now).settings)
    for path, right in ((first, "tttfff"), (now, "tttttf")):
        rows = "".join(
            f"{place},{'true' if each == 't' else 'false'}\n" for place, each in enumerate(right)
        )
        (path / "predictions.csv").write_text(f"path,correct\n{rows}")
    before = predecessor.find(now, "dogs", {key: config[key] for key in ("optim.lr", "seed")})
    assert before.name == "first" and before.summary.test == 0.6
    assert before.changed == [("optim.lr", "0.001", "0.01")] or before.changed[0][0] == "optim.lr"
    assert before.verdict.startswith("+33.3 points, not distinguishable on 6 pictures: 2 pictures")
    (now / "predictions.csv").write_text("path,correct\nother,true\n")
    assert predecessor.find(now, "dogs", config).verdict == ""
    assert predecessor.find(now, "birds", config) is None


MEASURE = """<!doctype html><title>wait</title>
<iframe src="index.html" style="width: 390px"></iframe>
<iframe src="index.html" style="width: 1280px"></iframe>
<script>onload = () => document.title = [...document.querySelectorAll("iframe")].map((frame) => {
  const page = frame.contentDocument;
  const table = page.querySelector("table.sortable");
  const sorted = () => {
    [...table.querySelectorAll("thead button")][4].click();
    return [...table.tBodies[0].rows].map((row) => row.cells[4].textContent).join(",");
  };
  const overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  return [overflow, sorted(), sorted()].join(" ");
}).join(" ");</script>"""


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_sorts_the_runs_without_complaint_or_sideways_scrolling(make, tmp_path):
    for name, test in (("a", 0.5), ("b", 0.9), ("c", None), ("d" * 120, 0.7)):
        make(name, "data.root=/photos/dogs", "model.name=resnet18", test=test)
    command.write_page(tmp_path / "runs")
    (tmp_path / "runs/measure.html").write_text(MEASURE)
    shown = subprocess.run(
        [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "runs/measure.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    falling, rising = "90.0%,70.0%,50.0%,", ",50.0%,70.0%,90.0%"
    one = f"0 {falling} {rising}"
    assert re.findall("<title>(.*?)</title>", shown.stdout) == [f"{one} {one}"]
    assert not [line for line in shown.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    ("amount", "told"),
    [(0, "$0.00"), (0.00001, "< $0.0001"), (0.00364, "$0.0036"), (0.0949, "$0.095"),
     (0.0999, "$0.10"), (0.526, "$0.53"), (1234.5, "$1,234.50")],
)  # fmt: skip
def test_dollars_as_people_write_them(amount, told):
    assert words.dollars(amount) == told
