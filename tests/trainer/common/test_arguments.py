"""Numbers on command lines: what doesn't fit is one line, before anything is done."""

import argparse
import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from trainer.common.arguments import positive, typed_path, whole
from trainer.common.errors import MISTAKE


@pytest.mark.parametrize(
    "text", ["0", "-1", "nan", "inf", "-inf", "1e999", "", "five", "1,5", "1e9"]
)
def test_a_number_that_is_not_above_zero_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"allowed: a number above 0"):
        positive(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "", "five", "65536"])
def test_a_whole_number_outside_its_limits_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"a whole number, 1 to 65535"):
        whole(1, 65535)(text)


def test_what_fits_is_taken():
    assert (positive("0.25"), whole()("1"), whole(0, 65535)("0")) == (0.25, 1, 0)
    assert whole(1, 65535)("65535") == 65535


def test_home_and_environment_are_meant_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PICTURES", "/my pictures")
    typed = {"~/x": "/home/me/x", "$PICTURES/x": "/my pictures/x", "a ~$5": "a ~$5"}
    assert {text: str(typed_path(text)) for text in typed} == typed
    for text, said in {"": "empty", "~no-such-user": "no user", "$NO_SUCH": "NO_SUCH isn"}.items():
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            typed_path(text)


def test_every_number_of_a_command_line_has_limits_and_every_path_a_home():
    bare = [
        f"{path.relative_to(PROJECT)}:{keyword.value.lineno}"
        for program in ("trainer", "launch", "serving")
        for path in sorted((PROJECT / program).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "type"
        and isinstance(keyword.value, ast.Name)
        and keyword.value.id in ("int", "float", "Path")
    ]
    assert not bare, "argparse takes -1, nan and ~ there: take trainer.common.arguments"


@pytest.mark.parametrize(
    "command",
    [
        "trainer.doctor --seconds -1",
        "launch instances --pictures 0",
        "launch logs --every nan",
        "serving serve nowhere --port 65536",
        "launch plan --data ~no-such-user/x",
    ],
)
def test_the_line_names_the_flag_and_what_is_allowed(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == MISTAKE
    assert f"argument {command.split()[-2]}: " in done.stderr and re.search(
        "; (allowed:|a path)", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_port_of_the_environment_is_held_to_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "serving", "serve", "nowhere"],
        cwd=PROJECT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "SERVING_PORT": "http"},
    )  # fmt: skip
    assert done.returncode == MISTAKE and "--port: http is not allowed" in done.stderr
