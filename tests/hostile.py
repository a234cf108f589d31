"""Small files whose decoding takes out of all proportion to their bytes and pixels."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence

from PIL import Image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(segments: bytes) -> bytes:
    data = encoded(Image.new("RGB", (48, 32), "teal"), "JPEG")
    return data[:2] + segments + data[2:]


def scans(count: int, side: int = 16) -> bytes:
    """A progressive JPEG whose last scan is there `count` times more."""
    data = encoded(Image.new("RGB", (side, side), "teal"), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(before: bytes = b"", after: bytes = b"") -> bytes:
    data = encoded(Image.new("RGB", (48, 32), "teal"), "PNG")
    return data[:33] + before + data[33:-12] + after + data[-12:]


def png_in_pieces(side: int, piece: int) -> bytes:
    """A PNG whose pixels lie in chunks of `piece` bytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side * (3 * side + 1)), 0)
    pieces = b"".join(chunk(b"IDAT", rows[at : at + piece]) for at in range(0, len(rows), piece))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pieces + chunk(b"IEND")


def gif_with(blocks: bytes) -> bytes:
    data = encoded(Image.new("RGB", (48, 32), "teal"), "GIF")
    begin = 13 + (3 << (data[10] & 7) + 1)  # behind the palette
    return data[:begin] + blocks + data[begin:]


