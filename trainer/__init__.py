"""The trainer: a folder of pictures becomes a model package."""

import os

__version__ = "0.2.0"

# PyTorch's threads (OpenMP's) meet after each operation. Those that are early look 300,000 times
# whether all are there, milliseconds, and so take the processor from the one that is missing
# wherever another program or our own decoders want it too. 1,000 looks are what GNU's OpenMP takes
# itself where it has more threads than processors. Read when PyTorch is loaded.
# docs/decisions/2026-11-27-waiting-threads.md
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
