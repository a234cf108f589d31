"""`python -m tests.reference` writes docs/configuration.md.

Each setting, its default and meaning (conf/), its type and limits (dataclasses).
"""

import dataclasses
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from launch.targets.base import targets
from trainer.settings import config as settings

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "configuration.md"
HEAD = """# Configuration

Written by `make docs` from `conf/` and the dataclasses beside the code; not edited by hand.
Settings of the trainer are given as `key=value`: `python -m trainer optim.lr=1e-3`; options of a
group by its name: `model=resnet50`. "Same run" says whether a run that was interrupted may go on
with another value: where it may not, another value is another run.
"""
# A group's settings are explained in its most general option; the others say what they change.
GENERAL = {
    "data": "folder",
    "model": "torchvision",
    "optim": "adamw",
    "platform": "local",
    "sweep": "lists",
}
TARGETS = ("ec2", "sagemaker", "sagemaker_multi", "tuner", "notebook")


def page() -> str:
    lines = explained(PROJECT / "conf/config.yaml", "")
    for group, option in GENERAL.items():
        lines |= explained(PROJECT / f"conf/{group}/{option}.yaml", f"{group}.")
    limits = dict(walk(settings.Config, ""))
    sections: dict[str, list[str]] = {}
    for key, entry in limits.items():
        default, meaning = lines.get(key, ("", ""))
        assert meaning, f"conf/ explains no {key}"
        same = "yes" if not entry.metadata["identity"] else "no"
        sections.setdefault(key.split(".")[0] if "." in key else "run", []).append(
            row(key, default, allowed(entry), same, meaning)
        )
    parts = [HEAD]
    for name, rows in sections.items():
        options = sorted(path.stem for path in (PROJECT / "conf" / name).glob("*.yaml"))
        choice = (
            f"\n`{name}=` one of: {', '.join(f'`{option}`' for option in options)}. "
            f"Defaults below are those of `{GENERAL[name]}`.\n"
            if options
            else ""
        )
        parts.append(
            f"## {name}\n{choice}\n{head('key', 'default', 'allowed', 'same run', 'meaning')}\n"
            + "\n".join(rows)
            + "\n"
        )
    parts.append(
        "# Targets\n\nOf `python -m launch VERB target=NAME`: "
        f"{', '.join(f'`{name}`' for name in TARGETS)}.\n"
    )
    for name in TARGETS:
        entries = dict(walk(targets()[name].config, "target."))
        above = (
            explained(PROJECT / "conf/target/sagemaker.yaml", "target.")
            if name in ("sagemaker_multi", "tuner")
            else {}
        )
        lines = above | explained(PROJECT / f"conf/target/{name}.yaml", "target.")
        rows = [
            row(key, lines[key][0], allowed(entry), None, lines[key][1])
            for key, entry in entries.items()
            if key != "target.name"
        ]
        parts.append(
            f"## target={name}\n\n{head('key', 'default', 'allowed', 'meaning')}\n"
            + "\n".join(rows)
            + "\n"
        )
    return "\n".join(parts)


def explained(path: Path, prefix: str) -> dict[str, tuple[str, str]]:
    """The default and the comment of each key in a YAML file of two levels."""
    explanations, section = {}, ""
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"( *)(\w+):(?: +(.*?))?(?: +# (.*))?", line):
            indent, key, value, comment = match.groups()
            section = "" if not indent else section
            if value is None:
                section = f"{key}."
            elif comment:
                explanations[f"{prefix}{section if indent else ''}{key}"] = (value, comment)
    return explanations


def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every setting below a dataclass, as (dotted key, field)."""
    for entry in dataclasses.fields(node):
        if dataclasses.is_dataclass(entry.type):
            yield from walk(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry


def allowed(entry: Any) -> str:
    """The type and the limits of a setting, in words."""
    limits = entry.metadata
    kinds = get_args(entry.type) if isinstance(entry.type, types.UnionType) else (entry.type,)
    names = [
        "null"
        if kind is type(None)
        else getattr(kind, "__name__", "list")
        if not get_args(kind)
        else str(kind)
        for kind in kinds
    ]
    choices = [f"`{choice}`" for choice in limits["choices"]]
    if choices and "null" in names:
        choices.append("null")
    if limits["path"]:
        names[names.index("str")] = "path"
    words = [", ".join(choices) or " or ".join(names)]
    words += [
        f"{name.replace('_', ' ')} {written(limits[name])}"
        for name in ("above", "at_least", "below", "at_most")
        if limits[name] is not None
    ]
    words += [f"{limits['length']} values"] if limits["length"] else []
    words += [f"with `{limits['only_if']}`".replace("|", " or ")] if limits["only_if"] else []
    return ", ".join(words)


def written(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |"


def row(key: str, default: str, limits: str, same: str | None, meaning: str) -> str:
    cells = [f"`{key}`", f"`{default}`", limits, *([same] if same else []), meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
