"""What is wrong with a data set, on a page: in the run's report, and on one of its own."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.common import files
from trainer.common.templates import render
from trainer.images.care import KINDS, Finding, Findings, Picture
from trainer.results.text import breakable

Thumbnail = Callable[[str], NDArray[np.uint8]]

PICTURE_SIDE = 128  # pixels
# What a page shows at most: findings of a kind, and images of a finding.
SHOWN, MEMBERS = 12, 4
EXPLAINED = {
    "leak": "Valid chooses the best epoch and test gives the figure: a picture that is also in "
    "train proves nothing there. Remove it from one of the two, or give data.leaks=drop.",
    "labels": "One of the two classes is wrong, or a picture shows both.",
    "doubt": "A classifier on a pretrained network's features, fitted without the picture, "
    "predicts another class. The most confident come first. Check before you change a label: "
    "the classifier may be wrong.",
    "copy": "Each counts more than once. A picture that was saved again, resized or slightly "
    "shifted is a copy too.",
    "unlike": "A pretrained network finds them the least similar to any other picture: check that "
    "they belong here.",
    "dark": "Nothing in them is brighter than a tenth of white.",
    "blank": "Their values hardly differ.",
    "small": "They are enlarged for the network.",
    "uneven": "The network learns rare classes last; macro F1 counts each class equally.",
}


@dataclass(frozen=True)
class Shown:
    """An image on the page. image: a data URI, or None where it can't be read any more."""

    picture: Picture
    image: str | None
    pixelated: bool


@dataclass(frozen=True)
class Card:
    """A finding on the page. more: images of it that are not shown."""

    note: str
    members: list[Shown]
    more: int


@dataclass(frozen=True)
class Section:
    """The findings of a kind. count: of all, shown or not. single: they have one image each."""

    kind: str
    title: str
    text: str
    count: int
    single: bool
    cards: list[Card]


def sections(findings: Findings, thumbnail: Thumbnail) -> list[Section]:
    """Return what the page says, kind by kind. thumbnail: as in `report.write`."""
    parts = []
    for kind, (title, _) in KINDS.items():
        every = findings.of(kind)
        if every:
            cards = [_card(finding, thumbnail) for finding in every[:SHOWN]]
            title = title[0].upper() + title[1:]
            single = all(len(finding.pictures) == 1 for finding in every)
            parts.append(Section(kind, title, EXPLAINED[kind], len(every), single, cards))
    return parts


def _card(finding: Finding, thumbnail: Thumbnail) -> Card:
    members = [_shown(each, thumbnail) for each in finding.pictures[:MEMBERS]]
    return Card(finding.note, members, len(finding.pictures) - len(members))


def _shown(member: Picture, thumbnail: Thumbnail) -> Shown:
    try:
        pixels = thumbnail(member.path)
    except (OSError, ValueError):
        return Shown(member, None, False)
    return Shown(member, picture(pixels), is_pixelated(pixels))


def write_page(
    findings: Findings, title: str, counts: dict[str, int], path: Path, thumbnail: Thumbnail
) -> None:
    """Write the page of a data set to `path`, whole or not at all.

    counts: images of each split. Raise OSError where `path` can't be written.
    """
    page = render(
        Path(__file__).with_name("care.html.j2"),
        {"breakable": breakable, "count": "{:,}".format, "filename": lambda name: Path(name).name},
        title=title,
        counts=counts,
        unseen=findings.unseen,
        care=sections(findings, thumbnail),
    )
    files.write(path, page.encode("utf-8", "backslashreplace"))


def is_pixelated(pixels: NDArray[np.uint8]) -> bool:
    """Return whether an image is so small that its pixels are to be seen."""
    return len(pixels) < PICTURE_SIDE // 2


def picture(pixels: NDArray[np.uint8]) -> str:
    """Return a data URI of [H, W, 3] pixels: a small image as it is, a large one shrunk."""
    image = Image.fromarray(pixels)
    if max(image.size) < PICTURE_SIDE // 2:
        return data_uri(image, "PNG")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "JPEG")


def data_uri(image: Image.Image, kind: str) -> str:
    """Return an image as a data URI. kind: PNG or JPEG."""
    data = io.BytesIO()
    image.save(data, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
