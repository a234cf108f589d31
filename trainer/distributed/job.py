"""Many processes as one run: where this one stands among those that torchrun started, what they tell each other, and how they end together.

One process alone has a `World`, whose methods do nothing; one of several has a `Job`. How the gradients of a batch come together is a matter of its
own: `Gradients` for one process, `Replicated` for the fast mode, `Ordered` for the exact one. PyTorch is imported where it is first used: a run of
one process reads its settings and its folders without it.
"""

import functools
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.common.errors import OK, Interrupted, UserError
from trainer.common.interrupt import Stop
from trainer.settings import config as settings
from trainer.settings.config import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainer.images.sampler import Share

T = TypeVar("T")

GO, SAVE, STOP = range(
    3
)  # what a process wishes after a step; the largest wish of all is done by all
BEAT = 1.0  # seconds between two signs of life
SILENT = 3 * BEAT  # without one for so long, a process is the likely cause of a failed exchange
START = 300.0  # seconds for all processes to begin


class Lost(Exception):
    """A process of the job no longer answers. The message names it."""


class Ended(Exception):
    """Another process has ended the job, for a reason of its own."""

    def __init__(self, word: "Word") -> None:
        super().__init__(f"{word.who}: {word.text}")
        self.word = word


@dataclass(frozen=True)
class Word:
    """The last that a process tells the others: why it ends."""

    who: str  # "rank 1 on gpu-box"
    node: int  # of the host that it runs on
    code: int  # its exit code
    text: str
    asked: bool  # to stop, and has done so in order


class World:
    """One process alone."""

    rank = 0
    size = 1
    local_rank = 0  # among the processes of this host
    local_size = 1
    hosts = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that logs and writes the run's directory."""
        return self.rank == 0

    def check(self, processes: int | None, hosts: int | None) -> None:
        """Raises UserError where another number of processes or hosts runs than was asked for."""
        start = "torchrun --nproc_per_node=N -m trainer (make train GPUS=N) starts N on this host, --nnodes=M on each of M hosts"
        if processes not in (None, self.size):
            raise UserError(
                f"train.processes={processes}, but {self.size} {'runs' if self.size == 1 else 'run'}: {start}"
            )
        if hosts not in (None, self.hosts):
            raise UserError(f"train.hosts={hosts}, but the processes run on {self.hosts}: {start}")

    def share_config(self, config: Config | None) -> Config:
        """Rank 0's settings, which it gives and the others (None) receive."""
        assert config is not None
        return config

    @contextmanager
    def connected(self, timeout: float, stop: Stop) -> Iterator[None]:
        """While the context lasts, the processes can talk. timeout: seconds that one may keep the others waiting.

        Raises Lost, Ended or Interrupted in the place of an error that comes from another process's end.
        """
        yield

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """What rank 0's `work` returns, in all processes; the others don't do it."""
        return work()

    def check_same(self, facts: dict[str, str], stop: Stop) -> None:
        """Raises UserError in a process whose facts are not rank 0's."""

    def barrier(self, stop: Stop | None = None) -> None:
        """Waits until all processes are here, however long that takes, as long as they live. Raises Interrupted when asked to stop meanwhile."""

    def farewell(self) -> None:
        """Waits until all processes have saved what is to be saved, or have left."""

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Lets one process of each host through first: what it downloads, the others find."""
        yield

    def all_reduce_max(self, wish: int) -> int:
        """The largest wish of all processes."""
        return wish

    def interrupt(self, stop: Stop) -> None:
        """Raises Interrupted in all processes, with the reason of the one that was asked."""
        stop.check()

    def rounds(self, batches: Iterable[T], stop: Stop) -> Iterator[T]:
        """The batches of this process. Raises Interrupted in all processes at the same round."""
        for batch in batches:
            stop.check()
            yield batch

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        return values

    def gather(self, mine: "list[Tensor]") -> "list[Tensor]":
        """On rank 0 the tensors of all processes, each of which has every size-th one; elsewhere its own."""
        return mine

    def tell(self, error: Exception, code: int, line: str, show: Callable[[], None]) -> None:
        """Tells the other processes why this one ends; and the user, by `show`, unless that is for another one to do."""
        show()

    def signed(self, text: str) -> str:
        """`text` as the user is to see it, with the process that it comes from."""
        return text

    def leave(self, code: int) -> None:
        """The last thing that a process does."""


ALONE = World()


@functools.cache
def world() -> World:
    """Where this process stands, read from torchrun's environment."""
    started = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    } <= os.environ.keys()
    return Job() if started and int(os.environ["WORLD_SIZE"]) > 1 else ALONE


