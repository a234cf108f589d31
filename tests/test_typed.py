"""What is printed to be typed can be typed: every value in it is quoted for the shell."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT

PROGRAMS = sorted(
    path
    for program in ("trainer", "launch", "serving")
    for path in (PROJECT / program).rglob("*.py")
)
# What makes a word, or a command, that a shell takes for itself.
QUOTED = {"quote", "join", "command", "install_command"}
# A command begins, or somebody is told to give a setting or a flag, whose value comes next.
COMMAND = re.compile(
    r"-m (launch|serving|trainer)\b|(^|[\s(:])make [A-Z-]\S|"
    r"\bexport \w+=|\baws [a-z0-9]+ [a-z-]+ "
)
ADVICE = re.compile(
    r"(?<!-)\b(give|add|set|try|type|deploy)\b[^;:()]*(\s|^)(--[\w-]+[ =]|[\w.\0]*[\w\0]=)$"
)


def unquoted(tree: ast.Module) -> Iterator[int]:
    """Yield the lines where a value is put unquoted into what a person types."""
    programs = {
        id(keyword.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "prog"  # argparse's: a verb
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            after = re.split(r"-m (?:launch|serving|trainer)\b", node.value, maxsplit=1)
            if re.search(r"%[sr]", "".join(after[1:]).split("\n")[0]):
                yield node.lineno
        if not isinstance(node, ast.JoinedStr) or id(node) in programs:
            continue
        if isinstance(node.values[0], ast.Constant) and "usage:" in str(node.values[0].value):
            continue
        before = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                before += str(part.value)
                continue
            assert isinstance(part, ast.FormattedValue)
            clause = re.split(r"[;\n]|\.\s", before)[-1]
            typed = COMMAND.search(clause) or ADVICE.search(clause)
            if typed and not is_quoted(part.value):
                yield part.lineno
            before += "\0"


def is_quoted(value: ast.expr) -> bool:
    if not isinstance(value, ast.Call):
        return False
    name = (
        value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    )
    return name in QUOTED


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_value_in_what_is_to_be_typed_is_quoted(path: Path) -> None:
    lines = sorted(set(unquoted(ast.parse(path.read_text()))))
    assert not lines, f"{path.relative_to(PROJECT)}: {lines}: console.command, or shlex.quote"
