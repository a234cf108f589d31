"""Images in S3, as the machine's own role may list and read them."""

import functools
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from serving.fetch import FetchError
from trainer.common.errors import UserError

EXPECTED = "an S3 URI looks like s3://bucket/key"


def fetch(uri: str, *, max_bytes: int, reserve: Callable[[int], None]) -> bytes:
    """Return the object at s3://bucket/key.

    reserve: called with the object's size before it is read; what it raises ends the fetch.
    Raises FetchError, with the same words for what is missing and what is not allowed.
    """
    # imported here: boto3 is optional, for those who switch S3 on
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = _parts(uri)
    if not key:
        raise FetchError(EXPECTED)
    try:
        answer = _client().get_object(Bucket=bucket, Key=key)
        size = answer["ContentLength"]
        with answer["Body"] as body:
            if size <= max_bytes:
                reserve(size)
                data: bytes = body.read()
                return data
    except (ClientError, BotoCoreError, OSError) as error:
        raise FetchError("the S3 object can't be read with this server's role") from error
    raise FetchError(f"the S3 object has {size:,} bytes; allowed: {max_bytes:,}")


def listed(uri: str) -> list[str]:
    """Return the URIs of the objects at s3://bucket/prefix, or below it, sorted.

    Raises UserError where they can't be listed.
    """
    # imported here: boto3 is optional
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _parts(uri)
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    except (ClientError, BotoCoreError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{uri}: S3 doesn't list it ({reason})") from error
    inside = prefix.rstrip("/") + "/"
    return sorted(
        f"s3://{bucket}/{key}"
        for key in keys
        if not key.endswith("/") and (key == prefix or not prefix or key.startswith(inside))
    )


def _parts(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an S3 URI. Raises FetchError."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise FetchError(EXPECTED) from error
    if parts.scheme != "s3" or not parts.netloc:
        raise FetchError(EXPECTED)
    # The key as it stands: it may hold ? and #.
    return parts.netloc, uri.removeprefix(f"s3://{parts.netloc}").removeprefix("/")


@functools.cache
def _client() -> Any:
    # imported here: boto3 is optional, for those who switch S3 on
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": 2}
    return boto3.client("s3", config=Config(connect_timeout=3, read_timeout=5, retries=retries))
