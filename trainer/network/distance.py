"""How far an image's features lie from those of the classes that were trained on."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from trainer.network.build import Classifier


class WithDistance(nn.Module):
    """A classifier that gives, besides the logits, each image's distance from the nearest class.

    The distance is 1 - the cosine between the image's features and the mean features of a class: 0
    to 2. We chose it by measurement (docs/decisions).

    means: float32 [classes, width], from `class_means`.
    """

    means: Tensor

    def __init__(self, network: Classifier, means: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("means", means)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, classes] and distances [N] of pixels [N, height, width, 3]."""
        logits, features = self.network.with_features(pixels)
        cosines = functional.normalize(features) @ self.means.T
        return logits, 1 - cosines.max(dim=1).values


class Joined(nn.Module):
    """`WithDistance` with one output tensor, float [N, classes + 1]: the distance comes last."""

    def __init__(self, network: WithDistance) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and distance, [N, classes + 1], of pixels [N, height, width, 3]."""
        logits, distance = self.network(pixels)
        return torch.cat([logits, distance[:, None]], dim=1)


class Features(nn.Module):
    """The features of a classifier, as a network of its own."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [N, width] of pixels [N, height, width, 3]."""
        features: Tensor = self.network.features(pixels)
        return features


def class_means(features: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> Tensor:
    """Return the direction of each class's mean features, float32 [classes, width], of length 1.

    features: [N, width]; labels: [N]. A class without an image has zeros, so no image is near it.
    """
    sums = np.zeros((classes, features.shape[1]))
    np.add.at(sums, labels, features)
    return functional.normalize(torch.from_numpy(sums)).float()
