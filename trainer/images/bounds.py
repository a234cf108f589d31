"""Looks at an image's file, undecoded, for what would keep a decoder busy for ever.

A few kilobytes can cost minutes: each scan of a progressive JPEG goes through the whole picture
again and takes 10 bytes. A deadline does not help, since Python can't stop a decoder. So what a
decoder repeats (scans, segments, chunks, tiles) is counted before; that takes at most 50 ms.
The limits lie far beyond what cameras and programs write. Times are of Pillow 13 on one core.

Each function takes a file's bytes and returns why it must not be decoded, or None. Whether the file
is whole, the decoder says. Standard library only: a copy of this file travels in the model package.
"""

import re
import struct
from collections.abc import Iterator
from math import ceil
from typing import Literal

# JPEG. libjpeg's own script makes 10 scans, programs that try for the smallest file up to 80, and
# libtiff allows 100. A scan takes about 0.6 ms a megapixel and colour.
MAX_SCANS = 200
MAX_SCANNED = 16 * 89_478_485  # pixels times scans
# A colour profile takes up to 255 segments, a depth map a hundred.
MAX_SEGMENTS = 2_000
MAX_EXIF = 64  # of these segments; one is usual, and Pillow's time grows with the square
MAX_FILLER = 1 << 20  # bytes between segments; each is a step in Python

# PNG and WebP. One more is allowed for 1,024 bytes: programs write 8 KB or more into each.
# A chunk takes 2 to 10 us.
MAX_CHUNKS = 65_536
MAX_PROFILES = 8  # PNG allows one; each may unpack to 1 MB

# GIF, before its first frame. One more is allowed for 64 bytes.
MAX_BLOCKS = 65_536
MAX_COMMENTS = 8_192  # of them; the time of Pillow 11 grows with their square

# BMP, run-length coded: Pillow decodes it in Python, 0.1 us a pixel.
MAX_RLE_PIXELS = 16_777_216

# TIFF. As many tags as libtiff allows. A tile or strip takes 5 us.
MAX_TAGS = 4_096
MAX_TILES = 131_072
MAX_TILED = 64 << 20  # pixels of all tiles, or of 4 images: a small one does not fill its tiles
MAX_VALUES = 64 << 20  # bytes of all tags' values, or of 2 files: beyond it, they lie on each other

# AVIF and HEIC. A photo of 48 megapixels has 400 items, most of them tiles; decoders look through
# all of them for each.
MAX_ITEMS = 4_096
MAX_EXTENTS = 65_536  # the pieces that items lie in
MAX_BOXES = 16_384

MARKER = re.compile(rb"\xff[^\x00\xff]")
MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # restart markers are part of a scan
START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}

# TIFF 6.0: bytes of a value, by its type; 13 and above are of its supplements and of BigTIFF.
VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
VALUE_BYTES |= {16: 8, 17: 8, 18: 8}
WIDTH, HEIGHT, SAMPLES, PLANAR = 256, 257, 277, 284
STRIPS, STRIP_ROWS, TILES, TILE_WIDTH, TILE_HEIGHT = 273, 278, 324, 322, 323
LAYOUT = {WIDTH, HEIGHT, STRIPS, SAMPLES, STRIP_ROWS, PLANAR, TILE_WIDTH, TILE_HEIGHT, TILES}


def jpeg(data: bytes) -> str | None:
    """Return why a JPEG of these bytes must not be decoded, or None."""
    scans = segments = filler = pixels = 0
    exif: list[bytes] = []
    position = 2
    while True:
        marker_pattern = (MARKER, MARKER_AFTER_SCAN)[scans > 0]
        match = marker_pattern.search(data, position)
        if match is None:
            break
        if not scans:
            filler += match.start() - position
        position = match.end()
        marker = data[position - 1]
        if marker == END_OF_IMAGE:  # behind it, phones keep videos and second pictures
            break
        segments += 1
        if segments > MAX_SEGMENTS:
            return _more_than(MAX_SEGMENTS, "segments")
        if filler > MAX_FILLER:
            return _more_than(MAX_FILLER, "bytes between the segments")
        if marker in WITHOUT_LENGTH:
            continue
        end = position + int.from_bytes(data[position : position + 2])
        if marker in START_OF_FRAME and len(data) >= position + 7:
            height, width = struct.unpack_from(">HH", data, position + 3)
            pixels = max(pixels, height * width)
        elif marker == APP1 and data.startswith(b"Exif\0\0", position + 2):
            exif.append(data[position + 8 : end])
            if len(exif) > MAX_EXIF:
                return _more_than(MAX_EXIF, "segments of Exif")
        elif marker == START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                return _more_than(MAX_SCANS, "scans")
            if scans > 1 and scans * pixels > MAX_SCANNED:
                return _more_than(scans - 1, f"scans of {pixels:,} pixels")
        position = end
    return _exif(b"".join(exif))


