"""The base class of targets. A target is a kind of place at AWS where a run trains.

A target's class holds everything that differs from other targets.

To add a target, write a module in this folder whose TARGETS holds an object of its class, and a
file conf/target/NAME.yaml. Nothing else knows a target's name.
"""

import dataclasses
import hashlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from launch.cloud.account_stack import Place
from launch.cloud.prices import Price
from launch.cloud.request import Request
from launch.cloud.session import Aws, bucket_name, domain, partition, role_name
from launch.targets.attempt import Attempt, Figures, Noted, Phase, State
from launch.targets.instance_types import names_in
from launch.targets.inventory import Inventory
from launch.targets.questions import Question
from launch.targets.rented import Rented
from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings.compose import CONF, options
from trainer.settings.config import Config, setting

NAMES = options(CONF, "target")
# The host of AWS's console by partition (AWS's guides to China, GovCloud and the European cloud).
CONSOLES = {
    "aws": "console.aws.amazon.com",
    "aws-cn": "console.amazonaws.cn",
    "aws-us-gov": "console.amazonaws-us-gov.com",
    "aws-eusc": "console.amazonaws-eusc.eu",
}
S3 = "s3://"  # data.root begins so for pictures that are on S3 already
TAGS = 45  # that a user may give: AWS allows 50 per resource
RUN = 48  # characters of a run's id: leaves room in a job's name for the attempt
PRICE = "platform.dollars_hour"  # the trainer's setting
ASKED_NOW = "spot: what AWS asks now"


def is_tag(key: str, value: str) -> bool:
    """Return whether AWS accepts a tag."""
    if len(key) > 128 or len(value) > 256 or key.startswith("aws:"):
        return False
    return re.fullmatch(r"[\w .:/=+@-]*", key + value) is not None


@dataclass
class TargetConfig:
    """The settings of conf/target/*.yaml that every target has; subclasses add their own."""

    name: str = setting(*NAMES)
    project: str = setting()
    region: str | None = setting()
    bucket: str | None = setting()
    role: str | None = setting()
    tags: str | None = setting()
    kms_key: str | None = setting()
    subnet: str | None = setting()
    security_groups: str | None = setting()
    instance_type: str = setting()
    hours: float = setting(above=0, at_most=120)

    @property
    def given_tags(self) -> dict[str, str]:
        """`tags` as a dict. Raise UserError where it isn't a list of KEY=VALUE."""
        pairs = [pair.partition("=") for pair in (self.tags or "").split(",") if pair]
        tags = {key.strip(): value.strip() for key, _, value in pairs}
        if not all(key.strip() and equals for key, equals, _ in pairs) or len(tags) < len(pairs):
            raise UserError(
                f"target.tags={self.tags} is not allowed; allowed: KEY=VALUE, several with commas, "
                "each KEY once"
            )
        if len(tags) > TAGS or not all(map(is_tag, tags, tags.values())):
            raise UserError(
                f"target.tags={self.tags} is not allowed; AWS allows up to {TAGS} besides ours, of "
                "letters, digits, spaces and _.:/=+-@, keys of up to 128 and values of up to 256 "
                "characters, and no key that begins with aws:"
            )
        return tags

    @property
    def groups(self) -> list[str]:
        """`security_groups` as a list."""
        return [each.strip() for each in (self.security_groups or "").split(",") if each.strip()]

    @property
    def subnets(self) -> list[str]:
        """`subnet` as a list: SageMaker takes several."""
        return [each.strip() for each in (self.subnet or "").split(",") if each.strip()]


