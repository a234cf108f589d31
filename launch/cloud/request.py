"""A request to AWS as plain data, and an offline check of it by AWS's own service model."""

import difflib
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from botocore.loaders import Loader, create_loader
from botocore.model import Shape
from botocore.session import Session, get_session
from botocore.validate import ParamValidator

from trainer.common.errors import UserError


@dataclass(frozen=True)
class Request:
    """The content of one call. operation: botocore's name for it, like CreateTrainingJob."""

    service: str
    operation: str
    parameters: dict[str, Any]


# Java's character classes, and Python's, which are a little wider.
CATEGORIES = {
    "L": r"\w",
    "M": r"\w",
    "Alnum": r"\w",
    "N": r"\d",
    "Z": r"\s",
    "P": r"\W",
    "S": r"\W",
}


def check(request: Request) -> None:
    """Raise UserError for a request that AWS would refuse by its own service model.

    botocore checks required members, types and minima before it sends, but leaves maxima, patterns
    and enums to the service.
    """
    shape = _input_shape(request.service, request.operation)
    report = ParamValidator().validate(request.parameters, shape)
    faults = report.generate_report().splitlines()
    if not faults:
        faults = list(_faults(shape, request.parameters, ""))
    if faults:
        raise UserError(
            f"{request.operation}: AWS would refuse this request: {'; '.join(faults)}; "
            "change the setting that it comes from"
        )


@functools.cache
def _loader() -> Loader:
    return create_loader(get_session().get_config_variable("data_path"))


def core_session() -> Session:
    """Return a new session of botocore's; AWS's service models are parsed once for all of them."""
    session = get_session()
    session.register_component("data_loader", _loader())
    return session


@functools.cache
def _input_shape(service: str, operation: str) -> Shape:
    return core_session().get_service_model(service).operation_model(operation).input_shape


def _faults(shape: Shape, value: Any, path: str) -> Iterator[str]:
    """Yield violations of max, pattern and enum in a value whose types are right."""
    where = path.lstrip(".")
    if shape.type_name == "structure":
        for name, inner in value.items():
            yield from _faults(shape.members[name], inner, f"{path}.{name}")
        return
    limit = shape.metadata.get("max", math.inf)
    if shape.type_name in ("integer", "long", "float", "double"):
        if value > limit:
            yield f"{where}: {value} is above the maximum of {limit}"
    elif hasattr(value, "__len__") and len(value) > limit:
        yield f"{where}: its length of {len(value)} is above the maximum of {limit}"
    if shape.type_name == "list":
        for number, inner in enumerate(value):
            yield from _faults(shape.member, inner, f"{path}[{number}]")
    elif shape.type_name == "map":
        for key, inner in value.items():
            yield from _faults(shape.key, key, f"{path}[{key}]")
            yield from _faults(shape.value, inner, f"{path}[{key}]")
    elif shape.type_name == "string":
        if shape.enum and value not in shape.enum:
            near = difflib.get_close_matches(value, shape.enum, n=3, cutoff=0) or shape.enum[:3]
            yield (
                f"{where}: {value} is not one of AWS's {len(shape.enum)} allowed values, "
                f"like {', '.join(near)}"
            )
        pattern = _compiled(shape.metadata.get("pattern", "(?s:.*)"))
        if pattern and not pattern.fullmatch(value):
            yield f"{where}: {value!r} doesn't match {shape.metadata['pattern']}"


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """Return AWS's regular expression (Java's) as Python's; None for those that Python can't read.

    Unicode's categories become Python's classes, which are a little wider.
    """
    for category, ours in CATEGORIES.items():
        pattern = pattern.replace(rf"\p{{{category}}}", ours)
    try:
        return re.compile(pattern)
    except re.error:
        return None
