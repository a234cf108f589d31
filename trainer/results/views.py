"""The network's input in training: a few pictures, each in some of its views."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trainer.common.errors import UserError
from trainer.images.loader import MIRRORED, PLAIN, ImageLoader
from trainer.results.care import is_pixelated, picture

PICTURES, VIEWS = 6, 4


@dataclass(frozen=True)
class Views:
    """A picture's test view and some training views. seen: data URIs."""

    label: str
    plain: str
    seen: list[str]
    pixelated: bool


def views(loader: ImageLoader, solved: bool) -> list[Views]:
    """Return the views of PICTURES training images, spread over the classes.

    solved: the head was solved on plain and mirrored images, and nothing was trained on others.
    Return None if one of them can't be read any more; that is no reason to fail.
    """
    with suppress(UserError):
        return _views(loader, solved)
    return []


def _views(loader: ImageLoader, solved: bool) -> list[Views]:
    train = loader.folder.splits["train"]
    by_class = np.argsort(train.labels, kind="stable")
    count = min(PICTURES, len(by_class))
    chosen = by_class[np.linspace(0, len(by_class) - 1, count).astype(np.int64)].tolist()
    kinds = sorted({loader.view_of(epoch) for epoch in range(VIEWS)} - {PLAIN})
    if solved:
        kinds = [MIRRORED] if loader.augmentation.flip else []
    shown = {
        kind: [batch.image[0].numpy() for batch in loader.ordered_batches("train", kind, 1, chosen)]
        for kind in (PLAIN, *kinds)
    }
    return [
        Views(
            loader.folder.classes[train.labels[number]],
            picture(shown[PLAIN][place]),
            [picture(shown[kind][place]) for kind in kinds],
            is_pixelated(shown[PLAIN][place]),
        )
        for place, number in enumerate(chosen)
    ]
