"""Networks by name: a backbone, a new head, and the normalisation of pixels.

It lies inside the network, so that no caller can forget it.
"""

import copy
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.common import files
from trainer.common.errors import TRANSIENT, Unreadable, UserError
from trainer.common.model_package import is_package
from trainer.images.identity import of_weights
from trainer.network import hub, own
from trainer.network.hub import Absent
from trainer.network.weight_files import AUXILIARY, fill, head_of, state_dict
from trainer.network.weight_folder import is_file, looked_for
from trainer.network.weights import import_timm, torchvision_weights
from trainer.settings.config import OWN, PLAIN

# torchvision's networks whose pretrained weights want another normalisation than they say, and
# make it themselves.
TRANSFORMING = ("googlenet", "inception_v3")


class Classifier(nn.Module):
    """Pixels to logits.

    Takes pixels [N, height, width, 3] in 0..255, uint8 or floating (RGB), and gives float logits
    [N, classes]. The order of dimensions is that of a decoded image; seen as [N, 3, height, width]
    the same memory is PyTorch's channels_last.
    """

    mean: Tensor
    std: Tensor
    name = ""  # of the architecture, as model.name has it
    code = ""  # SHA-256 of the person's own file that it was built by, if so

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frozen = frozen
        self.keeps_norm_stats = False  # of the backbone, also where its weights are trained
        self.averages_flip = False  # in eval mode: the logits of an image and its mirror image
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        if frozen:
            backbone.requires_grad_(False)

    @property
    def features_width(self) -> int:
        """Return how many features the head takes."""
        linear = (layer for layer in self.head.modules() if isinstance(layer, nn.Linear))
        return next(linear).in_features

    def features(self, pixels: Tensor) -> Tensor:
        """Return what the head sees of pixels [N, height, width, 3]: [N, features]."""
        images = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        features: Tensor = self.backbone(images)
        return features

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits [N, classes] of pixels [N, height, width, 3]."""
        logits, _ = self.with_features(pixels)
        return logits

    def with_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, classes] and the features [N, width] of pixels.

        Where the logits are the mean over the flip, the features are those of the image as it is.
        """
        if not self.averages_flip or self.training:
            features = self.features(pixels)
            return self.head(features), features
        # As one batch: the exported network holds each layer once.
        features = self.features(torch.cat([pixels, mirrored(pixels)]))
        logits: Tensor = self.head(features).float()
        # The export takes `chunk` for a batch of fixed size.
        plain = features.reshape(2, -1, features.shape[1])[0]
        return logits.reshape(2, -1, logits.shape[1]).mean(0), plain

    def train(self, mode: bool = True) -> "Classifier":
        """Set the mode, as nn.Module does, but of a frozen backbone to eval.

        In train mode its BatchNorm statistics would drift; of a trained one, these layers alone are
        in eval where their statistics are kept.
        """
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        if self.keeps_norm_stats:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def mirrored(pixels: Tensor) -> Tensor:
    """Return pixels [N, height, width, 3] with left and right exchanged."""
    return pixels.flip(2)


def build(
    name: str,
    classes: int,
    *,
    code: str | None = None,
    weights: str | None = None,
    weights_dir: str | None = None,
    keep_head: bool = False,
    freeze: str = "none",
    head_hidden: int | None = None,
    size: int | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    channels_last: bool = True,
) -> Classifier:
    """Return the classifier `small_cnn`, `timm/NAME`, or that of a name of torchvision's.

    code: a person's own file, whose network is `own`. weights: a name of torchvision's, a file with
    a state dict, one of our packages, or None for random ones. weights_dir: where a file was looked
    for in vain. keep_head: take the head of the package too; else it is new and random, and the
    caller seeds torch. size: of the square that the network will see, in pixels; None: what it was
    made for. mean, std: of the channels, in 0..1. Raise UserError for a name or weights that don't
    exist or don't fit.
    """
    builder = BUILDERS.get(name.split("/")[0], _torchvision)
    if name == OWN:
        builder = partial(_own, code)
    try:
        backbone, features = builder(name, weights, size)
    except Absent as error:
        raise _offline(name, weights, weights_dir, error) from error
    head: nn.Module = nn.Linear(features, classes)
    if head_hidden is not None:
        head = nn.Sequential(
            nn.Linear(features, head_hidden), nn.ReLU(), nn.Linear(head_hidden, classes)
        )
    if keep_head:
        assert weights is not None
        head.load_state_dict(head_of(name, weights))
    if getattr(backbone, "transform_input", False):
        mean, std = _without_transform(backbone, mean, std)
    network = Classifier(backbone, head, mean, std, frozen=freeze == "backbone")
    network.name = name
    if name == OWN and code is not None:
        network.code = own.digest(code)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network


def identity(network: Classifier) -> dict[str, str]:
    """Return what the network's backbone is, by its tensors, its architecture and its builder."""
    return of_weights(network.backbone, network.name, builder(network))


