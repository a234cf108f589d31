"""What is wrong with a data set, told and never silently acted upon.

Images that are in more than one place, leaks between the splits among them; that lie under two
classes; that show nothing; classes of very different sizes. What features say of them is added by
`training.care`.
"""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.common.errors import UserError
from trainer.common.text import listed
from trainer.images import identity, likeness
from trainer.images.folder import ImageFolder, Split

Read = Callable[[str], NDArray[np.uint8]]

# Each kind with what its images are, and whether it spoils a run's figures.
KINDS = {
    "leak": ("in train, and in valid or test too", True),
    "labels": ("in two classes", True),
    "doubt": ("perhaps in the wrong class", False),
    "copy": ("in more than one place", False),
    "unlike": ("unlike all others", False),
    "dark": ("nearly black", False),
    "blank": ("one colour all over", False),
    "small": ("much smaller than the network sees", False),
    "uneven": ("classes of very different sizes", False),
}
UNEVEN = 10  # times as many images in the largest class as in the smallest
SMALL = 4  # times smaller than the square that the network sees
LIGHT = 65536  # bytes: a file above that is no small image, and its header isn't read
LEAST = 24  # pixels of the network's square: with fewer, different images were taken for one
MOST = 100_000  # images that are compared with each other: they take 10 KB of memory each
NAMED = 2  # findings that a line names
SHARE = 16  # images that a thread looks at in one go, so that handing them over costs little


class Picture(NamedTuple):
    """An image, and where it lies. label: its class's name."""

    path: str
    split: str
    label: str


@dataclass(frozen=True)
class Finding:
    """Something about one image, or about several that belong together. kind: a key of KINDS."""

    kind: str
    pictures: tuple[Picture, ...]
    note: str = ""


@dataclass
class Findings:
    """All that was noticed.

    leaked: path of each image of valid and test that is in train, to whether its bytes are the
    same. in_valid: paths of images of test that are in valid. unseen: what was not looked at, and
    why. balanced: training already makes up for classes of different sizes, so nothing is proposed
    against them.
    """

    all: list[Finding] = field(default_factory=list)
    leaked: dict[str, bool] = field(default_factory=dict)
    in_valid: set[str] = field(default_factory=set)
    unseen: list[str] = field(default_factory=list)
    balanced: bool = False

    def of(self, kind: str) -> list[Finding]:
        """Return the findings of a kind, in their order."""
        return [finding for finding in self.all if finding.kind == kind]

    def lines(self) -> Iterator[tuple[str, bool]]:
        """Yield a line for each kind that there is, and whether it is a warning."""
        for kind, (_, spoils) in KINDS.items():
            findings = self.of(kind)
            if findings:
                yield f"pictures {self._told(kind, findings)}", spoils
        for what in self.unseen:
            yield f"pictures not checked for {what}", False

    def _told(self, kind: str, findings: list[Finding]) -> str:
        if kind == "uneven":
            text = f"in {KINDS[kind][0]}: {findings[0].note}"
            if not self.balanced:
                text += "; train.imbalance=sampler or logits makes all classes count alike"
            return text
        text = f"{KINDS[kind][0]}: {len(findings)}"
        if kind == "leak":
            same = sum(self.leaked.values())
            text = f"{KINDS[kind][0]}: {same} the same file, {len(self.leaked) - same} nearly"
        text += f": {listed(map(_shown, findings), NAMED)}"
        if kind == "leak":
            text += "; data.leaks=drop leaves them out of the figures"
        return text

    def csv(self) -> str:
        """Return a row for each image of each finding; those that belong together have a number."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("number", "kind", "split", "class", "path", "note"))
        for number, finding in enumerate(self.all, 1):
            for picture in finding.pictures or (Picture("", "", ""),):
                row = (picture.split, picture.label, picture.path, finding.note)
                writer.writerow((number, finding.kind, *row))
        return text.getvalue()


def _blind(read: Read | None, side: int, count: int) -> str | None:
    """Return why the pixels of `count` images can't be compared, if so."""
    if side < LEAST:
        return f"at {side} pixels all look alike"
    if count > MOST:
        return f"there are more than {MOST:,}"
    if read is None:  # last: it may be so in one attempt of a run, and not in the next
        return "the pixels are not packed (data.cache)"
    return None


def _shown(finding: Finding) -> str:
    text = " = ".join(_place(picture) for picture in finding.pictures[:2])
    if finding.note and len(finding.pictures) == 1:
        text += f" ({finding.note})"
    return text


def _place(picture: Picture) -> str:
    return f"{picture.split}/{picture.label}/{Path(picture.path).name}"


def pictures(images: ImageFolder) -> list[Picture]:
    """Return all images of a data set, split by split."""
    return [
        Picture(path, name, images.classes[label])
        for name, split in images.splits.items()
        for path, label in zip(split.paths, split.labels, strict=True)
    ]


