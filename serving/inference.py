"""The four functions that AWS's PyTorch inference toolkit calls. In the model package this file is `code/inference.py`."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.package import Package, load


def model_fn(model_dir: str) -> Package:
    return load(Path(model_dir))


def input_fn(body: bytes | bytearray, content_type: str) -> bytes:
    """The picture's bytes. Only `predict_fn` gets the package, which knows how to prepare them."""
    if not content_type.lower().startswith("image/"):
        raise ValueError(f"content type {content_type!r} is not supported; allowed: image/* with the bytes of one picture")
    return bytes(body)


def predict_fn(picture: bytes, package: Package) -> NDArray[np.float32]:
    """Logits [1, classes]."""
    return package.predict(package.prepare(picture)[np.newaxis])


def output_fn(logits: NDArray[np.float32], accept: str) -> str:
    """`[[logit, ...]]` in the order of the package's classes."""
    if accept.lower() not in ("application/json", "*/*"):
        raise ValueError(f"accept {accept!r} is not supported; allowed: application/json")
    return json.dumps(logits.tolist())
