"""How a batch's gradients are summed: in one process, or by DistributedDataParallel in several."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.job import Job
from trainer.images.sampler import Share


class Gradients:
    """For one process that computes whole batches: its gradients are complete as they are."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward  # what training calls: the network, compiled or wrapped

    def global_batch_size(self, count: int) -> float:
        """Return the divisor of a summed loss that makes the gradients those of the batch's mean.

        count: images of the batch in this process.
        """
        return count

    def shards(self, image: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield this process's part of a batch as (number, image, target) of each shard.

        The caller adds a shard's gradients before it asks for the next one.
        """
        yield 0, image, target

    def microbatches(
        self, image: Tensor, target: Tensor, accumulate: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a shard in `accumulate` parts; the caller adds the gradients of each in turn."""
        if accumulate == 1:
            yield image, target
            return
        yield from zip(image.tensor_split(accumulate), target.tensor_split(accumulate), strict=True)

    def combine(self) -> None:
        """Give each parameter the gradient of the whole batch. Call it after the last shard."""

    def share_buffers(self, network: nn.Module) -> None:
        """Give all processes the same buffers, before an evaluation."""


class Replicated(Gradients):
    """Fast: one shard per process; DDP averages gradients while the backward pass goes on."""

    def __init__(
        self, forward: Any, world: Job, share: Share, global_batch_size: int, device: torch.device
    ) -> None:
        if device.type == "cuda":
            world.use_gpu()
        with warnings.catch_warnings():
            # PyTorch 2.14 has a new name for broadcast_buffers, which 2.9 doesn't know.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                forward,
                device_ids=[device.index] if device.type == "cuda" else None,
                process_group=world.group,
                # Training reads no running statistics, so they may differ between processes until
                # an evaluation takes rank 0's.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        super().__init__(wrapped)
        self._world = world
        self._shard = share.mine[0]
        self._divisor = global_batch_size / world.size  # DDP divides by the processes itself

    def global_batch_size(self, count: int) -> float:
        return self._divisor

    def shards(self, image: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        yield self._shard, image, target

    def microbatches(
        self, image: Tensor, target: Tensor, accumulate: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        *first, last = super().microbatches(image, target, accumulate)
        with self.forward.no_sync():
            yield from first
        yield last

    def share_buffers(self, network: nn.Module) -> None:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0, group=self._world.group)