class Job(World):
    """One of several processes, started by torchrun. Numbers and flags go by gloo, on the CPU, gradients on GPUs by NCCL."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank, self.local_size = (
            int(os.environ["LOCAL_RANK"]),
            int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        self.node = int(os.environ.get("GROUP_RANK", 0))
        self.hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        self.who = f"rank {self.rank} on {socket.gethostname()}"
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # what goes wrong is said in our own words
        self.timeout = START
        self.group: Any = None  # for gradients; None: gloo's
        self._configured = False
        self._pending: tuple[Any, Tensor] | None = None  # the exchange of wishes that is under way
        self._wish = GO  # of it

    @functools.cached_property
    def _store(self) -> Any:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=START)))
        # After a restart by torchrun the store may still hold what was said before it.
        return PrefixStore(f"packhorse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    @functools.cached_property
    def _pulse(self) -> "Pulse":
        return Pulse(self._store, self.rank, self.size, self.who)

    def share_config(self, config: Config | None) -> Config:
        with self._explained():
            self._pulse.watch()
            if config is not None:
                self._store.set("config", json.dumps(asdict(config)))
            while not self._store.check(["config"]):
                self._look()
                time.sleep(0.02)
            self._configured = True
            return config or settings.from_dict(json.loads(self._store.get("config")))

    @contextmanager
    def connected(self, timeout: float, stop: Stop) -> Iterator[None]:
        import torch.distributed as dist

        self._pulse.stop = stop
        if self.hosts > 1:
            _choose_interface()
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
            self._pulse.end()

    def use_gpu(self) -> None:
        """Gradients go by NCCL from now on."""
        import torch.distributed as dist

        self.group = dist.new_group(backend="nccl", timeout=timedelta(seconds=self.timeout))

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        import torch.distributed as dist

        box = [work() if self.is_main_process else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def check_same(self, facts: dict[str, str], stop: Stop) -> None:
        self.barrier(stop)
        for key, wanted in self.broadcast_from_main(lambda: facts).items():
            if facts[key] != wanted:
                raise UserError(
                    f"{key}: {facts[key]} here, {wanted} at rank 0; all processes must have the same"
                )

    def barrier(self, stop: Stop | None = None) -> None:
        self._pulse.watch()
        self._pulse.meet()
        while not self._pulse.all_met():
            self._look()
            if stop is not None:
                stop.check()
            time.sleep(0.005)

    def farewell(self) -> None:
        self._pulse.meet()
        while (
            not self._pulse.all_met()
            and not self._pulse.words()
            and not self._pulse.missing(SILENT)
        ):
            time.sleep(0.005)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def all_reduce_max(self, wish: int) -> int:
        """The largest wish of all processes, of the call before: so nobody waits for an answer, and no GPU is waited for. A wish is sent once."""
        import torch
        import torch.distributed as dist

        answer = GO
        if self._pending is not None:
            self._pending[0].wait()
            answer = int(self._pending[1])
        self._wish = wish if wish != self._wish else GO
        flag = torch.tensor([self._wish])
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag
        return answer

    def interrupt(self, stop: Stop) -> None:
        import torch.distributed as dist

        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, stop.reason and f"{stop.reason} ({self.who})")
        raise Interrupted(next(reason for reason in reasons if reason))

    def rounds(self, batches: Iterable[T], stop: Stop) -> Iterator[T]:
        import torch
        import torch.distributed as dist

        for batch in chain(batches, repeat(None)):
            flags = torch.tensor([stop.reason is not None, batch is not None], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            asked, more = flags.tolist()
            if asked:
                self.interrupt(stop)
            if not more:
                return
            if batch is not None:
                yield batch

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, mine: "list[Tensor]") -> "list[Tensor]":
        import torch.distributed as dist

        parts: list[list[Tensor]] | None = [[]] * self.size if self.is_main_process else None
        dist.gather_object(mine, parts)
        if parts is None:
            return mine
        return [
            parts[number % self.size][number // self.size] for number in range(sum(map(len, parts)))
        ]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where an exchange fails because another process has ended or is lost, raises that in the place of the failure."""
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + SILENT + BEAT
            while time.monotonic() < until and not self._pulse.missing(SILENT):
                self._look()
                time.sleep(0.02)
            if missing := self._pulse.missing(SILENT):
                raise Lost(missing) from error
            if _of_exchange(error):
                raise Lost(
                    f"an exchange between the processes failed: {str(error).splitlines()[0]}"
                ) from error
            raise

    def tell(self, error: Exception, code: int, line: str, show: Callable[[], None]) -> None:
        if isinstance(error, Ended):
            if (
                self.local_rank == 0 and error.word.node != self.node
            ):  # on its own host it has spoken for itself
                show()
            return
        if self.is_main_process:
            show()
        asked = isinstance(error, Interrupted)
        text = str(error) if asked else line.removeprefix(f"{self.who}: ")
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it as the cause
            Path(report).write_text(
                json.dumps({"message": f"{self.who}: {text}", "timestamp": int(time.time())})
            )
        with suppress(RuntimeError):  # no store, no others
            self._pulse.watch()
            self._pulse.say(Word(self.who, self.node, code, text, asked))
        # A mistake that all processes see is told by the first of them.
        if not self.is_main_process and not any(
            word.text == text for word in self._pulse.words(below=self.rank)
        ):
            show()

    def signed(self, text: str) -> str:
        return text if self.is_main_process else f"{self.who}: {text}"

    def leave(self, code: int) -> None:
        if (
            self.is_main_process and not self._configured and code == OK
        ):  # --help, say: the others wait for settings
            self._pulse.watch()
            self._pulse.say(Word(self.who, self.node, OK, "there is nothing to train", asked=False))
            self._pulse.end()
        sys.stdout.flush()
        sys.stderr.flush()
        if code != OK:
            os._exit(code)  # an orderly end would wait for processes that are no more

    def _look(self) -> None:
        """Raises what the others make of this process's waiting: Interrupted or Ended where one has ended, Lost where one is silent for too long."""
        for word in self._pulse.words():
            raise Interrupted(word.text) if word.asked else Ended(word)
        if missing := self._pulse.missing(self.timeout):
            raise Lost(missing)


