"""The source tarball: the code that a job runs, the same bytes for the same files, and nothing that its container would stumble over."""

import gzip
import io
import re
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.common.errors import UserError
from trainer.settings.config import Config

PROJECT = Path(__file__).parents[2]
ENTRY_POINT = "launch/local/container_entry.py"

# What a job needs, what `.ci/setup` reads on an EC2 box, and what a notebook launches jobs with.
PATTERNS = (
    "trainer/**/*",
    "conf/**/*.yaml",
    "serving/*",
    "serving/adapters/*",
    "launch/**/*",
    ".ci/setup",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
)
NEEDED = (
    "trainer/__main__.py",
    "conf/config.yaml",
    "launch/cloud/hyperparameters.py",
    ENTRY_POINT,
    "requirements.txt",
)

# They come with the image, built for its GPU: pip must find them there, and never bring others. The first two are not even named to it.
LEFT_TO_THE_IMAGE = ("torch", "torchvision", "numpy", "pillow")
MAX_MB = 50  # every job downloads it; code and the pictures that ship take 2


def build(extras: Sequence[str] = (), project: Path = PROJECT) -> bytes:
    """The tarball (.tar.gz) of the project with the requirements of `extras`. Raises UserError for what the container would refuse."""
    contents = {path.relative_to(project).as_posix(): path for path in _files(project)}
    archive = io.BytesIO()
    # Neither time nor owner nor name goes into the bytes.
    with (
        gzip.GzipFile(fileobj=archive, mode="wb", filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, path in sorted(contents.items()):
            _add(tar, name, path.read_bytes(), executable=path.stat().st_mode & 0o100 != 0)
        _add(tar, "requirements.txt", requirements(extras, project).encode(), executable=False)
    data = archive.getvalue()
    check(data)
    return data


def extras(config: Config) -> list[str]:
    """The extras of pyproject.toml that a run of these settings needs."""
    needed = {
        "timm": config.model.name.startswith("timm/"),
        "tensorboard": config.train.tensorboard,
        "flowers102": config.data.source == "flowers102",
    }
    return [name for name, wanted in needed.items() if wanted]


def requirements(extras: Sequence[str], project: Path = PROJECT) -> str:
    """requirements.txt for the container: what pyproject.toml asks for, in the versions that the tests passed with, but for what its image brings."""
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    asked = about["dependencies"] + [
        line for extra in extras for line in about["optional-dependencies"][extra]
    ]
    pins = dict(
        re.findall(
            r"^([\w.-]+)==(\S+)$", (project / "constraints.txt").read_text().lower(), re.MULTILINE
        )
    )
    lines = []
    for line in asked:
        name = _name(line)
        if name not in LEFT_TO_THE_IMAGE[:2]:
            lines.append(
                f"{name}=={pins[name]}" if name in pins and name not in LEFT_TO_THE_IMAGE else line
            )
    return "".join(f"{line}\n" for line in lines)


def check(tarball: bytes) -> None:
    """Raises UserError for a tarball with which a job could not start."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as tar:
            members = tar.getmembers()
            listed = ""
            if "requirements.txt" in tar.getnames():
                file = tar.extractfile("requirements.txt")
                assert file is not None
                listed = file.read().decode()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"source tarball: not a .tar.gz ({error}); build it with launch/cloud/source.py"
        ) from error
    names = {member.name for member in members}
    if missing := [name for name in NEEDED if name not in names]:
        raise UserError(
            f"source tarball: {', '.join(missing)} is missing; bring it back into the project, or name it in launch/cloud/source.py"
        )
    if "setup.py" in names:
        raise UserError(
            "source tarball: with a setup.py SageMaker's toolkit starts a package instead of the trainer; leave setup.py out"
        )
    for member in members:
        if (
            not (member.isfile() or member.isdir())
            or member.name.startswith("/")
            or ".." in member.name.split("/")
        ):
            raise UserError(
                f"source tarball: {member.name} is a link, no file, or lies outside; put a copy of the file itself into the project"
            )
    if (size := sum(member.size for member in members) / 2**20) > MAX_MB:
        largest = max(members, key=lambda member: member.size)
        raise UserError(
            f"source tarball: {size:.0f} MB, of which {largest.name} has {largest.size / 2**20:.0f}; "
            f"allowed: {MAX_MB}; move data out of the project's code, and upload it with --data DIR"
        )
    check_requirements(listed)


def check_requirements(text: str) -> None:
    """Raises UserError for a line of requirements.txt that pip would not take, or that would replace the image's own PyTorch."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in filter(None, (line.split(" #")[0].strip() for line in text.splitlines())):
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise UserError(
                f"requirements.txt: {line}: no requirement that pip reads; write it as NAME==VERSION"
            ) from error
        if _name(requirement.name) in LEFT_TO_THE_IMAGE[:2] or requirement.name.startswith(
            "nvidia-"
        ):
            raise UserError(
                f"requirements.txt: {line} would replace what the image brings, built for its GPU; leave it out"
            )


def _files(project: Path) -> Iterator[Path]:
    for pattern in PATTERNS:
        for path in project.glob(pattern):
            if path.is_symlink():
                raise UserError(
                    f"{path}: a link, which a job's container leaves out; put a copy of the file itself there"
                )
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _add(tar: tarfile.TarFile, name: str, data: bytes, executable: bool) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o755 if executable else 0o644
    tar.addfile(member, io.BytesIO(data))


def _name(requirement: str) -> str:
    """The project's name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()
