"""`python -m launch connect`: a shell on a machine, or the address of the notebook.

The shell uses AWS's Session Manager, so no port is open. The AWS CLI and its Session Manager plugin
open it.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from launch.targets.attempt import Phase
from launch.targets.base import of
from launch.verbs.arguments import chosen, run_parser
from trainer.common.console import log
from trainer.common.errors import OK, UserError

PLUGIN = "session-manager-plugin"
INSTALL = (
    "https://docs.aws.amazon.com/systems-manager/latest/userguide/"
    "session-manager-working-with-install-plugin.html"
)


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("connect", __doc__, "the newest run")
    parser.add_argument(
        "--show", action="store_true", help="only print the command, or the address"
    )
    options = parser.parse_intermixed_args(arguments)
    aws, attempt = chosen(options.run)
    state = of(attempt).observe(aws, attempt)
    if state.phase is not Phase.RUNNING:
        raise UserError(f"{attempt.told(state)}; start it first: python -m launch submit")
    way = of(attempt).connection(aws, attempt, state)
    if isinstance(way, str):
        log.info(way)
        return OK
    if options.show:
        log.info(shlex.join(way))
        return OK
    for program in ("aws", PLUGIN):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not installed: {INSTALL}")
    return subprocess.run(way, check=False).returncode
