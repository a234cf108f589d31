"""What a sweep of heads costs: 16 trials in one process, against one, a process each, none
cached.
"""

import os
from pathlib import Path
from statistics import median

from tests.benchmarks import photos
from tests.benchmarks.measure import Work, paired, ratio, run_trainer
from tests.benchmarks.table import Row, Table

TITLE = "Sweep"
TRIALS, EPOCHS = 16, 10
PHOTOS, PIXELS = 185, (256, 192)  # as many as pets37 has
# An image folder in the place of the benchmarks' own photos, and a state dict in the place of
# random weights.
DATA, WEIGHTS = (
    os.environ.get("PACKHORSE_BENCH_DATA"),
    os.environ.get("PACKHORSE_BENCH_WEIGHTS", "null"),
)
NOTE = f"""{TRIALS} trials (4 learning rates x 4 weight decays, {EPOCHS} epochs) of a head on a
frozen MobileNetV2 at 224 px: whole processes as a user starts them, each with empty caches. The
sweep trains them in one process, one after the other, and ends with the model package and report of
its best trial; it is held against one run of one trial with cached features, and against the same
sweep with a process for each trial (sweep.together=1). The naive way is {TRIALS} runs without
caches, taken as one such run times {TRIALS}."""
ONE, BATCHED = "one trial, cached", f"{TRIALS} trials, one process"
EACH, NAIVE = f"{TRIALS} trials, a process each", f"{TRIALS} trials, the naive way"


def measure(scratch: Path, rounds: int) -> Table:
    data = Path(DATA) if DATA else photos.write(scratch / "photos", PHOTOS, *PIXELS)
    contenders = {
        ONE: run(data, scratch, "one"),
        BATCHED: run(data, scratch, "batched", "-m", "sweep=head"),
        EACH: run(data, scratch, "each", "-m", "sweep=head", "sweep.together=1"),
        NAIVE: run(data, scratch, "naive", "model.cached_views=null", "data.cache=none"),
    }
    costs = paired(contenders, max(rounds // 2, 1), warm_up=False)
    walls = {name: [cost.wall for cost in values] for name, values in costs.items()}
    walls[NAIVE] = [TRIALS * wall for wall in walls[NAIVE]]
    shares = {name: ratio(values, walls[ONE]) for name, values in walls.items()}
    targets = {BATCHED: ("at most 1.5x", shares[BATCHED].median <= 1.5)}
    rows = [
        Row(name, (str(shares[name]), f"{median(values):.1f} s"), *targets.get(name, ()))
        for name, values in walls.items()
    ]
    return Table(TITLE, NOTE, ("cost, as a multiple", "time"), rows)


def head(data: Path) -> list[str]:
    """Return the words of a run that trains a head on a folder of pictures."""
    return [
        "data=folder", f"data.root={data}", "model=mobilenet_v2", f"model.weights={WEIGHTS}",
        "model.freeze=backbone", f"train.epochs={EPOCHS}", "train.batch_size=16",
    ]  # fmt: skip


def run(data: Path, scratch: Path, name: str, *overrides: str) -> Work:
    """A whole process, from an empty cache."""
    count = iter(range(1000))

    def work() -> int:
        run_trainer(scratch / f"{name}-{next(count)}", *overrides, *head(data))
        return 1

    return work
