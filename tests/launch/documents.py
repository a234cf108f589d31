"""The generated parts of docs/instances.md and docs/security.md: `python -m tests.launch.documents`
writes them, tests hold them to it.
"""

import ast
import base64
import contextlib
import io
import json
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import __main__ as launch
from launch.audit.finding import RULES
from launch.cloud import account_stack, cloudformation, prices, quotas, source
from launch.verbs.audit import FOUND
from launch.verbs.policy import PARTS
from tests.conftest import PROJECT, make_pictures
from tests.launch.conftest import Cloud, running, tarball
from tests.launch.permissions import (
    ACCOUNT,
    BUCKET,
    REGION,
    Ask,
    asks_of,
    audit_asks,
    grants,
    service_side,
    unique,
)
from tests.launch.whole import WHOLE
from trainer.common.errors import MISTAKE, OK

DOCS = PROJECT / "docs"
SERVING = "packhorse-serving"


def instances_output() -> str:
    """What `python -m launch instances` prints by the prices that ship."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setattr(prices, "REFRESHED", Path(home) / "prices.json")
        return printed("instances")


def printed(*arguments: str, codes: Iterable[int] = (OK,)) -> str:
    """What the command line prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = launch.main(arguments)
    assert code in codes, f"{arguments}: {code}\n{output.getvalue()}"
    return output.getvalue()


# --- every call that our code makes ---


def record(cloud: Cloud, directory: Path, patch: pytest.MonkeyPatch) -> dict[str, list[Ask]]:
    """Every call of every command, as IAM sees it, by the part that makes it. The environment leads
    to `cloud` already.
    """
    patch.setenv("HOME", str(directory))
    patch.setattr(quotas, "NUMBERS", directory / "quotas.json")
    patch.setattr(source, "build", lambda extras: tarball(tuple(extras)))
    found: dict[str, list[Ask]] = {"deployer": [], "launcher": [], "lambda": [], "audit": []}

    def deploy(verb: str) -> None:
        before = len(cloud.calls())
        printed(verb, "--yes", "--every", "0.05")
        for call in cloud.calls()[before:]:
            found["deployer"] += asks_of(call, verb)

    deploy("up")

    def run(*arguments: str, codes: Iterable[int] = (OK,)) -> str:
        before = len(cloud.calls())
        output = printed(*arguments, codes=codes)
        by = " ".join(
            argument
            for argument in arguments
            if argument in launch.VERBS or argument in ("--data", "--now", "--refresh")
        )
        for call in cloud.calls()[before:]:
            found["launcher"] += asks_of(call, by)
        return output

    pictures = make_pictures(directory / "dogs", {"train": 2, "valid": 1})
    _seed_endpoint(cloud)
    for target in (
        ["target=ec2", "target.spot=true"],
        ["target=sagemaker"],
        ["target=sagemaker_multi"],
        ["target=tuner", "sweep=head"],
        ["target=notebook"],
    ):
        run("plan", *target, "name=first")
        run("submit", *target, f"name={target[0].split('=')[1]}")
    for name, more in (("sagemaker", ()), ("tuner", ("sweep=head",))):
        # A name is taken, and nothing is noted that would say by what.
        note = f"runs/{name}/attempts/1.request.json"
        cloud.client("s3").delete_object(Bucket=BUCKET, Key=note)
        run("submit", f"target={name}", *more, f"name={name}")
    cloud.post("/strict/sold_out", what=".* spot")
    run("submit", "target=ec2", "target.spot=true", "name=sold-out", codes=(MISTAKE,))
    cloud.post("/strict/sold_out", what="")
    run("plan", "target=ec2", "target.instances=2", "name=pair")
    run("submit", "target=ec2", "target.instances=2", "name=pair")
    run("stop", "pair", "--now")
    run("submit", "target=ec2", "target.instances=2", "name=pair")  # deletes the first's group
    run("submit", "target=ec2", "name=silent")
    silent = cloud.client("ec2").describe_instances(
        Filters=[{"Name": "tag:run", "Values": ["silent"]}]
    )["Reservations"][0]["Instances"][0]["InstanceId"]
    itself = "Client.InstanceInitiatedShutdown"
    cloud.post("/strict/end_instance", instance=silent, code=itself)
    run("logs", "silent")
    run("submit", "target=sagemaker", "name=data", "data=folder", "--data", str(pictures))
    (pictures / "train/circle/000.png").unlink()
    run("submit", "target=sagemaker", "name=data2", "data=folder", "--data", str(pictures))
    run("status")
    _leave_results(cloud)
    for name in ("ec2", "sagemaker", "tuner", "notebook"):
        run("logs", name)
        run("cost", name)
        run("fetch", name, "--to", str(directory / name), codes=range(3))
    _seed_more(cloud)
    before = len(cloud.calls())
    printed("audit", "--json", codes=(OK, FOUND))
    for call in cloud.calls()[before:]:
        found["audit"] += audit_asks(call)
    for name in ("sagemaker", "tuner", "notebook", "ec2"):
        run("stop", name)
    run("stop", "ec2", "--now")
    run("submit", "target=notebook")
    run("connect", "notebook")
    run("delete", "notebook", "--yes", "--every", "0.05")
    # The refreshed prices are this account's, not the user's.
    patch.setattr(prices, "REFRESHED", directory / "prices.json")
    run("prices", "--refresh")
    found["lambda"] += _invoke(cloud, patch)
    _seed_what_down_ends(cloud)
    deploy("down")
    return found


