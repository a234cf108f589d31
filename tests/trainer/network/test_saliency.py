"""Where a network sees a class: where the evidence is, for each kind of network."""

import numpy as np
import torch
from torch import nn
from torchvision.models import VisionTransformer

from trainer.network.build import Classifier
from trainer.network.saliency import Saliency
from trainer.results.saliency import lit

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def convolutional(in_place: bool) -> Classifier:
    """Class 1 is light, class 0 is darkness."""
    layer = nn.Conv2d(3, 1, 4, stride=4, bias=False)
    nn.init.ones_(layer.weight)
    layers = (layer, nn.ReLU(inplace=in_place), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[-1.0], [1.0]])
    return Classifier(nn.Sequential(*layers), head, MEAN, STD, frozen=True)


def test_the_light_is_found_and_speaks_against_darkness():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:16, 16:24] = 255
    for in_place in (False, True):
        found = Saliency(convolutional(in_place))
        for _ in range(2):  # first it looks for the layer
            where = found.where(pixels, 1)
            assert where is not None and where.shape == (8, 8) and where.max() == 1
            assert where.sum() == 4 and where[2:4, 4:6].sum() == 4
        assert found.where(pixels, 0) is None
    shown = lit(np.full((32, 32, 3), 200, np.uint8), where)
    assert shown[12, 20, 0] > 190 > 100 > shown[28, 4, 0]


def test_a_transformer_that_asks_its_class_token_alone_has_places():
    torch.manual_seed(0)
    whole = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    whole.heads = nn.Identity()
    network = Classifier(whole, nn.Linear(16, 2), MEAN, STD)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = [Saliency(network).where(pixels, label) for label in (0, 1)]
    assert all(each is not None and each.shape == (4, 4) and each.max() == 1 for each in found)


class Attention(nn.Module):
    """As timm's: queries, keys and values are the output of one layer, wider than the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(tokens)).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return tokens + attended


class Tokens(nn.Module):
    """A patch a token, behind one that stands for the class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 8, 8, stride=8), nn.Parameter(torch.rand(1, 1, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(images), -1, -1), patches], dim=1)


class First(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0]


def test_places_are_those_of_the_tokens_and_not_of_what_is_made_of_them():
    torch.manual_seed(0)
    layers = (Tokens(), Attention(), nn.LayerNorm(8), First())
    network = Classifier(nn.Sequential(*layers), nn.Linear(8, 2), MEAN, STD)
    found = Saliency(network)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    where = [found.where(pixels, label) for label in (0, 1)]
    assert any(each is not None and each.shape == (4, 4) for each in where)
    assert found._layer is network.backbone[1].norm


def test_a_network_without_places_shows_none():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    network = Classifier(flat, nn.Linear(4, 2), MEAN, STD)
    assert Saliency(network).where(np.ones((4, 4, 3), np.uint8), 0) is None
