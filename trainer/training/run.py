"""A run's directory, which one process at a time has.

It holds the settings, the log, and the result that says that the run is complete.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from trainer.common import files, own_code
from trainer.common.console import RESULT as OUTCOME
from trainer.common.console import also_to_file, command, log, painted
from trainer.common.errors import Interrupted, UserError
from trainer.common.interrupt import Stop
from trainer.common.paths import ARCHIVE
from trainer.common.stages import Stages, since_start
from trainer.distributed.world import World
from trainer.images.folder import ImageFolder
from trainer.images.identity import (
    DIRECTORY,
    INDEX,
    Sample,
    changes,
    digests,
    note,
    noted,
    of_samples,
    samples,
)
from trainer.network import weight_folder, weights
from trainer.settings.config import OF_PICTURES, Config, identity, run_name, schema
from trainer.settings.words import key_of, override

if TYPE_CHECKING:
    from trainer.network.build import Classifier

RESULT = "result.json"
PREDICTIONS = "predictions.csv"
TIMES = "times.json"  # beside the checkpoints: what the starts until then have taken
PARENT = "parent"  # in a run's identity: the digest of the state that it goes on from
FORMAT = 2  # of a run's identity; 1 knew pictures by name and size, and weights by path


@dataclass(frozen=True)
class Run:
    """One run: its settings, where it lies, its processes, and the wish to stop it."""

    config: Config
    world: World
    stop: Stop
    name: str
    directory: Path
    checkpoints: Path
    package: Path  # the archive, or on SageMaker the directory that it archives itself
    given: Sequence[str] = ()  # the settings that were typed or implied, as words
    looks: bool = True  # for what is wrong with its images, and tells it
    trial: bool = False  # of a decision: its metrics are nobody else's business
    # SHA-256 of the file of model.weights, before the network was built from it.
    weights_digest: str | None = None
    recipe: dict[str, Any] | None = None  # what model=auto stood for
    stages: Stages = field(default_factory=Stages)  # where its time goes

    def resolved(self, images: ImageFolder) -> "Run":
        """Return the run with a value for each setting that isn't given, written to config.yaml."""
        resolve = partial(weights.resolve, self.config, images)
        run = dataclasses.replace(self, config=self.world.broadcast_from_main(resolve))
        if self.world.is_main_process:
            run.write_settings()
        return dataclasses.replace(run, weights_digest=run.digest_weights())

    def identity(self, pictures: str, network: "Classifier | None") -> dict[str, Any]:
        """Return what a result of this run is a function of.

        pictures: what those are that can be used (`identity.of_images`). network: as it was built;
        None: leave its weights out.
        """
        settings = identity(self.config)
        if self.weights_file:
            del settings["model.weights"]  # its content counts, and not its place
        facts = settings | {"format": FORMAT, "pictures": pictures}
        if self.config.model.code is not None:
            facts["model.code"] = own_code.find("model.code", self.config.model.code).digest
        if self.config.train.parent is not None:
            del facts["train.parent"]
            facts[PARENT] = self.parent_digest()
        model = self.config.model
        given = model.weights is not None or model.freeze == "backbone"  # else the seed decides
        if network is not None and given:
            # imported here: a complete run answers before PyTorch is loaded.
            from trainer.network import build

            facts |= build.identity(network)
        return facts

    @property
    def temporary(self) -> str:
        """Return what begins the names of what this run is writing beside that of other runs."""
        place = hashlib.sha256(str(self.directory.resolve()).encode(errors="surrogateescape"))
        return f"{files.TEMPORARY}{place.hexdigest()[:12]}-"

    @property
    def weights_file(self) -> str | None:
        """Return model.weights where it is a file."""
        given = self.config.model.weights
        if given is None or not weight_folder.is_file(given):
            return None
        return given

    def digest_weights(self) -> str | None:
        """Return the SHA-256 of the file of weights as it is now; None where there is none.

        A file that looks unchanged isn't read again.
        """
        path = self.weights_file
        if path is None or not Path(path).is_file():
            return None
        return digests([path], Path(self.config.platform.cache, DIRECTORY))[path]

    def parent_digest(self) -> str | None:
        """Return the SHA-256 of the newest checkpoint's manifest of train.parent.

        None where there is none (any more).
        """
        parent = self.config.train.parent
        steps = sorted(Path(parent or "", "checkpoints").glob("step-*/manifest.json"))
        if parent is None or not steps:
            return None
        return hashlib.sha256(files.patiently(steps[-1], steps[-1].read_bytes)).hexdigest()

    def loaded_weights(self) -> str | None:
        """Return the SHA-256 of the file that the network was built from; None: it was replaced."""
        if self.weights_digest == self.digest_weights():
            return self.weights_digest
        return None

    def knows_weights(self, result: dict[str, Any]) -> bool:
        """Return whether the file of weights would give the network that gave this result.

        It would, where its bytes are the same, and the libraries that build the network.
        """
        built = str(result["identity"].get("weights.versions"))
        libraries = [each.split(" ")[0] for each in built.split(", ") if each != "none"]
        try:
            now = [f"{library} {version(library)}" for library in libraries]
        except PackageNotFoundError:
            return False
        same = ", ".join(now) or "none"
        given = result.get("weights_file")
        return given is not None and given == self.weights_digest and same == built

    def check_identity(
        self, then: dict[str, Any], now: dict[str, Any], images: ImageFolder
    ) -> None:
        """Raise UserError where a run goes on with other settings, images or weights.

        What came out would be neither's. then, now: of `identity`. images: those of `now`.
        """
        where = self.checkpoints
        if now.get(PARENT) is None and PARENT in then:
            now = now | {PARENT: then[PARENT]}  # all of it is in this run's own checkpoints
        if then.get("format") != FORMAT:
            raise UserError(
                f"{where}: another version of Packhorse began this run; use that version, or "
                "start a new run with another name=..."
            )
        changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if not changed:
            return
        settings = [key for key in changed if key != "pictures" and not key.startswith("weights.")]
        if "pictures" in changed:  # what they alone have changed is no other fault
            given = {key_of(word) for word in self.given}
            settings = [key for key in settings if key not in OF_PICTURES or key in given]
        if settings:
            differences = ", ".join(
                f"{key}: {then.get(key)} then, {now.get(key)} now" for key in settings[:5]
            )
            more = ""
            if settings == ["train.epochs"] and now["train.epochs"] > then["train.epochs"]:
                more = f"; train.parent={shlex.quote(str(self.directory))} continues from its end"
            raise UserError(
                f"{where}: this run began with other settings ({differences}); give the same again,"
                f" or start a new run with another name=...{more}"
            )
        if "pictures" in changed:
            what = f"the pictures have changed since this run began{self._changes(then, images)}"
        elif changed == ["weights.versions"]:
            what = (
                f"{then.get(changed[0])} built the network when this run began, "
                f"now it is {now.get(changed[0])}"
            )
        else:
            what = f"model.weights={self.config.model.weights} has changed since this run began"
        raise UserError(f"{where}: {what}; restore them, or start a new run with another name=...")

    def _changes(self, then: dict[str, Any], images: ImageFolder) -> str:
        """Return which pictures have changed, as far as that was noted: ": ..."."""
        before = self.noted_pictures(then)
        if before is None:
            return ""
        return f": {changes(before, samples(images))}"

    def noted_pictures(self, then: dict[str, Any]) -> list[Sample] | None:
        """Return the pictures that were noted beside the checkpoints; None where those are others.

        then: of `identity`.
        """
        before = noted(self.checkpoints / INDEX)
        if before is None or of_samples(before) != then["pictures"]:
            return None
        return before

    def note_pictures(self, images: ImageFolder) -> None:
        """Write beside the checkpoints of which pictures they are, to name those that change."""
        note(self.checkpoints / INDEX, samples(images))

    def note_times(self) -> None:
        """Write beside the checkpoints how long each stage took, for the start after a kill."""
        if self.world.is_main_process and not self.trial:
            told = {"starts": self.stages.starts, "stages": self.stages.in_all()}
            files.write(self.checkpoints / TIMES, json.dumps(told) + "\n")

    def result(self) -> dict[str, Any] | None:
        """Return what the complete run wrote last, or None. Raise Unreadable."""
        return read_result(self.directory)

    def write_settings(self) -> None:
        """Write config.yaml."""
        text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self.config)))
        files.write(self.directory / "config.yaml", text)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, with which the run is complete."""
        files.write(self.directory / RESULT, json.dumps(_signed(result), indent=1) + "\n")

    def next_steps(self) -> list[str]:
        """Return commands that a person may want after it; in a job none.

        What pictures show, the run beside the one that it goes on from, the model on a page, and
        the same run as a SageMaker job on this machine.
        """
        if not self.package.name.endswith(".tar.gz"):
            return []
        settings = [word for word in self.given if not word.startswith("platform")]
        rehearse = command("launch", "rehearse", *settings)
        if rehearse.startswith(".venv"):  # in a clone, where make installs what a rehearsal needs
            rehearse = "make rehearse"
            if settings:  # of which make itself reads the $ first
                rehearse += f" ARGS={shlex.quote(shlex.join(settings).replace('$', '$$'))}"
        data = self.config.data
        pictures = Path(data.test or Path(data.root, "test"))
        if not pictures.is_dir():
            pictures = Path(data.root)
        steps = [command("serving", "predict", self.package, pictures)]
        for before in (self.config.train.parent, self.config.model.weights):
            if before is None:
                continue
            place = Path(before)
            if place.name == ARCHIVE:  # the package of a run
                place = place.parent
            if (place / PREDICTIONS).is_file():
                steps.append(command("trainer.runs", "--compare", place, self.directory))
        return [*steps, command("serving", "serve", self.package), rehearse]

    def again(self, *words: str) -> str:
        """Return the command that trains once more, with these settings; in a job "".

        It is another run, so it has another name. Where no setting decides it (the pictures were
        changed, say), the command gives one that is free.
        """
        if not self.package.name.endswith(".tar.gz"):
            return ""
        replaced = {key_of(word) for word in words} | {"name"}
        if "model.name" in replaced:
            replaced.add("model")
        kept = [word for word in self.given if key_of(word) not in replaced]
        known = schema()
        if not any(known[key_of(word)].metadata["identity"] for word in words):
            kept.append(override("name", self._next_name()))
        return command("trainer", *kept, *words)

    def _next_name(self) -> str:
        """Return the name with the next number for which there is no run here."""
        base = re.sub(r"-\d{1,3}$", "", self.name)
        numbers = (f"{base}-{number}" for number in itertools.count(2))
        return next(name for name in numbers if not (self.directory.parent / name).exists())

    def summarize(self, result: dict[str, Any]) -> None:
        """Show how good it is, where it lies, what to do next: the last thing on the terminal."""
        best = f"best epoch {result['best_epoch']} of {result['epochs']}"
        if result["best_epoch"] == 0:
            best = "the solved head, nothing trained"
            if result["epochs"]:
                best = f"the solved head: none of {result['epochs']} epochs was better beyond doubt"
        accuracy = f"{result['top1']:.1%}"
        line = (
            f"\n{result['split']} accuracy  {{}}  (top-5 {result['top5']:.1%}, "
            f"macro F1 {result['f1']:.1%}, {result['pictures']} pictures; {best})"
        )
        told = line.format(painted(accuracy, "bold", "green"))
        log.log(OUTCOME, line.format(accuracy), extra={"for_people": told})
        for how in ("with", "without"):
            other = result.get(f"{how}_leaks")
            if other:
                log.info(
                    "%s the pictures that are in train too: %s of %d",
                    how,
                    f"{other['top1']:.1%}",
                    other["pictures"],
                )
        places = {"report": "report.html", "log": "log.txt", "metrics": "metrics.jsonl"}
        log.info("%-15s %s", "model package", self.package)
        log.info("%-15s %s", "checkpoints", self.checkpoints)
        for what, name in places.items():
            log.info("%-15s %s", what, self.directory / name)
        if steps := self.next_steps():
            log.info("next:\n%s", "\n".join(f"  {command}" for command in steps))


def read_result(directory: Path) -> dict[str, Any] | None:
    """Return what a complete run wrote last into its directory; None where it isn't complete.

    What isn't as it was written counts as none. Raise Unreadable.
    """
    path = directory / RESULT

    def read() -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return None

    data = files.patiently(path, read)
    if data is None:
        return None
    try:
        result = json.loads(data)
        digest = result.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        digest, result = None, {}
    if digest != _signed(result)["sha256"]:
        log.warning("%s is damaged: the run continues from its newest checkpoint", path)
        return None
    assert isinstance(result, dict)
    return result


def _signed(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with its own digest, by which damage to it is noticed."""
    digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    return result | {"sha256": digest}


