"""`packhorse VERB ...`: one command for what `python -m trainer`, `launch` and `serving` do.

It hands a verb's words to the module that does it, and nothing more: what that module prints, and
how it ends, is the same either way.
"""

import difflib
import runpy
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from launch.verbs import VERBS as LAUNCH
from trainer.common.errors import MISTAKE, OK, UserError

WIDTH = 100  # columns


@dataclass(frozen=True)
class Verb:
    """What a verb starts: a module, with `words` before those that were typed."""

    does: str  # in a line
    module: str
    words: tuple[str, ...] = ()


def _serving(verb: str, does: str) -> Verb:
    return Verb(does, "serving", (verb,))


# Grouped by purpose.
GROUPS = {
    "Train": {
        "train": Verb("train on a folder of pictures: packhorse train data.root=DIR", "trainer"),
        "sweep": Verb("train with several values: optim.lr=1e-3,1e-2", "trainer", ("-m",)),
        "doctor": Verb("what this machine can do, and how long a run takes", "trainer.doctor"),
        "care": Verb("look for duplicates, leaks and doubtful labels in a folder", "trainer.care"),
        "runs": Verb(LAUNCH["runs"], "launch", ("runs",)),
        "checkpoint": Verb("list and verify a run's checkpoints", "trainer.checkpoint"),
    },
    "Use a model": {
        "predict": _serving("predict", "say what pictures show, in lines or a table"),
        "evaluate": _serving("evaluate", "how good a model is on other labelled pictures"),
        "check": _serving("check", "verify a model package"),
        "sign": _serving("sign", "sign a model package, so that others can check who built it"),
        "serve": _serving("serve", "answer on HTTP, with a page to try the model"),
        "bench": _serving("bench", "measure a server, and say what to deploy for a load"),
    },
    "Rent a machine": {
        name: Verb(does, "launch", (name,)) for name, does in LAUNCH.items() if name != "runs"
    },
    "Deploy": {
        "deploy": _serving("deploy", "endpoint, autoscaling and Lambda function; asks first"),
        "invoke": _serving("invoke", "ask the deployed function"),
        "destroy": _serving("destroy", "remove what was deployed"),
        "endpoint": Verb("plan|deploy|status|invoke|logs|destroy", "serving"),
    },
}  # fmt: skip
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}


def usage() -> str:
    """Return the page of --help."""
    blocks = ["usage: packhorse VERB ..."]
    for title, verbs in GROUPS.items():
        lines = [
            textwrap.fill(f"  {name:<11} {verb.does}", WIDTH, subsequent_indent=" " * 14)
            for name, verb in verbs.items()
        ]
        blocks.append("\n".join([f"{title}:", *lines]))
    blocks.append("packhorse VERB --help says more; packhorse --version which versions these are.")
    return "\n\n".join(blocks)


def main() -> int:
    """Do what the command line says; return the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return OK if words else MISTAKE
    if words[0] == "--version":
        # imported here: the settings bring Hydra, which most verbs don't need.
        from trainer.settings.options import versions

        print(versions())
        return OK
    try:
        return start(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def start(words: Sequence[str]) -> int:
    """Run the module of a verb as Python does with -m; return its exit code. Raise UserError."""
    name, *rest = words
    if name not in VERBS:
        raise UserError(_no_verb(name, rest))
    verb = VERBS[name]
    sys.argv[1:] = [*verb.words, *rest]
    try:
        runpy.run_module(verb.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return int(end.code or OK)
    return OK


def _no_verb(name: str, rest: Sequence[str]) -> str:
    """Return the line for a word that is no verb, with what may have been meant."""
    if name.startswith("-") or "=" in name:
        return f"{name}: a verb comes first: packhorse train {' '.join([name, *rest])}"
    near = difflib.get_close_matches(name, VERBS, n=2)
    if near:
        return f"{name}: there is no such verb; did you mean {' or '.join(near)}?"
    return f"{name}: there is no such verb; packhorse --help shows them"


if __name__ == "__main__":
    sys.exit(main())
