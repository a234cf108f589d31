"""`python -m serving serve [PACKAGE]`: start a server, with settings from flags and variables."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from serving.backends import BACKENDS
from serving.decoders import Rooms
from serving.engine import Engine
from serving.handler import Settings, convert, settings_from
from serving.locate import MODEL, NEWEST, RUNS, package_of
from serving.names import is_loopback
from serving.package import load_for_command
from serving.signature import SIGNED_BY
from trainer.common.arguments import whole
from trainer.common.cpu import cores
from trainer.common.errors import OK, UserError, needed_by


def main(arguments: Sequence[str]) -> int:
    """Answer on HTTP until told to end. arguments: the verb and its own. Raises UserError."""
    defaults = settings_from(os.environ)
    options = _parser(defaults).parse_args(arguments[1:])
    settings = _chosen(options, defaults)
    if options.backend not in BACKENDS:  # from the variable: argparse checks only flags
        raise UserError(
            f"SERVING_BACKEND={options.backend} is not allowed; allowed: {', '.join(BACKENDS)}"
        )
    with needed_by("serve", "serve"):
        # imported here: it needs the libraries of the extra `serve`
        from serving import process, server
    process.share_memory_and_threads()
    address = server.bind(options.host, options.port)
    path = package_of(options.package)
    package = load_for_command(path, cores(), options.backend, options.signed_by)
    engine = Engine(
        package,
        Rooms(settings.max_pixels, settings.max_decoded, large=False),
        workers=settings.workers or cores(),
        batch=settings.batch,
        delay=settings.batch_delay,
    )
    process.log_to_stdout()
    server.serve(package, engine, settings, options.host, address)
    return OK


def _chosen(options: argparse.Namespace, defaults: Settings) -> Settings:
    """Return the settings from the flags, else from the variables. Raise UserError."""
    changes: dict[str, Any] = {}
    for setting in fields(Settings):
        text = getattr(options, setting.name)
        if text is not None:
            changes[setting.name] = convert(_flag(setting.name), text, setting)
    if "SERVING_EXAMPLES" not in os.environ:
        changes.setdefault("examples", is_loopback(options.host))
    return replace(defaults, **changes)


def _parser(defaults: Settings) -> argparse.ArgumentParser:
    """Return the parser of the verb's flags. defaults: from the variables SERVING_..."""
    parser = argparse.ArgumentParser(
        prog="python -m serving serve",
        description="Answer on HTTP: /invocations, /ping, /metrics, and a page at /.",
    )
    parser.add_argument(
        "package",
        nargs="?",
        default=NEWEST,
        help=f"a model.tar.gz, a run's directory, or {NEWEST}: {MODEL}, or of the newest of "
        f"{RUNS}/*/ (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default=os.environ.get("SERVING_HOST", "127.0.0.1"),
        help="the address to listen on (default %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65535),  # 0: a free one
        default=os.environ.get("SERVING_PORT", "8080"),
        help="(default %(default)s)",
    )
    parser.add_argument(
        "--backend",
        default=os.environ.get("SERVING_BACKEND", "onnx"),
        choices=[*BACKENDS],
        help="what runs the network; cuda and torch are for GPUs (default %(default)s)",
    )
    parser.add_argument(
        "--signed-by",
        metavar="KEY",
        default=os.environ.get(SIGNED_BY, ""),
        help="serve a package that this public key has signed, and no other: its PEM file, or the "
        f"text that sign has printed (variable {SIGNED_BY})",
    )
    for setting in fields(Settings):
        shown = getattr(defaults, setting.name)
        if isinstance(shown, bool):
            shown = {True: "on", False: "off"}[shown]
        parser.add_argument(
            _flag(setting.name),
            metavar="VALUE",
            help=f"{setting.metadata['help']} (default {shown})",
        )
    return parser


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
