"""Real runs in which one call to the system fails, at every place in turn, against one undisturbed.

`make faults` (COUNT=200 SEED=0) runs python -m tests.faults --count 200 --seed 0. `faults.c` stands
between a run and the system: an open, read, write, fsync, rename, flock, mkdir or unlink fails with
EIO, ENOSPC, ESTALE, EINTR or EMFILE, once, or for that file from then on. The run ends as if
nothing had been, or in one line; then the same command goes on to the same bits.
"""

import argparse
import errno
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import PROJECT, make_pictures, start_trainer
from tests.soak import HANG, difference, leftovers, outcome
from trainer.common.errors import MISTAKE, OK, RESUME

KINDS = ("open", "read", "write", "fsync", "rename", "flock", "mkdir", "unlink")  # as in faults.c
ERRORS = (errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EINTR, errno.EMFILE)
SETTINGS = (
    "name=run", "platform=local", "platform.cache=cache", "data=folder", "data.root=pictures",
    "model=small_cnn", "data.size=16", "data.resize=16", "data.workers=0", "train.epochs=2",
    "train.batch_size=8", "train.threads=1", "checkpoint.minutes=1e-9", "checkpoint.max_cost=1",
)  # fmt: skip
VARIANTS = {
    "whole network": (*SETTINGS, "train.tensorboard=true"),
    "frozen backbone": (*SETTINGS, "model.freeze=backbone", "model.cached_views=2"),
}
# Where the self-test of the package fails, in a process of its own: about as often as it reads.
CALLS_OF_SELF_TEST = {"open": 20, "read": 40}


@dataclass(frozen=True)
class Fault:
    """A call that fails. process: of the run's own, or of the self-test's; nth: of its kind."""

    variant: str
    process: str
    kind: str
    nth: int
    error: int
    for_good: bool

    def __str__(self) -> str:
        often = "for good" if self.for_good else "once"
        return (
            f"{self.variant}, {self.process}: {self.kind} {self.nth} fails {often} with "
            f"{errno.errorcode[self.error]}"
        )


