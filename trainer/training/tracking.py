"""Where a team looks at its experiments: TensorBoard, MLflow and W&B, by one small seam.

A tracker says what it has of a run, and takes what it hasn't. So a run that was killed and goes on
is one run there, with each value of a step once: what it trains again is there already, and what a
server missed while it was away is sent with the next row.
"""

import io
import json
import os
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trainer.common import files
from trainer.common.command import one_line
from trainer.common.console import log
from trainer.common.errors import UserError, naming, needed_by
from trainer.settings import config as settings
from trainer.training.run import Run

Row = Mapping[str, float]
KEY_FILE = "tracking.json"  # beside the checkpoints: what a run is known by
PER_REQUEST = 100  # settings that MLflow takes at once
LONGEST = 500  # characters of a setting's value that every MLflow takes


class Tracker(Protocol):
    """Where rows go. Its methods may raise whatever its library does."""

    name: str

    def begin(self) -> Callable[[int, str], bool]:
        """Open the run there, or begin it. Return whether it has a metric of a step."""

    def add(self, step: int, values: Row) -> None:
        """Add metrics of a step that it hasn't."""

    def keep(self, paths: Sequence[Path]) -> None:
        """Keep files of the complete run."""

    def close(self, complete: bool) -> None:
        """Say how this process has left the run, and wait until all is sent."""


class Tracking:
    """The trackers of a run. What one can't be given is said once, and ends nothing."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self._has: dict[str, Callable[[int, str], bool]] = {}
        self._sent: dict[str, set[tuple[int, str]]] = {each.name: set() for each in trackers}
        self._warned: set[str] = set()

    def begin(self) -> None:
        """Open the run in each, before anything is trained. Raise UserError where one can't."""
        for tracker in self._trackers:
            try:
                self._has[tracker.name] = tracker.begin()
            except Exception as error:
                raise UserError(f"{tracker.name}: {_reason(error)}") from error

    def send(self, rows: Sequence[Row]) -> None:
        """Send what the trackers haven't of these rows."""
        for tracker in self._trackers:
            self._trying(tracker, partial(self._send, tracker, rows))

    def _send(self, tracker: Tracker, rows: Sequence[Row]) -> None:
        if tracker.name not in self._has:
            self._has[tracker.name] = tracker.begin()
        has, sent = self._has[tracker.name], self._sent[tracker.name]
        for row in rows:
            step = int(row["step"])
            new = {
                name: value
                for name, value in row.items()
                if (step, name) not in sent and not has(step, name)
            }
            if new:
                tracker.add(step, new)
            sent |= {(step, name) for name in row}

    def keep(self, paths: Sequence[Path]) -> None:
        """Keep files of the complete run in each."""
        for tracker in self._trackers:
            self._trying(tracker, partial(tracker.keep, paths))

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Leave the run in each when the context ends, as complete where nothing was raised."""
        complete = False
        try:
            yield
            complete = True
        finally:
            for tracker in self._trackers:
                if tracker.name in self._has:
                    self._trying(tracker, partial(tracker.close, complete))

    def _trying(self, tracker: Tracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of whichever library; metrics.jsonl has it all
            if tracker.name not in self._warned:
                log.warning("%s can't be given all: %s", tracker.name, _reason(error))
            self._warned.add(tracker.name)


def _reason(error: Exception) -> str:
    line = one_line(error) or str(error) or type(error).__name__
    return " ".join(line.split())[:300]


def of_run(run: Run) -> Tracking:
    """Return the trackers that a run's settings ask for. Raise UserError for a missing library."""
    train = run.config.train
    trackers: list[Tracker] = []
    if train.tensorboard:
        trackers.append(TensorBoard(run.directory / "tensorboard"))
    if train.mlflow is not None:
        trackers.append(MLflow(train.mlflow, run))
    if train.wandb is not None:
        trackers.append(Wandb(train.wandb, run))
    return Tracking(trackers)


def _key(run: Run) -> str:
    """Return what a run is known by, wherever it goes on."""
    path = run.checkpoints / KEY_FILE
    try:
        key = json.loads(path.read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        key = uuid.uuid4().hex[:16]
        files.write(path, json.dumps({"key": key}) + "\n")
    return str(key)


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value, _ in settings.walk(run.config)}


