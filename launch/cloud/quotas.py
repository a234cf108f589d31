"""How much the account may rent: its quotas, from Service Quotas by name and number."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from launch.cloud.session import Aws
from trainer.common import files
from trainer.common.paths import user_cache

# Keeps the numbers of SageMaker's quotas once they are known: they are the same in all regions.
NUMBERS = user_cache() / "quotas.json"
UNLISTED = "NoSuchResourceException"

# EC2's quotas, on demand and spot: each is for families of instance types, and in vCPUs (Service
# Quotas, 2026-11).
_EC2 = {
    r"g\d|vt": ("Running On-Demand G and VT instances", "L-DB2E81BA"),
    r"p\d": ("Running On-Demand P instances", "L-417A185B"),
    r"[acdhimrtz]\d|im|is": ("Running On-Demand Standard instances", "L-1216C47A"),
}
_EC2_SPOT = {
    r"g\d|vt": ("All G and VT Spot Instance Requests", "L-3819A6DF"),
    r"p5": ("All P5 Spot Instance Requests", "L-C4BD4855"),
    r"p\d": ("All P4, P3 and P2 Spot Instance Requests", "L-7212CCBC"),
    r"[acdhimrtz]\d|im|is": ("All Standard Spot Instance Requests", "L-34B43A08"),
}
_SIZES = {"nano": 2, "micro": 2, "small": 2, "medium": 2, "large": 2, "xlarge": 4}


@dataclass(frozen=True)
class Quota:
    """A limit of the account in a region. number: AWS's code; "": look it up by the name."""

    service: str  # as Service Quotas calls it
    name: str
    number: str
    needed: int  # in `unit`
    unit: str = "instances"


def of_ec2(instance_type: str, spot: bool, instances: int) -> Quota | None:
    """Return the quota that these machines count against, None for an unknown instance type."""
    count = vcpus(instance_type)
    for pattern, (name, number) in (_EC2_SPOT if spot else _EC2).items():
        if re.match(pattern, instance_type) and count is not None:
            return Quota("ec2", name, number, count * instances, "vCPUs")
    return None


def of_sagemaker(instance_type: str, use: str, instances: int) -> Quota:
    """Return the quota of a machine for a use, like "training job" or "notebook instance"."""
    return Quota("sagemaker", f"{instance_type} for {use} usage", "", instances)


def vcpus(instance_type: str) -> int | None:
    """Return an instance type's vCPUs by its size: 4 for each xlarge. None for bare metal."""
    size = instance_type.rpartition(".")[2]
    times = re.fullmatch(r"(\d+)xlarge", size)
    if times:
        return 4 * int(times[1])
    return _SIZES.get(size)


def value(aws: Aws, quota: Quota) -> tuple[float | None, str]:
    """Return the quota's value in the account now, and AWS's number for the quota.

    The value is None where AWS has no such quota: then the region has no such machine. Raise
    AwsError.
    """
    if quota.number:
        return _of_number(aws, quota.service, quota.number), quota.number
    known = _known()
    if quota.name in known:
        return _of_number(aws, quota.service, known[quota.name]), known[quota.name]
    found: tuple[float | None, str] = None, ""
    # AWS lists quotas in pages of a hundred, unsorted, and can't search them by name.
    for name, number, limit in _listed(aws, quota.service):
        known[name] = number
        if name == quota.name:
            found = limit, number
            break
    files.keep(NUMBERS, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


def _of_number(aws: Aws, service: str, number: str) -> float | None:
    which = {"ServiceCode": service, "QuotaCode": number}
    answer = aws.find("service-quotas", "GetServiceQuota", UNLISTED, **which)
    if answer is None:  # no increase was ever requested: AWS's default counts
        answer = aws.find("service-quotas", "GetAWSDefaultServiceQuota", UNLISTED, **which)
    return None if answer is None else float(answer["Quota"]["Value"])


def _listed(aws: Aws, service: str) -> Iterator[tuple[str, str, float]]:
    pages = aws.pages("service-quotas", "ListServiceQuotas", "Quotas", ServiceCode=service)
    for each in pages:
        yield each["QuotaName"], each["QuotaCode"], float(each["Value"])


def _known() -> dict[str, str]:
    try:
        known: dict[str, str] = dict(json.loads(NUMBERS.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: AWS is asked
        return {}
    return known
