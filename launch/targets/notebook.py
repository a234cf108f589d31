"""A small SageMaker notebook to start jobs from, as requests: first its scripts, which set the project up and stop the notebook when idle."""

import base64

from launch.cloud.request import Request
from launch.targets.script import FOLDER, fill
from launch.targets.spec import NotebookTarget, Spec

PLATFORM = "notebook-al2023-v1"  # Amazon Linux 2023


def lifecycle_config(spec: Spec) -> Request:
    """The scripts that SageMaker runs as root when the notebook is made, and whenever it starts."""
    scripts = {"OnCreate": on_create(spec), "OnStart": on_start(spec)}
    contents = {
        when: [{"Content": base64.b64encode(script.encode()).decode()}]
        for when, script in scripts.items()
    }
    return Request(
        "sagemaker",
        "CreateNotebookInstanceLifecycleConfig",
        {"NotebookInstanceLifecycleConfigName": spec.job_name, **contents, "Tags": _tags(spec)},
    )


def notebook_instance(spec: Spec) -> Request:
    """The notebook; it refers to `lifecycle_config`, which must be there."""
    target = _target(spec)
    parameters = {
        "NotebookInstanceName": spec.job_name,
        "InstanceType": target.instance_type,
        "RoleArn": spec.role("notebook"),
        "LifecycleConfigName": spec.job_name,
        "VolumeSizeInGB": target.disk_gb,
        "PlatformIdentifier": PLATFORM,
        "DirectInternetAccess": "Enabled",
        "RootAccess": "Disabled",
        "InstanceMetadataServiceConfiguration": {"MinimumInstanceMetadataServiceVersion": "2"},
        "Tags": _tags(spec),
    }
    return Request("sagemaker", "CreateNotebookInstance", parameters)


def on_create(spec: Spec) -> str:
    """Clones target.repository, or unpacks the source tarball from the bucket."""
    return fill(
        "notebook_create.sh",
        directory=spec.project,
        repository=_target(spec).repository or "",
        source_uri=spec.uri("source", f"{spec.source}.tar.gz"),
        source_sha256=spec.source,
    )


def on_start(spec: Spec) -> str:
    """Arms the auto-stop and sets the project up."""
    idle_minutes = _target(spec).idle_minutes
    script = fill(
        "notebook_start.sh",
        directory=spec.project,
        region=spec.region,
        name=spec.job_name,
        idle_minutes=idle_minutes,
    )
    return script.replace("@IDLE@\n", (FOLDER / "notebook_idle.py").read_text(encoding="utf-8"))


def _target(spec: Spec) -> NotebookTarget:
    assert isinstance(spec.target, NotebookTarget)
    return spec.target


def _tags(spec: Spec) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in spec.tags.items()]
