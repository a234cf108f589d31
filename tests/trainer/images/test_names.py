"""What names say: pictures, a system's own, classes."""

import unicodedata

import pytest

from trainer.common.errors import UserError
from trainer.images import names
from trainer.images.names import alike, as_text, class_name, counted, kind_of


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "._1.jpg",
        "@eaDir",
        "$RECYCLE.BIN",
        "lost+found",
        "System Volume Information",
        "__MACOSX",
        "Thumbs.db",
        ".ipynb_checkpoints",
        "#recycle",
        ".Trash-1000",
        "DESKTOP.INI",
    ],
)
def test_what_a_system_puts_there_is_known_in_any_case(name):
    assert kind_of(name) == kind_of(name.upper()) == names.OF_SYSTEM


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("1.jpg", ""),
        ("1.TIFF", ""),
        ("1.jxl", ".jxl"),
        ("1", "without extension"),
        ("Mr. Smith at home", "without extension"),
        ("1.a\nb", "without extension"),
        ("1.jpg.txt", ".txt"),
        ("recycled", "without extension"),
        ("a.b.HEIF2", ".heif2"),
    ],
)
def test_files_are_of_the_kind_that_their_names_say(name, kind):
    assert kind_of(name) == kind


def test_what_is_left_out_is_counted_by_kind_with_what_would_read_it():
    kinds = [".heic"] * 37 + ["without extension"] * 3 + [names.LOOSE] * 2
    line = counted(kinds)
    assert line.startswith("37 .heic (install the extra heic: ")
    assert "EXTRA=heic), 3" in line or "[heic]'), 3" in line
    assert line.endswith("3 without extension, 2 loose (in no class folder)")


def test_kinds_without_end_are_still_one_line():
    assert counted([f".{number}" for number in range(99)]).endswith(" and 91 more")


def test_heic_and_avif_are_pictures_only_where_they_can_be_read(monkeypatch):
    for missing in ({}, {"pillow_heif"}, {"pillow_heif", "PIL._avif"}):
        monkeypatch.setattr(
            names.importlib.util, "find_spec", lambda name, gone=missing: name not in gone
        )
        names.picture_suffixes.cache_clear()
        assert (kind_of("1.HEIC") == "") == ("pillow_heif" not in missing)
        assert (kind_of("1.avif") == "") == ("PIL._avif" not in missing)
    names.picture_suffixes.cache_clear()


def test_a_class_is_called_the_same_however_its_accents_are_written():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert class_name(as_text(decomposed), "train") == class_name(composed, "train") == composed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("caf\udce9", r"train: the class caf\xe9 is not named in UTF-8"),
        ("a\nb", "control"),
        ("\x7f", "control characters"),
        (" ", "only spaces"),
    ],
)
def test_a_class_name_that_cannot_be_written_is_refused(name, expected):
    with pytest.raises(UserError) as caught:
        class_name(name, "train")
    assert expected in str(caught.value) and "rename it" in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("name", ["ä", "日本", "a b", "A&B <i>'\"", "Ω", "0", "👍"])
def test_any_text_may_be_a_class(name):
    assert class_name(name, "train") == name


def test_names_that_look_alike_are_told():
    assert alike("beagle", ["boxer", "Beagle"]) == "Beagle"
    assert alike("golden_retriever ", ["golden retriever"]) == "golden retriever"
    assert alike("cat", ["dog"]) is None
