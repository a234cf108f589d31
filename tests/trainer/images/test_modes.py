"""Every mode and depth of pixels that Pillow gives: each picture's four pixels, as RGB on white."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tests.hostile import chunk, encoded, png_with
from trainer.images import bounds
from trainer.images.decode import ImageError, shrink

WHITE, BLACK, RED, GREEN, BLUE = (255,) * 3, (0,) * 3, (255, 0, 0), (0, 255, 0), (0, 0, 255)
NINE = (9, 9, 9)
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
UNKNOWN = "whose range is unknown; allowed: 8 or 16 bits a channel"


def grey(*values):
    return [(value,) * 3 for value in values]


def shorts(*values, order=">"):
    return struct.pack(f"{order}{len(values)}H", *values)


def key(*values):
    return chunk(b"tRNS", shorts(*values))


def png(bits: int, kind: int, row: bytes, *chunks: bytes) -> bytes:
    """Four equal rows of four pixels."""
    header = struct.pack(">IIBBBBB", 4, 4, bits, kind, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 4))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + b"".join(chunks) + pixels + chunk(b"IEND")


def tiff(
    order: str,
    bits: int,
    photometric: int,
    row: bytes,
    samples: int = 1,
    more: Sequence[tuple[int, Sequence[int]]] = (),
) -> bytes:
    """Four equal rows of four pixels. order: "<" or ">". more: tags of shorts."""
    given = [(256, [4]), (257, [4]), (258, [bits] * samples), (259, [1]), (262, [photometric])]
    given += [(273, [8]), (277, [samples]), (278, [4]), (279, [4 * len(row)]), *more]
    body, entries = row * 4, b""
    for tag, values in sorted(given):
        value = shorts(*values, order=order)
        if len(value) > 4:
            value, body = struct.pack(f"{order}I", 8 + len(body)), body + value
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + value.ljust(4, b"\0")
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(body))
    return start + body + struct.pack(f"{order}H", len(given)) + entries + bytes(4)


def of(form, mode, *pixels, **options):
    image = Image.new(mode, (4, 4))
    image.putdata(list(pixels) * 4)
    return encoded(image, form, **options)


def bmp_with_alpha():
    """A BMP of version 4, whose masks name the fourth byte."""
    header = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 32, 3, 64, 0, 0, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    row = bytes([0, 0, 255, 255, 0, 0, 255, 0, 0, 0, 255, 51, 9, 9, 9, 255])
    return b"BM" + struct.pack("<IHHI", 122 + 64, 0, 0, 122) + header + row * 4


COLOURS = chunk(b"PLTE", bytes([*RED, *GREEN, *BLUE, *NINE]))
# Of a TIFF: 256 values of red, then of green and blue, in 16 bits.
COLOUR_MAP = (320, [65535, 0, 0, 9 * 257, *[0] * 252, 0, 65535, 0, 9 * 257, *[0] * 252])
COLOUR_MAP[1].extend([0, 0, 65535, 9 * 257, *[0] * 252])
ALPHA_PREMULTIPLIED, ALPHA, UNSPECIFIED = (338, [1]), (338, [2]), (338, [0])
SIGNED, FLOATING = (339, [2]), (339, [3])

PNGS = {
    "1 bit": (png(1, GREY, b"\x50"), grey(0, 255, 0, 255)),
    "1 bit, black transparent": (png(1, GREY, b"\x50", key(0)), grey(255, 255, 255, 255)),
    "2 bits": (png(2, GREY, b"\x1b"), grey(0, 85, 170, 255)),
    "2 bits, one transparent": (png(2, GREY, b"\x1b", key(2)), grey(0, 85, 255, 255)),
    "4 bits": (png(4, GREY, b"\x05\xaf"), grey(0, 85, 170, 255)),
    "4 bits, one transparent": (png(4, GREY, b"\x05\xaf", key(5)), grey(0, 255, 170, 255)),
    "8 bits": (png(8, GREY, bytes([0, 5, 6, 255])), grey(0, 5, 6, 255)),
    "8 bits, one transparent": (png(8, GREY, bytes([0, 5, 6, 7]), key(5)), grey(0, 255, 6, 7)),
    "16 bits": (png(16, GREY, shorts(0, 257, 32768, 65535)), grey(0, 1, 128, 255)),
    "16 bits, one transparent": (
        png(16, GREY, shorts(0, 1285, 1286, 65535), key(1285)),
        grey(0, 255, 5, 255),
    ),
    "RGB": (png(8, RGB, bytes([*RED, *GREEN, *BLUE, *NINE])), [RED, GREEN, BLUE, NINE]),
    "RGB, one transparent": (
        png(8, RGB, bytes([*RED, *GREEN, *BLUE, *NINE]), key(0, 0, 255)),
        [RED, GREEN, WHITE, NINE],
    ),
    "RGB of 16 bits": (
        png(16, RGB, shorts(65535, 0, 0, 0, 32768, 0, 0, 0, 257, *[9 * 257] * 3)),
        [RED, (0, 128, 0), (0, 0, 1), NINE],
    ),
    "RGB of 16 bits, one transparent, others of its upper bytes": (
        png(
            16, RGB, shorts(256, 512, 770, 256, 512, 771, 1, 2, 3, 65535, 0, 0), key(256, 512, 770)
        ),
        [WHITE, (1, 2, 3), BLACK, RED],
    ),
    "palette of 1 bit": (png(1, PALETTE, b"\x50", COLOURS), [RED, GREEN, RED, GREEN]),
    "palette of 2 bits": (png(2, PALETTE, b"\x1b", COLOURS), [RED, GREEN, BLUE, NINE]),
    "palette of 4 bits": (png(4, PALETTE, b"\x01\x23", COLOURS), [RED, GREEN, BLUE, NINE]),
    "palette": (png(8, PALETTE, bytes(range(4)), COLOURS), [RED, GREEN, BLUE, NINE]),
    "palette with one transparent": (
        png(8, PALETTE, bytes(range(4)), COLOURS, chunk(b"tRNS", b"\xff\0")),
        [RED, WHITE, BLUE, NINE],
    ),
    "palette of 2 bits with alpha": (
        png(2, PALETTE, b"\x1b", COLOURS, chunk(b"tRNS", bytes([0, 128, 255]))),
        [WHITE, (127, 255, 127), BLUE, NINE],
    ),
    "grey with alpha": (
        png(8, GREY_ALPHA, bytes([0, 255, 0, 0, 0, 128, 9, 255])),
        grey(0, 255, 127, 9),
    ),
    "grey with alpha of 16 bits": (
        png(16, GREY_ALPHA, shorts(0, 65535, 0, 0, 0, 32768, 9 * 257, 65535)),
        grey(0, 255, 127, 9),
    ),
    "RGBA": (
        png(8, RGBA, bytes([*RED, 255, *RED, 0, *RED, 51, *NINE, 255])),
        [RED, WHITE, (255, 204, 204), NINE],
    ),
    "RGBA of 16 bits": (
        png(
            16, RGBA, shorts(65535, 0, 0, 65535, 65535, 0, 0, 0, *[9 * 257] * 3, 65535, 0, 0, 0, 0)
        ),
        [RED, WHITE, NINE, WHITE],
    ),
}


def tiffs(order: str) -> dict[str, tuple[bytes, object]]:
    def wide(*values):
        return shorts(*values, order=order)

    def long(kind, *values):
        return struct.pack(f"{order}4{kind}", *values)

    return {
        "1 bit": (tiff(order, 1, 1, b"\x50"), grey(0, 255, 0, 255)),
        "1 bit, 0 is white": (tiff(order, 1, 0, b"\x50"), grey(255, 0, 255, 0)),
        "2 bits": (tiff(order, 2, 1, b"\x1b"), grey(0, 85, 170, 255)),
        "4 bits": (tiff(order, 4, 1, b"\x05\xaf"), grey(0, 85, 170, 255)),
        "4 bits, 0 is white": (tiff(order, 4, 0, b"\x05\xaf"), grey(255, 170, 85, 0)),
        "8 bits": (tiff(order, 8, 1, bytes([0, 5, 6, 255])), grey(0, 5, 6, 255)),
        "8 bits, 0 is white": (tiff(order, 8, 0, bytes([0, 5, 6, 255])), grey(255, 250, 249, 0)),
        "8 bits, signed": (tiff(order, 8, 1, bytes(4), more=[SIGNED]), UNKNOWN),
        "16 bits": (tiff(order, 16, 1, wide(0, 257, 32768, 65535)), grey(0, 1, 128, 255)),
        "16 bits, signed": (tiff(order, 16, 1, wide(0, 1, 2, 3), more=[SIGNED]), UNKNOWN),
        "32 bits, signed": (tiff(order, 32, 1, long("i", 0, 9, 90, 255), more=[SIGNED]), UNKNOWN),
        "32 bits, large": (
            tiff(order, 32, 1, long("i", 0, 9, -1, 1 << 30), more=[SIGNED]),
            UNKNOWN,
        ),
        "floats": (tiff(order, 32, 1, long("f", 0, 0.5, 1, 255), more=[FLOATING]), UNKNOWN),
        "grey and something": (
            tiff(order, 8, 1, bytes([0, 1, 5, 1, 6, 1, 255, 1]), 2, [UNSPECIFIED]),
            grey(0, 5, 6, 255),
        ),
        "grey with alpha": (
            tiff(order, 8, 1, bytes([0, 255, 0, 0, 0, 128, 9, 255]), 2, [ALPHA]),
            grey(0, 255, 127, 9),
        ),
        "grey with alpha, multiplied (La)": (
            tiff(order, 8, 1, bytes([0, 255, 0, 0, 100, 128, 9, 255]), 2, [ALPHA_PREMULTIPLIED]),
            grey(0, 255, 227, 9),
        ),
        "palette": (
            tiff(order, 8, 3, bytes(range(4)), more=[COLOUR_MAP]),
            [RED, GREEN, BLUE, NINE],
        ),
        "palette of 4 bits": (
            tiff(order, 4, 3, b"\x01\x23", more=[(320, _first(16))]),
            [RED, GREEN, BLUE, NINE],
        ),
        "palette with alpha (PA)": (
            tiff(order, 8, 3, bytes([0, 255, 1, 0, 2, 128, 3, 255]), 2, [COLOUR_MAP, ALPHA]),
            [RED, WHITE, (127, 127, 255), NINE],
        ),
        "RGB": (
            tiff(order, 8, 2, bytes([*RED, *GREEN, *BLUE, *NINE]), 3),
            [RED, GREEN, BLUE, NINE],
        ),
        "RGB of 16 bits": (
            tiff(order, 16, 2, wide(65535, 0, 0, 0, 32768, 0, 0, 0, 257, *[9 * 257] * 3), 3),
            [RED, (0, 128, 0), (0, 0, 1), NINE],
        ),
        "RGB and something": (
            tiff(order, 8, 2, bytes([*RED, 0, *GREEN, 1, *BLUE, 2, *NINE, 3]), 4, [UNSPECIFIED]),
            [RED, GREEN, BLUE, NINE],
        ),
        "RGBA": (
            tiff(order, 8, 2, bytes([*RED, 255, *RED, 0, *RED, 51, *NINE, 255]), 4, [ALPHA]),
            [RED, WHITE, (255, 204, 204), NINE],
        ),
        "RGBA, multiplied (RGBa)": (
            tiff(
                order,
                8,
                2,
                bytes([*RED, 255, 0, 0, 0, 0, 51, 0, 0, 51, *NINE, 255]),
                4,
                [ALPHA_PREMULTIPLIED],
            ),
            [RED, WHITE, (255, 204, 204), NINE],
        ),
        "CMYK": (
            tiff(order, 8, 5, bytes([0, 255, 255, 0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 255, 0, 0]), 4),
            [RED, BLACK, WHITE, BLUE],
        ),
        "CMYK of 16 bits": (
            tiff(order, 16, 5, wide(0, 65535, 65535, 0, 0, 0, 0, 65535, *[0] * 4, *[65535] * 4), 4),
            [RED, BLACK, WHITE, BLACK],
        ),
        "YCbCr": (
            tiff(order, 8, 6, bytes([76, 85, 255, 255, 128, 128, 0, 128, 128, 29, 255, 107]), 3),
            [(254, 0, 0), WHITE, BLACK, (0, 0, 254)],
        ),
        "LAB": (
            tiff(order, 8, 8, bytes([255, 0, 0, 0, 0, 0, 136, 80, 67, 128, 0, 0]), 3),
            [WHITE, BLACK, (252, 2, 9), (119, 119, 119)],
        ),
    }


def _first(count):
    """Return the colour map's first colours only."""
    values = COLOUR_MAP[1]
    return [value for start in (0, 256, 512) for value in values[start : start + count]]


