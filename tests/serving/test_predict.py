"""`python -m serving predict`: a folder of new photos becomes a table, whatever ends it."""

import csv
import errno
import fcntl
import io
import json
import logging
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto import mock_aws
from PIL import Image

from serving import handler, predict, s3
from serving.__main__ import main
from serving.handler import Request, Settings
from tests.conftest import environment, wait_for
from trainer.common import files, sessions
from trainer.common.errors import MISTAKE, OK, RESUME
from trainer.images import folder
from trainer.results.predictions import whole_rows


@pytest.fixture
def asked(original, monkeypatch, tmp_path, capsys):
    """Runs the verb in an empty directory; returns its exit code, output and words."""
    monkeypatch.chdir(tmp_path)
    # Another test may have sent the log to standard output, which is the table's.
    monkeypatch.setattr(logging.getLogger("packhorse"), "handlers", [])
    monkeypatch.setenv("HOME", str(tmp_path))

    def asked(*words: object) -> tuple[int, str, str]:
        code = main(["predict", str(original), *map(str, words)])
        return code, *capsys.readouterr()

    return asked


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two folders of ten photos each, what isn't one, and what says that it is one."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(20):
        path = root / f"trip {number % 2}" / f"{number:02}, at the lake.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    (root / "trip 0/notes.txt").write_text("none of these")
    (root / "trip 1/broken.jpg").write_bytes(b"\xff\xd8\xff torn")
    return root


def rows(path: Path | str) -> list[dict[str, str]]:
    text = path if isinstance(path, str) else path.read_text()
    return list(csv.DictReader(io.StringIO(text)))


def test_a_row_says_what_every_way_of_serving_answers(asked, original, engine):
    code, out, _ = asked(original / "pictures", "--csv", "-", "--top", 99)
    assert code == OK
    for row in rows(out):
        request = Request(Path(row["path"]).read_bytes(), "", "application/json;output=labels", "")
        [said] = json.loads(handler.answer(engine, Settings(), request).body)
        first, second, third = said["labels"]
        assert (row["label"], row["label_2"], row["label_3"]) == (
            first["label"],
            second["label"],
            third["label"],
        )
        assert float(row["probability"]) == pytest.approx(first["probability"], abs=1e-4)
        assert float(row["probability_3"]) == pytest.approx(third["probability"], abs=1e-4)
        assert row["set"].split("|") == said["set"]
        assert [row["sure"] == "true", row["unlike"] == "true"] == [said["sure"], said["unlike"]]
        assert row["error"] == ""
    assert {row["unlike"] for row in rows(out)} == {"true", "false"}


def test_without_a_table_a_line_a_picture_says_it_to_a_person(asked, photos):
    code, out, err = asked(photos / "trip 1")
    assert code == OK
    lines = out.splitlines()
    assert len(lines) == 11
    assert f"{photos}/trip 1/broken.jpg  can't be read: " in out
    assert all("%" in line for line in lines if "broken" not in line)
    assert "11 pictures, " in err
    assert "1 broken" in err


def test_a_picture_is_named_in_every_way_that_people_have(asked, photos, tmp_path, monkeypatch):
    one = photos / "trip 0/00, at the lake.jpg"
    with zipfile.ZipFile(tmp_path / "trip.zip", "w") as archive:
        archive.write(one, "sub/a.jpg")
        archive.write(photos / "trip 0/notes.txt", "sub/notes.txt")
    oddly_named = shutil.copy(one, tmp_path / "photo.upload")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{one}\n\n{photos}/trip 1\n"))

    def names(*words: object) -> list[str]:
        return [row["path"] for row in rows(asked(*words, "--csv", "-")[1])]

    assert names(photos) == names(photos / "trip 0", photos / "trip 1")
    assert len(names(photos)) == 21
    assert len(names(f"{photos}/trip 0/*")) == 10  # notes.txt is left out
    assert len(names(f"{photos}/**/*.jpg")) == 21
    assert len(names(f"{photos}/*")) == 21
    assert names(one, one, photos / "trip 0")[0] == str(one)
    assert len(names(one, one, photos / "trip 0")) == 10
    assert names("trip.zip") == ["trip.zip/a.jpg"]  # the only folder goes without saying
    assert names(oddly_named) == [str(oddly_named)]
    assert names("-") == [str(one), *names(photos / "trip 1")]
    assert "left out: 1 .txt" in asked(photos / "trip 0")[2]


