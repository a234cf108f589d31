"""The run report: what the page says, that it needs nothing else, and that a browser shows it
without complaint.
"""

import base64
import dataclasses
import hashlib
import itertools
import math
import re
import resource
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import PROJECT
from trainer.images.care import Finding, Findings, Picture
from trainer.results import calibrate
from trainer.results.charts import reliability_chart
from trainer.results.intervals import wilson_interval
from trainer.results.report import Other, Report, write
from trainer.results.text import percent

VOID = {"meta", "img", "input", "wbr"}
HIDDEN = {"style", "script"}
HOSTILE = [
    '"><script>alert(1)</script>',
    "a' onload='x",
    "Straße & 猫 \u202e",
    "x" * 255,
    "{{ 7 * 7 }}",
]
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Page(HTMLParser):
    """A page, read; raises AssertionError where its tags don't nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # the innermost element's name, its text
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(data for tag, data in self.texts if tag not in HIDDEN))

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def epoch(number: int, **values: float) -> dict[str, float]:
    row = {
        "epoch": number,
        "step": number * 10,
        "lr": 1e-3,
        "train_loss": 2 / number,
        "train_top1": 0.5,
    }
    row |= {"valid_loss": 2.5 / number, "valid_top1": 0.6, "valid_top5": 0.9, "valid_f1": 0.55}
    return row | {"seconds": 10.0, "data_wait": 1.0, "evaluate_seconds": 2.0} | values


def report(
    classes: list[str],
    labels: list[int],
    predictions: list[int],
    epochs: int = 3,
    confidences: list[float] | None = None,
) -> Report:
    """A report whose picture `i` of class labels[i] was taken for predictions[i], with the given
    confidence or 0.9.
    """
    confidence = np.array(confidences or [0.9] * len(labels), dtype=np.float32)[:, None]
    chosen = np.eye(len(classes), dtype=bool)[predictions]
    return Report(
        title="run-1",
        split="test",
        history=[epoch(number) for number in range(1, epochs + 1)],
        best_epoch=epochs,
        metrics={
            "loss": 0.5,
            "top1": float(np.mean(np.equal(labels, predictions))),
            "top5": 1.0,
            "f1": 0.5,
        },
        classes=classes,
        labels=np.array(labels),
        probabilities=np.where(chosen, confidence, (1 - confidence) / (len(classes) - 1)),
        paths=[f"test/{index}.jpg" for index in range(len(labels))],
        broken=[("train/a/torn.jpg", "image file is truncated")],
        facts={"torch": "2.9.0"},
        config={"optim.lr": 0.001, "model.weights": None},
        next_steps=["python -m trainer --help"],
    )


def random_report(classes: list[str], pictures: int, epochs: int = 3) -> Report:
    generator = np.random.default_rng(0)
    labels = generator.integers(len(classes), size=pictures)
    predictions = np.where(
        generator.random(pictures) < 0.5, labels, generator.integers(len(classes), size=pictures)
    )
    predictions[0] = (labels[0] + 1) % len(classes)  # one mistake at least
    return report(classes, labels.tolist(), predictions.tolist(), epochs)


def thumbnail(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise, which compresses worst."""
    return np.random.default_rng(len(path)).integers(256, size=(224, 224, 3), dtype=np.uint8)


# What a page may refer to: pictures and a table in itself.
OWN = ("data:image/png;base64,", "data:image/jpeg;base64,", "data:text/csv;base64,", "#")


def check_script(page: Page) -> None:
    """The one script is ours, and the policy knows it alone."""
    scripts = [data for tag, data in page.texts if tag == "script"]
    ours = (PROJECT / "trainer/results/report.js.j2").read_text()
    assert scripts == [ours]
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    digest = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
    (policy,) = (
        attributes["content"]
        for attributes in page.attributes("meta")
        if "http-equiv" in attributes
    )
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "default-src 'none'" in policy


