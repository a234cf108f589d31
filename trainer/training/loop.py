"""The training loop: one step, one evaluation, and `fit`, which reads top to bottom."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.common.console import ProgressBar, log
from trainer.common.errors import Interrupted, Unreadable, UserError
from trainer.common.interrupt import Stop
from trainer.common.randomness import Purpose, generator
from trainer.distributed.job import ALONE, GO, SAVE, STOP, Gradients, World
from trainer.images.loader import Batch, Batches
from trainer.images.mixup import Mixing, mix
from trainer.network import optim
from trainer.network.ema import ModelEma
from trainer.settings.config import Config, metric_line
from trainer.training import checkpoint, metrics


@dataclass
class Progress:
    """Where a run is. Together with the tensors of `Learner`, all that a checkpoint needs: everything else is a function of it and the seed."""

    epoch: int = 0  # epochs that are complete, with their evaluation
    batch: int = 0  # batches done of the epoch that runs
    step: int = 0  # optimizer steps done
    sums: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # of the running epoch: loss, correct, pictures
    seconds: float = 0.0  # of the running epoch
    data_wait: float = 0.0  # of these, waiting for pictures
    best: dict[str, Any] | None = None  # epoch and value of the best weights
    rows: list[dict[str, Any]] = field(default_factory=list)  # the ledger's

    def stale_epochs(self) -> int:
        return self.epoch - (self.best["epoch"] if self.best else 0)


class Learner:
    """What training changes: the network (its head alone, where features are cached), its moving average, the optimizer and the gradient scaler."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: torch.dtype,
        ema_decay: float | None = None,
        forward: Any = None,
        gradients: Gradients | None = None,
    ) -> None:
        self.network = network.to(device)
        self.optimizer = optimizer
        self.device = device
        self.precision = precision
        self.average = ModelEma(network, ema_decay) if ema_decay is not None else None
        # Gradients of float16 underflow without it; bfloat16 has float32's range and needs none.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        # Its compiled form shares the parameters. `forward or network` would ask a module for its length.
        self.forward = network if forward is None else forward
        self.gradients = Gradients(self.forward) if gradients is None else gradients
        self.world = self.gradients.world
        self.set_sums([0.0, 0.0, 0.0])

    def set_sums(self, sums: list[float]) -> None:
        """Those of the epoch so far. Each process adds its own to them."""
        self.seen = Sums(sums if self.world.is_main_process else [0.0, 0.0, 0.0])

    def sums(self) -> list[float]:
        """Of all processes; fetched from the device, for which a GPU is waited for."""
        return self.world.all_reduce_sum(self.seen.fetch())

    def eval_model(self) -> nn.Module:
        """The network that is evaluated and packaged: the average where there is one."""
        return self.average.network if self.average else self.forward

    def load_eval_weights(self, weights: dict[str, Tensor]) -> None:
        """Make `weights` those that are evaluated and packaged."""
        self.network.load_state_dict(weights)
        if self.average:
            self.average.network.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: references to the live tensors, with string keys only."""
        optimizer = self.optimizer.state_dict()
        return {
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict() if self.average else None,
            "optimizer": {
                "state": {str(key): value for key, value in optimizer["state"].items()},
                "groups": optimizer["param_groups"],
            },
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average:
            self.average.network.load_state_dict(state["average"])
        saved = state["optimizer"]
        self.optimizer.load_state_dict(
            {
                "state": {int(key): value for key, value in saved["state"].items()},
                "param_groups": saved["groups"],
            }
        )
        for parameter, entries in self.optimizer.state.items():
            for key, value in entries.items():
                if value.shape == parameter.shape:
                    # In the parameter's memory order (channels_last, say): the fused kernels pair the two element by element as they lie in memory.
                    entries[key] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])


class Sums:
    """Of the pictures trained on since the epoch began: the loss, how many were right, and how many there were.

    What a step leaves is looked at FETCH_EVERY steps later: a GPU is not waited for in each, and a small network's steps are not held up by
    arithmetic that they don't need. It is added up one by one, so that the sums don't depend on where a run was interrupted.
    """

    FETCH_EVERY = 64  # parts of batches

    def __init__(self, sums: list[float]) -> None:
        self._loss, self._right, self._count = sums
        self._left: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """loss: summed over the pictures; logits: [N, classes]; targets: as `train_step`'s."""
        self._left.append((loss.detach(), logits.detach(), targets))
        if len(self._left) == self.FETCH_EVERY:
            self.fetch()

    def fetch(self) -> list[float]:
        if self._left:
            losses, logits, targets = zip(*self._left, strict=True)
            self._left = []
            for value in torch.stack(
                losses
            ).tolist():  # and not by `sum`, which since Python 3.12 rounds at its end alone
                self._loss += value
            self._count += sum(map(len, targets))
            if targets[0].ndim == 1:
                self._right += (torch.cat(logits).argmax(1) == torch.cat(targets)).sum().item()
        return [self._loss, self._right, self._count]


