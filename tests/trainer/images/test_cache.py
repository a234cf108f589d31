"""Packed pixels: always those of `shrink`, decoded once, whatever happens in between. Kills, races
and full disks are real ones.
"""

import errno
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_type_hints

import numpy as np
import PIL
import pytest
from PIL import Image

from tests.conftest import PROJECT
from trainer.common import files, journal
from trainer.common.errors import Interrupted, Unreadable
from trainer.images import cache, identity
from trainer.images.cache import PixelCache, TooLarge
from trainer.images.decode import ImageError, shrink
from trainer.images.identity import TICK

RESIZE = 24
COUNT = 20

opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else None)


def draw(path, seed, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    ).save(path)
    return str(path)


def settle(paths):
    """Waits until the files' times are old enough to be trusted."""
    newest = max(Path(path).stat().st_ctime_ns for path in paths)
    while time.time_ns() - newest <= TICK:
        time.sleep(0.001)
    return paths


@pytest.fixture(scope="session")
def shared_pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    forms = itertools.cycle(["png", "jpg", "webp", "bmp"])
    paths = [
        draw(root / f"{seed:02d}.{next(forms)}", seed, width=30 + 3 * seed, height=60 - 2 * seed)
        for seed in range(COUNT)
    ]
    return settle(paths)


@pytest.fixture
def own_pictures(tmp_path, shared_pictures):
    """Copies that a test may change."""
    shutil.copytree(Path(shared_pictures[0]).parent, tmp_path / "own")
    return settle([str(tmp_path / "own" / Path(path).name) for path in shared_pictures])


@pytest.fixture
def decoded(monkeypatch):
    """The pictures that are really decoded, as their bytes."""
    seen = []

    def watched(data, *settings):
        seen.append(data)
        return shrink(data, *settings)

    monkeypatch.setattr(cache, "shrink", watched)
    return seen


@pytest.fixture
def often(monkeypatch):
    """Commits every few pictures, as a build of thousands does."""
    monkeypatch.setattr(cache, "COMMIT_EVERY", 3)


def quiet(done, total):
    pass


def packed(
    paths,
    root,
    resize=RESIZE,
    interpolation="bilinear",
    workers=2,
    max_bytes=None,
    on_progress=quiet,
    keep=True,
):
    digests = root.with_name(f"{root.name} digests")
    cached = PixelCache(root, resize, interpolation, max_bytes, digests)
    return cached.pack(paths, workers, on_progress, keep)


def check(result, paths, resize=RESIZE, interpolation="bilinear"):
    for path in paths:
        assert np.array_equal(result(path), shrink(path, resize, interpolation)), path


def contents(root):
    """Bytes of the only store's files, by name."""
    (directory,) = root.iterdir()
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def entries(root):
    """The index of the only store."""
    (data,) = (data for name, data in contents(root).items() if name.endswith(".index"))
    values, whole = journal.parse(data, *get_type_hints(cache.Entry).values())
    assert whole
    return [cache.Entry(*value) for value in values]


def stop_at(count):
    def on_progress(done, total):
        if done >= count:
            raise Interrupted("SIGTERM")

    return on_progress


