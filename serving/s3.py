"""Images in S3, listed and read with the machine's own role."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

from serving.fetch import FetchError
from trainer.common.errors import UserError

EXPECTED = "an S3 URI looks like s3://bucket/key"

READ_SECONDS = 5
CHUNK = 256 << 10  # bytes read at a time
MAX_KEY = 1024  # bytes: S3's limit


def fetch(
    uri: str, *, max_bytes: int, reserve: Callable[[int], None], deadline: float = math.inf
) -> bytes:
    """Return the object at s3://bucket/key.

    deadline: seconds for everything together; one wait of READ_SECONDS may exceed it. reserve:
    called with the size of each piece that comes; an exception from it ends the fetch. Raises
    FetchError, with the same message for a missing object and one that may not be read.
    """
    # imported here: boto3 is optional, for servers with --s3 on
    from botocore.exceptions import BotoCoreError, ClientError

    end = time.monotonic() + deadline
    bucket, key = _object(uri)
    try:
        answer = _client().get_object(Bucket=bucket, Key=key)
        size = answer["ContentLength"]
        with answer["Body"] as body:
            if size > max_bytes:
                raise FetchError(f"the S3 object has {size:,} bytes; allowed: {max_bytes:,}")
            pieces = []
            while piece := body.read(CHUNK):
                reserve(len(piece))
                pieces.append(piece)
                if time.monotonic() > end:
                    raise FetchError(f"the S3 object did not come within {deadline:g} s")
            return b"".join(pieces)
    except (ClientError, BotoCoreError, OSError) as error:
        raise FetchError("the S3 object can't be read with this server's role") from error


def forget_connections() -> None:
    """Let the next call to S3 make new connections."""
    _client.cache_clear()


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


def _object(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an object. Raises FetchError."""
    bucket, key = _parts(uri)
    try:
        is_key = 0 < len(key.encode()) <= MAX_KEY
    except UnicodeEncodeError as error:
        raise FetchError(f"{EXPECTED}; this one has half a character") from error
    if not is_key:
        raise FetchError(EXPECTED)
    return bucket, key


def _parts(uri: str) -> tuple[str, str]:
    """Return the bucket and the key, unparsed: a key may hold ? and #. Raises FetchError."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not (bucket.isascii() and bucket.isprintable()):
        raise FetchError(EXPECTED)
    return bucket, key


@functools.cache
def _client() -> Any:
    # imported here: boto3 is optional, for servers with --s3 on
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": 2}
    config = Config(connect_timeout=3, read_timeout=READ_SECONDS, retries=retries)
    return boto3.client("s3", config=config)
