"""What a job is a function of: the kind of machine, the trainer's settings, the account. Requests are built from this alone."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.cloud import s3
from launch.cloud.session import Aws, bucket_name, partition
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings.compose import CONF, Resolved, check, resolve
from trainer.settings.config import Config, setting
from trainer.settings.hydra_errors import CONFIG_ERRORS, explain

NO_ACCOUNT = "000000000000"  # stands in a plan where there are no credentials

# Lengths that AWS allows (botocore's sagemaker model).
JOB_NAME = 63
TUNING_JOB_NAME = 32
RUN = 48  # leaves room in a job's name for the attempt
DIGEST = 16  # hexadecimal digits that tell folders of one name apart


@dataclass
class TargetConfig:
    """conf/target/*.yaml; every kind of target has these."""

    name: str = setting("ec2", "sagemaker", "sagemaker_multi", "tuner", "notebook")
    project: str = setting()
    region: str | None = setting()
    instance_type: str = setting()
    hours: float = setting(above=0, at_most=120)


@dataclass
class Ec2Target(TargetConfig):
    spot: bool = setting()
    image: str | None = setting()
    ssm_parameter: str = setting()
    disk_gb: int = setting(at_least=75, at_most=16384)
    subnet: str | None = setting()


@dataclass
class SageMakerTarget(TargetConfig):
    instances: int = setting(at_least=1, at_most=20)
    spot: bool = setting()
    wait_hours: float = setting(above=0, at_most=240)
    image: str | None = setting()
    disk_gb: int = setting(at_least=1, at_most=16384)
    retries: int = setting(at_least=1, at_most=30)


@dataclass
class TunerTarget(SageMakerTarget):
    """The search space is the trainer's: sweep=NAME."""


@dataclass
class NotebookTarget(TargetConfig):
    disk_gb: int = setting(at_least=5, at_most=16384)
    idle_minutes: int = setting(at_least=5, at_most=1440)
    repository: str | None = setting()


KINDS: dict[str, type[TargetConfig]] = {
    "ec2": Ec2Target,
    "sagemaker": SageMakerTarget,
    "sagemaker_multi": SageMakerTarget,
    "tuner": TunerTarget,
    "notebook": NotebookTarget,
}


@dataclass(frozen=True)
class Spec:
    """Everything that a request is a function of."""

    target: TargetConfig
    config: Config  # the trainer's settings as the job will have them
    overrides: tuple[str, ...]  # the user's overrides of the trainer, as typed
    run: str  # the run's id: RUN characters of [a-zA-Z0-9-] at most
    account: str
    region: str
    data: (
        str | None
    )  # the pictures are data/THIS/ in the bucket (pictures_name); None: those that the trainer writes itself
    source: str  # SHA-256 (hex) of the source tarball
    revision: str | None  # of git
    attempt: int = 1

    @property
    def project(self) -> str:
        return self.target.project

    @property
    def bucket(self) -> str:
        return bucket_name(self.project, self.account, self.region)

    @property
    def job_name(self) -> str:
        """The name in AWS of this attempt at the run. A name is used once in an account, for ever, so each attempt has its own."""
        limit = TUNING_JOB_NAME if isinstance(self.target, TunerTarget) else JOB_NAME
        return (
            f"{fit(f'{self.project}-{self.run}', limit - len(f'-{self.attempt}'))}-{self.attempt}"
        )

    @property
    def tags(self) -> dict[str, str]:
        return {"project": self.project, "run": self.run}

    @property
    def data_root(self) -> str | None:
        """The directory where the job finds its pictures; None: it writes them itself."""
        return None if self.data is None else job_data_root(self.target, self.data)

    def uri(self, *parts: str) -> str:
        return "/".join((f"s3://{self.bucket}", *parts))

    def role(self, part: str) -> str:
        """The ARN of one of the foundation's roles: training, ec2, notebook or launcher."""
        return f"arn:{partition(self.region)}:iam::{self.account}:role/{self.project}-{part}"


def job_data_root(target: TargetConfig, data: str) -> str:
    return (
        f"/opt/dlami/nvme/data/{data}"
        if isinstance(target, Ec2Target)
        else "/opt/ml/input/data/training"
    )


def fit(name: str, limit: int) -> str:
    """`name` as [a-zA-Z0-9-] in at most `limit` characters; whatever had to be changed is kept apart by eight digits of its SHA-256."""
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-")
    if plain == name and len(plain) <= limit:
        return plain
    return f"{plain[: limit - 9].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip(
        "-"
    )


# --- composing ---


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The overrides of the target (target=..., target.KEY=...), and those of the trainer."""
    ours = [
        argument
        for argument in arguments
        if argument.lstrip("+~").split("=", 1)[0].split(".", 1)[0] == "target"
    ]
    return ours, tuple(argument for argument in arguments if argument not in ours)


def load_target(overrides: Sequence[str]) -> TargetConfig:
    """The typed settings of conf/launch.yaml. Raises UserError naming the key, the value and what is allowed."""
    name = next(
        (override.split("=", 1)[1] for override in overrides if override.startswith("target=")),
        "ec2",
    )
    kind = KINDS.get(name, TargetConfig)
    with explained(settings.keys(kind, "target.")):
        check(overrides, settings.keys(kind, "target."), {"target": list(KINDS)})
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("launch", list(overrides))
        typed = OmegaConf.merge({"target": OmegaConf.structured(kind)}, composed)
        target = OmegaConf.to_object(typed.target)
    assert isinstance(target, TargetConfig)
    for key, value, limits in settings.walk(target, "target."):
        settings.check(key, value, limits)
    if not re.fullmatch(r"[a-z][a-z0-9-]{1,18}[a-z0-9]", target.project):
        raise UserError(
            f"target.project={target.project} is not allowed; allowed: 3 to 20 lower-case letters, digits and -, beginning with a letter"
        )
    if isinstance(target, SageMakerTarget) and target.spot and target.wait_hours < target.hours:
        raise UserError(
            f"target.wait_hours={target.wait_hours:g} is less than target.hours={target.hours:g}: it counts training and waiting together; "
            "allowed: target.wait_hours >= target.hours"
        )
    return target


def aws_of(overrides: Sequence[str]) -> Aws:
    """The account and region that overrides of the target name. Raises UserError."""
    target = load_target(overrides)
    return Aws(target.project, target.region)


def load_config(
    target: TargetConfig, overrides: Sequence[str], data: Path | None = None
) -> tuple[Config, str | None]:
    """The trainer's settings as the job will have them, and the name of the pictures in the bucket, None where the job writes them itself.

    data: the folder to upload, where one is given. Raises UserError.
    """
    composed = resolved(target, overrides, data).composed
    if composed.data.source != "folder":
        if data is not None:
            raise UserError(
                f"--data {data}: these pictures would not be used, since data={composed.data.source}; give data=folder"
            )
        return settings.load(composed), None
    if data is None and OmegaConf.is_missing(composed.data, "root"):
        raise UserError(
            "data.root has no value: give --data DIR to upload a folder of pictures, or data.root=NAME of one that is in the bucket"
        )
    for split in ("train", "valid", "test"):
        if composed.data[split] is not None:
            raise UserError(
                f"data.{split}={composed.data[split]}: a job finds its pictures in one folder; allowed: train, valid and test in --data DIR"
            )
    name = fit(Path(composed.data.root).name, RUN) if data is None else pictures_name(data)
    composed.data.root = job_data_root(target, name)
    return settings.load(composed), name


def resolved(target: TargetConfig, overrides: Sequence[str], data: Path | None = None) -> Resolved:
    """What the user's overrides of the trainer mean to the job: those of --data too, which names a folder as data.root does. Raises UserError."""
    platform = "ec2" if isinstance(target, Ec2Target) else "sagemaker"
    with explained(settings.keys()):
        settings.register()
        words = list(overrides)
        if isinstance(target, TunerTarget):
            # A tuning job's ranges are its search space: the settings are those of its first trial.
            fixed, swept = space.split(overrides)
            words = [*fixed, *space.firsts(swept)]
        places = [
            f"platform={platform}",
            *([space.override("data.root", str(data))] if data else []),
        ]
        return resolve([*words, *places])


def pictures_name(folder: Path) -> str:
    """Where a folder's pictures lie in the bucket, data/NAME/: its own name to read, and its content, which decides. Raises UserError."""
    return f"{fit(folder.resolve().name, RUN - DIGEST - 1)}-{s3.digest(folder)[:DIGEST]}"


def run_id(target: TargetConfig, config: Config, data: str | None, overrides: Sequence[str]) -> str:
    """The id of the run: its `name`, or one derived from the settings and the kind of machine, so that the same command finds its run."""
    if isinstance(target, NotebookTarget):
        return "notebook"
    if config.name is not None:
        return fit(config.name, RUN)
    # A path of no machine: the name must not depend on where a folder lies on this one.
    placed = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, root=f"/{target.name}/{data or config.data.source}"),
    )
    name = settings.run_name(placed)
    if isinstance(target, TunerTarget):
        name = f"{name}-{hashlib.sha256(repr(sorted(overrides)).encode()).hexdigest()[:8]}"
    readable, digest = name.rsplit("-", 1)
    return f"{re.sub(r'[^a-zA-Z0-9]+', '-', readable)[: RUN - 9].strip('-')}-{digest}"


@contextmanager
def explained(keys: list[str]) -> Iterator[None]:
    """Raises UserError in the place of Hydra's errors."""
    try:
        yield
    except (*CONFIG_ERRORS, OmegaConfBaseException) as error:
        raise UserError(explain(error, keys)) from error
