"""The machine that a run computes on: device, precision, and what equal bits depend on."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import PIL
import torch
from PIL import features
from torch import nn

from trainer.common.console import log
from trainer.common.errors import UserError
from trainer.network import startup

# mallopt's parameters in glibc's malloc.h: thresholds in bytes above which free() gives memory back
# to the system.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """A run's device and precision."""

    device: torch.device
    precision: torch.dtype  # of matrix products
    processes: int | str = 1  # of the run, where their number changes the bits
    # In which a frozen backbone may compute the features of train; None: in `precision`.
    frozen: torch.dtype | None = None

    def __str__(self) -> str:
        return str(self.precision).removeprefix("torch.")

    def facts(self) -> dict[str, str]:
        """Return the facts that must be the same in all processes of a run."""
        return {
            "PyTorch": torch.__version__,
            "the device": self.device.type,
            "the precision": str(self),
            "the precision of frozen features": str(self.for_frozen()),
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which operations run in this machine's precision."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def in_float32(self) -> "Machine":
        """Return the same machine, computing in float32."""
        return replace(self, precision=torch.float32)

    def for_frozen(self) -> "Machine":
        """Return the same machine, in the precision that a frozen backbone may use for train."""
        return replace(self, precision=self.frozen or self.precision)

    def environment(self) -> dict[str, Any]:
        """Return the facts that must not change, so that a resumed run gives the same bits."""
        values: dict[str, Any] = {
            "torch": torch.__version__,
            "pillow": f"{PIL.__version__}, libjpeg {features.version('libjpeg_turbo')}",
            "device": _name(self.device),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "precision": str(self),
            "processes": self.processes,
        }
        if self.frozen is not None:
            values["features"] = str(self.for_frozen())
        return values


def prepare(
    device: str,
    precision: str,
    processes: int | str = 1,
    local_rank: int = 0,
    local_size: int = 1,
    frozen: bool = False,
) -> Machine:
    """Set the device up: auto, cpu, cuda or mps, in precision auto, fp32, bf16 or fp16.

    frozen: whether the backbone is frozen, or may be. local_rank: this process's number among the
    local_size processes of this host, each of which has its own GPU. Raise UserError where this
    machine lacks the device or the precision.
    """
    where = choose(device, local_rank, local_size)
    if where.type == "cpu":
        keep_freed_memory()
    machine = Machine(where, choose_precision(precision, where), processes)
    if frozen and precision == "auto" and where.type == "cpu" and _has_bfloat16(where):
        machine = replace(machine, frozen=torch.bfloat16)
    return machine


def choose(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `mps`.

    Raise UserError where a GPU is asked for and there is none: training on the CPU without a word
    would cost days. Raise it too where this host has more processes than GPUs: two that share a GPU
    are slower than one.
    """
    if name == "mps":
        return _apple_gpu(local_size)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"train.device=cuda: PyTorch {torch.__version__} sees no GPU here; "
            "check nvidia-smi and the driver, or use train.device=cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > 1:
        gpus = torch.cuda.device_count()
        if gpus < local_size:
            raise UserError(
                f"{local_size} processes run on this host, but PyTorch sees {gpus} "
                f"GPU{'s' * (gpus > 1)}; start one a GPU "
                f"(torchrun --nproc_per_node={gpus}), or use train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def _apple_gpu(local_size: int) -> torch.device:
    """Return the GPU of a Mac. Raise UserError where there is none, or processes would share it."""
    if not torch.backends.mps.is_available():
        raise UserError(
            f"train.device=mps: PyTorch {torch.__version__} sees no Apple GPU here; it needs a Mac "
            "with an Apple chip, and a PyTorch built for it; use train.device=auto"
        )
    if local_size > 1:
        raise UserError(
            f"train.device=mps, but {local_size} processes run on this host: it has one GPU; "
            "start one process, or use train.device=cpu"
        )
    log.warning("train.device=mps: the same command may not give the same bits on Apple's GPUs")
    return torch.device("mps")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for `auto`, `fp32`, `bf16` or `fp16` on `device`.

    A T4 claims bfloat16 by emulation, many times slower than float16, so only native support
    counts. Raise UserError for what the device can't do well.
    """
    native = _has_bfloat16(device)
    if name == "bf16" and not native:
        raise UserError(
            f"train.precision=bf16: this {_name(device)} has no native bfloat16; "
            f"allowed: auto, fp32{', fp16' * (device.type == 'cuda')}"
        )
    if name == "fp16" and device.type != "cuda":
        raise UserError(
            "train.precision=fp16 is for CUDA's GPUs: on a CPU it is slower and less exact than "
            "fp32, on Apple's GPUs untried; allowed: auto, fp32, bf16 where it is native"
        )
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    if native:
        return torch.bfloat16
    return torch.float16


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies matrices in bfloat16."""
    if device.type == "mps":
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def make_deterministic() -> None:
    """Make the same command give the same bits on the same machine.

    Call it before the first CUDA operation.
    """
    # cuBLAS is deterministic only with this setting.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Otherwise the compiler chooses kernels by its own timings.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.backends.cudnn.benchmark = False
    startup.set_deterministic()
    # Our code reads no memory before it writes it, so PyTorch need not fill it with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def counting() -> Iterator[None]:
    """Leave deterministic mode while metrics count, on the CPU: sums of integers repeat anyway.

    In deterministic mode torchmetrics compares N predictions in C classes with N x C**2 numbers: 16
    GB for 2,000 pictures of 1,000 classes.
    """
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    startup.set_deterministic(False)
    try:
        yield
    finally:
        startup.set_deterministic(strict, warns)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, as PyTorch does on a GPU.

    By default glibc gives large blocks back to the system, which clears each page before it is used
    again: 8 % of a ResNet-18's step (`make bench ARGS=loop`). Without glibc do nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, 2**30)


def check_compiler(where: torch.device) -> None:
    """Compile one operation. Raise UserError where torch.compile doesn't work on this machine.

    It needs a C++ compiler on a CPU, a C compiler on a GPU, and for both Python's headers.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(1, device=where))
    except RuntimeError as error:  # all that PyTorch's compiler raises is one
        reason = str(error).splitlines()[0]
        raise UserError(
            f"train.compile=true: PyTorch can't compile on this machine ({reason}); "
            "install a compiler and Python's headers (apt-get install g++ python3-dev), "
            "or set train.compile=false"
        ) from error


def compiled(network: nn.Module) -> nn.Module:
    """Return the compiled network, which shares the parameters.

    Each batch shape is compiled separately: code for any shape would depend on the shapes that came
    before, and a resumed run sees them in another order.
    """
    return cast(nn.Module, torch.compile(network, dynamic=False))


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"cpu": "CPU", "mps": "Apple GPU"}[device.type]