# --- what comes out ---


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box"])
def test_packed_pixels_are_those_of_shrink(tmp_path, shared_pictures, interpolation):
    check(
        packed(shared_pictures, tmp_path, interpolation=interpolation),
        shared_pictures,
        interpolation=interpolation,
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_pixels_are_read_only(tmp_path, shared_pictures, keep):
    pixels = packed(shared_pictures, tmp_path, keep=keep)(shared_pictures[0])
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_store_is_the_same_to_the_byte_for_any_number_of_threads(
    tmp_path, shared_pictures, often, workers
):
    packed(shared_pictures, tmp_path / "two", workers=2)
    packed(shared_pictures, tmp_path / "other", workers=workers)
    assert contents(tmp_path / "two") == contents(tmp_path / "other")
    assert contents(tmp_path / "two").keys() == {"1.index", "1.pixels"}


def test_progress_counts_every_picture_in_the_callers_thread(tmp_path, shared_pictures):
    seen = []
    packed(
        shared_pictures,
        tmp_path,
        on_progress=lambda *numbers: seen.append((*numbers, threading.current_thread())),
    )
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (COUNT, COUNT, threading.current_thread())
    assert {done for done, _, _ in seen} == set(range(COUNT + 1))


# --- what is decoded again, and what is not ---


def test_a_second_run_opens_no_picture(tmp_path, shared_pictures, decoded):
    packed(shared_pictures, tmp_path)
    assert len(decoded) == COUNT
    before = contents(tmp_path)
    opened.clear()
    check_later = packed(shared_pictures, tmp_path)
    assert not set(shared_pictures) & set(map(str, opened))
    assert len(decoded) == COUNT
    assert contents(tmp_path) == before
    check(check_later, shared_pictures)


def test_pictures_whose_digests_are_known_are_not_hashed_once_more(
    tmp_path, own_pictures, monkeypatch
):
    memo, hashed = tmp_path / "store digests", []
    known = identity.digests(own_pictures, memo)
    of_bytes = identity.of_bytes
    monkeypatch.setattr(identity, "of_bytes", lambda data: hashed.append(data) or of_bytes(data))
    changed = own_pictures[3]
    os.utime(changed)
    settle(own_pictures)
    result = packed(own_pictures, tmp_path / "store")
    check(result, own_pictures)
    assert result.digests == known
    read = {Path(path).read_bytes(): path for path in own_pictures}
    assert [read[data] for data in hashed if data in read] == [changed]


def test_a_picture_that_changes_while_it_is_read_is_hashed_as_it_was_read(
    tmp_path, own_pictures, monkeypatch
):
    """Its digest was known: pixels and digest must be of the same bytes all the same."""
    identity.digests(own_pictures, tmp_path / "store digests")
    reading, target, other = cache.read, own_pictures[0], Path(own_pictures[1]).read_bytes()

    def read(path):
        if path == target:
            Path(path).write_bytes(other)
        return reading(path)

    monkeypatch.setattr(cache, "read", read)
    result = packed(own_pictures, tmp_path / "store", workers=0)
    assert result.digests[target] == identity.of_bytes(other)


def test_touched_copied_and_moved_pictures_are_not_decoded_again(tmp_path, own_pictures, decoded):
    packed(own_pictures, tmp_path / "store")
    Path(own_pictures[0]).touch()
    copy = shutil.copy(own_pictures[1], tmp_path / "copy")
    moved = str(Path(own_pictures[2]).rename(tmp_path / "moved"))
    paths = [own_pictures[0], own_pictures[1], copy, moved]
    check(packed(paths, tmp_path / "store"), paths)
    assert len(decoded) == COUNT


def test_equal_pictures_share_their_pixels(tmp_path, own_pictures):
    copy = shutil.copy(own_pictures[0], tmp_path / "copy")
    result = packed([*own_pictures, copy], tmp_path / "store", workers=3)
    check(result, [own_pictures[0], copy])
    assert len(contents(tmp_path / "store")["1.pixels"]) == sum(
        result(path).nbytes for path in own_pictures
    )


def test_only_a_changed_picture_is_decoded_again(tmp_path, own_pictures, decoded):
    packed(own_pictures, tmp_path / "store")
    draw(Path(own_pictures[3]), seed=99)
    check(packed(own_pictures, tmp_path / "store"), own_pictures)
    assert len(decoded) == COUNT + 1


def test_a_change_that_keeps_size_and_modification_time_is_noticed(tmp_path):
    path = tmp_path / "picture.bmp"
    settle([draw(path, seed=1)])
    packed([str(path)], tmp_path / "store")
    times, size = (path.stat().st_atime_ns, path.stat().st_mtime_ns), path.stat().st_size
    draw(path, seed=2)
    os.utime(path, ns=times)
    settle([path])
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (times[1], size)
    check(packed([str(path)], tmp_path / "store"), [str(path)])


def test_pictures_that_change_at_once_are_noticed(tmp_path):
    path = tmp_path / "picture.bmp"
    for seed in range(20):
        draw(path, seed)
        check(packed([str(path)], tmp_path / "store", workers=0), [str(path)])


def test_times_that_have_just_been_set_are_not_trusted(tmp_path, own_pictures, monkeypatch):
    monkeypatch.setattr(identity, "TICK", 3600 * 10**9)
    packed(own_pictures, tmp_path / "store")
    opened.clear()
    check_later = packed(own_pictures, tmp_path / "store")
    assert set(own_pictures) <= set(map(str, opened))
    check(check_later, own_pictures)


@pytest.mark.parametrize("change", [{"resize": 20}, {"interpolation": "box"}])
def test_other_settings_have_pixels_of_their_own(tmp_path, shared_pictures, decoded, change):
    packed(shared_pictures, tmp_path)
    check(packed(shared_pictures, tmp_path, **change), shared_pictures, **change)
    assert len(decoded) == 2 * COUNT


def test_other_code_and_another_pillow_are_another_store(tmp_path, monkeypatch):
    before = PixelCache(tmp_path, 24, "box").directory
    assert PixelCache(tmp_path, 24, "box").directory == before
    with monkeypatch.context() as patch:
        patch.setattr(PIL, "__version__", "0.0")
        assert PixelCache(tmp_path, 24, "box").directory != before
    edited = tmp_path / "decode.py"
    edited.write_text(Path(cache.decode.__file__).read_text() + "\n")
    monkeypatch.setattr(cache.decode, "__file__", str(edited))
    assert PixelCache(tmp_path, 24, "box").directory != before


def test_other_runs_and_data_sets_add_to_the_same_store(
    tmp_path, own_pictures, shared_pictures, decoded
):
    first = packed(own_pictures[:5], tmp_path / "store")
    second = packed([*shared_pictures[3:8], *own_pictures[8:10]], tmp_path / "store")
    assert len(decoded) == 10
    check(first, own_pictures[:5])
    check(second, [*shared_pictures[3:8], *own_pictures[8:10]])


def test_relative_paths_are_those_of_the_working_directory(tmp_path, monkeypatch):
    settle([draw(tmp_path / place / "1.png", seed) for seed, place in enumerate(["here", "there"])])
    for place in ["here", "there", "here"]:
        monkeypatch.chdir(tmp_path / place)
        opened.clear()
        check_later = packed(["1.png"], tmp_path / "store")
        known = not {"1.png", str(tmp_path / place / "1.png")} & set(map(str, opened))
        check(check_later, ["1.png"])
    assert known


def test_any_file_name_is_possible(tmp_path):
    paths = [
        draw(tmp_path / os.fsdecode(name), seed)
        for seed, name in enumerate([b"\xff.png", "ä\u2028.png".encode(), b"a\nb.png", b'"\\.png'])
    ]
    packed(settle(paths), tmp_path / "store")
    opened.clear()
    check_later = packed(paths, tmp_path / "store")
    assert not {str(path) for path in opened} & set(paths)
    check(check_later, paths)


# --- pictures that can't be used ---


def test_broken_pictures_are_remembered_with_their_reasons(tmp_path, own_pictures, decoded):
    Path(own_pictures[4]).write_bytes(Path(own_pictures[4]).read_bytes()[:60])
    Path(own_pictures[7]).write_bytes(b"no picture")
    settle(own_pictures)
    for _ in range(2):
        result = packed(own_pictures, tmp_path / "store")
        assert result.broken.keys() == {own_pictures[4], own_pictures[7]}
        for path in result.broken:
            with pytest.raises(ImageError) as expected:
                shrink(path, RESIZE, "bilinear")
            with pytest.raises(ImageError) as found:
                result(path)
            assert str(found.value) == str(expected.value) == result.broken[path]
        check(result, [path for path in own_pictures if path not in result.broken])
    assert len(decoded) == COUNT


def test_a_mended_picture_is_examined_again(tmp_path, own_pictures):
    Path(own_pictures[0]).write_bytes(b"no picture")
    assert own_pictures[0] in packed(own_pictures, tmp_path / "store").broken
    draw(Path(own_pictures[0]), seed=5)
    check(packed(own_pictures, tmp_path / "store"), own_pictures)


def test_nothing_but_broken_pictures_is_no_fault(tmp_path):
    path = tmp_path / "1.jpg"
    path.touch()
    for _ in range(2):
        assert packed([str(path)], tmp_path / "store").broken == {str(path): "the file is empty"}


def test_what_can_not_be_read_or_has_no_memory_is_not_broken(tmp_path, monkeypatch):
    path = tmp_path / "1.png"
    monkeypatch.setattr(files, "PAUSES", (0.0,))
    with pytest.raises(Unreadable, match=f"{path}: it is missing"):
        packed([str(path)], tmp_path / "store")
    draw(path, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda *_: bytearray(1 << 62))
        with pytest.raises(Unreadable, match=f"{path}: this machine is out of memory"):
            packed(settle([str(path)]), tmp_path / "store")
    check(packed([str(path)], tmp_path / "store"), [str(path)])


def test_a_file_too_long_for_a_picture_is_never_read(tmp_path):
    path = tmp_path / "film.jpg"
    path.touch()
    os.truncate(path, 1 << 40)
    assert "1,099,511,627,776 bytes" in packed([str(path)], tmp_path / "store").broken[str(path)]


# --- kills, tears and damage ---

PACKER = """
import hashlib, os, signal, sys
from pathlib import Path
from typing import get_type_hints
from trainer.images import cache
root, point, *paths = sys.argv[1:]
cache.COMMIT_EVERY = 3
count = 0
def shrink(*arguments, original=cache.shrink):
    global count
    count += 1
    return original(*arguments)
cache.shrink = shrink
def on_progress(done, total):
    if point.startswith("hold") and done >= 1:
        Path(point.removeprefix("hold")).touch()
        while Path(point.removeprefix("hold")).exists():
            pass
    elif point.isdigit() and done >= int(point):
        os.kill(os.getpid(), signal.SIGKILL)
result = cache.PixelCache(Path(root), 24, "bilinear").pack(paths, 2, on_progress)
print(count, hashlib.sha256(b"".join(result(path).tobytes() for path in paths)).hexdigest())
"""


def start_packer(root, point, paths):
    """Packs in a process of its own. point: number of pictures after which it kills itself, or
    "hold" and a file: it is made after the first picture, and the process goes on when it is gone.
    """
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        [sys.executable, "-c", PACKER, str(root), point, *paths],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def digest(paths):
    return hashlib.sha256(
        b"".join(shrink(path, RESIZE, "bilinear").tobytes() for path in paths)
    ).hexdigest()


@pytest.mark.parametrize("points", [(0, 1), (3, 6), (4, 5, 7), (19,), (20,)])
def test_after_a_kill_the_next_run_goes_on(tmp_path, shared_pictures, often, decoded, points):
    for point in points:
        process = start_packer(tmp_path / "killed", str(point), shared_pictures)
        process.communicate(timeout=600)
        assert process.returncode == -9
    check(packed(shared_pictures, tmp_path / "killed"), shared_pictures)
    # What was committed is all there, but for what was on its way to the disk.
    kept, committed = COUNT - len(decoded), max(points) // 3 * 3
    assert committed - 3 <= kept <= committed
    assert len(entries(tmp_path / "killed")) == COUNT


def test_a_flush_that_fails_beside_the_decoding_ends_it(
    tmp_path, shared_pictures, often, monkeypatch
):
    def sync(handle, original=files.sync):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(OSError, match="No space left") as error:
        packed(shared_pictures, tmp_path)
    assert str(error.value.filename).startswith(str(tmp_path))
    assert entries(tmp_path) == []  # no line without its pixels
    monkeypatch.undo()
    check(packed(shared_pictures, tmp_path), shared_pictures)


@pytest.mark.parametrize("name", ["1.index", "1.pixels"])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.999])
def test_a_torn_file_is_mended_from_what_is_good(tmp_path, shared_pictures, decoded, name, share):
    packed(shared_pictures, tmp_path)
    (directory,) = tmp_path.iterdir()
    size = (directory / name).stat().st_size
    os.truncate(directory / name, int(size * share))
    check(packed(shared_pictures, tmp_path), shared_pictures)
    assert len(decoded) - COUNT == pytest.approx(COUNT * (1 - share), abs=3)
    assert len(decoded) > COUNT
    check(packed(shared_pictures, tmp_path), shared_pictures)
    assert len(list(directory.glob("*.pixels"))) == 1


