"""The pictures of a sweep, which must be the same for all of its trials."""

from dataclasses import replace
from pathlib import Path

from trainer.common.errors import MachineFault, UserError
from trainer.common.interrupt import Stop
from trainer.images import identity
from trainer.images.datasets import list_images
from trainer.images.identity import Sample
from trainer.settings import config as settings
from trainer.settings.config import Config
from trainer.settings.search_space import Sweep

CHOOSE = ("data", "experiment", "data.source", "data.valid_fraction")  # what the pictures are


def are_swept(sweep: Sweep) -> bool:
    """Return whether trials have different pictures."""
    schema = settings.schema()
    keys = [parameter.key for parameter in sweep.space]
    return any(key in CHOOSE or (key in schema and schema[key].metadata["path"]) for key in keys)


class Pictures:
    """The pictures as they were when the sweep began, noted in its directory."""

    def __init__(self, directory: Path, config: Config, stop: Stop) -> None:
        self._directory, self._config, self._stop = directory, config, stop
        self._index = directory / identity.INDEX

    def check(self) -> None:
        """Raise UserError where they are others now; at the beginning, note them.

        Raise MachineFault where they were there, and can't be found now. Files that look unchanged
        are not read again.
        """
        then = identity.noted(self._index)
        try:
            now = self._now()
        except UserError as error:
            if then is None or isinstance(error, MachineFault):
                raise
            raise MachineFault(f"the pictures were moved or removed: {error}") from error
        if then is None:
            identity.note(self._index, now)
        elif identity.of_samples(then) != identity.of_samples(now):
            raise UserError(
                f"{self._directory}: the pictures have changed since this sweep began: "
                f"{identity.changes(then, now)}; restore them and start the same command "
                "again, or start a new sweep with another name=..."
            )

    def digest(self) -> str:
        """Return what the pictures are."""
        self.check()
        return identity.of_samples(identity.noted(self._index) or [])

    def _now(self) -> list[Sample]:
        images = list_images(self._config, self._stop)
        paths = [path for split in images.splits.values() for path in split.paths]
        memo = Path(self._config.platform.cache, identity.DIRECTORY)
        known = identity.digests(list(dict.fromkeys(paths)), memo)
        return identity.samples(replace(images, digests=known))
