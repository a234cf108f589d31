"""A small real model package, for the tests of its builder and of its reader."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from trainer.images.decode import Preprocessing, prepare
from trainer.network import build as model
from trainer.network.build import Classifier
from trainer.network.distance import WithDistance, class_means
from trainer.results.calibrate import Calibration
from trainer.results.package import Contents

# PyTorch's exporter reads and registers some thousand operators each time that it is used.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

CLASSES = ("café", "dog", "hen")
SIZE = 32


def make_network(name: str = "small_cnn") -> nn.Module:
    """Return a random network whose BatchNorm has seen pictures, in train mode."""
    torch.manual_seed(0)
    network = model.build(name, len(CLASSES), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)).train()
    with torch.no_grad():
        # BatchNorm's running statistics are a moving average: 30 steps leave 4 % of their start.
        for _ in range(30):
            network(torch.randint(0, 256, (8, SIZE, SIZE, 3), dtype=torch.uint8))
    return network


def make_contents(folder: Path, preprocessing: Preprocessing | None = None) -> Contents:
    """Three golden pictures of different formats and shapes, written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / "wide.JPG", folder / "tall.png", folder / "square.webp"]
    for path, (height, width) in zip(paths, ((80, 120), (90, 50), (60, 60)), strict=True):
        small = Image.fromarray(
            rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        )
        small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return Contents(
        classes=CLASSES,
        preprocessing=preprocessing
        or Preprocessing(resize=40, size=SIZE, interpolation="bilinear"),
        metrics={"test_top1": 0.875, "test_loss": 0.5},
        config={"model.name": "small_cnn", "data.augment.scale": [0.3, 1.0], "model.weights": None},
        revision="0123abc",
        golden=[str(path) for path in paths],
    )


TEMPERATURE, LEAST = 0.5, 0.25


def make_calibrated(folder: Path) -> Contents:
    """The same with a calibration by which the third golden picture is unlike the first two."""
    contents = make_contents(folder)
    pixels = np.stack([prepare(path, contents.preprocessing) for path in contents.golden])
    network = make_network().eval()
    assert isinstance(network, Classifier)
    with torch.no_grad():
        features = network.features(torch.from_numpy(pixels))
        means = class_means(features[:2].numpy(), np.array([0, 1]), len(CLASSES))
        _, distance = WithDistance(network, means)(torch.from_numpy(pixels))
    calibration = Calibration(TEMPERATURE, 37, LEAST, float(distance[2]) / 2)
    return replace(contents, calibration=calibration, means=means)
