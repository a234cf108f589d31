"""Looks at an image's file, undecoded, for what would keep a decoder busy for ever.

A few kilobytes can cost minutes: each scan of a progressive JPEG goes through the whole picture
again and takes 10 bytes. So what a decoder repeats (scans, segments, chunks, tiles) is counted
before; that takes at most 50 ms, and says the same on each machine. The limits lie far beyond what
cameras and programs write. Times are of Pillow 13 on one core. Where counting is not enough, in
AVIF and HEIC, `apart` ends the decoder.

Each function takes a file's bytes and returns why it must not be decoded, or None. Whether the file
is whole, the decoder says. Standard library only: a copy of this file travels in the model package.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from math import ceil
from typing import Literal

# JPEG. libjpeg's own script makes 10 scans, programs that try for the smallest file up to 80, and
# libtiff allows 100. A scan takes about 0.6 ms a megapixel and colour.
MAX_SCANS = 200
MAX_SCANNED = 16 * 89_478_485  # pixels times scans
# A colour profile takes up to 255 segments, a depth map a hundred.
MAX_STORED = 512 << 20  # pixels; a photo of 48 megapixels takes 0.2 s where 1/8 is decoded
MAX_SEGMENTS = 2_000
MAX_EXIF = 64  # of these segments; one is usual, and Pillow's time grows with the square
MAX_FILLER = 1 << 20  # bytes between segments; each is a step in Python

# PNG and WebP. One more is allowed for 1,024 bytes: programs write 8 KB or more into each.
# A chunk takes 2 to 10 us.
MAX_CHUNKS = 65_536
MAX_TEXT = 1 << 20  # bytes, unpacked; Pillow refuses a picture for a longer one
MAX_TEXTS = 8  # that are read; one is usual
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
ORIENTATION_TEXTS = {
    (b"iTXt", b"XML:com.adobe.xmp"),
    (b"tEXt", b"Raw profile type exif"),
    (b"zTXt", b"Raw profile type exif"),
}

# GIF, before its first frame. One more is allowed for 64 bytes.
MAX_BLOCKS = 65_536
MAX_COMMENTS = 8_192  # of them; the time of Pillow 11 grows with their square

# Packed pixels may be larger than unpacked ones, but not by much: blocks of nothing take 0.1 us a
# byte in a PNG, and 0.2 us in a run-length coded BMP.
MAX_EXTRA = 1 << 20

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
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}

# TIFF 6.0: bytes of a value, by its type; 13 and above are of its supplements and of BigTIFF.
VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
VALUE_BYTES |= {16: 8, 17: 8, 18: 8}
WIDTH, HEIGHT, COMPRESSION, SAMPLES, PLANAR = 256, 257, 259, 277, 284
STRIP_BYTES, TILE_BYTES = 279, 325
JPEG_IN_TIFF = {6, 7}
STRIPS, STRIP_ROWS, TILES, TILE_WIDTH, TILE_HEIGHT = 273, 278, 324, 322, 323
LAYOUT = {WIDTH, HEIGHT, COMPRESSION, STRIPS, SAMPLES, STRIP_ROWS, STRIP_BYTES, PLANAR}
LAYOUT |= {TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES}


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
            if pixels > MAX_STORED:
                return f"{width} x {height} pixels are too many; allowed: {MAX_STORED:,}"
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


def in_several_scans(data: bytes) -> bool:
    """Return whether a JPEG's decoder holds the whole picture, at its full size.

    That is so where its colours, or the steps of a progressive one, come one after the other.
    """
    position, colours = 2, 0
    while match := MARKER.search(data, position):
        position = match.end()
        marker = data[position - 1]
        if marker in WITHOUT_LENGTH:
            continue
        if marker in START_OF_FRAME:
            colours = int.from_bytes(data[position + 7 : position + 8])
            if marker in PROGRESSIVE:
                return True
        if marker == START_OF_SCAN:
            return data[position + 2 : position + 3] != bytes([colours])
        position += int.from_bytes(data[position : position + 2])
    return True


def png(data: bytes) -> str | None:
    """Return why a PNG of these bytes must not be decoded, or None."""
    allowed = MAX_CHUNKS + len(data) // 1024
    packed = 0
    for number, (kind, chunk) in enumerate(_chunks(data)):
        if number == allowed:
            return _more_than(allowed, "chunks")
        if kind == b"IDAT":
            packed += len(chunk)
        if kind == b"eXIf":
            reason = _exif(chunk[8:-4])
            if reason:
                return reason
    if len(data) < 33:
        return None
    width, height, bits, colours = struct.unpack_from(">IIBB", data, 16)
    row = 1 + ceil(width * bits * PNG_CHANNELS.get(colours, 4) / 8)
    # Twice: an interlaced picture has more rows; and the chunks' own bytes
    return _overlong(packed, 2 * row * height + 16 * number)


def bare_png(data: bytes) -> bytes:
    """Return a PNG's chunks of pixels and orientation only.

    Pillow gives up a picture for a text that is long or a profile that is broken.
    """
    kept = [data[:8]]
    texts = 0
    before = b""
    complete = False  # where the run of chunks of pixels has ended, Pillow reads no other
    for kind, chunk in _chunks(data):
        complete |= before == b"IDAT" != kind
        before = kind
        if kind in PNG_PIXELS:
            needed = kind != b"IDAT" or not complete
        else:
            needed = texts < MAX_TEXTS and _says_orientation(kind, chunk)
            texts += needed
        if needed:
            kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (kind, bytes) of a PNG's chunks, the last one perhaps cut off."""
    position, kind = 8, b""
    while position + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, data[position : position + 12 + length]
        position += 12 + length


