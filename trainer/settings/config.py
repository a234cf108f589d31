"""The settings of a run: typed, checked once at the edge, torch-free.

Hydra composes `conf/`; `load` turns the result into the dataclasses below. The YAML files have each
setting's value and meaning; this file has its type and limits. Only a run and its loop see these
dataclasses; the functions that they call take plain arguments.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.common.errors import UserError
from trainer.common.paths import expanded
from trainer.settings.hydra_errors import explain, unknown_key

DEMO = "fashion_mnist"  # conf/data: the pictures that ship with this
TOY = "small_cnn"  # conf/model: trained from scratch in seconds
OWN = "own"  # conf/model: the user's own network, from model.code
AUTO = "auto"  # conf/model: chosen by measuring on the user's pictures

# Limits: a larger number is a typing error, and computations with it overflow.
SIDE = 16_384  # pixels
EPOCHS_MOST = 1_000_000
BATCH_MOST = 1_000_000
LARGEST = 1e30


def setting(
    *choices: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    length: int | None = None,
    identity: bool = True,
    only_if: str | None = None,
    path: bool = False,
) -> Any:
    """Return a dataclass field whose value comes from `conf/`, with what is allowed.

    choices: the only strings allowed. above, at_least, below, at_most: limits of a number, or of
    each number of a list. length: how many values a list must hold. identity: False if the setting
    decides where, how fast or how safely a run works, and not its result: a run may continue with
    another value. only_if: "key=value[|value]", or "key!=value", of another setting: otherwise this
    one is ignored. path: whether it is a path, in which `~` and $NAME are expanded.
    """
    return field(
        default=MISSING,
        metadata={
            "choices": choices,
            "above": above,
            "at_least": at_least,
            "below": below,
            "at_most": at_most,
            "length": length,
            "identity": identity,
            "only_if": only_if,
            "path": path,
        },
    )


@dataclass
class AugmentConfig:
    scale: list[float] | None = setting(above=0, at_most=1, length=2)
    ratio: list[float] = setting(at_least=0.01, at_most=100, length=2)
    flip: bool | None = setting()
    vertical_flip: bool = setting()
    rotation: float = setting(at_least=0, at_most=180)
    jitter: list[float] = setting(at_least=0, at_most=1, length=4)
    randaugment: int = setting(at_least=0, at_most=14)
    magnitude: int = setting(at_least=0, at_most=30, only_if="data.augment.randaugment!=0")
    trivial: bool = setting()
    erasing: float = setting(at_least=0, at_most=1)
    mixup: float = setting(at_least=0, at_most=1000)
    cutmix: float = setting(at_least=0, at_most=1000)


@dataclass
class DataConfig:
    source: str = setting("fashion_mnist", "folder", "flowers102", "pets")
    root: str = setting(identity=False, path=True)
    train: str | None = setting(identity=False, path=True)
    valid: str | None = setting(identity=False, path=True)
    test: str | None = setting(identity=False, path=True)
    labels: str | None = setting(identity=False, path=True, only_if="data.source=folder")
    valid_fraction: float = setting(above=0, below=1)
    max_broken: float = setting(at_least=0, at_most=1, identity=False)
    leaks: str = setting("warn", "drop", "stop")
    resize: int | None = setting(at_least=1, at_most=SIDE)
    size: int | None = setting(at_least=1, at_most=SIDE)
    interpolation: str | None = setting("bilinear", "bicubic", "lanczos", "box")
    workers: int | None = setting(at_least=0, at_most=1024, identity=False)
    cache: str = setting("auto", "packed", "none", identity=False)
    cache_gb: float | None = setting(
        above=0, at_most=1e6, identity=False, only_if="data.cache=auto|packed"
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ModelConfig:
    name: str = setting()
    code: str | None = setting(path=True)
    weights: str | None = setting(path=True)
    candidates: list[str] | None = setting(only_if=f"model.name={AUTO}")
    weights_dir: str | None = setting(identity=False, path=True)
    freeze: str = setting("auto", "none", "backbone")
    head: str = setting("random", "probe")
    solve_on: str = setting("auto", "train", "both", only_if="model.head=probe")
    head_hidden: int | None = setting(at_least=1, at_most=65536)
    cached_views: int | None = setting(at_least=1, at_most=1000, only_if="model.freeze=backbone")
    unfreeze_epochs: int | None = setting(
        at_least=1, at_most=EPOCHS_MOST, only_if="model.freeze=none"
    )
    norm_stats: str = setting("auto", "update", "keep", only_if="model.freeze=none")
    mean: list[float] | None = setting(at_least=0, at_most=1, length=3)
    std: list[float] | None = setting(at_least=0.001, at_most=1, length=3)


@dataclass
class OptimConfig:
    name: str = setting("adamw", "sgd")
    lr: float | None = setting(above=0, at_most=LARGEST)
    head_lr: float | None = setting(above=0, at_most=LARGEST)
    layer_decay: float | None = setting(above=0, at_most=1, only_if="model.freeze=none")
    weight_decay: float = setting(at_least=0, at_most=LARGEST)
    momentum: float = setting(at_least=0, below=1, only_if="optim.name=sgd")
    schedule: str = setting("cosine", "step", "constant")
    warmup_epochs: float | None = setting(at_least=0, at_most=EPOCHS_MOST)
    step_epochs: float = setting(above=0, at_most=EPOCHS_MOST, only_if="optim.schedule=step")
    step_factor: float = setting(above=0, at_most=1, only_if="optim.schedule=step")


@dataclass
class TrainConfig:
    epochs: int | None = setting(at_least=0, at_most=EPOCHS_MOST)
    parent: str | None = setting(path=True)
    batch_size: int = setting(at_least=1, at_most=BATCH_MOST)
    accumulate: int = setting(at_least=1, at_most=BATCH_MOST)
    label_smoothing: float = setting(at_least=0, below=1)
    clip_norm: float | None = setting(above=0, at_most=LARGEST)
    imbalance: str = setting("none", "sampler", "logits")
    tta: str = setting("none", "flip")
    ema_decay: float | None = setting(above=0, below=1)
    monitor: str = setting("valid_refinement", "valid_top1", "valid_f1", "valid_loss")
    keep: str = setting("best", "last")
    patience: int | None = setting(at_least=1, at_most=EPOCHS_MOST)
    margin: float = setting(at_least=-100, at_most=100, only_if="model.head=probe")
    device: str = setting("auto", "cpu", "cuda", "mps", identity=False)
    precision: str = setting("auto", "fp32", "bf16", "fp16")
    channels_last: bool = setting()
    compile: bool = setting()
    deterministic: bool = setting()
    threads: int | None = setting(at_least=1, at_most=1024, identity=False)
    tensorboard: bool = setting(identity=False)
    mlflow: str | None = setting(identity=False)
    wandb: str | None = setting(identity=False)
    exact_shards: int | None = setting(at_least=1, at_most=BATCH_MOST)
    processes: int | None = setting(at_least=1, at_most=100_000, identity=False)
    hosts: int | None = setting(at_least=1, at_most=100_000, identity=False)
    timeout_seconds: float = setting(above=0, at_most=604_800, identity=False)
    stall_seconds: float | None = setting(at_least=0, at_most=604_800, identity=False)
    on_nan: str = setting("stop", "rewind")


@dataclass
class RecipeConfig:
    minutes: float | None = setting(above=0, at_most=1e6, only_if=f"model.name={AUTO}")
    tune_minutes: float | None = setting(at_least=0, at_most=1e6, only_if=f"model.name={AUTO}")
    prefer: str = setting("accuracy", "balance", "speed", only_if=f"model.name={AUTO}")


@dataclass
class CheckpointConfig:
    minutes: float = setting(above=0, at_most=1e6, identity=False)
    max_cost: float = setting(above=0, at_most=1, identity=False)
    keep: int = setting(at_least=2, at_most=10_000, identity=False)


@dataclass
class PackageConfig:
    int8: bool = setting()
    max_drop: float = setting(at_least=0, at_most=1, only_if="package.int8=True")


@dataclass
class PlatformConfig:
    name: str = setting("local", "ec2", "sagemaker", identity=False)
    runs: str = setting(identity=False, path=True, only_if="platform.run_dir=null")
    run_dir: str | None = setting(identity=False, path=True)
    checkpoints: str | None = setting(identity=False, path=True)
    package: str | None = setting(identity=False, path=True)
    cache: str = setting(identity=False, path=True)
    dollars_hour: float | None = setting(at_least=0, at_most=100_000, identity=False)


@dataclass
class SweepConfig:
    engine: str = setting("grid", "optuna", identity=False)
    objective: str = setting("valid_top1", "valid_f1", "valid_loss", identity=False)
    trials: int = setting(
        at_least=1, at_most=100_000, identity=False, only_if="sweep.engine=optuna"
    )
    parallel: int = setting(at_least=1, at_most=1000, identity=False)
    together: int = setting(at_least=1, at_most=1000, identity=False)
    sampler: str = setting("tpe", "random", identity=False, only_if="sweep.engine=optuna")
    pruner: str = setting(
        "none", "median", "halving", identity=False, only_if="sweep.engine=optuna"
    )
    points: int = setting(at_least=1, at_most=1000, identity=False, only_if="sweep.engine=grid")
    # the limit of NumPy's RandomState, which Optuna's samplers use
    seed: int = setting(
        at_least=0, at_most=2**32 - 1, identity=False, only_if="sweep.engine=optuna"
    )
    # A path or a URL; in a URL, `expanded` replaces only $NAME.
    storage: str | None = setting(identity=False, path=True)
    lost_seconds: float = setting(
        at_least=1, at_most=86_400, identity=False, only_if="sweep.storage!=null"
    )
    space: dict[str, str] = setting(identity=False)


@dataclass
class Config:
    name: str | None = setting(identity=False)
    seed: int = setting(at_least=0, at_most=2**64 - 1)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    package: PackageConfig = field(default_factory=PackageConfig)
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def register() -> None:
    """Register with Hydra the schema, and resolvers for the platform and the default model.

    Call it before `hydra.main` or `compose`.
    """
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("detect_platform", detect_platform, replace=True)
    OmegaConf.register_new_resolver("default_model", default_model, replace=True)


def detect_platform() -> str:
    """Return `sagemaker` inside a SageMaker container, else `local`.

    The container's toolkit sets SM_MODEL_DIR. `ec2` is never detected: the user gives it.
    """
    if "SM_MODEL_DIR" in os.environ:
        return "sagemaker"
    return "local"


def default_model(data: str) -> str:
    """Return the option of `model` if none is given.

    Only for the demo's small images is it the network that trains from scratch.
    """
    if data == DEMO:
        return TOY
    return AUTO


def from_dict(values: dict[str, Any]) -> Config:
    """Return the settings from the result of `dataclasses.asdict`."""
    return load(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[arg-type]


def load(composed: DictConfig) -> Config:
    """Return the typed settings from what Hydra composed. Raise UserError for a bad value.

    Fill in what isn't given and doesn't depend on weights; `trainer.network.weights.resolve` fills
    in the rest.
    """
    for key in _unknown(composed, Config):
        raise UserError(unknown_key(key, keys()))
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, keys())) from error
    assert isinstance(config, Config)
    for key, value, limits in walk(config):
        check(key, value, limits)
    expand_paths(config)
    if config.name in ("", "..") or Path(config.name or "").name != (config.name or ""):
        raise UserError(
            f"name={config.name} is not allowed; "
            f"allowed: the name of one directory, made in platform.runs={config.platform.runs}"
        )
    check_model(config)
    if config.model.name != AUTO:  # else trainer.training.recipe calls it
        fill_recipe(config)
    if config.model.weights is None:
        fill_pixels(config, pixels_from_scratch(config.model.name))
    check_sizes(config.data)
    check_batch(config.train)
    check_unfreezing(config)
    augment = config.data.augment
    mixes = augment.mixup + augment.cutmix > 0
    if config.model.freeze == "backbone" and config.model.cached_views and mixes:
        raise UserError(
            f"model.cached_views={config.model.cached_views}: mixed pictures "
            "(data.augment.mixup, data.augment.cutmix) have no cached features; "
            "allowed: model.cached_views=null, or no mixing"
        )
    if augment.jitter[3] > 0.5:
        raise UserError(
            f"data.augment.jitter={augment.jitter}: the last number is for hue, and 0.5 "
            "already turns it to its opposite; allowed: at most 0.5"
        )
    for key in ("scale", "ratio"):
        low, high = getattr(augment, key) or (0.0, 0.0)
        if low > high:
            raise UserError(
                f"data.augment.{key}=[{low},{high}]: the first number is the lower bound; "
                "allowed: [low,high]"
            )
    return config


def expand_paths(node: Any, prefix: str = "") -> None:
    """Replace `~` and $NAME in every path below a dataclass instance. Raise UserError."""
    for entry in dataclasses.fields(node):
        key, value = f"{prefix}{entry.name}", getattr(node, entry.name)
        if dataclasses.is_dataclass(value):
            expand_paths(value, f"{key}.")
        elif entry.metadata["path"] and value is not None:
            try:
                setattr(node, entry.name, expanded(value))
            except UserError as error:
                raise UserError(f"{key}={error}") from error


def check_model(config: Config) -> None:
    """Raise UserError for settings of the network that contradict each other."""
    model, epochs = config.model, config.train.epochs
    if model.name == AUTO and model.weights is None:
        raise UserError(
            f"model={AUTO} with model.weights=null: it chooses among pretrained networks; "
            f"from scratch are model={TOY}, and model.name=NAME model.weights=null"
        )
    if model.name == AUTO and model.weights != "DEFAULT":
        raise UserError(
            f"model.weights={model.weights} with model={AUTO}: these belong to one network; "
            "name it by model.name=NAME, or give model.weights_dir=DIR, a folder of several"
        )
    if model.name == OWN and model.code is None:
        raise UserError(
            f"model={OWN} without model.code: give model.code=FILE, a Python file that defines "
            "network(size) (docs/python.md)"
        )
    parent = config.train.parent
    if model.name == AUTO and parent is not None:
        raise UserError(
            f"train.parent={parent} with model={AUTO}: it continues with the same network and "
            "does not choose again; name it by model.name=NAME, or give model.weights=RUN "
            "instead"
        )
    if model.name == AUTO and model.head_hidden is not None:
        raise UserError(
            f"model.head_hidden={model.head_hidden} with model={AUTO}: its head is linear, since "
            "it is solved and not trained; allowed: model.head_hidden=null, or model.name=NAME"
        )
    if model.head == "probe" and model.head_hidden is not None:
        raise UserError(
            f"model.head=probe with model.head_hidden={model.head_hidden}: only a linear head is "
            "solved; allowed: model.head_hidden=null, or model.head=random"
        )
    reason = _valid_is_needed(config)
    if model.head == "probe" and model.solve_on == "both" and reason:
        raise UserError(
            f"model.solve_on=both: {reason}, so no head may be solved on it; "
            "allowed: model.solve_on=train"
        )
    if epochs == 0 and model.name != AUTO and model.head != "probe":
        raise UserError(
            "train.epochs=0: a random head has to be trained; "
            "allowed: train.epochs=1 or more, or model.head=probe, which is solved"
        )


def _valid_is_needed(config: Config) -> str | None:
    """Return why a solved head must not have seen valid's pictures; None: it may."""
    train = config.train
    if train.epochs != 0:
        return f"train.epochs={train.epochs}: valid judges what is trained on top of the head"
    if train.tta == "flip":
        return "train.tta=flip: heads that were solved without a picture judge its plain view alone"
    if config.package.int8:
        return "package.int8=true: what it costs is measured on valid"
    return None


