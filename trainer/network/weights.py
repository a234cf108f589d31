"""Pretrained weights: the pixels that they expect, the settings that follow, and their source.

Nothing is downloaded for this. torchvision, timm and torch are imported only where they are needed.
"""

import copy
import difflib
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.common import model_package
from trainer.common.console import log
from trainer.common.errors import UserError, needed_by
from trainer.images.decode import FILTERS
from trainer.images.folder import ImageFolder
from trainer.network.weight_folder import (
    WeightsFile,
    architecture,
    find,
    is_file,
    looked_for,
    named,
    note_of,
    rank,
)
from trainer.settings.config import (
    OWN,
    PLAIN,
    RUINOUS_LR,
    TOY,
    TOY_PIXELS,
    Config,
    ModelConfig,
    PixelSpec,
    epochs_for,
    fill_pixels,
    norm_stats_for,
    solve_on_for,
    warmup_for,
)

ALL = frozenset(("data.size", "data.resize", "data.interpolation", "model.mean", "model.std"))
SCRATCH = "from scratch"
# A network with more parameters learns little from scratch on fewer pictures: a small CNN reaches
# 21 % on 185 photos of 37 breeds, pretrained features 82 %.
SCRATCH_PARAMETERS, SCRATCH_PICTURES = 1_000_000, 10_000


@dataclass(frozen=True)
class Wants:
    """What weights expect.

    notes: a phrase for each expectation that we don't follow. told: the settings that the weights
    themselves state; the rest is assumed.
    """

    spec: PixelSpec
    notes: list[str]
    told: frozenset[str] = ALL


def resolve(config: Config, images: ImageFolder) -> Config:
    """Return the settings with a value for each that isn't given.

    Where model.weights_dir holds a file for the network, model.weights becomes its path. Log what
    is assumed, and which settings go against the weights.
    """
    config = copy.deepcopy(config)
    pictures = len(images.splits["train"].paths)
    config.train.epochs = epochs_for(config.train, pictures)
    config.optim.warmup_epochs = warmup_for(config, pictures)
    config.model.norm_stats = norm_stats_for(config, pictures)
    config.model.solve_on = solve_on_for(config, len(images.splits["valid"].paths))
    name, weights = config.model.name, config.model.weights
    if weights is None:
        return config  # `config.load` has set the rest
    wants = _found_in_folder(config.model) or _wants(name, weights)
    if config.model.weights != weights:
        weights = str(config.model.weights)
    if model_package.is_package(weights):
        _continue(config, images)
    assumed = ", ".join(_not_given(config, wants))
    if assumed:
        log.warning(
            "model.weights=%s: a file doesn't say what its network expects; assumed: %s",
            weights,
            assumed,
        )
    notes = [line for key, line in departures_by_key(config, wants.spec) if key in wants.told]
    notes += wants.notes
    if notes:
        log.warning("the weights of %s: %s", name, "; ".join(notes))
    lr = config.optim.lr
    if config.model.freeze == "none" and lr is not None and lr >= RUINOUS_LR[config.optim.name]:
        log.warning(
            "optim.lr=%g on all layers makes pretrained weights forget most of what they know; "
            "leave it out, or give model.freeze=backbone",
            lr,
        )
    fill_pixels(config, wants.spec)
    return config


def _found_in_folder(model: ModelConfig) -> Wants | None:
    """Take the file that model.weights_dir holds for the network; return what it expects.

    None where no folder is given, or model.weights needs none. Raise UserError.
    """
    folder, weights = model.weights_dir, model.weights
    if folder is None or weights is None:
        return None
    if is_file(weights):
        log.warning("model.weights_dir=%s has no effect with model.weights=%s", folder, weights)
        return None
    usual = _of_library(model.name, weights)  # first: it raises UserError for a wrong name
    wanted = _published_name(model.name, weights)

    def likely(each: WeightsFile) -> tuple[bool, ...]:
        return *rank(each, model.name), _published(model.name, each.path) != wanted

    fitting = [
        each
        for each in find(model.name, folder)
        if weights == "DEFAULT" or _published(model.name, each.path) in (None, wanted)
    ]
    if not fitting:
        log.info(
            "model.weights_dir=%s holds no weights of %s (looked for %s): they are downloaded",
            folder,
            model.name,
            looked_for(model.name),
        )
        return usual
    first = min(fitting, key=likely)
    rivals = [each for each in fitting if likely(each) == likely(first)]
    if len({each.path.stem for each in rivals}) > 1:
        names = ", ".join(each.path.name for each in rivals)
        raise UserError(
            f"model.weights_dir={folder} holds several files for {model.name} ({names}): "
            "give one as model.weights=FILE"
        )
    how = ""
    if not first.exact:
        how = ", by the beginning of its name"
    log.info("model.weights_dir=%s: using %s for %s%s", folder, first.path, model.name, how)
    model.weights = str(first.path)
    return _of_file(model.name, str(first.path), weights)