OTHERS = {
    "12 bits": (tiff("<", 12, 1, bytes.fromhex("000800fff801")), grey(0, 128, 255, 128)),
    "16 bits, 0 is white": (
        tiff("<", 16, 0, shorts(0, 257, 32767, 65535, order="<")),
        grey(255, 254, 128, 0),
    ),
    "unsigned 32 bits": (tiff("<", 32, 1, struct.pack("<4I", 0, 9, 90, 255)), UNKNOWN),
    # What Pillow can't read is said in a line, too.
    "12 bits, big-endian": (tiff(">", 12, 1, bytes(6)), "unknown pixel mode"),
    "64 bits": (tiff("<", 64, 1, bytes(32)), "unknown pixel mode"),
    "CMYK of a JPEG, inverted as Adobe does": (
        of("JPEG", "CMYK", *[(0, 255, 255, 0)] * 4, quality=100),
        [(254, 0, 0)] * 4,
    ),
    "grey JPEG": (of("JPEG", "L", *[77] * 4, quality=100), grey(77, 77, 77, 77)),
    "BMP of 1 bit": (of("BMP", "1", 0, 255, 0, 255), grey(0, 255, 0, 255)),
    "grey BMP": (of("BMP", "L", 0, 5, 6, 255), grey(0, 5, 6, 255)),
    "BMP of 32 bits, the fourth byte unused": (
        of("BMP", "RGBA", (*RED, 255), (*RED, 0), (*RED, 51), (*NINE, 255)),
        [RED, RED, RED, NINE],
    ),
    "BMP with alpha": (bmp_with_alpha(), [RED, WHITE, (255, 204, 204), NINE]),
    "GIF with one transparent": (
        of("GIF", "L", 0, 5, 6, 255, transparency=5),
        grey(0, 255, 6, 255),
    ),
    "WebP with alpha": (
        of("WebP", "RGBA", (*RED, 255), (*RED, 0), (*RED, 51), (*NINE, 255), lossless=True),
        [RED, WHITE, (255, 204, 204), NINE],
    ),
}
TABLE = {f"PNG: {name}": value for name, value in PNGS.items()}
TABLE |= {f"TIFF {order}: {name}": value for order in "<>" for name, value in tiffs(order).items()}
TABLE |= OTHERS