def check_batch(train: TrainConfig) -> None:
    """Raise UserError where a batch can't be split as `accumulate` and `exact_shards` say."""
    size, parts, shards = train.batch_size, train.accumulate, train.exact_shards
    if parts > size:
        raise UserError(
            f"train.accumulate={parts} splits a batch of train.batch_size={size} into more parts "
            "than it has pictures; allowed: train.accumulate <= train.batch_size"
        )
    if shards is not None and shards > size:
        raise UserError(
            f"train.exact_shards={shards} divides a batch of train.batch_size={size} into more "
            "shards than it has pictures; allowed: train.exact_shards <= train.batch_size"
        )
    if shards is not None and parts > 1:
        raise UserError(
            f"train.accumulate={parts} with train.exact_shards={shards}: shards are computed one "
            "after the other already; allowed: train.accumulate=1"
        )


def check_unfreezing(config: Config) -> None:
    """Raise UserError where no epoch would be left to train all layers."""
    frozen, epochs = config.model.unfreeze_epochs, config.train.epochs
    if frozen is not None and config.model.freeze == "none" and frozen >= (epochs or EPOCHS):
        raise UserError(
            f"model.unfreeze_epochs={frozen}: so many epochs train the head alone, and "
            f"train.epochs={epochs or EPOCHS} leaves none for all layers; allowed: fewer than "
            "train.epochs, or model.freeze=backbone"
        )


