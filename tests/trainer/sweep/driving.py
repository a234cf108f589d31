"""Sweeps whose trials are `trial.py`, which does what a test says: what the driver does alone."""

import json
from collections import Counter
from pathlib import Path

from tests.conftest import Process, start_trainer

BEFORE = """
from pathlib import Path
from trainer.sweep import directory, driver
directory.PROJECT = Path("project")
driver.PAUSES = (0.1, 0.1)
"""


def start(cwd: Path, *words: str, before: str = "") -> Process:
    given = ["data=folder", "data.root=pictures", "model=small_cnn", "platform=local", "name=s"]
    return start_trainer(cwd, "-m", *given, "platform.cache=cache", *words, before=BEFORE + before)


def sweep(
    cwd: Path, script: dict[str, list[str]], *words: str, before: str = ""
) -> tuple[int, str]:
    """Run one to its end; its exit code and last line."""
    (cwd / "script.json").write_text(json.dumps(script))
    process = start(cwd, *words, before=before)
    output, _ = process.communicate(timeout=600)
    assert "Traceback" not in output, output
    return process.returncode or 0, output


def states(cwd: Path) -> list[str]:
    return [state for _, (state, _) in sorted(ledger(cwd / "runs/s").items())]


def starts(cwd: Path) -> dict[int, int]:
    return dict(Counter(map(int, (cwd / "starts").read_text().split())))


def said_in(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def ledger(sweep: Path) -> dict[int, tuple[str, float | None]]:
    """The last word of a grid's journal on each trial; asserts that no trial was ever complete
    twice.
    """
    entries = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    ended = [entry["number"] for entry in entries if entry["state"] != "running"]
    assert len(ended) == len(set(ended))
    return {entry["number"]: (entry["state"], entry["value"]) for entry in entries}
