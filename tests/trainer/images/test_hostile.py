"""No file keeps a decoder busy for ever: neither those that are known, nor thousands made up."""

import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from tests import hostile
from tests.conftest import PROJECT, QUICK, ended, start_trainer
from tests.hostile import chunk, encoded, jpeg_with, scans, segment
from tests.trainer.images.test_bounds import REAL, photo
from trainer.common.errors import OK
from trainer.images import decode
from trainer.images.decode import ImageError, Room, shrink, shrink_here

SECONDS = 10  # of processor time, for any file

LESS = "from trainer.images import apart; apart.SECONDS = 1"  # than the 8 s that a user waits
# Names of files and what is said of each; all but the first two are our own finds.
LEFT_OUT = {
    "scans": (lambda: scans(12_000, 2_500), "more than 200 scans"),
    "exif": (lambda: jpeg_with(segment(0xE1, b"Exif\0\0ab") * 670_000), "more than 64 segments"),
    "chunks": hostile.REFUSED["PNG: pixels in chunks of one byte"],
    "nothing": hostile.REFUSED["PNG: blocks of nothing"],
    "comments": hostile.REFUSED["GIF: comments"],
    "rows": hostile.REFUSED["BMP: ends of rows"],
    "tiles": hostile.REFUSED["TIFF: high tiles"],
    "shared": hostile.REFUSED["TIFF: strips that share packed bytes"],
    "strips": hostile.REFUSED["TIFF: scans of JPEG"],
    "values": hostile.REFUSED["TIFF: overlapping values"],
}
if decode.optional_decoders()["avif"]:
    grid = "decoding it takes more than 1 s"  # of LESS
    LEFT_OUT["grid"] = (lambda: hostile.grid_of_large_cells(4096, 40), grid)


def test_the_trainer_names_and_leaves_out_what_would_take_minutes(tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "pictures")
    for name, (make, _) in LEFT_OUT.items():
        (tmp_path / f"pictures/train/circle/{name}.jpg").write_bytes(make())
    command = (*QUICK, "data=folder", "model=small_cnn", "data.root=pictures")
    words = ("platform.cache=cache", "data.max_broken=0.5", "data.workers=1")
    code, output = ended(start_trainer(tmp_path, *command, *words, before=LESS))
    assert code == OK, output
    [listed] = tmp_path.glob("runs/*/quarantine.txt")
    lines = listed.read_text().splitlines()
    for name, (_, reason) in LEFT_OUT.items():
        [line] = [line for line in lines if f"{name}.jpg" in line]
        assert reason in line
    assert "left out" in output


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_what_is_refused_is_refused_at_once(name):
    make, _ = hostile.REFUSED[name]
    data = make()
    began = time.thread_time()
    with pytest.raises(ImageError):
        shrink(data, 16, "bilinear")
    assert time.thread_time() - began < 1


# --- made up ---

SEEDS = {name: make for name, make in REAL.items() if "16 MB" not in name}
SEEDS |= {name: make for name, (make, _) in hostile.REFUSED.items() if name != "PNG: empty chunks"}
SEEDS["WebP without loss"] = lambda: encoded(photo(), "WebP", lossless=True)
SEEDS["TIFF of JPEG tiles"] = lambda: hostile.scans_in_tiles(4, 64)
for compression in ("packbits", "tiff_deflate", "lzma", "zstd", "group3", "group4"):
    SEEDS[f"TIFF: {compression}"] = lambda compression=compression: encoded(
        photo(600, 400).convert("1"), "TIFF", compression=compression
    )


def made_up(data: bytes, rng: random.Random) -> bytes:
    """Change bytes and lengths, repeat pieces many times, and cut."""
    data = bytearray(data[:3_000_000])
    for _ in range(rng.randrange(1, 4)):
        # Most of what a decoder repeats is said in the first bytes, or the last ones (TIFF).
        at = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 600)), -60])
        at = at % len(data)
        what = rng.randrange(5)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\0\0\xff\xff", b"\1"])
        elif what == 2:
            piece = bytes(data[at : at + rng.randrange(1, 100)])
            data[at:at] = piece * rng.randrange(1, 10_000)
        elif what == 3:
            del data[at : at + rng.randrange(1, 200)]
        else:
            data[at : at + 2] = (rng.randrange(65536)).to_bytes(2, "little")
        data = data[:4_000_000] or bytearray(1)
    return bytes(data)


def cost(data: bytes) -> float:
    """Return the seconds of processor time that a file takes, read or refused."""
    began = time.thread_time()
    with suppress(ImageError, MemoryError):
        shrink_here(data, 16, "bilinear", Room(4_000_000))
    return time.thread_time() - began


