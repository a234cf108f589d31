"""The source tarball: the code that a job runs.

The same files give the same bytes, from a checkout or an installed package. It holds nothing that
a container would refuse.
"""

import gzip
import io
import re
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from trainer.common.errors import PROJECT, UserError
from trainer.images.names import HEIC, suffix_of
from trainer.settings.config import AUTO, Config

ENTRY_POINT = "launch/local/container_entry.py"

# The code that a job needs, and that a notebook needs to launch jobs.
CODE = ("trainer/**/*", "conf/**/*.yaml", "serving/*", "serving/adapters/*", "launch/**/*")
# Files beside the code in a checkout, which `.ci/setup` reads on an EC2 machine. An installed
# package has them as data files (pyproject.toml, [tool.setuptools.data-files]).
BESIDE = (".ci/setup", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
EXECUTABLE = (".ci/setup",)
NEEDED = (
    "trainer/__main__.py",
    "conf/config.yaml",
    "launch/cloud/hyperparameters.py",
    ENTRY_POINT,
    "requirements.txt",
)

# The image has these, built for its GPU: pip must use them, and never install others.
LEFT_TO_THE_IMAGE = ("torch", "torchvision", "numpy", "pillow")
UNNAMED = LEFT_TO_THE_IMAGE[:2]  # not even named to pip
# The name in the tarball of a wheelhouse's lock (launch/cloud/wheelhouse.py): `.ci/setup` installs
# from it on an EC2 machine. In SageMaker's container the wheels are a channel.
WHEELS_LOCK = "wheels.lock"
WHEELS_CHANNEL = "wheels"
FROM_WHEELS = (
    "--no-index",
    f"--find-links /opt/ml/input/data/{WHEELS_CHANNEL}",
    "--require-hashes",
)
MAX_MB = 50  # every job downloads it; code and the pictures that ship take 2


def build(extras: Sequence[str] = (), project: Path = PROJECT, lock: str | None = None) -> bytes:
    """Return the tarball (.tar.gz) of the project with the requirements of `extras`.

    lock: of the wheelhouse that a job in a closed network installs from. Raise UserError for a
    tarball that the container would refuse.
    """
    contents = {name: path.read_bytes() for name, path in files(project).items()}
    if lock is None:
        contents["requirements.txt"] = requirements(extras, project).encode()
    else:
        contents["requirements.txt"] = from_wheels(lock, project).encode()
        contents[WHEELS_LOCK] = lock.encode()
    archive = io.BytesIO()
    # The bytes hold no time, owner or name. Level 9 takes twice as long as 6, for 0.2 % fewer
    # bytes.
    with (
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=archive, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        # The requirements come last: they are made for the container.
        for name in sorted(contents, key=lambda name: (name == "requirements.txt", name)):
            member = tarfile.TarInfo(name)
            member.size = len(contents[name])
            member.mode = 0o755 if name in EXECUTABLE else 0o644
            tar.addfile(member, io.BytesIO(contents[name]))
    data = archive.getvalue()
    check(data)
    return data


def with_files(tarball: bytes, more: Mapping[str, Path]) -> bytes:
    """Return a tarball with the user's own files added. more: their paths, by the names in it.

    Raise UserError where one would replace a file of the project, and as `check` does.
    """
    packed = gzip.decompress(tarball)
    archive = io.BytesIO(packed)
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        tops = {name.split("/")[0] for name in tar.getnames()}
    for name, path in more.items():
        if name.split("/")[0] in tops:
            raise UserError(
                f"{path}: a job has {name.split('/')[0]} of Packhorse itself; "
                "give your module another name"
            )
    archive.seek(0)
    with tarfile.open(fileobj=archive, mode="a:") as tar:
        for name, path in sorted(more.items()):
            content = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    data = gzip.compress(archive.getvalue(), compresslevel=6, mtime=0)
    check(data)
    return data


def files(project: Path = PROJECT) -> dict[str, Path]:
    """Return the files of the tarball by their names in it. Raise UserError for a link."""
    paths = {
        path.relative_to(project).as_posix(): path
        for pattern in CODE
        for path in project.glob(pattern)
        if "__pycache__" not in path.parts
    }
    # The Python package `packhorse` is for notebooks, and lies elsewhere once installed.
    paths = {name: path for name, path in paths.items() if not name.startswith("launch/python/")}
    paths |= {name: beside(name, project) for name in BESIDE}
    for path in paths.values():
        if path.is_symlink():
            raise UserError(
                f"{path}: a link, which a job's container leaves out; "
                "put a copy of the file itself there"
            )
    return {name: path for name, path in paths.items() if path.is_file()}


def beside(name: str, project: Path = PROJECT) -> Path:
    """Return where a file of BESIDE lies. Raise UserError where it is not installed."""
    if (project / "pyproject.toml").is_file():
        return project / name
    try:
        installed = distribution("packhorse").files or []
    except PackageNotFoundError:
        installed = []
    for file in installed:
        if file.as_posix().endswith(f"share/packhorse/{name}"):
            return Path(str(file.locate()))
    raise UserError(
        f"{name}: it lies neither beside {project}/trainer nor in the installed package; "
        "install Packhorse again from its checkout"
    )


def extras(config: Config, pictures: Iterable[str] = ()) -> list[str]:
    """Return the extras of pyproject.toml that a run of these settings needs.

    pictures: the names of the files that are uploaded for it.
    """
    mlflow = config.train.mlflow
    needed = {
        "heic": not {suffix_of(name) for name in pictures}.isdisjoint(HEIC),
        "timm": config.model.name.startswith("timm/") or config.model.name == AUTO,
        "tensorboard": config.train.tensorboard,
        "mlflow": mlflow is not None and not mlflow.startswith("arn:"),
        "sagemaker_mlflow": mlflow is not None and mlflow.startswith("arn:"),
        "wandb": config.train.wandb is not None,
        "flowers102": config.data.source == "flowers102",
    }
    return [name for name, is_needed in needed.items() if is_needed]


def requirements(extras: Sequence[str], project: Path = PROJECT) -> str:
    """Return requirements.txt for the container.

    It has the dependencies of pyproject.toml, pinned to the tested versions. Packages that the
    image has are not pinned, or left out.
    """
    about = tomllib.loads(beside("pyproject.toml", project).read_text())["project"]
    asked = list(about["dependencies"])
    for extra in extras:
        asked += about["optional-dependencies"][extra]
    constraints = beside("constraints.txt", project).read_text().lower()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE))
    lines = []
    for line in asked:
        name = _name(line)
        if name in UNNAMED:
            continue
        if name in pins and name not in LEFT_TO_THE_IMAGE:
            line = f"{name}=={pins[name]}"
        lines.append(f"{line}\n")
    return "".join(lines)


