"""How long a checkpoint holds the loop."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from tests.benchmarks.loop import InMemory, compose_settings, make_batches, open_in_memory
from tests.benchmarks.measure import cost, ratio, short
from tests.benchmarks.table import Row, Table
from tests.trainer.trainings import make_run
from trainer.images.sampler import Share
from trainer.network import build as model
from trainer.training import checkpoint

TITLE = "Checkpoint stall"
NOTE = """How long a checkpoint of ResNet-50 trained by SGD with momentum (its weights and as many
momenta) holds the training loop. `torch.save` writes in place, with no fsync. Ours copies into
memory that it keeps, then hashes, writes, fsyncs and renames in the background, verified again
before it is believed: that time is in a column of its own, and the next snapshot is taken after
it."""


def measure(scratch: Path, rounds: int) -> Table:
    network = model.build("resnet50", 1000, channels_last=False)
    run = make_run(scratch / "run", compose_settings())
    data = InMemory(make_batches(8, 1, 1), Share(), classes=1000)
    training = open_in_memory(run, network, data)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    training.optimizer.step()
    checkpoints = training.checkpoints

    def torch_save() -> None:
        state = {"network": network.state_dict(), "optimizer": training.optimizer.state_dict()}
        torch.save(state, scratch / "checkpoint.pt")

    def save() -> None:
        training.progress.step += 1
        checkpoints.save()

    def seconds(work: Callable[[], None]) -> float:
        return cost(lambda: work() or 1).wall

    theirs, ours, background = [], [], []
    for number in range(rounds + 1):
        one, two, three = seconds(torch_save), seconds(save), seconds(checkpoints.wait)
        if number > 0:  # the first one also asks the system for its memory
            theirs, ours, background = [*theirs, one], [*ours, two], [*background, three]
    shorter = ratio(theirs, ours)
    newest = checkpoint.steps(run.checkpoints)[-1]
    size = sum(path.stat().st_size for path in newest.iterdir()) / 1e6
    rows = [
        Row("torch.save in place", ("1", short(1000 * median(theirs)), "")),
        Row(
            "ours",
            (str(shorter), short(1000 * median(ours)), short(1000 * median(background))),
            "10x",
            shorter.median >= 10,
        ),
    ]
    return Table(
        TITLE,
        f"{NOTE} {size:.0f} MB.",
        ("stall shorter by", "stall, ms", "in the background, ms"),
        rows,
        ("safetensors",),
    )
