"""Fetches an image from S3, as the machine's own role."""

import functools
import time
from collections.abc import Callable
from typing import Any

from serving.fetch import FetchError

READ_SECONDS = 5
CHUNK = 256 << 10  # bytes read at a time
MAX_KEY = 1024  # bytes: S3's limit
SHAPE = "an S3 URI looks like s3://bucket/key"


def fetch(uri: str, *, max_bytes: int, deadline: float, reserve: Callable[[int], None]) -> bytes:
    """Return the object at s3://bucket/key.

    deadline: seconds for everything together, but for one wait of READ_SECONDS. reserve: called
    with the number of bytes that came, piece by piece; what it raises ends the fetch.
    Raises FetchError, with the same words for what is missing and what is not allowed.
    """
    # imported here: boto3 is optional, for those who switch S3 on
    from botocore.exceptions import BotoCoreError, ClientError

    end = time.monotonic() + deadline
    bucket, key = _parse(uri)
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


def _parse(uri: str) -> tuple[str, str]:
    """Return the bucket and the key, as it stands: it may hold ? and #. Raises FetchError."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not key:
        raise FetchError(SHAPE)
    try:
        if len(key.encode()) > MAX_KEY or not (bucket.isascii() and bucket.isprintable()):
            raise FetchError(SHAPE)
    except UnicodeEncodeError as error:
        raise FetchError(f"{SHAPE}; this one has half a character") from error
    return bucket, key


@functools.cache
def _client() -> Any:
    # imported here: boto3 is optional, for those who switch S3 on
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": 2}
    config = Config(connect_timeout=3, read_timeout=READ_SECONDS, retries=retries)
    return boto3.client("s3", config=config)