@dataclass
class Tally:
    """What was seen. `failures` is empty when all went well."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{sum(self.outcomes.values())} faults, {len(self.failures)} failures"]
        for (kind, error, what), count in sorted(self.outcomes.items()):
            lines.append(f"  {count:4d} {kind:7s} {error:7s} {what}")
        return "\n".join(lines + [f"  FAILED {failure}" for failure in self.failures])


def build(place: Path) -> Path:
    """Compile the library."""
    library, source = place / "faults.so", Path(__file__).with_suffix(".c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def armed(root: Path, fault: Fault | None, counts: str = "") -> dict[str, str]:
    """How to start a trainer in which this fails; None: calls are counted, and none fails."""
    kind, nth, error, lasting = "-", 0, 0, 0
    if fault is not None:
        kind, nth, error, lasting = fault.kind, fault.nth, fault.error, int(fault.for_good)
    if fault is not None and fault.process == "self-test":
        return {"FAULTS": f"{root} {kind} {nth} {error} {lasting}", "before": ""}
    before = (
        "import ctypes\n"
        f"ctypes.CDLL(None).faults_arm({os.fsencode(root)!r}, {kind.encode()!r}, "
        f"ctypes.c_long({nth}), {error}, {lasting}, {os.fsencode(counts)!r})\n"
    )
    return {"before": before}


def run(directory: Path, variant: str, **more: str) -> tuple[int | None, str]:
    """The exit code and what was printed; None where it hung."""
    process = start_trainer(directory, *VARIANTS[variant], **more)
    try:
        output, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        process.kill()
        return None, "it hung"
    return process.returncode, output


class Laboratory:
    """Where the runs lie: one undisturbed a variant, and one a fault."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: dict[str, dict[str, int]] = {}
        make_pictures(root / "pictures", {"train": 8, "valid": 4, "test": 2})
        self.undisturbed = {variant: self._undisturbed(variant) for variant in VARIANTS}

    def _directory(self, name: str) -> Path:
        directory = self.root / name
        directory.mkdir()
        (directory / "pictures").symlink_to(self.root / "pictures")
        return directory

    def _undisturbed(self, variant: str) -> dict[str, object]:
        directory, counts = self._directory(variant), self.root.parent / "counts"
        counts.write_bytes(bytes(8 * len(KINDS)))
        code, output = run(directory, variant, **armed(self.root, None, str(counts)))
        assert code == OK, output
        numbers = struct.unpack(f"{len(KINDS)}Q", counts.read_bytes())
        self.counts[variant] = dict(zip(KINDS, numbers, strict=True))
        print(f"{variant}: {self.counts[variant]}", flush=True)
        return outcome(directory / "runs/run")

    def faults(self, count: int, rng: random.Random) -> list[Fault]:
        """A choice of faults: as many of each kind, error and process, at places by chance."""
        chosen = []
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            error = ERRORS[number // len(KINDS) % len(ERRORS)]
            variant, process = rng.choice(list(VARIANTS)), "run"
            calls = self.counts[variant][kind]
            if kind in CALLS_OF_SELF_TEST and rng.random() < 0.15:
                process, calls = "self-test", CALLS_OF_SELF_TEST[kind]
            # Python tries again by itself what a signal has interrupted: for good is for ever.
            for_good = error != errno.EINTR and rng.random() < 0.5
            nth = rng.randint(1, calls)
            chosen.append(Fault(variant, process, kind, nth, error, for_good))
        return chosen

    def try_out(self, fault: Fault, tally: Tally) -> None:
        """Have it happen to a run, and look at what comes of it."""
        directory = self._directory("disturbed")
        told = self.root.parent / "told"
        told.unlink(missing_ok=True)
        code, output = run(
            directory,
            fault.variant,
            FAULTS_TOLD=str(told),
            **armed(self.root, fault),
        )
        where = told.read_text() if told.exists() else ""
        said = output
        what = "as if nothing had been"
        if code in (MISTAKE, RESUME):
            what = "one line, then equal"
            last = (output.strip().splitlines() or [""])[-1]
            if not last.startswith(("error: ", "warning: stopped by")):
                tally.failures.append(f"{fault} ({where}): its last line is {last!r}")
            code, output = run(directory, fault.variant)
        faults = []
        if code != OK:
            faults.append(f"exit code {code}")
        log = directory / "runs/run/log.txt"
        if "Traceback" in said + output + (log.read_text() if log.exists() else ""):
            faults.append("a traceback")
        if code == OK:
            if differs := difference(self.undisturbed[fault.variant], outcome(log.parent)):
                faults.append(f"another result: {differs}")
            if left := leftovers(directory / "runs"):
                faults.append(f"left behind {left}")
        if faults:
            shown = f"{said[-2500:]}\n--- then ---\n{output[-1500:]}" if said != output else said
            tally.failures.append(f"{fault} ({where}): {', '.join(faults)}\n{shown[-4000:]}")
        if where:
            tally.outcomes[fault.kind, errno.errorcode[fault.error], what] += 1
        shutil.rmtree(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packhorse-faults-") as place:
        root = Path(place).resolve()
        if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
            own = os.environ | {"LD_PRELOAD": str(build(root))}
            words = ["-m", "tests.faults", *sys.argv[1:]]
            return subprocess.run([sys.executable, *words], env=own, cwd=PROJECT).returncode
        (root / "runs").mkdir()
        laboratory, tally = Laboratory(root / "runs"), Tally()
        started = time.monotonic()
        for number, fault in enumerate(
            laboratory.faults(options.count, random.Random(options.seed)), 1
        ):
            before = len(tally.failures)
            laboratory.try_out(fault, tally)
            seconds = time.monotonic() - started
            print(f"{number} of {options.count}, {seconds:.0f} s: {fault}", flush=True)
            for failure in tally.failures[before:]:
                print(f"FAILED {failure}", flush=True)
    print(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
