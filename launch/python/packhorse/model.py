"""`Model`: a model package that has proven itself, and what it says of pictures."""

import html
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from serving import bulk, sources
from serving.backends import Scores
from serving.locate import NEWEST, package_of
from serving.package import Package, load_for_command
from serving.sources import Source
from trainer.common.console import ProgressBar
from trainer.common.errors import UserError
from trainer.images.decode import ImageError
from trainer.results.prediction import Prediction, predictions
from trainer.results.text import percent

# A file, a Pillow picture, or pixels uint8 [height, width, 3] (RGB) or [height, width] (grey).
Image = str | os.PathLike[str] | PIL.Image.Image | NDArray[np.uint8]

# What PNG holds without a loss.
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class Model:
    """A model that has proven itself; it computes in ONNX Runtime, without PyTorch."""

    package: Package

    @classmethod
    def load(cls, path: str | os.PathLike[str] = NEWEST) -> Self:
        """Return the model of a package or a run's directory, or of the newest run in runs/.

        Raise UserError.
        """
        return cls(load_for_command(package_of(os.fspath(path)), bulk.THREADS))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes."""
        return self.package.classes

    @property
    def metrics(self) -> dict[str, float]:
        """How good it was on its run's test pictures: `test_top1` in 0..1, and so on."""
        return self.package.metrics

    def predict(self, images: Image | Iterable[Image]) -> list[Prediction]:
        """Return what each picture shows, in their order, computed on all cores.

        images: one, or several; [N, height, width, 3] is N. Prepared, computed and calibrated by
        the code that serves. Raise UserError for a picture that can't be read.
        """
        pictures = [_source(number, image) for number, image in enumerate(_several(images))]
        said: list[Prediction] = []

        def said_of(picture: Source, data: bytes, scores: Scores) -> Prediction:
            [prediction] = predictions(self.package.calibration, self.classes, *scores)
            return prediction

        with ProgressBar("pictures", len(pictures)) as bar:
            for picture, outcome in bulk.each(self.package, pictures, said_of):
                if isinstance(outcome, Exception):
                    raise UserError(f"{picture.name}: {outcome}") from outcome
                said.append(outcome)
                bar.advance()
        return said

    def _repr_html_(self) -> str:
        known = html.escape(", ".join(self.classes[:10]))
        more = len(self.classes) - 10
        if more > 0:
            known += f" and {more} more"
        lines = [
            f"<b>{self.package.config['model.name']}</b>, {len(self.classes)} classes: {known}"
        ]
        top1 = self.metrics.get("test_top1")
        if top1 is not None:
            lines.append(f"accuracy on test {percent(top1)}")
        return "<br>".join(lines)


def _several(images: Image | Iterable[Image]) -> Iterator[Image]:
    is_one = isinstance(images, str | os.PathLike | PIL.Image.Image)
    if is_one or (isinstance(images, np.ndarray) and images.ndim < 4):
        yield images  # type: ignore[misc]
    else:
        yield from images  # type: ignore[misc]


def _source(number: int, image: Image) -> Source:
    """Return a picture as `bulk` takes it. number: its place, for its name. Raise UserError."""
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        return sources.on_disk(str(path), str(path), path.name)
    name = f"picture {number}"
    if isinstance(image, np.ndarray):
        shape = image.shape
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and shape[2] == 3)):
            raise UserError(
                f"{name}: an array of {image.dtype} {list(shape)}; "
                "allowed: uint8 [height, width, 3] in RGB, or [height, width]"
            )
        image = PIL.Image.fromarray(image)
    if not isinstance(image, PIL.Image.Image):
        raise UserError(
            f"{name}: a {type(image).__name__} is no picture; "
            "allowed: a path, a Pillow picture or an array"
        )
    return Source(name, name, partial(_encoded, image))


def _encoded(image: PIL.Image.Image) -> bytes:
    """Return a picture's file, so that it goes the way of all others, losslessly."""
    file = io.BytesIO()
    try:
        if image.mode not in PNG_MODES:
            image = image.convert("RGB")
        image.save(file, "PNG", compress_level=1, exif=image.getexif())
    except (OSError, ValueError) as error:  # of a file that Pillow reads only now
        raise ImageError(str(error)) from error
    return file.getvalue()
