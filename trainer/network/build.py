"""Networks by name: a backbone, a new head, and the normalisation of pixels.

The network normalises its input itself, so that no caller can forget it.
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

# torchvision's networks whose pretrained weights expect another normalisation than torchvision
# states, and change it themselves (`transform_input`).
TRANSFORMING = ("googlenet", "inception_v3")


class Classifier(nn.Module):
    """Pixels to logits.

    Takes pixels [N, height, width, 3] in 0..255, uint8 or floating (RGB), and gives float logits
    [N, classes]. The dimensions are in the order of a decoded image; viewed as
    [N, 3, height, width], the same memory is in PyTorch's channels_last format.
    """

    mean: Tensor
    std: Tensor
    name = ""  # of the architecture, as model.name has it
    code = ""  # SHA-256 of the user's own code that built it, "" for any other network

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
        self.keeps_norm_stats = False  # of the backbone, even where its weights are trained
        self.averages_flip = False  # in eval mode: over an image and its mirror image
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
        """Return the backbone's output for pixels [N, height, width, 3]: [N, features]."""
        images = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        features: Tensor = self.backbone(images)
        return features

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits [N, classes] of pixels [N, height, width, 3]."""
        logits, _ = self.with_features(pixels)
        return logits

    def with_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, classes] and the features [N, width] of pixels.

        With `averages_flip`, the logits are a mean; the features are those of the image unflipped.
        """
        if not self.averages_flip or self.training:
            features = self.features(pixels)
            return self.head(features), features
        # As one batch: the exported network holds each layer once.
        features = self.features(torch.cat([pixels, mirrored(pixels)]))
        logits: Tensor = self.head(features).float()
        # Not `chunk`: with it the export would fix the batch size.
        plain = features.reshape(2, -1, features.shape[1])[0]
        return logits.reshape(2, -1, logits.shape[1]).mean(0), plain

    def train(self, mode: bool = True) -> "Classifier":
        """Set the mode as nn.Module does, but keep a frozen backbone in eval mode.

        In train mode its BatchNorm statistics would drift. With `keeps_norm_stats`, the BatchNorm
        layers of a trained backbone stay in eval mode too.
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
    """Return the classifier `small_cnn`, `timm/NAME`, `own`, or one of torchvision's by its name.

    code: the user's own code, which builds `own`. weights: torchvision's name for them, a file with
    a state dict, one of our packages, or None for random ones. weights_dir: the folder that was
    searched in vain, for the message. keep_head: take the head of the package too; else it is new
    and random, and the caller seeds torch. size: side of the square images that the network will
    see, in pixels; None: the size that it was made for. mean, std: of the channels, in 0..1. Raise
    UserError for a name or weights that don't exist or don't fit.
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
    """Return the identity of the network's backbone: its tensors, architecture and builder."""
    return of_weights(network.backbone, network.name, builder(network))


def builder(network: Classifier) -> dict[str, str]:
    """Return the versions of the libraries that built the network, by name.

    For the user's own code return its digest: the layers don't show everything that it computes.
    """
    if network.name == OWN:
        return {"model.code": network.code}
    libraries = {"small_cnn": (), "timm": ("timm",)}
    used = libraries.get(network.name.split("/")[0], ("torchvision",))
    return {library: importlib.metadata.version(library) for library in used}


def check(network: Classifier, name: str, size: int, count: int) -> None:
    """Raise UserError where the network can't train on `count` images of `size` px at once.

    Many networks need a least size, some exactly one size, and BatchNorm needs two values.
    """
    # At most two images: a larger batch fails no differently.
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
    """Return the network that the user's own code builds."""
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
        # timm's function that adapts files of the networks' authors, or another number of patches.
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
    """Return timm's network without its last layer, for `size` px where its size can be chosen."""
    timm = import_timm(name)
    short = name.removeprefix("timm/")
    usual = timm.get_pretrained_cfg(short, allow_unregistered=True)
    if pretrained and usual is not None:
        _check_timm_server(usual)
    if usual is not None and usual.fixed_input_size and not _is_usual(name, size):
        try:
            return timm.create_model(short, num_classes=0, pretrained=pretrained, img_size=size)
        except TypeError as error:  # the network's size can't be chosen
            if "img_size" not in str(error):
                raise
    return timm.create_model(short, num_classes=0, pretrained=pretrained)


def _check_timm_server(published: Any) -> None:
    """Raise Absent where timm must download weights and can't reach their server."""
    if not published.hf_hub_id:
        _check_server(published.url)
        return
    import huggingface_hub  # imported here: it comes with timm
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=published.hf_hub_id, repo_type="model")
    if not Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "snapshots").exists():
        hub.check(huggingface_hub.constants.ENDPOINT)


def _check_server(url: str | None) -> None:
    """Raise Absent where torch.hub must download a file and can't reach its server."""
    if url and not Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1]).exists():
        hub.check(url)


def _width(backbone: Any, name: str, size: int | None) -> int:
    """Return how many features a timm network gives, found by a forward pass.

    Many have another layer behind the pooling, so timm's `num_features` is not their number. Raise
    UserError where the network can't take squares of `size` px.
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
    except Exception as error:  # unpickling a damaged file may raise anything
        if published is None:
            raise
        raise UserError(
            f"model.weights={weights}: the copy of the weights in "
            f"{torch.hub.get_dir()}/checkpoints is damaged; delete it and start again"
        ) from error
    if name in TRANSFORMING:
        # The auxiliary classifiers only matter for training from scratch on ImageNet.
        network.aux_logits = False
        for auxiliary in AUXILIARY:
            setattr(network, auxiliary, None)
    head, features = _find_head(network)
    if weights is not None and published is None:
        fill(network, state_dict(name, weights), weights, [head])
        if name in TRANSFORMING and not is_package(weights):
            network.transform_input = True  # as torchvision sets it for its own weights
    network.set_submodule(head, nn.Identity())
    return network, features


def _without_transform(
    backbone: Any, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Switch `transform_input` off; return the mean and std that include its change.

    So the state dict holds the whole normalisation, also for whoever builds the network again.
    """
    backbone.transform_input = False
    theirs = list(zip(mean, std, PLAIN.mean, PLAIN.std, strict=True))
    return (
        [value - spread * (middle - 0.5) / width for value, spread, middle, width in theirs],
        [spread * 0.5 / width for value, spread, middle, width in theirs],
    )


def _patiently(load: Callable[[], Any]) -> Any:
    """Return what `load` returns; retry after errors of the disk, with the same random numbers.

    Raise Unreadable where the disk keeps failing, and for anything else what `load` raises.
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


# By the first part of a model's name: the function that returns the backbone and its width.
BUILDERS = {"small_cnn": _small_cnn, "timm": _timm}


def _find_head(network: nn.Module) -> tuple[str, int]:
    """Return the name of the layer that gives ImageNet's 1,000 logits, and its input width.

    It is the last linear layer or, in SqueezeNet, the last 1 x 1 convolution: an identity may
    replace it, since the pooling comes after it.
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
