"""How this process was started: alone, or by torchrun as one of several.

Standard library only: the answer is needed before anything slow is imported.
"""

import os

# Variables that torchrun sets for each process.
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def one_of_several() -> bool:
    """Return whether this process is one of several of a run."""
    return {*GIVEN} <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"
