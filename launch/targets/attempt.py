"""Attempts at runs: their notes in the bucket, written before they are sent, and their states.

The target says what state an attempt is in now (launch/targets/base.py).
"""

import base64
import dataclasses
import json
import re
import shlex
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from launch.cloud import s3
from launch.cloud.prices import Price
from launch.cloud.request import Request
from launch.cloud.session import Aws
from trainer.common.errors import UserError
from trainer.common.objects import parsed

# AWS is eventually consistent: for a while it may not list what it has just made. An attempt that
# was sent less than this long ago, and that AWS doesn't list, may still start. EC2 forgets an
# instance an hour after its end.
YOUNG = timedelta(hours=1)
UNSEEN = "sent, and not listed by AWS yet"
TAKEN = "NameTaken"  # refused: another project's job has this name
GONE = "AWS no longer lists it: it was deleted"
# The index: names of empty objects hold what a list of all runs needs of each attempt, so that one
# S3 listing reads it. A name is RUN/NUMBER.KIND.WORDS, and KIND is one of the three below.
INDEX = "runs/.all/attempts/"
NOTE = "note"  # the attempt, written with each change of its note
END = "end"  # its machine's last message (user_data.sh)
STATE = "state"  # how it ended, found out afterwards, where nothing else tells it
LONGEST_KEY = 1024  # bytes: S3's limit
TIMES = ("started", "ended")  # of a State
# What a damaged note raises, or a foreign file in its place.
UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)


class Anothers(UserError):
    """A run of this name is another project's, which shares the bucket."""


class Damaged(UserError):
    """A note can't be read."""


class Phase(StrEnum):
    ABSENT = "never started"
    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"  # by the user or its time limit; what it saved is there
    LOST = "reclaimed"  # AWS took a spot machine back
    NO_CAPACITY = "no capacity"  # AWS had no such machine after all, so it never ran
    FAILED = "failed"
    UNKNOWN = "not known"  # AWS was asked, and didn't tell


@dataclass(frozen=True)
class State:
    """The state of an attempt."""

    phase: Phase
    detail: str = ""  # in AWS's words
    started: datetime | None = None
    ended: datetime | None = None
    # So far, summed over its machines; for SageMaker's ended jobs the billed time.
    machine_seconds: float = 0.0
    discounted: bool = False  # whether a spot discount is in machine_seconds already
    id: str | None = None
    # Whether `ended` is from AWS or the machine; else it is the time of the last sign of life.
    is_sure: bool = True
    # By when the other machines end, where one of several was lost; None: none was.
    ends_by: datetime | None = None


