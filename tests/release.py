"""`python -m tests.release` makes what a release consists of, in dist/ (`make release`).

Wheel and source archive are built twice, in two folders, and must come out as the same bytes; with
them go a bill of materials (CycloneDX) and SHA-256 sums. `--tag` sets the tag too. Nothing is
uploaded.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def main() -> int:
    """Check, build, compare, describe; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", action="store_true", help="set the tag, too")
    options = parser.parse_args()
    version = version_of(PROJECT)
    wrong = what_is_missing(version)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    dist = PROJECT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        first = build(Path(directory) / "a")
        second = build(Path(directory) / "another")
        differ = [name for name in first if first[name] != second.get(name)]
        if differ or len(first) != len(second):
            print(f"not the same bytes twice: {', '.join(differ)}", file=sys.stderr)
            return 1
    dist.mkdir()
    for name, data in first.items():
        (dist / name).write_bytes(data)
    describe(dist / f"packhorse-{version}.cdx.json")
    sums = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in dist.iterdir()}
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    (dist / "SHA256SUMS").write_text(text)
    print(f"twice the same bytes, in {dist}:\n{text}", end="")
    if options.tag:
        git("tag", "--annotate", f"v{version}", "--message", f"Packhorse {version}")
        print(f"tagged v{version}; git push origin v{version} publishes the tag")
    return 0


def version_of(project: Path) -> str:
    """Return the version, which stands in trainer/__init__.py alone."""
    text = (project / "trainer/__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found
    return found[1]


def what_is_missing(version: str) -> list[str]:
    """Return a line for each thing that a release of this version lacks."""
    wrong = []
    if git("status", "--porcelain"):
        wrong.append("there are changes that are not committed: commit or remove them")
    if not re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$",
        (PROJECT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    ):
        wrong.append(f"CHANGELOG.md has no section [{version}] with a date")
    if git("tag", "--list", f"v{version}") and git("rev-parse", f"v{version}^{{commit}}") != git(
        "rev-parse", "HEAD"
    ):
        wrong.append(f"v{version} is tagged on another commit: raise trainer.__version__")
    return wrong


def build(place: Path) -> dict[str, bytes]:
    """Build what is committed in this folder; return the bytes of wheel and source archive."""
    place.mkdir()
    source = place / "source"
    source.mkdir()
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=PROJECT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    epoch = git("show", "--no-patch", "--format=%ct", "HEAD")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", source],
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    built = {each.name: each.read_bytes() for each in sorted((place / "dist").iterdir())}
    return {
        name: same_time(data, int(epoch)) if name.endswith(".tar.gz") else same_modes(data)
        for name, data in built.items()
    }


def same_time(archive: bytes, epoch: int) -> bytes:
    """Return a source archive with its files in order, of one time and of nobody.

    setuptools heeds SOURCE_DATE_EPOCH in wheels, but not in source archives.
    """
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as source,
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=epoch, filename="") as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as result,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid = epoch, 0, 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            member.pax_headers = {}
            result.addfile(member, source.extractfile(member) if member.isfile() else None)
    return packed.getvalue()


def same_modes(wheel: bytes) -> bytes:
    """Return a wheel whose files have the same modes, whatever umask it was built with."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(wheel)) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as result,
    ):
        for member in source.infolist():
            executable = member.external_attr >> 16 & stat.S_IXUSR
            mode = stat.S_IFREG | (0o755 if executable else 0o644)
            data = source.read(member)
            member.external_attr = mode << 16
            result.writestr(member, data)
    return packed.getvalue()


def describe(bill: Path) -> None:
    """Write the bill of materials: what `make train` installs beside PyTorch, with hashes."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible"]
    files = ["--pyproject", "pyproject.toml", "--output-file", str(bill), "requirements.lock"]
    subprocess.run([*command, *files], cwd=PROJECT, check=True)


def git(*words: str) -> str:
    """Return what git says."""
    done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
