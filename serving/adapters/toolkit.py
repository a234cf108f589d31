"""The four functions that AWS's PyTorch inference toolkit calls, as `code/inference.py`.

The toolkit turns an exception into status 500 with a traceback. So these functions pass the answer
to a failed request on, instead of raising.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving import contract, handler
from serving.backends import Scores
from serving.contract import Query
from serving.engine import Engine
from serving.handler import Answer, Settings
from serving.package import Package, load
from serving.signature import SIGNED_BY
from serving.work import Work


class Context(Protocol):
    """The part of the toolkit's request context that is used here."""

    def set_response_status(self, code: int, phrase: str) -> object: ...


@dataclass(frozen=True)
class Prediction:
    """A query with the scores of its images."""

    query: Query
    scores: Scores
    package: Package


@functools.cache
def settings() -> Settings:
    """Return the settings from this process's environment."""
    return handler.settings_from(os.environ)


def model_fn(model_dir: str) -> Engine:
    """Return the engine of the package in a directory. Raises PackageError."""
    return handler.start_engine(
        load(Path(model_dir), signed_by=os.environ.get(SIGNED_BY, "")), settings()
    )


def input_fn(body: bytes | bytearray | str, content_type: str) -> Query | Answer:
    """Return what a body asks for, or the answer that refuses it."""
    try:
        return handler.read(body, content_type, settings())
    except Exception as error:
        return handler.failure(error, handler.new_id())


def predict_fn(query: Query | Answer, engine: Engine) -> Prediction | Answer:
    """Return the scores of the query's images, or the answer that tells the error."""
    if isinstance(query, Answer):
        return query
    work = Work(settings().seconds)
    try:
        with handler.collect(query, settings(), work) as images:
            return Prediction(query, engine.scores(images, work), engine.package)
    except Exception as error:
        return handler.failure(error, handler.new_id())


def output_fn(prediction: Prediction | Answer, accept: str, context: Context) -> str:
    """Return the answer's body; after an error, set its status too."""
    if isinstance(prediction, Prediction):
        query = prediction.query
        try:
            form = contract.choose(query, accept)
            body = handler.write(prediction.scores, prediction.package, form, query.top)
            return body.decode()
        except Exception as error:
            prediction = handler.failure(error, handler.new_id())
    context.set_response_status(prediction.status, "")
    return prediction.body.decode()
