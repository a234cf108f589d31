"""The thread in which a process of a job says that it lives, and listens to the others.

They talk through torchrun's store.
"""

import json
import os
import re
import threading
import time
from typing import Any

from trainer.common.interrupt import Stop
from trainer.common.text import listed
from trainer.distributed.world import ExitNotice

BEAT = 1.0  # seconds between two signs of life
BROKEN = 3  # times in a row that the connection to the store is closed: PyTorch makes no new one
SILENT = 3 * BEAT  # without one for so long, a process is the likely cause of a failed exchange


class Heartbeat(threading.Thread):
    """Says that this process lives, how often it has come to a barrier, and why it ends.

    Whatever may block on a broken network happens in this thread. The main one only reads what was
    heard last.
    """

    def __init__(self, store: Any, rank: int, size: int, who: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._rank, self._parent = store.clone(), rank, os.getppid()
        self._others = [other for other in range(size) if other != rank]
        self._heard: dict[int, dict[str, Any]] = {}
        self._raw: dict[int, bytes] = {}
        # When something new was heard last.
        self._at = dict.fromkeys(self._others, time.monotonic())
        self._contact = time.monotonic()  # when the store answered last
        self._failures = 0  # since then, of a connection that is closed
        self.listened = threading.Event()  # once: what was said before this process came
        self._mine: dict[str, Any] = {
            "who": who,
            "beat": 0,
            "barriers": 0,
            "notice": None,
            "heard": [],
            "done": False,
        }
        self._told: list[int] = []  # whose notices the others know to have been heard here
        self._wake, self._quick = threading.Event(), False
        self.stop: Stop | None = None  # asked when torchrun has gone

    def watch(self) -> None:
        """Start, once."""
        if self.ident is None:
            self.start()

    def end(self) -> None:
        """Say that all is done, and stop."""
        self._mine["done"] = True
        self._wake.set()
        self.join(SILENT)

    def run(self) -> None:
        """Say and listen once a second, until `end`."""
        done = False
        while not done:
            self._mine["beat"] += 1
            done = self._mine["done"]
            heard = self._mine["heard"]
            try:
                self._store.set(f"heartbeat/{self._rank}", json.dumps(self._mine))
                self._told = heard
                self._listen()
                self._contact, self._failures = time.monotonic(), 0
                self.listened.set()
            except RuntimeError as error:  # torch's DistError; what follows from it is `missing`
                if re.search("closed|reset|broken pipe", str(error), re.IGNORECASE):
                    self._failures += 1
                self._wake.wait(BEAT)
            if os.getppid() != self._parent and self.stop is not None:
                self.stop.ask("the end of torchrun")
            if not done:
                self._wake.wait(0.02 if self._quick else BEAT)
                self._wake.clear()

    def _listen(self) -> None:
        known = [
            other
            for other in self._others
            if other in self._raw or self._store.check([f"heartbeat/{other}"])
        ]
        if not known:
            return
        beats = self._store.multi_get([f"heartbeat/{other}" for other in known])
        for other, raw in zip(known, beats, strict=True):
            if raw != self._raw.get(other):
                self._raw[other], self._at[other] = raw, time.monotonic()
                self._heard[other] = json.loads(raw)
        self._mine["heard"] = [other for other in known if self._heard[other]["notice"]]

    def enter_barrier(self) -> None:
        """Say that this process has come to the next barrier."""
        self._mine["barriers"] += 1
        self._quick = True
        self._wake.set()

    def barrier_is_full(self) -> bool:
        """Return whether all others have come to the barrier too."""
        everybody = all(map(self._is_in_barrier, self._others))
        self._quick = self._quick and not everybody
        return everybody

    def outside_barrier(self) -> str:
        """Return who has not come to the barrier."""
        late = [other for other in self._others if not self._is_in_barrier(other)]
        return listed(map(self._called, late), 4)

    def _is_in_barrier(self, other: int) -> bool:
        return other in self._heard and self._heard[other]["barriers"] >= self._mine["barriers"]

    def say(self, notice: ExitNotice, seconds: float) -> None:
        """Say why this process ends. Return when all others have heard it, or seem to be deaf.

        Who ends too need not hear it, but that rank 0, whose store it is, ends last. seconds: for
        which those are waited for that live, or have not been heard yet.
        """
        self._mine["notice"] = vars(notice)
        self._quick = True
        self._wake.set()
        began = time.monotonic()

        def waits_for(other: int) -> bool:
            now = time.monotonic()
            if self._has_heard_me(other) or self._is_done(other) or now > began + seconds:
                return False
            if self._failures >= BROKEN or (self._rank != 0 and other in self._told):
                return False
            return other not in self._heard or now < max(began, self._at[other]) + SILENT

        while any(map(waits_for, self._others)):
            time.sleep(0.01)

    def _has_heard_me(self, other: int) -> bool:
        return other in self._heard and self._rank in self._heard[other]["heard"]

    def notices(self, below: int | None = None) -> list[ExitNotice]:
        """Return those of the processes that have ended. below: of ranks below this one only."""
        ranks = [other for other in sorted(self._heard) if below is None or other < below]
        notices = [self._heard[other]["notice"] for other in ranks]
        return [ExitNotice(**notice) for notice in notices if notice]

    def missing(self, seconds: float) -> str | None:
        """Return who has given no sign for so long; None where nobody is missing."""
        now = time.monotonic()
        if now - self._contact > seconds or self._failures >= BROKEN:
            return "the host of rank 0 no longer answers: it, or the network to it, is down"
        silent = [
            other
            for other in self._others
            if now - self._at[other] > seconds and not self._is_done(other)
        ]
        if not silent:
            return None
        names = listed(map(self._called, silent), 4)
        return f"{names} no longer answers: killed, hanging, or its network is gone"

    def _is_done(self, other: int) -> bool:
        return other in self._heard and self._heard[other]["done"]

    def _called(self, other: int) -> str:
        if other in self._heard:
            return str(self._heard[other]["who"])
        return f"rank {other}"
