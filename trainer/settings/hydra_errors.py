"""Errors of Hydra and OmegaConf in one line: the key, the value and what is allowed."""

import difflib
import re
import shlex

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

# The exceptions that `explain` is for.
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)


def explain(error: Exception, keys: list[str]) -> str:
    """Return the line for `error`.

    keys: every dotted key of the schema, for what a misspelt one may have meant.
    """
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    text = f"{error}\n{error.__cause__ or ''}"
    several = re.search(r"(?:argument|parameters) '([^'=]+)=(.*)'", text)
    if several:
        return several_values("=".join(several.groups()))
    option = re.search(r"Could not find '(\w+)/([^']*)'", text)
    if option:
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], re.MULTILINE)
        return unknown_option(option[1], option[2], options)
    group = re.search(r"In '[^']*': Could not find '([^']+)'", text)
    if group:
        return f"{group[1]}: there is no such config file or group"
    full_key = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if not unknown and re.search(r"Key '.*' (is )?not in", text):
        unknown = full_key
    if unknown and full_key and full_key[1].startswith(f"{unknown[1]}."):
        unknown = full_key  # inside a dict given for a section
    if unknown:
        return unknown_key(unknown[1], keys)
    if not full_key:
        return " ".join(str(error).split())
    typed = re.search(r"^Error merging override \+*(.*)$", text, re.MULTILINE) or full_key
    # trainer/settings/words.py may have quoted it.
    return _wrong_value(full_key[1], re.sub(r'="(.*)"$', r"=\1", typed[1]), text)


def several_values(word: str) -> str:
    """Return the line for a list of values where one is wanted."""
    return f"{word} are several values: to try each of them, add -m (on AWS: target=tuner)"


def character_of(error: Exception) -> str:
    """Return the text that Hydra's grammar can't read; "this" if it doesn't say."""
    said = str(error).splitlines()
    if said[0].startswith("LexerNoViableAlt") and len(said) > 1:
        return said[0][said[1].find("^")]
    where = re.search(r"(?:input|token) '(.+?)'", said[0])
    if where:
        return where[1]
    return "this"


def _unreadable(error: OverrideParseException) -> str:
    key, equals, value = error.override.partition("=")
    if not equals:
        return f"{error.override}: a setting is given as key=value"
    typed = shlex.quote(f'{key}="{value}"')
    return f"{error.override}: {character_of(error)} can't be read unquoted; give {typed}"


def unknown_option(group: str, name: str, options: list[str]) -> str:
    """Return the line for an unknown option of a config group."""
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    meant, hint = "", ""
    if near:
        meant = f"did you mean {' or '.join(near)}? "
    if group == "model" and name.isidentifier():
        hint = f"; for another torchvision model: model=torchvision model.name={name}"
    if group == "data" and re.search(r"[/~$]", name):
        hint = f"; for pictures of your own: {shlex.quote(f'data.root={name}')}"
    return f"{group}={name}: there is no such option; {meant}allowed: {', '.join(options)}{hint}"


def unknown_key(key: str, keys: list[str]) -> str:
    """Return the line for an unknown setting."""
    last = key.rsplit(".", 1)[-1]
    namesakes = [name for name in keys if name.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.6) or namesakes
    hint = "see python -m trainer --help"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    return f"{key}: there is no such setting; {hint}"


def _wrong_value(key: str, typed: str, text: str) -> str:
    """typed: the override as it was given, where that is known, else the key."""
    if "missing mandatory value" in text.lower():
        return f"{key} has no value: give {key}=..."
    element = re.fullmatch(r"(.*)\[\d+\]", key)
    if element:
        return f"{typed} is of the wrong type; allowed: numbers, such as {element[1]}=[1,2]"
    value = re.search(r"Value '(.*?)'(?: of type '\w+')? could not be converted to (\w+)", text)
    if value:
        return f"{key}={value[1]} is of the wrong type; allowed: {value[2].lower()}"
    value = re.search(r"Value '(.*)' is not a valid bool", text)
    if value:
        return f"{key}={value[1]} is of the wrong type; allowed: boolean, true or false"
    if "not Optional" in text:
        return f"{key}=null is not allowed; allowed: a value"
    if "is not a ListConfig" in text or "List[" in text:
        return f"{typed} is of the wrong type; allowed: a list, such as {key}=[1,2]"
    if "Dict[" in text:
        return f"{typed} is of the wrong type; allowed: values by key, such as {key}={{a: 1}}"
    asides = ("full_key", "object_type", "reference_type")
    reason = next(
        line for line in reversed(text.splitlines()) if line and not line.strip().startswith(asides)
    )
    return f"{typed}: {reason.strip()}"
