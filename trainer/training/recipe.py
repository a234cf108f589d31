"""A recipe: the ordinary settings that model=auto chose for a run, and why.

It is decided by measuring on the pictures (trainer/training/decision.py), and written to
recipe.json beside the checkpoints before training. A run that continues, here or on a rented
machine, follows it.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.common import files
from trainer.common.console import loading, log
from trainer.common.errors import Unreadable, UserError
from trainer.common.objects import parsed
from trainer.images.folder import ImageFolder
from trainer.network import weight_folder
from trainer.settings import config as settings
from trainer.settings.config import AUTO, Config
from trainer.training.run import Run

FILE = "recipe.json"
FORMAT = 1

# As of 2026-11: good in general, and pretrained in different ways; which is best depends on the
# pictures. On a GPU, self-supervised and image-text transformers beside supervised networks; on a
# CPU, networks of at most 4 GFLOP a picture.
CANDIDATES = {
    "cuda": (
        "timm/vit_small_patch14_dinov2.lvd142m",
        "timm/vit_base_patch16_dinov3.lvd1689m",
        "timm/vit_base_patch16_siglip_224.v2_webli",
        "convnext_tiny",
        "convnext_base",
        "resnet50",
    ),
    "cpu": (
        "mobilenet_v3_large",
        "efficientnet_b0",
        "timm/tf_efficientnet_lite0.in1k",
        "resnet50",
        "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    ),
}


@dataclass
class Candidate:
    """A network that was measured, or the reason why it wasn't.

    accuracy: of a probe, on pictures that it didn't see; error: its standard error. milliseconds:
    of a forward pass of one picture on this machine.
    """

    name: str
    licence: str = ""
    accuracy: float = 0.0
    error: float = 0.0
    gflops: float = 0.0
    megabytes: float = 0.0
    milliseconds: float = 0.0
    pictures: int = 0
    left_out: str = ""


@dataclass
class Recipe:
    """The decision: settings by dotted key, the measurements, and the reasons."""

    settings: dict[str, Any]
    candidates: list[Candidate]
    reasons: list[str]
    format: int = FORMAT


def settled(run: Run, images: ImageFolder) -> tuple[Run, Recipe | None]:
    """Return the run with the settings that model=auto chose, and its recipe.

    The recipe is None if the user named a network. If none is written yet, rank 0 measures, and the
    others wait. Raise UserError for settings that contradict each other, and Interrupted when asked
    to stop: features computed until then are cached.
    """
    if run.config.model.name != AUTO:
        return run, None

    recipe: Recipe | None = None
    if run.world.is_main_process:
        recipe = _written(run.checkpoints / FILE) or _kept(run) or _decided(run, images)
    run.world.barrier(run.stop)
    recipe = run.world.broadcast_from_main(lambda: recipe)
    assert recipe is not None
    config = applied(run.config, recipe.settings)
    return replace(run, config=config, recipe=dataclasses.asdict(recipe)), recipe


def _decided(run: Run, images: ImageFolder) -> Recipe:
    """Decide the recipe, and write it."""
    with loading():
        # imported here: a written recipe is followed without PyTorch.
        from trainer.training.decision import Decision

    recipe = Decision(run, images).recipe()
    _write(run.checkpoints / FILE, recipe)
    run.note_times()
    return recipe


def _write(path: Path, recipe: Recipe) -> None:
    if path.is_dir():
        files.remove(path)
    files.write(path, json.dumps(dataclasses.asdict(recipe), indent=1) + "\n")


def _kept(run: Run) -> Recipe | None:
    """Return the newest checkpoint's recipe, if the recipe's file was lost."""
    if not any(run.checkpoints.glob("step-*")):
        return None
    # imported here: as above.
    from trainer.training import checkpoint

    try:
        newest = checkpoint.newest(run.checkpoints)
    except UserError:  # the run says so when it resumes
        return None
    if newest is None or newest[1]["facts"].get("recipe") is None:
        return None
    recipe = _parsed(newest[1]["facts"]["recipe"])
    _write(run.checkpoints / FILE, recipe)
    log.info("model=%s: as decided earlier, by %s", AUTO, newest[0])
    return recipe


def names(config: Config, device: str) -> Sequence[str]:
    """Return the networks to compare; some may be unavailable. device: cpu or cuda.

    With a folder of weights, only that folder's: in a closed network nothing can be downloaded.
    """
    model = config.model
    if model.candidates is not None:
        return model.candidates
    if model.weights_dir is not None:
        return sorted({each.name for each in weight_folder.candidates(model.weights_dir)})
    return CANDIDATES.get(device, CANDIDATES["cpu"])


def may_differ_by(config: Config, keys: Iterable[str]) -> bool:
    """Return whether the recipe may depend on these settings.

    With model.freeze given, nothing is trained to decide, so the settings of training don't matter;
    otherwise each trial of a sweep decides for itself.
    """
    schema = settings.schema()
    for key in keys:
        section, _, name = key.partition(".")
        how = section == "optim" or (section == "train" and name not in ("epochs", "batch_size"))
        if key in schema and not schema[key].metadata["identity"]:
            continue
        if section == "package" or (how and config.model.freeze != "auto"):
            continue
        return True
    return False


def probe_of(name: str) -> dict[str, Any]:
    """Return the settings to solve only the head of a network."""
    return {
        "model.name": name,
        "model.head": "probe",
        "model.freeze": "backbone",
        "train.epochs": 0,
    }


def glanced(config: Config, device: str) -> Config:
    """Return the settings for a check without training: for model=auto, the first network.

    The doctor and care use it, since they don't decide.
    """
    candidates = names(config, device)
    if config.model.name != AUTO or not candidates:
        return config
    log.info("model=%s: checked with %s, the first of its candidates", AUTO, candidates[0])
    return applied(config, {"model.name": candidates[0]})


def applied(config: Config, values: dict[str, Any]) -> Config:
    """Return the settings with some of them replaced, by dotted key."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        *sections, name = key.split(".")
        node: Any = config
        for section in sections:
            node = getattr(node, section)
        setattr(node, name, value)
    settings.fill_recipe(config)
    if config.model.weights is None:
        settings.fill_pixels(config, settings.pixels_from_scratch(config.model.name))
    return config