class Pulse(threading.Thread):
    """Tells the others through the store that this process lives, how often it has come to a meeting, and why it ends; and listens to them.

    Whatever may block on a broken network happens in this thread. The main one only reads what was heard last.
    """

    def __init__(self, store: Any, rank: int, size: int, who: str) -> None:
        super().__init__(name="pulse", daemon=True)
        self._store, self._rank, self._parent = store.clone(), rank, os.getppid()
        self._others = [other for other in range(size) if other != rank]
        self._heard: dict[int, dict[str, Any]] = {}
        self._raw: dict[int, bytes] = {}
        self._at = dict.fromkeys(
            self._others, time.monotonic()
        )  # when something new was heard last
        self._contact = time.monotonic()  # when the store answered last
        self._mine: dict[str, Any] = {
            "who": who,
            "beat": 0,
            "met": 0,
            "word": None,
            "heard": [],
            "done": False,
        }
        self._wake, self._quick = threading.Event(), False
        self.stop: Stop | None = None  # asked when torchrun has gone

    def watch(self) -> None:
        """Starts, once."""
        if self.ident is None:
            self.start()

    def end(self) -> None:
        """Says that all is done and stops: a thread that is in PyTorch's C++ when Python ends would abort the process."""
        self._mine["done"] = True
        self._wake.set()
        self.join(SILENT)

    def run(self) -> None:
        done = False
        while not done:
            self._mine["beat"] += 1
            done = self._mine["done"]
            try:
                self._store.set(f"pulse/{self._rank}", json.dumps(self._mine))
                self._listen()
                self._contact = time.monotonic()
            except RuntimeError:  # torch's DistError; what follows from it is `missing`
                self._wake.wait(BEAT)
            if os.getppid() != self._parent and self.stop is not None:
                self.stop.ask("the end of torchrun")
            if not done:
                self._wake.wait(0.02 if self._quick else BEAT)
                self._wake.clear()

    def _listen(self) -> None:
        there = [
            other
            for other in self._others
            if other in self._raw or self._store.check([f"pulse/{other}"])
        ]
        if not there:
            return
        for other, raw in zip(
            there, self._store.multi_get([f"pulse/{other}" for other in there]), strict=True
        ):
            if raw != self._raw.get(other):
                self._raw[other], self._at[other] = raw, time.monotonic()
                self._heard[other] = json.loads(raw)
        self._mine["heard"] = [other for other in there if self._heard[other]["word"]]

    def meet(self) -> None:
        self._mine["met"] += 1
        self._quick = True
        self._wake.set()

    def all_met(self) -> bool:
        everybody = all(
            other in self._heard and self._heard[other]["met"] >= self._mine["met"]
            for other in self._others
        )
        self._quick = self._quick and not everybody
        return everybody

    def say(self, word: Word) -> None:
        """Returns when all others have heard it, or seem to be deaf."""
        self._mine["word"] = vars(word)
        self._quick = True
        self._wake.set()
        until = time.monotonic() + SILENT
        while time.monotonic() < until and not all(
            other in self._heard and self._rank in self._heard[other]["heard"]
            for other in self._others
        ):
            time.sleep(0.01)

    def words(self, below: int | None = None) -> list[Word]:
        """Of those who have ended. below: of ranks below this one only."""
        heard = [
            self._heard[other]["word"]
            for other in sorted(self._heard)
            if below is None or other < below
        ]
        return [Word(**word) for word in heard if word]

    def missing(self, seconds: float) -> str | None:
        """Who has given no sign for so long, if anybody."""
        now = time.monotonic()
        if now - self._contact > seconds:
            return "the host of rank 0 no longer answers: it is gone, or the network to it"
        silent = [
            other
            for other in self._others
            if now - self._at[other] > seconds
            and not (other in self._heard and self._heard[other]["done"])
        ]
        if not silent:
            return None
        names = ", ".join(
            self._heard[other]["who"] if other in self._heard else f"rank {other}"
            for other in silent[:4]
        )
        return (
            names
            + (f" and {len(silent) - 4} more" if len(silent) > 4 else "")
            + " no longer answers: killed, hanging, or its network is gone"
        )


