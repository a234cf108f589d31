"""The model as a Ray Serve application, for AWS's Ray Serve image (tags serve-ml-sagemaker-*).

The image sends /invocations on to this application's root, and answers /ping itself. It finds the
application through two variables of the model: SM_RAYSERVE_APP=serving.ray_app:app, and
PYTHONPATH=/opt/ml/model/code, where the package holds this file as `serving/ray_app.py`.
"""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from serving.engine import Engine
from serving.handler import Request as Asked
from serving.handler import answer, new_id, settings_from
from serving.package import load

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response


class Model:
    """A replica. Once it is made, the package has proven itself, and Ray Serve sends requests."""

    def __init__(self, package: str) -> None:
        self._settings = settings_from(os.environ)
        self._engine = Engine(load(Path(package)), max_pixels=self._settings.max_pixels)

    async def __call__(self, request: "Request") -> "Response":
        # imported here: only Ray Serve's environment has it
        from starlette.responses import Response

        headers = request.headers
        request_id = new_id(headers.get("x-request-id", ""))
        # The image's adapter has taken in the whole body already, so there is no use in reading
        # this one piece by piece.
        asked = Asked(
            await request.body(),
            headers.get("content-type", ""),
            headers.get("accept", ""),
            request_id,
        )
        result = await asyncio.to_thread(answer, self._engine, self._settings, asked)
        sent = {"X-Request-Id": request_id, **result.headers}
        return Response(result.body, result.status, sent, "application/json")


def __getattr__(name: str) -> "Application":
    """Return `app`, made when Ray asks for it: Ray need not be installed to import this."""
    if name != "app":
        raise AttributeError(name)
    # imported here: only Ray Serve's environment has it
    from ray import serve

    directory = os.environ.get("MODEL_DIR", "/opt/ml/model")
    return serve.deployment(Model, name="packhorse").bind(directory)
