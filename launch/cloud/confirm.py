"""The question before a command changes or deletes something."""

import sys

from trainer.common.errors import UserError


def confirmed(question: str, yes: bool) -> bool:
    """Return whether the user agrees. yes: already given on the command line.

    Raise UserError where there is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(
            f"{question}: there is no terminal to ask on; check what is shown above, then add --yes"
        )
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:  # Ctrl-D
        print()
        return False
    return answer.strip().lower() in ("y", "yes")
