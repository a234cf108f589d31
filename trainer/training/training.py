"""A training: one object that is all of it, and the one function that builds and resumes it."""

import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.common import usage
from trainer.common.console import ProgressBar, log
from trainer.common.errors import Interrupted, Unreadable, UserError
from trainer.common.randomness import Purpose, generator
from trainer.common.text import listed, noted
from trainer.distributed.exact import Ordered
from trainer.distributed.gradients import Gradients, Replicated
from trainer.distributed.job import Job
from trainer.distributed.world import Action, World
from trainer.images.augment import Augmentation
from trainer.images.care import Findings
from trainer.images.folder import ImageFolder
from trainer.images.identity import of_images
from trainer.images.loader import MIRRORED, PLAIN, Batch, ImageLoader, Loader, Reader
from trainer.images.mixup import Mixing, mix
from trainer.images.sampler import Share
from trainer.images.usable import preprocessing, report_left_out, usable_images, workers
from trainer.network import build, device, optim, own, probe, weights
from trainer.network.build import Classifier
from trainer.network.device import Machine
from trainer.network.ema import ModelEma, trained_part
from trainer.network.features import FeatureCache, FeatureLoader
from trainer.settings.config import FEW_VALID, Config, metric_line
from trainer.training import care, checkpoint, lineage, tracking
from trainer.training.checkpoints import Checkpoints
from trainer.training.epoch_table import EpochTable
from trainer.training.metrics import (
    MetricsFile,
    TrainSums,
    better,
    classification,
    mean_loss,
)
from trainer.training.run import Run
from trainer.training.tracking import Tracking

REWINDS = 2  # how often a training that diverged goes back, each time with half the learning rate


class Diverged(UserError):
    """The loss is no longer a finite number.

    step: the first at which it was none, from 0, and its loss.
    """

    def __init__(self, message: str, step: int, loss: float) -> None:
        super().__init__(message)
        self.step, self.loss = step, loss


@dataclass
class Progress:
    """Where a training stands.

    Together with the tensors of `Training`, all that a checkpoint needs: everything else is a
    function of it and the seed.
    """

    epoch: int = 0  # epochs that are complete, with their evaluation
    batch: int = 0  # batches done of the epoch that runs
    step: int = 0  # optimizer steps done
    # Of the running epoch, as `TrainSums` has them: loss, correct, images.
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0  # of the running epoch
    data_wait: float = 0.0  # of these, waiting for images
    best: dict[str, Any] | None = None  # epoch, value and metrics of the best weights
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    # Where it diverged and went back: epoch (from 1), step, loss (as text, "nan"), learning rate.
    rewinds: list[dict[str, Any]] = field(default_factory=list)


def build_training(
    run: Run,
    images: ImageFolder,
    *,
    network: Classifier | None = None,
    loader: ImageLoader | None = None,
    data: Loader | None = None,
) -> "Training":
    """Build the training of a run, at its newest good checkpoint or at the beginning.

    images: as they were found; those that can't be used are left out. network, loader, data: in the
    place of those that the settings ask for (the doctor's sample, a benchmark's). Raises UserError
    where this machine, the images or the checkpoint don't fit the settings; Interrupted when asked
    to stop.
    """
    machine = prepare_machine(run.config, run.world)
    run.world.check_same(machine.facts(), run.stop)
    if network is None:
        # Before the images are read: a missing weights file costs no time.
        network = build_network(run, images, machine)
    findings: Findings | None = None
    if loader is None:
        with run.stages.of("scan"):
            images, reader = usable_images(run.config, images, run.stop, run.world)
        if run.world.is_main_process:
            report_left_out(images, run.directory / "quarantine.txt")
        if run.looks or run.config.data.leaks != "warn":
            with run.stages.of("scan"):
                images, findings = care.look(run, images, reader)
        loader = make_loader(run, images, reader, machine)
    if data is None:
        with run.stages.of("features"):
            data = _data(run, network, loader, machine)
    training = Training(run, machine, network, loader, data)
    if findings is not None:
        training.findings = findings
        care.tell(run, findings, data, machine)
    training.resume()
    return training


def _data(run: Run, network: Classifier, loader: ImageLoader, machine: Machine) -> Loader:
    """Return what the model is trained on: the images, or the features of a frozen backbone."""
    if loader.views is None:
        return loader
    cache = FeatureCache(network, loader, machine, Path(run.config.platform.cache))
    if run.config.model.head == "probe":  # solved on these, and not on random views
        train, valid = (cache.of(split, PLAIN, run.stop) for split in ("train", "valid"))
        data = FeatureLoader(loader, (train,), valid, cache=cache)
    else:
        data = cache.extract(run.stop, run.world)
    cache.tell()
    return data