def builder(network: Classifier) -> dict[str, str]:
    """Return the versions of the libraries that built the network, by their names.

    Of a person's own file its digest: what it computes is not seen in its layers.
    """
    if network.name == OWN:
        return {"model.code": network.code}
    libraries = {"small_cnn": (), "timm": ("timm",)}
    used = libraries.get(network.name.split("/")[0], ("torchvision",))
    return {library: importlib.metadata.version(library) for library in used}


def check(network: Classifier, name: str, size: int, count: int) -> None:
    """Raise UserError where the network can't train on `count` images of `size` px at once.

    Many need a least size, some just one size, and BatchNorm needs two values.
    """
    # Two at most, since more fail no differently.
    pixels = torch.zeros(min(count, 2), size, size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            copy.deepcopy(network).train()(pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _other_size(name, size, f", {count} at a time", error) from error


def _other_size(name: str, size: int, how: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(
        f"model.name={name} can't train on pictures of data.size={size}{how} ({reason}); "
        "give another data.size and data.resize, "
        "or more at a time by train.batch_size and train.accumulate"
    )


def _small_cnn(name: str, weights: str | None, size: int | None) -> tuple[nn.Module, int]:
    """Four 3 x 3 convolutions for images of 12 px and more; 0.2 million parameters."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    backbone = nn.Sequential(
        *block(3, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        *block(128, 128),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
    )
    if weights is not None:
        if not is_file(weights):
            raise Absent("nobody publishes any")
        fill(backbone, state_dict(name, weights), weights)
    return backbone, 128 * 9


def _own(
    code: str | None, name: str, weights: str | None, size: int | None
) -> tuple[nn.Module, int]:
    """Return the network of a person's own file."""
    backbone, width = own.load(code).backbone(size or PLAIN.size)
    if weights is not None:
        if not is_file(weights):
            raise Absent("nobody publishes any")
        fill(backbone, state_dict(name, weights), weights)
    return backbone, width


def _timm(name: str, weights: str | None, size: int | None) -> tuple[nn.Module, int]:
    local = weights is not None and is_file(weights)
    if weights is not None and not local and weights != "DEFAULT":
        raise UserError(
            f"model.weights={weights}: timm names its weights with the model "
            f"(model.name={name.split('.')[0]}.TAG); "
            "allowed: DEFAULT, null, or a file with a state dict"
        )
    try:
        backbone = _patiently(lambda: _timm_backbone(name, weights is not None and not local, size))
    except (OSError, RuntimeError) as error:
        if "in loading state_dict" in str(error):
            raise _bound(name, weights, size) from error
        raise Absent(str(error)) from error
    if local:
        assert weights is not None
        # timm's own, for files of the networks' authors, and for another number of patches.
        adapt = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        heads = backbone.default_cfg.get("classifier") or ()
        if isinstance(heads, str):
            heads = [heads]
        state = state_dict(name, weights)
        adapts = partial(adapt, model=backbone) if adapt else None
        try:
            fill(backbone, state, weights, heads, adapts)
        except UserError as error:
            if "another shape" in str(error) and not _is_usual(name, size):
                raise _bound(name, weights, size) from error
            raise
    return backbone, _width(backbone, name, size)


def _bound(name: str, weights: str | None, size: int | None) -> UserError:
    return UserError(
        f"model.weights={weights} doesn't fit {name} for pictures of data.size={size}: "
        "leave data.size out, for the size that they were trained for, or check model.name"
    )


def _is_usual(name: str, size: int | None) -> bool:
    """Return whether a timm network was made for squares of `size` px; None: yes."""
    made_for = import_timm(name).get_pretrained_cfg(
        name.removeprefix("timm/"), allow_unregistered=True
    )
    return size is None or made_for is None or tuple(made_for.input_size[1:]) == (size, size)


def _timm_backbone(name: str, pretrained: bool, size: int | None) -> Any:
    """Return timm's network without its last layer, for squares of `size` px where it takes one."""
    timm = import_timm(name)
    short = name.removeprefix("timm/")
    usual = timm.get_pretrained_cfg(short, allow_unregistered=True)
    if pretrained and usual is not None:
        _check_timm_server(usual)
    if usual is not None and usual.fixed_input_size and not _is_usual(name, size):
        try:
            return timm.create_model(short, num_classes=0, pretrained=pretrained, img_size=size)
        except TypeError as error:  # of a network whose size can't be chosen
            if "img_size" not in str(error):
                raise
    return timm.create_model(short, num_classes=0, pretrained=pretrained)


def _check_timm_server(published: Any) -> None:
    """Raise Absent where weights have to be downloaded and their server can't be reached."""
    if not published.hf_hub_id:
        _check_server(published.url)
        return
    import huggingface_hub  # imported here: it comes with timm
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=published.hf_hub_id, repo_type="model")
    if not Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "snapshots").exists():
        hub.check(huggingface_hub.constants.ENDPOINT)


def _check_server(url: str | None) -> None:
    """Raise Absent where torch.hub has to download a file and its server can't be reached."""
    if url and not Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1]).exists():
        hub.check(url)


