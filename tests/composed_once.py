"""Hydra composes the same options of groups (data=..., model=...) once in a process, and its forks.

That takes 50 ms, and the tests ask for it thousands of times. Which files Hydra merges depends on
these options alone. The values of a command line (KEY=VALUE) are then set by Hydra's own code.
"""

import os
import pickle
import re
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

HYDRAS_OWN = ConfigLoaderImpl._load_configuration_impl
OPTION = re.compile(r"\w+=\w+")
VALUE = re.compile(r"(?!hydra\b)[a-z]\w*(\.\w+)*=.*", re.DOTALL)  # nothing is added or deleted
KNOWN: dict[tuple[object, ...], bytes] = {}  # what Hydra has composed, pickled


def compose_once() -> None:
    """Let `hydra.compose` remember what options make of the files of conf.

    What a result says of its own command line (`hydra.overrides`) is not right, nor read.
    """

    def load(self: ConfigLoaderImpl, overrides: list[str], **how: Any) -> DictConfig:
        try:
            return quickly(self, overrides, how)
        except Exception:  # Hydra does the rest, and says what is wrong
            return HYDRAS_OWN(self, overrides=overrides, **how)

    def quickly(self: ConfigLoaderImpl, overrides: list[str], how: dict[str, Any]) -> DictConfig:
        places = self.config_search_path.get_path()
        [path] = [each.path for each in places if each.provider == "main"]
        conf = Path(path.removeprefix("file://"))
        options, values = [], []
        for word in overrides:
            of_group = (conf / word.partition("=")[0]).is_dir()
            (options if of_group else values).append(word)
            if not (OPTION if of_group else VALUE).fullmatch(word):
                raise ValueError(word)
        files = [
            (each.relative_to(conf), each.read_bytes()) for each in sorted(conf.rglob("*.yaml"))
        ]
        # Where no platform is given, this variable decides.
        key = (*how.items(), *options, *files, "SM_MODEL_DIR" in os.environ)
        if key not in KNOWN:
            KNOWN[key] = pickle.dumps(HYDRAS_OWN(self, overrides=options, **how))
        composed: DictConfig = pickle.loads(KNOWN[key])
        parsed = OverridesParser.create().parse_overrides(values)
        if any(each.is_sweep_override() for each in parsed):
            raise ValueError(values)
        self._apply_overrides_to_config(parsed, composed)
        return composed

    ConfigLoaderImpl._load_configuration_impl = load  # type: ignore[method-assign, assignment]