def places(config: Config) -> tuple[str, Path, Path, Path]:
    """Return the name of the run of these settings, its directory, its checkpoints, its package."""
    name = run_name(config)
    directory = Path(config.platform.run_dir or Path(config.platform.runs) / name)
    checkpoints = Path(config.platform.checkpoints or directory / "checkpoints")
    package = Path(config.platform.package or directory / ARCHIVE)
    return name, directory, checkpoints, package


# What a run's directory holds before anything was trained.
BEGUN = ("config.yaml", "log.txt", "quarantine.txt", "care.csv", "metrics.jsonl", ".lock")


@contextmanager
def open_run(config: Config, world: World, stop: Stop, given: Sequence[str] = ()) -> Iterator[Run]:
    """Open the run of these settings.

    Rank 0 alone makes its directory, locks it for this process and begins its log. Where the user's
    mistake or wish ends it before anything was trained, the directory that it made goes again: a
    list of runs isn't a list of typing errors. Raises UserError where another process has it.
    """
    name, directory, checkpoints, package = places(config)
    stages = Stages(since_start())
    run = Run(config, world, stop, name, directory, checkpoints, package, given, stages=stages)
    if not world.is_main_process:
        yield run
        return
    # Elsewhere than here, and of several processes, its log is what tells what was wrong.
    at_hand = config.platform.name == "local" and world.size == 1
    is_new = at_hand and not directory.exists()
    try:
        with _opened(run):
            yield run
    except (UserError, Interrupted):
        if is_new:
            _discard_untrained(run)
        raise


