"""The one decode-resize-crop: training, evaluation, the packed cache and serving all use it.

In two steps: `shrink` decodes an image and makes it small, once; `center_crop` cuts the square
that the network sees. It needs Pillow, NumPy and the standard library only, because a copy of this
file travels in the model package.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from trainer.common.errors import PackhorseError
from trainer.images import bounds

Source = str | os.PathLike[str] | bytes | BinaryIO  # a path, a file's bytes, or an open binary file

# Pillow's Image.MAX_IMAGE_PIXELS. It limits what is decoded, not what the header says: a JPEG is
# decoded at a fraction of its size.
MAX_PIXELS = 89_478_485
BYTES_A_PIXEL = 20  # of memory, at most (WebP with transparency), while an image is decoded
# Longer to shorter side: what sticks out is cut off, or a 1 x 50,000 strip would become an image of
# 256 x 12,800,000.
MAX_ASPECT = 4

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}

# TIFF 6.0: the numbers of tags, and two of their values.
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2

Decoder = Callable[[BinaryIO], ImageFile.ImageFile]

GREY_STEP = {"L;2": 85, "L;4": 17}  # of a PNG's 2 and 4 bits, which Pillow spreads over 0..255


class _Png(PngImagePlugin.PngImageFile):
    """A PNG of the chunks that its pixels need. Its transparent colour is as deep as its pixels.

    low: 16-bit colours are read as their upper bytes; where one is transparent, the lower ones.
    """

    low: PngImagePlugin.PngImageFile | None = None

    def __init__(self, file: BinaryIO) -> None:
        data = bounds.bare_png(file.read())
        super().__init__(BytesIO(data))
        if "transparency" not in self.info:
            return
        for tile in self.tile:
            if tile.args in GREY_STEP:
                self.info["transparency"] *= GREY_STEP[tile.args]
            elif tile.args == "RGB;16B":
                self.low = PngImagePlugin.PngImageFile(BytesIO(data))
                self.low.tile = [tile._replace(args="RGB;16L")]


# The decoders are called directly, never through Image.open, because that warns of large images,
# and Python's warning filters are one for the whole process: no thread may change them. The first
# bytes of a file tell its format; its name does not matter. Beside each stands what looks for files
# that would keep it busy for ever.
DECODERS: dict[bytes, tuple[Decoder, Callable[[bytes], str | None]]] = {
    b"\xff\xd8\xff": (JpegImagePlugin.JpegImageFile, bounds.jpeg),
    b"\x89PNG\r\n\x1a\n": (_Png, bounds.png),
    b"RIFF": (WebPImagePlugin.WebPImageFile, bounds.webp),
    b"BM": (BmpImagePlugin.BmpImageFile, bounds.bmp),
    b"GIF8": (GifImagePlugin.GifImageFile, bounds.gif),
    b"II\x2a\x00": (TiffImagePlugin.TiffImageFile, bounds.tiff),  # little-endian
    b"MM\x00\x2a": (TiffImagePlugin.TiffImageFile, bounds.tiff),  # big-endian
    b"II\x2b\x00": (TiffImagePlugin.TiffImageFile, bounds.tiff),  # BigTIFF
    b"MM\x00\x2b": (TiffImagePlugin.TiffImageFile, bounds.tiff),
}

# What the first box of an AVIF or HEIC file calls itself (ISO/IEC 23008-12). Both are read by what
# may be missing: AVIF by Pillow 11.3 and later, HEIC by pillow-heif.
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})

# EXIF's orientation tag (TIFF 6.0, tag 274): what turns the stored image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


UNKNOWN_RANGE = "whose range is unknown; allowed: 8 or 16 bits a channel"
UNKNOWN = "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC picture"


class ImageError(PackhorseError, ValueError):
    """An image can't be used. The message is the reason, in a few words, without the file."""


