"""A small SageMaker notebook to start jobs from.

Its first request makes the scripts that set the project up and stop the notebook when idle.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cloud import ownership, s3, teardown
from launch.cloud.logs import NOTEBOOK_GROUP
from launch.cloud.prices import HOURS_A_MONTH, ML_GB_MONTH
from launch.cloud.request import Request
from launch.cloud.session import Aws
from launch.targets.attempt import UNSEEN, Attempt, Figures, Phase, State, now, seconds_between
from launch.targets.base import Spec, TargetConfig
from launch.targets.inventory import Inventory
from launch.targets.rented import Machines, Rented, rented
from launch.targets.sagemaker import OnSageMaker
from launch.targets.script import FOLDER, fill
from trainer.common.console import command
from trainer.common.errors import UserError
from trainer.settings.config import Config, setting

DELETED = "deleted"
AL2023 = "notebook-al2023-v2"  # Amazon Linux 2023; tests/ends.py has the end of its support


@dataclass
class NotebookConfig(TargetConfig):
    disk_gb: int = setting(at_least=5, at_most=16384)
    idle_minutes: int = setting(at_least=5, at_most=1440)
    repository: str | None = setting()


class Notebook(OnSageMaker):
    config = NotebookConfig
    role = "notebook"
    use = "notebook instance"
    thing = "NotebookInstance"
    page = "notebook-instances"
    log_group = NOTEBOOK_GROUP
    trains = False

    def run_id(self, config: Config, placed: Config, overrides: Sequence[str]) -> str:
        """Return the same id for all: an account has one notebook."""
        return "notebook"

    def requests(self, spec: Spec) -> list[Request]:
        return [lifecycle_config(spec), notebook_instance(spec)]

    def restart(self, attempt: Attempt, state: State, spec: Spec) -> list[Request]:
        """Return the requests that start it again, with today's settings and code."""
        if state.phase is Phase.ABSENT or state.detail == DELETED:
            return []
        name = {"NotebookInstanceName": attempt.job}
        return [*changes(spec), Request("sagemaker", "StartNotebookInstance", name)]

    def check_running(self, attempt: Attempt, spec: Spec) -> None:
        before = settled(attempt.requests[-1].parameters)
        now = settled(notebook_instance(spec).parameters)
        changed = [key for key in sorted(now) if before.get(key) != now[key]]
        if changed and attempt.requests[-1].operation == "CreateNotebookInstance":
            told = ", ".join(f"{key} {before.get(key)}, now {now[key]}" for key in changed)
            raise UserError(
                f"{attempt.job}: the notebook runs with other settings ({told}); stop it first: "
                f"{command('launch', 'stop', attempt.run)}, then start the same submit again"
            )

    def connection(self, aws: Aws, attempt: Attempt, state: State) -> str | list[str]:
        """Return the address of its page, which is good for half a day of work."""
        name = {"NotebookInstanceName": attempt.job}
        answer = aws.call("sagemaker", "CreatePresignedNotebookInstanceUrl", **name)
        return str(answer["AuthorizedUrl"])

    def deletes(self, attempt: Attempt) -> str:
        return f"the notebook {attempt.job}, with its disk and all files on it"

    def delete(self, aws: Aws, attempt: Attempt, every: float) -> None:
        teardown.delete_notebook(aws, attempt.job, every)
        # Noted, so that it doesn't count as too new for AWS to list it.
        s3.write(aws, attempt.key_of("deleted"), b"")

    def observe(self, aws: Aws, attempt: Attempt) -> State:
        """Return its state: where AWS doesn't list it, a deleted one is not about to start."""
        state = super().observe(aws, attempt)
        if state.detail == UNSEEN and s3.exists(aws, attempt.key_of("deleted")):
            return State(Phase.STOPPED, DELETED, id=attempt.id)
        return state

    def state(self, aws: Aws, attempt: Attempt, described: dict[str, Any]) -> State:
        status = described["NotebookInstanceStatus"]
        ends = {"Stopped": Phase.STOPPED, "Stopping": Phase.STOPPED, "Failed": Phase.FAILED}
        phase = ends.get(status, Phase.RUNNING)
        started = described.get("LastModifiedTime")  # AWS sets it with each start and stop
        seconds = seconds_between(started, now()) if phase is Phase.RUNNING else 0.0
        detail = described.get("FailureReason") or status
        id = described["NotebookInstanceArn"]
        return State(phase, detail, started, machine_seconds=seconds, id=id)

    def results(self, aws: Aws, attempt: Attempt) -> str:
        raise UserError(
            f"{attempt.run}: a notebook leaves no model; name a run: python -m launch status"
        )

    def figures(self, inventory: Inventory, attempt: Attempt) -> Figures:
        return Figures()

    @classmethod
    def rented(cls, inventory: Inventory) -> Iterator[Rented]:
        for notebook in ownership.owned(inventory.aws, cls.thing):
            name, status = notebook["NotebookInstanceName"], notebook["NotebookInstanceStatus"]
            if status in ("Pending", "InService", "Updating"):
                machines = Machines(notebook["InstanceType"], notebook["LastModifiedTime"])
                yield rented("notebook", name, machines, inventory.price_of(machines.instance_type))
            elif status in ("Stopping", "Stopped", "Failed"):  # its disk is kept
                which = {"NotebookInstanceName": name}
                size = inventory.aws.call("sagemaker", "DescribeNotebookInstance", **which)[
                    "VolumeSizeInGB"
                ]
                hours = seconds_between(notebook["CreationTime"], now()) / 3600
                hour = size * ML_GB_MONTH / HOURS_A_MONTH
                yield Rented("disk", name, f"{size} GB", hours, hours * hour, hour, None)


