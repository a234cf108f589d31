"""The trainer: a folder of pictures becomes a model package."""

import os

__version__ = "0.2.0"

# PyTorch's threads (OpenMP's) meet after each operation. By default they spin until all are there,
# and so take the processor from the one that is missing wherever another process or our own
# decoders want it too. Read when PyTorch is loaded. docs/decisions/2026-11-26-waiting-threads.md
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