@dataclass(frozen=True)
class Spec:
    """Everything that the requests depend on."""

    target: TargetConfig
    config: Config  # the trainer's settings as the job will have them
    overrides: tuple[str, ...]  # the user's overrides of the trainer, as typed
    run: str  # the run's id: RUN characters of [a-zA-Z0-9-] at most
    account: str
    region: str
    # The pictures are data/THIS/ in the bucket; None: the trainer writes them itself.
    data: str | None
    source: str  # SHA-256 (hex) of the source tarball
    revision: str | None  # of git
    attempt: int = 1
    extras: tuple[str, ...] = ()  # of pyproject.toml, that the run needs
    weights: str | None = None  # model.weights_dir is data/THIS/ in the bucket; None: there is none
    wheels: str | None = None  # the job installs from data/THIS/ in the bucket; None: from an index
    # Hours of all its jobs together that the ceiling still allows; None: no limit.
    paid_hours: float | None = None
    spot_price: float | None = None  # dollars per hour for spot now; None: not known
    bid: float | None = None  # the maximum spot price in dollars per hour; None: as on demand
    zone: str | None = None  # to ask for machines in; None: AWS chooses
    # Dollars that an hour of all its machines will probably cost; None: not known.
    dollars_hour: float | None = None

    @property
    def kind(self) -> "Target":
        return targets()[self.target.name]

    @property
    def project(self) -> str:
        return self.target.project

    @property
    def bucket(self) -> str:
        return self.target.bucket or bucket_name(self.project, self.account, self.region)

    @property
    def job_name(self) -> str:
        """The name in AWS of this attempt at the run.

        An account can use a name only once, so each attempt has its own.
        """
        number = f"-{self.attempt}"
        return fit(f"{self.project}-{self.run}", self.kind.job_name_limit - len(number)) + number

    @property
    def tags(self) -> dict[str, str]:
        return self.target.given_tags | {"project": self.project, "run": self.run}

    @property
    def tag_list(self) -> list[dict[str, str]]:
        """The tags as most of AWS's requests write them."""
        return tag_list(self.tags)

    @property
    def data_root(self) -> str | None:
        """The directory where the job finds its pictures; None: it writes them itself."""
        return None if self.data is None else self.kind.data_root(self.data)

    @property
    def weights_root(self) -> str | None:
        """The directory where the job finds the folder of weights; None: there is none."""
        return None if self.weights is None else self.kind.weights_root(self.weights)

    @property
    def instances(self) -> int:
        """How many machines one job takes: `instances` of the target, where it has this setting."""
        return int(getattr(self.target, "instances", 1))

    @property
    def instance_types(self) -> list[str]:
        """The instance types that a job may get, the preferred one first."""
        return names_in(self.target.instance_type)

    @property
    def spot(self) -> bool:
        """Whether it takes spot machines: `spot` of the target, where it has this setting."""
        return getattr(self.target, "spot", False) in (True, "true", "auto")

    @property
    def hours(self) -> float:
        """The time limit of a job: the one that is set, or less where its ceiling allows less."""
        if self.paid_hours is None:
            return self.target.hours
        return min(self.target.hours, self.paid_hours)

    def bought(self, price: Price) -> Price:
        """Return a machine's price with its disk and address, and with today's spot price."""
        price = replace(price, parts=self.kind.parts_per_hour(self))
        if self.spot_price is None:
            return price
        return replace(price, spot=self.spot_price, basis=f"{price.basis}; {ASKED_NOW}")

    @property
    def price_words(self) -> list[str]:
        """The setting that tells the run what its machines cost, for its report."""
        told = any(word.lstrip("+").startswith(f"{PRICE}=") for word in self.overrides)
        if self.dollars_hour is None or told:
            return []
        return [f"{PRICE}={self.dollars_hour}"]

    @property
    def max_dollars(self) -> float | None:
        """The ceiling that is set: `max_dollars` of the target, where it has this setting."""
        return getattr(self.target, "max_dollars", None)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for all attempts at a run."""
        places = {"target": self.target.name, "data": self.data, "weights": self.weights}
        return settings.identity(self.config) | places

    def uri(self, *parts: str) -> str:
        return "/".join((f"s3://{self.bucket}", *parts))

    def role(self, part: str) -> str:
        """Return the ARN of the role of a part (training, ec2 or notebook) in the account stack.

        Where target.role gives an ARN or a name, return that role's.
        """
        given = self.target.role
        if given is not None and given.startswith("arn:"):
            return given
        name = given or role_name(self.project, part, self.region)
        return f"arn:{partition(self.region)}:iam::{self.account}:role/{name}"

    @property
    def instance_profile(self) -> str:
        """The name of the instance profile that gives an EC2 machine its role."""
        return self.target.role or role_name(self.project, "ec2", self.region)

    @property
    def place(self) -> Place:
        """Where the project is, with the parameters of `up` that the target's settings imply."""
        told = {}
        if self.target.bucket:
            told["BucketName"] = self.target.bucket
        if self.target.kms_key:
            told["KmsKey"] = self.target.kms_key
        if self.target.subnet and self.kind.platform == "sagemaker":
            told["OwnNetwork"] = "yes"
        if self.own_data:
            bucket, _, prefix = str(self.data).removeprefix(S3).partition("/")
            told |= {"PicturesBucket": bucket, "PicturesPrefix": f"{prefix}/"}
        return Place(self.project, self.account, self.region, told)

    @property
    def data_uri(self) -> str | None:
        """The S3 URI of the pictures; None: the job writes them itself."""
        if self.data is None or self.data.startswith(S3):
            return self.data
        return self.uri("data", self.data)

    @property
    def own_data(self) -> bool:
        """Whether the pictures are in the user's own place on S3, where jobs only read them."""
        return self.data is not None and self.data.startswith(S3)