TARGETS = (Notebook("notebook"),)


def lifecycle_config(spec: Spec) -> Request:
    """Return the request for the scripts that SageMaker runs as root, at creation and start."""
    scripts = {"OnCreate": on_create(spec), "OnStart": on_start(spec)}
    contents = {
        when: [{"Content": base64.b64encode(script.encode()).decode()}]
        for when, script in scripts.items()
    }
    return Request(
        "sagemaker",
        "CreateNotebookInstanceLifecycleConfig",
        {"NotebookInstanceLifecycleConfigName": spec.job_name, **contents, "Tags": spec.tag_list},
    )


def notebook_instance(spec: Spec) -> Request:
    """Return the request for the notebook. Its `lifecycle_config` must exist before."""
    target = _config(spec)
    parameters: dict[str, Any] = {
        "NotebookInstanceName": spec.job_name,
        "InstanceType": target.instance_type,
        "RoleArn": spec.role("notebook"),
        "LifecycleConfigName": spec.job_name,
        "VolumeSizeInGB": target.disk_gb,
        "PlatformIdentifier": AL2023,
        "DirectInternetAccess": "Enabled",
        "RootAccess": "Disabled",
        "InstanceMetadataServiceConfiguration": {"MinimumInstanceMetadataServiceVersion": "2"},
        "Tags": spec.tag_list,
    }
    if target.kms_key:
        parameters["KmsKeyId"] = target.kms_key
    if target.subnets:
        parameters |= {"SubnetId": target.subnets[0], "SecurityGroupIds": target.groups}
    return Request("sagemaker", "CreateNotebookInstance", parameters)


# Parameters of a notebook that AWS changes only while it is stopped.
CHANGEABLE = ("InstanceType", "VolumeSizeInGB", "RoleArn")


def settled(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a notebook's request that can be changed later."""
    return {key: parameters[key] for key in CHANGEABLE if key in parameters}


def changes(spec: Spec) -> list[Request]:
    """Return the requests that give a stopped notebook and its scripts today's settings."""
    scripts = {
        key: value for key, value in lifecycle_config(spec).parameters.items() if key != "Tags"
    }
    made = notebook_instance(spec).parameters
    names = {key: made[key] for key in ("NotebookInstanceName", "LifecycleConfigName")}
    return [
        Request("sagemaker", "UpdateNotebookInstanceLifecycleConfig", scripts),
        Request("sagemaker", "UpdateNotebookInstance", names | settled(made)),
    ]


def on_create(spec: Spec) -> str:
    """Return the script that clones target.repository, or unpacks the tarball of the bucket."""
    return fill(
        "notebook_create.sh",
        directory=spec.project,
        repository=_config(spec).repository or "",
        source_uri=spec.uri("source", f"{spec.source}.tar.gz"),
        source_sha256=spec.source,
    )


def on_start(spec: Spec) -> str:
    """Return the script that arms the auto-stop and sets the project up."""
    script = fill(
        "notebook_start.sh",
        directory=spec.project,
        region=spec.region,
        name=spec.job_name,
        idle_minutes=_config(spec).idle_minutes,
        repository=_config(spec).repository or "",
        source_uri=spec.uri("source", f"{spec.source}.tar.gz"),
        source_sha256=spec.source,
    )
    return script.replace("@IDLE@\n", (FOLDER / "notebook_idle.py").read_text(encoding="utf-8"))


def _config(spec: Spec) -> NotebookConfig:
    assert isinstance(spec.target, NotebookConfig)
    return spec.target
