"""What is known of AWS's instance types, beside their prices."""

import re
from dataclasses import dataclass

from trainer.settings.config import Config

# GPUs of NVIDIA in the machines that have several: AWS's tables of instance types (2026-11).
_GPUS = {
    2: "g3.8xlarge g5g.16xlarge g5g.metal g7e.12xlarge",
    4: "g3.16xlarge g4dn.12xlarge g5.12xlarge g5.24xlarge g6.12xlarge g6.24xlarge "
    "g6e.12xlarge g6e.24xlarge g7e.24xlarge p3.8xlarge",
    8: "g4dn.metal g5.48xlarge g6.48xlarge g6e.48xlarge g7e.48xlarge p2.8xlarge p3.16xlarge "
    "p3dn.24xlarge p4d.24xlarge p4de.24xlarge p5.48xlarge p5e.48xlarge p5en.48xlarge "
    "p6-b200.48xlarge p6-b300.48xlarge",
    16: "p2.16xlarge",
}  # fmt: skip
GPUS = {name: count for count, names in _GPUS.items() for name in names.split()}


def has_gpu(instance_type: str) -> bool:
    """Return whether machines of this type, with or without `ml.`, have GPUs of NVIDIA."""
    return re.match(r"(ml\.)?(p|g)\d", instance_type) is not None


def processes(instance_type: str, config: Config, instances: int = 1) -> int:
    """Return how many processes train, on all machines.

    It is one for each GPU, unless the settings say how many.
    """
    if config.train.processes is not None:
        return config.train.processes
    if config.train.device == "cpu" and instances == 1:
        return 1
    return instances * GPUS.get(instance_type.removeprefix("ml."), 1)


@dataclass(frozen=True)
class InstanceType:
    """A machine of a target's default, or that would be one."""

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
