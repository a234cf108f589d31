"""The requests for a run's machines on EC2, with their script: a pure function of the Spec."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from launch.cloud.request import Request
from launch.targets.attempt import (
    INDEX,
)
from launch.targets.base import Spec, TargetConfig, tag_list
from launch.targets.script import fill
from trainer.common.errors import UserError
from trainer.settings.config import Config, setting

USER_DATA_BYTES = 16384  # EC2's limit, before base64
ROOT_DEVICE = "/dev/xvda"  # of Amazon Linux
UPLOAD_EVERY = 60  # seconds
GRACE = 300  # see `grace_of`


@dataclass
class Ec2Config(TargetConfig):
    instances: int = setting(at_least=1, at_most=20)
    spot: str = setting("false", "true", "auto")
    spot_patience: float = setting(at_least=0, at_most=10080, only_if="target.spot=auto")
    zones: str | None = setting()
    max_dollars: float | None = setting(above=0, at_most=1000000)
    idle_minutes: float = setting(at_least=0, at_most=10080)
    image: str | None = setting()
    ssm_parameter: str = setting()
    disk_gb: int = setting(at_least=75, at_most=16384)
    public_ip: bool | None = setting()
    wheels: bool | None = setting()


def run_instances(spec: Spec, user_data: str) -> Request:
    """Return the request for an attempt's instances: EC2 starts all of them, or none.

    The same attempt with the same content has the same ClientToken, so it can't start twice.
    """
    target = settings_of(spec)
    tags = tag_list({"Name": spec.job_name} | spec.tags | {"attempt": str(spec.attempt)})
    tagged = ["instance", "volume", "network-interface"]
    root = {
        "VolumeSize": target.disk_gb,
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    if target.kms_key:
        root["KmsKeyId"] = target.kms_key
    parameters: dict[str, Any] = {
        "ImageId": target.image,
        "InstanceType": target.instance_type,
        "MinCount": spec.instances,
        "MaxCount": spec.instances,
        "UserData": user_data,
        "IamInstanceProfile": {"Name": spec.instance_profile},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "HttpEndpoint": "enabled",
        },
        "BlockDeviceMappings": [{"DeviceName": ROOT_DEVICE, "Ebs": root}],
    }
    if spec.spot:
        tagged.append("spot-instances-request")
    parameters["TagSpecifications"] = [{"ResourceType": each, "Tags": tags} for each in tagged]
    parameters |= network(target)
    placement = {"AvailabilityZone": spec.zone} if spec.zone else {}
    if spec.instances > 1:
        placement["GroupName"] = spec.job_name
    if placement:
        parameters["Placement"] = placement
    if spec.spot:
        options = {
            "SpotInstanceType": "one-time",
            "InstanceInterruptionBehavior": "terminate",
        }
        if spec.bid is not None:
            options["MaxPrice"] = f"{spec.bid:.4f}"
        parameters["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    parameters["ClientToken"] = f"{spec.run}-{spec.attempt}-{content[:8]}"
    return Request("ec2", "RunInstances", parameters)


def placement_group(spec: Spec) -> Request:
    """Return the request for the group that keeps an attempt's machines close to each other.

    Each attempt has its own: a cluster group lies in one zone as long as a machine is in it.
    """
    tags = tag_list({"Name": spec.job_name} | spec.tags | {"attempt": str(spec.attempt)})
    parameters = {
        "GroupName": spec.job_name,
        "Strategy": "cluster",
        "TagSpecifications": [{"ResourceType": "placement-group", "Tags": tags}],
    }
    return Request("ec2", "CreatePlacementGroup", parameters)


def network(target: Ec2Config) -> dict[str, Any]:
    """Return the network parameters of RunInstances.

    Whether there is a public address is set on an interface, which then needs subnet and groups.
    """
    place: dict[str, Any] = {}
    if target.subnet:
        place["SubnetId"] = target.subnet
    if target.public_ip is None:
        return place | ({"SecurityGroupIds": target.groups} if target.groups else {})
    place |= {"DeviceIndex": 0, "AssociatePublicIpAddress": target.public_ip}
    if target.groups:
        place["Groups"] = target.groups
    return {"NetworkInterfaces": [place]}


def user_data(spec: Spec, upload_every: int = UPLOAD_EVERY) -> str:
    """Return the script that the instance runs at each boot.

    upload_every: seconds. Raise UserError where it is longer than EC2 allows.
    """
    limit = round(3600 * spec.hours)
    script = fill(
        "user_data.sh",
        run=spec.run,
        attempt=spec.attempt,
        bucket=spec.uri(),
        ends=INDEX,
        region=spec.region,
        source_sha256=spec.source,
        data=spec.data_uri or "",
        data_root=spec.data_root or "",
        weights=spec.weights or "",
        weights_root=spec.weights_root or "",
        wheels=spec.wheels or "",
        extras=",".join(spec.extras) or "train",
        limit=limit,
        grace=grace_of(limit),
        every=upload_every,
        idle=round(60 * settings_of(spec).idle_minutes),
        processes=processes(spec.config, spec.instances),
        instances=spec.instances,
        arguments=arguments(spec),
        revision=spec.revision or "",
    )
    size = len(script.encode())
    if size > USER_DATA_BYTES:
        raise UserError(
            f"user data: {size} bytes, EC2 allows {USER_DATA_BYTES}; put settings into a file of "
            "conf/experiment and give experiment=NAME"
        )
    return script


def processes(config: Config, instances: int = 1) -> str:
    """Return how many processes train on each machine; "": as many as it has GPUs."""
    if config.train.processes is not None:
        return str(config.train.processes // instances)
    return "1" if config.train.device == "cpu" and instances == 1 else ""


def arguments(spec: Spec) -> list[str]:
    """Return the trainer's command line.

    The user's overrides come first, then the paths on the instance, which override them.
    """
    places = [
        "platform=ec2",
        f"name='{spec.run}'",
        f"platform.run_dir=/opt/dlami/nvme/runs/{spec.run}",
        "platform.checkpoints=null",
        "platform.package=null",
    ]
    if spec.data_root:
        places.append(f"data.root={spec.data_root}")
    if spec.weights_root:
        places.append(f"model.weights_dir={spec.weights_root}")
    return [*spec.overrides, *places, *spec.price_words]


def settings_of(spec: Spec) -> Ec2Config:
    assert isinstance(spec.target, Ec2Config)
    return spec.target


def with_image(spec: Spec, image: str) -> Spec:
    return dataclasses.replace(spec, target=dataclasses.replace(settings_of(spec), image=image))


def grace_of(limit: int) -> int:
    """Return how many seconds before a time limit a run begins to save and upload.

    GRACE, or a tenth of a short limit. limit: seconds.
    """
    return min(GRACE, limit // 10)