def train_step(
    learner: Learner,
    pixels: Tensor,
    targets: Tensor,
    *,
    accumulate: int,
    label_smoothing: float,
    clip_norm: float | None,
    prepare: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """One optimizer step on one batch, or on this process's part of it; each of its shards is split into `accumulate` parts.

    pixels: [N, height, width, 3]; targets: classes int64 [N] or probabilities float [N, classes]. prepare(shard, pixels, targets) is called for
    each shard before it is computed. Adds what it saw to the learner's sums, unfetched.
    """
    gradients = learner.gradients
    whole = gradients.whole(len(pixels))
    for shard, seen, wanted in gradients.shards(pixels, targets):
        if prepare is not None:
            seen, wanted = prepare(shard, seen, wanted)
        parts = (
            list(zip(seen.tensor_split(accumulate), wanted.tensor_split(accumulate), strict=True))
            if accumulate > 1
            else [(seen, wanted)]
        )
        for number, (part, labels) in enumerate(parts, start=1):
            with gradients.part(last=number == len(parts)):
                with autocast(learner.device, learner.precision):
                    logits = gradients.forward(part).float()
                    loss = functional.cross_entropy(
                        logits, labels, label_smoothing=label_smoothing, reduction="sum"
                    )
                # Of the loss divided by the whole batch, so that the gradients of all parts add up to those of one large batch.
                learner.scaler.scale(loss).backward(torch.full_like(loss, 1 / whole))  # type: ignore[no-untyped-call]
            learner.seen.add(loss, logits, labels)
    gradients.combine()
    if clip_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(
            [p for group in learner.optimizer.param_groups for p in group["params"]], clip_norm
        )
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    precision: torch.dtype,
    stop: Stop,
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:
    """Logits float32 [N, classes] and labels int64 [N] of every picture, in order, on the CPU of rank 0. Raises Interrupted when asked to stop.

    batches: this process's share. The batches are the same for any number of processes, and so are the logits.
    """
    network.eval()
    logits, labels = [], []
    for batch in world.rounds(batches, stop):
        with autocast(device, precision):
            logits.append(network(batch.pixels.to(device, non_blocking=True)).float())
        labels.append(batch.labels)
    logits, labels = world.gather([each.cpu() for each in logits]), world.gather(labels)
    return (
        (torch.cat(logits), torch.cat(labels)) if logits else (torch.empty(0, 0), torch.empty(0))
    )  # a process may have no batch


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def fit(
    learner: Learner,
    feed: Batches,
    config: Config,
    progress: Progress,
    ledger: metrics.Ledger,
    checkpoints: "Checkpoints",
    stop: Stop,
) -> None:
    """Trains from where `progress` is to the end. Raises Interrupted, with the state saved, when asked to stop."""
    train, world = config.train, learner.world
    assert train.epochs is not None  # weights.resolve
    try:
        while progress.epoch < train.epochs and not (
            train.patience and progress.stale_epochs() >= train.patience
        ):
            train_epoch(learner, feed, config, progress, checkpoints, stop)
            started = time.monotonic()
            learner.gradients.share_buffers(learner.eval_model())
            logits, labels = evaluate(
                learner.eval_model(),
                feed.eval_batches("valid"),
                learner.device,
                learner.precision,
                stop,
                world,
            )
            row = _epoch_row(learner, progress, mixed(config)) | world.broadcast_from_main(
                partial(metrics.classification, logits, labels, "valid")
            )
            row |= {
                "evaluate_seconds": time.monotonic() - started,
                "seconds": progress.seconds + time.monotonic() - started,
            }
            ledger.append(row)
            progress.epoch, progress.batch, progress.sums, progress.seconds, progress.data_wait = (
                progress.epoch + 1,
                0,
                [0.0, 0.0, 0.0],
                0.0,
                0.0,
            )
            if metrics.better(
                row[train.monitor], progress.best["value"] if progress.best else None, train.monitor
            ):
                progress.best = {"epoch": progress.epoch, "value": row[train.monitor]}
                checkpoints.hold_best(learner)
            log.info(metric_line(row))
            if checkpoints.due(epoch_ends=True):
                checkpoints.save(learner, progress)
        checkpoints.save(learner, progress)
    except Interrupted:
        checkpoints.save(learner, progress)
        checkpoints.wait()
        world.farewell()  # torchrun ends all processes soon after the first has ended
        raise
    except Unreadable:
        if world.size == 1:  # what was trained until now is not lost by it
            checkpoints.save(learner, progress)
        raise
    finally:
        checkpoints.wait()


def train_epoch(
    learner: Learner,
    feed: Batches,
    config: Config,
    progress: Progress,
    checkpoints: "Checkpoints",
    stop: Stop,
) -> None:
    """The rest of the epoch that runs. Looks at the flag and the clock after every step."""
    train, augment, world = config.train, config.data.augment, learner.world
    learner.gradients.forward.train()
    learner.set_sums(progress.sums)
    seconds, waited = progress.seconds, progress.data_wait
    started = time.monotonic()

    def now(batch: int) -> None:
        progress.batch, progress.sums = batch, learner.sums()
        progress.seconds, progress.data_wait = seconds + time.monotonic() - started, waited
        if not math.isfinite(progress.sums[0]):
            raise UserError(
                f"the loss is {progress.sums[0]} in epoch {progress.epoch + 1}: training diverged; lower optim.lr (now {config.optim.lr}), "
                "or set train.clip_norm=1"
            )

    def prepare(shard: int, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        seed_dropout(learner.device, config.seed, progress.step, shard)
        if not mixed(config):
            return pixels, targets
        rng = generator(Purpose.MIX, config.seed, epoch=shard, sample=progress.step)
        return mix(pixels, targets, feed.classes, Mixing(augment.mixup, augment.cutmix), rng)

    bar = ProgressBar(
        f"epoch {progress.epoch + 1}/{train.epochs}", feed.steps_per_epoch, progress.batch
    )
    with bar, closing(feed.train_batches(progress.epoch, progress.batch)) as batches:
        for number in range(progress.batch, feed.steps_per_epoch):
            before = time.monotonic()
            try:
                batch = next(batches)
            except Unreadable:
                if world.size == 1:  # with several, the others are in the next step by now
                    now(number)
                raise
            waited += time.monotonic() - before
            pixels, targets = (tensor.to(learner.device, non_blocking=True) for tensor in batch)
            optim.set_lr(learner.optimizer, lr_factor(config, progress.step, feed.steps_per_epoch))
            train_step(
                learner,
                pixels,
                targets,
                accumulate=train.accumulate,
                label_smoothing=train.label_smoothing,
                clip_norm=train.clip_norm,
                prepare=prepare,
            )
            progress.step += 1
            if learner.average:
                learner.average.update(progress.step)
            if wish := world.all_reduce_max(
                STOP if stop.reason else SAVE if checkpoints.due() else GO
            ):
                now(number + 1)
                if wish == STOP:
                    world.interrupt(stop)
                checkpoints.save(learner, progress)
            bar.advance()
    now(feed.steps_per_epoch)


def lr_factor(config: Config, step: int, steps_per_epoch: int) -> float:
    choice = config.optim
    assert config.train.epochs is not None
    schedule = optim.Schedule(
        choice.schedule, choice.warmup_epochs, choice.step_epochs, choice.step_factor
    )
    return schedule.factor(step, steps_per_epoch, config.train.epochs)


def seed_dropout(device: torch.device, seed: int, step: int, shard: int) -> None:
    """Makes dropout and stochastic depth a function of (seed, step, shard). The device's generator alone: torch.manual_seed costs 100 times as
    much.
    """
    number = (
        int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "big")
        >> 1
    )
    source = (
        torch.cuda.default_generators[device.index or 0]
        if device.type == "cuda"
        else torch.default_generator
    )
    source.manual_seed(number + shard)


def mixed(config: Config) -> bool:
    """Return whether the pictures of a batch are mixed: then no picture has one right class."""
    return config.data.augment.mixup > 0 or config.data.augment.cutmix > 0


def _epoch_row(learner: Learner, progress: Progress, mixed: bool) -> dict[str, Any]:
    loss, right, count = progress.sums
    row = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": learner.optimizer.param_groups[-1]["lr"],
        "train_loss": loss / count,
    }
    if not mixed:  # none right is a result too
        row["train_top1"] = right / count
    return row | {"data_wait": progress.data_wait}


