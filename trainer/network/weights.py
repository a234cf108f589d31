"""What pretrained weights expect of pixels, by torchvision's and timm's own word, and the settings that follow.

Nothing is downloaded for it. torchvision and timm are imported only where a setting names weights of theirs.
"""

import copy
import math
import os
from pathlib import Path
from typing import Any

from trainer.common.console import log
from trainer.common.errors import UserError, install_command
from trainer.images.decode import FILTERS
from trainer.images.folder import ImageFolder
from trainer.settings.config import PLAIN, RUINOUS_LR, Config, PixelSpec, epochs_for, fill_pixels


def resolve(config: Config, found: ImageFolder) -> Config:
    """Give the settings with a value for each that isn't given; say what is assumed, and what goes against the weights."""
    config = copy.deepcopy(config)
    config.train.epochs = epochs_for(config.train, len(found.splits["train"].paths))
    name, weights = config.model.name, config.model.weights
    if weights is None:
        return config  # `config.load` knew the rest
    spec, notes = expected(name, weights)
    if not is_file(weights):
        notes = departures(config, spec) + notes
    elif assumed := _not_given(config, spec):
        log.warning(
            "model.weights=%s: a file doesn't say what its network expects; assumed: %s",
            weights,
            ", ".join(assumed),
        )
    if notes:
        log.warning("the weights of %s: %s", name, "; ".join(notes))
    lr = config.optim.lr
    if config.model.freeze == "none" and lr is not None and lr >= RUINOUS_LR[config.optim.name]:
        log.warning(
            "optim.lr=%g on all layers makes pretrained weights forget most of what they know; leave it out, or give model.freeze=backbone",
            lr,
        )
    fill_pixels(config, spec)
    return config


def expected(name: str, weights: str) -> tuple[PixelSpec, list[str]]:
    """What these weights expect, and what of it we do otherwise, a phrase each. For a file: what the library's own weights of that network do.

    Raises UserError for a name or weights that don't exist.
    """
    if name == "small_cnn":
        return PLAIN, []
    return _of_timm(name) if name.startswith("timm/") else _of_torchvision(name, weights)


def departures(config: Config, spec: PixelSpec) -> list[str]:
    """A phrase for each setting that isn't what the weights expect."""
    data, model, lines = config.data, config.model, []
    if data.size not in (None, spec.size):
        lines.append(f"data.size={data.size}, they were trained for {spec.size}")
    resize = spec.resize_for(data.size or spec.size)
    if data.resize not in (None, resize):
        lines.append(
            f"data.resize={data.resize}, they expect {resize} with data.size={data.size or spec.size}"
        )
    if data.interpolation not in (None, spec.interpolation):
        lines.append(f"data.interpolation={data.interpolation}, they expect {spec.interpolation}")
    for key, given, wanted in (("mean", model.mean, spec.mean), ("std", model.std, spec.std)):
        if given is not None and not all(map(_close, given, wanted)):
            lines.append(f"model.{key}={_shown(given)}, they expect {_shown(wanted)}")
    return lines


def _not_given(config: Config, spec: PixelSpec) -> list[str]:
    """The settings that are taken from `spec`, as key=value."""
    size = config.data.size or spec.size
    values = {
        "data.size": (config.data.size, spec.size),
        "data.resize": (config.data.resize, spec.resize_for(size)),
        "data.interpolation": (config.data.interpolation, spec.interpolation),
        "model.mean": (config.model.mean, _shown(spec.mean)),
        "model.std": (config.model.std, _shown(spec.std)),
    }
    return [f"{key}={value}" for key, (given, value) in values.items() if given is None]


def _close(given: float, wanted: float) -> bool:
    return math.isclose(given, wanted, abs_tol=1e-3)


def _shown(values: Any) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"


# --- torchvision ---


def torchvision_weights(name: str, weights: str | None) -> Any:
    """The member of torchvision's enumeration, None for a file or none. Raises UserError for a name or weights that don't exist."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        import difflib

        near = difflib.get_close_matches(name, names, n=3) or [
            "resnet50",
            "mobilenet_v2",
            "convnext_tiny",
        ]
        raise UserError(
            f"model.name={name} is not allowed; allowed: small_cnn, timm/NAME, or torchvision's own names, such as {', '.join(near)}"
        )
    if weights is None or is_file(weights):
        return None
    allowed = torchvision.models.get_model_weights(name)
    if weights not in allowed.__members__:  # DEFAULT is one of them
        raise UserError(
            f"model.weights={weights}: there is no such file, and {name} has no weights of that name; "
            f"allowed: {', '.join(allowed.__members__)}, null, or a file with a state dict"
        )
    return allowed[weights]


def _of_torchvision(name: str, weights: str) -> tuple[PixelSpec, list[str]]:
    member = torchvision_weights(name, "DEFAULT" if is_file(weights) else weights)
    transform = member.transforms()
    spec = PixelSpec(
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        resize=transform.resize_size[0],
        size=transform.crop_size[0],
        interpolation=transform.interpolation.value,
    )
    return spec, []


# --- timm ---


def import_timm(name: str) -> Any:
    """The package. Raises UserError where it isn't installed, or has no model of that name."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model.name={name} needs the package timm: {install_command('timm')}"
        ) from error
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        near = ", ".join(timm.list_models(f"*{short.split('.')[0][:8]}*")[:5])
        raise UserError(
            f"model.name={name}: timm has no such model"
            + (f"; allowed, for example: {near}" if near else "")
        )
    return timm


def _of_timm(name: str) -> tuple[PixelSpec, list[str]]:
    timm = import_timm(name)
    short = name.removeprefix("timm/")
    try:
        pretrained = timm.get_pretrained_cfg(short)
    except RuntimeError as error:  # of a tag that there is not
        tags = ", ".join(timm.list_pretrained(f"{short.split('.')[0]}.*")[:5])
        raise UserError(
            f"model.name={name}: timm has no such weights; allowed, for example: {tags}"
        ) from error
    if pretrained is None:
        return PLAIN, []
    wanted = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict())
    _, height, width = wanted["input_size"]
    size, notes = min(height, width), []
    if height != width:
        notes.append(f"they were trained on {width} x {height} px, here squares of {size} are cut")
    resize = math.floor(size / wanted["crop_pct"])  # as timm's own transform rounds
    if resize < size:
        notes.append(f"timm pads pictures of {resize} px to {size}, here they are shrunk to {size}")
    interpolation = wanted["interpolation"]
    if interpolation not in FILTERS:
        notes.append(f"they expect {interpolation}, here bilinear is taken")
        interpolation = "bilinear"
    if wanted["crop_mode"] == "squash":
        notes.append(
            "timm squeezes a picture into the square, here the square is cut from its centre"
        )
    if wanted["crop_mode"] == "border":
        notes.append("timm pads a picture to the square, here the square is cut from its centre")
    spec = PixelSpec(
        tuple(wanted["mean"]), tuple(wanted["std"]), max(resize, size), size, interpolation
    )
    return spec, notes


# --- files ---


def is_file(weights: str) -> bool:
    """Whether model.weights names a file, and not weights that a library downloads."""
    return (
        os.sep in weights
        or Path(weights).suffix in (".pth", ".pt", ".safetensors", ".bin")
        or Path(weights).is_file()
    )
