"""Stops this notebook instance when nothing has run in it for a while.

notebook_idle.py JUPYTER NOTE NAME MINUTES. JUPYTER: its address. NOTE: a file that keeps when
something ran last, so that a notebook just closed counts. Run every few minutes by
notebook_start.sh, with the system's Python 3.9 and nothing else. An open browser tab is no
activity.
"""

import json
import ssl
import subprocess
import sys
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any


def last_active(jupyter: str, note: Path) -> float:
    """Return when a cell or a terminal was active last, in seconds since the epoch.

    The first look at an idle notebook counts too.
    """
    kernels, terminals = ask(f"{jupyter}/api/kernels"), ask(f"{jupyter}/api/terminals")
    if any(kernel["execution_state"] == "busy" for kernel in kernels):
        return time.time()
    before = float(note.read_text()) if note.exists() else time.time()
    texts = [each["last_activity"].replace("Z", "+00:00") for each in kernels + terminals]
    return max([before, *(datetime.fromisoformat(text).timestamp() for text in texts)])


def ask(address: str) -> list[dict[str, Any]]:
    """Return Jupyter's answer. Raise OSError where it gives none; nothing is stopped then."""
    # Jupyter's certificate is its own, and the way to it doesn't leave this machine.
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(address, timeout=10, context=trusting) as response:
        answer: list[dict[str, Any]] = json.load(response)
    return answer


def main(jupyter: str, note: str, name: str, minutes: str) -> None:
    active = last_active(jupyter, Path(note))
    Path(note).write_text(str(active))
    idle = (time.time() - active) / 60
    print(f"idle for {idle:.0f} of {minutes} minutes")
    if idle >= float(minutes):
        stop = ["aws", "sagemaker", "stop-notebook-instance", "--notebook-instance-name", name]
        subprocess.run(stop, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
