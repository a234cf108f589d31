"""Networks by name: a backbone, a new head, and the normalisation of pixels inside, so that no caller can forget it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.common.errors import UserError
from trainer.network.weights import import_timm, is_file, torchvision_weights


class Classifier(nn.Module):
    """Pixels to logits.

    Takes pixels [N, height, width, 3] in 0..255, uint8 or floating (RGB), and gives float logits [N, classes]. The order of
    dimensions is that of a decoded picture; seen as [N, 3, height, width] the same memory is PyTorch's channels_last.
    """

    mean: Tensor
    std: Tensor

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
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        if frozen:
            backbone.requires_grad_(False)

    @property
    def features_width(self) -> int:
        """How many features the head takes."""
        return next(
            layer.in_features for layer in self.head.modules() if isinstance(layer, nn.Linear)
        )

    def features(self, pixels: Tensor) -> Tensor:
        """What the head sees: [N, features]."""
        pictures = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        features: Tensor = self.backbone(pictures)
        return features

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pixels))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """As nn.Module's, but a frozen backbone stays in eval mode: in train mode its BatchNorm statistics would drift."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def trained_part(network: nn.Module) -> nn.Module:
    """Return what training changes of a network: all, or the head alone."""
    if isinstance(network, Classifier) and network.frozen:
        return network.head
    return network


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
    """The classifier of that name: `small_cnn`, `timm/NAME`, or a classification model of torchvision.

    weights: a name of torchvision's, a file with a state dict, or None for random ones. The head is always new and random; the
    caller seeds torch. Raises UserError for a name or weights that don't exist or don't fit.
    """
    builder = BUILDERS.get(name.split("/")[0], _torchvision)
    backbone, features = builder(name, weights)
    head: nn.Module = nn.Linear(features, classes)
    if head_hidden is not None:
        head = nn.Sequential(
            nn.Linear(features, head_hidden), nn.ReLU(), nn.Linear(head_hidden, classes)
        )
    network = Classifier(backbone, head, mean, std, frozen=freeze == "backbone")
    return network.to(memory_format=torch.channels_last) if channels_last else network


def origin(name: str, weights: str | None) -> str:
    """Where the weights come from, in a word or two for the log."""
    if weights is None:
        return "from scratch"
    if is_file(weights):
        return f"weights from {weights}"
    if name.startswith("timm/"):
        return "timm's weights"
    import torchvision

    return f"torchvision's weights {torchvision.models.get_model_weights(name)[weights].name}"


def check(network: Classifier, name: str, size: int, count: int) -> None:
    """Raises UserError where the network can't train on `count` pictures of `size` px at once: many need a least size, some just one size, and
    BatchNorm needs two values.
    """
    pixels = torch.zeros(
        min(count, 2), size, size, 3, dtype=torch.uint8
    )  # two, since more fail no differently
    try:
        with torch.no_grad():
            copy.deepcopy(network).train()(pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.name={name} can't train on pictures of data.size={size}, {count} at a time ({reason}); give another data.size and data.resize, "
            "or more at a time by train.batch_size and train.accumulate"
        ) from error


def _small_cnn(name: str, weights: str | None) -> tuple[nn.Module, int]:
    """Four 3 x 3 convolutions for pictures of 12 px and more; 0.2 million parameters."""

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
        _fill(backbone, _state_dict(name, weights), weights, head=None)
    return backbone, 128 * 9


def _timm(name: str, weights: str | None) -> tuple[nn.Module, int]:
    timm = import_timm(name)
    local = weights is not None and is_file(weights)
    if weights is not None and not local and weights != "DEFAULT":
        raise UserError(
            f"model.weights={weights}: timm names its weights with the model (model.name={name.split('.')[0]}.TAG); "
            "allowed: DEFAULT, null, or a file with a state dict"
        )
    try:
        backbone: Any = timm.create_model(
            name.removeprefix("timm/"), num_classes=0, pretrained=weights is not None and not local
        )
    except (OSError, RuntimeError) as error:
        raise _offline(name, weights, error) from error
    if local:
        assert weights is not None
        _fill(
            backbone, _state_dict(name, weights), weights, head=backbone.default_cfg["classifier"]
        )
    return backbone, backbone.num_features


