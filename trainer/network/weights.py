"""Pretrained weights: what they expect of pixels, the settings that follow, and files of them.

Nothing is downloaded for it. torchvision, timm and torch are imported only where they are needed.
"""

import copy
import difflib
import math
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common import files
from trainer.common.console import log
from trainer.common.errors import UserError, needed_by
from trainer.images.decode import FILTERS
from trainer.images.folder import ImageFolder
from trainer.settings.config import (
    PLAIN,
    RUINOUS_LR,
    Config,
    PixelSpec,
    epochs_for,
    fill_pixels,
    norm_stats_for,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def resolve(config: Config, images: ImageFolder) -> Config:
    """Return the settings with a value for each that isn't given.

    Say in the log what is assumed, and what goes against the weights.
    """
    config = copy.deepcopy(config)
    pictures = len(images.splits["train"].paths)
    config.train.epochs = epochs_for(config.train, pictures)
    config.model.norm_stats = norm_stats_for(config, pictures)
    name, weights = config.model.name, config.model.weights
    if weights is None:
        return config  # `config.load` knew the rest
    spec, notes = expected(name, weights)
    if not is_file(weights):
        notes = departures(config, spec) + notes
    else:
        assumed = ", ".join(_not_given(config, spec))
        if assumed:
            log.warning(
                "model.weights=%s: a file doesn't say what its network expects; assumed: %s",
                weights,
                assumed,
            )
    if notes:
        log.warning("the weights of %s: %s", name, "; ".join(notes))
    lr = config.optim.lr
    if config.model.freeze == "none" and lr is not None and lr >= RUINOUS_LR[config.optim.name]:
        log.warning(
            "optim.lr=%g on all layers makes pretrained weights forget most of what they know; "
            "leave it out, or give model.freeze=backbone",
            lr,
        )
    fill_pixels(config, spec)
    return config


def expected(name: str, weights: str) -> tuple[PixelSpec, list[str]]:
    """Return what these weights expect, and what of it we do otherwise, a phrase each.

    For a file: what the library's own weights of that network expect. Raise UserError for a name
    or weights that don't exist.
    """
    if name == "small_cnn":
        return PLAIN, []
    if name.startswith("timm/"):
        return _of_timm(name)
    return _of_torchvision(name, weights)


def departures(config: Config, spec: PixelSpec) -> list[str]:
    """Return a phrase for each setting that isn't what the weights expect."""
    data, model, lines = config.data, config.model, []
    size = data.size or spec.size
    resize = spec.resize_for(size)
    if size != spec.size:
        lines.append(f"data.size={size}, they were trained for {spec.size}")
    if data.resize not in (None, resize):
        lines.append(f"data.resize={data.resize}, they expect {resize} with data.size={size}")
    if data.interpolation not in (None, spec.interpolation):
        lines.append(f"data.interpolation={data.interpolation}, they expect {spec.interpolation}")
    for key, given, expects in (("mean", model.mean, spec.mean), ("std", model.std, spec.std)):
        if given is not None and not all(map(_close, given, expects)):
            lines.append(f"model.{key}={_shown(given)}, they expect {_shown(expects)}")
    return lines


def _not_given(config: Config, spec: PixelSpec) -> list[str]:
    """Return the settings that are taken from `spec`, as key=value."""
    size = config.data.size or spec.size
    values = {
        "data.size": (config.data.size, spec.size),
        "data.resize": (config.data.resize, spec.resize_for(size)),
        "data.interpolation": (config.data.interpolation, spec.interpolation),
        "model.mean": (config.model.mean, _shown(spec.mean)),
        "model.std": (config.model.std, _shown(spec.std)),
    }
    return [f"{key}={value}" for key, (given, value) in values.items() if given is None]


def _close(given: float, expects: float) -> bool:
    return math.isclose(given, expects, abs_tol=1e-3)


def _shown(values: Any) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"


# --- torchvision ---


def torchvision_weights(name: str, weights: str | None) -> Any:
    """Return the member of torchvision's enumeration, None for a file or none.

    Raise UserError for a name or weights that don't exist.
    """
    import torchvision  # imported here: it is slow, and many runs need none of it

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        examples = ", ".join(near or ["resnet50", "mobilenet_v2", "convnext_tiny"])
        raise UserError(
            f"model.name={name} is not allowed; allowed: small_cnn, timm/NAME, "
            f"or torchvision's own names, such as {examples}"
        )
    if weights is None or is_file(weights):
        return None
    allowed = torchvision.models.get_model_weights(name)
    if weights not in allowed.__members__:  # DEFAULT is one of them
        raise UserError(
            f"model.weights={weights}: there is no such file, "
            f"and {name} has no weights of that name; "
            f"allowed: {', '.join(allowed.__members__)}, null, or a file with a state dict"
        )
    return allowed[weights]


def _of_torchvision(name: str, weights: str) -> tuple[PixelSpec, list[str]]:
    if is_file(weights):
        weights = "DEFAULT"
    member = torchvision_weights(name, weights)
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
    """Return the package. Raise UserError where it isn't there, or has no model of that name."""
    with needed_by(f"model.name={name}", "timm"):
        import timm  # imported here: optional, and slow
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        near = ", ".join(timm.list_models(f"*{short.split('.')[0][:8]}*")[:5])
        hint = ""
        if near:
            hint = f"; allowed, for example: {near}"
        raise UserError(f"model.name={name}: timm has no such model{hint}")
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
    expects = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict())
    _, height, width = expects["input_size"]
    size, notes = min(height, width), []
    if height != width:
        notes.append(f"they were trained on {width} x {height} px, here squares of {size} are cut")
    resize = math.floor(size / expects["crop_pct"])  # as timm's own transform rounds
    if resize < size:
        notes.append(f"timm pads pictures of {resize} px to {size}, here they are shrunk to {size}")
    interpolation = expects["interpolation"]
    if interpolation not in FILTERS:
        notes.append(f"they expect {interpolation}, here bilinear is taken")
        interpolation = "bilinear"
    other = {"squash": "squeezes a picture into", "border": "pads a picture to"}
    if expects["crop_mode"] in other:
        does = other[expects["crop_mode"]]
        notes.append(f"timm {does} the square, here the square is cut from its centre")
    spec = PixelSpec(
        tuple(expects["mean"]), tuple(expects["std"]), max(resize, size), size, interpolation
    )
    return spec, notes