def png(data: bytes) -> str | None:
    """Return why a PNG of these bytes must not be decoded, or None."""
    allowed = MAX_CHUNKS + len(data) // 1024
    chunks = profiles = 0
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks += 1
        profiles += kind == b"iCCP"
        if chunks > allowed:
            return _more_than(allowed, "chunks")
        if profiles > MAX_PROFILES:
            return _more_than(MAX_PROFILES, "colour profiles")
        if kind == b"IEND":
            break
        reason = None
        if kind == b"eXIf":
            reason = _exif(data[position + 8 : position + 8 + length])
        if reason:
            return reason
        position += 12 + length
    return None


def webp(data: bytes) -> str | None:
    """Return why a WebP of these bytes must not be decoded, or None."""
    allowed = MAX_CHUNKS + len(data) // 1024
    chunks = 0
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        chunks += 1
        if chunks > allowed:
            return _more_than(allowed, "chunks")
        reason = None
        if kind == b"EXIF":
            reason = _exif(data[position + 8 : position + 8 + length])
        if reason:
            return reason
        position += 8 + length + length % 2
    return None


def gif(data: bytes) -> str | None:
    """Return why a GIF of these bytes must not be decoded, or None."""
    allowed = MAX_BLOCKS + len(data) // 64
    blocks = comments = 0
    position = 13
    flags = int.from_bytes(data[10:11])
    if flags & 0x80:
        position += 3 << (flags & 7) + 1
    while position < len(data) and data[position] not in b",;":
        blocks += 1
        if data[position] != ord("!"):  # Pillow goes on to the next byte
            if blocks > allowed:
                return _more_than(allowed, "blocks before the first frame")
            position += 1
            continue
        comment = data[position + 1 : position + 2] == b"\xfe"
        netscape = data[position + 1 : position + 14] == b"\xff\x0bNETSCAPE2.0"
        unasked = 0  # blocks that Pillow takes, empty or not
        if not comment:
            unasked = 1 + netscape
        position += 2
        size = -1
        while position < len(data) and (size != 0 or unasked >= 0):
            size = data[position]
            position += 1 + size
            unasked -= 1
            blocks += 1
            comments += comment
            if comments > MAX_COMMENTS:
                return _more_than(MAX_COMMENTS, "blocks of comments")
            if blocks > allowed:
                return _more_than(allowed, "blocks before the first frame")
    return None


def bmp(data: bytes) -> str | None:
    """Return why a BMP of these bytes must not be decoded, or None."""
    if len(data) < 34:
        return None
    header, width, height, compression = struct.unpack_from("<Iii4xI", data, 14)
    if header >= 40 and compression in (1, 2) and abs(width * height) > MAX_RLE_PIXELS:
        return _more_than(MAX_RLE_PIXELS, "run-length coded pixels")
    return None


def tiff(data: bytes) -> str | None:
    """Return why a TIFF of these bytes must not be decoded, or None."""
    order: Literal["little", "big"] = "big"
    if data[:1] == b"I":
        order = "little"
    layout: dict[int, int] = {}
    for number, (tag, kind, count, value) in enumerate(_entries(data)):
        if number == MAX_TAGS:
            return _more_than(MAX_TAGS, "tags")
        if tag in LAYOUT and tag in layout:
            return f"tag {tag} is there twice: how long decoding would take can't be told"
        if tag in (STRIPS, TILES):
            layout[tag] = count
        elif tag in LAYOUT and count == 1 and VALUE_BYTES.get(kind, 9) <= len(value):
            layout[tag] = int.from_bytes(value[: VALUE_BYTES[kind]], order)
    width, height = layout.get(WIDTH, 0), layout.get(HEIGHT, 0)
    planes = 1
    if layout.get(PLANAR) == 2:
        planes = layout.get(SAMPLES, 1)
    strip = layout.get(STRIPS, 0), width, min(layout.get(STRIP_ROWS, height), height)
    tile = layout.get(TILES, 0), layout.get(TILE_WIDTH, 0), layout.get(TILE_HEIGHT, 0)
    for given, across, down in (strip, tile):
        if not across or not down:
            continue
        tiles = max(given, ceil(width / across) * ceil(height / down) * planes)
        if tiles > MAX_TILES:
            return _more_than(MAX_TILES, "tiles or strips")
        if tiles * across * down > max(MAX_TILED, 4 * width * height * planes):
            cut = f"{tiles:,} tiles or strips of {across} x {down}"
            return f"{cut} for {width} x {height} pixels: decoding it could take minutes"
    return _exif(data)