class TensorBoard:
    """Event files below a directory, one for each process that had the run.

    By TensorBoard's own functions, but at once: `SummaryWriter` writes in a thread, which prints
    the traceback of a full disk, and raises it later.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        with needed_by("train.tensorboard=true", "tensorboard"):
            # imported here: optional.
            from tensorboard.backend.event_processing import event_file_loader
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
            from torch.utils.tensorboard.summary import scalar
        self._event, self._writer = Event, RecordWriter
        self._loader = event_file_loader.LegacyEventFileLoader
        self._scalar: Callable[[str, float], Any] = scalar
        place = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / f"events.out.tfevents.{place}"
        self._version: list[Any] = [Event(wall_time=time.time(), file_version="brain.Event:2")]

    def begin(self) -> Callable[[int, str], bool]:
        """Read what the files have."""
        there = {
            (event.step, value.tag)
            for path in sorted(self._path.parent.glob("events.out.tfevents.*"))
            for event in self._loader(str(path)).Load()
            for value in event.summary.value
        }
        return lambda step, name: (step, name) in there

    def add(self, step: int, values: Row) -> None:
        """Append the scalars of a step. Raise OSError."""
        now = time.time()
        events = [
            self._event(wall_time=now, step=step, summary=self._scalar(name, value))
            for name, value in values.items()
        ]
        records = io.BytesIO()
        writer = self._writer(records)
        for event in self._version + events:
            writer.write(event.SerializeToString())
        self._version = []  # at the beginning of the file alone
        with naming(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(records.getvalue())

    def keep(self, paths: Sequence[Path]) -> None:
        """Keep nothing: TensorBoard shows no files."""

    def close(self, complete: bool) -> None:
        """Do nothing: all is written."""


class MLflow:
    """A run of MLflow, in the experiment that is called as the data set is.

    uri: of the tracking server or store, as MLFLOW_TRACKING_URI.
    """

    def __init__(self, uri: str, run: Run) -> None:
        # It counts its users by default; and asks a server that is away for a quarter of an hour.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        with needed_by("train.mlflow", "mlflow"):
            # imported here: optional.
            from mlflow.tracking import MlflowClient
        self.name = f"train.mlflow={uri}"
        self._uri, self._run, self._client_of = uri, run, MlflowClient
        self._client: Any = None
        self._id = ""

    def begin(self) -> Callable[[int, str], bool]:
        """Find the run by its key, or make it."""
        client = self._client_of(tracking_uri=self._uri)
        data = self._run.config.data
        called, key = settings.data_name(data.source, data.root), _key(self._run)
        experiment = client.get_experiment_by_name(called)
        place = experiment.experiment_id if experiment else client.create_experiment(called)
        found = client.search_runs([place], f"tags.packhorse = '{key}'")
        self._client = client
        if not found:
            made = client.create_run(place, run_name=self._run.name, tags={"packhorse": key})
            self._id = made.info.run_id
            self._add_settings()
            return lambda step, name: False
        self._id = found[0].info.run_id
        client.update_run(self._id, status="RUNNING")
        there = {
            (each.step, name)
            for name in found[0].data.metrics
            for each in client.get_metric_history(self._id, name)
        }
        return lambda step, name: (step, name) in there

    def _add_settings(self) -> None:
        # imported here: optional.
        from mlflow.entities import Param

        params = [
            Param(key, str(value)[:LONGEST])
            for key, value in _settings(self._run).items()
            if value is not None
        ]
        for first in range(0, len(params), PER_REQUEST):
            self._client.log_batch(self._id, params=params[first : first + PER_REQUEST])

    def add(self, step: int, values: Row) -> None:
        """Add metrics of a step, in one request."""
        # imported here: optional.
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def keep(self, paths: Sequence[Path]) -> None:
        """Keep files as the run's artifacts; one of the same name is replaced."""
        for path in paths:
            self._client.log_artifact(self._id, str(path))

    def close(self, complete: bool) -> None:
        """Say whether the run is complete."""
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


class Wandb:
    """A run of Weights & Biases. project: PROJECT or ENTITY/PROJECT; WANDB_MODE=offline is heeded.

    W&B takes a step once, and in order: what the test gave goes to the run's summary.
    """

    def __init__(self, project: str, run: Run) -> None:
        with needed_by("train.wandb", "wandb"):
            # imported here: optional.
            import wandb
        self.name = f"train.wandb={project}"
        self._wandb, self._place, self._run = wandb, project, run
        self._open: Any = None

    def begin(self) -> Callable[[int, str], bool]:
        """Open the run by its key."""
        entity, _, project = self._place.rpartition("/")
        key = _key(self._run)
        there = set(self._written(key))
        self._open = self._wandb.init(
            entity=entity or None,
            project=project,
            id=key,
            name=self._run.name,
            config=_settings(self._run),
            resume="allow",
            reinit="create_new",  # a sweep may have several at once
            dir=self._run.directory,
            settings=self._wandb.Settings(console="off", silent=True),
        )
        first = self._open.starting_step  # what a server has is below it

        def has(step: int, name: str) -> bool:
            if name.startswith("test_"):
                return False  # of the summary, where it is replaced
            return step < first or step in there

        return has

    def _written(self, key: str) -> Iterator[int]:
        """Yield the steps in the files that this run wrote offline."""
        # imported here: optional.
        from wandb.proto.wandb_internal_pb2 import Record

        for path in sorted(self._run.directory.glob(f"wandb/offline-run-*-{key}/run-{key}.wandb")):
            for data in log_records(path.read_bytes()):
                record = Record.FromString(data)
                if record.WhichOneof("record_type") == "history":
                    yield record.history.step.num

    def add(self, step: int, values: Row) -> None:
        """Add the metrics of a step."""
        tested = {name: value for name, value in values.items() if name.startswith("test_")}
        if tested:
            self._open.summary.update(tested)
        else:
            self._open.log(dict(values), step=step, commit=True)

    def keep(self, paths: Sequence[Path]) -> None:
        """Keep files as one artifact, a version of it."""
        artifact = self._wandb.Artifact(f"run-{self._open.id}", type="model")
        for path in paths:
            if path.is_dir():
                artifact.add_dir(str(path), name=path.name)
            else:
                artifact.add_file(str(path))
        self._open.log_artifact(artifact)

    def close(self, complete: bool) -> None:
        """Say whether the run is complete, and wait until all is sent."""
        self._open.finish(exit_code=0 if complete else 1)


BLOCK, HEAD = 32768, 7  # bytes


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file that W&B wrote offline, as far as they are whole.

    It is LevelDB's log (github.com/google/leveldb, doc/log_format.md) after 7 bytes of W&B's own:
    blocks of 32 KiB, in which each part of a record has its CRC, its length and its type (1: whole,
    2: the first, 3: in between, 4: the last).
    """
    place, parts = HEAD, b""
    while place + HEAD <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEAD:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += HEAD
        if kind == 0 or place + length > len(data):
            return
        part = data[place : place + length]
        place += length
        if kind in (1, 2):
            parts = b""
        parts += part
        if kind in (1, 4):
            yield parts
