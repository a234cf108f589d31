"""The wheelhouse: the wheels that a job in a closed network installs, from the project's bucket.

This machine makes it, from a package index that it can reach. Like pictures it is known by its
content: runs share it, and an upload that was cut short goes on. The job installs from it alone
(`pip install --no-index --require-hashes`), by a lock in the source tarball. It never has PyTorch,
which comes with the image.
"""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

from launch.cloud import s3, source
from trainer.common.console import ProgressBar, log
from trainer.common.errors import PROJECT, UserError
from trainer.common.files import remove, write

# The Python versions of AWS's images: SageMaker's has 3.12, an AMI may have either. Wheels for the
# second one cost a few MB.
PYTHONS = ("3.12", "3.13")
# Amazon Linux 2023 has glibc 2.34, which takes wheels for 2.34 and older.
GLIBCS = range(34, 16, -1)
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBCS), "manylinux2014_x86_64")
# Packages that are published as source only. They are pure Python: one wheel of ours fits all.
SOURCE_ONLY = ("antlr4-python3-runtime",)
LOCK = "requirements.lock"
KEPT = s3.DIGESTS.parent / "wheels"
DIGITS = 16  # hexadecimal, of the content's digest, in a wheelhouse's name
ZIP_EPOCH = 315532800  # 1980-01-01, where zip's time begins: the same wheel has the same bytes
PIP_MINUTES = 30  # where 150 MB take longer, the user should know that the connection is slow


def made(extras: Sequence[str], project: Path = PROJECT) -> tuple[str, str]:
    """Return the name of the wheelhouse for a run with these extras, and its lock.

    The lock is a requirements file with a hash for each wheel. A wheelhouse made before from the
    same recipe is used again. Raise UserError where pip can't make it, or where an index gives
    other bytes than requirements.lock names.
    """
    recipe = _recipe(extras, project)
    note = KEPT / f"{hashlib.sha256(recipe.encode()).hexdigest()}.txt"
    if note.is_file():
        name = note.read_text(encoding="utf-8")
        folder = kept(name)
        if folder is not None and name == _name(folder):
            return name, lock_of(folder)
    temporary = KEPT / f"making-{os.getpid()}"
    remove(temporary)
    try:
        _make(temporary, recipe, project)
        name = _name(temporary)
        folder = KEPT / name
        if folder.is_dir() and _name(folder) != name:  # changed on this machine since it was made
            remove(folder)
        if not folder.is_dir():
            temporary.replace(folder)
    finally:
        remove(temporary)
    megabytes = sum(wheel.stat().st_size for wheel in folder.iterdir()) / 1e6
    log.info("wheelhouse %s: %d wheels, %.0f MB", name, len(list(folder.iterdir())), megabytes)
    write(note, name)
    return name, lock_of(folder)


def kept(name: str) -> Path | None:
    """Return the folder of a wheelhouse by its name, None where this machine didn't make it."""
    folder = KEPT / name
    return folder if folder.is_dir() else None


def lock_of(folder: Path) -> str:
    """Return the requirements that install a whole wheelhouse, each with its hashes."""
    hashes: dict[tuple[str, str], list[str]] = {}
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        hashes.setdefault((str(name), str(version)), []).append(_sha256(wheel))
    return "".join(
        f"{name}=={version}{''.join(f' --hash=sha256:{each}' for each in sorted(digests))}\n"
        for (name, version), digests in sorted(hashes.items())
    )


def _recipe(extras: Sequence[str], project: Path) -> str:
    """Return everything that a wheelhouse's content depends on, as text."""
    lock = project / LOCK
    if not lock.is_file():
        raise UserError(
            f"{lock}: a wheelhouse is made by its hashes, and an installed package or a notebook "
            "doesn't have it; start this from a checkout of Packhorse"
        )
    constraints = source.beside("constraints.txt", project)
    parts = [
        source.requirements(extras, project) + source.build_requirements(project),
        constraints.read_text(),
        lock.read_text(),
        " ".join((*PYTHONS, *PLATFORMS, *SOURCE_ONLY)),
    ]
    return "\0".join(parts)