def check_made_up(name: str, count: int) -> None:
    seed = SEEDS[name]()
    for number in range(count):
        data = made_up(seed, random.Random(f"{name} {number}"))
        assert cost(data) < SECONDS, (name, number)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it reads
@pytest.mark.parametrize("name", SEEDS)
def test_no_file_made_up_takes_longer_than_its_bound(name):
    check_made_up(name, 3)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SEEDS)
def test_no_file_of_thousands_made_up_takes_longer_than_its_bound(name):
    check_made_up(name, 300)


# --- how much is decoded, and how much at once ---


def test_a_photo_of_48_megapixels_is_read_where_25_are_allowed():
    data = encoded(Image.new("RGB", (8064, 6048), "teal"), "JPEG", quality=20)
    assert shrink(data, 256, "bilinear", Room(25_000_000)).shape == (256, 341, 3)


def test_what_is_held_whole_counts_whole():
    image = Image.new("RGB", (3000, 2000), "teal")
    room = Room(5_000_000)
    assert shrink(encoded(image, "JPEG"), 16, "bilinear", room).shape == (16, 24, 3)
    for data in (encoded(image, "JPEG", progressive=True), encoded(image, "PNG")):
        with pytest.raises(ImageError, match="3000 x 2000 pixels are too many"):
            shrink(data, 16, "bilinear", room)
    # Colours one after the other: the first scan has one of three.
    data = encoded(image, "JPEG")
    at = data.index(b"\xff\xda") + 4
    with pytest.raises(ImageError, match="3000 x 2000 pixels are too many"):
        shrink(data[:at] + b"\1" + data[at + 1 :], 16, "bilinear", room)


def test_no_more_is_decoded_at_once_than_there_is_room_for(monkeypatch):
    """Each of 8 threads wants a third of the room."""
    room, held = Room(9_000), []
    convert = decode._rgb

    def watched(image):
        held.append(room._left)
        time.sleep(0.001)
        return convert(image)

    monkeypatch.setattr(decode, "_rgb", watched)
    data = encoded(Image.new("RGBA", (60, 50)), "PNG")
    threads = [threading.Thread(target=shrink, args=(data, 16, "bilinear", room)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 8 and min(held) >= 0 and room._left == 9_000


MEMORY = """
import re, sys
from pathlib import Path
from trainer.images.decode import Room, shrink_here
for name, pixels in zip(sys.argv[1::2], sys.argv[2::2]):
    shrink_here(Path(name).read_bytes(), 16, "bilinear", Room(int(pixels)))
    print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere in other units")
def test_a_pixel_takes_no_more_memory_than_is_said(tmp_path):
    """Of the kinds that take most: the others lie below them."""
    side = 1500
    clear = Image.new("RGBA", (side, side), (9, 9, 9, 9))
    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(side * (1 + 6 * side)))
    deep = chunk(b"IHDR", header) + chunk(b"tRNS", bytes(6)) + chunk(b"IDAT", pixels)
    files = {
        "small.png": encoded(Image.new("RGBA", (40, 40)), "PNG"),
        "small.webp": encoded(Image.new("RGBA", (40, 40)), "WebP"),
        "deep.png": b"\x89PNG\r\n\x1a\n" + deep + chunk(b"IEND"),
        "clear.webp": encoded(clear, "WebP"),
    }
    arguments = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        arguments += [str(tmp_path / name), str(side * side)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], cwd=PROJECT, capture_output=True, text=True
    )
    _, before, deep_peak, clear_peak = map(int, done.stdout.split())
    most = decode.BYTES_A_PIXEL * side * side + (8 << 20)  # and the interpreter's own
    assert 0 < deep_peak - before < most and clear_peak - before < most, done.stderr


def test_who_wants_much_room_is_not_overtaken():
    room, order = Room(10), []

    def take(pixels: int) -> None:
        with room.taken(pixels, ""):
            order.append(pixels)

    with room.taken(5, ""):
        large = threading.Thread(target=take, args=(10,))
        large.start()
        while not room._turn.locked():
            time.sleep(0.001)
        small = threading.Thread(target=take, args=(1,))
        small.start()
        time.sleep(0.01)
        assert order == []
    large.join()
    small.join()
    assert order == [10, 1]


def test_room_is_given_back_by_what_fails():
    room = Room(5_000)
    data = encoded(Image.fromarray(np.zeros((60, 60, 3), np.uint8)), "PNG")
    for _ in range(3):
        with pytest.raises(ImageError):
            shrink(data[:60], 16, "bilinear", room)
    assert shrink(data, 16, "bilinear", room).shape == (16, 16, 3)
