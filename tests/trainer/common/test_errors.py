"""Every error that a file operation can end with has its line."""

import errno
import os
from unittest.mock import Mock

import pytest

from serving import predict
from trainer.common.errors import machine_fault
from trainer.sweep import ledger
from trainer.training.metrics import MetricsFile

# What the manual pages of open, read, write, fsync, rename, flock, mkdir, unlink, stat, mmap and
# ftruncate name, and what file systems of a network, in user space, encrypted or damaged add.
NAMES = """
    EACCES EAGAIN EBADMSG EBUSY ECOMM ECONNABORTED ECONNREFUSED ECONNRESET EDEADLK EDQUOT EEXIST
    EFBIG EHOSTDOWN EHOSTUNREACH EHWPOISON EILSEQ EINTR EINVAL EIO EISDIR EKEYEXPIRED EKEYREJECTED
    EKEYREVOKED ELOOP EMEDIUMTYPE EMFILE EMLINK ENAMETOOLONG ENETDOWN ENETUNREACH ENFILE ENOBUFS
    ENODATA ENODEV ENOENT ENOKEY ENOLCK ENOLINK ENOMEDIUM ENOMEM ENOSPC ENOSYS ENOTCONN ENOTDIR
    ENOTEMPTY ENOTSUP ENOTTY ENXIO EOPNOTSUPP EOVERFLOW EPERM EPIPE EPROTO EREMOTEIO EROFS ESHUTDOWN
    ESPIPE ESTALE ETIMEDOUT ETXTBSY EUCLEAN EXDEV
"""


@pytest.mark.parametrize("name", [name for name in NAMES.split() if hasattr(errno, name)])
def test_the_line_names_the_file_and_what_to_do(name):
    number = getattr(errno, name)
    line = machine_fault(OSError(number, os.strerror(number), "runs/run/log.txt"))
    assert line is not None and line.startswith("runs/run/log.txt: ") and "\n" not in line
    told = ("same command again", "choose another directory", "give a shorter one")
    assert any(words in line for words in told), line


@pytest.mark.parametrize("name", ["EFAULT", "ENOEXEC", "ECHILD", "ESRCH"])
def test_what_no_file_can_give_is_a_fault_of_ours(name):
    assert machine_fault(OSError(getattr(errno, name), name, "file")) is None


@pytest.mark.parametrize("name", ["ECONNREFUSED", "ETIMEDOUT", "EPIPE", "EAGAIN", "EINVAL"])
def test_what_names_no_file_may_be_of_a_socket(name):
    assert machine_fault(OSError(getattr(errno, name), name)) is None


def test_a_full_disk_is_told_also_where_the_system_names_no_file():
    line = machine_fault(OSError(errno.ENOSPC, "No space left on device"))
    assert line is not None and line.startswith("a file of this run: no space is left")


@pytest.mark.parametrize(
    "append",
    [
        lambda path: ledger.mend(path),
        lambda path: MetricsFile(path, Mock()).append({"epoch": 1}),
        lambda path: predict._table(str(path), Mock()).__enter__(),
    ],
    ids=["ledger", "metrics", "predictions"],
)
def test_a_file_whose_end_cannot_be_found_is_named(tmp_path, append):
    path = tmp_path / "file"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError) as raised:
        append(path)
    assert raised.value.filename == str(path)
