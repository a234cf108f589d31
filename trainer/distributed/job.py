"""One of several processes that torchrun started as one run."""

import functools
import ipaddress
import json
import logging
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.common.console import log
from trainer.common.errors import OK, Interrupted, UserError
from trainer.common.interrupt import Stop
from trainer.distributed.heartbeat import BEAT, SILENT, Heartbeat
from trainer.distributed.world import Action, Ended, ExitNotice, Lost, World
from trainer.settings import config as settings
from trainer.settings.config import Config

T = TypeVar("T")

START_SECONDS = 300.0  # for all processes to begin
FAREWELL_SECONDS = 10.0  # for the others to come and hear, when one ends before they have met
SAID_AFTER, SAID_EVERY = 2.0, 15.0  # seconds of waiting before the log says so, first and again
SIOCGIFADDR = 0x8915  # linux/sockios.h


class Job(World):
    """One of several processes.

    gloo sends numbers and flags, on the CPU; NCCL sends gradients on GPUs.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self.node = int(os.environ.get("GROUP_RANK", 0))
        self.hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        self.who = f"rank {self.rank} on {socket.gethostname()}"
        # We report errors in our own words.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        self.timeout = START_SECONDS
        self.group: Any = None  # for gradients; None: gloo's
        self._configured = False
        self._store: Any = None  # torchrun's, through which all processes talk
        self._opening: threading.Thread | None = None
        self._refused: Exception | None = None  # why the store could not be opened
        self._pending: tuple[Any, Tensor] | None = None  # the exchange of actions under way
        self._action = Action.GO  # the last one that this process sent

    def _open_store(self) -> None:
        """Set the store. Runs in a thread: while PyTorch waits, Python handles no signal."""
        try:
            self._wait_for_rank_0()
            # Without the number of processes, rendezvous waits for nobody.
            url, timeout = "env://?world_size=-1", timedelta(seconds=START_SECONDS)
            store, _, _ = next(rendezvous(url, timeout=timeout))
        except (RuntimeError, ValueError, OverflowError) as error:  # torch's DistError; no port
            self._refused = error
            return
        # After a restart by torchrun the store may still hold messages from before it.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._store = PrefixStore(f"packhorse/{restart}", store)

    def _wait_for_rank_0(self) -> None:
        """Return when rank 0 or torchrun listens: PyTorch itself would wait twice its timeout."""
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        while self.rank != 0:
            try:
                socket.create_connection(address, BEAT).close()
                return
            except OSError:
                time.sleep(0.1)

    def _meet(self, seconds: float, stop: Stop | None = None) -> None:
        """Open the store that all processes share, and start the heartbeat.

        Raise Lost where rank 0 isn't there within `seconds`, Interrupted when asked to stop,
        UserError where rank 0 can't listen.
        """
        if self._opening is None:
            self._opening = threading.Thread(target=self._open_store, name="store", daemon=True)
            self._opening.start()
        waiting, until = _Waiting(), time.monotonic() + seconds
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        while self._store is None:
            self._opening.join(0.02)
            if self._refused is not None:
                first = str(self._refused).splitlines()[0]
                if self.rank == 0:
                    raise UserError(
                        f"{where}: rank 0 can't listen there; give MASTER_PORT ({first})"
                    )
                raise Lost(f"rank 0 is not at {where}: {first}")
            if stop is not None:
                stop.check()
            if time.monotonic() > until:
                raise Lost(f"rank 0 did not come to {where} within {seconds:.0f} s")
            if self.local_rank == 0 and stop is not None:
                waiting.tell(lambda: f"rank 0 at {where}")
        self._heartbeat.watch()

    @functools.cached_property
    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._store, self.rank, self.size, self.who)

    def share_config(self, config: Config | None, stop: Stop) -> Config:
        self._meet(START_SECONDS, stop)
        with self._explained():
            self._heartbeat.listened.wait(BEAT)  # a process that has ended may have said why
            if config is not None:
                self._store.set("config", json.dumps(asdict(config)))
            while not self._store.check(["config"]):
                self._look()
                stop.check()
                time.sleep(0.02)
            self._configured = True
            return config or settings.from_dict(json.loads(self._store.get("config")))

    @contextmanager
    def connected(self, timeout: float, stop: Stop) -> Iterator[None]:
        self._heartbeat.stop = stop
        if self.hosts > 1:
            _choose_interface()
        self._meet(START_SECONDS, stop)
        with self._explained():
            self.barrier(stop)
            self.timeout = timeout
            dist.init_process_group(
                "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout),
            )
            yield
            if self._pending is not None:
                self._pending[0].wait()
            dist.destroy_process_group()
            self._heartbeat.end()

    def use_gpu(self) -> None:
        """Send gradients by NCCL from now on."""
        self.group = dist.new_group(backend="nccl", timeout=timedelta(seconds=self.timeout))

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        box = [work() if self.is_main_process else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def check_same(self, facts: dict[str, str], stop: Stop) -> None:
        self.barrier(stop)
        for key, expected in self.broadcast_from_main(lambda: facts).items():
            if facts[key] != expected:
                raise UserError(
                    f"{key}: {facts[key]} here, {expected} at rank 0; "
                    "all processes must have the same"
                )
        self.barrier(stop)  # else a process goes on, and learns too late that another one failed

    def barrier(self, stop: Stop | None = None) -> None:
        waiting = _Waiting()
        self._heartbeat.enter_barrier()
        while not self._heartbeat.barrier_is_full():
            self._look()
            if stop is not None:
                stop.check()
            if self.is_main_process:
                waiting.tell(self._heartbeat.outside_barrier)
            time.sleep(0.005)

    def farewell(self) -> None:
        heartbeat = self._heartbeat
        heartbeat.enter_barrier()
        while not (heartbeat.barrier_is_full() or heartbeat.notices() or heartbeat.missing(SILENT)):
            time.sleep(0.005)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def all_reduce_max(self, action: Action) -> Action:
        """Return the largest action of the previous call, so that no process or GPU has to wait.

        A process sends an action once.
        """
        answer = Action.GO
        if self._pending is not None:
            self._pending[0].wait()
            answer = Action(int(self._pending[1]))
        if action == self._action:
            action = Action.GO
        self._action = action
        flag = torch.tensor([int(action)])
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag
        return answer

    def interrupt(self, stop: Stop) -> None:
        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, stop.reason and f"{stop.reason} ({self.who})")
        raise Interrupted(next(reason for reason in reasons if reason))

    def rounds(self, batches: Iterable[T], stop: Stop) -> Iterator[T]:
        for batch in chain(batches, repeat(None)):
            flags = torch.tensor([stop.asked(), batch is not None], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            asked, more = flags.tolist()
            if asked:
                self.interrupt(stop)
            if not more:
                return
            if batch is not None:
                yield batch

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, mine: tuple[int, float] | None) -> tuple[int, float] | None:
        pairs: list[tuple[int, float] | None] = [None] * self.size
        dist.all_gather_object(pairs, mine)
        return min((pair for pair in pairs if pair), default=None)

    def gather(self, mine: list[Tensor]) -> list[Tensor]:
        parts: list[list[Tensor]] | None = None
        if self.is_main_process:
            parts = [[]] * self.size
        dist.gather_object(mine, parts)
        if parts is None:
            return mine
        count = sum(map(len, parts))
        return [parts[number % self.size][number // self.size] for number in range(count)]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Replace the error of a failed exchange by its cause: a process that ended or is lost."""
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + SILENT + BEAT
            while time.monotonic() < until and not self._heartbeat.missing(SILENT):
                self._look()
                time.sleep(0.02)
            missing = self._heartbeat.missing(SILENT)
            if missing:
                raise Lost(missing) from error
            if _of_exchange(error):
                first = str(error).splitlines()[0]
                raise Lost(f"an exchange between the processes failed: {first}") from error
            raise

    def tell(self, error: Exception, code: int, line: str, show: Callable[[], None]) -> None:
        if isinstance(error, Ended):
            # On its own host the process that ended has told the user itself.
            if self.local_rank == 0 and error.notice.node != self.node:
                show()
            self._heartbeat.end()  # the process that ended waits until this one has read its notice
            return
        if self.is_main_process:
            show()
        asked = isinstance(error, Interrupted)
        text = str(error) if asked else line.removeprefix(f"{self.who}: ")
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:  # torchrun shows it as the cause
            message = {"message": f"{self.who}: {text}", "timestamp": int(time.time())}
            Path(report).write_text(json.dumps(message))
        try:
            self._meet(FAREWELL_SECONDS)
        except (Lost, UserError):
            if not self.is_main_process:
                log.setLevel(logging.INFO)  # no other process is there to tell the user
                show()
            return
        self._heartbeat.say(ExitNotice(self.who, self.node, code, text, asked), FAREWELL_SECONDS)
        # Where all processes make the same mistake, the lowest rank alone tells the user.
        told = any(notice.text == text for notice in self._heartbeat.notices(below=self.rank))
        self._heartbeat.end()
        if not self.is_main_process and not told:
            show()

    def signed(self, text: str) -> str:
        return text if self.is_main_process else f"{self.who}: {text}"

    def leave(self, code: int) -> None:
        # The others still wait for settings, after --help for example.
        if self.is_main_process and not self._configured and code == OK:
            notice = ExitNotice(self.who, self.node, OK, "there is nothing to train", asked=False)
            with suppress(Lost, UserError):
                self._meet(FAREWELL_SECONDS)
                self._heartbeat.say(notice, FAREWELL_SECONDS)
                self._heartbeat.end()
        sys.stdout.flush()
        sys.stderr.flush()
        # Python's own exit would wait for processes that are gone, and abort this one where a
        # thread is in PyTorch's C++, though everything is saved.
        os._exit(code)

    def _look(self) -> None:
        """Raise Interrupted or Ended where another process has ended, Lost where one is silent."""
        for notice in self._heartbeat.notices():
            if notice.asked:
                raise Interrupted(notice.text)
            raise Ended(notice)
        missing = self._heartbeat.missing(self.timeout)
        if missing:
            raise Lost(missing)


class _Waiting:
    """Logs from time to time whom this process waits for."""

    def __init__(self) -> None:
        self._next = time.monotonic() + SAID_AFTER

    def tell(self, whom: Callable[[], str]) -> None:
        """Log it, when it is time. whom: returns the names."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SAID_EVERY
        # Also on a rank that logs errors only: no other process may be there to say it.
        text = f"waiting for {whom()}"
        log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, text, (), None))


def _of_exchange(error: RuntimeError) -> bool:
    """Return whether an error of PyTorch says that the processes could not talk.

    gloo's errors have no type of their own, so their text decides.
    """
    if isinstance(error, dist.DistError):
        return True
    return re.search("gloo|nccl|connect|timed out", str(error), re.IGNORECASE) is not None


def _choose_interface() -> None:
    """Let gloo and NCCL use the network that leads to rank 0's host.

    By themselves they take the interface of the host's own name, often the loopback.
    """
    import fcntl  # imported here: not on Windows, where a job has one host

    target = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    family, _, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own_address = probe.getsockname()[0]
        if family != socket.AF_INET or ipaddress.ip_address(own_address).is_loopback:
            return
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == own_address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
