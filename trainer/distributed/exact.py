"""The exact mode: the same bits for any number of processes."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.gradients import Gradients
from trainer.distributed.job import Job
from trainer.distributed.world import World
from trainer.images.sampler import Share


class Ordered(Gradients):
    """Splits a batch into the same shards for any number of processes, and sums them in order.

    Each shard starts from the same buffers; BatchNorm's statistics then move by the mean of their
    moves in the shards. Of several processes each sums one slice of all gradients, so in a step it
    sends and receives as much as 2 * shards / processes gradients take.
    """

    def __init__(
        self, forward: Any, world: World, share: Share, global_batch_size: int, trained: nn.Module
    ) -> None:
        """trained: the part of the network that training changes, on its device."""
        super().__init__(forward)
        self._parameters = [
            parameter for parameter in trained.parameters() if parameter.requires_grad
        ]
        self._buffers = list(trained.buffers())
        self._moving = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        self._world, self._share, self._global_batch_size = world, share, global_batch_size
        first = self._parameters[0]
        if isinstance(world, Job) and first.is_cuda:
            world.use_gpu()
        width = sum(tensor.numel() for tensor in (*self._parameters, *self._moving))
        self._slice = -(-width // world.size)
        # A row for each shard of this process: its gradients, and how far it moved the buffers.
        self._rows = first.new_zeros(len(share.mine), self._slice * world.size, requires_grad=False)

    def global_batch_size(self, count: int) -> float:
        return self._global_batch_size

    def shards(self, image: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        self._before = [buffer.clone() for buffer in self._buffers]
        lengths = self._share.lengths(self._global_batch_size)
        parts = zip(
            self._share.mine, torch.split(image, lengths), torch.split(target, lengths), strict=True
        )
        for row, (number, shard_image, shard_target) in zip(self._rows, parts, strict=True):
            for parameter in self._parameters:
                parameter.grad = None
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
            yield number, shard_image, shard_target
            self._keep(row)

    def _keep(self, row: Tensor) -> None:
        """Write this shard's gradients, and how far it moved the buffers, to `row`."""
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        moved = [
            buffer - before
            for buffer, before in zip(self._buffers, self._before, strict=True)
            if buffer.is_floating_point()
        ]
        flat = torch.cat([tensor.reshape(-1) for tensor in (*gradients, *moved)])
        row[: len(flat)] = flat

    def combine(self) -> None:
        total, end = self._sum_in_order(), 0
        moving = {id(buffer) for buffer in self._moving}
        with torch.no_grad():
            for parameter in self._parameters:
                start, end = end, end + parameter.numel()
                assert parameter.grad is not None
                parameter.grad.copy_(total[start:end].view_as(parameter))
            for buffer, before in zip(self._buffers, self._before, strict=True):
                if id(buffer) in moving:  # not a counter: each shard has set it to one step more
                    start, end = end, end + buffer.numel()
                    mean_move = total[start:end].view_as(buffer) / self._share.shards
                    buffer.copy_(before + mean_move)

    def _sum_in_order(self) -> Tensor:
        """Return the sum of all processes' rows, in the order of the shards.

        rows: [shards here, size * slice]; the sum: [size * slice].
        """
        world, rows, width = self._world, self._rows, self._slice
        if not isinstance(world, Job):
            return _sum(rows)
        counts = [len(other.mine) for other in self._share.everybody()]
        sent = rows.view(len(rows), world.size, width).transpose(0, 1).contiguous()
        received = rows.new_empty(self._share.shards, width)
        dist.all_to_all_single(
            received.view(-1),
            sent.view(-1),
            [count * width for count in counts],
            [len(rows) * width] * world.size,
            group=world.group,
        )
        total = rows.new_empty(world.size * width)
        dist.all_gather(list(total.view(world.size, width)), _sum(received), group=world.group)
        return total


def _sum(rows: Tensor) -> Tensor:
    """Return the sum of rows [N, width], added one after the other: [width]."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
