"""The first edition of the project against this one, in turns."""

from pathlib import Path

from tests.benchmarks import frozen, photos, sweep
from tests.benchmarks.compare import Cells, checked_out, measured
from tests.benchmarks.measure import PROJECT, cost, ratio, run_trainer, short
from tests.benchmarks.table import Row, Table

TITLE = "The first edition"
FIRST = "c6c1815"
WHOLE = "the whole command"
ROUNDS = 3  # at most: each takes a quarter of an hour
# The columns of the tables that are compared, and whether more is better.
COLUMNS = {
    "images/s": True,
    "CPU ms per image": False,
    "first batch, s": False,
    "CPU s": False,
    "seconds": False,
    "stall, ms": False,
    "ready, s": False,
    "MB": False,
    "CPU ms": False,
    "answers/s": True,
}
NOTE = f"""The first edition ({FIRST}) and this one in turns, each measured by its own benchmarks:
the rows of the tables above that both have. And whole commands, with nothing cached: the head of
ResNet-50 as in "Frozen backbone", the sweep of "Sweep", and three epochs of the demo. The defaults
are those of each edition: the first cached four random views, this one caches two. Rows of packed
pictures swing by a quarter from one run to the next, of both."""


def measure(scratch: Path, rounds: int) -> Table:
    pictures = frozen.photos_in(scratch / "photos")
    few = photos.write(scratch / "few", sweep.PHOTOS, *sweep.PIXELS)
    commands = {
        "frozen ResNet-50": [
            "data=folder", f"data.root={pictures}", "model=resnet50", "model.weights=null",
            "model.freeze=backbone", f"train.epochs={frozen.EPOCHS}", "train.batch_size=32",
        ],
        "16 heads on MobileNetV2": ["-m", "sweep=head", *sweep.head(few)],
        "the demo": ["train.epochs=3"],
    }  # fmt: skip
    found: list[list[Cells]] = [[], []]
    with checked_out(FIRST, own=True) as first:
        for number in range(min(rounds, ROUNDS)):
            turns = list(enumerate((first, PROJECT)))
            if number % 2:  # none is always the second, on a warmer processor
                turns.reverse()
            for which, project in turns:
                cells = measured(project, ["input", "loop", "start", "stall"])
                cells |= measured(project, ["serving"], threads=2)
                for name, words in commands.items():
                    place = scratch / f"{which}-{number}-{name.replace(' ', '-')}"
                    cells |= whole(project, place, name, words)
                found[which].append(cells)
    return Table(TITLE, NOTE, ("first edition", "this one", "better by"), rows_of(*found))


def whole(project: Path, place: Path, name: str, words: list[str]) -> Cells:
    """Run a command of a project from nothing; return its CPU and wall seconds."""

    def work() -> int:
        run_trainer(place, *words, project=project)
        return 1

    taken = cost(work)
    return {(WHOLE, name, "CPU s"): taken.cpu, (WHOLE, name, "seconds"): taken.wall}


def rows_of(first: list[Cells], this: list[Cells]) -> list[Row]:
    """Return what both have of ours, column by column."""
    rows = []
    for place in this[0]:
        title, name, column = place
        more = COLUMNS.get(column)
        ours = "ours" in name or title == WHOLE
        if more is None or not ours or any(place not in cells for cells in (*first, *this)):
            continue
        before = [cells[place] for cells in first]
        after = [cells[place] for cells in this]
        better = ratio(after, before) if more else ratio(before, after)
        middle = [short(sorted(values)[len(values) // 2]) for values in (before, after)]
        rows.append(Row(f"{title}: {name}, {column}", (*middle, str(better))))
    return rows
