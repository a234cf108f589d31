"""`python -m tests.picture` takes the README's picture: the report of `make train`, in Chromium.

It trains on the pictures that ship with the project, whose licence lets a README show them, or
takes the report of the run that `--run` names. Needs Chromium (`make pages` installs it).
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.conftest import PROJECT
from tests.serving.browser import CHROMIUM, Browser

PICTURE = PROJECT / "docs/images/report.webp"
WIDTH, HEIGHT = 1200, 900  # CSS pixels of the window: what stands above the fold of the report
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
            run = train(place)
        shot = take(run / "report.html", place)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(shot)
    print(f"{PICTURE.relative_to(PROJECT)}: {len(shot):,} bytes")


def train(place: Path) -> Path:
    """Train as `make train` does, into `place`, and return the run's directory."""
    command = [sys.executable, "-m", "trainer", f"platform.runs={place}/runs"]
    subprocess.run(command, cwd=PROJECT, check=True)
    [run] = (place / "runs").iterdir()
    return run


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