class Checkpoints:
    """The checkpoints of one run: what goes in, when, and how many stay. They are written in the background, one at a time, by rank 0 alone."""

    def __init__(
        self,
        root: Path,
        cadence: checkpoint.Cadence,
        keep: int,
        ledger: metrics.Ledger,
        facts: dict[str, Any],
        writes: bool = True,
    ) -> None:
        self.writes = writes
        self.root, self.cadence, self.keep, self.ledger, self.facts = (
            root,
            cadence,
            keep,
            ledger,
            facts,
        )
        self.good: set[str] = set()  # names known to be whole: written or verified by this process
        # The best weights so far, and the environment in which they were evaluated: in each checkpoint.
        self.best: checkpoint.Snapshot | None = None
        self._memory: Tensor | None = None  # of the last snapshot, for the next one
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def due(self, epoch_ends: bool = False) -> bool:
        return (
            self.writes
            and (self._writing is None or self._writing.done())
            and self.cadence.due(epoch_ends)
        )

    def hold_best(self, learner: Learner) -> None:
        if not self.writes:
            return
        environment = self.facts.get("environment")
        self.best = checkpoint.snapshot(
            {"network": eval_weights(learner), "environment": environment}
        )

    def go_on_from(self, path: Path, state: dict[str, Any]) -> None:
        """Take the best weights from a checkpoint that was found whole."""
        self.good.add(path.name)
        if self.writes and state["best"] is not None:
            self.best = checkpoint.snapshot(state["best"])

    def save(self, learner: Learner, progress: Progress) -> None:
        """Takes a snapshot and has it written. Waits for the write before it, and raises what that raised."""
        if not self.writes:
            return
        self.wait()
        progress.rows = self.ledger.rows
        snapshot = checkpoint.snapshot(
            {"facts": self.facts, "progress": asdict(progress), **learner.state()}, self._memory
        )
        self._memory = snapshot.data
        name = checkpoint.step_name(progress.step, evaluated=progress.batch == 0)
        self._writing = self._writer.submit(self._write, name, snapshot, self.best)

    def wait(self) -> None:
        """Until the last snapshot is on disk. Raises OSError where it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(
        self,
        name: str,
        snapshot: checkpoint.Snapshot,
        best: checkpoint.Snapshot | None,
    ) -> None:
        started = time.monotonic()
        checkpoint.write(self.root, name, snapshot, best)
        self.good.add(name)
        checkpoint.prune(self.root, self.keep, self.good)
        self.cadence.saved(time.monotonic() - started)


def eval_weights(learner: Learner) -> dict[str, Tensor]:
    return (learner.average.network if learner.average else learner.network).state_dict()
