"""`submit` and `up`, killed with SIGKILL at their calls to AWS, then started again: the same end,
nothing twice, nothing orphaned.

A call that only reads leaves the same, whether AWS has carried it out or not. So all that a kill
can leave is covered by: before the first call, and after each call that changes something. EC2 is
killed before each such call too (long), `up` before and after every call; KILLS=all for all.
"""

import json
import os
import re
import signal

import pytest

from launch.targets.attempt import INDEX, NOTE
from tests.launch.conftest import BUCKET, Cloud
from trainer.common.errors import OK

TARGETS = {
    "ec2": [],
    "sagemaker": [],
    "sagemaker_multi": [],
    "tuner": ["sweep=head"],
    "notebook": [],
}
CHANGES = re.compile("Put|Create|Run|Execute|Start|Delete")
KILLED = -signal.SIGKILL


def moments(calls: list[str], kind: str) -> list[tuple[int, str]]:
    """When to kill: (number of the call, before or after AWS carries it out). kind: all, changes,
    or states (each that a kill can leave once).
    """
    kind = os.environ.get("KILLS", kind)
    chosen = []
    for number, call in enumerate(calls, 1):
        changes = bool(CHANGES.match(call))
        if kind == "all" or number == 1 or (kind == "changes" and changes):
            chosen.append((number, "before"))
        if kind == "all" or changes:
            chosen.append((number, "after"))
    return chosen


def final_state(cloud: Cloud, name: str) -> dict[str, object]:
    """All that a submit leaves in AWS, without what time and chance decide (ids, dates)."""
    s3, sagemaker, ec2 = cloud.client("s3"), cloud.client("sagemaker"), cloud.client("ec2")
    bucket = BUCKET
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    attempts = [
        json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        for key in keys
        if key.endswith(".request.json")
    ]
    instances = [
        each
        for group in ec2.describe_instances()["Reservations"]
        for each in group["Instances"]
        if each["State"]["Name"] != "terminated"
    ]
    jobs = [
        job["TrainingJobName"] for job in sagemaker.list_training_jobs()["TrainingJobSummaries"]
    ]
    tunings = sagemaker.list_hyper_parameter_tuning_jobs()["HyperParameterTuningJobSummaries"]
    notebooks = [
        each["NotebookInstanceName"]
        for each in sagemaker.list_notebook_instances()["NotebookInstances"]
    ]
    assert len(attempts) == 1 and attempts[0]["number"] == 1 and attempts[0]["id"], (
        "the attempt is noted once, with what AWS made of it"
    )
    if instances:
        assert [attempts[0]["id"]] == [each["InstanceId"] for each in instances]
    state = {
        # An entry of the index has a date in its name, and each try adds one.
        "keys": sorted({re.sub(rf"^({INDEX}.*\.{NOTE})\..*", r"\1", key) for key in keys}),
        "requests": attempts[0]["requests"],
        "instances": [each["ClientToken"] for each in instances],
        "jobs": jobs,
        "tunings": [each["HyperParameterTuningJobName"] for each in tunings],
        "notebooks": notebooks,
    }
    return json.loads(json.dumps(state).replace(name, "NAME"))


def clear(cloud: Cloud) -> None:
    """Removes runs and code, and leaves the foundation."""
    cloud.post("/strict/forget")
    s3 = cloud.client("s3")
    bucket = BUCKET
    keys = [{"Key": item["Key"]} for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    if keys:
        s3.delete_objects(Bucket=bucket, Delete={"Objects": keys})


def foundation(cloud: Cloud) -> None:
    cloud.reset()
    code, printed = cloud.launch("up", "--yes", "--every", "0.05")
    assert code == OK, printed


# A job of several machines, a tuning job and a notebook are sent as a job of one is.
MOMENTS = [
    ("ec2", "states"),
    ("sagemaker", "states"),
    *(
        pytest.param(target, kind, marks=pytest.mark.long)
        for target, kind in (
            ("ec2", "changes"),
            ("sagemaker_multi", "states"),
            ("tuner", "states"),
            ("notebook", "states"),
        )
    ),
]


@pytest.mark.parametrize(("target", "kind"), MOMENTS)
def test_a_submit_killed_at_any_call_is_finished_by_the_next(target, kind, server):
    foundation(server)
    arguments = ["submit", f"target={target}", *TARGETS[target]]
    before = len(server.calls())
    assert server.launch(*arguments)[0] == OK
    calls = [call["operation"] for call in server.calls()[before:]]
    wanted = final_state(server, target)
    for number, when in moments(calls, kind):
        clear(server)
        server.post("/strict/kill", call=number, when=when)
        assert server.launch(*arguments)[0] == KILLED, (number, when)
        assert server.launch(*arguments)[0] == OK, (number, when)
        assert final_state(server, target) == wanted, (number, when, calls[number - 1])


def test_an_up_killed_at_any_call_is_finished_by_the_next(cloud):
    arguments = ["up", "--yes", "--every", "0.05"]
    assert cloud.launch(*arguments)[0] == OK
    calls = [call["operation"] for call in cloud.calls()]

    def stack() -> tuple[list[str], list[str], list[str], list[str]]:
        stacks = cloud.client("cloudformation").describe_stacks()["Stacks"]
        roles, policies = (
            cloud.client("iam").list_roles()["Roles"],
            cloud.client("iam").list_policies(Scope="Local")["Policies"],
        )
        buckets = cloud.client("s3").list_buckets()["Buckets"]
        return (
            [f"{each['StackName']} {each['StackStatus']}" for each in stacks],
            sorted(each["RoleName"] for each in roles),
            sorted(each["PolicyName"] for each in policies),
            [each["Name"] for each in buckets],
        )

    wanted = stack()
    assert wanted[0] == ["packhorse-foundation CREATE_COMPLETE"]
    for number, when in moments(calls, "all"):
        cloud.reset()
        cloud.post("/strict/kill", call=number, when=when)
        assert cloud.launch(*arguments)[0] == KILLED, (number, when)
        assert cloud.launch(*arguments)[0] == OK, (number, when)
        assert stack() == wanted, (number, when, calls[number - 1])