def ignored(config: Config, overrides: Iterable[str], sweep: bool = False) -> list[str]:
    """Return a line for each given setting that has no effect because of another one.

    overrides: the given settings, as "key=value". sweep: whether it is for a sweep.
    """
    given = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    lines = []
    searching = {key for key in given if key.split(".")[0] == "sweep"}
    if searching and not sweep:
        given -= searching
        keys = ", ".join(sorted(searching))
        lines.append(f"{keys}: no effect in one run; a sweep is started with -m")
    values = {key: value for key, value, _ in walk(config)}
    for key, value, limits in walk(config):
        if key in given and limits["only_if"]:
            other, allowed = limits["only_if"].split("=")
            used = not other.endswith("!")
            other = other.removesuffix("!")
            now = str(values[other]).replace("None", "null")
            if (now in allowed.split("|")) != used:
                lines.append(
                    f"{key}={value} has no effect with {other}={now}: "
                    f"it is used with {limits['only_if']}"
                )
    views = next((word for word in overrides if word.startswith("model.cached_views=")), "")
    if views and config.model.cached_views is None and not views.endswith("=null"):
        lines.append(
            f"{views} has no effect with mixed pictures "
            "(data.augment.mixup, data.augment.cutmix): they have no cached features"
        )
    if {"optim.lr", "optim.head_lr"} <= given and config.model.freeze == "backbone":
        lines.append(
            f"optim.lr={config.optim.lr} has no effect with model.freeze=backbone: "
            "the head alone is trained, at optim.head_lr"
        )
    if (
        "model.weights" not in given
        and config.model.freeze == "backbone"
        and config.model.weights is None
    ):
        lines.append(
            "model.freeze=backbone with model.weights=null trains a head on random features: "
            "give model.weights"
        )
    if "model.weights_dir" in given and config.model.weights is None:
        lines.append(
            f"model.weights_dir={config.model.weights_dir} has no effect with model.weights=null: "
            "give model.weights=DEFAULT"
        )
    return lines