def webp_with(count: int) -> bytes:
    data = encoded(Image.new("RGB", (48, 32), "teal"), "WebP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    chunks = data[12:] + b"more\0\0\0\0" * count
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def rle_bmp(width: int, height: int, before: bytes = b"") -> bytes:
    """A run-length coded BMP whose rows have one pixel, and then end."""
    rows = before + bytes([1, 7, 0, 0]) * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    begin = 14 + 40 + 1024
    start = b"BM" + struct.pack("<IHHI", begin + len(rows), 0, 0, begin)
    return start + header + bytes(1024) + rows


def tiff(
    width: int,
    height: int,
    tags: Sequence[tuple[int, int, int, int]],
    body: bytes,
    big: bool = False,
) -> bytes:
    """A grey TIFF of `body`, which begins at byte 8 (16 in BigTIFF).

    tags: (tag, type, count, value or offset).
    """
    always = [(256, 4, 1, width), (257, 4, 1, height), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries = sorted([*always, *tags])
    if big:
        start = b"II\x2b\0" + struct.pack("<HHQ", 8, 0, 16 + len(body))
        directory = [struct.pack("<HHQQ", *entry) for entry in entries]
        count = struct.pack("<Q", len(entries))
    else:
        start = b"II\x2a\0" + struct.pack("<I", 8 + len(body))
        directory = [struct.pack("<HHII", *entry) for entry in entries]
        count = struct.pack("<H", len(entries))
    return start + body + count + b"".join(directory) + bytes(8)


def repeated_strips(count: int, side: int = 200, big: bool = False) -> bytes:
    """Strips that show the picture again and again; each takes 4 bytes, or 8."""
    begin, wide = (16, "Q") if big else (8, "I")
    places = struct.pack(f"<{wide}", begin) * count
    size = side * side
    tags = [(258, 3, 1, 8), (259, 3, 1, 1), (278, 4, 1, side - 1), (279, 4, 1, size)]
    tags.append((273, 16 if big else 4, count, begin + size))
    return tiff(side, side, tags, bytes(size) + places, big)


def thin_strips(count: int) -> bytes:
    tags = [(258, 3, 1, 8), (259, 3, 1, 1), (273, 4, count, 12), (278, 4, 1, 1), (279, 4, 1, 4)]
    return tiff(4, count, tags, bytes(4) + struct.pack("<I", 8) * count)


def high_tiles(count: int, height: int, places_in: int = 324) -> bytes:
    """A picture one pixel high, in packed tiles `height` pixels high."""
    packed = zlib.compress(bytes(16 * height), 9)
    places = struct.pack("<I", 8) * count + struct.pack("<I", len(packed)) * count
    begin = 8 + len(packed)
    tags = [(258, 3, 1, 8), (259, 3, 1, 8), (322, 4, 1, 16), (323, 4, 1, height)]
    tags += [(places_in, 4, count, begin), (325, 4, count, begin + 4 * count)]
    return tiff(16 * count, 1, tags, packed + places)


def many_tags(count: int, size: int = 1) -> bytes:
    """Tags that nobody knows, each of `size` bytes: the same bytes for all where they are many."""
    known = [(258, 3, 1, 8), (259, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, 8), (279, 4, 1, 64)]
    return tiff(
        8,
        8,
        [*known, *((40_000 + number, 7, size, 8) for number in range(count))],
        bytes(max(64, size)),
    )


def overlapping_exif(count: int, size: int) -> bytes:
    return b"Exif\0\0" + many_tags(count, size)


def in_segments(block: bytes) -> bytes:
    """An Exif block as a JPEG holds it."""
    parts = [block[at : at + 65_000] for at in range(6, len(block), 65_000)]
    return b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)


# Eight deflate blocks in 90 bytes: each brings its own codes, and holds nothing but its end.
NOTHING = bytes.fromhex(
    "04c081000000000090ff6b100007020000000040feaf41001c080000000000f9bf06017020000000"
    "0000e4ff1a04c081000000000090ff6b100007020000000040feaf41001c080000000000f9bf0601"
    "70200000000000e4ff1a"
)


def png_of_nothing(count: int) -> bytes:
    """A PNG of 16 x 16 pixels behind 8 * `count` blocks that hold nothing."""
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    packed = b"\x78\x9c" + NOTHING * count + zlib.compress(bytes(16 * 49))[2:]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND")


def shared_strips(count: int, packed: bytes, compression: int = 8) -> bytes:
    """A TIFF 4 pixels wide whose strips are one row each, all of them the same packed bytes."""
    begin, size = 8 + len(packed), 4 * count
    places = struct.pack("<I", 8) * count + struct.pack("<I", len(packed)) * count
    tags = [(258, 3, 1, 8), (259, 3, 1, compression), (273, 4, count, begin), (278, 4, 1, 1)]
    tags.append((279, 4, count, begin + size))
    return tiff(4, count, tags, packed + places)


def scans_in_tiles(count: int, side: int, more: int = 80) -> bytes:
    """A TIFF of one column of square tiles, all the same JPEG of 6 scans and `more`."""
    image = Image.new("L", (side, side), 7)
    packed = encoded(image, "JPEG", progressive=True)
    packed = packed[:-2] + packed[packed.rindex(b"\xff\xda") : -2] * more + packed[-2:]
    begin = 8 + len(packed)
    places = struct.pack("<I", 8) * count + struct.pack("<I", len(packed)) * count
    tags = [(258, 3, 1, 8), (259, 3, 1, 7), (322, 4, 1, side), (323, 4, 1, side)]
    tags += [(324, 4, count, begin), (325, 4, count, begin + 4 * count)]
    return tiff(side, side * count, tags, packed + places)


def resized(width: int, height: int) -> bytes:
    """A JPEG whose header alone says that it is large."""
    data = encoded(Image.new("RGB", (16, 16), "teal"), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def grid_of_large_cells(side: int, rows: int) -> bytes:
    """An AVIF of rows x rows cells of 64 x 64 pixels, it says; all are one of side x side."""
    cell = encoded(Image.new("RGB", (side, side), "teal"), "AVIF", speed=10, quality=1)
    boxes = {}
    for kind in (b"ftyp", b"hdlr", b"av1C", b"pixi", b"mdat"):
        at = cell.index(kind) - 4
        boxes[kind] = cell[at : at + int.from_bytes(cell[at : at + 4])]
    packed, cells = boxes[b"mdat"][8:], range(2, 2 + rows * rows)
    grid = struct.pack(">4B2H", 0, 0, rows - 1, rows - 1, 64 * rows, 64 * rows)
    kinds = [(1, b"grid"), *((item, b"av01") for item in cells)]
    names = [struct.pack(">I2H4sx", 2 << 24, item, 0, kind) for item, kind in kinds]
    sizes = [struct.pack(">3I", 0, pixels, pixels) for pixels in (64 * rows, 64)]
    # Which properties each item has (1: the grid's size ...); its codec must be known.
    has = [
        struct.pack(">H3B", 1, 2, 1, 4),
        *(struct.pack(">H4B", item, 3, 2, 0x83, 4) for item in cells),
    ]
    count = struct.pack(">IH", 0, 1 + len(cells))

    def meta(start: int) -> bytes:
        places = [
            (1, start, len(grid)),
            *((item, start + len(grid), len(packed)) for item in cells),
        ]
        at = [struct.pack(">3H2I", item, 0, 1, *place) for item, *place in places]
        properties = box(
            b"ipco", *(box(b"ispe", size) for size in sizes), boxes[b"av1C"], boxes[b"pixi"]
        )
        return box(
            b"meta",
            bytes(4),
            boxes[b"hdlr"],
            box(b"pitm", struct.pack(">IH", 0, 1)),
            box(b"iloc", struct.pack(">I2BH", 0, 0x44, 0, 1 + len(cells)), *at),
            box(b"iinf", count, *(box(b"infe", name) for name in names)),
            box(
                b"iref",
                bytes(4),
                box(b"dimg", struct.pack(f">{2 + len(cells)}H", 1, len(cells), *cells)),
            ),
            box(b"iprp", properties, box(b"ipma", struct.pack(">2I", 0, 1 + len(cells)), *has)),
        )

    start = len(boxes[b"ftyp"]) + len(meta(0)) + 8
    return boxes[b"ftyp"] + meta(start) + box(b"mdat", grid, packed)


# Each is made when a test asks for it: together they take a second.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG: scans": (lambda: scans(12_000), "more than 200 scans"),
    "JPEG: scans of many pixels": (
        lambda: scans(90, 5000),
        "more than 57 scans of 25,000,000 pixels",
    ),
    "JPEG: Exif segments": (
        lambda: jpeg_with(segment(0xE1, b"Exif\0\0ab") * 20_000),
        "more than 64 segments of Exif",
    ),
    "JPEG: empty segments": (
        lambda: jpeg_with(segment(0xE5, b"") * 20_000),
        "more than 2,000 segments",
    ),
    "JPEG: comments": (lambda: jpeg_with(segment(0xFE, b"") * 20_000), "more than 2,000 segments"),
    "JPEG: markers without a length": (
        lambda: jpeg_with(b"\xff\xd0" * 20_000),
        "more than 2,000 segments",
    ),
    "JPEG: padding": (
        lambda: jpeg_with(b"\xff" * 1_200_000),
        "more than 1,048,576 bytes between the segments",
    ),
    "JPEG: overlapping Exif values": (
        lambda: jpeg_with(in_segments(overlapping_exif(100, 1_000_000))),
        "overlapping",
    ),
    "PNG: empty chunks": (lambda: png_with(chunk(b"prIv") * 70_000), "more than 66,356 chunks"),
    "PNG: text chunks behind the pixels": (
        lambda: png_with(after=chunk(b"tEXt", b"a\0b") * 70_000),
        "chunks",
    ),
    "PNG: pixels in chunks of one byte": (lambda: png_in_pieces(160, 1), "chunks"),
    "PNG: overlapping Exif values": (
        lambda: png_with(chunk(b"eXIf", overlapping_exif(100, 1_000_000)[6:])),
        "overlapping",
    ),
    "JPEG: more pixels than any camera's": (
        lambda: resized(60_000, 60_000),
        "60000 x 60000 pixels are too many; allowed: 536,870,912",
    ),
    "PNG: blocks of nothing": (
        lambda: png_of_nothing(50_000),
        "4,500,028 bytes for 1,600 of pixels",
    ),
    "GIF: blocks of an extension": (
        lambda: gif_with(b"\x21\x99" + b"\x01a" * 100_000 + b"\0"),
        "blocks before the first frame",
    ),
    "GIF: comments": (
        lambda: gif_with(b"\x21\xfe" + b"\x01a" * 20_000 + b"\0"),
        "more than 8,192 blocks of comments",
    ),
    "GIF: bytes that mean nothing": (
        lambda: gif_with(bytes(100_000)),
        "blocks before the first frame",
    ),
    "WebP: chunks": (lambda: webp_with(70_000), "chunks"),
    "BMP: rows of one pixel": (
        lambda: rle_bmp(5000, 5000),
        "more than 16,777,216 run-length coded pixels",
    ),
    "BMP: ends of rows": (
        lambda: rle_bmp(16, 16, bytes(4_000_000)),
        "4,001,144 bytes for 544 of pixels",
    ),
    "TIFF: strips that share packed bytes": (
        lambda: shared_strips(20_000, b"\x78\x9c" + NOTHING * 10_000 + zlib.compress(bytes(4))[2:]),
        "overlapping pixels",
    ),
    "TIFF: scans of JPEG": (
        lambda: scans_in_tiles(40, 1024),
        "scans in tiles or strips of 1024 x 1024",
    ),
    "TIFF: strips again and again": (
        lambda: repeated_strips(20_000),
        "20,000 tiles or strips of 200 x 199 for 200 x 200 pixels",
    ),
    "BigTIFF: strips again and again": (
        lambda: repeated_strips(20_000, big=True),
        "20,000 tiles or strips of 200 x 199 for 200 x 200 pixels",
    ),
    "TIFF: strips": (lambda: thin_strips(140_000), "more than 131,072 tiles or strips"),
    "TIFF: high tiles": (
        lambda: high_tiles(100, 200_000),
        "100 tiles or strips of 16 x 200000 for 1600 x 1 pixels",
    ),
    "TIFF: high tiles, given as strips": (
        lambda: high_tiles(100, 200_000, places_in=273),
        "100 tiles or strips of 16 x 200000 for 1600 x 1 pixels",
    ),
    "TIFF: lengths of strips twice": (
        lambda: tiff(8, 8, [(273, 4, 1, 8), (279, 4, 1, 64), (279, 4, 1, 9)], bytes(64)),
        "tag 279 is there twice",
    ),
    "TIFF: tags": (lambda: many_tags(5000), "more than 4,096 tags"),
    "TIFF: overlapping values": (lambda: many_tags(100, 1_000_000), "overlapping"),
    "TIFF: a tag twice": (
        lambda: tiff(
            8, 8, [(256, 4, 1, 9), (258, 3, 1, 8), (273, 4, 1, 8), (279, 4, 1, 64)], bytes(64)
        ),
        "tag 256 is there twice",
    ),
}
