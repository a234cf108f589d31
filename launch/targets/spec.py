"""What the arguments of a command line mean for a job: its target, its settings, its run."""

import copy
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.cloud import s3
from launch.cloud.session import Aws
from launch.targets import attempt as notes
from launch.targets.attempt import Attempt, Noted
from launch.targets.base import NAMES, RUN, S3, Spec, TargetConfig, fit, targets
from trainer.common import own_code
from trainer.common.errors import UserError
from trainer.common.paths import expanded
from trainer.settings import config as settings
from trainer.settings.compose import CONF, Resolved, check, resolve
from trainer.settings.config import Config
from trainer.settings.hydra_errors import CONFIG_ERRORS, explain
from trainer.settings.words import override, readable

NO_ACCOUNT = "000000000000"  # shown in a plan without credentials
OURS = ("project", "run", "attempt", "Name")  # tags that mark what is ours
DIGEST = 16  # hexadecimal digits that distinguish folders of the same name


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the overrides of the target (target=..., target.KEY=...), and the trainer's."""
    ours = [each for each in arguments if re.match(r"[+~]*target(?![^=.])", each)]
    return ours, tuple(argument for argument in arguments if argument not in ours)


def names_target(overrides: Sequence[str]) -> bool:
    """Return whether one of the target's overrides is target=NAME."""
    return any(override.startswith("target=") for override in overrides)


def load_target(overrides: Sequence[str]) -> TargetConfig:
    """Return the typed settings of conf/launch.yaml.

    Raise UserError naming the key, the value and what is allowed.
    """
    names = [each.partition("=")[2] for each in overrides if each.startswith("target=")]
    kind = targets().get((names or ["ec2"])[0])
    schema = kind.config if kind else TargetConfig
    entries = settings.schema(schema, "target.")
    keys = list(entries)
    with explained(keys):
        check(overrides, keys, {"target": NAMES})
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("launch", readable(overrides, entries))
        target = typed(composed, schema)
    check_target(target)
    return target


def typed(composed: DictConfig, schema: type[TargetConfig]) -> TargetConfig:
    """Return the target from what Hydra composed. Raise UserError, and OmegaConf's own errors."""
    merged = OmegaConf.merge({"target": OmegaConf.structured(schema)}, composed)
    target = OmegaConf.to_object(merged.target)
    assert isinstance(target, TargetConfig)
    return target


def check_target(target: TargetConfig) -> None:
    """Raise UserError for a target's setting that is not allowed, or two that don't go together."""
    for key, value, limits in settings.walk(target, "target."):
        settings.check(key, value, limits)
    if not re.fullmatch(r"[a-z][a-z0-9-]{1,18}[a-z0-9]", target.project):
        raise UserError(
            f"target.project={target.project} is not allowed; "
            "allowed: 3 to 20 lower-case letters, digits and -, beginning with a letter"
        )
    for key in target.given_tags:
        if key.lower() in map(str.lower, OURS):  # as IAM compares them
            raise UserError(
                f"target.tags={target.tags}: the tag {key} is Packhorse's own; leave it out"
            )
    targets()[target.name].check(target)


def account_of(target: TargetConfig) -> Aws:
    """Return the account and region that a target names."""
    return Aws(target.project, target.region, target.bucket)


def aws_of(overrides: Sequence[str]) -> Aws:
    """Return the account and region that overrides of the target name. Raise UserError."""
    target = load_target(overrides)
    return account_of(target)


def load_config(
    target: TargetConfig, overrides: Sequence[str], data: Path | None = None
) -> tuple[Config, str | None]:
    """Return the trainer's settings as the job has them, and the pictures' name in the bucket.

    The name is None where the job writes the pictures itself. data: the folder to upload, if given.
    Raise UserError.
    """
    composed = copy.deepcopy(resolved(target, overrides, data).composed)
    weights = weights_name(weights_folder(target, overrides, data))
    if weights is not None:
        composed.model.weights_dir = targets()[target.name].weights_root(weights)
    if composed.data.source != "folder":
        if data is not None:
            raise UserError(
                f"--data {data}: these pictures would not be used, since "
                f"data={composed.data.source}; give data=folder"
            )
        return settings.load(composed), None
    if data is None and OmegaConf.is_missing(composed.data, "root"):
        raise UserError(
            "data.root has no value: give --data DIR to upload a folder of pictures, "
            "or data.root=NAME of one that is in the bucket"
        )
    for split in ("train", "valid", "test"):
        if composed.data[split] is not None:
            raise UserError(
                f"data.{split}={composed.data[split]}: a job finds its pictures in one folder; "
                "allowed: train, valid and test in --data DIR"
            )
    if composed.data.labels is not None:
        _check_table(expanded(composed.data.labels), data)
    name = given_name(str(composed.data.root)) if data is None else pictures_name(data)
    composed.data.root = targets()[target.name].data_root(name)
    return settings.load(composed), name


