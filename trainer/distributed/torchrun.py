"""torchrun with the run's own exit code: `python -m trainer.distributed.torchrun ...`.

Its options are torchrun's: --standalone --nproc_per_node=4 -m trainer data.root=DIR, for example.
torchrun itself ends with 1 and a traceback, whatever its processes said and their exit codes were.
"""

import logging
import signal
import sys

from trainer.common import sessions

if __name__ == "__main__":
    sessions.end_when_asked()  # before the imports below, which take seconds

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from trainer.common.console import log, to_terminal
from trainer.common.errors import MISTAKE, OK, RESUME


def main(arguments: list[str]) -> int:
    """Run torchrun; return the exit code of the process that ended the job."""
    to_terminal(expendable=True)
    # A process says itself why it ends; torchrun's log would repeat it several times.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main([*_signals(), *arguments])
        return OK
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(rank, failure.exitcode)
    except SignalException:  # the processes have saved, and said so
        return RESUME
    except (RendezvousError, DistError) as error:
        reason = str(error).splitlines()[0]
        log.error("the processes can't reach each other: %s", reason)
        return MISTAKE


def _signals() -> list[str]:
    """Return the option that makes torchrun ignore SIGHUP too, where nohup made us ignore it."""
    option = "--signals-to-handle"
    if signal.SIGHUP in sessions.heeded() or option not in run.get_args_parser().format_help():
        return []
    return [option, "SIGTERM,SIGINT,SIGQUIT"]


def _code(rank: int, code: int) -> int:
    if code >= 0:
        return code
    log.error(
        "rank %d was killed by %s; start the same command again to continue from the newest "
        "checkpoint",
        rank,
        signal.Signals(-code).name,
    )
    return RESUME


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sessions.end_as_decided()
    sys.exit(code)
