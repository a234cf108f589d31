"""The owner of a directory, where the kernel's locks can't say who it is.

Some file systems have no locks (NFS with nolock, Lustre). On some that machines share, a lock holds
on one machine only. There a file names the owner by machine, boot and process, and the owner renews
it while it lives. On the owner's machine, others check its process. Elsewhere they watch whether
the file changes; clocks are not compared, since those of two machines differ.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.common.console import log
from trainer.common.errors import MISTAKE
from trainer.common.objects import parsed

RENEW_EVERY = 2.0  # seconds
DEAD_AFTER = 30.0  # seconds without a sign of life, of an owner on another machine
# File systems that machines share, or a guest and its host, whose locks hold on one of them only.
OF_ONE_MACHINE = ("9p", "virtiofs", "vboxsf", "prl_fs", "fuse.")
LOCAL_OPTIONS = frozenset(
    {"nolock", "localflock", "local_lock=flock", "local_lock=all", "nobrl", "locallocks"}
)
MOUNTS = Path("/proc/self/mountinfo")


def kernel_knows(directory: Path) -> bool:
    """Return whether the kernel's lock there holds on all machines that share the directory."""
    try:
        mounts = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        return True
    place = f"{os.path.realpath(directory)}/"
    best, kind, options = "", "", ""
    for line in mounts:
        # See proc_pid_mountinfo(5): the mount point is the fifth word; behind the hyphen come the
        # type, the source and the options.
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", _character, left.split(" ")[4]).rstrip("/") + "/"
        if place.startswith(point) and len(point) >= len(best):
            best = point
            kind, _, options = right.split(" ")
            options += "," + left.split(" ")[5]
    return not (kind.startswith(OF_ONE_MACHINE) or LOCAL_OPTIONS & set(options.split(",")))


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))


class Claim:
    """One process's claim to what a file stands for.

    undecided: whether the last `take` found an owner and can't say yet whether it lives.
    """

    def __init__(self, path: Path) -> None:
        self.undecided = False
        self._path = path
        self._me = _this_process() | {"token": secrets.token_hex(8)}
        self._beats = 0
        # The last change of other owners' files, by path: text, and when it was first seen.
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self) -> bool:
        """Try to become the owner, without waiting; return whether this process is the owner.

        Replace a dead owner. Raise OSError.
        """
        self.undecided = False
        if self._heart is not None:
            return True
        if not self._created(self._path) and not self._replaced():
            return False
        self.undecided = False
        self._heart = threading.Thread(target=self._renew, name="owner", daemon=True)
        self._heart.start()
        return True

    def release(self) -> None:
        """Release the claim, if this process has it."""
        if self._heart is None:
            return
        self._released.set()
        self._heart.join()
        with suppress(OSError):
            if self._is_mine(self._path.read_bytes()):
                self._path.unlink()

    def _created(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(handle, self._text())
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(handle)
        return True

    def _text(self) -> bytes:
        self._beats += 1
        return json.dumps(self._me | {"beats": f"{self._beats:012d}"}).encode()

    def _replaced(self) -> bool:
        """Replace the owner if it is dead; return whether this process is the owner now."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:  # its owner has just released it
            self.undecided = True
            return False
        alive = self._lives(self._path, text)
        if alive is None:
            self.undecided = True
            return False
        if alive:
            return False
        return self._put_in_place_of(text)

    def _lives(self, path: Path, text: bytes) -> bool | None:
        """Return whether the owner that wrote `text` to `path` lives; None: not known yet."""
        alive = _is_alive(text)
        if alive is not None:
            return alive
        now = time.monotonic()
        before, since = self._seen.setdefault(path, (text, now))
        if text != before:
            self._seen[path] = text, now
            return True
        if now - since < DEAD_AFTER:
            return None
        return False

    def _put_in_place_of(self, dead: bytes) -> bool:
        """Replace a dead owner's file. Of several processes that try, only one can."""
        following = self._path.with_name(f"{self._path.name}-next")
        self.undecided = True
        if not self._created(following):
            with suppress(FileNotFoundError):
                if self._lives(following, following.read_bytes()) is False:
                    following.unlink()  # a process was killed while it did this
            return False
        try:
            if self._path.read_bytes() == dead:
                following.replace(self._path)
                return self._is_mine(self._path.read_bytes())
        except FileNotFoundError:
            pass
        finally:
            following.unlink(missing_ok=True)
        return False

    def _renew(self) -> None:
        """Show that this process lives, until it releases its claims.

        If another process has replaced it, after a sleep or an outage, end at once: two writers
        would mix their files. All files written so far are complete.
        """
        while not self._released.wait(RENEW_EVERY):
            with suppress(OSError):  # an outage: the next round tries again
                try:
                    handle = os.open(self._path, os.O_RDWR)
                except FileNotFoundError:
                    if self._created(self._path):
                        continue
                    handle = os.open(self._path, os.O_RDWR)
                try:
                    mine = self._is_mine(os.read(handle, 4096))
                    if mine:
                        os.pwrite(handle, self._text(), 0)
                finally:
                    os.close(handle)
                if not mine:
                    log.error(
                        "%s: another process has taken this over, because this one gave no "
                        "sign of life; this one stops",
                        self._path.parent,
                    )
                    os._exit(MISTAKE)

    def _is_mine(self, text: bytes) -> bool:
        return bool((parsed(text) or {}).get("token") == self._me["token"])


def named(path: Path) -> str:
    """Return the owner in words, if its file names one: " (process 7 on box)"."""
    try:
        said = parsed(path.read_bytes()) or {}
        return f" (process {said['pid']} on {said['host']})"
    except (OSError, KeyError):
        return ""


def lives(path: Path) -> bool:
    """Return whether the owner that a file names lives, without replacing it.

    Watch an owner on another machine until that is known. Raise OSError.
    """
    first: bytes | None = None
    began = time.monotonic()
    while True:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return False
        alive = _is_alive(text)
        if alive is not None:
            return alive
        if first is not None and text != first:
            return True
        if time.monotonic() > began + DEAD_AFTER:
            return False
        first = text
        time.sleep(RENEW_EVERY / 20)


def _is_alive(text: bytes) -> bool | None:
    """Return whether the owner lives; None: this machine can't know."""
    said, me = parsed(text) or {}, _this_process()
    if any(said.get(key) != me[key] for key in ("host", "boot", "processes")):
        return None
    try:
        pid = int(said["pid"])
        os.kill(pid, 0)
    except (ProcessLookupError, KeyError, ValueError, TypeError):
        return False
    except PermissionError:
        pass
    return said.get("began") == _began(pid)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _told(Path("/proc/sys/kernel/random/boot_id")),
        "processes": _linked(Path("/proc/self/ns/pid")),  # process numbers of another container
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }


def _told(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _linked(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _began(pid: int) -> str:
    """Return when a process began, in ticks since the boot; "" where the system doesn't say."""
    # The name, in brackets, may hold spaces. See proc_pid_stat(5).
    *_, rest = _told(Path(f"/proc/{pid}/stat")).rpartition(")")
    state, *words = rest.split() or [""]
    if state in ("Z", "X") or len(words) < 19:  # a zombie: it has ended
        return ""
    return words[18]
