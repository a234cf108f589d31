"""Every kind of picture that a user's folder holds, good and bad, made for real."""

import contextlib
import importlib.util
import io
import os
import struct
import sys
import warnings
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps, features

from trainer.images.decode import (
    MAX_ASPECT,
    ImageError,
    Preprocessing,
    Room,
    center_crop,
    prepare,
    shrink,
    shrink_here,
)

WHITE, RED = (255, 255, 255), (255, 0, 0)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def scene(width=48, height=32):
    """A smooth RGB picture without any symmetry, so that each turn of it looks different."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([255 * x / width, 255 * y / height, 90 + 60 * (x > 2 * y)], 2).astype(np.uint8)
    )


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def flat(mode, value):
    return Image.new(mode, (40, 30), value)


def tiff(order, values, sample_format=1):
    """An uncompressed grey TIFF; order: "<" (II) or ">" (MM). Pillow itself writes the machine's
    order only.
    """
    height, width = values.shape
    pixels = (
        8 + 2 + 10 * 12 + 4
    )  # where they begin: after the header, the number of tags, ten tags, and the end of the list
    tags = {
        256: width,
        257: height,
        258: values.itemsize * 8,
        259: 1,
        262: 1,
        273: pixels,
        277: 1,
        278: height,
        279: values.nbytes,
        339: sample_format,
    }
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    return header + entries + bytes(4) + values.astype(values.dtype.newbyteorder(order)).tobytes()


def png(width, height, bits, rows):
    """A PNG in colour whose header says what it likes about the bytes in `rows`."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# --- what comes out ---


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(48, 32, (16, 24)), (32, 48, (24, 16)), (30, 30, (16, 16)), (10, 7, (16, 22))],
)
def test_shorter_side_becomes_resize_in_every_format(form, width, height, expected):
    pixels = shrink(encoded(scene(width, height), form), 16, "bilinear")
    assert pixels.shape == (*expected, 3)
    assert pixels.dtype == np.uint8
    reference = np.asarray(
        scene(width, height).resize(expected[::-1], Image.Resampling.BILINEAR), int
    )
    assert np.abs(pixels - reference).mean() < 12  # the lossy formats and GIF's palette


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box"])
def test_resizes_with_the_named_filter(interpolation):
    reference = noise(48, 32).resize((24, 16), Image.Resampling[interpolation.upper()])
    assert np.array_equal(
        shrink(encoded(noise(48, 32), "PNG"), 16, interpolation), np.asarray(reference)
    )


def test_a_picture_of_the_right_size_is_left_as_it_is():
    assert np.array_equal(
        shrink(encoded(noise(28, 28), "PNG"), 28, "bilinear"), np.asarray(noise(28, 28))
    )


def test_path_bytes_and_open_file_give_the_same(tmp_path):
    data = encoded(scene(), "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    expected = shrink(data, 16, "bilinear")
    assert np.array_equal(shrink(path, 16, "bilinear"), expected)
    assert np.array_equal(shrink(str(path), 16, "bilinear"), expected)
    with path.open("rb") as file:
        assert np.array_equal(shrink(file, 16, "bilinear"), expected)


def test_result_is_the_callers_to_change():
    shrink(encoded(scene(), "PNG"), 16, "bilinear")[:] = 0


def test_format_is_told_by_content_not_by_name(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(scene(), "PNG"))
    assert shrink(path, 16, "bilinear").shape == (16, 24, 3)


@pytest.mark.parametrize(("width", "height", "resize"), [(1003, 667, 32), (65, 73, 4), (41, 33, 2)])
def test_a_jpeg_decoded_at_a_fraction_of_its_size_hardly_differs(width, height, resize):
    """33 pixels at a quarter are 8.25, which Pillow rounds up to 9: a shift unless the fraction is
    kept.
    """
    image = scene(width, height)
    size = (resize * width // min(width, height), resize * height // min(width, height))
    difference = shrink(encoded(image, "JPEG", quality=95), resize, "bilinear") - np.asarray(
        image.resize(size, Image.Resampling.BILINEAR), int
    )
    assert np.abs(difference).max() <= 12


def test_only_the_middle_of_a_very_long_picture_is_kept():
    strip = Image.new("RGB", (1000, 10), RED)
    strip.paste(WHITE, (480, 0, 520, 10))
    pixels = shrink(encoded(strip, "PNG"), 20, "box")
    assert pixels.shape == (20, 20 * MAX_ASPECT, 3)
    assert (pixels == 255).all()
    assert np.array_equal(
        shrink(encoded(strip.transpose(Image.Transpose.ROTATE_90), "PNG"), 20, "box"),
        np.rot90(pixels),
    )


def test_center_crop_cuts_the_middle_into_memory_of_its_own():
    pixels = np.arange(7 * 10 * 3, dtype=np.uint8).reshape(7, 10, 3)
    square = center_crop(pixels, 4)
    assert np.array_equal(square, pixels[1:5, 3:7])
    assert square.flags.c_contiguous
    assert not np.shares_memory(square, pixels)


def test_prepare_is_shrink_and_center_crop():
    data = encoded(noise(90, 60), "PNG")
    assert np.array_equal(
        prepare(data, Preprocessing(32, 24, "bicubic")),
        center_crop(shrink(data, 32, "bicubic"), 24),
    )


# --- kinds of pixels ---


def transparent_palette():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 40, 15))
    return encoded(
        image, "PNG", transparency=b"\x00\xff"
    )  # the upper half transparent, the lower one red