def inputs(config: Config) -> list[str]:
    """Return the paths that a run reads: pictures, labels, weights."""
    return [
        value
        for key, value, limits in walk(config)
        if limits["path"] and value is not None and key.split(".")[0] in ("data", "model")
    ]


def identity(config: Config) -> dict[str, Any]:
    """Return the settings that decide a run's result, by key.

    Two runs with equal ones, on equal data, give equal results.
    """
    return {key: value for key, value, limits in walk(config) if limits["identity"]}


DATA_NAME = 30  # characters of a data set's name in a run's


def run_name(config: Config) -> str:
    """Return the name of the run's directory: `name`, or one derived from the settings.

    So the same command finds its own run again.
    """
    if config.name is not None:
        return config.name
    what = identity(config) | {"root": places(config.data)}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    model = re.sub(r"[^\w.-]+", "-", config.model.name)
    return f"{data_name(config.data.source, config.data.root)}-{model}-{digest[:8]}"


def data_name(source: str, root: str) -> str:
    """Return a data set's name: for the user's own pictures that of the folder or archive.

    source, root: the settings of these names.
    """
    if source != "folder":
        return source
    name = re.sub(r"\.(zip|tar(\.\w+)?|tgz)$", "", Path(os.path.realpath(root)).name, flags=re.I)
    return re.sub(r"[^\w.-]+", "-", name)[:DATA_NAME].strip("-.") or source