def _discard_untrained(run: Run) -> None:
    """Remove the directory of a run that holds nothing but what a run begins with."""
    # A checkpoint, say, or what model=auto has decided.
    kept = {path.name for path in run.checkpoints.iterdir()} - {".lock"}
    kept |= {path.name for path in run.directory.iterdir()} - {*BEGUN, run.checkpoints.name}
    if kept:
        return
    with suppress(OSError):  # somebody else has put something there meanwhile
        for name in BEGUN:
            if name != ".lock":
                (run.directory / name).unlink(missing_ok=True)
        for directory in (run.checkpoints, run.directory):
            (directory / ".lock").unlink(missing_ok=True)
            directory.rmdir()


@contextmanager
def _opened(run: Run) -> Iterator[None]:
    """Make a run's directory, lock it and begin its log, while the context lasts."""
    directory, checkpoints, package = run.directory, run.checkpoints, run.package
    for needed in (directory, checkpoints, package.parent):
        needed.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for place in (directory, checkpoints):
            # A directory of checkpoints elsewhere may be another run's too.
            if not held.enter_context(files.locked(place)):
                raise UserError(
                    f"{place}: another process trains in this run"
                    f"{files.owner_of(place)}; wait for it, or give this one another name=..."
                )
        files.sweep(directory)
        files.sweep(checkpoints)
        # Other runs may package into the same folder, now.
        for written in (package.parent, package):
            files.sweep(written, run.temporary)
        with also_to_file(directory / "log.txt"):
            log.info("run %s in %s", run.name, directory)
            _count_earlier(run)
            run.write_settings()
            yield


def _count_earlier(run: Run) -> None:
    """Let the run's times be those of all its starts, as far as they were noted."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a word in the report
        told = json.loads((run.checkpoints / TIMES).read_bytes())
        stages = {str(name): float(spent) for name, spent in told["stages"].items()}
        if all(0 <= spent < math.inf for spent in stages.values()):
            run.stages.go_on_from(stages, int(told["starts"]))