class Target(ABC):
    """A kind of place at AWS where runs train.

    It holds only its name: a Spec holds the settings, an Attempt what was sent. The methods that
    take an `Aws` raise AwsError where AWS refuses a call; the others don't call AWS.
    """

    config: ClassVar[type[TargetConfig]]  # of conf/target/NAME.yaml
    role: ClassVar[str]  # the part of the account stack whose role its machines have
    platform: ClassVar[str]  # the trainer's conf/platform/PLATFORM.yaml
    job_name_limit: ClassVar[int] = 63  # characters
    sweeps: ClassVar[bool] = False  # whether it runs the trials of a search space
    logs_late: ClassVar[bool] = False  # whether the last log lines may come after the end
    trains: ClassVar[bool] = True  # False: it leaves no model

    def __init__(self, name: str) -> None:
        self.name = name

    # --- what is asked for ---

    def check(self, target: Any) -> None:  # noqa: B027 (most have nothing to check)
        """Raise UserError for settings of conf/target that don't go together.

        target: of the class `config`, each value within its own limits.
        """

    def stands_in(self, target: Any) -> tuple[list[str], bool | None]:
        """Return the subnets of a job's machines, and whether the machines have a public address.

        No subnets: AWS chooses. None: as the subnet says.
        """
        return [], None

    @abstractmethod
    def data_root(self, data: str) -> str:
        """Return the directory in which a job finds the pictures data/`data`/ of the bucket."""

    def weights_root(self, weights: str) -> str:
        """Return the directory in which a job finds the weights data/`weights`/ of the bucket."""
        return self.data_root(weights)

    def fixed(self, overrides: Sequence[str]) -> list[str]:
        """Return the trainer's overrides of the run's training, or of its first trial."""
        return list(overrides)

    def run_id(self, config: Config, placed: Config, overrides: Sequence[str]) -> str:
        """Return the run's id, so that the same command finds its run again.

        It is the run's `name`, or derived from `placed`: the settings with a made-up data.root, so
        that the id doesn't depend on where the folder is on this machine.
        """
        if config.name is not None:
            return fit(config.name, RUN)
        readable, digest = self.run_name(placed, overrides).rsplit("-", 1)
        return f"{re.sub(r'[^a-zA-Z0-9]+', '-', readable)[: RUN - 9].strip('-')}-{digest}"

    def run_name(self, config: Config, overrides: Sequence[str]) -> str:
        """Return a name for these settings that ends in eight digits."""
        return settings.run_name(config)

    def looked_up(self, aws: Aws | None, spec: Spec) -> Spec:
        """Return the spec with the values that only AWS knows. aws: None without credentials."""
        return spec

    def pinned(self, spec: Spec, attempt: Attempt) -> Spec:
        """Return the spec with values looked up for an earlier attempt, which must not change."""
        return spec

    @abstractmethod
    def requests(self, spec: Spec) -> list[Request]:
        """Return the requests for a spec, in order. A pure function.

        A request that is sent twice must start only once. Raise UserError for settings of the
        trainer that the target can't pass on or carry out.
        """

    def sent(self, aws: Aws, attempt: Attempt, before: Attempt | None) -> None:  # noqa: B027
        """Do what remains after an attempt was sent. before: the previous one, if there was one."""

    def restart(self, attempt: Attempt, state: State, spec: Spec) -> list[Request]:
        """Return the requests that restart an ended attempt; [] where a restart is a new attempt.

        spec: as asked for now.
        """
        return []

    def check_running(self, attempt: Attempt, spec: Spec) -> None:  # noqa: B027 (see above)
        """Raise UserError where a running attempt differs from the spec, and can't be changed."""

    def questions(self, spec: Spec) -> list[Question]:
        """Return the read-only questions to AWS before anything is rented."""
        return []

    def trials(self, request: Request) -> tuple[int, int]:
        """Return how many jobs a request may start, and how many of them at the same time."""
        return 1, 1

    def offers(self, aws: Aws | None, spec: Spec, waited: float) -> list[Spec]:
        """Return the specs to ask for in order: the next one where AWS doesn't have the previous.

        aws: None without credentials. waited: seconds since the first request.
        """
        return [spec]

    def elsewhere(self, aws: Aws, spec: Spec) -> str:
        """Return a line about other machines and zones, where AWS has none of the offers; or ""."""
        return ""

    def parts_per_hour(self, spec: Spec) -> float:
        """Return dollars per hour of each machine's disk and address."""
        return 0.0

    def hour_at_most(self, aws: Aws, attempt: Attempt, state: State) -> float:
        """Return the most dollars per hour that AWS can have billed for one of its machines."""
        return attempt.per_hour or 0.0

    def asked_for_spot(self, aws: Aws, spec: Spec) -> float | None:
        """Return today's price of one spot machine, dollars per hour; None: AWS doesn't tell."""
        return None

    # --- what became of it ---

    @abstractmethod
    def observe(self, aws: Aws, attempt: Attempt) -> State:
        """Return the state of an attempt now.

        Must not raise where AWS doesn't list it: return `attempt.unseen()`.
        """

    def listed(self, inventory: Inventory, noted: Noted) -> State | None:
        """Return what `observe` returns, from the listings alone; None where they can't tell."""
        return None

    def stop(self, aws: Aws, attempt: Attempt, at_once: bool) -> None:
        """Ask for the end of an attempt, if it runs.

        at_once: without a checkpoint, where the target can choose. Must not raise where it has
        ended meanwhile; raise UserError where AWS can't stop it yet.
        """
        state = self.observe(aws, attempt)
        if state.phase is Phase.RUNNING:
            # The user asks for this stop, whatever else would end the attempt.
            asked = dataclasses.replace(state, ends_by=None)
            self.stop_running(aws, attempt, asked, at_once)
        elif (
            state.phase is Phase.ABSENT
            and attempt.may_be_on_its_way
            and self.stop_early(aws, attempt)
        ):
            log.info(
                "attempt %d at %s may be on its way: asked it to stop, which it does when it has "
                "started",
                attempt.number,
                attempt.run,
            )
        else:
            log.info("%s: there is nothing to stop", attempt.told(state))

    @abstractmethod
    def stop_running(self, aws: Aws, attempt: Attempt, state: State, at_once: bool) -> None:
        """Ask a running attempt to end, and log it."""

    def stop_early(self, aws: Aws, attempt: Attempt) -> bool:
        """Ask an attempt that AWS may still start to end; return whether the target can do that."""
        return False

    @abstractmethod
    def log_reader(self, aws: Aws, attempt: Attempt) -> Callable[[], list[str]]:
        """Return a function that returns the lines logged since its last call.

        Must not raise where there is no log yet.
        """

    def last_words(self, aws: Aws, attempt: Attempt, state: State) -> str:
        """Return the last output, at AWS, of an attempt that left no log in the bucket; or ""."""
        return ""

    @abstractmethod
    def results(self, aws: Aws, attempt: Attempt) -> str:
        """Return the key prefix in the bucket of the run's results, also of future ones.

        Raise UserError where it is not known yet, or where the target leaves no results.
        """

    @abstractmethod
    def figures(self, inventory: Inventory, attempt: Attempt) -> Figures:
        """Return the run's results so far."""

    @abstractmethod
    def console(self, attempt: Attempt, region: str) -> str:
        """Return the attempt's page in AWS's console, below https://REGION.console.aws..."""

    def past_limit(self, attempt: Attempt, state: State) -> float:
        """Return the hours that a machine has run past the limit at which it should end itself."""
        return 0.0

    def connection(self, aws: Aws, attempt: Attempt, state: State) -> str | list[str]:
        """Return the address of a running attempt, or the command that opens a shell on it.

        Raise UserError where there is neither.
        """
        raise UserError(
            f"{attempt.run}: AWS gives no shell on a {self.name} job; "
            "python -m launch logs shows what it does"
        )

    def deletes(self, attempt: Attempt) -> str:
        """Return what `delete` deletes, in words. Raise UserError where there is nothing."""
        raise UserError(
            f"{attempt.run}: it costs nothing once it has ended; "
            "python -m launch down deletes all of the project"
        )

    def delete(self, aws: Aws, attempt: Attempt, every: float) -> None:  # noqa: B027 (see above)
        """Delete what `deletes` says. every: seconds between two looks."""

    # --- over all runs: called once for each class ---

    @classmethod
    def overdue(cls, inventory: Inventory) -> Iterator[tuple[Attempt, State]]:
        """Yield the attempts whose machines run past their limits."""
        yield from ()

    @classmethod
    def rented(cls, inventory: Inventory) -> Iterator[Rented]:
        """Yield what costs this project money now, whoever started it and however."""
        yield from ()


