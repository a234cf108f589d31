"""`python -m trainer.checkpoint ls|verify|prune RUN`: list, check or delete a run's checkpoints."""

import argparse
import json
import sys
from collections.abc import Iterable

from trainer.common import sessions

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import

from trainer.common import streams
from trainer.common.arguments import typed_path, whole
from trainer.common.errors import MISTAKE, OK
from trainer.training import checkpoint


def _main(arguments: Iterable[str]) -> int:
    sessions.end_when_asked(clear=True)
    streams.outlive()
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint", description="Look at the checkpoints of a run."
    )
    parser.add_argument(
        "verb",
        choices=("ls", "verify", "prune"),
        help="ls: list them; verify: read every byte; prune: delete all but the newest",
    )
    parser.add_argument(
        "run", type=typed_path, help="a run's directory, or its checkpoint directory"
    )
    parser.add_argument("--keep", type=whole(), default=2, help="prune: how many to keep (2)")
    options = parser.parse_args(list(arguments))
    root = options.run / "checkpoints" if (options.run / "checkpoints").is_dir() else options.run
    if not any(root.glob("step-*")):
        print(f"{root}: no checkpoints here; give a run's directory", file=sys.stderr)
        return MISTAKE
    if options.verb == "prune":
        for path in checkpoint.prune(root, options.keep, set()):
            print(f"deleted {path}")
    damaged = False
    for path in checkpoint.steps(root):
        line = path.name
        try:
            progress = json.loads((path / "state.json").read_bytes())["progress"]
            size = sum(file.stat().st_size for file in path.iterdir())
            line += f"  {size / 1e6:8.1f} MB  epoch {progress['epoch']}"
            if best := progress.get("best"):
                line += f", best so far {best['value']:.4f} of epoch {best['epoch']}"
            if options.verb == "verify":
                checkpoint.verify(path)
                line += "  ok"
        except (checkpoint.Damaged, OSError, ValueError, KeyError, TypeError) as error:
            damaged = True
            line += f"  DAMAGED: {error}"
        print(line)
    return MISTAKE if damaged else OK


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