def given_name(root: str) -> str:
    """Return the pictures that data.root names: s3://BUCKET/PREFIX, else a name in our bucket.

    Raise UserError for an s3:// address of another form.
    """
    if not root.startswith(S3):
        return fit(Path(expanded(root)).name, RUN)
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/\0]+)+/?", root):
        raise UserError(
            f"data.root={root} is not allowed; allowed: s3://BUCKET/PREFIX, below which train, "
            "valid and test lie"
        )
    return root.rstrip("/")


def resolved(target: TargetConfig, overrides: Sequence[str], data: Path | None = None) -> Resolved:
    """Return what the user's overrides of the trainer mean for the job.

    --data (`data`) counts as one of them: it names a folder as data.root does. Callers share the
    result: don't change it. Raise UserError.
    """
    return _resolved(target.name, tuple(overrides), data)


@functools.cache
def _resolved(target: str, overrides: tuple[str, ...], data: Path | None) -> Resolved:
    kind = targets()[target]
    with explained(settings.keys()):
        settings.register()
        words = [*kind.fixed(overrides), f"platform={kind.platform}"]
        if data:
            words.append(override("data.root", str(data)))
        return resolve(words)


OWN = "own"  # the folder of the user's own files in the source tarball
CODE, LABELS = "model.code", "data.labels"  # settings that may name the user's code