@dataclass(frozen=True)
class Figures:
    """Results of a run; None: not known.

    valid, test: top-1 accuracies (0..1). pictures: of test. seconds: of wall time.
    """

    valid: float | None = None
    test: float | None = None
    pictures: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Return the accuracy on test, or on valid where there is none on test."""
        return self.valid if self.test is None else self.test


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, noted in the bucket before it is sent.

    So after a crash the bucket shows what may have been sent.
    """

    run: str
    number: int
    target: str  # its name, one of launch.targets.base.NAMES
    instance_type: str
    instances: int  # of one job
    spot: bool
    hours: float  # time limit
    job: str  # its name in AWS
    price: Price  # of one machine, when the attempt was sent
    requests: list[Request]
    identity: dict[str, Any]  # the same for all attempts at the run
    noted: str  # when, ISO 8601
    id: str | None = None  # AWS's own, noted after it was sent
    sent: str | None = None  # when, ISO 8601
    # AWS's code, where AWS refused the request, or TAKEN.
    refused: str | None = None
    per_hour: float | None = None  # dollars of one machine at most, with its disk and address
    ceiling: float | None = None  # dollars for the run, when this attempt was sent
    asked: str | None = None  # when AWS was first asked for a machine for it, ISO 8601
    # What it was planned from (launch.targets.spec.words_of), to plan the next one in the same way.
    words: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: str | None = None  # when the previous attempt ended, where that is known, ISO 8601
    project: str = ""  # that owns it: several may share a bucket; "": not noted

    @property
    def since(self) -> datetime:
        """When it was sent; where that is not known, when it was noted."""
        return datetime.fromisoformat(self.sent or self.noted)

    @property
    def may_be_on_its_way(self) -> bool:
        """Whether AWS may have it, or still receive it, although AWS doesn't list it."""
        return self.refused is None and now() - self.since < YOUNG

    @property
    def key(self) -> str:
        return self.key_of("request.json")

    def key_of(self, what: str) -> str:
        return attempt_key(self.run, self.number, what)

    def dumps(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def dollars(self, state: State) -> float | None:
        """Return its cost so far in dollars, estimated from the prices when it was sent.

        None where these are unknown.
        """
        hour = self.price.hour(spot=self.spot and not state.discounted)
        return None if hour is None else hour * state.machine_seconds / 3600

    def told(self, state: State) -> str:
        """Return its state in words, as every verb shows it."""
        return f"attempt {self.number} at {self.run} is {state.phase} ({state.detail})"

    def unseen(self, alive: datetime | None = None) -> State:
        """Return the state of an attempt that AWS doesn't list.

        alive: the time of its last sign of life; None: when it was sent.
        """
        if self.id is None:
            return State(Phase.ABSENT)
        if now() - (alive or self.since) < YOUNG:
            seconds = seconds_between(self.since, now())
            return State(Phase.RUNNING, UNSEEN, self.since, None, seconds, id=self.id)
        return State(Phase.STOPPED, GONE, self.since, id=self.id)


@dataclass(frozen=True)
class Noted:
    """What the bucket's index says of an attempt."""

    attempt: Attempt  # without its requests, identity and words
    word: dict[str, Any] | None = None  # its machine's last message
    said: datetime | None = None  # when the machine sent it
    state: State | None = None  # how it ended, where an earlier command found that out


def note(aws: Aws, attempt: Attempt) -> None:
    """Write an attempt's note, and its entry in the index. Raise AwsError."""
    write_index(aws, attempt)
    s3.write(aws, attempt.key, attempt.dumps())


def claim(aws: Aws, attempt: Attempt) -> bool:
    """Write an attempt's first note; return False where another submit was faster.

    Raise AwsError.
    """
    write_index(aws, attempt)
    return s3.claim(aws, attempt.key, attempt.dumps())


def write_index(aws: Aws, attempt: Attempt) -> None:
    """Write an attempt's entry in the index. Raise AwsError.

    Call it before the note is written, so that a kill between the two hides no machine.
    """
    fields = dataclasses.asdict(dataclasses.replace(attempt, requests=[], identity={}, words={}))
    told = {key: value for key, value in fields.items() if value not in (None, [], {})}
    _write_index(aws, attempt, NOTE, told | {"written": now().isoformat()})


def note_state(aws: Aws, attempt: Attempt, state: State) -> None:
    """Note how an attempt ended, so that no later command has to find it out. Raise AwsError."""
    fields = dataclasses.asdict(state)
    for name in TIMES:
        fields[name] = fields[name] and fields[name].isoformat()
    _write_index(aws, attempt, STATE, fields)


def _write_index(aws: Aws, attempt: Attempt, kind: str, fields: dict[str, Any]) -> None:
    packed = zlib.compress(json.dumps(fields, separators=(",", ":")).encode(), 9)
    words = base64.urlsafe_b64encode(packed).decode()
    key = f"{INDEX}{attempt.run}/{attempt.number}.{kind}.{words}"
    # An entry that doesn't fit is left out; then the note is read.
    if len(key.encode()) <= LONGEST_KEY:
        s3.write(aws, key, b"")


def _read_index(kind: str, words: str) -> dict[str, Any] | None:
    """Return the content of an entry, None where it isn't one of ours."""
    try:
        packed = base64.urlsafe_b64decode(words)
        return last_word(packed) if kind == END else parsed(zlib.decompress(packed))
    except (ValueError, zlib.error):
        return None


def last_word(data: bytes) -> dict[str, Any] | None:
    """Return a machine's last message, None where it can't be read."""
    told = parsed(data)
    return told if told is not None and {"code", "reason"} <= told.keys() else None


def every(aws: Aws) -> list[Noted]:
    """Return every attempt of the project in order, from the index. Raise AwsError.

    An earlier version wrote no index: the notes of its runs are read one by one.
    """
    noted, anothers = _index(aws)
    indexed: dict[str, set[int]] = {}
    for run, number in noted:
        indexed.setdefault(run, set()).add(number)
    runs = {run for run in s3.folders(aws, "runs/") if run != ".all"} | indexed.keys()
    others = [run for run in runs - anothers if not _is_whole(indexed.get(run, set()))]
    with ThreadPoolExecutor(s3.WORKERS) as pool:
        read_ones = list(pool.map(lambda run: _readable(aws, run), others))
    found = [each for each in noted.values() if each.attempt.run not in others]
    found += [Noted(attempt) for tried in read_ones for attempt in tried]
    return sorted(found, key=lambda each: (each.attempt.run, each.attempt.number))


def young(aws: Aws) -> list[Noted]:
    """Return the attempts that AWS may not list yet. Takes one listing. Raise AwsError."""
    noted, _ = _index(aws)
    return [each for each in noted.values() if now() - each.attempt.since < YOUNG]


def of_others(aws: Aws) -> list[str]:
    """Return the other projects' runs in the bucket. Raise AwsError."""
    return sorted(_index(aws)[1])


def _index(aws: Aws) -> tuple[dict[tuple[str, int], Noted], set[str]]:
    """Return the attempts in the index by run and number, and the runs of other projects.

    Raise AwsError.
    """
    entries: dict[tuple[str, int], list[tuple[str, dict[str, Any], datetime]]] = {}
    for name, item in s3.listing(aws, INDEX).items():
        match = re.fullmatch(rf"([^/]+)/(\d+)\.({NOTE}|{END}|{STATE})\.([\w=-]+)", name)
        fields = _read_index(match[3], match[4]) if match else None
        if match and fields is not None:
            entry = match[3], fields, item.modified
            entries.setdefault((match[1], int(match[2])), []).append(entry)
    whose: dict[str, set[str]] = {}
    for (run, _), told in entries.items():
        projects = {fields.get("project", "") for kind, fields, _ in told if kind == NOTE}
        whose.setdefault(run, set()).update(projects)
    anothers = {
        run
        for run, projects in whose.items()
        if projects and not any(_is_ours(aws, project) for project in projects)
    }
    noted = {key: _noted(told) for key, told in entries.items() if key[0] not in anothers}
    return {key: each for key, each in noted.items() if each is not None}, anothers


def _is_whole(numbers: set[int]) -> bool:
    """Return whether these are all attempts up to the newest of them."""
    return bool(numbers) and numbers == set(range(1, max(numbers) + 1))


def _readable(aws: Aws, run: str) -> list[Attempt]:
    """Return the attempts at a run; none where it is another project's, or a note is damaged.

    Report a damaged note on standard error, since standard output may be a document.
    """
    try:
        return attempts(aws, run)
    except Anothers:
        return []
    except Damaged as error:
        print(f"not shown: {error}", file=sys.stderr, flush=True)
        return []


def _is_ours(aws: Aws, project: str) -> bool:
    return project in ("", aws.project)


def _noted(told: list[tuple[str, dict[str, Any], datetime]]) -> Noted | None:
    """Return what the index says of an attempt, None without an entry of its note.

    told: kind, words and time of each entry.
    """
    notes = [
        (when, fields.get("written", ""), fields) for kind, fields, when in told if kind == NOTE
    ]
    if not notes:
        return None
    _, _, newest = max(notes, key=lambda each: each[:2])  # S3's clock counts seconds
    ends = [(fields, when) for kind, fields, when in told if kind == END]
    states = [fields for kind, fields, _ in told if kind == STATE]
    word, said = max(ends, key=lambda each: each[1], default=(None, None))
    try:
        attempt = _attempt({"requests": [], "identity": {}} | newest)
        return Noted(attempt, word, said, _state(states[0]) if states else None)
    except UNREADABLE:
        return None


def _state(fields: dict[str, Any]) -> State:
    """Return a state as `note_state` noted it."""
    times = {name: fields[name] and datetime.fromisoformat(fields[name]) for name in TIMES}
    return State(**_known(State, fields) | times | {"phase": Phase(fields["phase"])})


def attempt_key(run: str, number: int, what: str) -> str:
    """Return the key in the bucket of an attempt's object, like "request.json"."""
    return f"runs/{run}/attempts/{number}.{what}"


def loads(data: bytes) -> Attempt:
    """Return the attempt whose note is `data`. Raise UNREADABLE where it is no such note."""
    return _attempt(parsed(data) or {})


def _attempt(fields: dict[str, Any]) -> Attempt:
    """Return an attempt from its fields. Ignores further fields of a newer version."""
    price = Price(**_known(Price, fields["price"]))
    requests = [Request(**_known(Request, each)) for each in fields["requests"]]
    return Attempt(**_known(Attempt, fields) | {"price": price, "requests": requests})


def _known(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in fields.items() if name in names}


def read(aws: Aws, key: str) -> Attempt | None:
    """Return the attempt noted under `key`, None where there is none.

    Raise Damaged, Anothers, AwsError.
    """
    entry = s3.read(aws, key)
    if entry is None:
        return None
    try:
        attempt = loads(entry[0])
    except UNREADABLE as error:
        raise Damaged(
            f"s3://{aws.bucket}/{key}: this is not the note of an attempt; restore an earlier "
            "version of it, or delete it if you don't need the run"
        ) from error
    if not _is_ours(aws, attempt.project):
        raise Anothers(
            f"{attempt.run}: in s3://{aws.bucket} this is a run of the project {attempt.project}; "
            f"give another name=..., or target.project={shlex.quote(attempt.project)}"
        )
    return attempt


def attempts(aws: Aws, run: str) -> list[Attempt]:
    """Return the attempts at a run in order. Raise AwsError."""
    names = s3.listing(aws, f"runs/{run}/attempts/").items()
    keys = [item.key for name, item in names if re.fullmatch(r"\d+\.request\.json", name)]
    entries = [read(aws, key) for key in keys]
    return sorted(filter(None, entries), key=lambda attempt: attempt.number)


def latest(aws: Aws, run: str) -> Attempt | None:
    """Return the newest attempt at a run, None where there was none. Raise AwsError."""
    names = s3.listing(aws, f"runs/{run}/attempts/")
    matches = (re.fullmatch(r"(\d+)\.request\.json", name) for name in names)
    number = max((int(match[1]) for match in matches if match), default=None)
    return None if number is None else read(aws, attempt_key(run, number, "request.json"))


def newest_step(aws: Aws, run: str) -> int:
    """Return the training step of the newest complete checkpoint in the bucket, -1 without one."""
    names = s3.listing(aws, f"runs/{run}/checkpoints/")
    steps = (re.fullmatch(r"step-(\d+)[^/]*/manifest\.json", name) for name in names)
    return max((int(step[1]) for step in steps if step), default=-1)


def now() -> datetime:
    return datetime.now(UTC)


def seconds_between(start: datetime | None, end: datetime | None) -> float:
    """Return the seconds from start to end, 0 where one is not known."""
    return (end - start).total_seconds() if start and end else 0.0
