"""Fetches an image from S3, as the machine's own role."""

import functools
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from serving.fetch import FetchError


def fetch(uri: str, *, max_bytes: int, reserve: Callable[[int], None]) -> bytes:
    """Return the object at s3://bucket/key.

    reserve: called with the object's size before it is read; what it raises ends the fetch.
    Raises FetchError, with the same words for what is missing and what is not allowed.
    """
    # imported here: boto3 is optional, for those who switch S3 on
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise FetchError("an S3 URI looks like s3://bucket/key") from error
    key = uri.removeprefix(f"s3://{parts.netloc}/")  # as it stands: a key may hold ? and #
    if parts.scheme != "s3" or not parts.netloc or not key:
        raise FetchError("an S3 URI looks like s3://bucket/key")
    try:
        answer = _client().get_object(Bucket=parts.netloc, Key=key)
        size = answer["ContentLength"]
        with answer["Body"] as body:
            if size <= max_bytes:
                reserve(size)
                data: bytes = body.read()
                return data
    except (ClientError, BotoCoreError, OSError) as error:
        raise FetchError("the S3 object can't be read with this server's role") from error
    raise FetchError(f"the S3 object has {size:,} bytes; allowed: {max_bytes:,}")


@functools.cache
def _client() -> Any:
    # imported here: boto3 is optional, for those who switch S3 on
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": 2}
    return boto3.client("s3", config=Config(connect_timeout=3, read_timeout=5, retries=retries))
