"""What is a project's: by its tag, whatever begins like its name.

The log groups of the whole account are nobody's.
"""

import json

import pytest

from launch.cloud.account_stack import TEMPLATE
from launch.cloud.logs import NOTEBOOK_GROUP, TRAINING_GROUP
from tests.launch.conftest import REGION, Cloud
from trainer.common.errors import MISTAKE, OK

ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/survey"
OURS = [{"Key": "project", "Value": "packhorse"}]
FAST = ("--yes", "--every", "0.05")


def make_endpoint(cloud: Cloud, name: str, tags: list[dict[str, str]]) -> None:
    sagemaker = cloud.client("sagemaker")
    sagemaker.create_model(
        ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer={"Image": "image"}
    )
    variant = {
        "VariantName": "main",
        "ModelName": name,
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
        "InitialVariantWeight": 1,
    }
    sagemaker.create_endpoint_config(
        EndpointConfigName=name, ProductionVariants=[variant], Tags=tags
    )
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name, Tags=tags)


def make_disk(cloud: Cloud, tags: list[dict[str, str]]) -> None:
    """One that is attached to nothing."""
    tagged = [{"ResourceType": "volume", "Tags": tags}]
    cloud.client("ec2").create_volume(
        AvailabilityZone=f"{REGION}a", Size=75, TagSpecifications=tagged
    )


def make_things_of_another_team(cloud: Cloud) -> None:
    """Without a tag, with names that begin like ours."""
    sagemaker = cloud.client("sagemaker")
    cloud.client("iam").create_role(RoleName="survey", AssumeRolePolicyDocument="{}")
    cloud.client("s3").create_bucket(Bucket="survey")
    sagemaker.create_training_job(
        TrainingJobName="packhorse-survey",
        AlgorithmSpecification={"TrainingImage": "image", "TrainingInputMode": "File"},
        RoleArn=ROLE,
        OutputDataConfig={"S3OutputPath": "s3://survey/out"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 50},
        StoppingCondition={"MaxRuntimeInSeconds": 3600},
        HyperParameters={"epochs": "3"},
    )
    script = "packhorse-survey"
    sagemaker.create_notebook_instance_lifecycle_config(NotebookInstanceLifecycleConfigName=script)
    sagemaker.create_notebook_instance(
        NotebookInstanceName="packhorse-survey",
        InstanceType="ml.t3.medium",
        RoleArn=ROLE,
        LifecycleConfigName=script,
    )
    make_endpoint(cloud, "packhorse-survey", [])


def things(cloud: Cloud) -> dict[str, list[str]]:
    """Of SageMaker and CloudFormation by name and status, machines by their project."""
    sagemaker = cloud.client("sagemaker")
    jobs = sagemaker.list_training_jobs()["TrainingJobSummaries"]
    tunings = sagemaker.list_hyper_parameter_tuning_jobs()["HyperParameterTuningJobSummaries"]
    notebooks = sagemaker.list_notebook_instances()["NotebookInstances"]
    scripts = sagemaker.list_notebook_instance_lifecycle_configs()[
        "NotebookInstanceLifecycleConfigs"
    ]
    groups = cloud.client("ec2").describe_instances()["Reservations"]
    machines = [each for group in groups for each in group["Instances"]]
    tags = [
        {tag["Key"]: tag["Value"] for tag in each["Tags"]} | {"state": each["State"]["Name"]}
        for each in machines
    ]
    return {
        "jobs": sorted(f"{job['TrainingJobName']} {job['TrainingJobStatus']}" for job in jobs),
        "tunings": sorted(
            f"{job['HyperParameterTuningJobName']} {job['HyperParameterTuningJobStatus']}"
            for job in tunings
        ),
        "notebooks": sorted(
            f"{each['NotebookInstanceName']} {each['NotebookInstanceStatus']}" for each in notebooks
        ),
        "scripts": sorted(each["NotebookInstanceLifecycleConfigName"] for each in scripts),
        "endpoints": sorted(
            each["EndpointName"] for each in sagemaker.list_endpoints()["Endpoints"]
        ),
        "machines": sorted(
            f"{each['project']} {each['state']}" for each in tags if each["state"] != "terminated"
        ),
        "disks": sorted(
            f"{each['VolumeId']} {each['State']}"
            for each in cloud.client("ec2").describe_volumes()["Volumes"]
        ),
        "stacks": sorted(
            each["StackName"] for each in cloud.client("cloudformation").describe_stacks()["Stacks"]
        ),
        "roles": sorted(each["RoleName"] for each in cloud.client("iam").list_roles()["Roles"]),
        "buckets": sorted(each["Name"] for each in cloud.client("s3").list_buckets()["Buckets"]),
    }


