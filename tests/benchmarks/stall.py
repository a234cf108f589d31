"""How long a checkpoint holds the loop."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from tests.benchmarks.loop import InMemory, compose_settings, make_batches, open_in_memory
from tests.benchmarks.measure import ratio, short
from tests.benchmarks.table import Row, Table
from tests.trainer.trainings import make_run
from trainer.images.sampler import Share
from trainer.network import build as model
from trainer.training import checkpoint
from trainer.training.loop import train_one_step

TITLE = "Checkpoint stall"
NOTE = """How long a checkpoint of ResNet-50 trained by SGD with momentum (its weights and as many
momenta) holds the training loop. `torch.save` writes in place, with no fsync. Ours copies the
weights while the next batch goes forward and backward, which change none, and holds the loop for
what isn't copied when the optimizer steps; then it hashes, writes, fsyncs and renames in the
background, verified again before it is believed: that time is in a column of its own, and the next
checkpoint begins after it. "First": the memory for it is new too. "Best": the weights are the best
so far, which a checkpoint holds once more. A batch is two pictures of 64 px: a real one takes
longer, and leaves more time to copy."""
PIXELS = 64
FIRST, EACH, BEST = "the first two", "each", "each with the best weights"
TARGETS = {FIRST: 10, EACH: 50, BEST: 10}  # times shorter


def measure(scratch: Path, rounds: int) -> Table:
    network = model.build("resnet50", 1000, channels_last=False)
    run = make_run(scratch / "run", compose_settings())
    data = InMemory(make_batches(PIXELS, 2, 1), Share(), classes=1000)
    training = open_in_memory(run, network, data)
    checkpoints, (batch,) = training.checkpoints, data.batches
    optimizer = training.optimizer

    def step() -> None:
        """Take one as the loop does."""
        train_one_step(training, *batch)
        training.progress.step += 1

    def torch_save() -> float:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        return seconds(lambda: torch.save(state, scratch / "checkpoint.pt"))

    def save(best: bool) -> tuple[float, float]:
        """Return for how many seconds the loop is held, at once and when the optimizer steps, and
        how many the rest takes.
        """
        held = 0.0
        if best:
            held += seconds(lambda: training.keep_best({"valid_refinement": 1.0}))
        held += seconds(checkpoints.save)
        settle, waits = checkpoints.settle, []
        checkpoints.settle = lambda: waits.append(seconds(settle))  # type: ignore[method-assign]
        step()
        checkpoints.settle = settle  # type: ignore[method-assign]
        return held + sum(waits), seconds(checkpoints.wait)

    training.begin_epoch()
    step()
    costs: dict[str, list[tuple[float, float, float]]] = {FIRST: [], EACH: [], BEST: []}
    for number in range(rounds + 1):
        for name in (EACH, BEST):
            kind = FIRST if number == 0 else name
            costs[kind].append((torch_save(), *save(name == BEST)))
    newest = checkpoint.steps(run.checkpoints)[-1]
    size = sum(path.stat().st_size for path in newest.iterdir()) / 1e6
    typical = median(theirs for theirs, _, _ in costs[EACH])
    rows = [Row("torch.save in place", ("1", short(1000 * typical), ""))]
    for name, measured in costs.items():
        theirs, ours, background = zip(*measured, strict=True)
        shorter = ratio(theirs, ours)
        rows.append(
            Row(
                f"ours, {name}",
                (str(shorter), short(1000 * median(ours)), short(1000 * median(background))),
                f"{TARGETS[name]}x",
                shorter.median >= TARGETS[name],
            )
        )
    return Table(
        TITLE,
        f"{NOTE} {size:.0f} MB, with the best weights.",
        ("stall shorter by", "stall, ms", "in the background, ms"),
        rows,
        ("safetensors",),
    )


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
