"""A run on one EC2 instance, as a request: the script that the instance runs at boot, and everything that makes it end by itself and stay closed.

What the instance reads from and writes to the bucket (user_data.sh), below runs/RUN/: `checkpoints/` and `log.txt` once a minute, `output/` (model
package, report, metrics, result), `attempts/N.json` ({"attempt", "code", "reason"}) when attempt N has ended, `attempts/N.machine` which machine
has it. `attempts/N.stop` asks it to stop; a note of a later attempt (`M.request.json`) ends it without another word.
"""

import hashlib
import json
from typing import Any

from launch.cloud import source
from launch.cloud.request import Request
from launch.targets.script import fill
from launch.targets.spec import Ec2Target, Spec
from trainer.common.errors import UserError
from trainer.settings.config import Config

USER_DATA_BYTES = 16384  # EC2's limit, before base64
ROOT_DEVICE = "/dev/xvda"  # of Amazon Linux
UPLOAD_EVERY = 60  # seconds
GRACE = (
    300  # seconds before the time limit, in which a run saves and uploads; a tenth of short limits
)


def outcome_key(spec: Spec) -> str:
    """Where the attempt's end is told: {"attempt": 1, "code": 0, "reason": "done"}. The code is the trainer's (trainer/common/errors.py) or the set-up's."""
    return f"runs/{spec.run}/attempts/{spec.attempt}.json"


def stop_key(spec: Spec) -> str:
    """An object here, of any content, asks the attempt to save and end; it is looked for every UPLOAD_EVERY seconds."""
    return f"runs/{spec.run}/attempts/{spec.attempt}.stop"


def user_data(spec: Spec, upload_every: int = UPLOAD_EVERY) -> str:
    """The script that the instance runs at each boot. Raises UserError where it comes out longer than EC2 allows."""
    limit = round(3600 * spec.target.hours)
    script = fill(
        "user_data.sh",
        run=spec.run,
        attempt=spec.attempt,
        bucket=spec.uri(),
        region=spec.region,
        source_sha256=spec.source,
        data=spec.data or "",
        data_root=spec.data_root or "",
        extras=",".join(source.extras(spec.config)) or "train",
        limit=limit,
        grace=min(GRACE, limit // 10),
        every=upload_every,
        processes=processes(spec.config),
        arguments=arguments(spec),
        revision=spec.revision or "",
    )
    if (size := len(script.encode())) > USER_DATA_BYTES:
        raise UserError(
            f"user data: {size} bytes, EC2 allows {USER_DATA_BYTES}; put settings into a file of conf/experiment and give experiment=NAME"
        )
    return script


def processes(config: Config) -> str:
    """How many processes train; empty: as many as the instance has GPUs."""
    return "1" if config.train.device == "cpu" else str(config.train.processes or "")


def arguments(spec: Spec) -> list[str]:
    """The trainer's command line: the user's overrides, then where things lie on the instance, whatever the overrides say."""
    places = [
        "platform=ec2",
        f"name='{spec.run}'",
        f"platform.run_dir=/opt/dlami/nvme/runs/{spec.run}",
    ]
    places += ["platform.checkpoints=null", "platform.package=null"]
    return [*spec.overrides, *places, *([f"data.root={spec.data_root}"] if spec.data_root else [])]


def run_instances(spec: Spec, image_id: str, user_data: str) -> Request:
    """The request for one instance. The same attempt with the same content has the same ClientToken, so it can't start twice."""
    target = spec.target
    assert isinstance(target, Ec2Target)
    tags = [
        {"Key": key, "Value": value}
        for key, value in (
            {"Name": spec.job_name} | spec.tags | {"attempt": str(spec.attempt)}
        ).items()
    ]
    tagged = [
        "instance",
        "volume",
        "network-interface",
        *(["spot-instances-request"] if target.spot else []),
    ]
    root = {
        "VolumeSize": target.disk_gb,
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    parameters: dict[str, Any] = {
        "ImageId": image_id,
        "InstanceType": target.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": user_data,
        "IamInstanceProfile": {"Name": f"{spec.project}-ec2"},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "HttpEndpoint": "enabled",
        },
        "BlockDeviceMappings": [{"DeviceName": ROOT_DEVICE, "Ebs": root}],
        "TagSpecifications": [{"ResourceType": resource, "Tags": tags} for resource in tagged],
    }
    if target.subnet:
        parameters["SubnetId"] = target.subnet
    if target.spot:
        parameters["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
            },
        }
    content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    return Request(
        "ec2",
        "RunInstances",
        parameters | {"ClientToken": f"{spec.run}-{spec.attempt}-{content[:8]}"},
    )