def places(data: DataConfig) -> list[str]:
    """Return the folders of the images, from the settings alone.

    The names of the splits' folders in data.root are read later.
    """
    splits = [
        os.path.realpath(getattr(data, split) or Path(data.root) / split)
        for split in ("train", "valid", "test")
    ]
    if data.labels is None:
        return splits
    return [*splits, os.path.realpath(Path(data.root) / data.labels)]


# --- settings that aren't given ---


@dataclass(frozen=True)
class PixelSpec:
    """The pixels that weights expect.

    mean, std: of the channels, in 0..1; the rest as in `DataConfig`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int
    size: int
    interpolation: str

    def resize_for(self, size: int) -> int:
        """Return the shorter side from which a square of `size` is cut.

        The square then shows the share of the image that the weights expect.
        """
        return max(size, round(size * self.resize / self.size))


# Without weights, or with unknown ones: ImageNet's mean and standard deviation, and the crop of
# He et al. 2016.
PLAIN = PixelSpec(
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256, size=224, interpolation="bilinear"
)

# For the small network, which never sees ImageNet.
TOY_PIXELS = dataclasses.replace(PLAIN, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pixels_from_scratch(name: str) -> PixelSpec:
    """Return the pixels for a network without weights."""
    if name == TOY:
        return TOY_PIXELS
    return PLAIN


# Peak learning rates (all layers but the head, the head) by optimizer and trained part; None: the
# same. MobileNetV2 on 185 photos of 37 breeds, 128 px, AdamW, 32 steps: 2e-3 on all layers
# gives a test accuracy of 33 %, 2e-4 with 2e-3 for the head 55 %, a frozen backbone 76 %.
# From a solved head, one small rate for all (LP-FT, Kumar et al. 2022).
LEARNING_RATES: dict[str, dict[str, tuple[float, float | None]]] = {
    "adamw": {
        "scratch": (2e-3, None),
        "head": (2e-3, None),
        "pretrained": (2e-4, 2e-3),
        "solved": (1e-4, None),
    },
    "sgd": {
        "scratch": (0.05, None),
        "head": (0.05, None),
        "pretrained": (5e-3, 0.05),
        "solved": (2e-3, None),
    },
}
# For the layers below a solved head: the first layers are the most general.
LAYER_DECAY = 0.75
# From this rate on, training all layers mostly destroys pretrained weights.
RUINOUS_LR = {"adamw": 1e-3, "sgd": 0.05}

# Share of a picture's area in a random view: parts of it, or nearly all of it.
CROPS = {"parts": (0.25, 1.0), "whole": (0.9, 1.0)}

# Passes over the images, and optimizer steps at least: few images need more passes.
EPOCHS, STEPS = 16, 200
# Least steps of warm-up. With few pictures an epoch has two: then a new head's first gradients,
# for which AdamW takes full steps, ruin the weights below it. MobileNetV2, 185 photos of 37 breeds
# at 64 px, all layers: 2 steps of warm-up give a test accuracy of 5 %, 20 give 51 %.
WARMUP_STEPS = 20


def fill_recipe(config: Config) -> None:
    """Fill in the trained part and the learning rates, where they aren't given."""
    model, choice, augment = config.model, config.optim, config.data.augment
    if model.freeze == "auto":
        model.freeze = "backbone"
        if model.weights is None:
            model.freeze = "none"
        elif augment.mixup + augment.cutmix > 0:
            model.cached_views = None  # mixed images have no cached features
    if augment.flip is None:
        augment.flip = True
    if augment.scale is None:
        augment.scale = list(CROPS["parts"])
    if choice.layer_decay is None:
        choice.layer_decay = 1.0
        if model.head == "probe":
            choice.layer_decay = LAYER_DECAY
    if choice.lr is None:
        trained = "pretrained"
        if model.head == "probe":
            trained = "solved"
        if model.freeze == "backbone":
            trained = "head"
        elif model.weights is None:
            trained = "scratch"
        choice.lr, head_lr = LEARNING_RATES[choice.name][trained]
        if choice.head_lr is None:
            choice.head_lr = head_lr


