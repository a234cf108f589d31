"""What a log says of a machine in use."""

import pytest

from trainer.common import console, usage
from trainer.common.console import ProgressBar, log


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A stand-in for NVIDIA's program, which answers what it is told to."""

    def answers(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return answers


def test_gpus_and_memory_are_told(driver, tmp_path, monkeypatch):
    driver("echo '87, 8679, 15360'; echo '3, 0, 15360'")
    (tmp_path / "meminfo").write_text("MemTotal:  16000000 kB\nMemAvailable:  4000000 kB\nX: 1\n")
    monkeypatch.setattr(usage, "MEMINFO", tmp_path / "meminfo")
    assert usage.told() == (
        "GPU 87%, 9.1 of 16.1 GB; GPU 3%, 0.0 of 16.1 GB; memory 12.3 of 16.4 GB"
    )


@pytest.mark.parametrize("script", ["exit 9", "echo no devices", "echo '[N/A], 1, 2'", "kill $$"])
def test_a_driver_that_says_nothing_is_left_out(driver, tmp_path, monkeypatch, script):
    driver(script)
    monkeypatch.setattr(usage, "MEMINFO", tmp_path / "there is none")
    assert usage.told() == ("GPU [N/A]%, 0.0 of 0.0 GB" if "N/A" in script else "")


def test_a_line_of_progress_tells_it_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    lines: list[str] = []
    monkeypatch.setattr(log, "info", lambda text, *words: lines.append(text % words))
    monkeypatch.setattr(log, "isEnabledFor", lambda level: True)
    with ProgressBar("epoch 1/2", 4, more=lambda: "memory 1.0 of 2.0 GB") as bar:
        bar.advance()
    assert lines == ["epoch 1/2: 1 of 4 (memory 1.0 of 2.0 GB)"]