def gone(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    raise FileNotFoundError(path)


def written(subject: Report, directory: Path, **arguments: Any) -> Page:
    path = directory / "report.html"
    write(subject, path, **({"thumbnail": thumbnail} | arguments))
    return Page(path.read_text(encoding="utf-8"))


def test_page_shows_what_was_noticed_about_the_pictures(tmp_path: Path) -> None:
    hostile = Picture(HOSTILE[0], "train", HOSTILE[2])
    copies = [Finding("copy", (hostile, Picture("b.jpg", "train", "b"))) for _ in range(30)]
    leak = Finding("leak", tuple(hostile for _ in range(9)), "nearly the same")
    uneven = Finding("uneven", (), "train has 90 of class a and 3 of class b")
    subject = dataclasses.replace(
        report(["a", "b"], [0, 1], [0, 0]),
        findings=Findings([*copies, leak, uneven]),
        other=Other("without_leaks", 1, {"loss": 1.0, "top1": 1.0, "top5": 1.0, "f1": 1.0}),
    )
    page = written(subject, tmp_path)
    for said in (
        "Without the pictures that are in train too : 100% of 1",
        "In train, and in valid or test too 1",
        "and 5 more",  # of one leak
        "and 18 more, in care.csv",  # of the copies
        "train has 90 of class a and 3 of class b",
    ):
        assert said.replace(" :", ":") in page.text, said
    check_script(page)
    plain = written(report(["a", "b"], [0, 1], [0, 0]), tmp_path)
    assert "care.csv" not in plain.text and "in train too" not in plain.text
    assert "can't be read" in written(subject, tmp_path, thumbnail=gone).text


@pytest.mark.parametrize(
    ("classes", "pictures", "epochs"),
    [(2, 2, 1), (10, 200, 12), (37, 1000, 20), (133, 50_000, 500), (1000, 5000, 3)],
    ids=lambda size: str(size),
)
def test_page_holds_everything_and_needs_nothing_else(
    tmp_path: Path, classes: int, pictures: int, epochs: int
) -> None:
    page = written(
        random_report(
            [f"{index:03d}.Some_long_breed_name_{index}" for index in range(classes)],
            pictures,
            epochs,
        ),
        tmp_path,
    )
    assert (tmp_path / "report.html").stat().st_size < 3e6
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href"):
                assert value.startswith(OWN), (tag, name)
            else:
                assert "//" not in value.replace("+//", ""), (tag, name)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    check_script(page)
    style = "".join(data for tag, data in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    for heading in (
        "Loss",
        "Accuracy",
        "Learning rate",
        "Time per epoch",
        "Most confused pairs",
        "Worst mistakes",
        "Confusion matrix",
    ):
        assert ("h3", heading) in page.texts
    for said in (
        "Class by class",
        "optim.lr",
        "torch",
        "torn.jpg",
        "python -m trainer --help",
        f"{pictures:,} pictures right",
    ):
        assert said in page.text


def test_page_is_accessible(tmp_path: Path) -> None:
    page = written(random_report(["a", "b", "c"], 50), tmp_path)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert all(attributes["alt"] for attributes in page.attributes("img"))
    assert all(attributes["scope"] in ("row", "col") for attributes in page.attributes("th"))
    assert all(
        attributes["aria-label"]
        for attributes in page.attributes("svg")
        if attributes.get("role") == "img"
    )
    assert (
        sum(attributes.get("role") == "img" for attributes in page.attributes("svg")) == 7
    )  # four charts, the score, the time, the matrix


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_text(tmp_path: Path, name: str) -> None:
    subject = dataclasses.replace(
        report([name, "b"], [0, 1, 0], [1, 0, 0]),
        title=name,
        paths=[name] * 3,
        facts={name: name},
        config={name: name},
    )
    page = written(dataclasses.replace(subject, broken=[(name, name)], next_steps=[name]), tmp_path)
    check_script(page)
    assert not any(
        attribute.startswith("on") for _, attributes in page.tags for attribute in attributes
    )
    assert name in "".join(data for _, data in page.texts)
    assert any(
        (name if len(name) <= 80 else name[:79] + "…") in attributes["alt"]
        for attributes in page.attributes("img")
    )


def test_file_name_that_is_no_utf8_is_shown_escaped(tmp_path: Path) -> None:
    subject = dataclasses.replace(report(["a", "b"], [0], [1]), paths=["test/\udcff.jpg"])
    assert r"\udcff.jpg" in written(subject, tmp_path).text


# R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine
# 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_ones(
    hits: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_headline_is_the_accuracy_with_its_interval(tmp_path: Path) -> None:
    page = written(report(["a", "b"], [0] * 10, [0] * 9 + [1]), tmp_path)
    assert "90.0%test top-1" in page.text
    assert "9 of 10 pictures right. 95% interval 59.6% to 98.2%; guessing gives 50.0%." in page.text
    assert "Top-5" not in page.text  # of two classes it says nothing


def test_valid_split_is_said_to_flatter(tmp_path: Path) -> None:
    assert (
        "no test split"
        in written(dataclasses.replace(report(["a", "b"], [0], [0]), split="valid"), tmp_path).text
    )


def test_most_confused_pairs_come_first_and_among_equals_the_larger_share(tmp_path: Path) -> None:
    labels, predictions = (
        [0] * 10 + [1] * 4 + [2] * 4,
        [1, 1, 1] + [0] * 7 + [2, 2, 1, 1] + [0, 0, 2, 2],
    )
    page = written(report(["ant", "bee", "cat"], [*labels, 0], [*predictions, 2]), tmp_path)
    pairs = re.findall(r"(\w+) taken for (\w+) (\d+) of (\d+) pictures", page.text)
    assert pairs == [
        ("ant", "bee", "3", "11"),
        ("bee", "cat", "2", "4"),
        ("cat", "ant", "2", "4"),
    ]  # and not ant for cat, which was so once

    page = written(report(["ant", "bee"], [0, 1], [1, 1]), tmp_path)
    assert "No two classes were confused more than once." in page.text


def test_worst_mistakes_are_the_surest_ones(tmp_path: Path) -> None:
    count = 20
    page = written(
        report(
            ["a", "b"],
            [0] * count,
            [1] * (count - 1) + [0],
            confidences=[0.6 + index / 100 for index in range(count)],
        ),
        tmp_path,
    )
    files = [
        attributes["title"]
        for tag, attributes in page.tags
        if tag == "div" and "title" in attributes
    ]
    assert files == [f"test/{index}.jpg" for index in range(count - 2, count - 14, -1)]


def test_classes_are_listed_with_their_counts_least_accurate_first(tmp_path: Path) -> None:
    page = written(
        report(["ant", "bee", "cat", "dog"], [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 1, 1]), tmp_path
    )
    table = page.text[
        page.text.index("Class by class") : page.text.index(
            "Details", page.text.index("Class by class")
        )
    ]
    rows = re.findall(r"(ant|bee|cat|dog) (\d of \d) ([\d.]+%|n/a) ([\d.]+%|n/a)", table)
    assert rows == [
        ("cat", "0 of 2", "0%", "0%"),
        ("bee", "1 of 2", "50.0%", "33.3%"),
        ("ant", "2 of 2", "100%", "100%"),
        ("dog", "0 of 0", "n/a", "n/a"),
    ]


def test_run_without_a_mistake_says_so(tmp_path: Path) -> None:
    page = written(report(["a", "b"], [0, 1], [0, 1]), tmp_path, thumbnail=gone)
    assert "It makes no mistake on these 2 pictures." in page.text
    assert "Most confused pairs" not in page.text


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError])
def test_picture_that_has_vanished_is_left_out(tmp_path: Path, error: type[Exception]) -> None:
    def partly(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if path == "test/0.jpg":
            raise error(path)
        return thumbnail(path)

    page = written(report(["a", "b"], [0, 0, 0], [1, 1, 1]), tmp_path, thumbnail=partly)
    assert {attributes["title"] for attributes in page.attributes("img")} == {
        "test/1.jpg",
        "test/2.jpg",
    }
    assert "3 of 3 pictures" in page.text  # counted all the same


def test_all_pictures_vanished_is_said(tmp_path: Path) -> None:
    page = written(report(["a", "b"], [0], [1]), tmp_path, thumbnail=gone)
    assert not page.attributes("img")
    assert "could no longer be read" in page.text


def broken_history() -> list[dict[str, float]]:
    """A run that diverges, with values that are NaN, infinite, huge or missing."""
    nothing: dict[str, float] = {"epoch": 6, "step": 60}
    bad = [
        {"train_loss": math.nan},
        {"valid_loss": math.inf, "lr": 0.0},
        {"train_loss": 1.7e308},
        {"valid_top1": -math.inf, "seconds": math.nan},
    ]
    return (
        [epoch(1)]
        + [epoch(number, **values) for number, values in enumerate(bad, start=2)]
        + [nothing]
    )


@pytest.mark.parametrize(
    "history", [broken_history(), [{"epoch": 1.0}], []], ids=["diverged", "no values", "no epoch"]
)
def test_history_with_missing_values_is_drawn_where_it_is_known(
    tmp_path: Path, history: list[dict[str, float]]
) -> None:
    page = written(
        dataclasses.replace(report(["a", "b"], [0, 1], [1, 0]), history=history, best_epoch=1),
        tmp_path,
    )
    for tag, attributes in page.tags:
        for name in ("d", "x", "y", "x1", "y1", "cx", "cy", "width"):
            assert not re.search("nan|inf", attributes.get(name, ""), re.IGNORECASE), (tag, name)
    assert ("h3", "Loss") in page.texts or not history


def test_curves_stay_inside_their_plots(tmp_path: Path) -> None:
    page = written(random_report(["a", "b"], 10, epochs=40), tmp_path)
    curves = [
        attributes["d"]
        for attributes in page.attributes("path")
        if "curve" in attributes.get("class", "")
    ]
    assert len(curves) == 7
    assert all(
        0 <= float(number) <= 1 for curve in curves for number in re.findall(r"[-\d.]+", curve)
    )


def test_loss_and_learning_rate_are_drawn_from_zero(tmp_path: Path) -> None:
    page = written(report(["a", "b"], [0], [0]), tmp_path)
    assert [text for tag, text in page.texts if tag == "text"].count("0") == 2


def test_long_runs_and_lists_are_thinned(tmp_path: Path) -> None:
    classes = [f"{index:02d}" for index in range(60)]
    subject = dataclasses.replace(
        random_report(classes, 20_000, epochs=1200),
        broken=[(f"{index}.jpg", "torn") for index in range(1200)],
    )
    page = written(subject, tmp_path)
    assert (
        sum(attributes.get("class") == "readout" for attributes in page.attributes("g")) == 4 * 120
    )
    assert sum(attributes.get("class") == "cell" for attributes in page.attributes("rect")) == 1500
    assert "1200, 200 of them shown" in page.text
    assert "and 200 more" in page.text


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write(report(["a", "b"], [0], [0]), tmp_path / "report.html", thumbnail)
    before = (tmp_path / "report.html").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, hard)
    )  # as on a full disk: the write fails midway
    try:
        with pytest.raises(OSError):
            write(report(["c", "d"], [0], [0]), tmp_path / "report.html", thumbnail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_target_that_is_a_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        write(report(["a", "b"], [0], [0]), tmp_path / "report.html", thumbnail)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


MEASURE = """<!doctype html><title>wait</title>
<iframe src="report.html" style="width: 390px"></iframe>
<iframe src="report.html" style="width: 1280px"></iframe>
<script>onload = () => document.title = [...document.querySelectorAll("iframe")].map((frame) => {
  const page = frame.contentDocument
  page.querySelectorAll("details").forEach(details => details.open = true);
  const overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const field = page.querySelector(".filter input");
  const shown = (words) => {
    field.value = words;
    field.dispatchEvent(new Event("input"));
    return page.querySelectorAll(".filterable tbody tr:not([hidden])").length;
  };
  const rows = page.querySelectorAll(".filterable tbody tr").length;
  const first = page.querySelector(".filterable tbody th").textContent;
  const found = shown(first) > 0 && shown("no such words") === 0 && shown("") === rows;
  return `${overflow} ${found}`;
}).join(" ");</script>"""

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
]


