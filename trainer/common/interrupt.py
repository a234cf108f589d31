"""Stop requests: signals and spot notices raise a flag that long loops check."""

import contextlib
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import FrameType

from trainer.common.console import log
from trainer.common.errors import Interrupted
from trainer.common.sessions import heed, heeded
from trainer.common.watch import watch

POLL_EVERY = 5.0  # seconds, as AWS recommends; the notice comes about two minutes ahead
# Below the metadata address; each answers 404 until there is something to say.
NOTICES = {
    "spot/instance-action": "the spot interruption notice",
    "events/recommendations/rebalance": "the spot rebalance recommendation",
}


class Stop:
    """The flag. `reason` is None until something asks the run to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Raise the flag; the first reason stays."""
        self.reason = self.reason or reason

    def asked(self) -> bool:
        """Return whether a stop was asked for. Counts as a sign of life (`watch`)."""
        watch.sign()
        return self.reason is not None

    def check(self) -> None:
        """Raise Interrupted once a stop was asked for."""
        if self.asked():
            raise Interrupted(self.reason)


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Let SIGTERM, SIGINT and SIGHUP only raise the flag, while the context lasts.

    This includes signals held until now. A second SIGINT ends the process at once.
    """
    stop, pressed = Stop(), False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if number == signal.SIGINT:
            if pressed:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            pressed = True
        stop.ask(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in heeded()}
    heed()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def on_spot_notice(stop: Stop, every: float = POLL_EVERY) -> Iterator[None]:
    """Raise the flag when EC2 is about to reclaim the instance, while the context lasts.

    A thread asks the metadata service (IMDSv2). The address follows
    AWS_EC2_METADATA_SERVICE_ENDPOINT, as in the AWS SDKs. An unreachable service is logged once
    and asked again.
    """
    ended = threading.Event()

    def poll() -> None:
        warned = False
        while not ended.is_set() and stop.reason is None:
            try:
                notice = _notice()
                if notice is not None:
                    log.warning("received %s: saving", notice)
                    stop.ask(notice)
            except OSError as error:
                if not warned:
                    log.warning(
                        "the spot notice can't be read from EC2's metadata service (%s); "
                        "trying again every %g s",
                        error,
                        every,
                    )
                warned = True
            ended.wait(every)

    thread = threading.Thread(target=poll, name="spot notice", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _notice() -> str | None:
    """Return the notice that the instance has to stop; None: there is none. Raise OSError."""
    return next((notice for path, notice in NOTICES.items() if metadata(path) is not None), None)


def metadata(path: str) -> str | None:
    """Return what EC2's metadata service (IMDSv2) says under /latest/meta-data/`path`.

    None: nothing. Raise OSError where it can't be asked.
    """
    address = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
    address = address.rstrip("/")
    # No proxy of the environment may stand between an instance and its own metadata.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ask = urllib.request.Request(
        f"{address}/latest/api/token",
        method="PUT",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
    )
    with opener.open(ask, timeout=2) as answer:
        token: str = answer.read().decode()
    request = urllib.request.Request(
        f"{address}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with opener.open(request, timeout=2) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