def test_the_last_index_line_may_be_torn_anywhere(tmp_path, shared_pictures):
    packed(shared_pictures[:3], tmp_path)
    (directory,) = tmp_path.iterdir()
    whole = (directory / "1.index").read_bytes()
    known = {entry.content for entry in entries(tmp_path)}
    for cut in range(len(whole) - len(whole.splitlines()[-1]) - 1, len(whole), 5):
        (directory / "1.index").write_bytes(whole[:cut])
        check(packed(shared_pictures[:3], tmp_path), shared_pictures[:3])
        assert {entry.content for entry in entries(tmp_path)} == known


def test_after_a_crash_damaged_pixels_are_found_by_their_checksum(
    tmp_path, shared_pictures, decoded
):
    packed(shared_pictures, tmp_path)
    (directory,) = tmp_path.iterdir()
    with (directory / "1.pixels").open("r+b") as file:
        file.write(bytes(100))
        file.seek(0, os.SEEK_END)
        file.write(b"what a killed build left")
    check(packed(shared_pictures, tmp_path), shared_pictures)
    assert len(decoded) == COUNT + 1


@pytest.mark.parametrize(
    "line",
    [b"\0\n", *(journal.lines([each]) for each in (("content", 7, "x"), 5, {"content": 1}, ["a"]))],
    ids=["zeros", "another file's", "a number", "a mapping", "too short"],
)
def test_a_garbled_index_line_loses_that_picture_alone(tmp_path, shared_pictures, decoded, line):
    packed(shared_pictures, tmp_path)
    (directory,) = tmp_path.iterdir()
    lines = (directory / "1.index").read_bytes().splitlines(keepends=True)
    lines[12] = line
    (directory / "1.index").write_bytes(b"".join(lines))
    for _ in range(2):
        check(packed(shared_pictures, tmp_path), shared_pictures)
        assert len(decoded) == COUNT + 1