def _seed_what_down_ends(cloud: Cloud) -> None:
    """A machine, jobs, a disk, an upload that was cut short, and policies that somebody has."""
    for target in (
        ["target=ec2"],
        ["target=sagemaker"],
        ["target=tuner", "sweep=head"],
        ["target=notebook"],
    ):
        printed("submit", *target, f"name=last-{target[0].split('=')[1]}")
    ec2, iam, s3 = cloud.client("ec2"), cloud.client("iam"), cloud.client("s3")
    tags = [{"Key": "project", "Value": "packhorse"}]
    ec2.create_volume(
        AvailabilityZone=f"{REGION}a",
        Size=1,
        TagSpecifications=[{"ResourceType": "volume", "Tags": tags}],
    )
    s3.create_multipart_upload(Bucket=BUCKET, Key="runs/r/output/half")
    iam.create_group(GroupName="vision")
    policy = f"arn:aws:iam::{ACCOUNT}:policy/packhorse-launcher-{REGION}"
    iam.attach_user_policy(UserName="ann", PolicyArn=policy)
    iam.attach_group_policy(GroupName="vision", PolicyArn=policy)


def _seed_endpoint(cloud: Cloud) -> None:
    """A deployed model, so that there is something to look at and to call."""
    sagemaker = cloud.client("sagemaker")
    sagemaker.create_model(
        ModelName=SERVING,
        ExecutionRoleArn=f"arn:aws:iam::{ACCOUNT}:role/{SERVING}",
        PrimaryContainer={"Image": "image"},
    )
    variant = {
        "VariantName": "main",
        "ModelName": SERVING,
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
        "InitialVariantWeight": 1,
    }
    tags = [
        {"Key": "project", "Value": "packhorse"}
    ]  # CloudFormation gives them what the stack has
    sagemaker.create_endpoint_config(
        EndpointConfigName=SERVING, ProductionVariants=[variant], Tags=tags
    )
    sagemaker.create_endpoint(EndpointName=SERVING, EndpointConfigName=SERVING, Tags=tags)


def rewrite_role_policies(cloud: Cloud) -> None:
    """moto can't list the policies of roles that its CloudFormation made, as they are; the same
    policies from the wire it can.
    """
    iam = cloud.client("iam")
    for role in iam.list_roles()["Roles"]:
        for name in iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]:
            document = json.dumps(role_policy(cloud, role["RoleName"], name))
            iam.put_role_policy(RoleName=role["RoleName"], PolicyName=name, PolicyDocument=document)


def role_policy(cloud: Cloud, role: str, name: str) -> dict[str, Any]:
    """An inline policy; moto answers those of its CloudFormation as Python writes them."""
    document = cloud.client("iam").get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    found: dict[str, Any] = ast.literal_eval(document) if isinstance(document, str) else document
    return found


def finish_bucket(cloud: Cloud) -> None:
    """Gives the bucket what the template says and moto's CloudFormation leaves out."""
    s3, properties = (
        cloud.client("s3"),
        cloudformation.load(account_stack.TEMPLATE)["Resources"]["Bucket"]["Properties"],
    )
    s3.put_public_access_block(
        Bucket=BUCKET, PublicAccessBlockConfiguration=properties["PublicAccessBlockConfiguration"]
    )
    s3.put_bucket_versioning(
        Bucket=BUCKET, VersioningConfiguration=properties["VersioningConfiguration"]
    )


def _seed_more(cloud: Cloud) -> None:
    """What else the audit looks at."""
    rewrite_role_policies(cloud)
    cloud.client("iam").create_user(UserName="ann")
    zipped = b"PK\x05\x06" + bytes(18)
    role = f"arn:aws:iam::{ACCOUNT}:role/packhorse-training-us-east-1"
    cloud.client("lambda").create_function(
        FunctionName=SERVING,
        Runtime="python3.13",
        Role=role,
        Handler="a.b",
        Code={"ZipFile": zipped},
    )


