"""`python -m serving evaluate`: a model on labelled pictures that no run knows."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from serving.__main__ import main
from trainer.common.errors import MISTAKE, OK
from trainer.images import identity
from trainer.results.calibrate import Calibration
from trainer.results.prediction import predictions


@pytest.fixture
def photos(original, tmp_path) -> Path:
    """Pictures of two of the model's three classes, of one that it hasn't, and loose ones."""
    root = tmp_path / "photos"
    files = sorted((original / "pictures").iterdir())
    for name in ("hen", "café", "wolf"):
        (root / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, root / name)
    (root / "hen/broken.jpg").write_bytes(b"\xff\xd8\xff torn")
    shutil.copy(files[0], root)
    return root


@pytest.fixture
def asked(original, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def asked(*words: object) -> tuple[int, str, str]:
        code = main(["evaluate", str(original), *map(str, words)])
        return code, *capsys.readouterr()

    return asked


def test_the_figures_are_those_of_its_answers(asked, photos, engine):
    code, out, err = asked(photos)
    assert (code, err) == (OK, "")
    assert "left out: 1 loose (in no class folder)" in out
    assert "classes that the model doesn't know: wolf, 3 pictures" in out
    assert "no pictures of 1 of its classes: dog" in out
    rows = list(csv.DictReader(Path("evaluation/predictions.csv").read_text().splitlines()))
    assert [(Path(row["path"]).parent.name, row["true_label"]) for row in rows] == [
        *[("café", "café")] * 3,
        *[("hen", "hen")] * 3,
    ]
    for row in rows:
        [logits] = engine.package.predict(engine.package.prepare(row["path"])[None])
        assert row["label"] == engine.package.classes[int(logits.argmax())]
        assert row["correct"] == str(row["label"] == row["true_label"]).lower()
    result = json.loads(Path("evaluation/result.json").read_text())
    assert result["top1"] == pytest.approx(np.mean([row["correct"] == "true" for row in rows]))
    assert (result["pictures"], result["broken"]) == (6, 1)
    assert (result["model"], result["data"]) == (engine.package.digest, str(photos))
    page = Path("evaluation/report.html").read_text()
    assert "broken.jpg" in page
    assert "Confusion matrix" in page
    assert "How training went" not in page
    assert "-m trainer data.root=DIR model.weights=" in out
    (photos.parent / "train").mkdir()  # now it is a part of a data set
    assert f"-m trainer data.root={photos.parent} model.weights=" in asked(photos)[1]


def test_a_split_or_a_table_is_evaluated_too(asked, photos, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(photos / "hen", root / "Testing/hen")
    shutil.copytree(photos / "café", root / "train/café")
    code, out, _ = asked(root)
    assert code == OK
    assert f"pictures of {root}/Testing" in out
    assert "3 pictures" in out
    assert "pictures of" in asked(root, "--split", "train")[1]
    assert (
        "there is no folder for valid; there is: test, train" in asked(root, "--split", "valid")[2]
    )
    labels = tmp_path / "labels.csv"
    names = sorted(path.name for path in (photos / "hen").iterdir() if path.stem != "broken")
    lines = [f"wolf/{names[0]},hen,train", f"wolf/{names[1]},dog,test", f"hen/{names[0]},hen,test"]
    labels.write_text("\n".join(["path,label,split", *lines]))
    assert "3 pictures\n" in asked(photos, "--labels", labels)[1]
    assert "2 pictures\n" in asked(photos, "--labels", labels, "--split", "test")[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["Dogs"], "Dogs: no picture of a class that the model has (café, dog, hen)"),
        (["broken"], "broken: no picture can be read: broken/hen/1.jpg: "),
    ],
)
def test_a_mistake_is_one_line(asked, photos, words, line):
    shutil.copytree(photos / "wolf", "Dogs/DOG")
    Path("broken/hen").mkdir(parents=True)
    shutil.copy(photos / "hen/broken.jpg", "broken/hen/1.jpg")
    code, _, err = asked(*words)
    assert code == MISTAKE
    assert err.startswith(line)
    assert len(err.splitlines()) == 1


def test_a_prediction_orders_the_classes_and_knows_when_it_is_sure():
    logits = np.log([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    calibration = Calibration(1.0, 100, 0.3, 0.5)
    sure, unsure = predictions(calibration, ("a", "b", "c"), logits, np.array([0.1, 0.2]))
    assert (sure.label, sure.members, sure.sure, sure.unlike) == ("a", ("a",), True, False)
    assert sure.probability == pytest.approx(0.7)
    assert (unsure.labels, unsure.members, unsure.sure) == (("a", "b", "c"), ("a", "b"), False)
    [far] = predictions(calibration, ("a", "b", "c"), logits[:1], np.array([0.9]))
    assert (far.sure, far.unlike) == (False, True)
    [plain] = predictions(Calibration(), ("a", "b", "c"), logits[:1], None)
    assert (plain.members, plain.sure, plain.unlike) == (None, None, None)


def test_pictures_that_the_model_has_seen_are_said(original, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(original / "model.tar.gz", tmp_path / "run")
    first, *_ = sorted((original / "pictures").iterdir())
    for split, said in (("train", "seen 2 of these 6 pictures"), ("valid", "seen 2 of these 6")):
        sample = split, "hen", identity.of_bytes(first.read_bytes()), f"{split}/hen/1.jpg"
        identity.note(tmp_path / "run/checkpoints" / identity.INDEX, [sample])
        assert main(["evaluate", str(tmp_path / "run"), str(photos)]) == OK
        assert said in capsys.readouterr().out, split
    sample = "test", *sample[1:]
    identity.note(tmp_path / "run/checkpoints" / identity.INDEX, [sample])
    assert main(["evaluate", str(tmp_path / "run"), str(photos)]) == OK
    assert "has seen" not in capsys.readouterr().out
