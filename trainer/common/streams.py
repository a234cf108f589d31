"""Standard output and standard error that may go away with a closed terminal or an unread pipe.

Standard library only.
"""

import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Errors of a write to a terminal, pipe or socket whose other end is closed.
GONE = frozenset(
    {
        errno.EPIPE,
        errno.EIO,
        errno.EBADF,
        errno.ENXIO,
        errno.ENODEV,
        errno.ECONNRESET,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
    }
)
# Errors of a write to a file that can't grow. They count where the output is the result.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class _Raw(io.FileIO):
    """The lowest layer of a stream. Once a write fails, all later output is discarded."""

    def __init__(self, stream: TextIO, dropped: frozenset[int]) -> None:
        super().__init__(stream.fileno(), "wb", closefd=False)
        self.name = stream.name
        self.gone = False
        self._dropped = dropped

    def write(self, data: "ReadableBuffer") -> int:
        try:
            written = super().write(data)
            while written is None:  # someone has made it non-blocking
                select.select([], [self], [])
                written = super().write(data)
            return written
        except OSError as error:
            if error.errno not in self._dropped:
                raise
            # The descriptor itself is replaced: C code and child processes write to it too.
            _lead_nowhere(self.fileno())
            self.gone = True
            return memoryview(data).nbytes


def outlive(expendable: bool = False) -> None:
    """Let this process outlive its standard output and standard error, each by itself.

    expendable: whether a full disk may lose the output too; a run has its own log. Calling this
    again changes nothing, and keeps streams that somebody else has put in their place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # started with it closed: the next file to be opened would take its number
            _lead_nowhere(number)
    dropped = GONE
    if expendable:
        dropped |= FULL
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout = _lasting(sys.stdout, sys.__stdout__, dropped)
    sys.stderr = _lasting(sys.stderr, sys.__stderr__, dropped)


def gone(stream: TextIO) -> bool:
    """Return whether a write has failed, so that nobody sees the output any more."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return isinstance(raw, _Raw) and raw.gone


def _lasting(stream: TextIO | None, original: TextIO | None, dropped: frozenset[int]) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w")
    if stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(stream, dropped)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a name may be no text, or none that this terminal can show
        line_buffering=stream.line_buffering or stream.write_through,
        write_through=stream.write_through,
    )


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)