def _leave_results(cloud: Cloud) -> None:
    """What jobs leave: a log, and results."""
    s3, logs = cloud.client("s3"), cloud.client("logs")
    s3.put_object(Bucket=BUCKET, Key="runs/ec2/log.txt", Body=b"epoch 1\n")
    for prefix in ("runs/ec2/output", "runs/sagemaker/output/packhorse-sagemaker-1/output"):
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/result.json", Body=b'{"top1": 0.9}')
    for group, stream in (
        ("TrainingJobs", "packhorse-sagemaker-1/algo-1"),
        ("NotebookInstances", "packhorse-notebook/LifecycleConfigOnStart"),
    ):
        logs.create_log_group(logGroupName=f"/aws/sagemaker/{group}")
        logs.create_log_stream(logGroupName=f"/aws/sagemaker/{group}", logStreamName=stream)
        event = {"timestamp": int(time.time() * 1000), "message": "epoch 1"}
        logs.put_log_events(
            logGroupName=f"/aws/sagemaker/{group}", logStreamName=stream, logEvents=[event]
        )


def _invoke(cloud: Cloud, patch: pytest.MonkeyPatch) -> list[Ask]:
    """What the function asks of AWS, when it is called with a picture."""
    from serving.adapters import lambda_proxy

    patch.setenv("ENDPOINT_NAME", SERVING)
    before = len(cloud.calls())
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    lambda_proxy.client.cache_clear()  # of another test's AWS
    asked = {"base64": picture, "top": 1}  # sent as JSON: moto takes no other body
    lambda_proxy.handler(asked, SimpleNamespace(aws_request_id="1"))
    lambda_proxy.client.cache_clear()
    return [ask for call in cloud.calls()[before:] for ask in asks_of(call, "the function")]


# --- the generated parts ---


def permissions_table(asked: dict[str, list[Ask]]) -> str:
    """Each part's actions: on what, why, and who was seen to ask."""
    lines = []
    for part, what in PARTS.items():
        if part == "audit":
            continue  # one statement on everything, shown by its own command
        lines += [
            f"### {part}",
            "",
            f"{what[0].upper()}{what[1:]}.",
            "",
            "| action | resource | why | asked by |",
            "|---|---|---|---|",
        ]
        for grant in grants(part):
            pattern = re.compile(re.escape(grant.resource).replace(r"\*", ".*"))
            by = sorted(
                {
                    who
                    for ask in asked[part]
                    if ask.action == grant.action and pattern.fullmatch(ask.resource)
                    for who in ask.by.split(", ")
                }
            )
            resource = grant.resource.replace(f"{REGION}:{ACCOUNT}", "REGION:ACCOUNT").replace(
                f"{ACCOUNT}-{REGION}", "ACCOUNT-REGION"
            )
            resource = (
                resource.replace(ACCOUNT, "ACCOUNT").replace(REGION, "REGION").replace("|", "\\|")
            )
            lines.append(f"| `{grant.action}` | `{resource}` | {grant.reason} | {_few(by)} |")
        lines.append("")
    return "\n".join(lines)


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def bullets(texts: Iterable[str]) -> str:
    return "".join(f"- {text}\n" for text in texts)


def rules_table() -> str:
    """What the audit looks for."""
    rows = sorted(RULES.values(), key=lambda rule: (-rule.severity, rule.name))
    return "| severity | rule | why |\n|---|---|---|\n" + "".join(
        f"| {rule.severity} | `{rule.name}` | {rule.why} |\n" for rule in rows
    )


def between(page: str, name: str) -> str:
    """The generated part of that name."""
    return page.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]


def replaced(page: str, name: str, content: str) -> str:
    return page.replace(
        f"<!-- {name} -->\n{between(page, name)}<!--", f"<!-- {name} -->\n{content}<!--"
    )


def main() -> None:
    from tests.launch.cloud.test_permissions import DANGEROUS

    path = DOCS / "instances.md"
    path.write_text(
        re.sub(
            r"```text\n[a-z0-9_/]+, freeze=.*?```\n",
            lambda match: f"```text\n{instances_output()}```\n",
            path.read_text(),
            flags=re.DOTALL,
        )
    )
    with (
        tempfile.TemporaryDirectory() as home,
        running(Path(home) / "calls.jsonl", WHOLE) as cloud,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cloud.environment().items():
            patch.setenv(name, value)
        recorded = record(cloud, Path(home), patch)
    asked = {part: unique([*recorded.get(part, []), *service_side(part)]) for part in PARTS}
    page = (DOCS / "security.md").read_text()
    for name, content in {
        "permissions": permissions_table(asked),
        "dangerous": bullets(DANGEROUS),
        "rules": rules_table(),
    }.items():
        page = replaced(page, name, content)
    (DOCS / "security.md").write_text(page)


if __name__ == "__main__":
    main()
