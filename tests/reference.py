"""`python -m tests.reference` writes what docs/ takes from the code: settings, AWS's refusals."""

import re
from pathlib import Path

from launch.cloud.remedies import REFUSALS
from launch.targets.base import targets
from trainer.settings.reference import (
    GENERAL,
    Explained,
    comments,
    explained,
    options,
    trainer_settings,
)

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "configuration.md"
TROUBLESHOOTING = PROJECT / "docs" / "troubleshooting.md"
REFUSED = "## What AWS refuses, by its code\n"
HEAD = """# Configuration

Written by `make docs` from `conf/` and the dataclasses beside the code; not edited by hand.
Give the trainer's settings as `key=value`: `python -m trainer optim.lr=1e-3`, and the option of a
group by the group's name: `model=resnet50`. "Same run: yes": an interrupted run may continue with
another value. "no": another value makes another run.
"""
TARGETS = ("ec2", "sagemaker", "sagemaker_multi", "tuner", "notebook")


def page() -> str:
    parts = [HEAD]
    for name, entries in trainer_settings().items():
        choice = ""
        if names := options(name):
            choice = (
                f"\n`{name}=` one of: {', '.join(f'`{option}`' for option in names)}. "
                f"Defaults below are those of `{GENERAL[name]}`.\n"
            )
        parts.append(
            f"## {name}\n{choice}\n{head('key', 'default', 'allowed', 'same run', 'meaning')}\n"
            + "\n".join(row(each, same="no" if each.identity else "yes") for each in entries)
            + "\n"
        )
    parts.append(
        "# Targets\n\nOf `python -m launch VERB target=NAME`: "
        f"{', '.join(f'`{name}`' for name in TARGETS)}.\n"
    )
    for name in TARGETS:
        lines = {}
        if name in ("sagemaker_multi", "tuner"):
            lines = comments(PROJECT / "conf/target/sagemaker.yaml", "target.")
        lines |= comments(PROJECT / f"conf/target/{name}.yaml", "target.")
        entries = explained(targets()[name].config, "target.", lines)
        rows = [row(each) for each in entries if each.key != "target.name"]
        parts.append(
            f"## target={name}\n\n{head('key', 'default', 'allowed', 'meaning')}\n"
            + "\n".join(rows)
            + "\n"
        )
    return "\n".join(parts)


def head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |"


def row(each: Explained, same: str | None = None) -> str:
    assert each.meaning, f"conf/ explains no {each.key}"
    cells = [f"`{each.key}`", f"`{each.default}`", each.allowed]
    cells += [*([same] if same else []), each.meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def refusals() -> str:
    """Return a section with each refusal of AWS that has a remedy, from the table in the code."""
    rows = []
    for refusal in REFUSALS:
        codes = ", ".join(f"`{code}`" for code in alternatives(refusal.code))
        says = ", ".join(f"`{text}`" for text in alternatives(refusal.says))
        remedy = refusal.remedy.replace("|", chr(92) + "|")
        rows.append(f"| {codes} | {says} | {remedy} |")
    return (
        f"{REFUSED}\nWritten by `make docs` from `launch/cloud/remedies.py`. The first line that "
        "fits counts; where a text is named,\nAWS's message holds one of these. Whoever may not "
        "make a call is told the action, and what prints the policy that allows it.\n\n"
        f"{head('code', 'and says', 'do')}\n" + "\n".join(rows) + "\n"
    )


def alternatives(pattern: str) -> list[str]:
    """Return what a regular expression of the table means, in words: its alternatives."""
    plain = pattern.replace("(?i)", "").replace("(Exception)?", "")
    plain = re.sub(r"\\\.\(([^)]*)\)", lambda found: "." + found[1].replace("|", "/"), plain)
    plain = plain.replace(r"\..*", ".*").replace(" ?", " ").replace(chr(92), "")
    return [each.strip() for each in plain.split("|") if each.strip()]


def troubleshooting() -> str:
    """Return the page of messages, with AWS's refusals at its end."""
    return TROUBLESHOOTING.read_text().partition(REFUSED)[0] + refusals()


if __name__ == "__main__":
    PAGE.write_text(page())
    TROUBLESHOOTING.write_text(troubleshooting())
