"""The model inside an AWS Lambda function, without an endpoint: what a few pictures a day cost least with.

It takes the events that `lambda_function.py` takes, and gives the same answers. The package lies unpacked in the folder that MODEL_DIR names
(default: `package`, beside the code); the variables SERVING_... are the settings.
"""

import functools
import os
from pathlib import Path
from typing import Any

from serving import handler as core
from serving import lambda_function as proxy
from serving.batching import Engine
from serving.package import load


@functools.cache
def engine() -> tuple[Engine, core.Settings]:
    settings = core.settings_from(os.environ)
    root = Path(os.environ.get("LAMBDA_TASK_ROOT", "."))
    return Engine(
        load(root / os.environ.get("MODEL_DIR", "package")), max_pixels=settings.max_pixels
    ), settings


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Lambda's entry. Never raises."""
    request_id = str(context.aws_request_id)
    try:
        body, accept = proxy.read(event)
    except proxy.Problem as problem:
        result = core.failure(core.Problem(problem.status, str(problem)), request_id)
    else:
        content_type = (
            "application/json" if body.lstrip()[:1] == b"{" else "application/octet-stream"
        )
        result = core.answer(*engine(), body, content_type, accept, request_id)
    return proxy.answer(event, request_id, result.status, result.body.decode())


if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    engine()  # before the first request: Lambda gives the start of a function more processor than its calls