@pytest.mark.parametrize(
    ("data", "upper", "lower"),
    [
        (encoded(flat("L", 77), "PNG"), (77, 77, 77), (77, 77, 77)),
        (encoded(flat("1", 1), "PNG"), WHITE, WHITE),
        (encoded(flat("LA", (100, 0)), "PNG"), WHITE, WHITE),
        (encoded(flat("LA", (0, 128)), "PNG"), (127, 127, 127), (127, 127, 127)),
        (encoded(flat("RGBA", (9, 9, 9, 0)), "PNG"), WHITE, WHITE),
        (
            encoded(flat("RGBA", (255, 0, 0, 51)), "WebP", lossless=True),
            (255, 204, 204),
            (255, 204, 204),
        ),
        (encoded(flat("RGB", RED), "PNG", transparency=RED), WHITE, WHITE),
        (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), RED, RED),
        (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), RED, RED),
        (encoded(flat("RGB", RED).quantize(4), "PNG"), RED, RED),
        (transparent_palette(), WHITE, RED),
        (encoded(flat("RGB", RED), "GIF"), RED, RED),
    ],
    ids=[
        "L",
        "1",
        "LA-clear",
        "LA-half",
        "RGBA-clear",
        "RGBA-webp",
        "RGB-key",
        "CMYK-jpeg",
        "CMYK-tiff",
        "P",
        "P-alpha",
        "GIF",
    ],
)
def test_every_mode_becomes_rgb_on_white(data, upper, lower):
    pixels = shrink(data, 30, "bilinear").astype(int)
    assert np.abs(pixels[:13] - upper).max() <= 2
    assert np.abs(pixels[17:] - lower).max() <= 2


def test_only_the_first_frame_of_an_animation_is_seen():
    frames = [flat("RGB", WHITE), flat("RGB", RED)]
    for form in ("GIF", "WebP"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert (shrink(data, 10, "box") >= 250).all(), form


SIXTEEN = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(SIXTEEN), "PNG"),
        tiff("<", SIXTEEN),
        tiff(">", SIXTEEN),
    ],
    ids=["png", "tiff-little", "tiff-big"],
)
def test_16_bits_are_scaled_not_clipped(data):
    assert shrink(data, 4, "box")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_is_scaled():
    row = b"\x00" + struct.pack(">3H", 65535, 32768, 0) * 4
    assert shrink(png(4, 4, 16, row * 4), 4, "box")[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff("<", SIXTEEN.astype(np.int32), 2), "32-bit or signed pixels, whose range is unknown"),
        (tiff("<", np.full((4, 4), 0.5, np.float32), 3), "floating-point"),
    ],
    ids=["integer", "float"],
)
def test_pixels_of_unknown_range_are_refused(data, reason):
    with pytest.raises(ImageError, match=reason):
        shrink(data, 4, "box")


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP", "TIFF"])
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(scene(48, 32), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(shrink(data, 32, "bilinear"), expected)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_none(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(scene(), "PNG", exif=exif)
    assert np.array_equal(shrink(data, 32, "bilinear"), np.asarray(scene()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"garbage that is no TIFF header",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff\0",
    ],
)
def test_a_corrupt_exif_block_does_not_lose_the_picture(form, block):
    assert shrink(encoded(scene(), form, exif=b"Exif\0\0" + block), 16, "bilinear").shape == (
        16,
        24,
        3,
    )


# --- what can't be used ---


def test_a_decompression_bomb_is_refused_from_its_header_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width, height in [
            (60000, 60000),
            (12000, 12000),
        ]:  # beyond Pillow's error, and between its warning and its error
            with pytest.raises(ImageError, match=rf"{width} x {height} pixels are too many"):
                shrink(png(width, height, 8, bytes(1000)), 16, "bilinear")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(form, share):
    data = encoded(noise(64, 64), form)
    with pytest.raises(ImageError) as caught:
        shrink(data[: int(len(data) * share)], 16, "bilinear")
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it reads
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF"])
def test_hostile_bytes_give_pixels_or_a_picture_error(form):
    good = encoded(noise(24, 24), form)
    rng = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good)
        for position in rng.integers(0, min(len(bad), 200), 4):
            bad[position] = rng.integers(256)
        with contextlib.suppress(ImageError):
            assert min(shrink(bytes(bad), 16, "bilinear").shape[:2]) == 16


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (
            b"these are words, not a picture\n",
            "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC picture",
        ),
        (encoded(scene(), "PPM"), "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC picture"),
        (b"<svg/>", "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC picture"),
    ],
    ids=["empty", "text", "ppm", "svg"],
)
def test_what_is_no_picture_is_refused(data, reason, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError) as caught:
            shrink(source, 16, "bilinear")
        assert str(caught.value) == reason


