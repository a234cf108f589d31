"""`python -m tests.benchmarks [input loop frozen start stall ...]`: measure, and write the tables.

They are printed, and put into docs/benchmarks.md.
"""

import argparse
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

NAMES = (
    "input", "loop", "frozen", "start", "stall", "scaling", "growth", "sweep", "serving", "care",
    "calibrate", "recipe", "averages", "month", "where", "waits", "edition",
)  # fmt: skip


QUICK = ["input", "loop", "start", "stall"]  # some minutes, a round of each


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure against peers, all of them in one run.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        choices=[[], *NAMES],
        help=f"what to measure (default: all of {', '.join(NAMES)})",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each contender takes its turn (default 5)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument(
        "--photos",
        metavar="DIR",
        help="train, valid and test with class folders of photos (care, calibrate, recipe...)",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="of MobileNetV2, mean = std = 0.5 (calibrate, recipe)"
    )
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="where each run's result is kept, and not measured again (recipe, averages)",
    )
    parser.add_argument(
        "--minutes", metavar="N", help="begin nothing after so many minutes (recipe, averages)"
    )
    parser.add_argument(
        "--only",
        metavar="SETS",
        help="these sets of pictures, and draws, with + between them; the table has all (recipe)",
    )
    parser.add_argument(
        "--fastai", metavar="PYTHON", help="one that has fastai, torchvision and timm (recipe)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one round of {', '.join(QUICK)}; no page is written"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the tables go as data too")
    parser.add_argument("--no-page", action="store_true", help="docs/benchmarks.md stays as it is")
    options = parser.parse_args()
    names = options.names or NAMES
    if options.quick:
        names, options.rounds, options.no_page = options.names or QUICK, 1, True
    for name in ("photos", "weights", "results", "minutes", "only", "fastai"):
        value = getattr(options, name)
        if value:
            os.environ[f"BENCH_{name.upper()}"] = value

    os.environ["OMP_NUM_THREADS"] = str(
        options.threads
    )  # before torch is loaded, and for the processes started from here
    from tests.benchmarks import table

    modules = {name: importlib.import_module(f"tests.benchmarks.{name}") for name in NAMES}
    results: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="packhorse-bench-") as scratch:
            measured = modules[name].measure(Path(scratch), options.rounds)
        text = measured.markdown()
        print(text, flush=True)
        results[measured.title] = measured.as_json()
        if options.json:
            write(options.json, results)
        if options.no_page:
            continue
        write(table.RESULTS, read(table.RESULTS) | results)
        page = table.PAGE.read_text() if table.PAGE.exists() else ""
        table.PAGE.write_text(
            table.merge(page, {measured.title: text}, [module.TITLE for module in modules.values()])
        )


def read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return dict(json.loads(path.read_text()))


def write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