def _of_exchange(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that the processes could not talk. gloo's have no type of their own."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or bool(
        re.search("gloo|nccl|connect|timed out", str(error), re.IGNORECASE)
    )


def _choose_interface() -> None:
    """Lets gloo and NCCL use the network that leads to rank 0's host. By themselves they take that of the host's own name, often the loopback."""
    import fcntl
    import struct

    target = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    family, _, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        mine = probe.getsockname()[0]
        if family != socket.AF_INET or ipaddress.ip_address(mine).is_loopback:
            return
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(
                    probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15])
                )[20:24]  # SIOCGIFADDR
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found) == mine:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


# --- how the gradients of a batch come together ---


class Gradients:
    """Of one process that computes whole batches: complete as they are."""

    def __init__(self, forward: Any, world: World = ALONE) -> None:
        self.forward = forward  # what training calls
        self.world = world

    def whole(self, count: int) -> float:
        """What a summed loss is divided by, so that what comes together is the gradient of the whole batch's mean. count: pictures here."""
        return count

    def shards(self, pixels: "Tensor", targets: "Tensor") -> "Iterator[tuple[int, Tensor, Tensor]]":
        """This process's part of a batch as (number, pixels, targets) of each shard. After each, the caller adds its gradients."""
        yield 0, pixels, targets

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """Around one of the parts that a shard is accumulated from."""
        return nullcontext()

    def combine(self) -> None:
        """After the last shard: each parameter has the gradient of the whole batch."""

    def share_buffers(self, network: "nn.Module") -> None:
        """Before an evaluation: gives all processes the same buffers."""


