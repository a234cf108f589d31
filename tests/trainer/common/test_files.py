"""Files and locks on file systems as they are: without flock, without fsync of a directory, shared
by machines, failing once.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer.common import files, owner

NONE = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # there is no such operation


def failing(number: int, times: int = 1_000_000, real=None):
    """A call that fails so often, and then is the real one."""
    left = [times]

    def call(*arguments, **more):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    return call


@pytest.fixture
def lockless(monkeypatch):
    """A file system without flock, and owners of other machines that are soon taken for dead."""
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    monkeypatch.setattr(os, "_exit", lambda code: None)  # of the process that runs the tests
    monkeypatch.setattr(owner, "RENEW_EVERY", 0.02)
    monkeypatch.setattr(owner, "DEAD_AFTER", 0.3)


def owned_by(place: Path, **facts: object) -> Path:
    """Leave the file of an owner there, by default of one on another machine."""
    path = place / ".lock-owner"
    other = {"host": "other", "boot": "b", "processes": "", "pid": 7, "began": "1", "token": "t"}
    # A sign of life is one write in place, as the owner's own is: nobody reads half of it.
    written = path.with_name("written")
    written.write_text(json.dumps(other | facts))
    written.replace(path)
    return path


def here(**facts: object) -> dict[str, object]:
    return owner._this_process() | facts


def test_who_looks_at_a_lock_keeps_nobody_from_taking_it(tmp_path):
    assert not files.is_locked(tmp_path) and not list(tmp_path.iterdir())
    with files.locked(tmp_path):
        assert files.is_locked(tmp_path)
    assert not files.is_locked(tmp_path)
    with (tmp_path / ".lock").open("rb") as looked:  # by another process, in the very instant
        assert files.try_lock(looked, fcntl.LOCK_SH)
        assert not files.is_locked(tmp_path)
        threading.Timer(0.1, looked.close).start()
        with files.locked(tmp_path) as mine:
            assert mine


def test_a_look_at_an_owner_elsewhere_waits_for_a_sign_of_life(tmp_path, lockless):
    (tmp_path / ".lock").touch()
    assert not files.is_locked(tmp_path)
    path = owned_by(tmp_path, beats=1)
    assert not files.is_locked(tmp_path)  # there was none
    assert path.exists()
    threading.Timer(0.05, lambda: owned_by(tmp_path, beats=2)).start()
    assert files.is_locked(tmp_path)
    owned_by(tmp_path, **here())
    assert files.is_locked(tmp_path)


@pytest.mark.parametrize("number", NONE)
def test_one_process_at_a_time_also_without_flock(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with files.locked(tmp_path) as first, files.locked(tmp_path) as second:
        assert (first, second) == (True, False)
        assert files.owner_of(tmp_path) == f" (process {os.getpid()} on {os.uname().nodename})"
        with files.locked(tmp_path, name=".other") as another:
            assert another
    with files.locked(tmp_path) as again:
        assert again
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".other"]


@pytest.mark.parametrize("facts", [{"pid": 2**22 + 1}, {"began": "1"}], ids=["gone", "another's"])
def test_a_dead_owner_on_this_machine_is_replaced_at_once(tmp_path, lockless, monkeypatch, facts):
    monkeypatch.setattr(owner, "DEAD_AFTER", 1e9)
    owned_by(tmp_path, **here(**facts))
    with files.locked(tmp_path) as mine:
        assert mine


@pytest.mark.parametrize("said", [None, b"", b"{", b"[]"])
def test_an_owner_elsewhere_that_gives_no_sign_of_life_is_replaced(tmp_path, lockless, said):
    path = owned_by(tmp_path)
    if said is not None:  # killed while it wrote
        path.write_bytes(said)
    with files.locked(tmp_path) as mine:
        assert mine


def test_an_owner_elsewhere_that_lives_keeps_what_it_has(tmp_path, lockless, monkeypatch, caplog):
    monkeypatch.setattr(owner, "DEAD_AFTER", 120)
    owned_by(tmp_path)
    first_look = threading.Event()
    is_alive = owner._is_alive

    def look(text: bytes) -> bool | None:
        first_look.set()
        return is_alive(text)

    def live() -> None:
        first_look.wait()
        owned_by(tmp_path, beats="2")

    monkeypatch.setattr(owner, "_is_alive", look)
    thread = threading.Thread(target=live)
    thread.start()
    with caplog.at_level("INFO", "packhorse"), files.locked(tmp_path) as mine:
        assert not mine
    thread.join()
    assert "checking whether its owner (process 7 on other) is still alive" in caplog.text


def test_of_two_that_find_an_owner_dead_one_replaces_it(tmp_path, lockless):
    for _ in range(20):
        owned_by(tmp_path, **here(began="1"))
        together, took = threading.Barrier(3), []

        def take(claim: owner.Claim, together=together, took=took) -> None:
            together.wait()
            if claim.take():
                took.append(claim)

        claims = [owner.Claim(tmp_path / ".lock-owner") for _ in range(3)]
        threads = [threading.Thread(target=take, args=(claim,)) for claim in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for claim in claims:
            claim.release()
        assert len(took) == 1
        assert not (tmp_path / ".lock-owner").exists()


def test_who_finds_an_owner_dead_too_late_replaces_nobody(tmp_path, lockless):
    dead = owned_by(tmp_path, **here(began="1")).read_bytes()
    first, second = (owner.Claim(tmp_path / ".lock-owner") for _ in range(2))
    assert first.take()
    assert not second._put_in_place_of(dead)
    assert not second.take()
    first.release()
    assert second.take()
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "facts", [owner._this_process() | {"began": "1"}, {}], ids=["here", "elsewhere"]
)
def test_what_a_process_left_that_was_killed_while_it_replaced_another_is_removed(
    tmp_path, lockless, facts
):
    owned_by(tmp_path, **facts).rename(tmp_path / ".lock-owner-next")
    owned_by(tmp_path, **here(began="1"))
    with files.locked(tmp_path) as mine:
        assert mine
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_who_was_taken_for_dead_ends_and_takes_nothing_away(tmp_path, lockless, monkeypatch):
    ended = threading.Event()

    def end(code: int) -> None:
        assert code == 2
        ended.set()

    monkeypatch.setattr(os, "_exit", end)
    with files.locked(tmp_path):
        owned_by(tmp_path)
        assert ended.wait(120)
    assert json.loads((tmp_path / ".lock-owner").read_text())["host"] == "other"


def test_an_owner_that_was_moved_away_comes_back(tmp_path, lockless):
    claim = owner.Claim(tmp_path / ".lock-owner")
    assert claim.take()
    (tmp_path / ".lock-owner").unlink()
    while not (tmp_path / ".lock-owner").exists():
        threading.Event().wait(0.01)
    claim.release()
    assert not (tmp_path / ".lock-owner").exists()


def test_an_outage_is_no_end(tmp_path, lockless, monkeypatch):
    claim = owner.Claim(tmp_path / ".lock-owner")
    assert claim.take()
    with monkeypatch.context() as patch:
        tried = threading.Event()

        def lost(*arguments):
            tried.set()
            raise OSError(errno.ESTALE, "Stale file handle")

        patch.setattr(os, "open", lost)
        assert tried.wait(120)
    before = (tmp_path / ".lock-owner").read_bytes()
    while (tmp_path / ".lock-owner").read_bytes() in (before, b""):
        threading.Event().wait(0.01)
    claim.release()


MOUNTS = r"""
1 0 8:1 / / rw - ext4 /dev/a rw
2 1 0:2 / /efs rw - nfs4 server:/ rw,vers=4.1,local_lock=none
3 1 0:3 / /old rw - nfs server:/ rw,nolock,local_lock=all
4 1 0:4 / /mac rw - virtiofs mac rw
5 1 0:5 / /my\040bucket rw - fuse.s3fs s3fs rw
6 1 0:6 / /lustre rw - lustre server:/fs rw,localflock
7 1 0:7 / /usb rw - fuseblk /dev/b rw
8 4 8:1 / /mac/disk rw - ext4 /dev/c rw
"""


@pytest.mark.parametrize("place", ["/efs/runs", "/old", "/mac/x", "/my bucket", "/lustre", "/usb"])
def test_where_a_lock_of_the_kernel_holds_on_one_machine_alone(tmp_path, monkeypatch, place):
    (tmp_path / "mounts").write_text(MOUNTS.lstrip())
    monkeypatch.setattr(owner, "MOUNTS", tmp_path / "mounts")
    assert owner.kernel_knows(Path(place)) == (place in ("/efs/runs", "/usb"))
    assert owner.kernel_knows(Path("/mac/disk/runs")) and owner.kernel_knows(tmp_path)


def test_there_a_file_names_the_owner_too(tmp_path, lockless, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(owner, "kernel_knows", lambda directory: False)
    with files.locked(tmp_path) as mine:
        assert mine and (tmp_path / ".lock-owner").exists()
    assert not (tmp_path / ".lock-owner").exists()


# --- writing ---


@pytest.mark.parametrize("number", NONE)
def test_files_are_written_where_a_directory_can_not_be_flushed(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    files.write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EINTR", "EMFILE"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_once_is_written_all_the_same(tmp_path, monkeypatch, call, name):
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    where = os if call == "fsync" else Path
    monkeypatch.setattr(where, call, failing(getattr(errno, name), 2, getattr(where, call)))
    files.write(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_fails_for_good_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0,))
    files.write(tmp_path / "file", "before")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="file") as raised:
        files.write(tmp_path / "file", "after")
    assert raised.value.filename == str(tmp_path / "file")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
def test_a_process_that_has_ended_and_was_not_asked_how_owns_nothing(tmp_path, lockless):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owned_by(tmp_path, **here(pid=child.pid, began=owner._began(child.pid)))
    with files.locked(tmp_path) as mine:
        assert not mine
    child.kill()
    while owner._began(child.pid):
        threading.Event().wait(0.01)
    with files.locked(tmp_path) as mine:
        assert mine
    child.communicate()