def look(
    images: ImageFolder,
    read: Read | None,
    side: int,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> Findings:
    """Look at the bytes of all images, and at their pixels.

    read: gives an image's shrunk pixels; None where they would have to be decoded for it. side: of
    the square that the network sees, in pixels. workers: threads; 0: none. on_progress(done,
    total): called in the caller's own thread; it may raise. Raise Unreadable.
    """
    everything, findings = pictures(images), Findings()
    paths = [picture.path for picture in everything]
    total = 2 * len(paths)
    equal = defaultdict[str, list[int]](list)
    for index, (_, _, content, _) in enumerate(identity.samples(images)):
        equal[content].append(index)
    pairs = [(group[0], other) for group in equal.values() for other in group[1:]]
    same = _Sets(len(paths), pairs)
    alike = _Sets(len(paths), pairs)
    single = [index for index in range(len(paths)) if same.first(index) == index]
    reason = _blind(read, side, len(single))
    if reason:
        findings.unseen.append(f"near duplicates and blank pictures: {reason}")
    if read is not None and not reason:
        shares = [single[start : start + SHARE] for start in range(0, len(single), SHARE)]
        with _mapping(workers) as mapped:
            made = mapped(
                lambda share: [likeness.square(read(paths[index])) for index in share], shares
            )
            squares = chain.from_iterable(made)
            counted = _counted(squares, lambda done: on_progress(done, total))
            sketches = likeness.sketch(counted)
        near = likeness.near(sketches, lambda done: on_progress(len(paths) + done, total))
        for one, other, _ in near:
            alike.join(single[one], single[other])
        for kind, which in (("dark", sketches.dark), ("blank", sketches.blank & ~sketches.dark)):
            findings.all += [
                Finding(kind, (everything[single[index]],)) for index in np.flatnonzero(which)
            ]
    _compare(everything, same, alike, findings)
    findings.all += _small(everything, side / SMALL)
    findings.all += _uneven(images)
    return findings


def _compare(everything: list[Picture], same: "_Sets", alike: "_Sets", out: Findings) -> None:
    """Add what images that are alike mean: leaks, two classes for one, or mere copies."""
    for group in alike.groups():
        note = "the same file"
        if len({same.first(index) for index in group}) > 1:
            note = "nearly the same"
        members = tuple(everything[index] for index in group)
        of_train = {same.first(index) for index in group if everything[index].split == "train"}
        leaks = [index for index in group if everything[index].split != "train" and of_train]
        for index in leaks:
            out.leaked[everything[index].path] = same.first(index) in of_train
        if any(picture.split == "valid" for picture in members):
            out.in_valid |= {picture.path for picture in members if picture.split == "test"}
        two = len({picture.label for picture in members}) > 1
        if leaks:
            out.all.append(Finding("leak", _firsts(members, lambda each: each.split), note))
        if two:
            out.all.append(Finding("labels", _firsts(members, lambda each: each.label), note))
        if not leaks and not two:
            out.all.append(Finding("copy", members, note))


def _firsts(members: Sequence[Picture], key: Callable[[Picture], str]) -> tuple[Picture, ...]:
    """Return the images with the first of each key before all others: what a line names."""
    firsts = list({key(each): each for each in reversed(members)}.values())[::-1]
    return (*firsts, *(each for each in members if each not in firsts))


def _small(everything: Sequence[Picture], least: float) -> Iterator[Finding]:
    for picture in everything:
        # What can no longer be read is told by whoever needs it.
        with suppress(OSError, ValueError, SyntaxError):
            if Path(picture.path).stat().st_size > LIGHT:
                continue
            with Image.open(picture.path) as image:
                width, height = image.size
            if min(width, height) < least:
                yield Finding("small", (picture,), f"{width} x {height} pixels")


def _uneven(images: ImageFolder) -> Iterator[Finding]:
    counts = Counter(images.splits["train"].labels.tolist())
    most, fewest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] >= UNEVEN * counts[fewest]:
        note = (
            f"train has {counts[most]} of class {images.classes[most]} "
            f"and {counts[fewest]} of class {images.classes[fewest]}"
        )
        yield Finding("uneven", (), note)


def keep_or_stop(images: ImageFolder, findings: Findings, leaks: str) -> ImageFolder:
    """Return the images as data.leaks says: warn, drop or stop.

    drop: without those of valid that are in train; those of test stay, for the figure with them.
    Raise UserError where leaks stop the run, or where a split is nothing but leaks.
    """
    if leaks == "warn" or not findings.leaked:
        return images
    places = listed(_shown(finding) for finding in findings.of("leak"))
    if leaks == "stop":
        raise UserError(
            f"data.leaks=stop: {len(findings.leaked)} of the pictures of valid and test are in "
            f"train too: {places}; remove them from one of the two, or give data.leaks=drop"
        )
    for name, split in images.splits.items():
        if name != "train" and all(path in findings.leaked for path in split.paths):
            raise UserError(
                f"data.leaks=drop: all pictures of {name} are in train too: {places}; "
                f"give others, or remove {name}"
            )
    valid = images.splits["valid"]
    keep = np.array([path not in findings.leaked for path in valid.paths])
    rest, dropped = (_chosen(valid, which) for which in (keep, ~keep))
    return replace(images, splits=images.splits | {"valid": rest}, dropped={"valid": dropped})


def _chosen(split: Split, which: NDArray[np.bool_]) -> Split:
    paths = tuple(split.paths[number] for number in np.flatnonzero(which))
    return Split(paths, split.labels[which])


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterable[list[NDArray[np.uint8]]]]]:
    if workers == 0:
        yield map
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="care")
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _counted(
    squares: Iterable[NDArray[np.uint8]], step: Callable[[int], None]
) -> Iterator[NDArray[np.uint8]]:
    for done, square in enumerate(squares, 1):
        step(done)
        yield square


class _Sets:
    """Sets of numbers below `count`, joined pair by pair; each is known by its smallest number."""

    def __init__(self, count: int, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._above = list(range(count))
        for one, other in pairs:
            self.join(one, other)

    def first(self, number: int) -> int:
        while self._above[number] != number:
            self._above[number] = self._above[self._above[number]]
            number = self._above[number]
        return number

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._above[high] = low

    def groups(self) -> list[list[int]]:
        """Return the sets of two or more, each sorted."""
        members = defaultdict[int, list[int]](list)
        for number in range(len(self._above)):
            members[self.first(number)].append(number)
        return [group for group in members.values() if len(group) > 1]
