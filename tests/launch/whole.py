"""AWS with all that `up`, `deploy` and `audit` need: tests/serving/aws.py, and the two calls that
only the audit makes.
"""

import json
from datetime import UTC, datetime
from typing import Any

WHOLE = "tests.launch.whole"


def main() -> None:
    from tests.launch.aws import ACCOUNT, Strict, _answer
    from tests.serving import aws

    serving = aws.Serving

    class Whole(serving):
        def _ExecuteChangeSet(
            self, parameters: dict[str, Any], region: str, forward: Any, start: Any
        ) -> list[bytes]:
            kind = (
                serving if parameters["ChangeSetName"].startswith("arn:") else Strict
            )  # `deploy` names them by ARN, `up` by name
            return kind._ExecuteChangeSet(self, parameters, region, forward, start)

        def _ValidatePolicy(
            self, parameters: dict[str, Any], region: str, forward: Any, start: Any
        ) -> list[bytes]:
            return _answer(start, "200 OK", b'{"findings": []}', "application/json")

        def _ListProvisionedConcurrencyConfigs(
            self, parameters: dict[str, Any], region: str, forward: Any, start: Any
        ) -> list[bytes]:
            arn = f"arn:aws:lambda:{region}:{ACCOUNT}:function:{parameters['FunctionName']}:live"
            count = aws.WARM.get(parameters["FunctionName"])
            now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}+0000"
            found = (
                [
                    {
                        "FunctionArn": arn,
                        "RequestedProvisionedConcurrentExecutions": count,
                        "LastModified": now,
                    }
                ]
                if count
                else []
            )
            return _answer(
                start,
                "200 OK",
                json.dumps({"ProvisionedConcurrencyConfigs": found}).encode(),
                "application/json",
            )

    aws.Serving = Whole  # what its main starts
    aws.main()
