"""The training loop, to be read aloud: fit, an epoch, a step, an evaluation."""

import hashlib
from collections.abc import Iterable
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn

from trainer.common.console import ProgressBar
from trainer.common.watch import watch
from trainer.images.loader import Batch
from trainer.network import optim
from trainer.network.device import Machine
from trainer.training.training import Diverged, Training


def fit(run: Training) -> None:
    """Train from where the run stands to its end.

    Raises Interrupted, with everything saved, when asked to stop.
    """
    with run.saved_at_the_end():
        if run.is_probe():
            run.begin_from_probe(evaluate(run))
        while run.progress.epoch < run.epochs and not run.out_of_patience():
            try:
                train_one_epoch(run)
                metrics = evaluate(run)
                run.check_metrics(metrics)
            except Diverged as error:
                run.rewind(error)
                continue
            run.end_epoch(metrics)
            if run.is_best(metrics):
                run.keep_best(metrics)
            run.checkpoints.save_if_due(epoch_ends=True)


def train_one_epoch(run: Training) -> None:
    """Train the rest of the epoch that runs.

    Looks at the clock, and at the wish to stop, after each step.
    """
    run.begin_epoch()
    with closing(run.train_batches()) as batches:
        for image, target in batches:
            optim.set_lr(run.optimizer, run.lr_factor())
            train_one_step(run, image, target)
            run.end_step()
    run.note_progress()


def train_one_step(run: Training, image: Tensor, target: Tensor) -> None:
    """Take one optimizer step on one batch, or on this process's part of it.

    image: uint8 [N, height, width, 3], or features [N, width]; target: classes, int64 [N]. Each
    shard of the batch is computed in train.accumulate microbatches. What is seen is added to the
    epoch's sums, unfetched.
    """
    config = run.config.train
    divisor = run.gradients.global_batch_size(len(image))
    for shard, shard_image, shard_target in run.gradients.shards(image, target):
        seed_dropout(run.device, run.config.seed, run.progress.step, shard)
        mixed = run.mix(shard_image, shard_target, shard)
        for inputs, targets in run.gradients.microbatches(*mixed, config.accumulate):
            with run.machine.autocast():
                output = run.gradients.forward(inputs).float()
                loss = run.loss(output, targets)
            # Of the loss divided by the whole batch: the gradients add up to those of its mean.
            share = torch.full_like(loss, 1 / divisor)
            run.scaler.scale(loss).backward(share)  # type: ignore[no-untyped-call]
            run.sums.add(run.progress.step, loss, output, targets)
    run.gradients.combine()
    if config.clip_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.parameters(), config.clip_norm)
    run.checkpoints.settle()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def evaluate(run: Training) -> dict[str, float]:
    """Return the metrics of valid, in all processes. Raises Interrupted when asked to stop."""
    run.gradients.share_buffers(run.eval_model)
    batches = run.data.eval_batches("valid")
    with ProgressBar("evaluating", 1):
        with run.unchanged():
            logits, targets = predict(run, run.eval_model, batches, run.machine)
        return run.world.broadcast_from_main(partial(run.measure, logits, targets))


@torch.inference_mode()
def predict(
    run: Training, model: nn.Module, batches: Iterable[Batch], machine: Machine
) -> tuple[Tensor, Tensor]:
    """Return logits float32 [N, classes] and classes int64 [N] of every image, in order.

    On the CPU of rank 0. batches: this process's share of a split's. They, and so the logits, are
    the same for any number of processes. machine: in whose precision. Raises Interrupted when asked
    to stop.
    """
    model.eval()
    logits, targets = [], []
    with watch.over():
        for image, target in run.world.rounds(batches, run.stop):
            with machine.autocast():
                logits.append(mean_logits(model, image.to(run.device, non_blocking=True)))
            targets.append(target)
    logits = run.world.gather([each.cpu() for each in logits])
    targets = run.world.gather(targets)
    if not logits:  # a process may have no batch
        return torch.empty(0, 0), torch.empty(0)
    return torch.cat(logits), torch.cat(targets)


def mean_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits float32 [N, classes] of a batch.

    inputs: as in `Batch`. Of features of several views, [N, views, width], their mean, as the
    whole network gives it.
    """
    views = inputs.flatten(0, 1) if inputs.ndim == 3 else inputs
    logits: Tensor = model(views).float()
    return logits.reshape(len(inputs), -1, logits.shape[1]).mean(1)


def seed_dropout(device: torch.device, seed: int, step: int, shard: int) -> None:
    """Make dropout and stochastic depth a function of (seed, step, shard).

    The device's generator alone: torch.manual_seed costs 100 times as much.
    """
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    if device.type == "mps":
        torch.mps.manual_seed(number + shard)
        return
    source = torch.default_generator
    if device.type == "cuda":
        source = torch.cuda.default_generators[device.index or 0]
    source.manual_seed(number + shard)
