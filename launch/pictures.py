"""The pictures of a run, looked at by the trainer's own eyes before anything is rented for them."""

import copy
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.cloud import s3
from launch.targets.base import TargetConfig
from launch.targets.spec import resolved
from trainer.common import files
from trainer.common.console import ProgressBar
from trainer.common.cpu import cores
from trainer.common.text import listed
from trainer.images import folder
from trainer.images.datasets import list_images
from trainer.images.decode import ImageError
from trainer.images.folder import ImageFolder
from trainer.settings import config as settings

SIDE = 32  # pixels: enough to know that a picture decodes; a JPEG's decoder works at an eighth
SHOWN = 3  # broken pictures that a line names


def look(target: TargetConfig, overrides: Sequence[str], data: Path) -> tuple[str, int]:
    """Return what is in a folder of pictures, in a line, and how many there are to train on.

    Each is decoded once, small, and what came of it is remembered by the folder's content. Raise
    UserError for a folder that can't be trained on.
    """
    composed = copy.deepcopy(resolved(target, overrides, data).composed)
    composed.platform.cache = str(s3.DIGESTS.parent)  # this machine's: the target's is elsewhere
    config = settings.load(composed)
    images = list_images(config)
    broken = _broken(images, data)

    def check(path: str) -> None:
        if path in broken:
            raise ImageError(broken[path])

    whole = folder.quarantine(images, check, 0, config.data.max_broken, lambda *_: None)
    counts = ", ".join(f"{len(split.paths):,} {name}" for name, split in whole.splits.items())
    line = f"{counts}; {len(whole.classes)} classes"
    if whole.broken:
        names = listed((f"{Path(path).name} ({why})" for path, why in whole.broken), SHOWN)
        line += f"; {len(whole.broken)} can't be used: {names}"
    return line, whole.count("train")


def _broken(images: ImageFolder, data: Path) -> dict[str, str]:
    """Return the pictures that don't decode, with the reasons, by path."""
    memo = s3.DIGESTS.with_name("whole") / f"{s3.digest(data)}.json"
    paths = sorted({path for split in images.splits.values() for path in split.paths})
    names = {path: str(Path(path).relative_to(data)) for path in paths if _inside(path, data)}
    try:
        known: dict[str, str] = dict(json.loads(memo.read_text()))
        return {path: known[name] for path, name in names.items() if name in known}
    except (OSError, ValueError, TypeError):  # not looked at yet, or damaged
        pass
    found = _decoded(paths)
    kept = {names[path]: why for path, why in found.items() if path in names}
    files.keep(memo, json.dumps(kept))
    return found


def _inside(path: str, data: Path) -> bool:
    return Path(path).is_relative_to(data)


def _decoded(paths: Sequence[str]) -> dict[str, str]:
    """Decode all pictures; return those that don't, with the reasons."""

    def reason(path: str) -> str | None:
        try:
            folder.read_shrunk(path, SIDE, "bilinear")
        except ImageError as error:
            return str(error)
        return None

    found = {}
    threads = ThreadPoolExecutor(cores(), thread_name_prefix="look")
    with threads, ProgressBar("checking pictures", len(paths)) as progress:
        for path, why in zip(paths, threads.map(reason, paths), strict=True):
            progress.advance()
            if why is not None:
                found[path] = why
    return found