def launch(cloud: Cloud, *arguments: str) -> str:
    code, printed = cloud.launch(*arguments)
    assert code == OK, printed
    return printed


@pytest.fixture
def neighbours(cloud: Cloud) -> Cloud:
    """Another team's things, all that project `packhorse-dev` can have: they begin like ours."""
    make_things_of_another_team(cloud)
    dev = "target.project=packhorse-dev"
    launch(cloud, "up", dev, *FAST)
    for target in (
        ["target=ec2"],
        ["target=sagemaker"],
        ["target=tuner", "sweep=head"],
        ["target=notebook"],
    ):
        launch(cloud, "submit", *target, dev)
    make_endpoint(cloud, "packhorse-dev-serving", [{"Key": "project", "Value": "packhorse-dev"}])
    for value in ("packhorse-dev", "Packhorse"):
        make_disk(cloud, [{"Key": "project", "Value": value}])
    make_disk(cloud, [{"Key": "Project", "Value": "packhorse"}])
    return cloud


def test_down_leaves_whatever_only_begins_like_ours(neighbours):
    before = things(neighbours)
    launch(neighbours, "up", *FAST)
    for target in (
        ["target=ec2"],
        ["target=sagemaker"],
        ["target=tuner", "sweep=head"],
        ["target=notebook"],
    ):
        launch(neighbours, "submit", *target)
    assert things(neighbours) != before
    printed = launch(neighbours, "down", *FAST)
    assert "packhorse-dev" not in printed and "survey" not in printed
    assert things(neighbours) == before


@pytest.mark.parametrize(
    "target", [("target=sagemaker",), ("target=tuner", "sweep=head")], ids=" ".join
)
def test_a_name_that_another_projects_job_has_is_not_taken_for_ours(cloud, target):
    """The run dev-x of packhorse and the run x of packhorse-dev give their jobs one name."""
    dev = "target.project=packhorse-dev"
    launch(cloud, "up", *FAST)
    launch(cloud, "up", dev, *FAST)
    launch(cloud, "submit", *target, "name=x", dev)
    for _ in range(2):  # nor the second time, when it is known that the first was refused
        code, printed = cloud.launch("submit", *target, "name=dev-x")
        assert code == MISTAKE, printed
        last = printed.splitlines()[-1]
        assert "packhorse-dev-x-1: on AWS this name belongs to the project" in last
        assert "the project packhorse-dev; give another name=" in last
    [row] = json.loads(launch(cloud, "status", "--json"))["runs"]
    assert row["state"] == "never started"
    launch(cloud, "submit", *target, "name=other")


def test_status_counts_what_has_our_tag_whatever_its_name(neighbours):
    launch(neighbours, "up", *FAST)
    make_endpoint(neighbours, "dogs", OURS)
    rows = json.loads(launch(neighbours, "status", "--json"))["costs_now"]
    assert [(row["kind"], row["name"]) for row in rows] == [("endpoint", "dogs")]
    others = json.loads(launch(neighbours, "status", "target.project=packhorse-dev", "--json"))[
        "costs_now"
    ]
    assert sorted(row["kind"] for row in others) == [
        "disk",
        "endpoint",
        "machine",
        "notebook",
        "training",
        "training",
    ]
    assert all(row["name"].startswith(("packhorse-dev-", "i-", "vol-")) for row in others)


def test_down_lists_all_that_it_will_delete_before_it_asks(cloud):
    launch(cloud, "up", *FAST)
    for target in (
        ["target=ec2"],
        ["target=sagemaker"],
        ["target=tuner", "sweep=head", "name=tuned"],
        ["target=notebook"],
    ):
        launch(cloud, "submit", *target)
    bucket = f"packhorse-{ACCOUNT}-{REGION}"
    cloud.client("s3").put_object(Bucket=bucket, Key="runs/x/model.tar.gz", Body=bytes(12_000_000))
    count = len(cloud.client("s3").list_object_versions(Bucket=bucket)["Versions"])
    before = things(cloud)
    code, printed = cloud.launch("down")
    assert code == MISTAKE and "--yes" in printed and things(cloud) == before
    [machine] = [
        each["InstanceId"]
        for group in cloud.client("ec2").describe_instances()["Reservations"]
        for each in group["Instances"]
    ]
    expected = [
        f"ends      machine {machine} (g4dn.xlarge)",
        "ends      tuning job packhorse-tuned-1",
        "ends      training job packhorse-tuned-1-001-0123abcd",
        "deletes   the records of 2 training jobs",
        "deletes   notebook packhorse-notebook-1",
        "deletes   notebook's script packhorse-notebook-1",
        "deletes   stack packhorse-foundation",
        "AWS::IAM::Role             packhorse-training-us-east-1",
        f"AWS::S3::Bucket            {bucket}",
        f"deletes   every object of s3://{bucket}, all models and pictures in it: "
        f"{count} versions, 0.01 GB",
    ]
    assert [line for line in expected if line not in printed] == [], printed


