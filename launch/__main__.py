"""`python -m launch VERB target=NAME [target.KEY=VALUE] [the trainer's own settings]`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from trainer.common.command import guarded
from trainer.common.console import log, to_terminal
from trainer.common.errors import MISTAKE, OK, needed_by

# launch.verbs.VERB has the verb's main(arguments) -> exit code; it is imported when asked for.
VERBS = {
    "up": "make or change the account's foundation: bucket and roles; shows the changes and asks",
    "plan": "show what submit will send, what it costs, what it may touch and what is missing",
    "submit": "upload the code, and --data DIR where it isn't there, and start the job; "
    "--wait follows it to its end",
    "status": "list the runs, and everything that costs money now; "
    "--end ends what is past its limit",
    "logs": "show what a run prints; --follow until it ends",
    "connect": "open a shell on a machine (target=box is one for that), "
    "or show the address of the notebook",
    "stop": "stop a run after a checkpoint",
    "fetch": "bring a run's model package, report and metrics to this machine, verified",
    "cost": "dollars spent, dollars lost to work done twice, dollars per point of accuracy",
    "rehearse": "run a SageMaker job on this machine, with AWS's own toolkit",
    "prices": "the prices that plans are reckoned with; --refresh asks AWS",
    "instances": "the machines for this job, what an epoch costs on each, "
    "and why the default is the default",
    "policy": "print the policy of a part, with the reason for each statement",
    "audit": "look for what is dangerous or wasteful in the account's ML resources",
    "delete": "delete the notebook, with its disk; asks first",
    "down": "stop everything of this project, empty the bucket and delete all; lists it and asks",
}

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
        log.warning("interrupted; what runs at AWS goes on: python -m launch status")
        return MISTAKE


def run(verb: str, arguments: Sequence[str]) -> int:
    """Do what the verb says; return the exit code."""
    with needed_by("python -m launch", "aws"):
        module = import_module(f"launch.verbs.{verb}")
    code: int = module.main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