def test_pictures_come_from_s3(asked, photos, monkeypatch):
    one = (photos / "trip 0/00, at the lake.jpg").read_bytes()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with mock_aws():
        s3._client.cache_clear()
        client = boto3.client("s3")
        place = {"LocationConstraint": "eu-central-1"}
        client.create_bucket(Bucket="photos", CreateBucketConfiguration=place)
        for key in ("a/b/1.jpg", "a/2.jpg", "a/x.txt", "ab/3.jpg", "a/"):
            client.put_object(Bucket="photos", Key=key, Body=one)
        _, out, _ = asked("s3://photos/a", "--csv", "-", "--images", "sorted")
        assert [row["path"] for row in rows(out)] == [
            "s3://photos/a/2.jpg",
            "s3://photos/a/b/1.jpg",
        ]
        [label] = {row["label"] for row in rows(out)}
        assert Path("sorted", label, "b/1.jpg").read_bytes() == one
        assert len(rows(asked("s3://photos", "--csv", "-")[1])) == 3
        assert asked("s3://photos/none")[0] == MISTAKE
        assert "there is no such object" in asked("s3://photos/none")[2]
        assert "S3 doesn't list it" in asked("s3://other/none")[2]
    s3._client.cache_clear()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["no*where"], "no*where: no file matches this pattern"),
        (["empty"], "empty: there is no picture"),
        (["empty", "--csv", "no/such.csv"], "empty: there is no picture"),
    ],
)
def test_a_mistake_is_one_line(asked, words, line):
    Path("empty").mkdir()
    code, out, err = asked(*words)
    assert (code, out, err.strip()) == (MISTAKE, "", line)


def test_where_no_picture_can_be_read_it_is_a_mistake(asked, photos):
    assert asked(photos / "trip 1/broken.jpg")[0] == MISTAKE


def test_pictures_are_sorted_into_folders_by_their_class(asked, original, photos, tmp_path):
    twice = shutil.copytree(photos / "trip 0", tmp_path / "again")
    _, out, _ = asked(photos / "trip 0", twice, "--csv", "-", "--images", "sorted")
    copies = {path.read_bytes() for path in Path("sorted").rglob("*.jpg")}
    assert copies == {path.read_bytes() for path in twice.glob("*.jpg")}
    for row in rows(out):
        name = Path(row["path"]).name
        if row["path"].startswith(str(twice)):
            name = name.replace(".jpg", " (2).jpg")
        assert Path("sorted", row["label"], name).is_file()


@pytest.mark.parametrize(("label", "name"), [("a/b", "a_b"), ("..", "_."), ("cat", "cat")])
def test_a_class_can_be_a_folder(label, name):
    assert predict._folder_name(label) == name


# --- going on ---


def test_wherever_a_table_is_cut_off_it_is_gone_on_with(asked, photos):
    words = (photos / "trip 1", "--csv", "all.csv")
    asked(*words)
    whole = Path("all.csv").read_bytes()
    table = Path("all.csv")
    rng = random.Random(0)
    for length in (0, 1, len(whole) - 1, *rng.sample(range(len(whole)), 12)):
        table.write_bytes(whole[:length])
        assert asked(*words)[0] == OK
        assert table.read_bytes() == whole
    code, _, err = asked(*words)
    assert (code, table.read_bytes()) == (OK, whole)
    assert "has 11 of 11 already" in err


def test_a_row_of_a_name_with_line_breaks_is_one_row():
    first = '"a\nb ""x"" .jpg",dog\n'
    rows, length = whole_rows(first.encode() + b'"c\n')
    assert (rows, length) == ([['a\nb "x" .jpg', "dog"]], len(first))


def test_a_table_of_other_columns_or_another_model_is_not_gone_on_with(asked, photos):
    words = (photos / "trip 1", "--csv", "all.csv")
    asked(*words)
    code, _, err = asked(*words, "--top", 2)
    assert code == MISTAKE
    assert "give --top as it was written with, or another --csv" in err
    table = Path("all.csv")
    kept = table.read_text()
    table.write_text(kept.replace(rows(table)[0]["model"], "0123456789ab"))
    assert "it is of another model (0123456789ab, this is" in asked(*words)[2]
    Path("mine.csv").write_text("name,age\nme,5\n")
    assert asked(photos, "--csv", "mine.csv")[0] == MISTAKE
    assert Path("mine.csv").read_text() == "name,age\nme,5\n"


