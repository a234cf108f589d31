"""The question before something is changed or deleted."""

import sys

from trainer.common.errors import UserError


def confirmed(question: str, yes: bool) -> bool:
    """Return the user's word. yes: it is given on the command line already.

    Raise UserError where nobody can be asked.
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