def _says_orientation(kind: bytes, chunk: bytes) -> bool:
    """Return whether an undamaged chunk of a PNG holds Exif or XMP that Pillow reads."""
    body = chunk[8:-4]
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return False
    if kind == b"eXIf":
        return True
    key, _, text = body.partition(b"\0")
    if len(text) > MAX_TEXT or (kind, key) not in ORIENTATION_TEXTS:
        return False
    if kind == b"zTXt":
        return _unpacks(text[1:])
    if kind == b"iTXt" and text[:1] == b"\1":
        return _unpacks(text[2:].split(b"\0", 2)[-1])
    return True


def _unpacks(packed: bytes) -> bool:
    decoder = zlib.decompressobj()
    try:
        decoder.decompress(packed, MAX_TEXT)
    except zlib.error:
        return False
    return not decoder.unconsumed_tail


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
    if header < 40 or compression not in (1, 2):
        return None
    pixels = abs(width * height)
    if pixels > MAX_RLE_PIXELS:
        return _more_than(MAX_RLE_PIXELS, "run-length coded pixels")
    # A run takes 2 bytes and shows a pixel at least, but at the end of a row.
    return _overlong(len(data), 2 * (pixels + abs(height)))


def tiff(data: bytes) -> str | None:
    """Return why a TIFF of these bytes must not be decoded, or None."""
    order: Literal["little", "big"] = "big"
    if data[:1] == b"I":
        order = "little"
    layout: dict[int, int] = {}
    packed: list[int] = []
    for number, (tag, kind, count, value) in enumerate(_entries(data)):
        if number == MAX_TAGS:
            return _more_than(MAX_TAGS, "tags")
        if tag in LAYOUT and tag in layout:
            return f"tag {tag} is there twice: how long decoding would take can't be told"
        if tag in (STRIP_BYTES, TILE_BYTES):
            packed += _integers(data, order, kind, count, value)
        if tag in (STRIPS, TILES, STRIP_BYTES, TILE_BYTES):
            layout[tag] = count
        elif tag in LAYOUT and count == 1 and VALUE_BYTES.get(kind, 9) <= len(value):
            layout[tag] = int.from_bytes(value[: VALUE_BYTES[kind]], order)
    width, height = layout.get(WIDTH, 0), layout.get(HEIGHT, 0)
    planes = 1
    if layout.get(PLANAR) == 2:
        planes = layout.get(SAMPLES, 1)
    strips = layout.get(STRIPS, 0)
    strip = width, min(layout.get(STRIP_ROWS, height), height)
    tile = layout.get(TILE_WIDTH, 0), layout.get(TILE_HEIGHT, 0)
    # libtiff takes the places of strips for those of tiles, too
    for given, (across, down) in ((strips, strip), (max(strips, layout.get(TILES, 0)), tile)):
        if not across or not down:
            continue
        tiles = max(given, ceil(width / across) * ceil(height / down) * planes)
        if tiles > MAX_TILES:
            return _more_than(MAX_TILES, "tiles or strips")
        cut = f"{tiles:,} tiles or strips of {across} x {down}"
        if tiles * across * down > max(MAX_TILED, 4 * width * height * planes):
            return f"{cut} for {width} x {height} pixels: decoding it could take minutes"
    size = sum(packed)
    if layout.get(COMPRESSION, 1) != 1 and size > max(MAX_VALUES, 2 * len(data)):
        return f"{size:,} bytes of overlapping pixels: decoding it could take minutes"
    if layout.get(COMPRESSION) in JPEG_IN_TIFF:
        across, down = strip
        if tile[0]:
            across, down = tile
        # Each byte is read so often, at most, and so is each scan.
        scans = data.count(b"\xff\xda") * max(1, ceil(size / len(data)))
        if scans * across * down > MAX_SCANNED:
            cut = f"tiles or strips of {across} x {down}"
            return f"{scans:,} scans in {cut}: decoding it could take minutes"
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


def stated_pixels(data: bytes) -> int:
    """Return how many pixels the largest image of an AVIF or HEIC has, by its header; 0: unsaid."""
    sizes = re.findall(rb"ispe\0{4}(.{4})(.{4})", data, re.DOTALL)
    return max(
        (int.from_bytes(width) * int.from_bytes(height) for width, height in sizes), default=0
    )


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
                return "overlapping values of tags: reading them could take minutes"
    return None


def _integers(data: bytes, order: str, kind: int, count: int, value: bytes) -> list[int]:
    """Return a tag's values, whole numbers; as many of them as lie in the file."""
    size = VALUE_BYTES.get(kind, 0)
    letter = {1: "B", 2: "H", 4: "I", 8: "Q"}.get(size)
    if letter is None:
        return []
    sign = {"little": "<", "big": ">"}[order]
    if size * count > len(value):
        (start,) = struct.unpack(sign + {4: "I", 8: "Q"}[len(value)], value)
        value = data[start : start + size * count]
    count = min(count, len(value) // size, MAX_TILES)
    return list(struct.unpack_from(f"{sign}{count}{letter}", value))


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


def _overlong(packed: int, unpacked: int) -> str | None:
    if packed <= unpacked + MAX_EXTRA:
        return None
    return f"{packed:,} bytes for {unpacked:,} of pixels: decoding it could take minutes"


def _more_than(allowed: int, what: str) -> str:
    return f"more than {allowed:,} {what}: decoding it could take minutes"