class Training:
    """All that a training is; `loop.fit` trains it.

    network: the whole network, as it is packaged. model: what is trained of it: the head alone,
    where the features of a frozen backbone are computed once, else all. loader: the images as
    pixels; data: what the model is trained on, these or their features. findings: what is wrong
    with the images.
    """

    def __init__(
        self, run: Run, machine: Machine, network: Classifier, loader: ImageLoader, data: Loader
    ) -> None:
        self.run, self.config, self.world, self.stop = run, run.config, run.world, run.stop
        self.machine, self.device = machine, machine.device
        self.network, self.loader, self.data = network.to(machine.device), loader, data
        self.findings = Findings()
        self.own = own.load(run.config.model.code)
        self.own.check_loss(data.classes, self.mixes)
        self.model: nn.Module = network.head if data.holds_features else network
        self.forward = self.model
        if run.config.train.compile:
            self.forward = device.compiled(self.model)
        choice = run.config.optim
        # settings.config.fill_recipe
        assert choice.lr is not None and choice.layer_decay is not None
        self.optimizer = optim.build(
            network,
            choice.name,
            lr=choice.lr,
            head_lr=choice.head_lr,
            weight_decay=choice.weight_decay,
            momentum=choice.momentum,
            layer_decay=choice.layer_decay,
        )
        # Gradients of float16 underflow without it; bfloat16 has float32's range and needs none.
        half = machine.precision == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=half)
        self.ema: ModelEma | None = None
        if run.config.train.ema_decay is not None:
            self.ema = ModelEma(self.model, run.config.train.ema_decay)
        self.gradients = self._gradients()
        self.log_prior: Tensor | None = None
        if run.config.train.imbalance == "logits":
            counts = np.bincount(loader.folder.splits["train"].labels, minlength=data.classes)
            shares = torch.from_numpy(counts).clamp(min=1) / counts.sum()
            self.log_prior = shares.log().float().to(machine.device)
        self.facts: dict[str, Any] = {
            "identity": run.identity(of_images(loader.folder), network),
            "classes": list(loader.folder.classes),
            "environment": machine.environment(),
            "recipe": run.recipe,
        }
        self.progress = Progress()
        # Of each image of valid, float32 [N]: the probe's loss, which training must better.
        self.probe_losses: Tensor | None = None
        # Of each image of train, and after them of valid where the head is solved on these too:
        # float32 [N, classes], by a head that was solved without it. None where there is no such
        # head, or valid has enough to calibrate with.
        self.probe_logits: Tensor | None = None
        self.sums = TrainSums(self.progress.sums)
        self.metrics_file = _metrics_file(run)
        self.table = EpochTable(self.epochs)
        # Held by the main thread, but where it changes nothing of what is saved.
        self._changing = threading.Lock()
        self._changing.acquire()
        self.checkpoints = Checkpoints(
            run.checkpoints,
            run.config.checkpoint,
            self.state,
            run.note_times,
            run.world.is_main_process,
        )

    def _gradients(self) -> Gradients:
        config, world, data = self.config, self.world, self.data
        if config.train.exact_shards is not None:
            trained = trained_part(self.model)
            return Ordered(self.forward, world, data.share, data.global_batch_size, trained)
        if isinstance(world, Job):
            return Replicated(self.forward, world, data.share, data.global_batch_size, self.device)
        return Gradients(self.forward)

    # --- a head that is solved before the rest is trained: model.head=probe ---

    def solve_head(self) -> None:
        """Make the head logistic regression on the features of train, plain and mirrored.

        model.solve_on=both: of train and valid.
        """
        config, stop, cache = self.config, self.stop, self.feature_cache
        kinds = [PLAIN, MIRRORED] if config.data.augment.flip else [PLAIN]
        splits = ["train", "valid"] if self.head_saw_valid else ["train"]
        views = np.concatenate(
            [np.stack([cache.of(split, view, stop) for view in kinds], axis=1) for split in splits]
        )
        labels = np.concatenate([self.loader.folder.splits[split].labels for split in splits])
        with ProgressBar("solving the head", 1):
            solved = probe.fit(views, labels, self.loader.classes, config.seed, stop.check)
        head = self.network.head
        assert isinstance(head, nn.Linear)  # settings.config.check_model
        head.load_state_dict({"weight": solved.weight, "bias": solved.bias})
        if self.head_saw_valid or self.loader.folder.count("valid") < FEW_VALID:
            self.probe_logits = solved.logits
        if self.head_saw_valid:
            log.info(
                "the head is solved on the %d pictures of train and valid; figures of valid are by "
                "heads that were solved without the picture",
                len(labels),
            )
        if self.ema:
            self.ema.network.load_state_dict(self.model.state_dict())

    @cached_property
    def feature_cache(self) -> FeatureCache:
        """Return where the features of the network lie, as long as its backbone is what it was."""
        if isinstance(self.data, FeatureLoader) and self.data.cache is not None:
            return self.data.cache
        cache = Path(self.config.platform.cache)
        return FeatureCache(self.network, self.loader, self.machine, cache)

    @property
    def head_saw_valid(self) -> bool:
        """Return whether the solved head was fitted to the images of valid too.

        Not where some are in test: they tell how good the head is.
        """
        model, splits = self.config.model, self.loader.folder.splits
        if model.head != "probe" or model.solve_on != "both":
            return False
        if "test" not in splits:
            return True
        known = self.loader.folder.digests
        valid, test = ({known[path] for path in splits[name].paths} for name in ("valid", "test"))
        return not valid & test

    def unseen_logits(self, split: str) -> Tensor:
        """Return logits [N, classes] of train or valid, of each image by a head without it.

        Of valid where the head has seen it.
        """
        assert self.probe_logits is not None
        count = self.loader.folder.count("train")
        if split == "train":
            return self.probe_logits[:count]
        return self.probe_logits[count:]

    def is_probe(self) -> bool:
        """Return whether nothing has been trained yet on top of a solved head."""
        return self.config.model.head == "probe" and self.progress.best is None

    def packages_probe(self) -> bool:
        """Return whether no epoch was better than the solved head."""
        best = self.progress.best
        return self.config.model.head == "probe" and best is not None and best["epoch"] == 0

    def begin_from_probe(self, metrics: dict[str, float]) -> None:
        """Note the solved head as the best until now, of epoch 0. metrics: of valid."""
        row = {"epoch": 0, "step": 0, **metrics}
        self._note(row, metrics)
        self.keep_best(metrics)
        self.checkpoints.save()

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the metrics of valid: logits float32 [N, classes], labels int64 [N].

        Refinement is the loss at the temperature that is best for it (Berta et al., "Rethinking
        early stopping: refine, then calibrate", 2025): the loss itself rises where a network grows
        too sure of itself, though it tells more pictures, and a package is calibrated.

        Where the head was solved on valid, the metrics are of heads that weren't, with the loss of
        these logits beside: by it the weights are known again.

        After a solved head also by how much the loss is lower than the probe's, and the standard
        error of that: the losses of each image are compared, at the temperature that is best for
        each of the two (a package is calibrated).
        """
        loss_of_weights = mean_loss(logits, labels)
        if self.head_saw_valid:
            logits = self.unseen_logits("valid")
        losses = probe.calibrated_losses(logits, labels)
        metrics = classification(logits, labels, "valid")
        metrics |= self.own.figures(logits, labels, "valid")
        metrics["valid_refinement"] = noted(losses.mean().item())
        if self.head_saw_valid:
            return metrics | {"seen_loss": loss_of_weights}
        if self.config.model.head != "probe":
            return metrics
        if self.probe_losses is None:
            self.probe_losses = losses
            return metrics
        gains = self.probe_losses - losses
        error = probe.standard_error(gains.numpy())
        return metrics | {"gain": noted(gains.mean().item()), "gain_error": noted(error)}

    # --- an epoch, as loop.fit drives it ---

    @property
    def epochs(self) -> int:
        """Return how often the training images are passed."""
        assert self.config.train.epochs is not None  # network.weights.resolve
        return self.config.train.epochs

    @property
    def eval_model(self) -> nn.Module:
        """Return what is evaluated and packaged: the average where there is one."""
        return self.ema.network if self.ema else self.forward

    def out_of_patience(self) -> bool:
        """Return whether train.patience epochs have gone by without a better one."""
        best_epoch = self.progress.best["epoch"] if self.progress.best else 0
        patience = self.config.train.patience
        return patience is not None and self.progress.epoch - best_epoch >= patience

    def begin_epoch(self) -> None:
        """Begin an epoch, or go on in one, with its sums and its clock."""
        self._freeze_or_unfreeze()
        if self.config.train.on_nan == "rewind" and self.progress.batch == 0:
            self.checkpoints.save_beginning(self.progress.epoch)
        self.gradients.forward.train()
        sums = self.progress.sums if self.world.is_main_process else [0.0, 0.0, 0.0]
        self.sums = TrainSums(sums)
        self._began = time.monotonic() - self.progress.seconds

    def _freeze_or_unfreeze(self) -> None:
        """Train the head alone in the first model.unfreeze_epochs, and then all layers."""
        model = self.config.model
        if model.unfreeze_epochs is None or model.freeze == "backbone":
            return
        frozen = self.progress.epoch < model.unfreeze_epochs
        if frozen == self.network.frozen:
            return
        of_head = set(map(id, self.network.head.parameters()))
        for parameter in self.parameters():
            if id(parameter) not in of_head:
                parameter.requires_grad_(not frozen)
        self.network.frozen = frozen
        self.gradients = self._gradients()  # which gradients come together has changed

    def train_batches(self) -> Generator[Batch, None, None]:
        """Yield the rest of the epoch's batches, on the device."""
        epoch, first, steps = self.progress.epoch, self.progress.batch, self.data.steps_per_epoch
        bar = ProgressBar(f"epoch {epoch + 1}/{self.epochs}", steps, first, usage.told)
        with bar, closing(self.data.train_batches(epoch, first)) as batches:
            for _ in range(first, steps):
                image, target = self._next(batches)
                yield Batch(self._to_device(image), self._to_device(target))
                bar.advance()

    def _next(self, batches: Iterator[Batch]) -> Batch:
        asked = time.monotonic()
        try:
            with self.unchanged():
                batch = next(batches)
        except Unreadable:
            if self.world.size == 1:  # with several, the others are in the next step by now
                self.note_progress()
            raise
        self.progress.data_wait += time.monotonic() - asked
        return batch

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer changes."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def lr_factor(self) -> float:
        """Return the share of the peak learning rate for the next step."""
        return self._lr_factor(self.progress.step)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, that of the head."""
        peak: float = self.optimizer.param_groups[-1]["peak_lr"]
        return peak * self._lr_factor(step)

    def _lr_factor(self, step: int) -> float:
        factor = self._schedule.factor(step, self.data.steps_per_epoch, self.epochs)
        return factor * 0.5 ** len(self.progress.rewinds)

    @cached_property
    def _schedule(self) -> optim.Schedule:
        choice = self.config.optim
        assert choice.warmup_epochs is not None  # network.weights.resolve
        return optim.Schedule(
            choice.schedule, choice.warmup_epochs, choice.step_epochs, choice.step_factor
        )

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, summed over the images, of logits [N, classes].

        targets: classes, int64 [N], or probabilities [N, classes]. A loss of model.code does its
        own smoothing.
        """
        output = self.adjusted(output)
        if self.own.loss is not None:
            return self.own.loss(output, targets)
        smoothing = self.config.train.label_smoothing
        return functional.cross_entropy(output, targets, label_smoothing=smoothing, reduction="sum")

    def adjusted(self, output: Tensor) -> Tensor:
        """Return the logits [N, classes] that the loss is taken of.

        With train.imbalance=logits, each has the logarithm of its class's share of the images
        added (Menon et al. 2021, tau = 1): what is left for the network to learn is what it would
        say if all classes were equally frequent.
        """
        if self.log_prior is None:
            return output
        return output + self.log_prior

    def mix(self, image: Tensor, target: Tensor, shard: int) -> tuple[Tensor, Tensor]:
        """Mix the images of a shard with each other, where the settings say so."""
        augment = self.config.data.augment
        if not self.mixes:
            return image, target
        rng = generator(Purpose.MIX, self.config.seed, epoch=shard, sample=self.progress.step)
        mixing = Mixing(augment.mixup, augment.cutmix)
        return mix(image, target, self.data.classes, mixing, rng)

    @property
    def mixes(self) -> bool:
        """Return whether the images of a batch are mixed: then none has one correct class."""
        augment = self.config.data.augment
        return augment.mixup > 0 or augment.cutmix > 0

    def end_step(self) -> None:
        """Count the step; save, or stop in all processes, where it is time to.

        Raises Interrupted.
        """
        self.progress.batch += 1
        self.progress.step += 1
        if self.ema:
            self.ema.update(self.progress.step)
        action = self.world.all_reduce_max(self._wish())
        if action == Action.GO:
            return
        self.note_progress()
        if action == Action.STOP:
            self.world.interrupt(self.stop)
        self.checkpoints.save()

    def _wish(self) -> Action:
        if self.stop.asked():
            return Action.STOP
        # A loss that is no number is told by `note_progress`, in all processes.
        if self.sums.bad or self.checkpoints.due():
            return Action.SAVE
        return Action.GO

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Change nothing of what is saved in this context: `rescue` may come in between."""
        self._changing.release()
        try:
            yield
        finally:
            self._changing.acquire()

    def rescue(self) -> bool:
        """Save from another thread, where the main one hangs. Return whether that can be done.

        It can between two steps and in an evaluation, of one process. What is saved then must not
        change any more: the caller ends the process.
        """
        if self.world.size > 1 or not self._changing.acquire(blocking=False):
            return False
        self.note_progress()
        self.checkpoints.save()
        self.checkpoints.wait()
        return True

    def note_progress(self) -> None:
        """Bring the epoch's sums and seconds up to date, with those of all processes.

        Raises Diverged.
        """
        self._noted = time.monotonic()
        self.progress.seconds = self._noted - self._began
        self.progress.sums = self.world.all_reduce_sum(self.sums.fetch())
        self.check_loss()

    def check_loss(self) -> None:
        """Raise Diverged where the epoch's loss is no finite number.

        It is seen where it is fetched anyway: every TrainSums.FETCH_EVERY microbatches, at each
        save, and at the epoch's end.
        """
        total = self.progress.sums[0]
        if math.isfinite(total):
            return
        # Where each loss was finite their sum was too large.
        step, loss = self.world.first(self.sums.bad) or (self.progress.step - 1, total)
        self._diverged(f"the loss is {loss}", step, loss)

    def check_metrics(self, metrics: dict[str, float]) -> None:
        """Raise Diverged where the loss of valid is no finite number. metrics: of valid."""
        loss = metrics["valid_loss"]
        if not math.isfinite(loss):
            self._diverged(f"valid_loss is {loss}", self.progress.step - 1, loss)

    def _diverged(self, what: str, step: int, loss: float) -> NoReturn:
        """Raise Diverged. step: the first bad one, from 0."""
        progress = self.progress
        batch = progress.batch - (progress.step - step)
        samples = self.loader.epoch(progress.epoch)[batch]
        paths = self.loader.folder.splits["train"].paths
        names = listed((paths[sample % len(paths)] for sample in samples), 2)
        remedy = f"lower optim.lr (now {self.config.optim.lr}), or set train.clip_norm=1"
        if self.config.train.on_nan == "stop":
            remedy += " or train.on_nan=rewind"
        raise Diverged(
            f"{what} in epoch {progress.epoch + 1}, at step {step + 1}, with a learning rate of "
            f"{self.lr_at(step):.3g} and a batch of {names}: training diverged; {remedy}",
            step,
            loss,
        )

    def rewind(self, error: Diverged) -> None:
        """Go back to where the epoch began, and on with half the learning rate.

        Not to the newest checkpoint: where that lies depends on the clock, and a run that was
        interrupted would become another one. Raise `error` where that isn't wanted, or was done
        REWINDS times.
        """
        progress = self.progress
        if self.config.train.on_nan != "rewind" or len(progress.rewinds) == REWINDS:
            raise error
        state = self.world.broadcast_from_main(lambda: self.checkpoints.beginning(progress.epoch))
        if state is None:
            raise error
        note = {
            "epoch": progress.epoch + 1,
            "step": error.step + 1,
            "loss": str(error.loss),
            "lr": self.lr_at(error.step),
        }
        log.warning("%s", error)
        log.warning(
            "back to the beginning of epoch %d, with half the learning rate (%d of %d times)",
            progress.epoch + 1,
            len(progress.rewinds) + 1,
            REWINDS,
        )
        self.restore(state)
        self.progress.rewinds = [*progress.rewinds, note]
        self.metrics_file.restore(self.progress.rows)
        self.checkpoints.go_back(self.progress.step)

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Write the epoch's row, and begin the next one. metrics: of valid."""
        progress = self.progress
        loss, correct, count = progress.sums
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": self.optimizer.param_groups[-1]["lr"],
            "train_loss": loss / count,
        }
        if not self.mixes:
            row["train_top1"] = correct / count
        evaluated = time.monotonic() - self._noted
        row |= {"data_wait": progress.data_wait, **metrics}
        row |= {"evaluate_seconds": evaluated, "seconds": progress.seconds + evaluated}
        self._note(row, metrics)
        progress.epoch += 1
        progress.batch, progress.sums = 0, [0.0, 0.0, 0.0]
        progress.seconds, progress.data_wait = 0.0, 0.0

    def _note(self, row: dict[str, Any], metrics: dict[str, float]) -> None:
        self.metrics_file.append(row)
        if not self.run.trial:
            best = self.config.train.keep == "best" and self.is_best(metrics)
            told = self.table.row(self.metrics_file.rows, best, self._seconds_after())
            log.info(metric_line(row), extra={"for_people": told})

    def _seconds_after(self) -> float:
        """Return about how long the tests behind the last epoch will take."""
        folder, newest = self.loader.folder, self.metrics_file.rows[-1]
        if self.loader.views is not None:  # they see pixels again, as the features' making did
            seconds = self.run.stages.seconds().get("features", 0.0)
            pictures = self.loader.views * folder.count("train") + folder.count("valid")
        else:
            seconds, pictures = newest.get("evaluate_seconds", 0.0), folder.count("valid")
        tested = ["valid", "test"] if "test" in folder.splits else ["valid"]
        return seconds / pictures * sum(folder.count(split) for split in tested)

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Return whether an epoch's weights are to be kept: it is the best one, or the last."""
        best, probes = self.progress.best, self.config.model.head == "probe"
        margin = self.config.train.margin
        if best is None:
            return True
        if self.config.train.keep == "last":
            # But a network that was ruined: worse than the solved head beyond doubt, or NaN.
            return not probes or metrics["gain"] > -abs(margin) * metrics["gain_error"]
        if best["epoch"] > 0 or not probes:
            return better(metrics, best, self.config.train.monitor)
        # What is trained on top of a probe must be better beyond doubt.
        if not metrics["gain"] > margin * metrics["gain_error"]:  # nor where it is NaN
            return False
        return margin < 0 or metrics["valid_top1"] >= best["valid_top1"]

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Take the weights as they are for the best."""
        value = metrics[self.config.train.monitor]
        self.progress.best = {"epoch": self.progress.epoch, "value": value} | metrics
        model = self.ema.network if self.ema else self.model
        self.checkpoints.keep_best(self._weights(model), self.facts["environment"])

    def load_best_weights(self) -> dict[str, Any]:
        """Make the best weights those that are evaluated; return what is kept beside them."""
        best = self.world.broadcast_from_main(self.checkpoints.best)
        assert best is not None
        self.load_eval_weights(best["network"])
        return best

    def load_eval_weights(self, weights: dict[str, Tensor]) -> None:
        """Make `weights` those that are evaluated and packaged."""
        self.model.load_state_dict(weights)
        if self.ema:
            self.ema.network.load_state_dict(weights)

    @contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """Save whatever ends the training in this context.

        Its end, a wish to stop, or an image that can't be read.
        """
        try:
            yield
            self.checkpoints.save()
        except Interrupted:
            self.checkpoints.save()
            self.checkpoints.wait()
            self.world.farewell()  # torchrun ends all processes soon after the first has ended
            raise
        except Unreadable:
            if self.world.size == 1:  # what was trained until now is not lost by it
                self.checkpoints.save()
            raise
        finally:
            self.checkpoints.wait()

    # --- its state ---

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, with string keys only.

        Of tensors that only the optimizer's step changes, references to the live ones.
        """
        self.progress.rows = self.metrics_file.rows
        optimizer = self.optimizer.state_dict()
        return {
            "facts": self.facts,
            "progress": asdict(self.progress),
            "network": self._weights(self.model),
            "average": self.ema.network.state_dict() if self.ema else None,
            "optimizer": {
                "state": {str(key): value for key, value in optimizer["state"].items()},
                "groups": optimizer["param_groups"],
            },
            "scaler": self.scaler.state_dict(),
            "probe_losses": self.probe_losses,
            "probe_logits": self.probe_logits,
        }

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of the model; what its forward pass may change, as copies.

        It changes buffers, BatchNorm's statistics say; a network of the user's own changes whatever
        it likes.
        """
        changes_all = self.config.model.code is not None
        weights: dict[str, Tensor] = {}
        for name, live in model.state_dict(keep_vars=True).items():
            weights[name] = live.detach()
            if changes_all or not isinstance(live, nn.Parameter):
                weights[name] = weights[name].clone()
        return weights

    def restore(self, state: dict[str, Any]) -> None:
        """Bring back what `state` returned."""
        self.model.load_state_dict(state["network"])
        if self.ema:
            self.ema.network.load_state_dict(state["average"])
        _restore_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.probe_losses = state["probe_losses"]
        self.probe_logits = state["probe_logits"]
        self.progress = Progress(**state["progress"])

    def resume(self) -> None:
        """Go on from the newest good checkpoint, where there is one.

        Raises UserError where it is another run's.
        """
        run, world = self.run, self.world
        newest = world.broadcast_from_main(lambda: checkpoint.newest(run.checkpoints))
        if world.size > 1:
            _check_strays(run, newest[0] if newest else None)
        if newest:
            path, state = newest
            run.check_identity(
                state["facts"]["identity"], self.facts["identity"], self.loader.folder
            )
            for key, then in state["facts"]["environment"].items():
                now = self.facts["environment"][key]
                if then != now:
                    log.warning(
                        "resumed, but no longer bit for bit: %s was %s, is %s", key, then, now
                    )
            self.restore(state)
            self.checkpoints.go_on_from(path, state)
            progress = self.progress
            log.info(
                "resumed from %s: %d of %d epochs complete, %d steps done",
                path,
                progress.epoch,
                self.epochs,
                progress.step,
            )
        else:
            self._begin()
        self.metrics_file.restore(self.progress.rows)
        if world.is_main_process:
            run.note_pictures(self.loader.folder)

    def _begin(self) -> None:
        """Begin: with a parent's end, with a solved head, or with nothing trained."""
        run, world = self.run, self.world
        self.metrics_file.tracking.begin()
        if self.config.train.parent is not None:
            state = world.broadcast_from_main(
                lambda: lineage.state_of_parent(run, self.facts["identity"], self.epochs)
            )
            self.restore(state)
            self.checkpoints.begin_with(state)
        elif self.config.model.head == "probe":
            if world.is_main_process:
                with run.stages.of("training"):
                    self.solve_head()
            world.barrier(self.stop)
        if world.size > 1:
            # The same beginning, also where hosts of different kinds made their own.
            self.restore(world.broadcast_from_main(self.state))


