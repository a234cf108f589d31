"""Lines that each carry their own checksum: damage to a file of them costs the lines it hits."""

import json
import zlib
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any


def lines(values: Iterable[Any]) -> bytes:
    """Return a line for each value, which JSON must be able to hold."""
    return b"".join(_line(json.dumps(value).encode()) for value in values)


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse(data: bytes, *kinds: type | UnionType) -> tuple[list[Any], bool]:
    """Return the values of the lines that are as they were written, and whether all are.

    kinds: of what each value holds, a list: those of another file in this one's place are damage.
    """
    *whole, torn = data.split(b"\n")
    values = []
    for line in whole:
        text = line[9:]
        if _line(text) != line + b"\n":
            continue
        value = json.loads(text)
        if _holds(value, kinds):
            values.append(value)
    return values, not torn and len(values) == len(whole)


def _holds(value: Any, kinds: Sequence[type | UnionType]) -> bool:
    if not isinstance(value, list) or len(value) != len(kinds):
        return False
    return all(isinstance(each, kind) for each, kind in zip(value, kinds, strict=True))