def _written(path: Path) -> Recipe | None:
    """Return the recipe from the run's start."""

    def read() -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            return b""

    try:
        text = files.patiently(path, read)
        if text is None:
            return None
        recipe = _parsed(parsed(text) or {})
    except (Unreadable, AssertionError, TypeError, KeyError):
        log.warning(
            "%s can't be read; taking the decision from a checkpoint, or measuring again", path
        )
        return None
    log.info("model=%s: as decided earlier, by %s", AUTO, path)
    return recipe


def _parsed(values: dict[str, Any]) -> Recipe:
    """Return a recipe from JSON. Raise AssertionError, TypeError, KeyError for anything else."""
    assert values["format"] == FORMAT and isinstance(values["settings"], dict)
    assert values["settings"].keys() <= settings.schema().keys()
    assert all(isinstance(reason, str) for reason in values["reasons"])
    candidates = [Candidate(**each) for each in values["candidates"]]
    return Recipe(**(values | {"candidates": candidates}))


def table(candidates: Sequence[Candidate]) -> list[str]:
    """Return the measured candidates as lines of 80 columns.

    The name comes last: timm's have up to 50 characters. The report has the licences too.
    """
    rows = [("accuracy", "GFLOP", "MB", "ms here", "network")]
    rows += [
        (
            f"{each.accuracy:.1%} +- {each.error:.1%}",
            f"{each.gflops:.2f}",
            f"{each.megabytes:.0f}",
            f"{each.milliseconds:.1f}",
            each.name,
        )
        for each in candidates
        if not each.left_out
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
