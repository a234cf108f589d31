"""Facts about AWS's instance types, except their prices."""

import re
from dataclasses import dataclass

from trainer.common.errors import UserError
from trainer.settings.config import Config

# Numbers of NVIDIA GPUs in machines that have several: AWS's tables of instance types (2026-11).
_GPUS = {
    2: "g3.8xlarge g5g.16xlarge g5g.metal g7.12xlarge g7e.12xlarge",
    4: "g3.16xlarge g4dn.12xlarge g5.12xlarge g5.24xlarge g6.12xlarge g6.24xlarge "
    "g6e.12xlarge g6e.24xlarge g7.24xlarge g7e.24xlarge p3.8xlarge",
    8: "g4dn.metal g5.48xlarge g6.48xlarge g6e.48xlarge g7.48xlarge g7e.48xlarge p2.8xlarge "
    "p3.16xlarge p3dn.24xlarge p4d.24xlarge p4de.24xlarge p5.48xlarge p5e.48xlarge p5en.48xlarge "
    "p6-b200.48xlarge p6-b300.48xlarge",
    16: "p2.16xlarge",
}  # fmt: skip
GPUS = {name: count for count, names in _GPUS.items() for name in names.split()}


def names_in(text: str | None) -> list[str]:
    """Return the names in a setting: one, or several with commas, with or without [ ]."""
    names = [name.strip() for name in (text or "").strip("[] ").split(",")]
    return [name for name in names if name]


def gpus(instance_type: str) -> int:
    """Return how many processes train on a machine: one for each GPU, else one."""
    return GPUS.get(instance_type.removeprefix("ml."), 1)


def has_gpu(instance_type: str) -> bool:
    """Return whether an instance type has NVIDIA GPUs. Takes names with and without `ml.`."""
    return re.match(r"(ml\.)?(p|gr?)\d", instance_type) is not None


# Families whose GPUs are not NVIDIA's, or too old for CUDA 13 (compute capability 7.5), and
# accelerators that are no GPUs: the container and AMI that we start can't use them.
_USELESS = {
    "g3": "its M60 is older than CUDA 13 serves",
    "g3s": "its M60 is older than CUDA 13 serves",
    "p2": "its K80 is older than CUDA 13 serves",
    "p3": "its V100 is older than CUDA 13 serves",
    "p3dn": "its V100 is older than CUDA 13 serves",
    "g4ad": "its GPU is AMD's",
    "p6e-gb200": "its processor is ARM, and the code there is built for x86",
} | dict.fromkeys(
    ("trn1", "trn1n", "trn2", "inf1", "inf2", "dl1", "dl2q", "vt1", "f1", "f2"),
    "its accelerator is no GPU",
)

# GB of the local disk, which SageMaker uses instead of a volume of chosen size: AWS's tables.
LOCAL_GB = {
    "g4dn": {"xlarge": 125, "2xlarge": 225, "4xlarge": 225, "8xlarge": 900, "12xlarge": 900,
             "16xlarge": 900},
    "g5": {"xlarge": 250, "2xlarge": 450, "4xlarge": 600, "8xlarge": 900, "12xlarge": 3800,
           "16xlarge": 1900, "24xlarge": 3800, "48xlarge": 7600},
    "g6": {"xlarge": 250, "2xlarge": 450, "4xlarge": 600, "8xlarge": 900, "12xlarge": 3760,
           "16xlarge": 1880, "24xlarge": 3760, "48xlarge": 7520},
    "g6e": {"xlarge": 250, "2xlarge": 450, "4xlarge": 600, "8xlarge": 900, "12xlarge": 3800,
            "16xlarge": 1900, "24xlarge": 3800, "48xlarge": 7600},
}  # fmt: skip


def local_gb(instance_type: str) -> int | None:
    """Return the GB of a machine's local disk; None: it has none, or its size is not known."""
    family, _, size = instance_type.removeprefix("ml.").partition(".")
    return LOCAL_GB.get(family, {}).get(size)


def check_trains(instance_type: str) -> None:
    """Raise UserError for a machine that our container or AMI can't run on, or can't use.

    In AWS's names a g after the generation means an ARM processor: g5g, m7g, c7gn.
    """
    family = instance_type.removeprefix("ml.").partition(".")[0]
    why = _USELESS.get(family)
    if re.match(r"[a-z]+\d+[a-z]*g[a-z]*$", family) or family == "a1":
        why = "its processor is ARM, and the code there is built for x86"
    if why:
        raise UserError(
            f"target.instance_type={instance_type} can't train: {why}; "
            "take one with a T4, A10G or L4, like g4dn.xlarge, g5.xlarge or g6.xlarge"
        )


def processes(instance_type: str, config: Config, instances: int = 1) -> int:
    """Return how many processes train, on all machines together.

    One for each GPU, unless the settings give their number.
    """
    if config.train.processes is not None:
        return config.train.processes
    if config.train.device == "cpu" and instances == 1:
        return 1
    return instances * gpus(instance_type)


@dataclass(frozen=True)
class InstanceType:
    """A machine that is a target's default, or could be."""

    name: str  # as in target.instance_type
    vcpus: int
    memory: int  # GiB
    gpu: str | None
    use: str  # what it is for
    count: int = 1
    trains: bool = True


# vCPU, memory and GPU: AWS's tables of instance types.
T4 = "T4 16 GB"
NOTEBOOK = "a notebook, from which jobs are started"
OFFERED = (
    InstanceType("g4dn.xlarge", 4, 16, T4, "one training run on EC2"),
    InstanceType("ml.g4dn.xlarge", 4, 16, T4, "a training job, and each trial of a search"),
    InstanceType("ml.m5.2xlarge", 8, 32, None, "the same without a GPU"),
    InstanceType("ml.m5.2xlarge", 8, 32, None, "a training job on several machines", count=4),
    InstanceType("ml.t3.medium", 2, 4, None, NOTEBOOK, trains=False),
)