def test_damage_is_mended_once_and_pixels_that_a_run_still_reads_are_never_overwritten(
    tmp_path, shared_pictures, decoded, caplog
):
    old = packed(shared_pictures, tmp_path)
    check(old, shared_pictures)  # from here on it looks at no checksum
    (directory,) = tmp_path.iterdir()
    for harm in (lose_the_last_line, cut_the_pixels, flip_a_byte):
        caplog.clear()
        harm(directory)
        new = packed(shared_pictures, tmp_path)
        check(new, shared_pictures)
        check(packed(shared_pictures, tmp_path), shared_pictures)
        assert ("damaged" in caplog.text) == (harm is flip_a_byte)
        if harm is not cut_the_pixels:
            check(old, shared_pictures)
    assert len(decoded) == COUNT + 3


def newest(directory, kind):
    return max(directory.glob(f"*.{kind}"))


def lose_the_last_line(directory):
    index = newest(directory, "index")
    index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:-1]))


def cut_the_pixels(directory):
    pixels = newest(directory, "pixels")
    os.truncate(pixels, pixels.stat().st_size - 1)


def flip_a_byte(directory):
    with newest(directory, "pixels").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))


def test_a_store_that_is_deleted_while_it_is_filled_and_read_is_not_missed(
    tmp_path, shared_pictures, often
):
    def on_progress(done, total):
        if done == 10:
            shutil.rmtree(tmp_path / "store")

    check(packed(shared_pictures, tmp_path / "store", on_progress=on_progress), shared_pictures)
    result = packed(shared_pictures, tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    check(result, shared_pictures)


def test_pixels_that_can_not_be_read_are_decoded(tmp_path, shared_pictures, monkeypatch):
    result = packed(shared_pictures, tmp_path)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "pwrite", fail)
    check(result, shared_pictures)