class Room:
    """Room for the pixels that are decoded at once, on all threads that share it."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self.pixels = pixels
        self._left = pixels
        self._turn = threading.Lock()  # who came first is served first, also for much
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int, image: str) -> Iterator[None]:
        """Hold so much of it, which may mean to wait. Raise ImageError where it is too small."""
        if pixels > self.pixels:
            raise ImageError(
                f"{image} are too many (a decompression bomb?); allowed: {self.pixels:,} decoded"
            )
        with self._turn, self._changed:
            self._changed.wait_for(lambda: pixels <= self._left)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before the network sees it.

    resize: its shorter side after shrinking, in pixels. size: the centre square cut from that, in
    pixels.
    interpolation: "bilinear", "bicubic", "lanczos" or "box".
    """

    resize: int
    size: int
    interpolation: str


def prepare(
    source: Source, preprocessing: Preprocessing, room: Room | None = None
) -> NDArray[np.uint8]:
    """Return the image as evaluation and serving see it: RGB, uint8 [size, size, 3].

    Raise what `shrink` raises.
    """
    small = shrink(source, preprocessing.resize, preprocessing.interpolation, room)
    return center_crop(small, preprocessing.size)


def shrink(
    source: Source, resize: int, interpolation: str, room: Room | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG, WebP, BMP, GIF (first frame), TIFF, AVIF or HEIC image, and shrink it.

    It is turned upright, and its shorter side gets `resize` pixels: return RGB, uint8 [H, W, 3],
    min(H, W) == resize. Transparency is laid on white, 16-bit values are scaled to 8 bits, and the
    longer side is cut to MAX_ASPECT times the shorter one. room: what others decode meanwhile
    counts too; without it, MAX_PIXELS for this image alone. Raise ImageError, whatever is wrong
    with its bytes; OSError or MemoryError where the machine can't read them or has no room for
    them.
    """
    data, room = _bytes(source), room or Room()
    if data[4:8] != b"ftyp":
        return shrink_here(data, resize, interpolation, room)
    # AVIF and HEIC are coded as films are: what keeps their decoders busy can't be counted, and
    # they are ended instead.
    reason = bounds.avif_or_heic(data)
    if reason:
        raise ImageError(reason)
    # imported here: it imports this module
    from trainer.images import apart

    pixels = bounds.stated_pixels(data) or room.pixels
    with room.taken(pixels, f"{pixels:,} pixels"):
        return apart.shrink(data, resize, interpolation, pixels)


def shrink_here(data: bytes, resize: int, interpolation: str, room: Room) -> NDArray[np.uint8]:
    """Do what `shrink` does, of a file's bytes and of any format, in this process."""
    resample = FILTERS[interpolation]
    try:
        image = _decoder(data)
        stored = f"{image.width} x {image.height} pixels"
        held = image.width * image.height
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least twice what is
        # asked for: several times as fast, and hardly different from the full image resized
        # (Pillow's reducing_gap=2).
        draft = image.draft(None, (2 * resize, 2 * resize))
        if draft and not bounds.in_several_scans(data):
            held = image.width * image.height
        with room.taken(held, stored):
            image.load()
            width: float
            height: float
            width, height = image.size
            if draft:  # its size is rounded up: the image itself ends at a fraction of a pixel
                width, height = draft[1][2:]
            size, box = _target(width, height, resize)
            small = _rgb(image).resize(size, resample, box)
            return np.array(_upright(small, image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # On broken bytes Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise
        raise ImageError(_reason(error)) from error


def center_crop(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return a copy of the centre square of pixels [H, W, 3]: [size, size, 3], contiguous."""
    height, width = pixels.shape[:2]
    assert size <= min(height, width), (
        f"a square of {size} pixels does not fit into {height} x {width}"
    )
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def _bytes(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return source.read()


def _decoder(data: bytes) -> ImageFile.ImageFile:
    """Return the image in a file's bytes: its header is read, its pixels are not."""
    if not data:
        raise ImageError("the file is empty")
    for signature, (decoder, too_slow) in DECODERS.items():
        if data.startswith(signature):
            reason = too_slow(data)
            if reason:
                raise ImageError(reason)
            return decoder(BytesIO(data))
    if data[4:8] == b"ftyp":
        return _avif_or_heic(data)
    raise ImageError(UNKNOWN)


def _avif_or_heic(data: bytes) -> ImageFile.ImageFile:
    reason = bounds.avif_or_heic(data)
    if reason:
        raise ImageError(reason)
    end = min(int.from_bytes(data[:4]), 1024)
    brands = {data[8:12], *(data[place : place + 4] for place in range(16, end, 4))}
    if brands & AVIF_BRANDS:
        return _avif(data)
    if brands & HEIC_BRANDS:
        return _heic(data)
    raise ImageError(UNKNOWN)  # a film, say


def _avif(data: bytes) -> ImageFile.ImageFile:
    try:
        # imported here: it may be missing.
        from PIL import AvifImagePlugin
    except ImportError as error:
        raise ImageError("AVIF, which Pillow reads from 11.3 on") from error
    if not AvifImagePlugin.SUPPORTED:
        raise ImageError("AVIF, which this Pillow was built without")
    return AvifImagePlugin.AvifImageFile(BytesIO(data))


def _heic(data: bytes) -> ImageFile.ImageFile:
    try:
        # imported here: an optional dependency.
        from pillow_heif import HeifImageFile, options
    except ImportError as error:
        raise ImageError("HEIC, which is read where pillow-heif is installed") from error
    # Else a thumbnail may stand for the image (`draft`), and a file that brings one gives others
    # pixels than one that does not.
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    image: ImageFile.ImageFile = HeifImageFile(BytesIO(data))  # type: ignore[no-untyped-call]
    return image


def optional_decoders() -> dict[str, str | None]:
    """Return the versions of what reads AVIF and HEIC, as far as it is installed."""
    versions: dict[str, str | None] = {"avif": None, "heic": None}
    if importlib.util.find_spec("PIL._avif"):
        versions["avif"] = features.version("avif")
    if importlib.util.find_spec("pillow_heif"):
        versions["heic"] = metadata.version("pillow-heif")
    return versions


def _target(
    width: float, height: float, resize: int
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Return the (width, height) after resizing, and the box of the image that it shows.

    The box is (left, upper, right, lower).
    """
    shown_width, shown_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, upper = (width - shown_width) // 2, (height - shown_height) // 2
    # The longer side is rounded down, as torchvision.transforms.Resize does.
    shorter = min(width, height)
    size = int(resize * shown_width / shorter), int(resize * shown_height / shorter)
    return size, (left, upper, left + shown_width, upper + shown_height)


def _rgb(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if image.mode == "F":
        raise ImageError(f"floating-point pixels, {UNKNOWN_RANGE}")
    if image.mode == "I" or SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ImageError(f"32-bit or signed pixels, {UNKNOWN_RANGE}")
    if image.mode.startswith("I;16"):
        return _from_16_bits(image, tags).convert("RGB")
    if image.mode == "La":  # Pillow converts it in two steps only
        image = image.convert("LA")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        if isinstance(image, _Png) and image.low is not None:
            transparent.putalpha(_opaque(image, image.low))
        white = Image.new("RGB", image.size, "white")
        white.paste(transparent, mask=transparent)
        return white
    if image.mode == "RGB":  # `convert` would copy it
        return image
    return image.convert("RGB")


def _from_16_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return it scaled: 65535 becomes 255. (Pillow's own conversion clips what is above 255.)"""
    values = np.asarray(image)
    if tags.get(BITS) == (12,):
        values = values << 4 | values >> 8
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = ~values
    scaled = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled)


def _opaque(image: _Png, low: ImageFile.ImageFile) -> Image.Image:
    """Return where 16-bit colours are not the transparent one: 255 there, else 0."""
    low.load()
    opaque = np.zeros((image.height, image.width), np.uint8)
    for channel, value in enumerate(image.info["transparency"]):
        for bytes_of, byte in ((image, value >> 8), (low, value & 255)):
            opaque |= np.asarray(bytes_of.getchannel(channel)) != byte
    opaque *= 255
    return Image.fromarray(opaque)


def _upright(small: Image.Image, original: Image.Image) -> Image.Image:
    try:
        orientation = original.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # A broken EXIF block fails in as many ways as broken pixels do, and is no reason to lose
        # the image.
        return small
    if orientation not in UPRIGHT:
        return small
    return small.transpose(UPRIGHT[orientation])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
