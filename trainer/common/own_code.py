"""The user's own code: find it by the name in a setting, identify it by its content, load it.

The name may be
    mine.py         a Python file;
    mylib.dogs      a module that Python can import, or mylib.dogs:Focal, an object in it;
    focal           what an installed package offers under this name: an entry point of the group
                    packhorse, which stands for one of the second kind.
Only `load` imports it: nothing else here runs any of it.
"""

import hashlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from trainer.common import files
from trainer.common.errors import PROJECT, UserError

GROUP = "packhorse"  # of entry points
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*)?")


@dataclass(frozen=True)
class OwnCode:
    """Code that a setting names. name: the dotted name of a module; None: it is a file.

    files: the file, or all Python files of the module's package, by their paths relative to a
    folder on Python's path.
    """

    setting: str  # "model.code=mine.py", for messages
    name: str | None
    files: dict[str, Path]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the file; for a package, of its files and their relative paths."""
        contents = {
            place: files.patiently(str(path), path.read_bytes) for place, path in self.files.items()
        }
        if self.name is None:
            return hashlib.sha256(*contents.values()).hexdigest()
        whole = hashlib.sha256()
        for place, content in sorted(contents.items()):
            whole.update(f"{place} {hashlib.sha256(content).hexdigest()}\n".encode())
        return whole.hexdigest()


def find(setting: str, said: str) -> OwnCode:
    """Return the code that `setting` names as `said`. Raise UserError where there is none."""
    shown = f"{setting}={said}"
    for path in (Path(said), PROJECT / said):  # in a job it is among the project's code
        if path.is_file():
            return OwnCode(shown, None, {path.name: path})
    if said.endswith(".py") or not DOTTED.fullmatch(said):
        raise UserError(f"{shown}: there is no such file")
    offered = _offered()
    name = offered.get(said, said)
    top = _top(name)
    spec = _spec(top)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        others = f" ({', '.join(sorted(offered))})" if offered else ""
        raise UserError(
            f"{shown}: there is no such file, no module of that name, and no installed package "
            f"offers it (entry points of the group {GROUP}{others}); docs/python.md says how"
        )
    if spec.submodule_search_locations is None:
        return OwnCode(shown, name, {f"{top}.py": Path(spec.origin)})
    folder = Path(spec.origin).parent
    sources = {path.relative_to(folder): path for path in sorted(folder.rglob("*.py"))}
    return OwnCode(shown, name, {str(Path(top, place)): path for place, path in sources.items()})


def is_named(said: str) -> bool:
    """Return whether Python can import it, or an installed package offers it."""
    if not DOTTED.fullmatch(said):
        return False
    spec = _spec(_top(said))
    return said in _offered() or (spec is not None and spec.origin is not None)


def _offered() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=GROUP)}


def _top(name: str) -> str:
    return re.split(r"[.:]", name)[0]


def _spec(top: str) -> ModuleSpec | None:
    """Return where a module is, without importing it; None: there is none."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


def load(code: OwnCode) -> Any:
    """Return the module or object, imported once. Raise UserError."""
    return _load(code.setting, code.name, *code.files.values(), content=code.digest)


@cache
def _load(setting: str, name: str | None, *paths: Path, content: str) -> Any:
    with told(setting, "import", *paths):
        if name is not None:
            # The part before a colon is a module, never an attribute.
            return pkgutil.resolve_name(name if ":" in name else f"{name}:")
    [path] = paths
    called = f"packhorse_own_{content[:12]}"
    spec = importlib.util.spec_from_file_location(called, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{setting}: not a Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses in it, and pickles of them, look it up
    with told(setting, "import", path):
        spec.loader.exec_module(module)
    return module


class told:  # noqa: N801 (read as a word: with told(...))
    """Turn an error of the user's function into one line, with the line number in their file."""

    def __init__(self, setting: str, function: str, *paths: Path) -> None:
        self._setting, self._function = setting, function
        self._paths = {str(path) for path in paths}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            (frame.filename, frame.lineno) for frame in frames if frame.filename in self._paths
        ]
        if isinstance(error, SyntaxError) and error.filename in self._paths:
            places = [(error.filename, error.lineno)]
        place = ""
        if places:
            file, line = places[-1]
            within = f" of {Path(file).name}" if len(self._paths) > 1 else ""
            place = f", line {line}{within}"
        reason = (str(error) or "no reason given").splitlines()[0]
        raise UserError(
            f"{self._setting}{place}: {self._function}: {type(error).__name__}: {reason}"
        ) from error