def avif_or_heic(data: bytes) -> str | None:
    """Return why an AVIF or HEIC of these bytes must not be decoded, or None."""
    for number, (kind, start, end) in enumerate(_boxes(data, 0, len(data))):
        if number == MAX_BOXES:
            return _more_than(MAX_BOXES, "boxes")
        items = extents = 0
        if kind == b"iloc":
            items, extents = _located(data, start, end)
        elif kind in (b"ipma", b"iinf") and end - start >= 8:
            items = _count(data, start, kind == b"ipma" or data[start] > 0)
        if items > MAX_ITEMS:
            return _more_than(MAX_ITEMS, "items")
        if extents > MAX_EXTENTS:
            return _more_than(MAX_EXTENTS, "pieces of items")
    return None


# Boxes that hold others, and after how many bytes of their own (ISO/IEC 14496-12, 23008-12).
HOLDERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"iref": 4, b"grpl": 0, b"dinf": 0}
HOLDERS |= dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl"), 0)


def _boxes(
    data: bytes, position: int, end: int, depth: int = 0
) -> Iterator[tuple[bytes, int, int]]:
    """Yield the (type, start, end) of each box, also of those in others."""
    while position + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if length == 1 and position + 16 <= end:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        if length == 0:
            length = end - position
        position += max(length, 8)
        inner_end = min(position, end)
        yield kind, start, inner_end
        if kind in HOLDERS and depth < 8:
            inner = start + HOLDERS[kind]
            if kind == b"iinf" and data[start : start + 1] > b"\0":
                inner += 2
            yield from _boxes(data, inner, inner_end, depth + 1)


def _count(data: bytes, start: int, is_long: bool) -> int:
    if is_long:
        return int.from_bytes(data[start + 4 : start + 8])
    return int.from_bytes(data[start + 4 : start + 6])


def _located(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Return how many items an iloc box has, and how many pieces these lie in."""
    if end - start < 8:
        return 0, 0
    version, sizes, more = data[start], data[start + 4], data[start + 5]
    offset_size, length_size, base_size = sizes >> 4, sizes & 15, more >> 4
    index_size = 0
    if version in (1, 2):
        index_size = more & 15
    id_size = 2
    if version == 2:
        id_size = 4
    items = int.from_bytes(data[start + 6 : start + 6 + id_size])
    position, extents = start + 6 + id_size, 0
    before = id_size + 2 * (version in (1, 2)) + 2 + base_size
    for _ in range(min(items, MAX_ITEMS)):
        if position + before + 2 > end:
            break
        count = int.from_bytes(data[position + before : position + before + 2])
        extents += count
        position += before + 2 + count * (offset_size + length_size + index_size)
    return items, extents


def _exif(block: bytes) -> str | None:
    """Look at the values of a TIFF file's first directory, or of an Exif block, which is one."""
    block = block.removeprefix(b"Exif\0\0")
    size = 0
    for _, kind, count, value in _entries(block):
        length = VALUE_BYTES.get(kind, 0) * count
        if length > len(value):
            if length > len(block):  # Pillow reads no further
                break
            size += length
            if size > max(MAX_VALUES, 2 * len(block)):
                return "values of tags that lie on each other: reading them could take minutes"
    return None


def _entries(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the (tag, type, count, value or its offset) of a TIFF's first directory."""
    order = ">"
    if data[:2] == b"II":
        order = "<"
    # Where the directory's offset lies, its format, that of the count of entries, and of an entry.
    at, offset, counter, layout = 4, "I", "H", "HHI4s"
    if 43 in data[2:4]:  # BigTIFF
        at, offset, counter, layout = 8, "Q", "Q", "HHQ8s"
    entry = struct.Struct(order + layout)
    try:
        (start,) = struct.unpack_from(order + offset, data, at)
        (count,) = struct.unpack_from(order + counter, data, start)
    except (struct.error, OverflowError):
        return
    start += struct.calcsize(order + counter)
    for number in range(min(count, (len(data) - start) // entry.size)):
        yield entry.unpack_from(data, start + number * entry.size)


def _more_than(allowed: int, what: str) -> str:
    return f"more than {allowed:,} {what}: decoding it could take minutes"