def build_requirements(project: Path = PROJECT) -> str:
    """Return the requirements of the project's own build."""
    about = tomllib.loads(beside("pyproject.toml", project).read_text())["build-system"]
    return "".join(f"{line}\n" for line in about["requires"])


def from_wheels(lock: str, project: Path = PROJECT) -> str:
    """Return requirements.txt for a container that installs from a wheelhouse alone.

    lock: of the wheelhouse. Without the image's packages, and those that only an EC2 machine needs.
    """
    others = {_name(line) for line in build_requirements(project).splitlines()}
    others |= set(LEFT_TO_THE_IMAGE)
    lines = [line for line in lock.splitlines() if _name(line) not in others]
    return "".join(f"{line}\n" for line in (*FROM_WHEELS, *lines))


def check(tarball: bytes) -> None:
    """Raise UserError for a tarball with which a job could not start."""
    members, listed = _opened(tarball)
    names = {member.name for member in members}
    missing = ", ".join(name for name in NEEDED if name not in names)
    if missing:
        raise UserError(
            f"source tarball: {missing} is missing; bring it back into the project, "
            "or name it in launch/cloud/source.py"
        )
    if "setup.py" in names:
        raise UserError(
            "source tarball: with a setup.py SageMaker's toolkit starts a package instead of the "
            "trainer; leave setup.py out"
        )
    for member in members:
        is_inside = not member.name.startswith("/") and ".." not in member.name.split("/")
        if not is_inside or not (member.isfile() or member.isdir()):
            raise UserError(
                f"source tarball: {member.name} is a link, no file, or lies outside; "
                "put a copy of the file itself into the project"
            )
    size = sum(member.size for member in members) / 2**20
    if size > MAX_MB:
        largest = max(members, key=lambda member: member.size)
        raise UserError(
            f"source tarball: {size:.0f} MB, of which {largest.name} has "
            f"{largest.size / 2**20:.0f}; allowed: {MAX_MB}; "
            "move data out of the project's code, and upload it with --data DIR"
        )
    check_requirements(listed)


def _opened(tarball: bytes) -> tuple[list[tarfile.TarInfo], str]:
    """Return the members, and requirements.txt. Raise UserError for data that is no tarball."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as tar:
            members = tar.getmembers()
            if "requirements.txt" not in tar.getnames():
                return members, ""
            file = tar.extractfile("requirements.txt")
            assert file is not None
            return members, file.read().decode()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"source tarball: not a .tar.gz ({error}); build it with launch/cloud/source.py"
        ) from error


def check_requirements(text: str) -> None:
    """Raise UserError for a line of requirements.txt that pip would refuse.

    Raise it also for a line that would replace the image's own PyTorch.
    """
    for line in _lines(text):
        if line in FROM_WHEELS:
            continue
        try:
            requirement = Requirement(line.split(" --hash=")[0])
        except InvalidRequirement as error:
            raise UserError(
                f"requirements.txt: {line}: pip can't read this requirement; write it as "
                "NAME==VERSION"
            ) from error
        if _name(requirement.name) in UNNAMED or requirement.name.startswith("nvidia-"):
            raise UserError(
                f"requirements.txt: {line} would replace what the image brings, "
                "built for its GPU; leave it out"
            )


def _lines(text: str) -> Iterator[str]:
    """Yield the lines without their comments; skip empty ones."""
    for line in text.splitlines():
        requirement = line.split(" #")[0].strip()
        if requirement:
            yield requirement


def _name(requirement: str) -> str:
    """Return the project's name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()
