"""`python -m tests.lock` writes requirements.lock: what `make train` installs, with its hashes.

The versions are those of constraints.txt. PyTorch and what comes with it are left out: which build
is right depends on the machine, and one that is there (the Deep Learning AMI's) is never replaced.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]

LOCK = PROJECT / "requirements.lock"
HEAD = (
    "# Written by `make lock`: what `make train` installs, PyTorch excepted. Not edited by hand.\n"
)
PYTORCH = re.compile(r"(torch|torchvision|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
EXTRAS = ("aws", "serve")  # as .ci/setup train


def main() -> None:
    """Let uv resolve, and write what it found."""
    # uv resolves PyTorch too: for a version that is not this machine's own (2.14.1+cpu).
    with tempfile.TemporaryDirectory() as directory:
        resolved = Path(directory) / "resolved.txt"
        command = [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml"),
            *(word for extra in EXTRAS for word in ("--extra", extra)),
            *("--constraint", "constraints.txt", "--universal", "--python-version", "3.11"),
            *("--generate-hashes", "--no-header", "--no-annotate", "--output-file", str(resolved)),
        ]
        subprocess.run(command, cwd=PROJECT, check=True)
        LOCK.write_text(HEAD + without_pytorch(resolved.read_text()))
    print(f"{LOCK.name}: {len(pins(LOCK.read_text()))} packages")


def without_pytorch(resolved: str) -> str:
    """Return a file of requirements without PyTorch and what only it needs."""
    packages = re.split(r"^(?=\S)", resolved, flags=re.MULTILINE)
    return "".join(package for package in packages if not PYTORCH.match(package))


def pins(lock: str) -> dict[str, str]:
    """Return the version of each package that a file of requirements names."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+!-]+)", lock, re.MULTILINE))


if __name__ == "__main__":
    main()