def test_a_file_that_cannot_be_opened_is_not_taken_for_a_broken_picture(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in {
        "missing.jpg": "No such file or directory",
        "folder.jpg": "Is a directory",
    }.items():
        with pytest.raises(OSError, match=reason):
            shrink(tmp_path / name, 16, "bilinear")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(scene(), "PNG"))
    path.chmod(0)
    with pytest.raises(PermissionError):
        shrink(path, 16, "bilinear")


# --- AVIF and HEIC ---

needs_heic = pytest.mark.skipif(
    importlib.util.find_spec("pillow_heif") is None, reason="the extra heic is not installed"
)
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
MODERN = [pytest.param("AVIF", marks=needs_avif), pytest.param("HEIF", marks=needs_heic)]


def modern(image, form, **options):
    if form == "HEIF":
        from pillow_heif import from_pillow

        buffer = io.BytesIO()
        from_pillow(image).save(buffer, quality=-1, chroma=444, **options)
        return buffer.getvalue()
    return encoded(image, form, quality=100, subsampling="4:4:4", **options)


def distance(pixels, expected):
    return np.abs(pixels.astype(int) - expected.astype(int)).max()


@pytest.mark.parametrize("form", MODERN)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_avif_and_heic_give_the_pixels_of_the_picture_upright(form, orientation):
    image = scene(96, 64)
    exif = Image.Exif()
    exif[274] = orientation
    data = modern(image, form, exif=exif.tobytes())
    expected = shrink(encoded(image, "PNG", exif=exif), 32, "bilinear")
    assert distance(shrink(data, 32, "bilinear"), expected) <= 4
    assert np.array_equal(shrink(data, 32, "bilinear"), shrink(io.BytesIO(data), 32, "bilinear"))


@pytest.mark.parametrize("form", MODERN)
def test_transparent_avif_and_heic_lie_on_white(form):
    image = scene(64, 64).convert("RGBA")
    image.putalpha(Image.fromarray(np.kron([[0, 255]], np.ones((64, 32))).astype(np.uint8)))
    small = shrink(modern(image, form), 64, "bilinear")
    assert (small[:, :28] > 250).all()
    assert distance(small[:, 36:], np.asarray(scene(64, 64))[:, 36:]) <= 6


@pytest.mark.parametrize("form", MODERN)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_half_an_avif_or_heic_is_a_broken_picture(form, share):
    data = modern(noise(64, 64), form)
    with pytest.raises(ImageError):
        shrink(data[: int(share * len(data))], 16, "bilinear")


@pytest.mark.parametrize("form", MODERN)
def test_an_avif_or_heic_of_too_many_pixels_is_refused_before_they_are_decoded(form):
    with pytest.raises(ImageError, match="6,144 pixels are too many"):
        shrink(modern(scene(96, 64), form), 16, "bilinear", Room(6000))


@needs_heic
def test_a_thumbnail_in_a_heic_never_stands_for_the_picture():
    from pillow_heif import from_pillow

    image = noise(640, 480)
    plain, thumbed = io.BytesIO(), io.BytesIO()
    from_pillow(image).save(plain, quality=-1, chroma=444)
    file = from_pillow(image)
    file[0].info["thumbnails"] = [256]
    file.save(thumbed, quality=-1, chroma=444)
    assert len(thumbed.getvalue()) > len(plain.getvalue()) + 1000
    assert np.array_equal(
        shrink(plain.getvalue(), 64, "bilinear"), shrink(thumbed.getvalue(), 64, "bilinear")
    )


def test_what_cannot_be_read_here_says_what_would_read_it(monkeypatch):
    heic = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")
    avif = heic.replace(b"heic", b"avif")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="HEIC, which is read where pillow-heif is installed"):
        shrink_here(heic, 16, "bilinear", Room())
    monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
    monkeypatch.delattr(PIL, "AvifImagePlugin", raising=False)
    with pytest.raises(ImageError, match=r"AVIF, which Pillow reads from 11.3 on"):
        shrink_here(avif, 16, "bilinear", Room())


def test_a_film_is_no_picture():
    film = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"mp41") + bytes(100)
    with pytest.raises(ImageError, match="not a JPEG"):
        shrink(film, 16, "bilinear")
