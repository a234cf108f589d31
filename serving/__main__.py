"""`python -m serving`: a model package checked, served, measured and deployed."""

import sys
from collections.abc import Sequence
from importlib import import_module

from trainer.common import sessions, streams

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import

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

# The module serving.NAME has the verb's main(arguments) -> exit code. Each is imported when it is
# asked for.
VERBS = {
    "check": "check",
    "predict": "predict",
    "evaluate": "evaluate",
    "sign": "sign",
    "serve": "serve",
    "bench": "bench",
    **dict.fromkeys(("plan", "deploy", "status", "invoke", "logs", "destroy"), "deploy"),
}
# Which extra of pyproject.toml a module needs, where that isn't `serve`.
EXTRAS = {"deploy": "aws"}


def main(arguments: Sequence[str]) -> int:
    """Run a verb, and return its exit code. arguments: the verb and what belongs to it.

    What the user can mend becomes one line; a fault of ours is raised.
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
    """Do what the verb says; return the exit code. arguments: the verb and what belongs to it."""
    name = VERBS[arguments[0]]
    with needed_by(arguments[0], EXTRAS.get(name, "serve")):
        module = import_module(f"serving.{name}")
    sessions.end_when_asked(clear=True)  # a package is unpacked in a temporary directory
    code: int = module.main(arguments)
    return code


def to_stderr(level: int, line: str) -> None:
    """Print what ended a command. level: logging's; standard output is a verb's own."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    leave(main(sys.argv[1:]), globals())