class Replicated(Gradients):
    """Fast: DistributedDataParallel. One shard a process; the gradients are averaged while the rest of them is computed."""

    def __init__(
        self,
        forward: Any,
        world: Job,
        share: "Share",
        batch: int,
        device: "torch.device",
        compress: str,
    ) -> None:
        from torch.nn.parallel import DistributedDataParallel

        if device.type == "cuda":
            world.use_gpu()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # PyTorch 2.14 has a new name for broadcast_buffers, which 2.9 doesn't know
            wrapped = DistributedDataParallel(
                forward,
                device_ids=[device.index] if device.type == "cuda" else None,
                process_group=world.group,
                broadcast_buffers=False,  # training reads no running statistics, so they need not be equal in each step: rank 0's count
                gradient_as_bucket_view=True,
            )
        super().__init__(wrapped, world)
        self._job = world
        self._shard, self._whole = (
            share.mine[0],
            batch / world.size,
        )  # DDP divides by the processes itself
        if compress == "fp16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            self.forward.register_comm_hook(world.group, fp16_compress_hook)

    def whole(self, count: int) -> float:
        return self._whole

    def shards(self, pixels: "Tensor", targets: "Tensor") -> "Iterator[tuple[int, Tensor, Tensor]]":
        yield self._shard, pixels, targets

    def part(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.forward.no_sync()

    def share_buffers(self, network: "nn.Module") -> None:
        import torch.distributed as dist

        for buffer in network.buffers():
            dist.broadcast(buffer, 0, group=self._job.group)


class Ordered(Gradients):
    """Exact: the shards of a batch are the same whatever the number of processes, and what they give is added in their order, bit for bit.

    Each shard starts from the same buffers; BatchNorm's statistics then move by the mean of what they moved in the shards. part: of the
    network that is trained. With several processes each adds up one slice of all gradients, so a step sends and receives what
    2 * shards / processes gradients take.
    """

    def __init__(
        self,
        forward: Any,
        world: World,
        share: "Share",
        batch: int,
        device: "torch.device",
        part: "nn.Module",
    ) -> None:
        super().__init__(forward, world)
        if isinstance(world, Job) and device.type == "cuda":
            world.use_gpu()
        self._parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        self._buffers = list(part.buffers())
        self._moving = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        self._share, self._batch = share, batch
        width = sum(tensor.numel() for tensor in (*self._parameters, *self._moving))
        self._slice = -(-width // world.size)
        # A row for each shard of this process: its gradients, and how far it moved the buffers.
        self._rows = self._parameters[0].new_zeros(
            len(share.mine), self._slice * world.size, requires_grad=False
        )

    def whole(self, count: int) -> float:
        return self._batch

    def shards(self, pixels: "Tensor", targets: "Tensor") -> "Iterator[tuple[int, Tensor, Tensor]]":
        import torch

        self._before = [buffer.clone() for buffer in self._buffers]
        lengths = self._share.lengths(self._batch)
        parts = zip(
            self._share.mine,
            torch.split(pixels, lengths),
            torch.split(targets, lengths),
            strict=True,
        )
        for row, (number, shard, wanted) in zip(self._rows, parts, strict=True):
            for parameter in self._parameters:
                parameter.grad = None
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
            yield number, shard, wanted
            self._keep(row)

    def _keep(self, row: "Tensor") -> None:
        import torch

        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        moved = [
            buffer - before
            for buffer, before in zip(self._buffers, self._before, strict=True)
            if buffer.is_floating_point()
        ]
        gradients = [parameter.grad for parameter in self._parameters]
        flat = [tensor.reshape(-1) for tensor in (*gradients, *moved) if tensor is not None]
        row[: sum(map(len, flat))] = torch.cat(flat)

    def combine(self) -> None:
        import torch

        total, end = _sum_in_order(self._rows, self.world, self._share, self._slice), 0
        moving = {id(buffer) for buffer in self._moving}
        with torch.no_grad():
            for parameter in self._parameters:
                start, end = end, end + parameter.numel()
                parameter.grad.copy_(total[start:end].view_as(parameter))  # type: ignore[union-attr]
            for buffer, before in zip(self._buffers, self._before, strict=True):
                if id(buffer) in moving:  # a counter already stands at one step more
                    start, end = end, end + buffer.numel()
                    buffer.copy_(before + total[start:end].view_as(buffer) / self._share.shards)


def _sum_in_order(rows: "Tensor", world: World, share: "Share", width: int) -> "Tensor":
    """The sum of all processes' rows, [mine, size * width], in the order of the shards, on each process: [size * width]."""
    import torch
    import torch.distributed as dist

    if not isinstance(world, Job):
        return _sum(rows)
    mine = [len(other.mine) for other in share.everybody()]
    sent = rows.view(len(rows), world.size, width).transpose(0, 1).contiguous()
    received = rows.new_empty(share.shards, width)
    dist.all_to_all_single(
        received.view(-1),
        sent.view(-1),
        [count * width for count in mine],
        [len(rows) * width] * world.size,
        group=world.group,
    )
    total = rows.new_empty(world.size * width)
    dist.all_gather(list(total.view(world.size, width)), _sum(received), group=world.group)
    assert isinstance(total, torch.Tensor)
    return total


def _sum(rows: "Sequence[Tensor] | Tensor") -> "Tensor":
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
