"""What AWS and the bucket list of a project at one moment. Each listing is fetched once.

So a look at hundreds of runs takes as many calls as a look at one.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.cloud import ownership
from launch.cloud.prices import Price, price
from launch.cloud.session import Aws, AwsError
from launch.targets import attempt as notes
from launch.targets.attempt import Noted


class Inventory:
    """The listings. Several threads may call a method. Each may raise AwsError."""

    def __init__(self, aws: Aws) -> None:
        self.aws = aws
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._answers: dict[str, Any] = {}

    def noted(self) -> list[Noted]:
        """Return every attempt, in order."""
        return list(self._once("noted", lambda: notes.every(self.aws)))

    def attempts(self) -> dict[tuple[str, int], notes.Attempt]:
        """Return every attempt by its run and number."""
        return {(each.attempt.run, each.attempt.number): each.attempt for each in self.noted()}

    def price_of(self, instance_type: str, run: str | None = None) -> Price:
        """Return the price of a run's machine as noted, else the table's.

        Raise no AwsError: a caller who may not read the notes still sees what runs.
        """
        tried: list[notes.Attempt] = []
        with contextlib.suppress(AwsError):
            tried = [each for (name, _), each in self.attempts().items() if name == run]
        noted = [each.price for each in tried if each.price.instance_type == instance_type]
        return noted[-1] if noted else price(instance_type, self.aws.region)

    def instances(self) -> list[dict[str, Any]]:
        """Return our EC2 instances as EC2 describes them, including those that ended recently."""
        return list(self._once("instances", lambda: ownership.instances(self.aws)))

    def training_jobs(self) -> dict[str, dict[str, Any]]:
        """Return our training jobs, including trials, by name, as SageMaker describes them."""
        return dict(self._once("training jobs", lambda: ownership.training_jobs(self.aws)))

    def tuning_jobs(self) -> dict[str, dict[str, Any]]:
        """Return the tuning jobs that may be ours, by name, as SageMaker lists them."""
        kind = "HyperParameterTuningJob"
        return dict(
            self._once(
                "tuning jobs",
                lambda: {each[f"{kind}Name"]: each for each in ownership.listed(self.aws, kind)},
            )
        )

    def prefetch(self) -> None:
        """Fetch at the same time the listings that a look at all runs needs."""

        def ask(listing: Callable[[], object]) -> None:
            with contextlib.suppress(AwsError):  # raised again when the listing is read
                listing()

        with ThreadPoolExecutor() as pool:
            list(pool.map(ask, (self.noted, self.instances, self.training_jobs)))

    def _once(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return the earlier answer, or ask. An earlier refusal is raised again."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._answers:
                try:
                    self._answers[name] = ask()
                except AwsError as error:
                    self._answers[name] = error
        answer = self._answers[name]
        if isinstance(answer, AwsError):
            raise answer
        return answer
