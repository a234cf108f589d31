"""The machine that a run computes on: which device, which precision, and what must stay the same for the same bits."""

import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from trainer.common.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = (
    -1,
    -3,
)  # of glibc's malloc.h; beyond them, in bytes, memory goes back to the system


@dataclass(frozen=True)
class Machine:
    device: torch.device
    precision: torch.dtype  # of matrix products
    processes: int | str = 1  # where their number makes a difference

    def __str__(self) -> str:
        return str(self.precision).removeprefix("torch.")

    def facts(self) -> dict[str, str]:
        """What all processes of a run must have in common."""
        return {
            "PyTorch": torch.__version__,
            "the device": self.device.type,
            "the precision": str(self),
        }

    def environment(self) -> dict[str, Any]:
        """What must be equal for a resumed run to give the same bits as one that was never interrupted."""
        return {
            "torch": torch.__version__,
            "device": _name(self.device),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "precision": str(self),
            "processes": self.processes,
        }


def prepare(
    device: str,
    precision: str,
    *,
    deterministic: bool,
    threads: int | None,
    processes: int | str = 1,
    local_rank: int = 0,
    local_size: int = 1,
) -> Machine:
    """Sets PyTorch up. device: auto, cpu or cuda; precision: auto, fp32, bf16 or fp16. local_rank: this process's number among the local_size ones
    of this host, each of which has a GPU of its own. Raises UserError for what this machine hasn't.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        make_deterministic()
    where = choose(device, local_rank, local_size)
    if where.type == "cpu":
        keep_freed_memory()
    return Machine(where, choose_precision(precision, where), processes)


def choose(wanted: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises UserError where a GPU is asked for and there is none: a silent CPU would cost days; and where
    the processes of this host are more than its GPUs: to share one is slower than to have fewer.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"train.device=cuda: PyTorch {torch.__version__} sees no GPU here; check nvidia-smi and the driver, or use train.device=cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > 1:
        if (there := torch.cuda.device_count()) < local_size:
            raise UserError(
                f"{local_size} processes run on this host, but PyTorch sees {there} GPU{'s' * (there > 1)}; start one a GPU "
                f"(torchrun --nproc_per_node={there}), or use train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for `auto`, `fp32`, `bf16` or `fp16` on `device`.

    A T4 claims bfloat16 by emulation, many times slower than float16, so only native support counts. Raises UserError for what the
    device can't do well.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if wanted == "auto":
        return (
            torch.float32 if device.type == "cpu" else torch.bfloat16 if native else torch.float16
        )
    if wanted == "bf16" and not native:
        raise UserError(
            f"train.precision=bf16: this {_name(device)} has no native bfloat16; allowed: auto, fp32{', fp16' * (device.type == 'cuda')}"
        )
    if wanted == "fp16" and device.type == "cpu":
        raise UserError(
            "train.precision=fp16 is for GPUs: on a CPU it is slower and less exact than fp32; allowed: auto, fp32, bf16 where it is native"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def make_deterministic() -> None:
    """The same command gives the same bits on the same machine. Call before the first CUDA operation."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # without it cuBLAS refuses to be deterministic
    os.environ.setdefault(
        "TORCHINDUCTOR_DETERMINISTIC", "1"
    )  # or the compiler chooses by what was fastest when it looked
    torch.backends.cudnn.benchmark = False
    # What torch.use_deterministic_algorithms(True, warn_only=True) does, less its import of the whole compiler, which doubles a small run's start.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    # Nothing of ours reads memory before it is written, so it need not be filled with NaN each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next step, as PyTorch does on a GPU. By itself it gives large blocks back to the system, which then
    clears every page anew: 8 % of a ResNet-18's step (`make bench ARGS=loop`). Does nothing elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, 2**30)


def check_compiler(where: torch.device) -> None:
    """Compile one operation. Raises UserError where torch.compile doesn't work on this machine:
    it needs a C++ compiler on a CPU, a C compiler on a GPU, and for both Python's headers.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(1, device=where))
    except RuntimeError as error:  # all that PyTorch's compiler raises is one
        reason = str(error).splitlines()[0]
        raise UserError(
            f"train.compile=true: PyTorch can't compile on this machine ({reason}); install a "
            "compiler and Python's headers (apt-get install g++ python3-dev), or set train.compile=false"
        ) from error


def compiled(network: nn.Module) -> nn.Module:
    """Return its compiled form, which shares the parameters.

    Every shape of a batch gets code of its own: code for any shape would depend on which shapes
    came before, and a run that goes on after a stop sees them in another order.
    """
    return cast(nn.Module, torch.compile(network, dynamic=False))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
