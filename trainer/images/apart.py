"""Decodes images in a process of its own, which the system ends when it has computed for too long.

That is for formats whose decoding can't be bounded by counting: Python can't stop a decoder in a
thread. A thread's process lives as long as the thread. Its time is the processor's:
a busy machine loses no image. A crash of the decoder costs the image, not the run.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.common import sessions
from trainer.images import decode

MEMORY = 256 << 20  # bytes for the decoder's own threads and tables
SECONDS = 8  # of processor time for one image; one of 48 megapixels takes 2
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}

_of_thread = threading.local()


class _Decoder:
    """A process that decodes, and ends with this object."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
        }
        self.process = sessions.Child(
            [*sessions.python(), "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        weakref.finalize(self, _end, self.process)


def shrink(data: bytes, resize: int, interpolation: str, pixels: int) -> NDArray[np.uint8]:
    """Return what `decode.shrink` makes of an image's file: uint8 [H, W, 3].

    pixels: most that it may have. Raise ImageError for what can't be decoded, or not in time,
    MemoryError, and RuntimeError where the process can't work at all.
    """
    process = _process_of_thread()
    assert process.stdin and process.stdout
    asked = {"size": len(data), "resize": resize, "interpolation": interpolation}
    asked |= {"pixels": pixels, "seconds": SECONDS}
    try:
        process.stdin.write(json.dumps(asked).encode() + b"\n" + data)
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        if "shape" in answer:
            height, width, channels = answer["shape"]
            values = bytearray(process.stdout.read(height * width * channels))
            return np.frombuffer(values, np.uint8).reshape(height, width, channels)
    except (BrokenPipeError, ValueError):  # it has closed its ends
        raise _ended(process) from None
    except BaseException:  # interrupted: what it answers later must not be taken for another's
        _end(process)
        raise
    if "reason" in answer:
        raise decode.ImageError(answer["reason"])
    raise MemoryError


def _process_of_thread() -> "subprocess.Popen[bytes]":
    decoder: _Decoder | None = getattr(_of_thread, "decoder", None)
    if decoder is None or decoder.process.returncode is not None:
        decoder = _of_thread.decoder = _Decoder()
    return decoder.process


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin and process.stdout
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()


def _ended(process: "subprocess.Popen[bytes]") -> Exception:
    """Return what it means that the process has ended by itself."""
    code = process.wait()
    _end(process)
    if code == -signal.SIGXCPU:
        return decode.ImageError(f"decoding it takes more than {SECONDS} s")
    if -code in CRASHES:
        return decode.ImageError(f"its decoder crashed ({signal.Signals(-code).name})")
    if code == -signal.SIGKILL:  # the system's last resort
        return MemoryError()
    return RuntimeError(f"the process that decodes ended with code {code}")


def main() -> None:
    """Answer requests from the standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    used = _data()
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        data = sys.stdin.buffer.read(asked["size"])
        _limit(resource.RLIMIT_CPU, ceil(time.process_time()) + asked["seconds"])
        _limit(resource.RLIMIT_DATA, used + MEMORY + decode.BYTES_A_PIXEL * asked["pixels"])
        answer, pixels = _answer(data, asked)
        answers.write(json.dumps(answer).encode() + b"\n" + pixels)
        answers.flush()


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, most))


def _data() -> int:
    """Return the bytes of data that this process has; where Linux doesn't tell, more than any."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        return 1 << 46
    return pages * resource.getpagesize()


def _answer(data: bytes, asked: dict[str, int | str]) -> tuple[dict[str, object], bytes]:
    room = decode.Room(int(asked["pixels"]))
    try:
        shrunk = decode.shrink_here(data, int(asked["resize"]), str(asked["interpolation"]), room)
    except decode.ImageError as error:
        return {"reason": str(error)}, b""
    except MemoryError:
        return {}, b""
    return {"shape": shrunk.shape}, shrunk.tobytes()


if __name__ == "__main__":
    main()
