"""A request to AWS as plain data, and the check that AWS would make of it, without AWS."""

import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError

if TYPE_CHECKING:
    from botocore.model import Shape


@dataclass(frozen=True)
class Request:
    """What one call sends. operation: its name in botocore's service model, like CreateTrainingJob."""

    service: str
    operation: str
    parameters: dict[str, Any]


def check(request: Request) -> None:
    """Raises UserError for what AWS would refuse by its own service model.

    botocore checks required members, types and minima before it sends; maxima, patterns and enums it leaves to the service.
    """
    from botocore.validate import ParamValidator

    shape = _input_shape(request.service, request.operation)
    report = ParamValidator().validate(request.parameters, shape)
    faults = (
        report.generate_report().splitlines()
        if report.has_errors()
        else list(_faults(shape, request.parameters, ""))
    )
    if faults:
        raise UserError(
            f"{request.operation}: AWS would refuse this request: {'; '.join(faults)}; change the setting that it comes from"
        )


@functools.cache
def _input_shape(service: str, operation: str) -> "Shape":
    import botocore.session

    return (
        botocore.session.get_session()
        .get_service_model(service)
        .operation_model(operation)
        .input_shape
    )


def _faults(shape: "Shape", value: Any, path: str) -> Iterator[str]:
    """Breaches of max, pattern and enum, below a value whose types are right."""
    where = path.lstrip(".")
    if shape.type_name == "structure":
        for name, inner in value.items():
            yield from _faults(shape.members[name], inner, f"{path}.{name}")
        return
    size = (
        value
        if shape.type_name in ("integer", "long", "float", "double")
        else len(value)
        if hasattr(value, "__len__")
        else None
    )
    limit = shape.metadata.get("max")
    if size is not None and limit is not None and size > limit:
        yield (
            f"{where}: {size} is above the maximum of {limit}"
            if size is value
            else f"{where}: its length of {size} is above the maximum of {limit}"
        )
    if shape.type_name == "list":
        for number, inner in enumerate(value):
            yield from _faults(shape.member, inner, f"{path}[{number}]")
    elif shape.type_name == "map":
        for key, inner in value.items():
            yield from _faults(shape.key, key, f"{path}[{key}]")
            yield from _faults(shape.value, inner, f"{path}[{key}]")
    elif shape.type_name == "string":
        if shape.enum and value not in shape.enum:
            yield f"{where}: {value} is not one of AWS's {len(shape.enum)} allowed values{_near(value, shape.enum)}"
        pattern = _compiled(shape.metadata.get("pattern", "(?s:.*)"))
        if pattern and not pattern.fullmatch(value):
            yield f"{where}: {value!r} doesn't match {shape.metadata['pattern']}"


def _near(value: str, allowed: list[str]) -> str:
    return f", like {', '.join(difflib.get_close_matches(value, allowed, n=3, cutoff=0) or allowed[:3])}"


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """AWS writes Java's regular expressions. Unicode's categories become Python's classes, a little wider; None for the few that stay unreadable."""
    for category, ours in {
        "L": r"\w",
        "M": r"\w",
        "Alnum": r"\w",
        "N": r"\d",
        "Z": r"\s",
        "P": r"\W",
        "S": r"\W",
    }.items():
        pattern = pattern.replace(rf"\p{{{category}}}", ours)
    try:
        return re.compile(pattern)
    except re.error:
        return None
