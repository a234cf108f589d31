"""Which images are the same, or nearly, and which show nothing: from bytes and from small pixels.

Two images are nearly the same where one was made from the other: saved again, at another quality
or size, mirrored (left to right), or shifted by a few pixels. They are told by their shapes and not
by their brightness: every image becomes a grey square of SIDE cells, from which a coarse sketch is
taken, to find candidates by matrix products, and a finer spectrum, to compare them at several small
shifts. Where there are many images, each is compared with those in the nearest clusters only.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

SIDE = 64  # cells of the grey square
COARSE = 16  # cells of its sketch
FINEST, COARSEST = 12, 4  # periods over the square: what the spectrum keeps of it
SHIFTS = np.arange(-2, 3) * 0.75  # cells: up to 6 pixels where the image has 256

CANDIDATE = 0.6  # correlation of two sketches above which two images are compared at all
NEIGHBOURS = 16  # compared with each image, at most
# Of 31,500 parts of photos, in clusters of 1,024 or 64, as many copies are found as by comparing
# each with all others (docs/decisions).
CLUSTER, NEAREST = 1024, 4  # images in a cluster, on average; clusters that an image is compared in
SAMPLE, ROUNDS = 128, 8  # of k-means: images of each cluster, and how often the centres are moved
BLOCK = 512  # images sketched at a time
SCORES = 1 << 20  # pairs of sketches compared at a time: 16 MB
PAIRS = 8192  # spectra compared at a time: 14 MB
# Correlation of two spectra. Of 4,902 photos and parts of photos the most alike two have 0.91;
# saved again, shrunk or shifted, the least alike has 0.957 (docs/decisions). Clothes on a black
# ground, all of one cut, reach 0.98: there an image must stand out from what is like it too.
SAME, ALIKE, STANDS_OUT = 0.985, 0.94, 0.25

# Of the grey square, 0 to 255: nearly nothing in it is as bright; its values hardly differ.
DARK, BLANK = 24, 3.0
BRIGHT = 0.01  # share of the cells from which it isn't dark


@dataclass(frozen=True)
class Sketches:
    """N images, small. coarse: float32 [N, COARSE**2]; spectra: complex64 [N, K]; both unit length.

    dark, blank: bool [N].
    """

    coarse: NDArray[np.float32]
    spectra: NDArray[np.complex64]
    dark: NDArray[np.bool_]
    blank: NDArray[np.bool_]


def square(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] as a grey square [SIDE, SIDE]."""
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))


def sketch(squares: Iterable[NDArray[np.uint8]]) -> Sketches:
    """Return the sketches of grey squares, as `square` makes them."""
    parts = [_sketch(np.stack(block).astype(np.float32)) for block in _blocks(squares)]
    coarse, spectra, dark, blank = zip(*parts, strict=True)
    return Sketches(
        np.concatenate(coarse), np.concatenate(spectra), np.concatenate(dark), np.concatenate(blank)
    )


def _blocks(squares: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.uint8]]]:
    block: list[NDArray[np.uint8]] = []
    for each in squares:
        block.append(each)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def _sketch(
    grey: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.complex64], NDArray[np.bool_], NDArray[np.bool_]]:
    flat = grey.reshape(len(grey), -1)
    dark, blank = (flat >= DARK).mean(axis=1) < BRIGHT, flat.std(axis=1) < BLANK
    cells = SIDE // COARSE
    rows = grey.reshape(len(grey), COARSE, cells, SIDE).mean(axis=2)
    small = rows.reshape(len(grey), COARSE, COARSE, cells).mean(axis=3)
    details = (small - _blurred(_blurred(small))).reshape(len(grey), -1)
    window = np.sqrt(np.hanning(SIDE + 2)[1:-1])  # what a shift moves over the edge counts little
    centred = grey - grey.mean(axis=(1, 2), keepdims=True)
    centred *= np.outer(window, window)
    _, columns, kept = _frequencies()
    twice = np.where(columns == 0, 1, 2)  # the half that a real image's spectrum leaves out
    # NumPy's takes twice as long in 64 bits, and three times as long in 32.
    terms = torch.fft.rfft2(torch.from_numpy(centred)).numpy()
    spectra = terms[:, kept] * np.sqrt(twice)
    return _unit(details).astype(np.float32), _unit(spectra).astype(np.complex64), dark, blank


