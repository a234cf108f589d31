"""Each setting's default and meaning (from conf/), type and limits (from config.py)."""

import dataclasses
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings.compose import CONF
from trainer.settings.hydra_errors import unknown_key

# A group's most general option explains its settings; the others explain what they change.
GENERAL = {
    "data": "folder",
    "model": "torchvision",
    "optim": "adamw",
    "platform": "local",
    "sweep": "lists",
}
RUN = "run"  # the section for settings without one
HEAD = (
    "usage: python -m trainer [key=value ...]\n\n"
    "Trains an image classifier on a folder of pictures: python -m trainer data.root=DIR"
)
TAIL = (
    "python -m trainer --help WORD shows the settings of one section, or those with WORD in their "
    "name. --cfg job shows what would run, -m tries several values (docs/sweeps.md). -q shows "
    "warnings and the result alone, -v each metric line and the seconds of each stage."
)


@dataclass(frozen=True)
class Explained:
    """A setting as the page shows it. identity: whether another value makes another run."""

    key: str
    default: str
    allowed: str
    identity: bool
    meaning: str


def trainer_settings() -> dict[str, list[Explained]]:
    """Return the trainer's settings by section, in their order."""
    lines = comments(CONF / "config.yaml", "")
    for group, option in GENERAL.items():
        lines |= comments(CONF / group / f"{option}.yaml", f"{group}.")
    sections: dict[str, list[Explained]] = {}
    for each in explained(settings.Config, "", lines):
        section = RUN
        if "." in each.key:
            section = each.key.split(".")[0]
        sections.setdefault(section, []).append(each)
    return sections


def explained(
    schema: Any, prefix: str, lines: Mapping[str, tuple[str, str]]
) -> Iterator[Explained]:
    """Yield the settings of a dataclass. lines: their defaults and meanings, by dotted key."""
    for key, entry in _walk(schema, prefix):
        default, meaning = lines.get(key, ("", ""))
        yield Explained(key, default, _allowed(entry), bool(entry.metadata["identity"]), meaning)


def options(group: str) -> list[str]:
    """Return a config group's options; nothing if there is no such group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def page(word: str | None = None) -> str:
    """Return the page of --help. word: a section, or a part of keys. Raise UserError for none."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    blocks: list[str] = []
    everything = trainer_settings()
    for section, entries in everything.items():
        shown = [each for each in entries if word in (None, section) or word in each.key]
        if not shown:
            continue
        title = section
        if names := options(section):
            title += f"={'|'.join(names)}"
        blocks.append("\n".join([title, *(_entry(each, width) for each in shown)]))
    if not blocks:
        keys = [each.key for entries in everything.values() for each in entries]
        raise UserError(unknown_key(str(word), keys))
    if word is None:
        blocks = [HEAD, *blocks, textwrap.fill(TAIL, width)]
    return "\n\n".join(blocks)


def _entry(each: Explained, width: int) -> str:
    indent = " " * 6
    facts = f"  {each.key}={each.default}   ({each.allowed.replace('`', '')})"
    lines = textwrap.wrap(facts, width, subsequent_indent=indent, break_on_hyphens=False)
    meaning = textwrap.wrap(
        each.meaning, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return "\n".join([*lines, *meaning])


def comments(path: Path, prefix: str) -> dict[str, tuple[str, str]]:
    """Return the default and the comment of each key in a YAML file of two levels."""
    found: dict[str, tuple[str, str]] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"( *)(\w+):(?: +(.*?))?(?: +# (.*))?", line)
        if not match:
            continue
        indent, key, value, comment = match.groups()
        if not indent:
            section = ""
        if value is None:
            section = f"{key}."
        elif comment:
            inside = ""
            if indent:
                inside = section
            found[f"{prefix}{inside}{key}"] = (value, comment)
    return found


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield every setting below a dataclass, as (dotted key, field)."""
    for entry in dataclasses.fields(node):
        if dataclasses.is_dataclass(entry.type):
            yield from _walk(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry


def _allowed(entry: Any) -> str:
    """Return the type and the limits of a setting, in words."""
    limits = entry.metadata
    names = [_type_name(kind) for kind in _kinds(entry)]
    choices = [f"`{choice}`" for choice in limits["choices"]]
    if choices and "null" in names:
        choices.append("null")
    if limits["path"]:
        names[names.index("str")] = "path"
    words = [", ".join(choices) or " or ".join(names)]
    for name in ("above", "at_least", "below", "at_most"):
        if limits[name] is not None:
            words.append(f"{name.replace('_', ' ')} {_written(limits[name])}")
    if limits["length"]:
        words.append(f"{limits['length']} values")
    if limits["only_if"]:
        words.append(f"with `{limits['only_if']}`".replace("|", " or "))
    return ", ".join(words)


def _kinds(entry: Any) -> tuple[Any, ...]:
    if isinstance(entry.type, types.UnionType):
        return get_args(entry.type)
    return (entry.type,)


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if get_args(kind):
        return str(kind)
    return str(getattr(kind, "__name__", "list"))


def _written(limit: float) -> str:
    if isinstance(limit, int):
        return str(limit)
    return f"{limit:g}"
