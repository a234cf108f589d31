"""The thread in which a process of a job tells the others that it lives, and listens to them.

The processes talk through torchrun's store.
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
BROKEN = 3  # failures in a row mean a closed connection to the store: PyTorch never reconnects
SILENT = 3 * BEAT  # a process silent for this long is the likely cause of a failed exchange


class Heartbeat(threading.Thread):
    """Tells the others that this process lives, how many barriers it has reached, and why it ends.

    Every call that a broken network may block happens in this thread. The main thread only reads
    the last messages.
    """

    def __init__(self, store: Any, rank: int, size: int, who: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._rank, self._parent = store.clone(), rank, os.getppid()
        self._others = [other for other in range(size) if other != rank]
        self._heard: dict[int, dict[str, Any]] = {}
        self._raw: dict[int, bytes] = {}
        # When each process last said something new.
        self._at = dict.fromkeys(self._others, time.monotonic())
        self._contact = time.monotonic()  # when the store answered last
        self._failures = 0  # calls since then that found the connection closed
        self.listened = threading.Event()  # set when the earlier messages have been read
        self._mine: dict[str, Any] = {
            "who": who,
            "beat": 0,
            "barriers": 0,
            "notice": None,
            "heard": [],
            "done": False,
        }
        self._told: list[int] = []  # processes whose exit notices this one has confirmed
        self._wake, self._quick = threading.Event(), False
        self.stop: Stop | None = None  # asked when torchrun has gone

    def watch(self) -> None:
        """Start the thread, unless it runs already."""
        if self.ident is None:
            self.start()

    def end(self) -> None:
        """Tell the others that this process is done, and stop the thread."""
        self._mine["done"] = True
        self._wake.set()
        self.join(SILENT)

    def run(self) -> None:
        """Send and read messages once a second, until `end`."""
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
            except RuntimeError as error:  # torch's DistError; `missing` draws the conclusion
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
        """Tell the others that this process has reached the next barrier."""
        self._mine["barriers"] += 1
        self._quick = True
        self._wake.set()

    def barrier_is_full(self) -> bool:
        """Return whether all others have reached the barrier too."""
        everybody = all(map(self._is_in_barrier, self._others))
        self._quick = self._quick and not everybody
        return everybody

    def outside_barrier(self) -> str:
        """Return the names of the processes that have not reached the barrier."""
        late = [other for other in self._others if not self._is_in_barrier(other)]
        return listed(map(self._called, late), 4)

    def _is_in_barrier(self, other: int) -> bool:
        return other in self._heard and self._heard[other]["barriers"] >= self._mine["barriers"]

    def say(self, notice: ExitNotice, seconds: float) -> None:
        """Tell the others why this process ends. Return when all have read it, or seem dead.

        A process that ends itself need not read it. Rank 0 waits all the same: it holds the store,
        so it ends last. seconds: how long to wait for a process that lives, or that has not come.
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
        """Return the exit notices of the processes that have ended. below: of lower ranks only."""
        ranks = [other for other in sorted(self._heard) if below is None or other < below]
        notices = [self._heard[other]["notice"] for other in ranks]
        return [ExitNotice(**notice) for notice in notices if notice]

    def missing(self, seconds: float) -> str | None:
        """Return who has been silent for `seconds`, in words; None where nobody has."""
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