# --- files ---


def is_file(weights: str) -> bool:
    """Return whether model.weights names a file, and not weights that a library downloads."""
    return (
        os.sep in weights
        or Path(weights).suffix in (".pth", ".pt", ".safetensors", ".bin")
        or Path(weights).is_file()
    )


def state_dict(name: str, weights: str) -> "dict[str, Tensor]":
    """Return the tensors of a state-dict file of the model `name`. No code in it is run.

    Raise Unreadable, and UserError for a file that holds something else.
    """
    # imported here: settings are checked, and departures told, before PyTorch is loaded.
    import torch
    from safetensors.torch import load

    path = Path(weights)
    if not files.patiently(path, path.is_file):
        raise UserError(f"model.weights={weights}: there is no such file")
    data = files.patiently(path, path.read_bytes)
    try:
        if path.suffix == ".safetensors":
            state: Any = load(data)
        else:
            state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # each format, and each kind of damage, has its own exception class
        raise UserError(
            f"model.weights={weights} is damaged, or holds more than tensors, "
            f"which is not loaded for safety; allowed: a state dict for {name}, "
            "saved by torch.save(model.state_dict(), FILE) or as safetensors"
        ) from error
    for key in ("state_dict", "model"):  # the wrappings of common training scripts
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(map(torch.is_tensor, state.values()))
    if not tensors:
        raise UserError(
            f"model.weights={weights} holds no state dict; "
            "allowed: names with tensors, as model.state_dict() gives them"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def fill(network: "nn.Module", state: "dict[str, Tensor]", weights: str, head: str | None) -> None:
    """Load all of a state dict but the head, which has other classes.

    Our own packages' weights (`backbone.*`, `head.*`) fit too. Raise UserError where it does not.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items()
            if key.startswith("backbone.")
        }
    of_head = {f"{head}.weight", f"{head}.bias"}
    needed = {key: value for key, value in network.state_dict().items() if key not in of_head}
    common = needed.keys() & state.keys()
    differences = {
        "lacks": [key for key in needed if key not in state],
        "has, and the model has not,": [key for key in state if key not in {*needed, *of_head}],
        "has in another shape": [
            key for key in needed if key in common and state[key].shape != needed[key].shape
        ],
    }
    for what, names in differences.items():
        if names:
            raise UserError(
                f"model.weights={weights} doesn't fit the model: it {what} "
                f"{', '.join(names[:3])} ({len(names)} in all); check model.name"
            )
    network.load_state_dict({key: state[key] for key in needed}, strict=False)
