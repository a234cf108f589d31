"""Networks by name: a backbone, a new head, and the normalisation of pixels.

It lies inside the network, so that no caller can forget it.
"""

import copy
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.common import files
from trainer.common.errors import TRANSIENT, Unreadable, UserError
from trainer.images.identity import of_weights
from trainer.network.weights import fill, import_timm, is_file, state_dict, torchvision_weights


class Classifier(nn.Module):
    """Pixels to logits.

    Takes pixels [N, height, width, 3] in 0..255, uint8 or floating (RGB), and gives float logits
    [N, classes]. The order of dimensions is that of a decoded image; seen as [N, 3, height, width]
    the same memory is PyTorch's channels_last.
    """

    mean: Tensor
    std: Tensor
    name = ""  # of the architecture, as model.name has it

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
    weights: str | None = None,
    freeze: str = "none",
    head_hidden: int | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    channels_last: bool = True,
) -> Classifier:
    """Return the classifier `small_cnn`, `timm/NAME`, or that of a name of torchvision's.

    weights: a name of torchvision's, a file with a state dict, or None for random ones. mean, std:
    of the channels, in 0..1. The head is always new and random; the caller seeds torch. Raise
    UserError for a name or weights that don't exist or don't fit.
    """
    builder = BUILDERS.get(name.split("/")[0], _torchvision)
    backbone, features = builder(name, weights)
    head: nn.Module = nn.Linear(features, classes)
    if head_hidden is not None:
        head = nn.Sequential(
            nn.Linear(features, head_hidden), nn.ReLU(), nn.Linear(head_hidden, classes)
        )
    network = Classifier(backbone, head, mean, std, frozen=freeze == "backbone")
    network.name = name
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network


def identity(network: Classifier) -> dict[str, str]:
    """Return what the network's backbone is, by its tensors, its architecture and its builder."""
    libraries = {"small_cnn": (), "timm": ("timm",)}
    used = libraries.get(network.name.split("/")[0], ("torchvision",))
    versions = {library: importlib.metadata.version(library) for library in used}
    return of_weights(network.backbone, network.name, versions)


def origin(name: str, weights: str | None) -> str:
    """Return where the weights come from, in a word or two for the log."""
    if weights is None:
        return "from scratch"
    if is_file(weights):
        return f"weights from {weights}"
    if name.startswith("timm/"):
        return "timm's weights"
    import torchvision  # imported here: see `_torchvision`

    return f"torchvision's weights {torchvision.models.get_model_weights(name)[weights].name}"


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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.name={name} can't train on pictures of data.size={size}, {count} at a time "
            f"({reason}); give another data.size and data.resize, "
            "or more at a time by train.batch_size and train.accumulate"
        ) from error


def _small_cnn(name: str, weights: str | None) -> tuple[nn.Module, int]:
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
        fill(backbone, state_dict(name, weights), weights, head=None)
    return backbone, 128 * 9


def _timm(name: str, weights: str | None) -> tuple[nn.Module, int]:
    timm = import_timm(name)
    local = weights is not None and is_file(weights)
    if weights is not None and not local and weights != "DEFAULT":
        raise UserError(
            f"model.weights={weights}: timm names its weights with the model "
            f"(model.name={name.split('.')[0]}.TAG); "
            "allowed: DEFAULT, null, or a file with a state dict"
        )
    try:
        backbone: Any = _patiently(
            lambda: timm.create_model(
                name.removeprefix("timm/"),
                num_classes=0,
                pretrained=weights is not None and not local,
            )
        )
    except (OSError, RuntimeError) as error:
        raise _offline(name, weights, error) from error
    if local:
        assert weights is not None
        fill(backbone, state_dict(name, weights), weights, backbone.default_cfg["classifier"])
    return backbone, backbone.num_features


def _torchvision(name: str, weights: str | None) -> tuple[nn.Module, int]:
    published = torchvision_weights(name, weights)
    import torchvision  # imported here: it doubles the start-up time of a run that needs none

    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers only matter when they are trained from scratch on ImageNet.
        extra["aux_logits"] = False
        if published is None:
            extra["init_weights"] = True
    try:
        network = _patiently(lambda: torchvision.models.get_model(name, weights=published, **extra))
    except OSError as error:  # urllib's URLError is one
        raise _offline(name, weights, error) from error
    except Unreadable:
        raise
    except Exception as error:  # unpickling damage raises whatever the bytes happen to say
        if published is None:
            raise
        raise UserError(
            f"model.weights={weights}: the copy of the weights in "
            f"{torch.hub.get_dir()}/checkpoints is damaged; delete it and start again"
        ) from error
    head, features = _find_head(network)
    if weights is not None and published is None:
        fill(network, state_dict(name, weights), weights, head)
    network.set_submodule(head, nn.Identity())
    return network, features


def _patiently(load: Callable[[], nn.Module]) -> nn.Module:
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

    def again() -> nn.Module:
        torch.set_rng_state(state)
        return load()

    return files.patiently(torch.hub.get_dir(), again)


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


def _offline(name: str, weights: str | None, error: Exception) -> UserError:
    return UserError(
        f"model.weights={weights}: the weights of {name} could not be downloaded ({error}); "
        "where there is no network, download them elsewhere and give model.weights=FILE, "
        "or train from scratch with model=small_cnn, or this model with model.weights=null"
    )
