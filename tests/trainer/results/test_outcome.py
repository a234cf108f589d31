"""What a run makes of its best weights, from the pictures to a served answer."""

import json
import tarfile

import numpy as np
import pytest
import yaml

from serving.package import load
from tests.conftest import QUICK, make_pictures, run_trainer
from tests.trainer.results.test_report import Page
from trainer.results import calibrate

WORDS = (*QUICK, "data=folder", "model=small_cnn", "optim.lr=1e-3")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), {"train": 4, "valid": 12, "test": 10})


@pytest.fixture(scope="module", params=["all of it", "the head alone"])
def run(root, request, tmp_path_factory):
    """A run of the whole network, and one by the cached features of a frozen backbone."""
    place = tmp_path_factory.mktemp("run")
    more = ["model.freeze=backbone"] if request.param == "the head alone" else []
    code, output = run_trainer(place, *WORDS, f"data.root={root}", "name=run", *more)
    assert code == 0, output
    return place / "runs/run", output


def scores_of(package, root, split):
    paths = sorted((root / split).glob("*/*.png"))
    labels = [package.classes.index(path.parent.name) for path in paths]
    return package.network(np.stack([package.prepare(path) for path in paths])), np.array(labels)


def test_the_package_has_the_calibration_of_its_own_logits_on_valid(run, root):
    directory, output = run
    package = load(directory / "model.tar.gz", threads=1)
    valid, labels = scores_of(package, root, "valid")
    fitted, _ = calibrate.fit(valid.logits, labels, valid.distance)
    given = package.calibration
    assert given.pictures == 36
    for name in ("temperature", "least_probability", "farthest"):
        assert getattr(given, name) == pytest.approx(getattr(fitted, name), rel=1e-3, abs=1e-5)

    test, labels = scores_of(package, root, "test")
    quality = calibrate.measure(given, "test", test.logits, labels, test.distance)
    told = json.loads((directory / "result.json").read_text())["calibration"]
    assert told == {
        name: value if value is None else pytest.approx(value, abs=1e-3)
        for name, value in quality.facts().items()
    }
    assert output.count("calibration: temperature ") == 1
    assert quality.line().split("; calibration error")[0] in output
    assert "How sure it is" in (directory / "report.html").read_text()


def test_the_package_has_a_card_that_says_what_the_result_says(run):
    directory, _ = run
    result = json.loads((directory / "result.json").read_text())
    with tarfile.open(directory / "model.tar.gz") as archive:
        manifest = json.load(archive.extractfile("package.json"))
        card = archive.extractfile("README.md").read().decode()
    assert "README.md" in manifest["files"]
    fields = yaml.safe_load(card.split("---\n")[1])
    [figures] = fields["model-index"][0]["results"]
    assert [each["value"] for each in figures["metrics"]] == [result["top1"], result["f1"]]
    assert "12 train, 36 valid, 30 test pictures" in card
    assert "trained from scratch" in card


def test_the_report_says_what_the_run_was_and_its_times_add_up(run):
    directory, _ = run
    result = json.loads((directory / "result.json").read_text())
    assert sum(result["stages"].values()) == pytest.approx(result["seconds"], abs=0.01)
    assert {"start", "scan", "training", "test", "package", "report"} <= result["stages"].keys()
    page = Page((directory / "report.html").read_text())
    told = page.attributes("svg")
    (wall,) = (each["aria-label"] for each in told if "Wall" in each.get("aria-label", ""))
    shown = [each.partition(" ")[0] for each in wall.removeprefix("Wall time: ").split(", ")]
    lasted = [name for name, spent in result["stages"].items() if spent >= 0.05]
    # While the report is written it can't say how long that took.
    assert {*shown} | {"report"} == {*lasted, "report"}
    for said in (
        "small_cnn, 0.2 million parameters, weights from scratch",
        ": 12 train, 36 valid, 30 test pictures, 3 classes",
        "What was set",
        "optim.lr 0.001",
        "few pictures: 4 of a typical class",
        "What the network saw",
        "all classes123630",
    ):
        assert said in page.text, said
    wrong = result["pictures"] - round(result["top1"] * result["pictures"])
    if wrong:
        lit = [each for each in page.attributes("img") if each["alt"].startswith("In the light")]
        assert lit and "Save them as CSV" in page.text
