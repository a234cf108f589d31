"""The four functions that AWS's PyTorch inference toolkit calls. In the model package this file is `code/inference.py`.

An exception would reach the caller as 500 with its traceback, so a request that fails is passed on as the answer that it gets.
"""

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.batching import Engine
from serving.handler import (
    Answer,
    Query,
    Settings,
    choose,
    collect,
    failure,
    new_id,
    read,
    settings_from,
    write,
)
from serving.package import load


class Context(Protocol):
    """What is used of the toolkit's context of a request."""

    def set_response_status(self, code: int, phrase: str) -> object: ...


@dataclass(frozen=True)
class Prediction:
    query: Query
    logits: NDArray[np.float32]  # [pictures, classes]
    classes: tuple[str, ...]


@functools.cache
def settings() -> Settings:
    return settings_from(os.environ)


def model_fn(model_dir: str) -> Engine:
    return Engine(load(Path(model_dir)), max_pixels=settings().max_pixels)


def input_fn(body: bytes | bytearray | str, content_type: str) -> Query | Answer:
    try:
        return read(body, content_type, settings())
    except Exception as error:
        return failure(error, new_id())


def predict_fn(query: Query | Answer, engine: Engine) -> Prediction | Answer:
    if isinstance(query, Answer):
        return query
    request_id, end = new_id(), time.monotonic() + settings().seconds
    try:
        with collect(query, settings(), request_id, end) as pictures:
            return Prediction(query, engine.logits(pictures, end), engine.package.classes)
    except Exception as error:
        return failure(error, request_id)


def output_fn(prediction: Prediction | Answer, accept: str, context: Context) -> str:
    if isinstance(prediction, Prediction):
        try:
            return write(
                prediction.logits,
                prediction.classes,
                choose(prediction.query, accept),
                prediction.query.top,
            ).decode()
        except Exception as error:
            prediction = failure(error, new_id())
    context.set_response_status(prediction.status, "")
    return prediction.body.decode()
