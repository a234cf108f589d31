import numpy as np
import pytest
import torch

from trainer.network import build
from trainer.network.distance import Joined, WithDistance, class_means


def test_the_distance_is_one_minus_the_cosine_to_the_nearest_classs_mean():
    torch.manual_seed(0)
    network = build.build("small_cnn", 4).eval()
    pixels = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    labels = np.array([0, 0, 2, 2, 3, 3])
    with torch.no_grad():
        features = network.features(pixels).numpy().astype(np.float64)
        both = WithDistance(network, class_means(features.astype(np.float32), labels, 4))
        logits, distance = both(pixels)
        assert torch.equal(logits, network(pixels))
        assert torch.equal(Joined(both)(pixels)[:, -1], distance)
        network.averages_flip = True  # the logits follow, the distance is of the image as it is
        logits, same = both(pixels)
        assert torch.equal(logits, network(pixels))
        torch.testing.assert_close(same, distance, rtol=0, atol=1e-6)
    means = np.stack([features[labels == label].mean(axis=0) for label in (0, 2, 3)])
    cosines = (features @ means.T) / (
        np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    )
    assert distance.tolist() == pytest.approx((1 - cosines.max(axis=1)).tolist(), abs=1e-5)


def test_a_class_without_an_image_and_an_image_without_features_are_near_nothing():
    means = class_means(np.ones((2, 3), np.float32), np.array([0, 0]), 2)
    assert means[1].tolist() == [0, 0, 0] and means[0].norm() == pytest.approx(1)

    class Dark(torch.nn.Module):
        def with_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(pixels), 2), torch.zeros(len(pixels), 3)

    _, distance = WithDistance(Dark(), means)(torch.zeros(2, 4, 4, 3))  # type: ignore[arg-type]
    assert distance.tolist() == [1, 1]