def _width(backbone: Any, name: str, size: int | None) -> int:
    """Return how many features a timm network gives, by having it give some.

    In many a layer lies behind the pooling, so that timm's `num_features` is not it. Raise
    UserError where it can't see squares of `size` px.
    """
    height, width = backbone.default_cfg["input_size"][1:]
    if size is not None:
        height, width = size, size
    pixels = torch.zeros(1, 3, height, width, device=next(backbone.parameters()).device)
    training = backbone.training
    try:
        with torch.no_grad():
            features = backbone.eval()(pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _other_size(name, height, "", error) from error
    backbone.train(training)
    if not torch.is_tensor(features) or features.ndim != 2:
        raise UserError(
            f"model.name={name} doesn't return one list of features for each picture, so no "
            "classifier can be put on it; choose another model.name"
        )
    return features.shape[1]


def _torchvision(name: str, weights: str | None, size: int | None) -> tuple[nn.Module, int]:
    published = torchvision_weights(name, weights)
    import torchvision  # imported here: it doubles the start-up time of a run that needs none

    _check_server(published.url if published else None)
    extra: dict[str, Any] = {}
    if name in TRANSFORMING and published is None:
        extra = {"aux_logits": False, "init_weights": weights is None}
    try:
        network = _patiently(lambda: torchvision.models.get_model(name, weights=published, **extra))
    except OSError as error:  # urllib's URLError is one
        raise Absent(str(error)) from error
    except Unreadable:
        raise
    except Exception as error:  # unpickling damage raises whatever the bytes happen to say
        if published is None:
            raise
        raise UserError(
            f"model.weights={weights}: the copy of the weights in "
            f"{torch.hub.get_dir()}/checkpoints is damaged; delete it and start again"
        ) from error
    if name in TRANSFORMING:
        # The auxiliary classifiers only matter when it is trained from scratch on ImageNet.
        network.aux_logits = False
        for auxiliary in AUXILIARY:
            setattr(network, auxiliary, None)
    head, features = _find_head(network)
    if weights is not None and published is None:
        fill(network, state_dict(name, weights), weights, [head])
        if name in TRANSFORMING and not is_package(weights):
            network.transform_input = True  # as torchvision's own loading sets it
    network.set_submodule(head, nn.Identity())
    return network, features


def _without_transform(
    backbone: Any, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Take away a network's own change of ImageNet's normalisation; return the one that does both.

    So the state dict says all, and whoever builds the network again needs to know nothing more.
    """
    backbone.transform_input = False
    theirs = list(zip(mean, std, PLAIN.mean, PLAIN.std, strict=True))
    return (
        [value - spread * (middle - 0.5) / width for value, spread, middle, width in theirs],
        [spread * 0.5 / width for value, spread, middle, width in theirs],
    )


def _patiently(load: Callable[[], Any]) -> Any:
    """Return what `load` returns, from the same random numbers at each try.

    A disk that fails is not a network that isn't there: raise Unreadable for the one, and what
    `load` raises for the other.
    """
    state = torch.get_rng_state()
    try:
        return load()
    except OSError as error:
        if error.errno not in TRANSIENT or isinstance(error, TimeoutError):
            raise

    def again() -> Any:
        torch.set_rng_state(state)
        return load()

    return files.patiently(torch.hub.get_dir(), again)


# By the first word of a model's name: what returns the backbone, and how many features it gives.
BUILDERS = {"small_cnn": _small_cnn, "timm": _timm}


def _find_head(network: nn.Module) -> tuple[str, int]:
    """Return the layer that gives ImageNet's 1,000 logits, and how many features it takes.

    It is the last linear layer or, in SqueezeNet, the last 1 x 1 convolution, whose place in front
    of the pooling an identity may take.
    """
    layers = dict(network.named_modules())
    name = [name for name in layers if isinstance(layers[name], nn.Linear | nn.Conv2d)][-1]
    outputs, features = layers[name].weight.shape[:2]
    assert outputs == 1000, name
    return name, features


def _offline(
    name: str, weights: str | None, weights_dir: str | None, error: Exception
) -> UserError:
    where = ""
    if weights_dir is not None:
        where = f"model.weights_dir={weights_dir} holds none (looked for {looked_for(name)}), and "
    return UserError(
        f"model.weights={weights}: {where}the weights of {name} could not be downloaded ({error}); "
        "where there is no network, download them elsewhere and give model.weights=FILE, "
        "or train from scratch with model=small_cnn, or this model with model.weights=null"
    )