def _continue(config: Config, images: ImageFolder) -> None:
    """Log whether the head of one of our packages is kept; if so, take over its width."""
    weights = str(config.model.weights)
    before = model_package.manifest(weights)
    if not same_classes(before["classes"], images.classes):
        log.info(
            "model.weights=%s has other classes (%d, here %d): the head is new",
            weights,
            len(before["classes"]),
            len(images.classes),
        )
        return
    hidden = before["config"].get("model.head_hidden")
    if config.model.head_hidden not in (None, hidden):
        log.info(
            "model.weights=%s has the same classes, but model.head_hidden=%s, here %s: "
            "the head is new",
            weights,
            hidden or "null",
            config.model.head_hidden,
        )
        return
    config.model.head_hidden = hidden
    log.info("model.weights=%s has the same classes: its head is kept too", weights)
    if before["config"].get("model.solve_on") == "both":
        log.warning(
            "that head was solved on pictures of valid too: where these are the same pictures, "
            "valid's figures are too good; go by those of test"
        )
    if config.model.freeze == "backbone" and before["config"].get("model.freeze") == "none":
        log.info(
            "model.freeze=backbone: only the head is trained on; "
            "model.freeze=none trains all layers on, as before"
        )


def keeps_head(config: Config, classes: Sequence[str]) -> bool:
    """Return whether the head of model.weights is kept too: same classes and same layers."""
    weights = config.model.weights
    if weights is None or not model_package.is_package(weights):
        return False
    before = model_package.manifest(weights)
    hidden = before["config"].get("model.head_hidden")
    return hidden == config.model.head_hidden and same_classes(before["classes"], classes)


