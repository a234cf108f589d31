"""System programs, and the commands that need them."""

import shutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A program that pip doesn't install."""

    names: tuple[str, ...]  # any of them will do
    needed_by: str  # the commands
    how: str  # to get it


# Training, planning and serving need none of these.
PROGRAMS = (
    Program(
        ("gcc", "cc", "clang"),
        "make rehearse",
        "apt-get install gcc; on a Mac xcode-select --install",
    ),
    Program(
        ("session-manager-plugin",),
        "python -m launch connect",
        "docs.aws.amazon.com/systems-manager: install the Session Manager plugin",
    ),
    Program(
        ("aws",),
        "python -m launch connect",
        "docs.aws.amazon.com/cli: install AWS CLI version 2",
    ),
    Program(
        ("docker",),
        "building the endpoint's container",
        "docs.docker.com/get-docker",
    ),
    Program(
        ("chromium", "chromium-browser", "google-chrome"),
        "tests of the pages",
        "make pages installs it",
    ),
    Program(("java",), "tests with TorchServe", "make doors installs it"),
    Program(
        ("npm",),
        "tests of least privilege",
        "apt-get install nodejs npm, then .ci/setup dev",
    ),
)


def missing() -> dict[str, str]:
    """Return what this machine lacks: each program's name, who needs it and how to get it."""
    return {
        program.names[0]: f"missing: {program.needed_by} needs it ({program.how})"
        for program in PROGRAMS
        if not any(shutil.which(name) for name in program.names)
    }