def _make(folder: Path, recipe: str, project: Path) -> None:
    """Fill a new folder with wheels. Raise UserError."""
    folder.mkdir(parents=True)
    asked, constraints, locked, _ = recipe.split("\0")
    known = _locked(locked)
    log.info(
        "making a wheelhouse for Python %s, without PyTorch: the first time it takes a minute",
        " and ".join(PYTHONS),
    )
    stand_ins = folder / "stand-ins"
    stand_ins.mkdir()
    for name in source.UNNAMED:
        _stand_in(stand_ins, name, constraints)
    (folder / "asked.txt").write_text(asked)
    (folder / "constraints.txt").write_text(constraints)
    _build(stand_ins, folder, known)
    chosen: list[str] = []
    for python in PYTHONS:
        # Both get the same versions: those for the first one constrain the second.
        (folder / "chosen.txt").write_text("".join(chosen))
        command = ["download", "--only-binary=:all:", "--implementation=cp"]
        command += [f"--python-version={python}", f"--dest={folder}", f"--find-links={stand_ins}"]
        command += [f"--platform={each}" for each in PLATFORMS]
        command += ["-c", str(folder / "constraints.txt"), "-c", str(folder / "chosen.txt")]
        with ProgressBar(f"fetching wheels for Python {python}", 1):
            _pip(*command, "-r", str(folder / "asked.txt"))
        for name in source.UNNAMED:
            for wheel in folder.glob(f"{name}-*.whl"):
                wheel.unlink()
        chosen = [line.split(" ")[0] + "\n" for line in lock_of(folder).splitlines()]
    _check(folder, known)
    remove(stand_ins)
    for name in ("asked.txt", "constraints.txt", "chosen.txt"):
        (folder / name).unlink()


def _stand_in(folder: Path, name: str, constraints: str) -> None:
    """Write an empty wheel for a package of the image.

    So pip downloads neither the package nor what only it needs. pip prefers a version with +image
    to the same version without.
    """
    [version] = re.findall(rf"^{name}==(\S+)$", constraints, re.MULTILINE)
    version = f"{version}+image"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def _build(folder: Path, beside: Path, known: dict[str, set[str]]) -> None:
    """Build wheels of the packages in SOURCE_ONLY; pip checks the hash of each source first."""
    lines = []
    for requirement, digests in known.items():
        if requirement.split("==")[0] in SOURCE_ONLY:
            lines.append(" ".join([requirement, *(f"--hash=sha256:{each}" for each in digests)]))
    asked = beside / "source.txt"
    asked.write_text("\n".join(lines))
    constraints = str(beside / "constraints.txt")
    with ProgressBar("building wheels", 1):
        _pip(
            *("wheel", "--no-deps", "--require-hashes", "-r", str(asked), "-w", str(folder)),
            *(f"--no-binary={name}" for name in SOURCE_ONLY),
            # The build tools have the tested versions too: for pip before 25.3, and from 25.3 on.
            PIP_CONSTRAINT=constraints,
            PIP_BUILD_CONSTRAINT=constraints,
            SOURCE_DATE_EPOCH=str(ZIP_EPOCH),
        )
    asked.unlink()


def _pip(*arguments: str, **environment: str) -> None:
    """Run pip, with the user's own settings (an index, a proxy). Raise UserError."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60 * PIP_MINUTES,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"wheelhouse: pip {arguments[0]} has not ended after {PIP_MINUTES} minutes; "
            "check the connection to the index, and start the same command again"
        ) from error
    if done.returncode == 0:
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    # The first one names the package, the last one how to ask for help.
    said = (errors or done.stderr.strip().splitlines()[-1:] or ["it said nothing"])[0]
    raise UserError(
        f"wheelhouse: pip {arguments[0]}: {said.removeprefix('ERROR: ')}; make it where an index "
        "of packages can be reached (pip's own settings say which), or give target.wheels=false"
    )


def _locked(lock: str) -> dict[str, set[str]]:
    """Return the SHA-256s (hex) of each NAME==VERSION of requirements.lock."""
    known: dict[str, set[str]] = {}
    for part in re.split(r"^(?=\w)", lock, flags=re.MULTILINE):
        named = re.match(r"([\w.-]+)==([\w.+!-]+)", part)
        if named:
            digests = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", part))
            known[f"{canonicalize_name(named[1])}=={named[2]}"] = digests
    return known


def _check(folder: Path, known: dict[str, set[str]]) -> None:
    """Raise UserError for a wheel whose hash requirements.lock doesn't have.

    That file doesn't list extras: their hashes are of what TLS delivered.
    """
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        digests = known.get(f"{name}=={version}")
        if name in SOURCE_ONLY or digests is None or _sha256(wheel) in digests:
            continue
        raise UserError(
            f"wheelhouse: {wheel.name}: the index gives other bytes than {LOCK} names; take them "
            "from PyPI itself (pip config list says which index you have)"
        )


def _name(folder: Path) -> str:
    """Return a wheelhouse's name in the bucket (data/NAME/), which follows from its content."""
    return f"wheels-{s3.digest(folder)[:DIGITS]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
