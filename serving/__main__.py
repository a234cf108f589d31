"""`python -m serving`: a model package checked, served, measured and deployed."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.common import streams
from trainer.common.errors import MISTAKE, OK, UserError, install_command

if TYPE_CHECKING:
    from serving.package import Package

USAGE = """usage: python -m serving VERB ...

  check     verify a package: its files, its network, and that its golden pictures reproduce
  serve     answer on HTTP, with a page to try the model
  bench     measure a server, and say what to deploy for a load
  plan      what deploying would make and cost; changes nothing
  deploy    endpoint, autoscaling and Lambda function, as serving/stack.yaml says
  status    what is deployed     invoke   ask the deployed function
  logs      what it logged       destroy  remove all of it

python -m serving VERB --help says more."""

MODEL = Path("/opt/ml/model")  # where SageMaker puts the package
RUNS = Path("runs")


def check(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving check", description="Verify a model package."
    )
    parser.add_argument(
        "package", type=Path, help="a model.tar.gz, or the directory that it was unpacked into"
    )
    path = parser.parse_args(arguments[1:]).package
    package = _load(path)
    shown = ", ".join(package.classes[:5]) + (", ..." if len(package.classes) > 5 else "")
    preprocessing = package.preprocessing
    rows = {
        "classes": f"{len(package.classes)} ({shown})",
        "pictures": f"{preprocessing.size} x {preprocessing.size}, cut from a shorter side of {preprocessing.resize} ({preprocessing.interpolation})",
        "metrics": ", ".join(f"{name} {value:.4g}" for name, value in package.metrics.items()),
        "built": f"{package.created}, from revision {package.revision or 'unknown'}",
        "golden": f"{package.golden} pictures, pixels equal, logits off by at most {package.difference:.2g} (allowed: {package.allowed:.2g})",
    }
    print("\n".join(f"{name:10}{value}" for name, value in rows.items()))
    print("ok")
    return OK


def serve(arguments: Sequence[str]) -> int:
    import os

    from serving.handler import Settings, convert, settings_from

    defaults = settings_from(os.environ)
    parser = argparse.ArgumentParser(
        prog="python -m serving serve",
        description="Answer on HTTP: /invocations, /ping, /metrics, and a page at /.",
    )
    parser.add_argument(
        "package",
        type=Path,
        nargs="?",
        help=f"a model.tar.gz or a directory (default: {MODEL}, or the newest of {RUNS}/*/)",
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("SERVING_HOST", "127.0.0.1"),
        help="the address to listen on (default %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("SERVING_PORT", "8080")),
        help="(default %(default)s)",
    )
    backend = os.environ.get("SERVING_BACKEND", "onnx")
    parser.add_argument(
        "--backend",
        default=backend,
        choices=["onnx", "torch"],
        help="what runs the network; torch is for GPUs (default %(default)s)",
    )
    for setting in fields(Settings):
        default = getattr(defaults, setting.name)
        shown = (
            {True: "on", False: "off"}.get(default, default)
            if isinstance(default, bool)
            else default
        )
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            metavar="VALUE",
            help=f"{setting.metadata['help']} (default {shown})",
        )
    options = parser.parse_args(arguments[1:])
    given = {
        name: value for name in vars(defaults) if (value := getattr(options, name)) is not None
    }
    changes = {
        name: convert(f"--{name.replace('_', '-')}", text, type(getattr(defaults, name)))
        for name, text in given.items()
    }
    settings = replace(defaults, **changes)  # type: ignore[arg-type]

    from serving.batching import Engine, cores

    package = _load(options.package or _newest(), cores(), options.backend)
    engine = Engine(
        package,
        max_pixels=settings.max_pixels,
        workers=settings.workers or cores(),
        batch=settings.batch,
        delay=settings.batch_delay,
    )
    try:
        from serving.server import serve as run
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing: the server needs it; {install_command('serve')}"
        ) from error
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout
    )
    run(package, engine, settings, options.host, options.port)
    return OK


def _load(path: Path, threads: int | None = None, backend: str = "onnx") -> "Package":
    from serving.package import PackageError, load

    try:
        return load(path, threads, backend)
    except (PackageError, OSError) as error:
        raise UserError(f"{path}: {error}") from error


def _newest() -> Path:
    if (MODEL / "package.json").exists():
        return MODEL
    packages = sorted(RUNS.glob("*/model.tar.gz"), key=lambda path: path.stat().st_mtime)
    if not packages:
        raise UserError(
            f"{RUNS}/: there is no model package; train one (make train), or name one: python -m serving serve PACKAGE"
        )
    return packages[-1]


def bench(arguments: Sequence[str]) -> int:
    from serving import bench

    return bench.main(arguments[1:])


def deploy(arguments: Sequence[str]) -> int:
    from serving import deploy

    return deploy.main(arguments)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "check": check,
    "serve": serve,
    "bench": bench,
    **dict.fromkeys(("plan", "deploy", "status", "invoke", "logs", "destroy"), deploy),
}


def main(arguments: Sequence[str]) -> int:
    """arguments: the verb and what belongs to it."""
    streams.outlive(expendable=arguments[:1] == ["serve"])
    if not arguments or arguments[0] not in VERBS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return OK if asked else MISTAKE
    try:
        return VERBS[arguments[0]](arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