def fill_pixels(config: Config, spec: PixelSpec) -> None:
    """Fill in what isn't given from what the weights expect."""
    data, model = config.data, config.model
    if data.size is None:
        data.size = spec.size
    if data.resize is None:
        data.resize = spec.resize_for(data.size)
    data.interpolation = data.interpolation or spec.interpolation
    model.mean = model.mean or list(spec.mean)
    model.std = model.std or list(spec.std)
    check_sizes(data)


def check_sizes(data: DataConfig) -> None:
    """Raise UserError where the square is larger than the picture that it is cut from."""
    if data.size is not None and data.resize is not None and data.size > data.resize:
        raise UserError(
            f"data.size={data.size} is larger than data.resize={data.resize}: the picture's "
            "shorter side after shrinking is data.resize, and the square of data.size is cut out "
            "of it; allowed: data.size <= data.resize, or data.resize=null, which follows data.size"
        )


# Settings that depend on the number of pictures, where they aren't given.
OF_PICTURES = ("train.epochs", "optim.warmup_epochs", "model.norm_stats", "model.solve_on")


def epochs_for(train: TrainConfig, pictures: int) -> int:
    """Return the number of epochs.

    `train.epochs`, or EPOCHS, and more where these make fewer than STEPS steps.
    """
    if train.epochs is not None:
        return train.epochs
    return max(EPOCHS, math.ceil(STEPS / steps_per_epoch(train, pictures)))


