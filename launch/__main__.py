"""`python -m launch VERB target=NAME [target.KEY=VALUE] [the trainer's own settings]`."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from trainer.common import sessions

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import

from launch.verbs import VERBS
from trainer.common.command import guarded
from trainer.common.console import log, to_terminal
from trainer.common.errors import MISTAKE, OK, RESUME, needed_by

TARGETS = Path(__file__).parents[1] / "conf" / "target"


def usage() -> str:
    """Return the page of --help."""
    names = "|".join(sorted(path.stem for path in TARGETS.glob("*.yaml")))
    verbs = "\n".join(f"  {verb:<10} {does}" for verb, does in VERBS.items())
    return (
        f"usage: python -m launch VERB [target={names}] [target.KEY=VALUE ...] [KEY=VALUE ...]\n\n"
        f"Runs the trainer on rented machines.\n\n{verbs}\n\n"
        "Settings of the machine are explained in conf/target/, those of the trainer in conf/. "
        "python -m launch VERB --help says more."
    )


def main(arguments: Sequence[str]) -> int:
    to_terminal()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return OK if arguments else MISTAKE
    verb, *rest = arguments
    if verb not in VERBS:
        log.error("%s: there is no such verb; allowed: %s", verb, ", ".join(VERBS))
        return MISTAKE
    try:
        return guarded(lambda: run(verb, rest), log.log)
    except KeyboardInterrupt:
        log.warning("interrupted; what runs on AWS keeps running: python -m launch status shows it")
        return RESUME


def run(verb: str, arguments: Sequence[str]) -> int:
    """Do what the verb says; return the exit code."""
    with needed_by("python -m launch", "aws"):
        module = import_module(f"launch.verbs.{verb}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `main` says what keeps running
    code: int = module.main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