def same_classes(some: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether class names are the same in the same order, in any Unicode normal form."""
    return [unicodedata.normalize("NFC", name) for name in some] == [
        unicodedata.normalize("NFC", name) for name in others
    ]


def warn_of_scratch(config: Config, parameters: int, pictures: int) -> None:
    """Warn where a large network would be trained from scratch on few pictures."""
    name = config.model.name
    unwise = parameters > SCRATCH_PARAMETERS and pictures < SCRATCH_PICTURES
    if config.model.weights is None and name != TOY and unwise:
        log.warning(
            "%s starts from random weights, and %d pictures are few for that: pretrained "
            "weights (model.weights=DEFAULT, or a file) are nearly always better",
            name,
            pictures,
        )


# --- what weights expect ---


def expected(name: str, weights: str) -> tuple[PixelSpec, list[str]]:
    """Return what these weights expect, and a phrase for each expectation that we don't follow.

    Where neither a file nor the note beside it says, the library's own weights of that network
    decide. Raise UserError for a name or weights that don't exist.
    """
    wants = _wants(name, weights)
    return wants.spec, wants.notes


def _wants(name: str, weights: str) -> Wants:
    if not is_file(weights):
        return _of_library(name, weights)
    if model_package.is_package(weights):
        return _of_package(name, weights)
    return _of_file(name, weights, "DEFAULT")


def _of_library(name: str, weights: str) -> Wants:
    if name == TOY:
        return Wants(TOY_PIXELS, [])
    if name == OWN:
        return Wants(PLAIN, [])
    if name.startswith("timm/"):
        return Wants(*_of_timm(name))
    return Wants(*_of_torchvision(name, weights))


def _of_file(name: str, weights: str, member: str) -> Wants:
    """Return what a file expects. member: torchvision's name for the weights that it stands for."""
    published = _published(name, Path(weights))
    told = frozenset[str]()
    if published is not None:
        told = ALL
        if name.startswith("timm/"):
            name = published
        else:
            member = published
    wants = _of_library(name, member)
    note, spec = note_of(weights), wants.spec
    size = note.size or spec.size
    resize = note.resize or spec.resize_for(size)
    if note.crop:
        resize = round(size / note.crop)
    if resize < size:
        raise UserError(
            f"{weights}: the note beside it says resize={resize}, and no size, which would be "
            f"{size}; add size to the note"
        )
    said = {
        "data.size": note.size,
        "data.resize": note.resize or note.crop,
        "data.interpolation": note.interpolation,
        "model.mean": note.mean,
        "model.std": note.std,
    }
    spec = PixelSpec(
        mean=note.mean or spec.mean,
        std=note.std or spec.std,
        resize=resize,
        size=size,
        interpolation=note.interpolation or spec.interpolation,
    )
    return replace(wants, spec=spec, told=told | {key for key in said if said[key] is not None})


def _published_name(name: str, weights: str) -> str:
    """Return the weights that a library downloads for a name such as DEFAULT: see `_published`."""
    if name in (TOY, OWN):
        return ""
    if name.startswith("timm/"):
        pretrained = import_timm(name).get_pretrained_cfg(name.removeprefix("timm/"))
        tag = pretrained.tag if pretrained else ""
        return f"{architecture(name)}.{tag}"
    return str(getattr(torchvision_weights(name, weights), "name", ""))


def _published(name: str, path: Path) -> str | None:
    """Return the published weights that a file holds by its name, None where it doesn't say.

    As torchvision's name for them, or timm's model name with the tag.
    """
    if name in (TOY, OWN):
        return None
    if name.startswith("timm/"):
        candidate = named(path)
        if candidate is None or candidate.name == architecture(name):
            return None
        same = architecture(candidate.name) == architecture(name)
        return candidate.name if same and candidate.exact else None
    torchvision_weights(name, None)
    import torchvision  # imported here: it is slow, and many runs need none of it

    for member in torchvision.models.get_model_weights(name):
        if member.url.rsplit("/", 1)[-1] == path.name:
            return str(member.name)
    return None


def _of_package(name: str, weights: str) -> Wants:
    """Return what one of our packages expects: the preprocessing that it was trained with."""
    before = model_package.manifest(weights)
    holds = before["config"]["model.name"]
    if architecture(holds) != architecture(name):
        raise UserError(
            f"model.weights={weights} holds {holds}, and the model here is {name}: "
            "leave model and model.name out, or give other weights"
        )
    # imported here: few runs need it. NumPy's version, since PyTorch may not be loaded yet.
    from safetensors.numpy import load

    tensors = model_package.network(weights, load(model_package.tensors(weights)))
    if "mean" not in tensors:
        raise UserError(
            f"model.weights={weights}: the checkpoints of a frozen backbone hold the head "
            "alone; finish that run, and give its package"
        )
    # From its buffers: they may differ from the settings (see build._without_transform).
    mean, std = (
        tuple(round(float(value) / 255, 6) for value in tensors[key].flatten())
        for key in ("mean", "std")
    )
    return Wants(PixelSpec(mean=mean, std=std, **before["preprocessing"]), [])


def departures(config: Config, spec: PixelSpec) -> list[str]:
    """Return a phrase for each setting that isn't what the weights expect."""
    return [line for _, line in departures_by_key(config, spec)]


def departures_by_key(config: Config, spec: PixelSpec) -> list[tuple[str, str]]:
    """Return each setting that isn't what the weights expect, with a phrase about it."""
    data, model = config.data, config.model
    lines: list[tuple[str, str]] = []
    size = data.size or spec.size
    resize = spec.resize_for(size)
    if size != spec.size:
        lines.append(("data.size", f"data.size={size}, they were trained for {spec.size}"))
    if data.resize not in (None, resize):
        line = f"data.resize={data.resize}, they expect {resize} with data.size={size}"
        lines.append(("data.resize", line))
    if data.interpolation not in (None, spec.interpolation):
        line = f"data.interpolation={data.interpolation}, they expect {spec.interpolation}"
        lines.append(("data.interpolation", line))
    for key, given, expects in (("mean", model.mean, spec.mean), ("std", model.std, spec.std)):
        if given is not None and not all(map(_close, given, expects)):
            line = f"model.{key}={_shown(given)}, they expect {_shown(expects)}"
            lines.append((f"model.{key}", line))
    return lines


def _not_given(config: Config, wants: Wants) -> list[str]:
    """Return the settings that neither the user nor the weights state, as key=value."""
    spec = wants.spec
    size = config.data.size or spec.size
    values = {
        "data.size": (config.data.size, spec.size),
        "data.resize": (config.data.resize, spec.resize_for(size)),
        "data.interpolation": (config.data.interpolation, spec.interpolation),
        "model.mean": (config.model.mean, _shown(spec.mean)),
        "model.std": (config.model.std, _shown(spec.std)),
    }
    return [
        f"{key}={value}"
        for key, (given, value) in values.items()
        if given is None and key not in wants.told
    ]


def _close(given: float, expects: float) -> bool:
    return math.isclose(given, expects, abs_tol=1e-3)


def _shown(values: Any) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"


# --- torchvision ---


def torchvision_weights(name: str, weights: str | None) -> Any:
    """Return the member of torchvision's enumeration of weights, None for a file or no weights.

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
    """Return timm. Raise UserError where it isn't installed, or has no model of that name."""
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
    except RuntimeError as error:  # the tag doesn't exist
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
        notes.append(f"they expect {interpolation}, here bilinear is used")
        interpolation = "bilinear"
    other = {"squash": "squeezes a picture into", "border": "pads a picture to"}
    if expects["crop_mode"] in other:
        does = other[expects["crop_mode"]]
        notes.append(f"timm {does} the square, here the square is cut from its centre")
    spec = PixelSpec(
        tuple(expects["mean"]), tuple(expects["std"]), max(resize, size), size, interpolation
    )
    return spec, notes


# --- where they are from ---


def provenance(config: Config) -> dict[str, str | None]:
    """Return the weights' source and licence, None where neither file nor library states one.

    For torchvision's weights only their own metadata count: its BSD licence is for its code.
    """
    name, weights = config.model.name, config.model.weights
    if weights is None:
        return {"source": SCRATCH, "licence": None}
    if not is_file(weights):
        return _provenance_of_library(name, weights)
    if model_package.is_package(weights):
        before = model_package.manifest(weights).get("weights") or {}
        source = f"{weights} ({before.get('source') or 'of unknown source'})"
        return {"source": source, "licence": before.get("licence")}
    note = note_of(weights)
    published: dict[str, str | None] = {"source": Path(weights).name, "licence": None}
    known = _published(name, Path(weights))
    if known is not None and name.startswith("timm/"):
        published = _provenance_of_library(known, "DEFAULT")
    elif known is not None:
        published = _provenance_of_library(name, known)
    return {
        "source": note.source or published["source"],
        "licence": note.licence or published["licence"],
    }


def _provenance_of_library(name: str, weights: str) -> dict[str, str | None]:
    if name.startswith("timm/"):
        pretrained = import_timm(name).get_pretrained_cfg(name.removeprefix("timm/"))
        where, licence = "timm", None
        if pretrained is not None:
            where = pretrained.hf_hub_id or pretrained.url or "timm"
            licence = pretrained.license
        return {"source": where, "licence": None if licence == "unknown" else licence}
    member = torchvision_weights(name, weights)
    file = member.url.rsplit("/", 1)[-1]
    source = f"torchvision {member.name} ({file})"
    return {"source": source, "licence": member.meta.get("license")}


def origin(config: Config) -> str:
    """Return the weights' source and licence, as the end of a log line."""
    if config.model.weights is None:
        return ""
    said = provenance(config)
    return f"; weights from {said['source']}, licence {said['licence'] or 'not stated'}"
