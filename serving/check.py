"""`python -m serving check PACKAGE`: verify a model package, and say what it holds."""

import argparse
from collections.abc import Sequence

from serving.package import load_for_command
from trainer.common.arguments import typed_path
from trainer.common.errors import OK

SHOWN = 5  # classes that are named


def main(arguments: Sequence[str]) -> int:
    """Print what a package holds, once it has proven itself. arguments: the verb and its own.

    Raises UserError for one that does not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving check", description="Verify a model package."
    )
    parser.add_argument(
        "package",
        type=typed_path,
        help="a model.tar.gz, or the directory that it was unpacked into",
    )
    package = load_for_command(parser.parse_args(arguments[1:]).package)
    classes = ", ".join(package.classes[:SHOWN])
    if len(package.classes) > SHOWN:
        classes += ", ..."
    preprocessing = package.preprocessing
    size, resize = preprocessing.size, preprocessing.resize
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in package.metrics.items())
    print(
        f"classes   {len(package.classes)} ({classes})\n"
        f"pictures  {size} x {size}, cut from a shorter side of {resize} "
        f"({preprocessing.interpolation})\n"
        f"metrics   {metrics}\n"
        f"built     {package.created}, from revision {package.revision or 'unknown'}\n"
        f"golden    {package.golden} pictures, pixels equal, logits off by at most "
        f"{package.difference:.2g} (allowed: {package.allowed:.2g})\n"
        "ok"
    )
    return OK
