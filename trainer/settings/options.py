"""The options of a command line: --help, --version, and unknown ones."""

import platform
from collections.abc import Sequence
from importlib import metadata

from hydra._internal.utils import get_args_parser

from trainer import __version__
from trainer.common import console
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings import reference

LEVELS = {
    "-q": console.QUIET,
    "--quiet": console.QUIET,
    "-v": console.VERBOSE,
    "--verbose": console.VERBOSE,
}


def answer(words: Sequence[str]) -> str | None:
    """Return the text for --help or --version; None without them.

    Raise UserError for an unknown option, with the setting that it may mean.
    """
    if {"-h", "--help"} & set(words):
        topics = [word for word in words if not word.startswith("-") and "=" not in word]
        return reference.page(*topics[:1])
    if "--version" in words:
        return versions()
    _check(words)
    return None


def shown(words: Sequence[str]) -> tuple[int, list[str]]:
    """Return the log level for the terminal, from -q and -v, and the other words."""
    level, others = console.USUAL, []
    for word in words:
        if word in LEVELS:
            level = LEVELS[word]
        else:
            others.append(word)
    return level, others


def versions() -> str:
    """Return the versions that a bug report needs, without loading PyTorch."""
    return (
        f"packhorse {__version__}, torch {metadata.version('torch')}, "
        f"Python {platform.python_version()}"
    )


def _check(words: Sequence[str]) -> None:
    """Raise UserError for an option that Hydra does not have."""
    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if not word.startswith("-") or name in known:
            continue
        if not value and place + 1 < len(words) and "=" not in words[place + 1]:
            value = words[place + 1]
        raise UserError(f"{word}: there is no such option; {_meant(name.lstrip('-'), value)}")


def _meant(name: str, value: str) -> str:
    """Return the setting that an option may mean, or where all settings are listed."""
    key = name.replace("-", "_")
    namesakes = [each for each in settings.schema() if key in (each, each.rsplit(".", 1)[-1])]
    if not namesakes:
        return "settings are given as key=value: python -m trainer --help shows them"
    return f"settings are given as key=value: {namesakes[0]}={value or '...'}"
