"""`python -m tests.picture` makes what the README shows of `make train`: its report and its output.

It trains on the pictures that ship with the project, whose licence lets a README show them, takes
the report's first screen in Chromium (`make pages` installs it), and writes what the run printed
into the README. With `--run DIR` it takes the picture of another run, and leaves the text.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.conftest import PROJECT
from tests.serving.browser import CHROMIUM, Browser

PICTURE = PROJECT / "docs/images/report.webp"
WIDTH, HEIGHT = 1200, 900  # CSS pixels of the window: what stands above the fold of the report
SHOWN = "`make train` ends like this:\n\n```text\n"
WIDEST = 140  # characters of a line
MAX_BYTES = 200_000  # a README is looked at over slow lines too


def main() -> None:
    """Train, or take a run that is there, and write its report's first screen as WebP."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run's directory; default: train one")
    run = parser.parse_args().run
    if CHROMIUM is None:
        parser.error("needs Chromium: make pages installs it")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if run is None:
            run, printed = train(place)
            show(sample(printed, place))
        shot = take(as_make_train_has_it(run / "report.html", place), place)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(shot)
    print(f"{PICTURE.relative_to(PROJECT)}: {len(shot):,} bytes")


def train(place: Path) -> tuple[Path, str]:
    """Train as `make train` does, into `place`; return the run's directory, and what it printed."""
    command = [sys.executable, "-m", "trainer", f"platform.runs={place}/runs"]
    # The tests' environment has one thread, and other bits than a person's.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        print(line, end="", flush=True)
        printed.append(line)
    if process.wait() != 0:
        raise SystemExit(process.returncode)
    [run] = (place / "runs").iterdir()
    return run, "".join(printed)


def as_make_train_has_it(report: Path, place: Path) -> Path:
    """Return the page without the directory that its commands name only because this script ran."""
    page = place / "report.html"
    page.write_text(report.read_text().replace(f" platform.runs={place}/runs", ""))
    return page


def sample(printed: str, place: Path) -> str:
    """Return what a README shows of a run's output: its beginning and its end, in short lines."""
    lines = printed.replace(f"{place}/", "").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("metrics: "))
    last = max(number for number, line in enumerate(lines) if line.startswith("calibration: "))
    shown = [
        line
        for line in lines[:first]
        if line.startswith(("run ", "pictures: ", "model: ", "warning: "))
    ]
    shown += [lines[first], "...", *lines[last:]]
    return "\n".join(cut(line) for line in shown)


def cut(line: str) -> str:
    """Return a line, or as many of its words as fit."""
    if len(line) <= WIDEST:
        return line
    return line[:WIDEST].rpartition(" ")[0] + " ..."


def show(text: str) -> None:
    """Write the output into the README, in the place of the one that it shows."""
    readme = PROJECT / "README.md"
    page = readme.read_text()
    begin = page.index(SHOWN) + len(SHOWN)
    end = page.index("\n```\n", begin)
    readme.write_text(page[:begin] + text + page[end:])


def take(report: Path, place: Path) -> bytes:
    """Return the report's first screen as WebP, at the best quality that fits MAX_BYTES."""
    with Browser(place / "profile") as browser:
        browser.look(WIDTH, HEIGHT, "light")
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.open(report.resolve().as_uri())
        browser.screenshot(place / "report.png")
    with Image.open(place / "report.png") as page:
        first_screen = page.convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    for quality in range(90, 30, -10):
        data = io.BytesIO()
        first_screen.save(data, "webp", quality=quality, method=6)
        if data.tell() <= MAX_BYTES:
            return data.getvalue()
    raise ValueError(f"the picture has more than {MAX_BYTES:,} bytes at every quality")


if __name__ == "__main__":
    main()
