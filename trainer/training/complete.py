"""What a complete run promises: result.json names its files by their content.

Whoever starts a complete run again has it held against what is there, without PyTorch. What is
missing or was changed is made again from the checkpoints.
"""

import hashlib
import tarfile
from pathlib import Path
from typing import IO, Any

from trainer.common import files
from trainer.common.console import ProgressBar
from trainer.common.errors import UserError
from trainer.common.model_package import DAMAGE
from trainer.training.run import PREDICTIONS, Run

# Of a run's directory, beside the package. Its log grows, and its config.yaml is written anew.
FILES = ("report.html", PREDICTIONS, "metrics.jsonl", "quarantine.txt", "care.csv")
PACKAGE = "package"  # the archive, or begins the names of what its directory holds
CHUNK = 1 << 22  # bytes

Promise = dict[str, dict[str, Any]]  # size and sha256 of each file


def promise(run: Run) -> Promise:
    """Return what the run has made. Raise Unreadable."""
    names = [name for name in FILES if (run.directory / name).is_file()]
    if run.package.is_dir():
        inside = sorted(path for path in run.package.rglob("*") if path.is_file())
        packed = [path.relative_to(run.package) for path in inside]
        names += [f"{PACKAGE}/{name.as_posix()}" for name in packed if name.name[0] != "."]
    elif run.package.is_file():
        names.append(PACKAGE)
    return {name: _described(_place(run, name)) for name in names}


def made(run: Run) -> list[Path]:
    """Return what a complete run keeps where a team looks: its package, report and tables."""
    paths = [run.package, *(run.directory / name for name in (*FILES, "config.yaml"))]
    return [path for path in paths if path.exists()]


def lacking(run: Run, promised: Promise) -> dict[str, str]:
    """Return what of a promise isn't kept: each file, and in words what is wrong with it.

    Raise Unreadable.
    """
    wrong = {}
    size = sum(written["size"] for written in promised.values())
    with ProgressBar("checking that nothing is missing (MB)", size >> 20) as bar:
        packed = _packed(run, promised)
        for name, written in promised.items():
            path = _place(run, name)
            reason = _difference(path, written)
            if packed.get(name) == written:
                reason = None
            if reason:
                wrong[str(path)] = reason
            bar.advance(written["size"] >> 20)
    return wrong


def _packed(run: Run, promised: Promise) -> Promise:
    """Return what an archive holds where a directory was promised: SageMaker packs that itself."""
    if PACKAGE in promised or not run.package.is_file():
        return {}

    def read() -> Promise:
        found = {}
        try:
            with tarfile.open(run.package, "r:gz") as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    if file is not None:
                        name = f"{PACKAGE}/{member.name.removeprefix('./')}"
                        found[name] = _of_stream(file)
        except DAMAGE:
            return {}
        return found

    return files.patiently(run.package, read)


def is_of_package(run: Run, path: str) -> bool:
    """Return whether a file of `lacking` is the model package, or a part of it."""
    return Path(path) == run.package or run.package in Path(path).parents


def check_can_be_made_again(run: Run, wrong: dict[str, str]) -> None:
    """Raise UserError where there is no checkpoint to make it of."""
    if any(run.checkpoints.glob("step-*")):
        return
    raise UserError(
        f"{in_words(wrong)}, and no checkpoint is left in {run.checkpoints} to rebuild it "
        f"from: restore one, or delete {run.directory / 'result.json'} to train again"
    )


def in_words(wrong: dict[str, str]) -> str:
    """Return what is wrong, in words."""
    first, *others = wrong
    more = ""
    if others:
        more = f", and {len(others)} more"
    return f"{first} {wrong[first]}{more}"


def _place(run: Run, name: str) -> Path:
    if name in FILES:
        return run.directory / name
    return run.package / name.removeprefix(PACKAGE).removeprefix("/")


def _difference(path: Path, written: dict[str, Any]) -> str | None:
    """Return what a file is, where it isn't as it was written."""
    size = files.patiently(path, lambda: _size(path))
    if size is None:
        return "is missing"
    if size != written["size"]:
        return f"has {size} bytes where {written['size']} were written"
    if _described(path) != written:
        return "was changed after it was written"
    return None


def _size(path: Path) -> int | None:
    """Return a file's size; None where there is no file of that name."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if path.is_file() else None


def _described(path: Path) -> dict[str, Any]:
    return files.patiently(path, lambda: _read(path))


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _of_stream(file)


def _of_stream(file: IO[bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    while block := file.read(CHUNK):
        digest.update(block)
        size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}
