"""A zip or tar in the place of a folder."""

import io
import shutil
import stat
import tarfile
import zipfile

import pytest

from tests.trainer.images.test_cache import settle
from trainer.common.errors import Interrupted, UserError
from trainer.images import archive
from trainer.images.archive import unpacked

FILES = {
    "set/train/cat/1.jpg": b"one",
    "set/train/ä/2.jpg": b"two",
    "set/test/cat/3.jpg": b"three",
    "__MACOSX/set/train/cat/._1.jpg": b"junk",
    "set/train/@eaDir/1.jpg": b"junk",
}


def nothing():
    pass


def zipped(path, contents, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as file:
        for name, data in contents.items():
            file.writestr(name, data)
    return path


def tarred(path, contents, mode="w:gz"):
    with tarfile.open(path, mode) as file:
        for name, data in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def below(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


PACK = {
    "zip": zipped,
    "tar": lambda path, contents: tarred(path, contents, "w"),
    "tar.gz": tarred,
    "tar.xz": lambda path, contents: tarred(path, contents, "w:xz"),
    "tar.bz2": lambda path, contents: tarred(path, contents, "w:bz2"),
}


@pytest.mark.parametrize("form", PACK)
def test_a_folder_comes_out_as_it_went_in_without_what_a_system_added(tmp_path, form):
    path = PACK[form](tmp_path / "any.name", FILES)
    folder = unpacked(path, tmp_path / "cache", nothing)
    wanted = {name.removeprefix("set/"): data for name, data in FILES.items() if data != b"junk"}
    assert below(folder) == wanted
    assert folder.name == "set"


def test_it_is_known_by_its_content_and_unpacked_once(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", FILES)
    folder = unpacked(path, tmp_path / "cache", nothing)
    monkeypatch.setattr(archive, "_unpack", None)
    moved = shutil.copy(path, tmp_path / "b.zip")
    assert unpacked(moved, tmp_path / "cache", nothing) == folder
    monkeypatch.undo()
    other = zipped(tmp_path / "a.zip", FILES | {"set/train/cat/1.jpg": b"two"})
    assert unpacked(other, tmp_path / "cache", nothing) != folder


def test_one_that_looks_unchanged_is_not_read_again(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", {"train/a/1.jpg": b"1"})
    settle([str(path)])
    first = unpacked(path, tmp_path / "cache", nothing)
    read = []
    digest = archive._digest
    monkeypatch.setattr(archive, "_digest", lambda *given: read.append(given) or digest(*given))
    assert unpacked(path, tmp_path / "cache", nothing) == first and not read
    zipped(path, {"train/a/1.jpg": b"2"})
    assert unpacked(path, tmp_path / "cache", nothing) != first and read


@pytest.mark.parametrize("change", ["removed", "shorter", "another's contents"])
def test_what_is_damaged_in_the_cache_is_unpacked_again(tmp_path, change):
    path = zipped(tmp_path / "a.zip", FILES)
    folder = unpacked(path, tmp_path / "cache", nothing)
    before = below(folder)
    if change == "removed":
        (folder / "train/cat/1.jpg").unlink()
    elif change == "another's contents":
        (contents,) = (tmp_path / "cache").rglob(archive.CONTENTS)
        contents.write_text("[1, 2]")
    else:
        (folder / "train/cat/1.jpg").write_bytes(b"")
    assert below(unpacked(path, tmp_path / "cache", nothing)) == before


def test_the_folders_of_splits_are_never_taken_for_the_one_that_holds_all(tmp_path):
    path = zipped(tmp_path / "a.zip", {"Train/cat/1.jpg": b"1"})
    assert below(unpacked(path, tmp_path / "cache", nothing)).keys() >= {"Train/cat/1.jpg"}


def test_names_of_a_zip_are_read_as_they_were_meant(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train\\cat\\1.jpg", b"backslashes")
        file.writestr("train/xx/1.jpg", b"UTF-8 that is not said to be")
    path.write_bytes(path.read_bytes().replace(b"/xx/", b"/\xc3\xa4/"))
    names = below(unpacked(path, tmp_path / "cache", nothing)).keys()
    assert {"train/cat/1.jpg", "train/ä/1.jpg"} <= names


def with_link(path):
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("train/link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(entry)


def with_hard_link(path):
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("train/link")
        entry.type, entry.linkname = tarfile.LNKTYPE, "../../passwd"
        file.addfile(entry)


def with_device(path):
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("train/null")
        entry.type = tarfile.CHRTYPE
        file.addfile(entry)


def with_zipped_link(path):
    entry = zipfile.ZipInfo("train/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(entry, "/etc/passwd")


def encrypted(path):
    zipped(path, FILES)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def wrong_checksum(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train/cat/1.jpg", b"original")
    path.write_bytes(path.read_bytes().replace(b"original", b"0riginal"))


def cut(pack, share):
    def make(path):
        data = pack(path, {f"train/cat/{n}.jpg": bytes([n]) * 5000 for n in range(9)}).read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return make


BAD = {
    "dots": (lambda path: zipped(path, {"../../x.jpg": b""}), "outside of its folder"),
    "absolute": (lambda path: tarred(path, {"/etc/x.jpg": b""}), "outside of its folder"),
    "dots within": (lambda path: tarred(path, {"a/../../x": b""}), "outside of its folder"),
    "backslashes": (lambda path: zipped(path, {"..\\x.jpg": b""}), "outside of its folder"),
    "link": (with_link, "train/link is a link"),
    "hard link": (with_hard_link, "train/link is a link"),
    "device": (with_device, "train/null is a link or a device"),
    "zipped link": (with_zipped_link, "train/link is a link"),
    "encrypted": (encrypted, "is encrypted"),
    "checksum": (wrong_checksum, "neither a folder nor a whole zip"),
    "cut zip": (cut(zipped, 0.6), "neither a folder nor a whole zip"),
    "cut tar": (cut(lambda p, c: tarred(p, c, "w"), 0.6), "neither a folder nor a whole zip"),
    "cut tar.gz": (cut(tarred, 0.9), "neither a folder nor a whole zip"),
    "7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(900)), "neither a folder"),
    "empty": (lambda path: path.write_bytes(b""), "neither a folder nor a whole zip"),
    "file and folder": (lambda path: tarred(path, {"a": b"1", "a/b": b"2"}), "a file and a folder"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_unpacked_safely_is_one_line_and_leaves_nothing(tmp_path, make, reason):
    path = tmp_path / "set.zip"
    make(path)
    with pytest.raises(UserError) as caught:
        unpacked(path, tmp_path / "cache", nothing)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [each.name for each in (tmp_path / "cache/archives").iterdir()] == [".lock"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache", "set.zip"]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(archive, "ALLOWED", 1 << 16)
    written = []
    monkeypatch.setattr(
        archive.shutil, "copyfileobj", lambda source, copy, size: written.append(size)
    )
    path = pack(tmp_path / "a", {f"train/a/{n}.bmp": bytes(1 << 20) for n in range(4)})
    with pytest.raises(UserError, match="far more than pictures"):
        unpacked(path, tmp_path / "cache", nothing)
    assert len(written) < 4


def test_a_disk_without_room_is_named_before_it_is_full(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", FILES)
    usage = shutil._ntuple_diskusage(10, 10, archive.SPARE + 4)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(UserError, match=r"platform.cache=DIR on a larger disk"):
        unpacked(path, tmp_path / "cache", nothing)


def test_unpacking_may_be_given_up_and_leaves_nothing(tmp_path):
    path = zipped(tmp_path / "a.zip", FILES)
    calls = []

    def check():
        calls.append(1)
        if len(calls) > 4:
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        unpacked(path, tmp_path / "cache", check)
    assert [each.name for each in (tmp_path / "cache/archives").iterdir()] == [".lock"]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_names_that_differ_in_case_alone_are_two_classes_or_one_line(tmp_path, monkeypatch, pack):
    names = ("train/Cat/1.jpg", "train/Cat/2.jpg", "train/cat/3.jpg", "train/cat/4.jpg")
    path = pack(tmp_path / "a", {name: name.encode() for name in names})
    found = unpacked(path, tmp_path / "cache", nothing)
    assert len(list(found.rglob("*.jpg"))) == 4

    def is_there(path):
        """As on a file system that folds case."""
        return path.name.casefold() in (each.name.casefold() for each in path.parent.iterdir())

    monkeypatch.setattr(archive, "_is_there", is_there)
    with pytest.raises(
        UserError, match=r"train/Cat and train/cat are the same name to this file system"
    ):
        unpacked(path, tmp_path / "other", nothing)
    assert [each.name for each in (tmp_path / "other/archives").iterdir()] == [".lock"]
