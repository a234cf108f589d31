"""How much of a machine is in use: for the log, where nobody watches the machine itself."""

import shutil
import subprocess
from pathlib import Path

from trainer.common import sessions

MEMINFO = Path("/proc/meminfo")  # Linux's, in KiB
ASK = ("--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
PATIENCE = 5  # seconds for the driver's answer


def told() -> str:
    """Return the use of GPUs and memory in words; "" where it is unknown.

    For each GPU: the share of the last second in which it computed, and its memory.
    """
    return "; ".join(filter(None, [*gpus(), memory()]))


def memory() -> str:
    """Return how much of the machine's memory is taken, of all processes together."""
    try:
        lines = MEMINFO.read_text().splitlines()
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, LookupError, ValueError):
        return ""
    return f"memory {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB"


def gpus() -> list[str]:
    """Return the use of each of NVIDIA's GPUs, [] where there is none or its driver doesn't say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = sessions.run([program, *ASK], timeout=PATIENCE)
        rows = [line.split(",") for line in answer.stdout.splitlines() if line.strip()]
        # The memory is in MiB.
        return [
            f"GPU {share.strip()}%, {int(used) * 2**20 / 1e9:.1f} of "
            f"{int(total) * 2**20 / 1e9:.1f} GB"
            for share, used, total in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
