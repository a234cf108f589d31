"""A complete run keeps what its result.json promises, or makes it again, or says that it can't."""

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.training.test_damage import SETTINGS, delete_checkpoints, flip_a_bit, truncate
from trainer import __main__ as trainer
from trainer.common import files
from trainer.common.errors import UserError
from trainer.common.interrupt import Stop
from trainer.distributed.world import World
from trainer.results import early, package, runs
from trainer.training import complete
from trainer.training.run import TIMES, Run, open_run, read_result

RUN = Path("runs/run")
MADE = ("model.tar.gz", "report.html", "metrics.jsonl", "quarantine.txt", "predictions.csv")


@pytest.fixture
def train(monkeypatch, configure, pictures) -> Callable[..., list[Path]]:
    """A run as `python -m trainer` does it; returns the packages that it made.

    A package is its name alone: a real one takes seconds.
    """

    def build(network, contents, target, *, archive, temporary):
        made.append(target)
        place = target if archive else target / "package.json"
        place.parent.mkdir(exist_ok=True)
        files.write(place, f"a package, the {len(made)}th")

    made: list[Path] = []
    monkeypatch.setattr(early, "check_package", lambda *arguments: None)
    monkeypatch.setattr(package, "build", build)

    def train(directory: Path, *overrides: str) -> list[Path]:
        made.clear()
        monkeypatch.chdir(directory)
        words = (*SETTINGS, "train.epochs=1", f"data.root={pictures}", *overrides)
        trainer.train(configure(*words), World())
        return list(made)

    return train


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("complete")


@pytest.fixture
def cwd(tmp_path: Path, once: Path, train: Callable[..., list[Path]]) -> Path:
    """The directory of a complete run, of this test alone."""
    if not any(once.iterdir()):
        assert len(train(once)) == 1
    return shutil.copytree(once, tmp_path / "cwd")


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / RUN / name).read_bytes() for name in MADE}


def put_a_directory_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_what_is_there_is_not_made_again_and_what_is_not_is(cwd, train, caplog):
    caplog.set_level("INFO", "packhorse")
    whole, said = contents(cwd), read_result(cwd / RUN)
    assert said is not None and said["files"].keys() == {"package", *MADE[1:], "care.csv"}
    for name, harm in zip(MADE, (Path.unlink, truncate, empty, Path.unlink, truncate), strict=True):
        harm(cwd / RUN / name)
        # Only a damaged package is built again: an equal one would have another date.
        assert len(train(cwd)) == (name == "model.tar.gz"), name
        assert f"{name} " in caplog.text and "rebuilding it from the checkpoints" in caplog.text
        caplog.clear()
    now, result = contents(cwd), read_result(cwd / RUN)
    assert {key: now[key] for key in MADE[2:]} == {key: whole[key] for key in MADE[2:]}
    assert result is not None and result["seconds"] == said["seconds"]
    assert train(cwd) == [] and "this run is complete" in caplog.text


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty, Path.unlink, put_a_directory_there])
def test_every_harm_to_a_file_is_noticed(cwd, harm, monkeypatch, configure):
    monkeypatch.chdir(cwd)
    result = read_result(RUN)
    assert result is not None
    for name in MADE[:3]:
        harm(RUN / name)
    with opened(configure) as run:
        wrong = complete.lacking(run, result["files"])
    assert [Path(path).name for path in wrong] == ["report.html", "metrics.jsonl", "model.tar.gz"]


def test_without_a_checkpoint_it_is_one_line(cwd, train):
    delete_checkpoints(cwd)
    assert train(cwd) == []
    truncate(cwd / RUN / "model.tar.gz")
    with pytest.raises(UserError, match=r"model.tar.gz has 15 bytes where 18 .* no checkpoint"):
        train(cwd)


def test_a_damaged_result_is_made_again(cwd, train):
    before = read_result(cwd / RUN)
    empty(cwd / RUN / "result.json")
    assert len(train(cwd)) == 1
    after = read_result(cwd / RUN)
    assert before is not None and after is not None
    same = {"split", "top1", "identity", "best_epoch"}
    assert {key: before[key] for key in same} == {key: after[key] for key in same}


def test_any_damage_to_a_result_is_noticed(cwd):
    path = cwd / RUN / "result.json"
    data = path.read_bytes()
    for place in range(0, len(data), 29):
        changed = bytearray(data)
        changed[place] ^= 2
        for damaged in (bytes(changed), data[:place]):
            path.write_bytes(damaged)
            if json.loads(data) != _parsed(damaged):
                assert read_result(cwd / RUN) is None
    put_a_directory_there(path)
    assert read_result(cwd / RUN) is None


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_directory_of_a_package_is_held_to_each_of_its_files(cwd, train, caplog):
    words = ("platform.package=models/model",)
    assert len(train(cwd, *words)) == 1  # there is none of this form yet
    package = cwd / "models/model/package.json"
    with tarfile.open(cwd / RUN / "model.tar.gz", "w:gz") as archive:  # as SageMaker packs it
        archive.add(package, "./package.json")
    assert train(cwd, *words) == [] and train(cwd) == []
    package.unlink()
    assert len(train(cwd, *words)) == 1
    assert "models/model/package.json is missing" in caplog.text
    # Not a bit of the archive: by the time in it, it may be one that says nothing.
    flip_a_bit(package)
    with tarfile.open(cwd / RUN / "model.tar.gz", "w:gz") as archive:
        archive.add(package, "./package.json")
    assert len(train(cwd)) == 1


