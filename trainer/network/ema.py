"""An exponential moving average of a network, evaluated and packaged in its place."""

import copy

import torch
from torch import nn

from trainer.network.build import trained_part


class ModelEma:
    """The average of what training changes: weights, and floating buffers such as BatchNorm's statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        averages = trained_part(self.network).state_dict().values()
        values = trained_part(model).state_dict().values()
        pairs = list(zip(averages, values, strict=True))
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps.

        While there are few, a long average would mostly hold the random start: (1 + n) / (10 + n), as
        TensorFlow's moving averages do.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [average for average, _ in self._floating]
        torch._foreach_lerp_(averages, [value for _, value in self._floating], 1 - decay)
        for average, value in self._counters:
            average.copy_(value)