def _blurred(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    for axis in (1, 2):
        width = [(0, 0), (0, 0), (0, 0)]
        width[axis] = (1, 1)
        padded = np.pad(grey, width, "edge")
        first, middle, last = (
            np.take(padded, range(start, start + grey.shape[axis]), axis) for start in range(3)
        )
        grey = np.asarray((first + 2 * middle + last) / 4, np.float32)
    return grey


def _frequencies() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return the periods of each kept term of rfft2 by rows and columns, and which are kept."""
    rows = np.fft.fftfreq(SIDE)[:, None] * SIDE
    columns = np.arange(SIDE // 2 + 1.0)[None]
    periods = np.hypot(rows, columns)
    kept = (periods >= COARSEST) & (periods <= FINEST)
    return (
        np.broadcast_to(rows, kept.shape)[kept],
        np.broadcast_to(columns, kept.shape)[kept],
        kept,
    )


def _unit(values: NDArray[Any]) -> NDArray[Any]:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    unit: NDArray[Any] = values / np.maximum(lengths, 1e-6)
    return unit


def near(sketches: Sketches, step: Callable[[int], None]) -> list[tuple[int, int, float]]:
    """Return the pairs of images that are nearly the same, as (number, larger number, how).

    how: their correlation, up to 1. A blank image is like none.
    step(images done): called between blocks; it may raise, to end the work early.
    """
    kept = np.flatnonzero(~sketches.blank)
    if len(kept) < 2:
        return []
    coarse, spectra = sketches.coarse[kept], sketches.spectra[kept]
    clusters = _Clusters(spectra)
    searched = clusters.nearest(spectra, NEAREST)
    usual = np.zeros(len(kept))
    pairs: dict[tuple[int, int], float] = {}
    views = ((coarse, spectra), _mirrored(coarse, spectra))
    for view, (others, their_spectra) in enumerate(views):
        search, compare = (partial(_tell, step, len(kept), 2 * view + half) for half in (0, 1))
        own = clusters.nearest(their_spectra, 1)[:, 0]
        first, second, place = _neighbours(coarse, others, searched, own, search)
        likeness = _aligned(spectra, their_spectra, first, second, compare)
        # What an image is like anyway: half of its neighbours are more like it.
        table = np.zeros((len(kept), NEIGHBOURS))
        table[first, place] = likeness
        usual = np.maximum(usual, np.median(table, axis=1))
        alike = likeness >= ALIKE
        for one, other, how in zip(first[alike], second[alike], likeness[alike], strict=True):
            pair = min(one, other), max(one, other)
            pairs[pair] = max(pairs.get(pair, 0), float(how))
    step(len(kept))
    return [
        (int(kept[one]), int(kept[other]), how)
        for (one, other), how in sorted(pairs.items())
        if how >= SAME or 1 - how <= STANDS_OUT * (1 - max(usual[one], usual[other]))
    ]


def _tell(step: Callable[[int], None], images: int, stage: int, share: float) -> None:
    """Say how many images are done, of which each of the four stages counts a quarter."""
    step(int((stage + share) / 4 * images))


def _mirrored(
    coarse: NDArray[np.float32], spectra: NDArray[np.complex64]
) -> tuple[NDArray[np.float32], NDArray[np.complex64]]:
    """Return the sketches and spectra of the images mirrored left to right.

    That turns columns round: the term of (row, column) periods is the conjugate of (-row, column),
    turned by the one cell that the first column now lies from the edge.
    """
    cells = coarse.reshape(-1, COARSE, COARSE)[:, :, ::-1].reshape(coarse.shape)
    rows, columns, _ = _frequencies()
    place = {term: number for number, term in enumerate(zip(rows, columns, strict=True))}
    opposite = [place[-row, column] for row, column in zip(rows, columns, strict=True)]
    turns = np.exp(2j * np.pi * columns / SIDE).astype(np.complex64)
    return np.ascontiguousarray(cells), spectra[:, opposite].conj() * turns


class _Clusters:
    """Images in clusters of about CLUSTER, by the magnitudes of their spectra (complex64 [N, K]).

    A shift turns a spectrum's phases and leaves the magnitudes, so copies lie in the same cluster,
    or in one nearby. The centres are found by k-means on the unit sphere, from a random sample that
    is the same each time.
    """

    def __init__(self, spectra: NDArray[np.complex64]) -> None:
        count = -(-len(spectra) // CLUSTER)
        most = min(len(spectra), count * SAMPLE)
        sample = np.random.default_rng(0).choice(len(spectra), most, replace=False)
        self._usual = np.abs(spectra[sample]).mean(axis=0)
        shapes = self._shapes(spectra[sample])
        self._centres = shapes[:count].copy()
        for _ in range(ROUNDS):
            own = (shapes @ self._centres.T).argmax(axis=1)
            sums = np.zeros_like(self._centres)
            np.add.at(sums, own, shapes)
            filled = np.unique(own)  # an empty cluster's centre stays
            self._centres[filled] = _unit(sums[filled])

    def nearest(self, spectra: NDArray[np.complex64], count: int) -> NDArray[np.int64]:
        """Return the clusters nearest to each image, [N, count]; fewer columns if there are fewer.

        In no order.
        """
        columns = min(count, len(self._centres))
        found = np.empty((len(spectra), columns), np.int64)
        for start in range(0, len(spectra), PAIRS):
            part = slice(start, start + PAIRS)
            likeness = self._shapes(spectra[part]) @ self._centres.T
            found[part] = np.argpartition(likeness, -columns, axis=1)[:, -columns:]
        return found

    def _shapes(self, spectra: NDArray[np.complex64]) -> NDArray[np.float32]:
        return _unit(np.abs(spectra) - self._usual).astype(np.float32)


def _neighbours(
    sketches: NDArray[np.float32],
    others: NDArray[np.float32],
    searched: NDArray[np.int64],
    own: NDArray[np.int64],
    tell: Callable[[float], None],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return each image's candidates: the most alike, at most NEIGHBOURS, in no order.

    searched: the clusters that each image is compared with, [N, any]. own: the cluster of each of
    the others, [N]; an image isn't compared with the other of its own number. tell(share): called
    between blocks. As three arrays: the image, its candidate, and the candidate's place, from 0.
    """
    best = np.full((len(sketches), NEIGHBOURS), -1, np.float32)
    numbers = np.zeros((len(sketches), NEIGHBOURS), np.int64)
    done = 0
    for cluster in np.unique(own):
        members = np.flatnonzero(own == cluster)
        images = np.flatnonzero((searched == cluster).any(axis=1))
        theirs = others[members].T
        block = max(1, SCORES // len(members))
        for start in range(0, len(images), block):
            rows = images[start : start + block]
            likeness = sketches[rows] @ theirs
            likeness[rows[:, None] == members] = -1
            both = np.concatenate((best[rows], likeness), axis=1)
            top = np.argpartition(both, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]
            before = np.take_along_axis(numbers[rows], np.minimum(top, NEIGHBOURS - 1), axis=1)
            new = members[np.maximum(top - NEIGHBOURS, 0)]
            numbers[rows] = np.where(top < NEIGHBOURS, before, new)
            best[rows] = np.take_along_axis(both, top, axis=1)
            done += len(rows)
            tell(done / searched.size)
    first, place = np.nonzero(best > CANDIDATE)
    return first, numbers[first, place], place


def _aligned(
    spectra: NDArray[np.complex64],
    others: NDArray[np.complex64],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    tell: Callable[[float], None],
) -> NDArray[np.float32]:
    """Return the correlation of each two images at the best of SHIFTS by SHIFTS, float32 [pairs].

    first: of each pair, in spectra; second: in others. tell(share): called between blocks.

    A shift by s cells turns the term of k periods by 2 pi k s / SIDE.
    """
    rows, columns, _ = _frequencies()
    down, right = (shifts.ravel() for shifts in np.meshgrid(SHIFTS, SHIFTS))
    turns = (rows[:, None] * down + columns[:, None] * right) / SIDE
    phases = np.exp(2j * np.pi * turns).astype(np.complex64)
    best = np.empty(len(first), np.float32)
    for start in range(0, len(first), PAIRS):
        part = slice(start, start + PAIRS)
        product = spectra[first[part]] * others[second[part]].conj()
        best[part] = (product @ phases).real.max(axis=1)
        tell(min(start + PAIRS, len(first)) / len(first))
    return best
