"""`packhorse VERB`: every verb there is, and no other behaviour than the module's own."""

import os
import signal
import subprocess
import sys
import time

import pytest

import launch.__main__
import serving.__main__
from launch import packhorse
from tests.conftest import environment
from trainer.common.errors import MISTAKE, OK, RESUME


def test_each_verb_of_launch_and_serving_has_its_way_in():
    own = {verb.words[0] for verb in packhorse.VERBS.values() if verb.module == "launch"}
    assert own == set(launch.__main__.VERBS)
    serves = {verb.words[0] for verb in packhorse.VERBS.values() if verb.words[:1]}
    through_endpoint = {"plan", "status", "logs"}  # these are launch's own words too
    assert set(serving.__main__.VERBS) - through_endpoint <= serves
    assert packhorse.VERBS["endpoint"].module == "serving"


def test_the_help_names_each_verb_once_in_a_line():
    lines = packhorse.usage().splitlines()
    for name in packhorse.VERBS:
        assert len([line for line in lines if line.startswith(f"  {name} ")]) == 1
    assert max(map(len, lines)) <= 100


@pytest.fixture
def said(monkeypatch, capsys):
    def said(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["packhorse", *words])
        code = packhorse.main()
        return code, "".join(capsys.readouterr())

    return said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "error: trian: there is no such verb; did you mean train?"),
        (["dance"], "error: dance: there is no such verb; packhorse --help shows them"),
        (
            ["--epochs", "5"],
            "error: --epochs: a verb comes first: packhorse train --epochs 5",
        ),
        (
            ["data.root=x", "seed=1"],
            "error: data.root=x: a verb comes first: packhorse train data.root=x seed=1",
        ),
    ],
)
def test_a_wrong_word_is_answered_with_what_was_meant(said, words, line):
    assert said(*words) == (MISTAKE, line + "\n")


def test_without_a_verb_it_says_which_there_are(said):
    assert said() == (MISTAKE, packhorse.usage() + "\n")
    assert said("--help") == (OK, packhorse.usage() + "\n")


def test_its_versions_are_told_without_loading_torch(said):
    code, text = said("--version")
    assert code == OK
    assert text.startswith("packhorse ")
    assert " torch " in text


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["train", "data.root=nowhere"], ["trainer", "data.root=nowhere"]),
        (["sweep", "optim.lr=,"], ["trainer", "-m", "optim.lr=,"]),
        (["check", "nowhere"], ["serving", "check", "nowhere"]),
        (["plan", "target=nowhere"], ["launch", "plan", "target=nowhere"]),
        (["endpoint", "nowhere"], ["serving", "nowhere"]),
    ],
)
def test_a_verb_is_its_module(tmp_path, words, module):
    def run(*command: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", *command],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    code, text = run("launch.packhorse", *words)
    assert (code, text) == run(*module)
    assert code == MISTAKE
    assert "Traceback" not in text


def test_ctrl_c_says_what_keeps_running(capsys, monkeypatch):
    def pressed(arguments: object):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr("launch.verbs.status.main", pressed)
    assert launch.__main__.main(["status"]) == RESUME
    assert "interrupted; what runs on AWS keeps running" in capsys.readouterr().out
