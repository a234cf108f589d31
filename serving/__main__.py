"""`python -m serving`: check, serve, measure and deploy a model package."""

import sys
from collections.abc import Sequence
from importlib import import_module

from trainer.common import sessions, streams

if __name__ == "__main__":
    sessions.end_when_asked()  # before the imports below, which take seconds

from trainer.common.command import guarded, leave
from trainer.common.errors import MISTAKE, OK, needed_by

USAGE = """usage: python -m serving VERB ...

  check     verify a package: its files, its network, and that its golden pictures reproduce
  predict   say what pictures show: a line or a row of a table for each
  evaluate  how good a model is on other labelled pictures, with the report
  sign      sign a package, so that others can check who built it
  serve     answer on HTTP, with a page to try the model
  bench     measure a server, and say what to deploy for a load
  plan      what deploying would make and cost; changes nothing
  deploy    endpoint, autoscaling and Lambda function, as serving/stack.yaml says
  status    what is deployed     invoke   ask the deployed function
  logs      what it logged       destroy  remove all of it

python -m serving VERB --help says more."""

# Each verb with its module serving.NAME, which has main(arguments) -> exit code. It is imported
# when the verb is used.
VERBS = {
    "check": "check",
    "predict": "predict",
    "evaluate": "evaluate",
    "sign": "sign",
    "serve": "serve",
    "bench": "bench",
    **dict.fromkeys(("plan", "deploy", "status", "invoke", "logs", "destroy"), "deploy"),
}
# The extra of pyproject.toml that a module needs, where it isn't `serve`.
EXTRAS = {"deploy": "aws"}


def main(arguments: Sequence[str]) -> int:
    """Run a verb, and return its exit code. arguments: the verb and its own arguments.

    A mistake of the user becomes one line; a bug of ours is raised.
    """
    streams.outlive(expendable=arguments[:1] == ["serve"])
    if not arguments or arguments[0] not in VERBS:
        if arguments and arguments[0] in ("-h", "--help"):
            print(USAGE)
            return OK
        print(USAGE, file=sys.stderr)
        return MISTAKE
    return guarded(lambda: run(arguments), to_stderr)


def run(arguments: Sequence[str]) -> int:
    """Import and run the verb's module; return the exit code. arguments: as in `main`."""
    name = VERBS[arguments[0]]
    with needed_by(arguments[0], EXTRAS.get(name, "serve")):
        module = import_module(f"serving.{name}")
    sessions.end_when_asked(clear=True)  # a package is unpacked in a temporary directory
    code: int = module.main(arguments)
    return code


def to_stderr(level: int, line: str) -> None:
    """Print why a command ended. level: logging's. Standard output is for the verb's results."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    leave(main(sys.argv[1:]), globals())