def test_what_cant_be_read_now_gets_no_row_and_is_done_later(asked, photos, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", ())
    read, away = folder.read, "06, at the lake.jpg"

    def gone(path: str):
        if path.endswith(away):
            raise OSError(errno.EIO, "Input/output error", path)
        return read(path)

    monkeypatch.setattr(folder, "read", gone)
    words = (photos, "--csv", "all.csv")
    code, _, err = asked(*words)
    assert code == MISTAKE
    assert "1 can't be read now, the first: " in err
    assert away in err
    assert len(rows(Path("all.csv"))) == 20
    monkeypatch.setattr(folder, "read", read)
    assert asked(*words)[0] == OK
    assert sorted(row["path"] for row in rows(Path("all.csv"))) == sorted(
        str(path) for path in photos.rglob("*.jpg")
    )


def test_a_second_process_leaves_the_table_to_the_first(asked, photos):
    with Path("all.csv").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = asked(photos, "--csv", "all.csv")
    assert code == MISTAKE
    assert err.strip().endswith("all.csv: another process is writing it; wait for its end")


def start(original: Path, photos: Path, cwd: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "serving", "predict", str(original)]
    return subprocess.Popen(
        [*command, str(photos), "--csv", "all.csv"],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("pictures", "kills"), [(120, 2), pytest.param(1000, 10, marks=pytest.mark.long)]
)
def test_a_kill_loses_nothing_and_does_no_picture_twice(asked, original, tmp_path, pictures, kills):
    photos = tmp_path / "many"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(pictures):
        image = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
        image.save(photos / f"{number:04}.png")
    asked(photos, "--csv", "whole.csv")
    whole = (tmp_path / "whole.csv").read_bytes()
    table = tmp_path / "all.csv"

    def lines() -> int:
        return table.read_bytes().count(b"\n") if table.exists() else 0

    def until(process: subprocess.Popen[bytes], enough: int) -> None:
        wait_for(lambda: lines() > enough or process.poll() is not None)

    for kill in range(kills):
        process = start(original, photos, tmp_path)
        until(process, pictures * (kill + 1) // (kills + 2))
        process.kill()
        process.communicate()
    process = start(original, photos, tmp_path)
    until(process, pictures * (kills + 1) // (kills + 2))
    process.terminate()
    _, told = process.communicate()
    if process.returncode == RESUME:  # the last rows may have been faster than the signal
        assert b"start the same command again to continue" in told
    assert asked(photos, "--csv", "all.csv")[0] == OK
    assert table.read_bytes() == whole


# Stops itself where the package is unpacked, and nothing is saved yet.
STOPPED = """
import os, runpy
from serving import package
check = package._check_golden
def stopped(*arguments):
    os.kill(os.getpid(), {number})
    return check(*arguments)
package._check_golden = stopped
runpy.run_module("serving", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", sessions.ENDING)
@pytest.mark.parametrize("verb", ["predict", "evaluate", "check"])
def test_who_stops_a_verb_before_it_saves_is_told_to_start_it_again(
    original, tmp_path, verb, number
):
    pictures = tmp_path / "photos"
    shutil.copytree(original / "pictures", pictures / "hen")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = [verb, original / "model.tar.gz", *[pictures] * (verb != "check")]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.format(number=int(number)), *words],
        cwd=tmp_path,
        env=environment(tmp_path) | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    told = f"warning: stopped by {number.name}; start the same command again\n"
    assert (done.returncode, done.stderr) == (RESUME, told)
    assert [*temporary.glob("package-*")] == []


@pytest.mark.parametrize(("place", "told"), [("", True), ("test", True), ("loose", False)])
def test_the_next_command_names_the_pictures_where_they_are_labelled(tmp_path, place, told):
    (tmp_path / place / "hen").mkdir(parents=True)
    said = predict._next("newest", ["*.jpg", str(tmp_path)], ["cow", "hen"])
    assert said.endswith(f"serving evaluate newest {tmp_path if told else 'DIR'}")