@cache
def targets() -> dict[str, Target]:
    """Return each target by its name, from TARGETS in the modules of this folder."""
    folder = Path(__file__).parent
    modules = [
        import_module(f"launch.targets.{module.name}")
        for module in pkgutil.iter_modules([str(folder)])
    ]
    made = {target.name: target for module in modules for target in getattr(module, "TARGETS", ())}
    return {name: made[name] for name in NAMES}


def kinds() -> list[type[Target]]:
    """Return the classes of all targets, each once."""
    return list(dict.fromkeys(type(target) for target in targets().values()))


def of(attempt: Attempt) -> Target:
    """Return the target that an attempt was sent to."""
    return targets()[attempt.target]


def console_url(attempt: Attempt, region: str) -> str:
    """Return the address of the page of AWS's console that shows the attempt."""
    host = CONSOLES.get(partition(region), f"console.{domain(region)}")
    return f"https://{region}.{host}/{of(attempt).console(attempt, region)}"


def fit(name: str, limit: int) -> str:
    """Return `name` as [a-zA-Z0-9-] in at most `limit` characters.

    A changed name gets eight digits of its SHA-256, so that two names stay different.
    """
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-")
    if plain == name and len(plain) <= limit:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: limit - 9].strip('-')}-{digest}".strip("-")


def tag_list(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def tag_values(tags: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return AWS's list of tags as a dict."""
    return {tag["Key"]: tag["Value"] for tag in tags}