@pytest.mark.parametrize(("data", "expected"), TABLE.values(), ids=TABLE)
def test_four_pixels_have_their_right_values_or_are_refused_in_a_line(data, expected):
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=expected) as caught:
            shrink(data, 4, "box")
        assert "\n" not in str(caught.value)
        return
    pixels = shrink(data, 4, "box")
    # 2: colours of JPEG, YCbCr and LAB are rounded
    assert np.abs(pixels.astype(int) - np.array(expected)).max() <= 2


# --- what lies beside the pixels of a PNG ---

LONG = bytes(2_000_000)
BESIDE = {
    "a long text": chunk(b"tEXt", b"a\0" + LONG),
    "a long packed text": chunk(b"zTXt", b"a\0\0" + zlib.compress(LONG)),
    "a long packed text of Unicode": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(LONG)),
    "long packed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "a text of 70 MB": chunk(b"tEXt", b"a\0" + bytes(70_000_000)),
    "a long profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(LONG)),
    "a profile that nobody can unpack": chunk(b"iCCP", b"a\0\7abc"),
    "empty pHYs": chunk(b"pHYs"),
    "short cHRM": chunk(b"cHRM", b"a"),
    "a damaged text": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "damaged Exif": chunk(b"eXIf", b"II*\0")[:-1] + b"?",
    "a long text of no name": chunk(b"zTXt", zlib.compress(LONG)),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_a_pngs_pixels_costs_no_pixel(beside):
    expected = shrink(png_with(), 16, "box")
    np.testing.assert_array_equal(shrink(png_with(beside), 16, "box"), expected)
    np.testing.assert_array_equal(shrink(png_with(after=beside), 16, "box"), expected)


