"""`import packhorse`: one door to training and predicting, as the commands do it."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import packhorse
import PIL.Image
import pytest
from packhorse import fitting

from serving.__main__ import main as serving
from tests.conftest import PROJECT, QUICK, environment, refusal, share_exports
from tests.forked import Forked
from trainer.results.text import percent

SETTINGS = dict(word.split("=") for word in QUICK) | {"model": "small_cnn", "optim": {"lr": 0.01}}


@pytest.fixture(scope="module")
def forked():
    """Runs of this module's tests come from a fork: quicker, and with the tests' caches."""
    with pytest.MonkeyPatch.context() as patch:

        def child(command, *, env, stdout, **_):
            share_exports(Path.cwd(), command)
            return Forked(
                Path.cwd(),
                command[command.index("-m") + 1 :],
                env | environment(Path.cwd()),
                output=stdout,
            )

        patch.setattr(fitting.sessions, "Child", child)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))


@pytest.fixture(scope="module")
def run(pictures, forked, place):
    """A run that Ctrl-C stopped after its first epoch, and that went on."""
    read, pressed = fitting._read, []

    def interrupted(output):
        for part in read(output):
            yield part
            if "epoch=1 " in part and not pressed:
                pressed.append(True)
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(fitting, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packhorse.fit(pictures, name="first", **SETTINGS)
        return packhorse.fit(pictures, name="first", **SETTINGS)


def test_fit_returns_the_run_that_the_command_would_leave(run, place, there, pictures, capsys):
    assert run.directory == place / "runs/first"
    assert run.metrics == {name: run.result[name] for name in ("top1", "top5", "f1", "loss")}
    assert [row["epoch"] for row in run.history if "train_loss" in row] == [1, 2]
    assert run.report.is_file()
    assert percent(run.metrics["top1"]) in run._repr_html_()
    capsys.readouterr()
    assert packhorse.fit(pictures, name="first", **SETTINGS) == run
    assert "this run is complete" in capsys.readouterr().out


def test_a_model_says_what_predict_says(run, there, pictures, capsys):
    model = packhorse.Model.load(run.directory)
    assert model.metrics["test_top1"] == run.metrics["top1"]
    files = sorted((pictures / "test").rglob("*.png"))
    said = model.predict(files)
    assert serving(["predict", str(run.directory), str(pictures / "test"), "--csv", "-"]) == 0
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [
        (str(file), each.label) for file, each in zip(files, said, strict=True)
    ]
    opened = [PIL.Image.open(file) for file in files]
    assert model.predict(opened) == said
    assert model.predict(np.stack([np.asarray(image) for image in opened])) == said
    assert model.predict(iter(files[:1])) == model.predict(str(files[0])) == said[:1]
    assert model.predict([]) == []
    for shown in (model, said[0]):
        assert said[0].label in shown._repr_html_()


def test_a_picture_held_in_memory_is_seen_as_its_file_is(run):
    """Turned by its EXIF, in CMYK, grey: whatever the file would have shown."""
    model = packhorse.Model.load(run.package)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    for mode in ("RGB", "L", "CMYK", "P"):
        image = PIL.Image.fromarray(pixels).convert(mode)
        image.getexif()[0x0112] = 6
        file = io.BytesIO()
        image.save(file, "TIFF", exif=image.getexif())
        with PIL.Image.open(file) as read:
            path = Path(f"{run.directory}/{mode}.tiff")
            path.write_bytes(file.getvalue())
            assert model.predict(read)[0].probabilities == pytest.approx(
                model.predict(path)[0].probabilities, abs=1e-6
            )


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (np.zeros((2, 2, 3)), "picture 0: an array of float64 [2, 2, 3]; allowed: uint8 "),
        (np.zeros((2, 2, 4), np.uint8), "picture 0: an array of uint8 [2, 2, 4]; allowed: "),
        ([7], "picture 0: a int is no picture; allowed: a path, a Pillow picture or an array"),
        ("nowhere.jpg", "nowhere.jpg: there is no such file"),
        (Path(__file__), "test_packhorse.py: "),
    ],
)
def test_what_is_no_picture_is_one_line(run, image, line):
    with pytest.raises(packhorse.UserError) as error:
        packhorse.Model.load(run.package).predict(image)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"train": {"epoch": 3}}, "did you mean train.epochs"),
        ({"train.epochs": -1}, "train.epochs=-1 is not allowed"),
        ({"optim": "adam"}, "optim=adam"),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_starts(settings, line, there):
    with pytest.raises(packhorse.UserError) as error:
        packhorse.fit(**settings)
    assert line in str(error.value)


def test_what_the_training_refuses_is_the_exception_too(forked, there):
    with pytest.raises(packhorse.UserError, match=r"^data.root=nowhere: there is no such folder"):
        packhorse.fit("nowhere", model="small_cnn")


def test_ctrl_c_saves_and_the_same_call_goes_on(run):
    log = (run.directory / "log.txt").read_text()
    assert "stopped by SIGTERM" in log or "Interrupted: SIGTERM" in log
    assert log.count("resumed from") == 1


def test_where_bars_are_seen_the_training_has_a_terminal(monkeypatch):
    monkeypatch.setattr(fitting, "shows_bars", lambda stream: True)
    monkeypatch.setattr(
        fitting.sessions,
        "Child",
        lambda command, **options: subprocess.Popen(
            [sys.executable, "-c", "import sys; print(sys.stderr.isatty()); print('error: no')"],
            **options,
        ),
    )
    with pytest.raises(packhorse.UserError, match="exit code 0"):
        code, said = fitting._followed(*fitting._start([]))
        assert said == ["True", "error: no", ""]
        raise packhorse.UserError(f"exit code {code}")


def test_a_bug_of_ours_is_told_with_its_last_line():
    line = fitting._reason(1, ["Traceback", "KeyError: 'x'", ""], Path("runs/a"))
    assert line == "training ended with exit code 1 (KeyError: 'x'); runs/a/log.txt says more"


def test_to_import_it_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import packhorse, sys; print('torch' in sys.modules)"],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'launch/python'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


# --- the examples of docs/ ---

EXAMPLES = PROJECT / "docs/examples"


@pytest.fixture
def example(run, there, pictures, monkeypatch, capsys):
    """Runs a script of the docs on small pictures, in a run that is complete; returns its words."""
    asked = []

    def fit(root, **settings):
        asked.append(settings)
        return run

    def example(name, *words):
        monkeypatch.setattr(packhorse, "fit", fit)
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name))
        for settings in asked:
            assert refusal(*fitting._words(pictures, settings)) is None
        return capsys.readouterr().out

    return example


def test_each_example_has_a_test_and_is_a_screen_long():
    names = {path.name for path in EXAMPLES.iterdir()}
    assert names == {"first.py", "compare.py", "look.py"}
    assert all(len((EXAMPLES / name).read_text().splitlines()) <= 30 for name in names)


def test_the_example_that_trains_and_asks(example, run, pictures):
    said = example("first.py", pictures)
    assert f"accuracy {run.metrics['top1']:.1%}" in said
    assert said.count("epoch ") == 2 and said.count(".png: ") == 5


def test_the_example_that_compares(example, run, pictures):
    said = example("compare.py", pictures)
    assert said.count("learning rate ") == 3 and said.count("<- best") == 1
    assert str(run.package) in said


def test_the_example_that_sets_aside(example, run, pictures):
    said = example("look.py", run.directory, pictures / "test")
    count = len(list((pictures / "test").rglob("*.png")))
    sure = int(said.split(" of ")[0])
    assert f"{sure} of {count} are sure" in said
    assert len(Path("look.csv").read_text().splitlines()) == 1 + count - sure
