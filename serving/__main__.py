"""`python -m serving`: the commands around a model package."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.package import Package, PackageError, load


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving", description="Serve a model package.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="verify a package: its files, its network, and that its golden pictures reproduce")
    check.add_argument("package", type=Path, help="a model.tar.gz, or the directory that it was unpacked into")
    path = parser.parse_args(arguments).package
    try:
        package = load(path)
    except (PackageError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    print(_summary(package))
    print("ok")
    return 0


def _summary(package: Package) -> str:
    shown = ", ".join(package.classes[:5]) + (", ..." if len(package.classes) > 5 else "")
    preprocessing = package.preprocessing
    rows = {
        "classes": f"{len(package.classes)} ({shown})",
        "pictures": f"{preprocessing.size} x {preprocessing.size}, cut from a shorter side of {preprocessing.resize} ({preprocessing.interpolation})",
        "metrics": ", ".join(f"{name} {value:.4g}" for name, value in package.metrics.items()),
        "built": f"{package.created}, from revision {package.revision or 'unknown'}",
        "golden": f"{package.golden} pictures, pixels equal, logits off by at most {package.difference:.2g} (allowed: {package.allowed:.2g})",
    }
    return "\n".join(f"{name:10}{value}" for name, value in rows.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
