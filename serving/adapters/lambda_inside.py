"""The model inside an AWS Lambda function, without an endpoint: cheapest for a few images a day.

It takes the events that `lambda_events.py` describes. The package lies unpacked in the folder that
MODEL_DIR names (default: `package`, beside the code); the variables SERVING_... are the settings.
In the function's zip this file is `serving/lambda_direct.py`.
"""

import functools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving import handler as core
from serving import s3
from serving.adapters import lambda_events as events
from serving.engine import Engine
from serving.fetch import RequestError
from serving.package import load
from serving.signature import SIGNED_BY


@functools.cache
def engine() -> tuple[Engine, core.Settings]:
    """Return the one engine of this environment, and its settings."""
    settings = _settings()
    root = Path(os.environ.get("LAMBDA_TASK_ROOT", "."))
    package = load(
        root / os.environ.get("MODEL_DIR", "package"), signed_by=os.environ.get(SIGNED_BY, "")
    )
    return core.start_engine(package, settings), settings


def _settings() -> core.Settings:
    """Return the settings from the environment.

    Decoded pictures may take half of the function's memory: the network and Python need the rest.
    """
    settings = core.settings_from(os.environ)
    megabytes = os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE")  # Lambda sets it
    if megabytes is None or "SERVING_MAX_DECODED" in os.environ:
        return settings
    return replace(settings, max_decoded=(int(megabytes) << 20) // 2)


def handler(event: Any, context: Any) -> Any:
    """Return the answer to an event of Lambda. Any error of a request becomes an answer."""
    request_id = str(context.aws_request_id)
    settings = engine()[1]
    try:
        asked = events.read(event)
    except RequestError as error:
        result = core.failure(error, request_id)
    else:
        if asked.method == "OPTIONS":
            return events.preflight(event, request_id, settings.origins)
        request = core.Request(asked.body, asked.content_type, asked.accept, request_id)
        result = core.answer(*engine(), request)
    headers = {**events.allowed(event, settings.origins), **result.headers}
    return events.answer(event, request_id, result.status, result.body.decode(), headers)


def renew() -> None:
    """Renew what copies of a restored snapshot (SnapStart) must not share.

    That is connections, which have been closed since, and Python's random numbers. Lambda itself
    renews the system's random numbers, which request ids and TLS use.
    """
    random.seed()
    s3.forget_connections()


if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    # Before the first request: Lambda gives a function more CPU at its start than in its calls.
    engine()
if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
    # imported here: only Lambda has it
    from snapshot_restore_py import register_after_restore

    register_after_restore(renew)