EXIF = Image.Exif()
EXIF[274] = 6
XMP = b'<x tiff:Orientation="6"/>'
IN_HEX = b"\nexif\n      8\n" + EXIF.tobytes().hex().encode()
TURNED = {
    "eXIf": chunk(b"eXIf", EXIF.tobytes()[6:]),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "packed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    "Exif as a text": chunk(b"tEXt", b"Raw profile type exif\0" + IN_HEX),
    "Exif as a packed text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(IN_HEX)),
}


@pytest.mark.parametrize("turned", TURNED.values(), ids=TURNED)
def test_wherever_a_png_says_how_it_is_turned_it_is_turned(turned):
    assert shrink(png_with(), 16, "box").shape == (16, 24, 3)
    assert shrink(png_with(turned), 16, "box").shape == (24, 16, 3)
    assert shrink(png_with(after=turned), 16, "box").shape == (24, 16, 3)


def test_pixels_in_a_second_run_of_chunks_are_still_missing():
    data = png(8, GREY, bytes(4))
    start, end = data.index(b"IDAT") - 4, len(data) - 12
    half = bytes(range(8))
    packed = zlib.compress((b"\0" + bytes(4)) * 4)
    torn = chunk(b"IDAT", packed[:6]) + chunk(b"tEXt", half) + chunk(b"IDAT", packed[6:])
    with pytest.raises(ImageError):
        shrink(data[:start] + torn + data[end:], 4, "box")


def test_what_is_bare_stays_as_it_is():
    data = png(8, RGB, bytes(12), key(1, 2, 3))
    assert bounds.bare_png(data) == data
    assert bounds.bare_png(data[:50]) == data[:50]
    Image.open(io.BytesIO(bounds.bare_png(png_with(chunk(b"tEXt", b"a\0b"))))).load()
