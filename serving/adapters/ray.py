"""The model as a Ray Serve application, for AWS's Ray Serve image (tags serve-ml-sagemaker-*).

The image passes /invocations on to this application's root, and answers /ping itself. It finds the
application by two environment variables of the model: SM_RAYSERVE_APP=serving.ray_app:app, and
PYTHONPATH=/opt/ml/model/code, where the package holds this file as `serving/ray_app.py`.
"""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from serving.contract import JSON, PREFLIGHT, check_method, cross_origin
from serving.fetch import RequestError
from serving.handler import Answer, answer, failure, new_id, settings_from, start_engine
from serving.handler import Request as Asked
from serving.package import load
from serving.signature import SIGNED_BY
from serving.work import Work

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response


class Model:
    """A replica. Ray Serve sends requests once it is made, which verifies the package."""

    def __init__(self, package: str) -> None:
        self._settings = settings_from(os.environ)
        self._engine = start_engine(
            load(Path(package), signed_by=os.environ.get(SIGNED_BY, "")), self._settings
        )

    async def __call__(self, request: "Request") -> "Response":
        # imported here: only Ray Serve's environment has it
        from starlette.responses import Response

        headers = request.headers
        allowed = cross_origin(self._settings.origins, headers.get("origin", ""))
        if request.method == "OPTIONS":
            return Response(b"", 204, {**PREFLIGHT, **allowed})
        request_id = new_id(headers.get("x-request-id", ""))
        # The image's adapter has read the whole body already: to read it in pieces gains nothing.
        asked = Asked(
            await request.body(),
            headers.get("content-type", ""),
            headers.get("accept", ""),
            request_id,
        )
        try:
            check_method(request.method)
            work = Work(self._settings.seconds)
            result = await self._answer(asked, work)
        except RequestError as error:
            result = failure(error, request_id)
        sent = {"X-Request-Id": request_id, **allowed, **result.headers}
        return Response(result.body, result.status, {"Content-Type": JSON, **sent})

    async def _answer(self, asked: Asked, work: Work) -> Answer:
        """Return the answer, computed in a thread. Ray cancels this when the client hangs up."""
        try:
            return await asyncio.to_thread(answer, self._engine, self._settings, asked, work)
        finally:
            work.abandon()


def __getattr__(name: str) -> "Application":
    """Return `app`. It is made when Ray asks for it: this module can be imported without Ray."""
    if name != "app":
        raise AttributeError(name)
    # imported here: only Ray Serve's environment has it
    from ray import serve

    directory = os.environ.get("MODEL_DIR", "/opt/ml/model")
    return serve.deployment(Model, name="packhorse").bind(directory)
