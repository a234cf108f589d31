"""Logs in CloudWatch: their groups, and their events."""

from typing import Any

from launch.cloud.session import Aws, AwsError

# Log groups of the whole account, with every team's logs: no project makes, changes or deletes
# them.
TRAINING_GROUP = "/aws/sagemaker/TrainingJobs"
NOTEBOOK_GROUP = "/aws/sagemaker/NotebookInstances"
SHARED_GROUPS = (TRAINING_GROUP, NOTEBOOK_GROUP)

# Milliseconds. An event arrives with some delay, so each look goes back a little.
LOOK_BACK = 60_000


class LogReader:
    """The events of a log group, each read once."""

    def __init__(self, aws: Aws, group: str, streams: str | None = None, since: int = 0) -> None:
        """streams: how their names begin; None: all. since: milliseconds of Unix time."""
        self._aws, self._since = aws, since
        self._where = {"logGroupName": group}
        if streams is not None:
            self._where["logStreamNamePrefix"] = streams
        self._shown: set[str] = set()

    def read(self) -> list[dict[str, Any]]:
        """Return the events that came since the last call, in order of time. Raise AwsError.

        The first writer creates the group; until then there are no events.
        """
        request = {**self._where, "startTime": self._since}
        try:
            events = list(self._aws.pages("logs", "FilterLogEvents", "events", **request))
        except AwsError as error:
            if "ResourceNotFound" not in error.code:
                raise
            return []
        fresh = [event for event in events if event["eventId"] not in self._shown]
        self._shown.update(event["eventId"] for event in fresh)
        self._since = max([self._since, *(event["timestamp"] - LOOK_BACK for event in fresh)])
        return sorted(fresh, key=lambda event: int(event["timestamp"]))