def carried(overrides: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Return the overrides as a job has them, and the files of the user's own code to send.

    The files go into the source tarball, by their names there: a file under its content's digest, a
    module under its own name. A path that doesn't exist here is the job's own. Raise UserError.
    """
    words: list[str] = []
    files: dict[str, Path] = {}
    for word in overrides:
        key, _, said = word.partition("=")
        path = expanded(said.strip("'\""))
        # The value may be any text, even one that is too long for a path.
        setting, is_file = key.lstrip("+"), os.path.isfile(path)  # noqa: PTH113
        if setting == CODE and is_file:
            name = f"{OWN}/{own_code.find(setting, path).digest[:DIGEST]}.py"
            files[name] = Path(path)
            word = override(key, name)
        elif setting in (CODE, LABELS) and not is_file and own_code.is_named(path):
            code = own_code.find(setting, path)
            files |= code.files
            word = override(key, str(code.name))
        words.append(word)
    return tuple(words), files


def weights_folder(
    target: TargetConfig, overrides: Sequence[str], data: Path | None = None
) -> Path | None:
    """Return the folder of weights to send to the job: model.weights_dir on this machine.

    None where none is given, or it is the job's own path. Raise UserError.
    """
    given = resolved(target, overrides, data).composed.model.weights_dir
    if given is None or str(given).startswith("/opt/"):
        return None
    folder = Path(expanded(str(given)))
    if not folder.is_dir():
        raise UserError(f"model.weights_dir={given}: there is no such folder")
    return folder


def weights_name(folder: Path | None) -> str | None:
    """Return the name of a folder of weights in the bucket: data/NAME/, as for pictures."""
    return None if folder is None else pictures_name(folder)


def only_here(config: Config, folder: str) -> list[tuple[str, str]]:
    """Return the settings that name weights on this machine, which a job would not find.

    Each as it was given, and as to give it if the weights lie in the folder of pictures, which the
    job has as `folder`.
    """
    named = {
        "model.weights": config.model.weights,
        "model.weights_dir": config.model.weights_dir,
        "train.parent": config.train.parent,
    }
    return [
        (f"{key}={place}", shlex.quote(f"{key}={folder}/{Path(place).name}"))
        for key, place in named.items()
        if place and Path(place).exists() and not place.startswith("/opt/")
    ]


def _check_table(labels: str, data: Path | None) -> None:
    """Raise UserError unless data.labels is the table's path inside the folder of pictures.

    It may also name a module, which is sent as code is.
    """
    if not Path(labels).is_file() and own_code.is_named(labels):
        return
    inside = Path(labels)
    if not inside.is_absolute() and (data is None or (data / inside).is_file()):
        return
    path = inside.name
    if data is not None and inside.resolve().is_relative_to(data.resolve()):
        path = str(inside.resolve().relative_to(data.resolve()))
    raise UserError(
        f"data.labels={labels}: a job finds its table of labels among the pictures; put it into "
        f"{data or 'their folder'}, and give its path in there: data.labels={path}"
    )


def pictures_name(folder: Path) -> str:
    """Return the name of a folder's pictures in the bucket: data/NAME/.

    It is the folder's own name, for people, and a digest of its content. Raise UserError.
    """
    return f"{fit(folder.resolve().name, RUN - DIGEST - 1)}-{s3.digest(folder)[:DIGEST]}"


def run_id(target: TargetConfig, config: Config, data: str | None, overrides: Sequence[str]) -> str:
    """Return the id of the run, so that the same command finds it again."""
    root = f"/{target.name}/{data or config.data.source}"  # a made-up path
    placed = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))
    return targets()[target.name].run_id(config, placed, overrides)


def words_of(spec: Spec) -> dict[str, Any]:
    """Return what a spec was made from, as JSON can hold it: `noted_spec` makes it again."""
    plain = ("overrides", "data", "source", "revision", "extras", "weights", "wheels")
    return {"target": dataclasses.asdict(spec.target)} | {
        name: getattr(spec, name) for name in plain
    }


def noted_spec(aws: Aws, attempt: Attempt) -> Spec:
    """Return the spec of a noted attempt; the folder that it came from is not needed.

    Raise UserError for the note of an earlier version.
    """
    words = attempt.words
    if not words:
        raise UserError(
            f"{attempt.run}: an earlier version of Packhorse submitted it, and did not note its "
            "settings; start the submit with all its settings again"
        )
    target = targets()[attempt.target].config(**words["target"])
    overrides = tuple(words["overrides"])
    placed = overrides
    if words["data"] is not None:  # the pictures are in the bucket, wherever they came from
        placed = (*overrides, f"data.root={words['data']}")
    if words["weights"] is not None:
        folder = targets()[attempt.target].weights_root(words["weights"])
        placed = (*placed, f"model.weights_dir={folder}")
    config, _ = load_config(target, placed)
    return Spec(
        target=target,
        config=config,
        overrides=overrides,
        run=attempt.run,
        account=aws.account,
        region=aws.region,
        data=words["data"],
        source=words["source"],
        revision=words["revision"],
        extras=tuple(words["extras"]),
        weights=words["weights"],
        wheels=words.get("wheels"),  # an attempt of an earlier version has none
    )


def choose(
    aws: Aws, arguments: Sequence[str], is_meant: Callable[[Noted], bool] | None = None
) -> Attempt:
    """Return the newest attempt at the run that the arguments name.

    They give the run's id, or the overrides that it was submitted with. Without either it is the
    one run for which `is_meant` is true, or the newest where it is true for none. Raise UserError
    where there is no run, or `is_meant` is true for several.
    """
    names = [argument for argument in arguments if "=" not in argument]
    ours, overrides = split_overrides([argument for argument in arguments if "=" in argument])
    if len(names) > 1 or (names and overrides):
        raise UserError(
            f"{' '.join(arguments)}: more than one run; "
            "give the id of one run, or the overrides it was submitted with"
        )
    if names:
        run = names[0]
    elif overrides or names_target(ours):
        target = load_target(ours)
        overrides, _ = carried(overrides)
        config, data = load_config(target, overrides)
        run = run_id(target, config, data, overrides)
    else:
        every = notes.every(aws)
        if not every:
            raise UserError(
                f"s3://{aws.bucket}/runs: no run was ever submitted; "
                "begin with: python -m launch plan"
            )
        newest = {each.attempt.run: each for each in every}.values()
        meant = [each for each in newest if is_meant is not None and is_meant(each)]
        if len(meant) > 1:
            runs = ", ".join(each.attempt.run for each in meant)
            raise UserError(f"{len(meant)} runs are active: {runs}; name one of them")
        run = max((each.attempt for each in meant or newest), key=lambda each: each.noted).run
    attempt = notes.latest(aws, run)
    if attempt is None:
        raise UserError(
            f"{run}: there is no such run in s3://{aws.bucket}/runs; "
            "python -m launch status lists them"
        )
    return attempt


@contextmanager
def explained(keys: list[str]) -> Iterator[None]:
    """Raise UserError instead of Hydra's errors."""
    try:
        yield
    except (*CONFIG_ERRORS, OmegaConfBaseException) as error:
        raise UserError(explain(error, keys)) from error
