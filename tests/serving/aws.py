"""AWS for the deploy tests: tests/launch/aws.py with the parts of CloudFormation and Lambda that
serving needs and moto 5.2 lacks.

    python -c "from tests.serving.aws import main; main()" RECORD

(moto wants its models in a named module.)

Added: the CloudFormation resources of alarms, aliases with provisioned concurrency and autoscaling,
which act on moto's own back ends where it has them; GetProvisionedConcurrencyConfig; a stack that
fails, where a test asks for it (`/strict/fail`); what changes with a parameter; and a resource with
a name of its own can't be replaced under that name, as in CloudFormation.
"""

import contextlib
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
from moto.core.common_models import CloudFormationModel
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


class Serving(Strict):
    _failure: tuple[str, str] | None = None

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