def warmup_for(config: Config, pictures: int) -> float:
    """Return over how many epochs the learning rate rises from 0.

    `optim.warmup_epochs`, or one, and more where that makes fewer than WARMUP_STEPS steps.
    """
    if config.optim.warmup_epochs is not None:
        return config.optim.warmup_epochs
    return max(1.0, WARMUP_STEPS / steps_per_epoch(config.train, pictures))


def steps_per_epoch(train: TrainConfig, pictures: int) -> int:
    """Return the optimizer steps of a pass over the training images."""
    return pictures // min(train.batch_size, pictures)


# With fewer pictures, in a batch or in all, BatchNorm's statistics are poorer than those of the
# pretrained weights (docs/decisions/2026-11-25-statistics-are-kept.md).
NORM_BATCH, NORM_PICTURES = 16, 2500


def norm_stats_for(config: Config, pictures: int) -> str:
    """Return whether BatchNorm keeps its statistics: `model.norm_stats`, or what `auto` means."""
    model, train = config.model, config.train
    if model.norm_stats != "auto":
        return model.norm_stats
    at_once = min(train.batch_size, pictures) // train.accumulate // (train.exact_shards or 1)
    few = at_once < NORM_BATCH or pictures < NORM_PICTURES
    # With the batches' statistics, a solved head would get other features than it was solved on.
    if model.weights is not None and (few or model.head == "probe"):
        return "keep"
    return "update"


# With fewer validation pictures: train judges a recipe too, by k-fold, and a head that nothing is
# trained on top of is solved on them too.
FEW_VALID = 200