def test_down_waits_for_what_aws_says_late(cloud):
    """A notebook that starts can't be stopped yet; a group still counts machines that ended."""
    launch(cloud, "up", *FAST)
    launch(cloud, "submit", "target=notebook")
    launch(cloud, "submit", "target=ec2", "target.instances=2", "target.instance_type=g5.xlarge")
    cloud.post("/strict/starting", notebook="packhorse-notebook-1", answers=4)
    cloud.post("/strict/busy_groups", answers=3)
    launch(cloud, "down", *FAST)
    assert things(cloud)["notebooks"] == [] and things(cloud)["stacks"] == []
    tagged = [{"Name": "tag:project", "Values": ["packhorse"]}]
    groups = cloud.client("ec2").describe_placement_groups(Filters=tagged)
    assert groups["PlacementGroups"] == []


def test_down_takes_its_policies_from_whoever_has_them_and_says_so_before(cloud):
    """As `up` says: attach the launcher's to who starts jobs. CloudFormation deletes none such."""
    launch(cloud, "up", *FAST)
    iam = cloud.client("iam")
    iam.create_user(UserName="ann")
    iam.create_group(GroupName="vision")
    policy = f"arn:aws:iam::{ACCOUNT}:policy/packhorse-launcher-{REGION}"
    iam.attach_user_policy(UserName="ann", PolicyArn=policy)
    iam.attach_group_policy(GroupName="vision", PolicyArn=policy)
    code, printed = cloud.launch("down")
    name = policy.rpartition("/")[2]
    assert code == MISTAKE and f"detaches  policy {name} from the user ann" in printed
    assert f"detaches  policy {name} from the group vision" in printed
    assert iam.list_attached_user_policies(UserName="ann")["AttachedPolicies"]
    launch(cloud, "down", *FAST)
    assert iam.list_attached_user_policies(UserName="ann")["AttachedPolicies"] == []
    assert things(cloud)["stacks"] == []


def test_a_bucket_or_stack_of_our_name_without_our_tag_is_anothers(cloud):
    bucket = f"packhorse-{ACCOUNT}-{REGION}"
    cloud.client("s3").create_bucket(Bucket=bucket)
    cloud.client("s3").put_object(Bucket=bucket, Key="precious", Body=b"1")
    template = json.dumps({"Resources": {"Queue": {"Type": "AWS::SQS::Queue"}}})
    cloud.client("cloudformation").create_stack(
        StackName="packhorse-foundation", TemplateBody=template
    )
    code, printed = cloud.launch("up", *FAST)
    assert (
        code == MISTAKE
        and "without the tag project=packhorse" in printed
        and "target.project=NAME" in printed
    )
    printed = launch(cloud, "down", *FAST)
    assert f"leaves    s3://{bucket}" in printed
    assert cloud.client("s3").get_object(Bucket=bucket, Key="precious")["Body"].read() == b"1"
    assert things(cloud)["stacks"] == ["packhorse-foundation"]


# --- log groups of the whole account ---

GROUPS = {"Training": TRAINING_GROUP, "Notebook": NOTEBOOK_GROUP}