def test_the_time_of_its_pictures_is_in_its_wall_time(tmp_path):
    spent = 60.0

    def slow(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        nonlocal spent
        spent += 1
        return thumbnail(path)

    subject = dataclasses.replace(
        report(["a", "b"], [0, 0, 0], [1, 1, 1]), stages=lambda: {"report": spent}
    )
    page = written(subject, tmp_path, thumbnail=slow)
    assert spent > 60
    assert f"together 1 min {spent - 60:.0f} s" in page.text


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    "classes",
    [
        HOSTILE,
        ["a", "b"],
        [f"{'long_' * 10}{index}" for index in range(40)],
        [f"{index:03d}" for index in range(133)],
    ],
    ids=["hostile", "2", "40 long", "133"],
)
def test_browser_shows_the_page_without_complaint_or_sideways_scrolling(
    tmp_path: Path, classes: list[str]
) -> None:
    subject = dataclasses.replace(
        random_report(classes, 300),
        history=broken_history(),
        best_epoch=1,
        title="t" * 200,
        facts={"k" * 99: "v" * 999},
    )
    write(subject, tmp_path / "report.html", thumbnail)
    (tmp_path / "measure.html").write_text(MEASURE)
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        (tmp_path / "measure.html").as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert re.findall("<title>(.*?)</title>", shown.stdout) == ["0 true 0 true"]
    assert not [line for line in shown.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_shows_how_sure_the_network_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 2)), rng.integers(0, 2, 200)
    calibration, _ = calibrate.fit(logits, labels, rng.random(200))
    quality = calibrate.measure(calibration, "test", logits, labels, rng.random(200))
    noted = dataclasses.replace(quality, notes=["a <word> of it"])
    page = written(dataclasses.replace(report(["a", "b"], [0, 1], [0, 0]), quality=noted), tmp_path)
    for said in (
        "How sure it is",
        "fitted on 200 pictures outside the training set",
        "Note: a <word> of it.",
        percent(quality.error_before),
        "target: 90%",
        "Unlike the training pictures",
    ):
        assert said in page.text, said
    labels_of_plots = [svg.get("aria-label", "") for svg in page.attributes("svg")]
    assert any(
        label.startswith("Right answers by their probability by probability, before ")
        for label in labels_of_plots
    )
    points = [each for each in page.attributes("circle") if each["class"] == "blue"]
    assert len(points) >= len(quality.after)
    assert "How sure" not in written(report(["a", "b"], [0, 1], [0, 0]), tmp_path).text


def test_the_reliability_chart_stands_on_its_diagonal_where_all_is_as_it_should_be() -> None:
    bins = [calibrate.Bin(10, share, share) for share in (0.1, 0.5, 0.9)]
    chart = reliability_chart(bins, bins, percent)
    assert all(x == pytest.approx(1 - y) for line in chart.lines for x, y in line.dots)
    assert [line.radii for line in chart.lines] == [(), [9, 9, 9], [9, 9, 9]]
    assert [line.best for line in chart.lines] == ["", "0%", "0%"]
    assert [readout.left * calibrate.BINS for readout in chart.readouts] == pytest.approx(
        [1, 7, 13]
    )
    assert "before 50.0% probable, 50.0% right, 10x" in chart.readouts[1].text