def test_what_can_not_be_read_now_is_not_made_again(cwd, train, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", ())

    def fail(path: Path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(complete, "_read", fail)
    with pytest.raises(UserError, match=r"report.html: the disk.*same command again"):
        train(cwd)


# --- whose things are whose ---


def opened(configure, *words: str):
    config = configure(*SETTINGS, "train.epochs=1", "data.root=pictures", *words)
    return open_run(config, World(), Stop())


def test_a_run_sweeps_what_it_left_and_nothing_of_another(tmp_path, configure, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("platform.package=models/a.tar.gz",), ("name=b", "platform.package=models/b.tar.gz")
    left = []
    for each in words:
        with opened(configure, *each) as run:
            left.append(Path("models") / f"{run.temporary}half")
            left[-1].mkdir()
            (run.directory / f"{files.TEMPORARY}half").touch()
    Path("models/.writing-of-somebody-else").touch()
    with opened(configure, *words[0]) as run:
        assert [path.exists() for path in left] == [False, True]
        assert not (run.directory / f"{files.TEMPORARY}half").exists()
        with opened(configure, *words[1]):  # while the first one runs
            assert [path.exists() for path in left] == [False, False]
    assert Path("models/.writing-of-somebody-else").exists()


def test_one_process_at_a_time_has_a_run_or_its_checkpoints(tmp_path, configure, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = "platform.checkpoints=kept"
    with opened(configure, elsewhere):
        for words in ((), ("name=other", elsewhere)):
            with (
                pytest.raises(UserError, match=r"(run|kept): another process trains in this run"),
                opened(configure, *words),
            ):
                pass
    shutil.rmtree("runs")
    with opened(configure, elsewhere):
        pass


def test_the_times_and_dollars_are_those_of_all_starts(cwd, train):
    told = json.loads((cwd / RUN / "checkpoints" / TIMES).read_text())
    assert told["starts"] == 1 and {"scan", "training"} <= told["stages"].keys()
    (cwd / RUN / "result.json").unlink()  # as if it had been killed before its last word
    earlier = {"starts": 2, "stages": {"training": 1000.0, "features": 80.0}}
    (cwd / RUN / "checkpoints" / TIMES).write_text(json.dumps(earlier))
    train(cwd, "platform.dollars_hour=36")
    result = read_result(cwd / RUN)
    assert result["stages"]["features"] == 80 and result["stages"]["training"] >= 1000
    assert result["seconds"] == pytest.approx(sum(result["stages"].values()))
    assert result["dollars"] == pytest.approx(result["seconds"] / 100)
    page = (cwd / RUN / "report.html").read_text()
    assert "3; the times are of all of them together" in page
    assert re.search(r"took <a [^>]*>\d+ min.*</a>, about \$\d+\.\d\d at \$36\.00 an hour", page)
    assert runs.read(cwd / RUN).dollars == result["dollars"]


@pytest.mark.parametrize("text", ["", "[]", '{"starts": 2}', '{"starts": 2, "stages": {"a": NaN}}'])
def test_times_that_cannot_be_read_count_as_none(text, tmp_path, configure, pictures):
    config = configure(*SETTINGS, f"data.root={pictures}", f"platform.run_dir={tmp_path}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / TIMES).write_text(text)
    with open_run(config, World(), Stop()) as run:
        assert run.stages.starts == 1


def test_the_command_to_train_again_begins_another_run(tmp_path, configure, pictures):
    """Where the pictures have changed, the same command would be refused."""
    words = ["data=folder", f"data.root={pictures}", "model=small_cnn", "name=dogs"]
    config = configure(*words, f"platform.runs={tmp_path}")
    with open_run(config, World(), Stop(), words) as run:
        begin = f"-m trainer data=folder data.root={pictures} model=small_cnn"
        assert run.again().endswith(f"{begin} name=dogs-2")
        (tmp_path / "dogs-2").mkdir()
        assert run.again("data.cache=packed").endswith(f"{begin} name=dogs-3 data.cache=packed")
        assert run.again("train.epochs=9").endswith(f"{begin} train.epochs=9")


@pytest.mark.parametrize("weights", [RUN, RUN / "model.tar.gz"])
def test_a_run_that_goes_on_from_another_is_compared_with_it(cwd, weights, configure, monkeypatch):
    monkeypatch.chdir(cwd)
    config = configure(*SETTINGS, f"model.weights={weights}", "data.root=.", "name=on")
    run = Run(config, World(), Stop(), "on", Path("runs/on"), Path("on"), Path("on/model.tar.gz"))
    assert any(step.endswith(f"trainer.runs --compare {RUN} runs/on") for step in run.next_steps())
