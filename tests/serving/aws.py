"""AWS for the deploy tests: tests/launch/aws.py with the parts of CloudFormation and Lambda that
serving needs and moto 5.2 lacks.

Added: the CloudFormation resources of alarms, aliases with provisioned concurrency, autoscaling and
CodeBuild's projects, which act on moto's own back ends where it has them;
GetProvisionedConcurrencyConfig; builds, which take a phase for each look at them, leave an image in
ECR, and end as a test asks (`/strict/build`); a stack that
fails, where a test asks for it (`/strict/fail`); what changes with a parameter; and a resource with
a name of its own can't be replaced under that name, as in CloudFormation.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from moto.applicationautoscaling.models import applicationautoscaling_backends
from moto.awslambda.exceptions import UnknownFunctionException
from moto.awslambda.models import LambdaVersion, lambda_backends
from moto.backends import get_backend
from moto.cloudformation.models import Change, ChangeSet, Event
from moto.cloudformation.parsing import ResourceMap
from moto.cloudwatch.models import cloudwatch_backends
from moto.codebuild.models import codebuild_backends
from moto.core.common_models import CloudFormationModel
from moto.core.utils import unix_time
from moto.ecr.models import Repository, ecr_backends
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.sagemaker.models import FakeEndpoint, FakeEndpointConfig, Model
from werkzeug.serving import make_server

from serving.deploy.release import references
from tests.launch.aws import ACCOUNT, Refused, Strict, _answer, complete

WARM: dict[str, int] = {}  # provisioned concurrency, by function


class Resource:
    """What the resources below have in common: they are made by `make`, and unmade by `unmake`."""

    def __init__(self, physical_id: str, properties: dict[str, Any]) -> None:
        self.physical_resource_id = physical_id
        self.properties = properties

    @classmethod
    def create_from_cloudformation_json(
        cls,
        resource_name: str,
        cloudformation_json: dict[str, Any],
        account_id: str,
        region_name: str,
        **rest: Any,
    ) -> Any:
        properties = cloudformation_json["Properties"]
        return cls(cls.make(properties, account_id, region_name), properties)

    @classmethod
    def update_from_cloudformation_json(
        cls,
        original_resource: Any,
        new_resource_name: str,
        cloudformation_json: dict[str, Any],
        account_id: str,
        region_name: str,
    ) -> Any:
        original_resource.delete(account_id, region_name)
        return cls.create_from_cloudformation_json(
            new_resource_name, cloudformation_json, account_id, region_name
        )

    def delete(self, account_id: str, region_name: str) -> None:
        self.unmake(self.properties, account_id, region_name)

    @classmethod
    def make(cls, properties: dict[str, Any], account: str, region: str) -> str:
        raise NotImplementedError

    @staticmethod
    def unmake(properties: dict[str, Any], account: str, region: str) -> None:
        raise NotImplementedError

    @staticmethod
    def cloudformation_name_type() -> str:
        return ""


class Alarm(Resource, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::CloudWatch::Alarm"

    @classmethod
    def make(cls, properties, account, region):
        cloudwatch_backends[account][region].put_metric_alarm(
            name=properties["AlarmName"],
            namespace=properties.get("Namespace", ""),
            metric_name=properties.get("MetricName", ""),
            comparison_operator=properties["ComparisonOperator"],
            evaluation_periods=properties["EvaluationPeriods"],
            period=properties.get("Period", 60),
            threshold=float(properties["Threshold"]),
            statistic=properties.get("Statistic", ""),
            description=properties["AlarmDescription"],
            dimensions=[],
            alarm_actions=[],
        )
        return properties["AlarmName"]

    @staticmethod
    def unmake(properties, account, region):
        cloudwatch_backends[account][region].delete_alarms([properties["AlarmName"]])


class Alias(Resource, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::Lambda::Alias"

    @classmethod
    def make(cls, properties, account, region):
        function = properties["FunctionName"]
        alias = lambda_backends[account][region].create_alias(
            properties["Name"], function, properties["FunctionVersion"], "", ""
        )
        if "ProvisionedConcurrencyConfig" in properties:
            WARM[function] = int(
                properties["ProvisionedConcurrencyConfig"]["ProvisionedConcurrentExecutions"]
            )
        return alias.arn

    @staticmethod
    def unmake(properties, account, region):
        WARM.pop(properties["FunctionName"], None)
        with contextlib.suppress(
            UnknownFunctionException
        ):  # moto has no order in which it deletes; with the function its aliases are gone
            lambda_backends[account][region].delete_alias(
                properties["Name"], properties["FunctionName"]
            )


class ScalableTarget(Resource, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::ApplicationAutoScaling::ScalableTarget"

    @classmethod
    def make(cls, properties, account, region):
        namespace, resource, dimension = (
            properties["ServiceNamespace"],
            properties["ResourceId"],
            properties["ScalableDimension"],
        )
        low, high = int(properties["MinCapacity"]), int(properties["MaxCapacity"])
        applicationautoscaling_backends[account][region].register_scalable_target(
            namespace, resource, dimension, low, high, "", None
        )
        return f"{resource}|{dimension}|{namespace}"

    @staticmethod
    def unmake(properties, account, region):
        backend = applicationautoscaling_backends[account][region]
        backend.deregister_scalable_target(
            properties["ServiceNamespace"],
            properties["ResourceId"],
            properties["ScalableDimension"],
        )


class ScalingPolicy(Resource, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::ApplicationAutoScaling::ScalingPolicy"

    @classmethod
    def make(cls, properties, account, region):
        resource, dimension, namespace = properties["ScalingTargetId"].split("|")
        body = properties["TargetTrackingScalingPolicyConfiguration"]
        backend = applicationautoscaling_backends[account][region]
        backend.put_scaling_policy(
            properties["PolicyName"], namespace, resource, dimension, body, properties["PolicyType"]
        )
        return properties["PolicyName"]

    @staticmethod
    def unmake(properties, account, region):
        resource, dimension, namespace = properties["ScalingTargetId"].split("|")
        applicationautoscaling_backends[account][region].delete_scaling_policy(
            properties["PolicyName"], namespace, resource, dimension
        )


class Project(Resource, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::CodeBuild::Project"

    @classmethod
    def make(cls, properties, account, region):
        name = properties["Name"]
        codebuild_backends[account][region].create_project(
            name, "", properties, {}, {}, properties["ServiceRole"], *[None] * 7
        )
        return name

    @staticmethod
    def unmake(properties, account, region):
        codebuild_backends[account][region].delete_project(properties["Name"])


# Resources that an update replaces: their names, or version numbers, reach what refers to them.
REPLACED = ("Model", "EndpointConfig", "Version")


def follow_parameters() -> None:
    """Lets change sets and updates see what a parameter changes, as CloudFormation does: within
    !Sub too, and through a resource that is replaced.
    """
    template_alone = ResourceMap.build_resource_diff

    def build_resource_diff(
        self: ResourceMap, template: dict[str, Any], parameters: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        found = template_alone(self, template, None)
        changed = {
            name
            for name, value in (parameters or {}).items()
            if self.input_parameters.get(name) != value
        }
        bodies = {
            name: body
            for name, body in template["Resources"].items()
            if name in self._parsed_resources and name not in found["Modify"]
        }
        if changed:
            found["Modify"] += [
                name for name, body in bodies.items() if changed & set(references(body))
            ]
        for replaced in REPLACED:
            if replaced in found["Modify"]:
                users = [
                    name
                    for name, body in bodies.items()
                    if f'"Fn::GetAtt": ["{replaced}", ' in json.dumps(body)
                ]
                found["Modify"] += [name for name in users if name not in found["Modify"]]
        return found

    ResourceMap.build_resource_diff = build_resource_diff

    def diff(self: ChangeSet) -> list[Change]:
        found = build_resource_diff(self.stack.resource_map, self.template_dict, self.parameters)
        kinds = self.template_dict["Resources"]
        return [
            Change(action, name, kinds[name]["Type"])
            for action, names in found.items()
            for name in names
        ]

    ChangeSet.diff = diff


def empty_on_delete() -> None:
    """Lets a repository go with its images where its template says so, as CloudFormation does."""
    make = Repository.create_from_cloudformation_json
    emptied: set[str] = set()

    def create(
        resource_name: str, cloudformation_json: dict[str, Any], *where: str, **rest: Any
    ) -> Any:
        if cloudformation_json["Properties"].get("EmptyOnDelete"):
            emptied.add(resource_name)
        return make(resource_name, cloudformation_json, *where, **rest)

    def delete(self: Repository, account_id: str, region_name: str) -> None:
        backend = ecr_backends[account_id][region_name]
        backend.delete_repository(self.name, force=self.name in emptied)

    Repository.create_from_cloudformation_json = staticmethod(create)
    Repository.delete = delete


def publish(
    original_resource: Any,
    new_resource_name: str,
    cloudformation_json: dict[str, Any],
    account_id: str,
    region_name: str,
) -> Any:
    """A changed Version is a new one; AWS refuses one that is like the last."""
    return LambdaVersion.create_from_cloudformation_json(
        new_resource_name, cloudformation_json, account_id, region_name
    )


def keep_names(kind: type[Any], name: str) -> None:
    """Makes an update that must replace a resource fail where the new one would have the old one's
    name.
    """
    update = kind.update_from_cloudformation_json

    def strict(
        original_resource: Any,
        new_resource_name: str,
        cloudformation_json: dict[str, Any],
        account_id: str,
        region_name: str,
    ) -> Any:
        if getattr(original_resource, name) == new_resource_name:
            raise Refused(
                "ValidationError",
                "CloudFormation cannot update a stack when a custom-named resource requires "
                f"replacing: {new_resource_name}",
            )
        return update(
            original_resource, new_resource_name, cloudformation_json, account_id, region_name
        )

    kind.update_from_cloudformation_json = staticmethod(strict)


PHASES = ("SUBMITTED", "QUEUED", "PROVISIONING", "DOWNLOAD_SOURCE", "PRE_BUILD", "BUILD")
DENIED = "denied: User is not authorized to perform: ecr:PutImage"


class Serving(Strict):
    _failure: tuple[str, str] | None = None

    def _reset(self) -> None:
        super()._reset()
        self._builds: dict[str, dict[str, Any]] = {}  # by id, the oldest first
        self._endings: list[str] = []

    def build(self, status: str) -> None:
        """Lets the next build end with this status; "stuck": in its first phase until it's stopped.

        "raced": it fails, since another has pushed its image meanwhile.
        """
        self._endings.append(status)

    def _StartBuild(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        name = parameters["projectName"]
        projects = codebuild_backends[ACCOUNT][region].codebuild_projects
        if name not in projects:
            raise Refused("ResourceNotFoundException", f"Project cannot be found: {name}")
        bucket, _, key = parameters["sourceLocationOverride"].partition("/")
        assert key in get_backend("s3")[ACCOUNT]["aws"].buckets[bucket].keys
        group, stream = f"/aws/codebuild/{name}", "0123-abcd"
        build = {
            "id": f"{name}:{len(self._builds):08x}",
            "projectName": name,
            "currentPhase": PHASES[0],
            "buildStatus": "IN_PROGRESS",
            "buildComplete": False,
            "environment": {
                "type": "LINUX_CONTAINER",
                "environmentVariables": parameters["environmentVariablesOverride"],
            },
            "phases": [{"phaseType": PHASES[0]}],
            "logs": {"groupName": group, "streamName": stream},
        }
        self._builds[build["id"]] = build
        return self._json(start, {"build": build})

    def _ListBuildsForProject(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        name = parameters["projectName"]
        if name not in codebuild_backends[ACCOUNT][region].codebuild_projects:
            raise Refused("ResourceNotFoundException", f"The provided project {name} doesn't exist")
        ids = [each["id"] for each in self._builds.values() if each["projectName"] == name]
        return self._json(start, {"ids": ids[::-1]})

    def _BatchGetBuilds(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        builds = [self._builds[each] for each in parameters["ids"]]
        for build in builds:
            if not build["buildComplete"]:
                self._go_on(build, region)
        return self._json(start, {"builds": builds})

    def _StopBuild(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        build = self._builds[parameters["id"]]
        build |= {"buildStatus": "STOPPED", "buildComplete": True}
        return self._json(start, {"build": build})

    def _go_on(self, build: dict[str, Any], region: str) -> None:
        """Bring a build into its next phase, or to its end."""
        if self._endings[:1] == ["stuck"]:
            return
        number = PHASES.index(build["currentPhase"]) + 1
        build["phases"][-1]["phaseStatus"] = "SUCCEEDED"
        if number < len(PHASES):
            build["currentPhase"] = PHASES[number]
            build["phases"].append({"phaseType": PHASES[number]})
            return
        status = self._endings.pop(0) if self._endings else "SUCCEEDED"
        if status in ("SUCCEEDED", "raced"):
            variables = build["environment"]["environmentVariables"]
            values = {each["name"]: each["value"] for each in variables}
            manifest = json.dumps({"mediaType": "docker", **values})
            digest = f"sha256:{hashlib.sha256(manifest.encode()).hexdigest()}"
            ecr_backends[ACCOUNT][region].put_image(
                build["projectName"], manifest, values["TAG"], digest=digest
            )
        if status != "SUCCEEDED":
            status = "FAILED" if status == "raced" else status
            failed = {"message": f"Error while executing command: docker push. Reason: {status}"}
            build["phases"][-1] |= {"phaseStatus": status, "contexts": [failed]}
            logs = get_backend("logs")[ACCOUNT][region]
            group, stream = build["logs"]["groupName"], build["logs"]["streamName"]
            logs.create_log_stream(group, stream)
            now = int(1000 * unix_time())
            lines = [f"layer {number}" for number in range(30)] + [DENIED]
            events = [{"timestamp": now, "message": line + "\n"} for line in lines]
            logs.put_log_events(group, stream, events)
        build |= {"currentPhase": "COMPLETED", "buildStatus": status, "buildComplete": True}

    def _json(self, start: Any, answer: dict[str, Any]) -> list[bytes]:
        return _answer(start, "200 OK", json.dumps(answer).encode())

    def fail(self, resource: str, reason: str) -> None:
        """Lets the next creation or update of a stack fail at a resource, and roll back."""
        self._failure = (resource, reason)

    def _failed(self, stack: Any, status: str) -> None:
        assert self._failure
        resource, reason = self._failure
        self._failure = None
        stack.events.append(
            Event(stack.stack_id, stack.name, resource, "", "", status, reason, None)
        )

    def _CreateStack(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        answer: list[bytes] = forward()
        if self._failure:
            assert parameters["OnFailure"] == "DELETE"
            backend = get_backend("cloudformation")[ACCOUNT][region]
            [stack] = [
                stack for stack in backend.stacks.values() if stack.name == parameters["StackName"]
            ]
            self._failed(stack, "CREATE_FAILED")
            backend.delete_stack(stack.stack_id)
        return answer

    def _ExecuteChangeSet(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        change_sets = get_backend("cloudformation")[ACCOUNT][region].change_sets.values()
        found = next(
            (each for each in change_sets if each.change_set_name == parameters["ChangeSetName"]),
            None,
        )
        if found is None or found.execution_status != "AVAILABLE":
            raise Refused(
                "InvalidChangeSetStatus",
                f"ChangeSet {parameters['ChangeSetName']} cannot be executed in its current status",
            )
        if self._failure:
            self._failed(found.stack, "UPDATE_FAILED")
            found.stack.status = "UPDATE_ROLLBACK_COMPLETE"
            return _answer(
                start,
                "200 OK",
                b"<ExecuteChangeSetResponse><ExecuteChangeSetResult/></ExecuteChangeSetResponse>",
                "text/xml",
            )
        answer: list[bytes] = forward()
        found.stack.parameters = found.parameters
        return answer

    def _forward(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        answer: list[bytes] = forward()
        return answer

    _DeleteStack = _FilterLogEvents = (
        _forward  # what tests/launch/aws.py adds to these is about jobs
    )

    def _GetProvisionedConcurrencyConfig(
        self, parameters: dict[str, Any], region: str, forward: Any, start: Any
    ) -> list[bytes]:
        if parameters["FunctionName"] not in WARM or parameters["Qualifier"] != "live":
            raise Refused(
                "ProvisionedConcurrencyConfigNotFoundException",
                "No Provisioned Concurrency Config found for this function",
            )
        count = WARM[parameters["FunctionName"]]
        answer = {
            "RequestedProvisionedConcurrentExecutions": count,
            "AvailableProvisionedConcurrentExecutions": count,
            "Status": "READY",
        }
        return _answer(start, "200 OK", json.dumps(answer).encode(), "application/json")


def main() -> None:
    LambdaVersion.get_cfn_attribute = lambda self, name: str(
        self.version
    )  # of Version, which is all that it has
    LambdaVersion.update_from_cloudformation_json = publish
    FakeEndpoint.cloudformation_name_type = staticmethod(lambda: "EndpointName")
    FakeEndpointConfig.cloudformation_name_type = staticmethod(lambda: "EndpointConfigName")
    Model.cloudformation_name_type = staticmethod(lambda: "ModelName")
    complete()
    follow_parameters()
    empty_on_delete()
    keep_names(Model, "model_name")
    keep_names(FakeEndpointConfig, "endpoint_config_name")
    moto = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1",
        0,
        Serving(moto, Path(sys.argv[1])),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