@pytest.mark.parametrize("keep", [True, False])
def test_a_picture_that_is_read_again_must_be_the_same(tmp_path, own_pictures, keep):
    result = packed(own_pictures, tmp_path / "store", keep=keep)
    for path in own_pictures:
        draw(Path(path), seed=99)
    if keep:
        check_later = {path: result(path) for path in own_pictures}  # they are on the disk
        assert len(check_later) == COUNT
        (directory,) = (tmp_path / "store").iterdir()
        os.truncate(directory / "1.pixels", 0)
    with pytest.raises(cache.Changed, match=f"{own_pictures[0]}: the picture has changed"):
        result(own_pictures[0])


def test_where_pixels_are_not_kept_what_can_be_used_is_remembered(tmp_path, own_pictures, decoded):
    Path(own_pictures[4]).write_bytes(b"no picture")
    settle(own_pictures)
    for _ in range(2):
        result = packed(own_pictures, tmp_path / "store", keep=False)
        assert result.broken.keys() == {own_pictures[4]}
        assert len(decoded) == COUNT
    assert {entry.size for entry in entries(tmp_path / "store")} == {0}
    usable = [path for path in own_pictures if path not in result.broken]
    check(result, usable)
    decoded.clear()
    check(packed(own_pictures, tmp_path / "store"), usable)
    assert len(decoded) == COUNT - 1


