"""The model as a Ray Serve application, for AWS's Ray Serve image (tags serve-ml-sagemaker-*).

The image sends /invocations on to this application's root, and answers /ping itself. It finds the application through two variables of the model:
SM_RAYSERVE_APP=serving.ray_app:app, and PYTHONPATH=/opt/ml/model/code, where the package holds this file.
"""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from serving.batching import Engine
from serving.handler import answer, new_id, settings_from
from serving.package import load

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response


class Model:
    """A replica. Ray Serve calls it healthy, and sends it requests, once this is made: once the package has proven itself."""

    def __init__(self, package: str) -> None:
        self._settings = settings_from(os.environ)
        self._engine = Engine(load(Path(package)), max_pixels=self._settings.max_pixels)

    async def __call__(self, request: "Request") -> "Response":
        from starlette.responses import Response

        request_id = new_id(request.headers.get("x-request-id", ""))
        kinds = request.headers.get("content-type", ""), request.headers.get("accept", "")
        # The image's adapter has taken in the whole body already, so there is no use in reading this one piece by piece.
        result = await asyncio.to_thread(
            answer, self._engine, self._settings, await request.body(), *kinds, request_id
        )
        headers = {"X-Request-Id": request_id, **result.headers}
        return Response(result.body, result.status, headers, "application/json")


def __getattr__(name: str) -> "Application":
    """`app`, made when Ray asks for it: this module can be imported where Ray is not installed."""
    if name != "app":
        raise AttributeError(name)
    from ray import serve

    return serve.deployment(Model, name="packhorse").bind(
        os.environ.get("MODEL_DIR", "/opt/ml/model")
    )
