"""Goes on asking AWS through an outage: what runs there runs on without this machine."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeVar

from launch.cloud.session import Aws, AwsError
from launch.targets.attempt import now
from trainer.common.console import log

Answer = TypeVar("Answer")

AT_MOST = 12  # times --every: the longest pause between two tries


class Patience:
    """Asks AWS again, however long it takes, where it can't be reached or a session has expired."""

    def __init__(self, aws: Aws, every: float, runs_on: str) -> None:
        """Take the seconds between two looks, and what goes on meanwhile, in words."""
        self._aws, self._every, self.runs_on = aws, every, runs_on
        self._since: datetime | None = None

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """Return the answer to a question that may be asked twice.

        An outage is said once, and its end. Raise AwsError for what AWS refuses for good.
        """
        pause = self._every
        while True:
            try:
                answer = question()
            except AwsError as error:
                if not error.passes:
                    raise
                self._begin(error)
                time.sleep(pause)
                pause = min(2 * pause, AT_MOST * self._every)
                self._aws.renew()
            else:
                self._end()
                return answer

    def _begin(self, error: AwsError) -> None:
        if self._since is None:
            self._since = now()
            log.warning("%s", error)
            log.info("%s; AWS is asked again until it answers", self.runs_on)

    def _end(self) -> None:
        if self._since is not None:
            log.info(
                "AWS answers again, after %s", timedelta(seconds=(now() - self._since).seconds)
            )
            self._since = None
