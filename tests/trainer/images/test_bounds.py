"""What would keep a decoder busy for ever is refused; what cameras and programs write is read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests import hostile
from tests.hostile import (
    chunk,
    encoded,
    gif_with,
    jpeg_with,
    png_in_pieces,
    png_with,
    scans,
    segment,
)
from trainer.images import bounds
from trainer.images.decode import DECODERS, ImageError, shrink


@pytest.mark.parametrize(("make", "reason"), hostile.REFUSED.values(), ids=hostile.REFUSED)
def test_a_file_that_would_take_minutes_is_refused(make, reason):
    with pytest.raises(ImageError) as caught:
        shrink(make(), 16, "bilinear")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def photo(width=96, height=64):
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, (x * y) % 256]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def camera_exif():
    """With a maker note of 60 KB, as large as it can be."""
    exif = Image.Exif()
    exif[274], exif[271] = 6, "A maker of cameras"
    exif.get_ifd(0x8769)[37500] = bytes(60_000)
    return exif


def profile(parts):
    starts = [b"ICC_PROFILE\0" + bytes([number, parts]) for number in range(1, parts + 1)]
    return b"".join(segment(0xE2, start + bytes(65_000)) for start in starts)


def frames(form, count, **options):
    pictures = [photo()] + [photo().rotate(number) for number in range(1, count)]
    return encoded(pictures[0], form, save_all=True, append_images=pictures[1:], **options)


REAL = {
    "JPEG, progressive": lambda: encoded(photo(), "JPEG", progressive=True, quality=90),
    "JPEG of 90 scans": lambda: scans(80, 64),
    "JPEG of a camera": lambda: encoded(photo(), "JPEG", exif=camera_exif()),
    "JPEG with 1 MB of Exif": lambda: jpeg_with(
        hostile.in_segments(hostile.overlapping_exif(1, 1_000_000))
    ),
    "JPEG with a colour profile of 16 MB": lambda: jpeg_with(profile(255)),
    "JPEG with another picture behind it": lambda: encoded(photo(), "JPEG") + scans(300)[2:],
    "JPEG with restart markers": lambda: encoded(photo(), "JPEG", restart_marker_blocks=1),
    "JPEG with padding": lambda: jpeg_with(b"\xff" * 1000),
    "MPO": lambda: frames("MPO", 12),
    "PNG of rows": lambda: png_in_pieces(300, 901),
    "PNG in chunks of 64 bytes": lambda: png_in_pieces(600, 64),
    "PNG with texts": lambda: png_with(
        chunk(b"tEXt", b"a\0b") * 1000, chunk(b"tEXt", b"a\0b") * 1000
    ),
    "PNG with many colour profiles, which aren't read": lambda: png_with(
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)) * 200
    ),
    "PNG, interlaced by hand and with Exif": lambda: encoded(photo(), "PNG", exif=camera_exif()),
    "APNG": lambda: frames("PNG", 12),
    "GIF, animated": lambda: frames("GIF", 12, comment=b"words " * 2000, loop=0),
    "GIF with XMP": lambda: gif_with(
        b"\x21\xff\x0bXMP DataXMP" + (b"\x50" + b"x" * 80) * 20_000 + b"\0"
    ),
    "WebP, animated": lambda: frames("WebP", 12),
    "WebP of a camera": lambda: encoded(photo(), "WebP", exif=camera_exif()),
    "BMP, run-length coded": lambda: hostile.rle_bmp(300, 200),
    "TIFF of pages": lambda: frames("TIFF", 12),
    "TIFF, packed": lambda: encoded(photo(600, 400), "TIFF", compression="tiff_lzw"),
    "TIFF of JPEG strips": lambda: encoded(photo(600, 400), "TIFF", compression="jpeg"),
    "TIFF of tiles": lambda: hostile.scans_in_tiles(60, 64, 0),
    "TIFF of a strip a row": lambda: hostile.thin_strips(3000),
    "TIFF of tiles far larger than it": lambda: hostile.high_tiles(3, 1024),
    "TIFF of a camera": lambda: encoded(photo(), "TIFF", exif=camera_exif()),
    "TIFF with 500 tags": lambda: hostile.many_tags(500),
}


@pytest.mark.parametrize("make", REAL.values(), ids=REAL)
def test_what_cameras_and_programs_write_is_read(make):
    data = make()
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    side = min(expected.size)
    pixels = shrink(data, side, "box")
    if max(expected.size) <= 4 * side:  # what is longer is cut
        np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize(("make", "reason"), hostile.REFUSED.values(), ids=hostile.REFUSED)
def test_a_look_never_fails_whatever_the_bytes(make, reason):
    """Where they end too soon or are changed, the decoder is to say so."""
    data = make()
    rng = np.random.default_rng(0)
    [look] = [look for signature, (_, look) in DECODERS.items() if data.startswith(signature)]
    for length in (*range(2, 40), *rng.integers(2, len(data), 20)):
        look(data[:length])
    bad = bytearray(data[:4000])
    for _ in range(100):
        for position in rng.integers(2, len(bad), 4):
            bad[position] = rng.integers(256)
        look(bytes(bad))


@pytest.mark.parametrize("pattern", [b"\xff\x00", b"\xff\xd0", b"\xff\xff", b"\xffa"])
def test_looking_at_a_scan_takes_steps_in_proportion_to_its_bytes(pattern):
    """Each of these bytes could make a careless search begin anew."""
    data = encoded(photo(), "JPEG")[:-2] + pattern * 2_000_000 + b"\xff\xd9"
    bounds.jpeg(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it reads
def test_the_limits_of_overlapping_values_leave_broken_exif_alone():
    entry = struct.pack("<HHII", 1, 7, 2**31, 8)
    block = b"II\x2a\0\x08\0\0\0" + struct.pack("<H", 5000) + entry * 5000
    assert shrink(jpeg_with(segment(0xE1, b"Exif\0\0" + block)), 16, "bilinear").shape == (
        16,
        24,
        3,
    )


# --- AVIF and HEIC ---


def box(kind, *contents):
    data = b"".join(contents)
    return struct.pack(">I4s", len(data) + 8, kind) + data


def iso_media(*boxes):
    meta = box(b"meta", bytes(4), *boxes)
    return box(b"ftyp", b"avif", bytes(4), b"avifmif1heic") + meta


def item_list(count):
    entries = box(b"infe", bytes(13)) * count
    return box(b"iinf", bytes(4), struct.pack(">H", min(count, 65535)), entries)


def locations(items, extents):
    """Each item in so many pieces, whose offsets and lengths take no byte."""
    entry = struct.pack(">HHHH", 1, 0, 0, extents)
    return box(b"iloc", b"\x01\0\0\0", b"\0\0", struct.pack(">H", items), entry * items)


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ((item_list(5000),), "more than 4,096 items"),
        ((box(b"iprp", box(b"ipco", box(b"free") * 20_000)),), "more than 16,384 boxes"),
        ((locations(3, 65_535),), "more than 65,536 pieces of items"),
        ((box(b"ipma", bytes(4), struct.pack(">I", 10**9)),), "more than 4,096 items"),
        ((box(b"iloc", b"\x02\0\0\0\0\0", struct.pack(">I", 10**9)),), "more than 4,096 items"),
    ],
)
def test_an_avif_or_heic_that_a_decoder_would_look_through_for_ever_is_refused(boxes, reason):
    with pytest.raises(ImageError, match=reason):
        shrink(iso_media(*boxes), 16, "bilinear")


def test_an_avif_or_heic_of_a_phone_is_not():
    tiles = item_list(500), locations(500, 2), box(b"ipma", bytes(4), struct.pack(">I", 500))
    assert bounds.avif_or_heic(iso_media(*tiles)) is None


@pytest.mark.parametrize("seed", range(40))
def test_bytes_that_are_no_boxes_take_no_time(seed):
    rng = np.random.default_rng(seed)
    data = bytearray(iso_media(item_list(9), locations(9, 2)) + bytes(400))
    for place in rng.integers(0, len(data), 30):
        data[place] = rng.integers(256)
    bounds.avif_or_heic(bytes(data))
