"""The moving average of a network's weights, which is evaluated instead of the network."""

import copy

import torch
from torch import nn

from trainer.network.build import Classifier


class ModelEma:
    """The exponential moving average of the weights, and of floating-point buffers.

    Such buffers are BatchNorm's statistics. `self.network` is the averaged network.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        mine, its = trained_part(self.network), trained_part(network)
        pairs = list(zip(mine.state_dict().values(), its.state_dict().values(), strict=True))
        # In two lists, for one call that moves them all.
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._mine, self._its = map(list, zip(*floating, strict=True))
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the network, after `step` steps of training."""
        # In the first steps a long average would mostly hold the random start, so the decay is at
        # most (1 + n) / (10 + n), as in TensorFlow's moving averages.
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mine, self._its, 1 - decay)
        for mine, its in self._counters:
            mine.copy_(its)


def trained_part(network: nn.Module) -> nn.Module:
    """Return the part of a network that training changes: all of it, or the head alone."""
    if isinstance(network, Classifier) and network.frozen:
        return network.head
    return network
