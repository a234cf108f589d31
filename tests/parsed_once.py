"""The settings' files are parsed once in a process, and in those that are forked from it.

A quarter of the time in which Hydra composes went into reading the same YAML again.
"""

import os
import pickle
from typing import IO, Any

import yaml

CONF = os.path.sep + "conf" + os.path.sep


def parse_once() -> None:
    """Let `yaml.load` remember what is in files of a folder called conf, as long as they stay."""
    parse = yaml.load
    parsed: dict[tuple[object, ...], bytes] = {}

    def load(stream: str | bytes | IO[Any], Loader: type) -> Any:  # noqa: N803
        name = getattr(stream, "name", None)
        if not isinstance(name, str) or CONF not in name:
            return parse(stream, Loader)
        state = os.fstat(stream.fileno())  # type: ignore[union-attr]
        key = (name, state.st_ino, state.st_mtime_ns, state.st_size, Loader.__name__)
        if key not in parsed:
            parsed[key] = pickle.dumps(parse(stream, Loader))
        return pickle.loads(parsed[key])

    yaml.load = load