def solve_on_for(config: Config, pictures: int) -> str:
    """Return the splits that a head is solved on: `model.solve_on`, or what `auto` means.

    pictures: the number in valid.
    """
    if config.model.solve_on != "auto":
        return config.model.solve_on
    if pictures < FEW_VALID and _valid_is_needed(config) is None:
        return "both"
    return "train"


# --- the metric line: one definition for the log and for SageMaker's MetricDefinitions ---

METRICS = (
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "valid_loss",
    "valid_refinement",
    "valid_top1",
    "valid_top5",
    "valid_f1",
    "test_loss",
    "test_top1",
    "test_top5",
    "test_f1",
)


def metric_line(values: Mapping[str, float]) -> str:
    """Return the log's line of metrics, such as `metrics: epoch=3 valid_top1=0.812`."""
    return "metrics: " + " ".join(
        f"{name}={values[name]:.6g}" for name in METRICS if name in values
    )


def metric_definitions() -> list[dict[str, str]]:
    """Return SageMaker's MetricDefinitions.

    Each is a name and the regex whose one group takes the value from `metric_line`.
    """
    return [{"Name": name, "Regex": rf"metrics: (?:.* )?{name}=(\S+)"} for name in METRICS]


# --- checking ---


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield every setting below a dataclass instance, as (dotted key, value, limits)."""
    for entry in dataclasses.fields(node):
        value = getattr(node, entry.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, entry.metadata


def schema(node: type = Config, prefix: str = "") -> dict[str, "dataclasses.Field[Any]"]:
    """Return the field of every setting of a dataclass, by its dotted key."""
    entries: dict[str, dataclasses.Field[Any]] = {}
    for entry in dataclasses.fields(node):
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            entries |= schema(entry.type, f"{prefix}{entry.name}.")
        else:
            entries[prefix + entry.name] = entry
    return entries


def keys(node: type = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema."""
    return list(schema(node, prefix))


def kinds(entry: "dataclasses.Field[Any]") -> set[Any]:
    """Return the types that a setting may have.

    {float} for `float`, {int, NoneType} for `int | None`.
    """
    if isinstance(entry.type, UnionType):
        return set(get_args(entry.type))
    return {entry.type}


def _unknown(node: DictConfig, schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the composed keys that aren't in the schema.

    +key=value adds them, and nothing reads them.
    """
    fields = {entry.name: entry.type for entry in dataclasses.fields(schema)}
    for name in map(str, node):
        kind = fields.get(name)
        if kind is None:
            yield f"{prefix}{name}"
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _unknown(node[name], kind, f"{prefix}{name}.")


def check(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Raise UserError where a setting's value is outside its limits (`setting`)."""
    if value is None:
        return
    if value == "":
        raise UserError(f"{key}= is empty; allowed: a value")
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{key}={value} is not allowed; allowed: {', '.join(limits['choices'])}")
    values = value
    if not isinstance(value, list):
        values = [value]
    if limits["length"] is not None and len(values) != limits["length"]:
        raise UserError(
            f"{key}={value} holds {len(values)} values; allowed: exactly {limits['length']}"
        )
    if any(isinstance(each, list) for each in values):
        raise UserError(f"{key}={value} is of the wrong type; allowed: one list of numbers")
    tests: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "above": ("above", lambda number, limit: number > limit),
        "at_least": ("at least", lambda number, limit: number >= limit),
        "below": ("below", lambda number, limit: number < limit),
        "at_most": ("at most", lambda number, limit: number <= limit),
    }
    bounds = {name: limits[name] for name in tests if limits[name] is not None}
    for number in values:
        # Written so that NaN, for which every comparison is false, is refused.
        if not all(tests[name][1](number, limit) for name, limit in bounds.items()):
            allowed = " and ".join(f"{tests[name][0]} {limit}" for name, limit in bounds.items())
            raise UserError(f"{key}={value} is not allowed; allowed: {allowed}")
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{key}={value} is not allowed; allowed: finite numbers")