# --- its parts ---


def prepare_machine(config: Config, world: World) -> Machine:
    """Set PyTorch up for these settings. Raises UserError for what this machine hasn't."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        device.make_deterministic()
    processes = world.size if config.train.exact_shards is None else "any"
    machine = device.prepare(
        config.train.device,
        config.train.precision,
        processes=processes,
        local_rank=world.local_rank,
        local_size=world.local_size,
        frozen=config.model.freeze in ("backbone", "auto"),
    )
    if config.train.compile:
        device.check_compiler(machine.device)
    return machine


def build_network(run: Run, images: ImageFolder, machine: Machine) -> Classifier:
    """Build the network on its device.

    Its weights depend on nothing but the seed and the settings.
    """
    config, world = run.config, run.world
    torch.manual_seed(config.seed)
    # What one process of a host downloads, the others find.
    downloads = config.model.weights is not None
    with world.local_main_process_first() if downloads else nullcontext():
        network = new_network(config, images.classes)
    share = _share(run, images)
    microbatch = _batch_size(config, images) // share.shards // config.train.accumulate
    build.check(network, config.model.name, preprocessing(config).size, max(microbatch, 1))
    network = network.to(machine.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    log.info(
        "model: %s, %s, %s parameters, %s trained, on %s in %s%s",
        config.model.name,
        weights.SCRATCH if config.model.weights is None else "pretrained",
        f"{parameters:,}",
        f"{sum(part.numel() for part in network.parameters() if part.requires_grad):,}",
        machine.device,
        machine,
        weights.origin(config),
    )
    weights.warn_of_scratch(config, parameters, len(images.splits["train"].paths))
    if network.averages_flip:
        log.info("train.tta=flip: each picture is evaluated and served twice, in twice the time")
    if world.size == 1 and machine.device.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus > 1:
            log.warning(
                "one of %d GPUs is used; torchrun --nproc_per_node=%d -m trainer "
                "(make train GPUS=%d) uses all",
                gpus,
                gpus,
                gpus,
            )
    if world.size > 1:
        mode = "fast" if config.train.exact_shards is None else f"exact, in {share.shards} shards"
        hosts = "host" if world.hosts == 1 else "hosts"
        log.info("processes: %d on %d %s; %s", world.size, world.hosts, hosts, mode)
    return network


def new_network(config: Config, classes: Sequence[str]) -> Classifier:
    """Build the network that the settings ask for, for classes of these names. Raise UserError."""
    model = config.model
    assert model.mean is not None and model.std is not None  # network.weights.resolve
    network = build.build(
        model.name,
        len(classes),
        code=model.code,
        weights=model.weights,
        weights_dir=model.weights_dir,
        keep_head=weights.keeps_head(config, classes),
        freeze=model.freeze,
        head_hidden=model.head_hidden,
        size=config.data.size,
        mean=model.mean,
        std=model.std,
        channels_last=config.train.channels_last,
    )
    network.keeps_norm_stats = model.norm_stats == "keep"
    network.averages_flip = config.train.tta == "flip"
    return network


def make_loader(
    run: Run, images: ImageFolder, reader: Reader | None, machine: Machine
) -> ImageLoader:
    """Make what gives the images as batches. reader: of packed pixels; None decodes."""
    config = run.config
    augment = config.data.augment
    assert augment.scale is not None  # settings.config.fill_recipe
    return ImageLoader(
        images,
        preprocessing(config),
        Augmentation(
            scale=(augment.scale[0], augment.scale[1]),
            ratio=(augment.ratio[0], augment.ratio[1]),
            flip=augment.flip is not False,
            trivial=augment.trivial,
            vertical_flip=augment.vertical_flip,
            rotation=augment.rotation,
            jitter=tuple(augment.jitter),
            randaugment=augment.randaugment,
            magnitude=augment.magnitude,
            erasing=augment.erasing,
        ),
        config.train.batch_size,
        config.seed,
        workers(config, run.world),
        pin=machine.device.type == "cuda",
        read=reader,
        views=config.model.cached_views if config.model.freeze == "backbone" else None,
        share=_share(run, images),
        balanced=config.train.imbalance == "sampler",
    )


def _batch_size(config: Config, images: ImageFolder) -> int:
    """Return the images of a training batch, over all processes."""
    return min(config.train.batch_size, len(images.splits["train"].paths))


def _share(run: Run, images: ImageFolder) -> Share:
    """Return what this process computes of each batch.

    Raises UserError where there are more processes than a batch can be divided among.
    """
    config, world = run.config.train, run.world
    shards = config.exact_shards or world.size
    if shards < world.size:
        raise UserError(
            f"train.exact_shards={shards}, but {world.size} processes run: each needs a shard "
            "at least; start fewer, or give more shards"
        )
    batch_size = _batch_size(run.config, images)
    if shards * config.accumulate > batch_size:
        raise UserError(
            f"a batch of {batch_size} pictures is divided among {world.size} processes, and "
            f"train.accumulate={config.accumulate} splits each part further: that is less than "
            "a picture each; give a larger train.batch_size, or start fewer processes"
        )
    return Share(world.rank, world.size, shards)


def _metrics_file(run: Run) -> MetricsFile:
    if not run.world.is_main_process:
        return MetricsFile(None, Tracking())
    trackers = Tracking() if run.trial else tracking.of_run(run)
    return MetricsFile(run.directory / "metrics.jsonl", trackers)


def _check_strays(run: Run, newest: Path | None) -> None:
    """Raise UserError where this host has a newer checkpoint than rank 0's.

    To go on would throw work away.
    """
    known = run.world.broadcast_from_main(
        lambda: [path.name for path in checkpoint.steps(run.checkpoints)]
    )
    strays = [path for path in checkpoint.steps(run.checkpoints) if path.name not in known]
    if strays and (newest is None or strays[-1].name > newest.name):
        raise UserError(
            f"{strays[-1]}: this host's checkpoint is newer than those of rank 0's host "
            f"({newest.name if newest else 'it has none'}); start this host as the first "
            "(torchrun --node_rank=0), or copy the checkpoint there, or delete it here"
        )


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    state = {int(key): value for key, value in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["groups"]})
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if value.shape == parameter.shape:
                # In the parameter's memory order (channels_last, say): the fused kernels pair the
                # two element by element as they lie in memory.
                entries[key] = torch.empty_like(parameter).copy_(value)
