"""Lines with a checksum each: damage to a file costs only the damaged lines."""

import json
import zlib
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any

from trainer.common.collector import resting


def lines(values: Iterable[Any]) -> bytes:
    """Return a line for each value, which JSON must be able to hold."""
    return b"".join(_line(json.dumps(value).encode()) for value in values)


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse(data: bytes, *kinds: type | UnionType) -> tuple[list[Any], bool]:
    """Return the values of the undamaged lines, and whether all lines are undamaged.

    kinds: types of the elements of each value, a list. Lines of another file in this one's place
    count as damaged.
    """
    *whole, torn = data.split(b"\n")
    values = []
    with resting():
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
