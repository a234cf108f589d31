"""What can't be bounded by counting is decoded in a process that can be ended, alone."""

import gc
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from tests.hostile import encoded, grid_of_large_cells
from tests.trainer.images.test_bounds import photo
from trainer.images import apart, bounds, decode
from trainer.images.decode import ImageError, Room, shrink, shrink_here

pytestmark = pytest.mark.skipif(
    not decode.optional_decoders()["avif"], reason="this Pillow reads no AVIF"
)


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Has decoding an AVIF do something else, in processes that begin from now on."""
    monkeypatch.setattr(apart, "_of_thread", threading.local())
    monkeypatch.syspath_prepend(str(tmp_path))

    def do(what: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys, time\nfrom PIL import AvifImagePlugin\n"
            "was = AvifImagePlugin.AvifImageFile.load\n"
            f"def load(self):\n    {what}\nAvifImagePlugin.AvifImageFile.load = load\n"
        )

    return do


def test_pixels_are_those_of_this_process():
    data = encoded(photo(), "AVIF")
    here = shrink_here(data, 16, "bilinear", Room())
    for _ in range(3):
        pixels = shrink(data, 16, "bilinear")
        np.testing.assert_array_equal(pixels, here)
        pixels[:] = 0  # the caller's to change


def test_what_computes_too_long_is_ended_and_the_next_picture_is_read(faulty, monkeypatch):
    monkeypatch.setattr(apart, "SECONDS", 1)
    faulty("while self.size == (96, 64): pass\n    return was(self)")
    hostile, good = encoded(photo(), "AVIF"), encoded(photo(64, 64), "AVIF")
    with pytest.raises(ImageError, match="decoding it takes more than 1 s"):
        shrink(hostile, 16, "bilinear")
    assert shrink(good, 16, "bilinear").shape == (16, 16, 3)


def test_a_grid_whose_cells_are_larger_than_they_say_is_ended(monkeypatch):
    """60 KB that take a minute; nothing in the file's own tables tells."""
    monkeypatch.setattr(apart, "SECONDS", 1)
    assert shrink(grid_of_large_cells(64, 2), 16, "bilinear").shape == (16, 16, 3)
    with pytest.raises(ImageError, match="decoding it takes more than 1 s"):
        shrink(grid_of_large_cells(4096, 40), 16, "bilinear")


@pytest.mark.parametrize(
    ("what", "error", "reason"),
    [
        ("os.abort()", ImageError, "its decoder crashed \\(SIGABRT\\)"),
        ("os.kill(os.getpid(), 9)", MemoryError, "^$"),
        ("raise MemoryError", MemoryError, "^$"),
        ("raise SyntaxError('broken')", ImageError, "broken"),
        ("os._exit(3)", RuntimeError, "ended with code 3"),
    ],
)
def test_each_end_has_its_meaning(faulty, what, error, reason):
    faulty(what)
    with pytest.raises(error, match=reason):
        shrink(encoded(photo(), "AVIF"), 16, "bilinear")


def test_what_a_decoder_prints_is_no_answer(faulty):
    faulty("print('hello', flush=True); raise ValueError('broken')")
    with pytest.raises(ImageError, match="broken"):
        shrink(encoded(photo(), "AVIF"), 16, "bilinear")


def test_a_process_ends_with_its_thread():
    processes: list[subprocess.Popen[bytes]] = []

    def decode_one() -> None:
        shrink(encoded(photo(), "AVIF"), 16, "bilinear")
        processes.append(apart._of_thread.decoder.process)

    thread = threading.Thread(target=decode_one)
    thread.start()
    thread.join()
    gc.collect()
    assert processes[0].returncode is not None


def test_an_interruption_ends_the_process(monkeypatch):
    data = encoded(photo(), "AVIF")
    shrink(data, 16, "bilinear")
    process = apart._of_thread.decoder.process

    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(apart.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shrink(data, 16, "bilinear")
    monkeypatch.undo()
    assert process.returncode is not None
    assert shrink(data, 16, "bilinear").shape == (16, 24, 3)


def test_pixels_are_limited_by_what_the_header_says():
    data = encoded(photo(), "AVIF")
    assert bounds.stated_pixels(data) == 96 * 64
    with pytest.raises(ImageError, match="6,144 pixels are too many"):
        shrink(data, 16, "bilinear", Room(1000))


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits it")
def test_memory_is_limited_by_what_the_header_says():
    """libavif decodes what is in the file, and scales it to what the header says."""
    data = encoded(Image.new("RGB", (16_384, 8_000), "teal"), "AVIF", speed=10, quality=1)
    at = data.index(b"ispe") + 8
    with pytest.raises(ImageError):
        shrink(data[:at] + bytes([0, 0, 0, 8, 0, 0, 0, 8]) + data[at + 8 :], 16, "bilinear")


def test_truncated_files_are_refused():
    data = encoded(photo(), "AVIF")
    for length in (12, 40, 200, len(data) - 20):
        with pytest.raises(ImageError):
            shrink(data[:length], 16, "bilinear")
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (96, 64)