def test_the_digests_are_those_of_the_bytes(tmp_path, own_pictures):
    Path(own_pictures[4]).write_bytes(b"no picture")
    usable = [path for path in own_pictures if path != own_pictures[4]]
    expected = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in usable}
    for keep in (False, True, True):
        assert packed(own_pictures, tmp_path / "store", keep=keep).digests == expected
    store = PixelCache(tmp_path / "store", RESIZE, "bilinear")
    assert store.check(own_pictures, 2, quiet).digests == expected


def test_an_interruption_keeps_what_is_packed_and_ends_the_threads(
    tmp_path, shared_pictures, decoded
):
    with pytest.raises(Interrupted):
        packed(shared_pictures, tmp_path / "stopped", on_progress=stop_at(7))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pack")]
    decoded.clear()
    check(packed(shared_pictures, tmp_path / "stopped"), shared_pictures)
    assert len(decoded) == COUNT - 7
    packed(shared_pictures, tmp_path / "undisturbed")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")


def test_mending_and_dropping_can_be_interrupted_at_any_moment(tmp_path, own_pictures):
    packed(own_pictures, tmp_path / "store")
    (directory,) = (tmp_path / "store").iterdir()
    with (directory / "1.pixels").open("ab") as file:
        file.write(b"what a killed build left")
    for path in own_pictures[2:]:
        Path(path).unlink()
    new = draw(tmp_path / "new.png", seed=99)
    for moment in itertools.count(1):
        shutil.copytree(tmp_path / "store", tmp_path / f"{moment}")
        calls = itertools.count(1)

        def on_progress(done, total, calls=calls, moment=moment):
            if next(calls) == moment:
                raise Interrupted("SIGTERM")

        try:
            packed([new], tmp_path / f"{moment}", on_progress=on_progress)
            break
        except Interrupted:
            check(packed([own_pictures[0], new], tmp_path / f"{moment}"), [own_pictures[0], new])
            assert len(contents(tmp_path / f"{moment}")) == 2
    assert moment > 4  # the new picture, and each picture that is kept


# --- two at once ---


def test_a_second_run_waits_for_the_first_and_decodes_nothing(tmp_path, shared_pictures, decoded):
    hold = tmp_path / "hold"
    with start_packer(tmp_path / "store", f"hold{hold}", shared_pictures) as first:
        while not hold.exists():
            assert first.poll() is None
        waits = []

        def on_progress(done, total):
            waits.append(done)
            if len(waits) == 2:  # it was asked twice while it waited
                assert waits == [0, 0]
                hold.unlink()
            elif len(waits) > 2 and hold.exists():
                hold.unlink()  # the first run holds at every picture

        result = packed(shared_pictures, tmp_path / "store", on_progress=on_progress)
    assert first.returncode == 0
    check(result, shared_pictures)
    assert not decoded


def test_waiting_can_be_interrupted(tmp_path, shared_pictures):
    hold = tmp_path / "hold"
    with start_packer(tmp_path / "store", f"hold{hold}", shared_pictures) as first:
        while not hold.exists():
            assert first.poll() is None
        with pytest.raises(Interrupted):
            packed(shared_pictures, tmp_path / "store", on_progress=stop_at(0))
        first.kill()


def test_processes_that_race_share_the_work_of_one(tmp_path, shared_pictures):
    processes = [start_packer(tmp_path / "store", "", shared_pictures) for _ in range(3)]
    results = [process.communicate(timeout=600)[0].split() for process in processes]
    assert sorted(int(count) for count, _ in results) == [0, 0, COUNT]
    assert {found for _, found in results} == {digest(shared_pictures)}


def test_a_reader_keeps_its_pixels_while_another_run_appends_and_rewrites(tmp_path, own_pictures):
    before = packed(own_pictures, tmp_path / "store")
    expected = {path: shrink(path, RESIZE, "bilinear") for path in own_pictures}
    for seed, path in enumerate(own_pictures, start=COUNT):
        draw(Path(path), seed)
    after = packed(own_pictures, tmp_path / "store")
    assert all(np.array_equal(before(path), pixels) for path, pixels in expected.items())
    check(after, own_pictures)


