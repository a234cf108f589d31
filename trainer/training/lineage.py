"""What a run goes on from: another run's end (train.parent), or its weights (model.weights).

The same run with more epochs is another run, with a name of its own: what came out of the first one
stays what it was. It begins with the whole state of its parent's last checkpoint, so with
optim.schedule=constant or step it is bit for bit the run that had so many epochs from the start;
cosine depends on the number of epochs, and goes on from where the longer schedule is.
"""

from pathlib import Path
from typing import Any

from trainer.common import model_package
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.settings.config import Config
from trainer.training import checkpoint
from trainer.training.run import PARENT, Run

MAY_DIFFER = ("train.epochs", "train.parent", PARENT)


def state_of_parent(run: Run, identity: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Return the state with which a parent ended. identity: of this run. Raise UserError."""
    parent = run.config.train.parent
    assert parent is not None
    newest = checkpoint.newest(Path(parent, "checkpoints"))
    if newest is None:
        raise UserError(
            f"train.parent={parent}: it has no checkpoints; give a run's directory, or start "
            "from the weights of a package: model.weights=FILE"
        )
    path, state = newest
    then = state["facts"]["identity"]
    keys = (then.keys() | identity.keys()) - {*MAY_DIFFER}
    changed = sorted(key for key in keys if then.get(key) != identity.get(key))
    instead = f"model.weights={parent} starts from its weights alone"
    if changed == ["pictures"]:
        raise UserError(f"train.parent={parent}: it was trained on other pictures; {instead}")
    if changed:
        told = ", ".join(
            f"{key}: {then.get(key)} then, {identity.get(key)} now" for key in changed[:5]
        )
        raise UserError(
            f"train.parent={parent}: it was trained with other settings ({told}); give the same, "
            f"with more train.epochs; {instead}"
        )
    progress = state["progress"]
    if progress["epoch"] >= epochs:
        raise UserError(
            f"train.parent={parent}: it has {progress['epoch']} epochs already, and "
            f"train.epochs={epochs} is not more; raise it"
        )
    log.info("continues from %s: %d of %d epochs", path, progress["epoch"], epochs)
    return state


def of_run(run: Run) -> dict[str, Any] | None:
    """Return what a run goes on from, for its result: None where it begins by itself.

    run: the parent's place. sha256: of its last checkpoint, or of its package's manifest.
    """
    config = run.config
    if config.train.parent is not None:
        return {"run": config.train.parent, "what": "state", "sha256": run.parent_digest()}
    weights = config.model.weights
    if weights is None or not _is_ours(config):
        return None
    manifest = model_package.manifest(weights)
    return {"run": weights, "what": "weights", "sha256": manifest.get("sha256")}


def _is_ours(config: Config) -> bool:
    weights = config.model.weights
    assert weights is not None
    return Path(weights).exists() and model_package.is_package(weights)
