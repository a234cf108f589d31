"""`python -m tests.launch.stand_ins`: a process from which AWS is forked, to import moto once.

For each line `MODULE RECORD` that it is sent, a child of it is `python -m MODULE RECORD`.
"""

import os
import signal
import sys
from importlib import import_module

import tests.launch.aws  # noqa: F401 (the others build on it)

SERVICES = ("cloudformation", "ec2", "iam", "logs", "s3", "sagemaker", "ssm", "sts")


def main() -> None:
    for service in SERVICES:
        import_module(f"moto.{service}.urls")  # as the first request to each does
    for line in sys.stdin:
        module, record = line.rstrip("\n").split(" ", 1)
        if os.fork():
            continue
        try:
            sys.argv[1:] = [record]
            print(os.getpid(), flush=True)
            import_module(module).main()
        finally:
            print(flush=True)  # who waits for its address hears that there is none
            os._exit(1)
    os.killpg(0, signal.SIGKILL)  # who started it has ended: so do its children


if __name__ == "__main__":
    main()