def first_edition() -> str:
    """The foundation with the log groups that its first edition made."""
    parameters = conditions = resources = ""
    for name, group in GROUPS.items():
        parameters += (
            f"  {name}Logs:\n    Type: String\n    Default: keep\n    AllowedValues: [make, keep]\n"
        )
        conditions += f"  Make{name}Logs: !Equals [!Ref {name}Logs, make]\n"
        resources += (
            f"  {name}LogGroup:\n    Type: AWS::Logs::LogGroup\n    Condition: Make{name}Logs\n"
            "    DeletionPolicy: Delete\n    UpdateReplacePolicy: Retain\n"
            f"    Properties:\n      LogGroupName: {group}\n      RetentionInDays: 30\n"
            "      Tags: [{Key: project, Value: !Ref Project}]\n\n"
        )
    head, body = TEMPLATE.read_text().split("\nResources:\n")
    head, known = head.split("\nConditions:\n")
    conditions = f"{known}\n{conditions}"
    return f"{head}{parameters}\nConditions:\n{conditions}\nResources:\n{resources}{body}"


def make_first_edition(cloud: Cloud, *made: str) -> None:
    """A stack as the first edition's `up` made it, with the log groups that were not there."""
    bucket = f"packhorse-{ACCOUNT}-{REGION}"
    given = {"Project": "packhorse", "BucketName": bucket} | {
        f"{name}Logs": "make" for name in made
    }
    cloud.client("cloudformation").create_stack(
        StackName="packhorse-foundation",
        TemplateBody=first_edition(),
        Parameters=[
            {"ParameterKey": name, "ParameterValue": value} for name, value in given.items()
        ],
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Tags=OURS,
    )


def log_groups(cloud: Cloud) -> dict[str, tuple[int | None, list[str]]]:
    """Each with its retention in days, and its streams."""
    logs = cloud.client("logs")
    found = logs.describe_log_groups()["logGroups"]
    return {
        each["logGroupName"]: (
            each.get("retentionInDays"),
            [
                stream["logStreamName"]
                for stream in logs.describe_log_streams(logGroupName=each["logGroupName"])[
                    "logStreams"
                ]
            ],
        )
        for each in found
    }


def test_up_and_down_make_change_and_delete_no_log_group_of_the_account(cloud):
    logs = cloud.client("logs")
    launch(cloud, "up", *FAST)
    assert log_groups(cloud) == {}
    launch(cloud, "down", *FAST)
    for group, retention in (
        (TRAINING_GROUP, 400),
        (NOTEBOOK_GROUP, None),
        ("/aws/sagemaker/ProcessingJobs", None),
    ):
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName="survey/algo-1")
        if retention:
            logs.put_retention_policy(logGroupName=group, retentionInDays=retention)
    before = log_groups(cloud)
    launch(cloud, "up", *FAST)
    printed = launch(cloud, "down", *FAST)
    assert f"leaves    what jobs have logged in {TRAINING_GROUP} and {NOTEBOOK_GROUP}" in printed
    assert log_groups(cloud) == before and before[TRAINING_GROUP] == (400, ["survey/algo-1"])


@pytest.mark.parametrize(
    ("made", "verbs"),
    [(["Training"], ["down"]), (["Notebook"], ["up"]), (["Training", "Notebook"], ["up", "down"])],
)
def test_the_log_groups_that_the_first_edition_made_outlive_its_stack(cloud, made, verbs):
    make_first_edition(cloud, *made)
    logs = cloud.client("logs")
    for name in made:
        logs.create_log_stream(logGroupName=GROUPS[name], logStreamName="survey/algo-1")
    before = log_groups(cloud)
    assert before == {GROUPS[name]: (30, ["survey/algo-1"]) for name in made}
    for verb in verbs:
        printed = launch(cloud, verb, *FAST)
        assert log_groups(cloud) == before, printed
        if verb == "up":
            assert (
                all(group in printed for group in before)
                and "which stays in the account" in printed
            )
            kinds = [
                each["ResourceType"]
                for each in cloud.client("cloudformation").list_stack_resources(
                    StackName="packhorse-foundation"
                )["StackResourceSummaries"]
            ]
            assert "AWS::IAM::Role" in kinds and "AWS::Logs::LogGroup" not in kinds
            assert "nothing to change" in launch(cloud, "up")
    if "down" in verbs:
        assert things(cloud)["stacks"] == [] and things(cloud)["roles"] == []


def test_up_asks_before_it_touches_the_first_editions_stack(cloud):
    make_first_edition(cloud, "Training")
    template = cloud.client("cloudformation").get_template(StackName="packhorse-foundation")[
        "TemplateBody"
    ]
    code, printed = cloud.launch("up")
    assert code == MISTAKE and "--yes" in printed and TRAINING_GROUP in printed
    assert (
        cloud.client("cloudformation").get_template(StackName="packhorse-foundation")[
            "TemplateBody"
        ]
        == template
    )