def _torchvision(name: str, weights: str | None) -> tuple[nn.Module, int]:
    published = torchvision_weights(name, weights)
    import torchvision  # here: it doubles the start-up time of a run that doesn't need it

    # Their auxiliary classifiers only matter when they are trained from scratch on ImageNet.
    extra: dict[str, Any] = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if published is None:
        network = torchvision.models.get_model(
            name, weights=None, **extra, **({"init_weights": True} if extra else {})
        )
    else:
        try:
            network = torchvision.models.get_model(name, weights=published, **extra)
        except OSError as error:  # urllib's URLError is one
            raise _offline(name, weights, error) from error
        except Exception as error:  # unpickling damage raises whatever the bytes happen to say
            raise UserError(
                f"model.weights={weights}: the copy of the weights in {torch.hub.get_dir()}/checkpoints is damaged; delete it and start again"
            ) from error
    head, features = _find_head(network)
    if weights is not None and published is None:
        _fill(network, _state_dict(name, weights), weights, head)
    network.set_submodule(head, nn.Identity())
    return network, features


BUILDERS = {"small_cnn": _small_cnn, "timm": _timm}


def _find_head(network: nn.Module) -> tuple[str, int]:
    """The name of the layer that gives the 1,000 logits of ImageNet, and how many features it takes.

    It is the last linear layer or, in SqueezeNet, the last 1 x 1 convolution, whose place in front of the pooling an identity may take.
    """
    name, layer = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ][-1]
    if isinstance(layer, nn.Linear):
        assert layer.out_features == 1000, name
        return name, layer.in_features
    assert isinstance(layer, nn.Conv2d) and layer.out_channels == 1000, name
    return name, layer.in_channels


# --- weights from a file ---


def _state_dict(name: str, weights: str) -> dict[str, Tensor]:
    """The tensors of a state-dict file. No code in it is run."""
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"model.weights={weights}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"model.weights={weights}: permission denied") from error
    except Exception as error:  # each format, and each kind of damage, has its own exception class
        raise UserError(
            f"model.weights={weights} is damaged, or holds more than tensors, which is not loaded for safety; allowed: a state dict for {name}, "
            "saved by torch.save(model.state_dict(), FILE) or as safetensors"
        ) from error
    for key in ("state_dict", "model"):  # the wrappings of common training scripts
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UserError(
            f"model.weights={weights} holds no state dict; allowed: names with tensors, as model.state_dict() gives them"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def _fill(network: nn.Module, state: dict[str, Tensor], weights: str, head: str | None) -> None:
    """Loads all of a state dict but the head, which has other classes. Our own packages' weights (`backbone.*`, `head.*`) fit too."""
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items()
            if key.startswith("backbone.")
        }
    of_head = {f"{head}.weight", f"{head}.bias"} if head else set()
    wanted = {key: value for key, value in network.state_dict().items() if key not in of_head}
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted and key not in of_head]
    misshapen = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    for what, names in (
        ("lacks", missing),
        ("has, and the model has not,", extra),
        ("has in another shape", misshapen),
    ):
        if names:
            raise UserError(
                f"model.weights={weights} doesn't fit the model: it {what} {', '.join(names[:3])} ({len(names)} in all); check model.name"
            )
    network.load_state_dict({key: state[key] for key in wanted}, strict=False)


def _offline(name: str, weights: str | None, error: Exception) -> UserError:
    return UserError(
        f"model.weights={weights}: the weights of {name} could not be downloaded ({error}); where there is no network, download "
        "them elsewhere and give model.weights=FILE, or train from scratch with model=small_cnn, or this model with model.weights=null"
    )
