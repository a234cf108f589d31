import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import PROJECT, wait_for
from trainer.common.errors import Interrupted
from trainer.common.interrupt import Stop, on_signals, on_spot_notice


@pytest.mark.parametrize("notice", ["spot/instance-action", "events/recommendations/rebalance"])
def test_a_notice_raises_the_flag(metadata, notice):
    stop = Stop()
    with on_spot_notice(stop, every=0.01):
        stop.check()
        metadata.notices = frozenset({notice})
        assert wait_for(lambda: stop.reason)
    with pytest.raises(Interrupted, match="spot"):
        stop.check()


def test_without_a_notice_nothing_happens_and_the_thread_ends(metadata):
    stop = Stop()
    with on_spot_notice(stop, every=0.01):
        assert not wait_for(lambda: stop.reason, seconds=0.2)
    assert not [thread for thread in threading.enumerate() if thread.name == "spot notice"]


def test_an_unreachable_service_is_said_once_and_harms_nothing(monkeypatch, caplog):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    with on_spot_notice(stop := Stop(), every=0.01):
        assert wait_for(lambda: caplog.records)
    assert stop.reason is None and len(caplog.records) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_raises_the_flag_and_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with on_signals() as stop:
        os.kill(os.getpid(), number)
        assert wait_for(lambda: stop.reason)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_a_second_sigint_ends_the_process_at_once():
    script = """
import os, signal
from trainer.common.interrupt import on_signals
with on_signals():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGINT and "still here" not in done.stdout
