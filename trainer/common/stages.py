"""Where a command's time goes: each second belongs to one stage, so the stages add up to it all.

Standard library only.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainer.common.console import log

START = "start"  # what belongs to no other stage: Python itself, imports, building the network
LONGEST_START = 600.0  # seconds; a longer step means that the clock was stopped or changed


_begun: list[float] = []  # time.monotonic of the last `begin`


class Stages:
    """The seconds of each stage, in the order in which they began.

    A stage within another belongs to the outer one. A run that was interrupted has several starts,
    each a process of its own; what the earlier ones took counts too (`go_on_from`).
    """

    def __init__(self, before: float = 0.0) -> None:
        """before: seconds that were spent when this began."""
        # Seconds by stage, the one that runs, and since when: replaced as one, since another
        # thread, which writes checkpoints, reads it.
        self._state: tuple[Mapping[str, float], str, float]
        self._state = {START: before}, START, time.monotonic()
        self.starts = 1
        self._earlier: Mapping[str, float] = {}

    def go_on_from(self, earlier: Mapping[str, float], starts: int) -> None:
        """Count what `starts` earlier processes of the same work took, in seconds by stage."""
        self._earlier, self.starts = earlier, starts + 1

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time of this context as that of a stage."""
        if self._state[1] != START:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            log.debug("%s: %.1f s", name, self._enter(START))

    def _enter(self, name: str) -> float:
        """Let another stage run; return the seconds that the one until now has taken."""
        now, (_, ended, _) = time.monotonic(), self._state
        spent = self._until(now)
        self._state = spent, name, now
        return spent[ended]

    def _until(self, now: float) -> dict[str, float]:
        spent, running, since = self._state
        return {**spent, running: spent.get(running, 0.0) + now - since}

    def seconds(self) -> dict[str, float]:
        """Return this process's seconds of each stage until now.

        Their sum is all the time there was.
        """
        return self._until(time.monotonic())

    def in_all(self) -> dict[str, float]:
        """Return the seconds of each stage until now, of all starts together."""
        spent = self.seconds()
        names = dict.fromkeys([*spent, *self._earlier])
        return {name: spent.get(name, 0.0) + self._earlier.get(name, 0.0) for name in names}


def cost(seconds: float, dollars_hour: float | None) -> float | None:
    """Return the dollars for machines that work so long; None where their price isn't known."""
    if dollars_hour is None:
        return None
    return seconds * dollars_hour / 3600


def begin() -> None:
    """Let the time count from now on: this process does one work after another."""
    _begun[:] = [time.monotonic()]


def since_start() -> float:
    """Return the seconds since `begin`, or else since this process began.

    That is known on Linux; elsewhere 0.
    """
    if _begun:
        return time.monotonic() - _begun[0]
    try:
        text = Path("/proc/self/stat").read_text()
        # The 22nd field, counted behind the name, which may hold spaces: clock ticks since boot.
        began = int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        spent = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    if not 0 <= spent < LONGEST_START:
        return 0.0
    return spent