# --- garbage and room ---


def test_stale_pixels_are_dropped_once_they_are_more_than_half(tmp_path, own_pictures, decoded):
    live = sum(packed(own_pictures, tmp_path / "store")(path).nbytes for path in own_pictures)
    for turn in range(1, 6):
        for number, path in enumerate(own_pictures[:8]):
            draw(Path(path), seed=100 * turn + number)
        result = packed(own_pictures, tmp_path / "store")
        check(result, own_pictures)
        live = sum(result(path).nbytes for path in own_pictures)
        (size,) = (
            len(data)
            for name, data in contents(tmp_path / "store").items()
            if name.endswith(".pixels")
        )
        assert size <= 2 * live
    assert "1.pixels" not in contents(tmp_path / "store")
    assert len(decoded) == COUNT + 5 * 8


def test_pixels_of_pictures_that_are_gone_are_dropped_and_those_of_others_kept(
    tmp_path, own_pictures, decoded
):
    packed(own_pictures, tmp_path / "store")
    for path in own_pictures[3:]:
        Path(path).unlink()
    new = draw(tmp_path / "new.png", seed=99)
    check(packed([new], tmp_path / "store"), [new])
    result = packed([*own_pictures[:3], new], tmp_path / "store")
    check(result, [*own_pictures[:3], new])
    assert len(decoded) == COUNT + 1
    assert len(contents(tmp_path / "store")["2.pixels"]) == sum(
        result(path).nbytes for path in [*own_pictures[:3], new]
    )


def test_touching_for_ever_does_not_grow_the_index_for_ever(tmp_path, own_pictures):
    for _ in range(20):
        for path in own_pictures[:2]:
            Path(path).touch()
        packed(own_pictures[:2], tmp_path / "store")
    (lines,) = (
        data.count(b"\n")
        for name, data in contents(tmp_path / "store").items()
        if name.endswith(".index")
    )
    assert lines <= 8 * 2


def test_the_limit_is_held_by_an_estimate_from_a_sample(tmp_path, shared_pictures):
    size = sum(shrink(path, RESIZE, "bilinear").nbytes for path in shared_pictures)
    with pytest.raises(
        TooLarge,
        match=r"20 pictures need about .* MB, and 0 MB of the .* MB allowed are used; "
        "give data.cache=none",
    ):
        packed(shared_pictures, tmp_path, max_bytes=size)
    assert contents(tmp_path) == {"1.index": b"", "1.pixels": b""}
    check(packed(shared_pictures, tmp_path, max_bytes=round(1.11 * size)), shared_pictures)


def test_known_content_needs_no_room(tmp_path, own_pictures):
    packed(own_pictures, tmp_path / "store")
    size = len(contents(tmp_path / "store")["1.pixels"])
    moved = [str(Path(path).rename(tmp_path / Path(path).name)) for path in own_pictures]
    check(packed(moved, tmp_path / "store", max_bytes=size), moved)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_too_small_is_named_with_its_room_before_anything_is_written(
    small_disk, shared_pictures
):
    with pytest.raises(
        TooLarge, match=r"need about \d.* MB, and \d.* MB are free.*platform.cache=DIR"
    ) as error:
        packed(shared_pictures, small_disk / "store", resize=200)
    assert str(error.value).startswith(str(small_disk))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("full_at", [1, 10, 13])
def test_a_disk_that_fills_up_midway_keeps_what_is_packed(
    small_disk, shared_pictures, often, decoded, full_at
):
    filler = small_disk / "filler"

    def on_progress(done, total):
        if done == full_at:
            with (
                pytest.raises(OSError, match="No space left"),
                filler.open("wb", buffering=0) as file,
            ):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(OSError, match="No space left") as error:
        packed(shared_pictures, small_disk / "store", resize=64, on_progress=on_progress)
    assert error.value.errno == errno.ENOSPC
    assert str(error.value.filename).startswith(str(small_disk))
    filler.unlink()
    decoded.clear()
    check(packed(shared_pictures, small_disk / "store", resize=64), shared_pictures, resize=64)
    assert len(decoded) <= COUNT - full_at + 3
