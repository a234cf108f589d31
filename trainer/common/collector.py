"""Python's garbage collector, where it would look at the same objects again and again."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """Let the collector rest where many objects are made that stay.

    It looks at all objects each time that their number has grown by a quarter.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
