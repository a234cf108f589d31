"""Refuses deployments that can't work, or that cost money in vain. It doesn't call AWS."""

import difflib
import re
from collections.abc import Iterable, Mapping

from launch.cloud.request import core_session
from trainer.common.errors import UserError

# Families of instance types, by what they need.
ARM = r"[a-z]+\d+g[a-z]*"  # Graviton: c7g, r6gd
GPU = r"[gp]\d.*"
CHIPS = r"(inf|trn|dl)\d.*"  # AWS's own chips, and Gaudi
BURSTABLE = r"t\d.*"
GPU_BACKENDS = ("torch", "cuda")


def check_region(region: str) -> None:
    """Raise UserError for a region that AWS doesn't have."""
    session = core_session()
    known = {
        name
        for partition in session.get_available_partitions()
        for name in session.get_available_regions("lambda", partition)
    }
    if region in known:
        return
    near = difflib.get_close_matches(region, known, n=1, cutoff=0)
    raise UserError(
        f"--region {region}: AWS has no such region, as far as this botocore knows; "
        f"did you mean {near[0]}?"
    )


def check_instance(kind: str, priced: Iterable[str]) -> None:
    """Raise UserError for an instance type that no endpoint runs on. priced: types to propose.

    botocore's model lists the allowed types.
    """
    model = core_session().get_service_model("sagemaker")
    allowed = model.shape_for("ProductionVariantInstanceType").metadata["enum"]
    if kind not in allowed:
        near = ", ".join(name for name in priced if name in allowed)
        raise UserError(f"--set InstanceType={kind}: endpoints don't run on it; try one of {near}")


def check_numbers(parameters: Mapping[str, str]) -> None:
    """Raise UserError for parameters of the template that don't fit each other."""
    least, most = int(parameters["MinInstances"]), int(parameters["MaxInstances"])
    warm, reserved = parameters["ProvisionedConcurrency"], parameters["ReservedConcurrency"]
    if most < least:
        raise UserError(f"MaxInstances={most} is below MinInstances={least}; set both with --set")
    if parameters["CanaryPercent"] != "0" and least < 2:
        raise UserError(
            f"--set CanaryPercent={parameters['CanaryPercent']}: a part of one instance can't take "
            "traffic first; --set MinInstances=2 too, or leave it out"
        )
    if reserved != "0" and int(reserved) < int(warm):
        raise UserError(
            f"--set ReservedConcurrency={reserved}: {warm} are kept warm already "
            "(ProvisionedConcurrency); set one of both"
        )
    if parameters["SnapStart"] == "on" and warm != "0":
        raise UserError(
            "--set SnapStart=on: Lambda doesn't take it with provisioned concurrency; "
            "--set ProvisionedConcurrency=0 too"
        )


def check_endpoint(parameters: Mapping[str, str], image_region: str, region: str) -> None:
    """Raise UserError for an endpoint that can't work, or that wouldn't use its machine's GPU.

    parameters: the template's. image_region: of the container. region: of the stack.
    """
    kind, backend = parameters["InstanceType"], parameters["Backend"]
    family = kind.removeprefix("ml.").split(".")[0]
    instance = f"--set InstanceType={kind}"
    if image_region != region:
        raise UserError(
            f"--image of {image_region}: SageMaker takes one of {region} only, where the stack is; "
            "push it there, or give another --region"
        )
    if re.fullmatch(ARM, family):
        raise UserError(f"{instance}: it has ARM processors; the containers are for x86_64")
    if re.fullmatch(CHIPS, family):
        raise UserError(f"{instance}: nothing here uses its chips; take ml.c5.large, say")
    has_gpu = re.fullmatch(GPU, family) is not None
    if has_gpu and parameters["RayServeApp"]:
        raise UserError(f"{instance}: on Ray Serve the network runs on the processor, not the GPU")
    if has_gpu and backend not in GPU_BACKENDS:
        raise UserError(
            f"{instance}: nothing here uses its GPU, which is most of its price; take "
            "ml.c5.xlarge, say, or, with a container that has what it needs (serving/Dockerfile), "
            "--set Backend=cuda"
        )
    if backend == "cuda" and not has_gpu:
        raise UserError(f"--set Backend=cuda: {kind} has no GPU; leave it out, or take a ml.g type")
    if re.fullmatch(BURSTABLE, family) and parameters["MinInstances"] != parameters["MaxInstances"]:
        least = parameters["MinInstances"]
        raise UserError(
            f"{instance}: SageMaker doesn't scale burstable types; --set MaxInstances={least}, "
            "or take ml.c5.large, say"
        )
