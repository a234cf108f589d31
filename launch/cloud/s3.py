"""Files to and from the project's bucket. Its layout:

source/SHA256.tar.gz    the trainer's code
data/NAME-DIGEST/       pictures, as class folders; DIGEST is of their names and contents, so the
                        folder never changes
runs/RUN/attempts/      the request of each attempt (launch/targets/attempt.py), and how it ended
runs/RUN/checkpoints/   kept in step with the job's own directory
runs/RUN/output/        model package, report, metrics
runs/RUN/log.txt        the log of a run on EC2
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from boto3.s3.transfer import TransferConfig

from launch.cloud.session import Aws, AwsError, explained
from trainer.common.console import ProgressBar, log
from trainer.common.errors import UserError
from trainer.common.files import TEMPORARY
from trainer.common.paths import user_cache
from trainer.common.streams import FULL
from trainer.images import identity
from trainer.images.folder import below
from trainer.images.names import as_shown, is_system

# Bytes of a part: boto3's own, fixed here because the ETag of a large object depends on it.
CHUNK = 8 * 2**20
# The cache of the files' digests; by default runs on this machine keep theirs there too.
DIGESTS = user_cache() / identity.DIRECTORY
NO_BUCKET = "NoSuchBucket"
CONTROL = r"[\x00-\x1f\x7f]"  # DeleteObjects sends names as XML, which can't hold these
LONGEST_NAME = 960  # bytes of S3's 1,024, less data/NAME-DIGEST/
DELETE_AT_ONCE = 1000  # DeleteObjects' maximum
WORKERS = 16  # small objects are bound by latency, not by bandwidth


@dataclass(frozen=True)
class Object:
    key: str
    size: int  # bytes
    etag: str
    modified: datetime


def listing(aws: Aws, prefix: str) -> dict[str, Object]:
    """Return the objects below `prefix`, by the rest of their keys. Raise AwsError."""
    return {
        item["Key"].removeprefix(prefix): Object(
            item["Key"], item["Size"], item["ETag"].strip('"'), item["LastModified"]
        )
        for item in aws.pages("s3", "ListObjectsV2", "Contents", Bucket=aws.bucket, Prefix=prefix)
    }


def folders(aws: Aws, prefix: str) -> list[str]:
    """Return the names of the folders whose keys begin with `prefix`, without their parents.

    Raise AwsError.
    """
    where = {"Bucket": aws.bucket, "Prefix": prefix, "Delimiter": "/"}
    common = aws.pages("s3", "ListObjectsV2", "CommonPrefixes", **where)
    return [each["Prefix"].rstrip("/").rpartition("/")[2] for each in common]


def exists(aws: Aws, key: str) -> bool:
    """Return whether there is such an object. Raise AwsError."""
    return aws.find("s3", "HeadObject", r"404|NoSuchKey", Bucket=aws.bucket, Key=key) is not None


def read(aws: Aws, key: str) -> tuple[bytes, datetime] | None:
    """Return an object's content and when it was written; None without such an object or bucket.

    Raise AwsError, also where the connection breaks half-way.
    """
    answer = aws.find("s3", "GetObject", "NoSuchKey|NoSuchBucket", Bucket=aws.bucket, Key=key)
    if answer is None:
        return None
    try:
        return answer["Body"].read(), answer["LastModified"]
    except Exception as error:
        raise explained(error, f"s3:GetObject {key}") from error


def write(aws: Aws, key: str, data: bytes) -> None:
    """Write an object. Raise AwsError."""
    aws.call("s3", "PutObject", Bucket=aws.bucket, Key=key, Body=data)


def has_own_key(aws: Aws, key: str) -> bool:
    """Return whether S3 encrypts an object with the account's own key: then its ETag is no MD5.

    Raise AwsError.
    """
    answer = aws.find("s3", "HeadObject", r"404|NoSuchKey", Bucket=aws.bucket, Key=key) or {}
    return str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")


def claim(aws: Aws, key: str, data: bytes) -> bool:
    """Write an object that must not exist yet; return False where another writer was faster.

    S3 decides, so of several writers one wins. Raise AwsError.
    """
    taken = "PreconditionFailed|ConditionalRequestConflict"
    where = {"Bucket": aws.bucket, "Key": key, "IfNoneMatch": "*"}
    return aws.find("s3", "PutObject", taken, **where, Body=data) is not None


def etag(path: Path) -> str:
    """Return the ETag that S3 gives a file, uploaded in parts of CHUNK and encrypted by SSE-S3.

    It is the MD5. For a multipart upload it is the MD5 of the parts' MD5s, and their number.
    """
    with path.open("rb") as file:
        parts = [_md5(part) for part in iter(lambda: file.read(CHUNK), b"")]
    if path.stat().st_size < CHUNK:
        return (parts[0] if parts else _md5(b"")).hex()
    return f"{_md5(b''.join(parts)).hex()}-{len(parts)}"


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def files_of(folder: Path) -> dict[str, Path]:
    """Return the folder's files, by their paths in it, without hidden files and a system's own.

    Raise UserError for an empty folder, and for names that S3 can't hold.
    """
    if folder.is_file():
        raise UserError(
            f"{folder}: a job takes a folder of pictures, not an archive; unpack it, and give "
            "its folder"
        )
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; give the one that holds train, valid and test"
        )
    found = below(str(folder))  # as the trainer finds them: it follows links
    lying = sorted((PurePosixPath(file.name), file.path) for file in found if not file.reason)
    files = {
        str(name): Path(path)
        for name, path in lying
        if not any(map(is_system, name.parts)) and Path(path).is_file()
    }
    for name in files:
        if as_shown(name) != name:
            raise UserError(
                f"{folder}: {as_shown(name)} is not named in UTF-8, so S3 can't hold it; rename it"
            )
        if re.search(CONTROL, name):
            raise UserError(
                f"{folder}: {name!r} has a control character in its name, which S3 keeps and "
                "never deletes; rename it"
            )
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"{folder}: {name}: its path is longer than the {LONGEST_NAME} bytes that S3 "
                "leaves for it; shorten it"
            )
    if not files:
        raise UserError(
            f"{folder}: it holds no files; give the folder that holds train, valid and test"
        )
    return files


def digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of the files that `upload_folder` uploads. Raise UserError.

    It is the same for folders with the same names and contents, wherever they lie.
    """
    files = files_of(folder)
    contents = identity.digests([str(path) for path in files.values()], DIGESTS)
    of_all = hashlib.sha256()
    for name, path in files.items():
        of_all.update(f"{contents[str(path)]} {name}\0".encode(errors="surrogateescape"))
    return of_all.hexdigest()


def upload_folder(aws: Aws, folder: Path, prefix: str, is_encrypted: bool = False) -> None:
    """Upload the folder's visible files to `prefix`, except those that are there already.

    A job may be reading those. Raise UserError, AwsError. prefix: has the folder's digest in it, so
    a second upload only completes one that was cut short. is_encrypted: with the account's own key
    (`has_own_key`), so that uploaded files are known by name and size alone.
    """
    files = files_of(folder)
    uploaded = listing(aws, prefix)

    def is_uploaded(name: str) -> bool:
        path, item = files[name], uploaded.get(name)
        if item is None or item.size != path.stat().st_size:
            return False
        return is_encrypted or etag(path) == item.etag

    with ThreadPoolExecutor(WORKERS) as pool:
        flags = pool.map(is_uploaded, files)
        changed = [name for name, is_equal in zip(files, flags, strict=True) if not is_equal]
    log.info(
        "%s: %d of %d files to upload (%.1f MB) to s3://%s/%s",
        folder,
        len(changed),
        len(files),
        sum(files[name].stat().st_size for name in changed) / 1e6,
        aws.bucket,
        prefix,
    )
    strange = uploaded.keys() - files.keys()
    if strange:
        log.warning(
            "s3://%s/%s also holds %d other files (%s), which a job reads too: remove them",
            aws.bucket,
            prefix,
            len(strange),
            min(strange),
        )
    _transfer(aws, "upload", [(str(files[name]), prefix + name) for name in changed])


def download(aws: Aws, objects: dict[str, Object], folder: Path) -> None:
    """Write objects to folder/NAME, each complete or not at all, and checked against its ETag.

    A file that is there and equal is kept. Raise UserError.
    """
    missing = {
        name: item
        for name, item in objects.items()
        if not ((folder / name).is_file() and _equal(folder / name, item))
    }
    for name, item in missing.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"s3://{aws.bucket}/{item.key}: its name leads out of {folder}; remove this object"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    temporary = {name: (folder / name).with_name(TEMPORARY + Path(name).name) for name in missing}
    _transfer(aws, "download", [(str(temporary[name]), each.key) for name, each in missing.items()])
    for name, item in missing.items():
        if not _equal(temporary[name], item) and not _equals_encrypted(aws, temporary[name], item):
            raise UserError(
                f"s3://{aws.bucket}/{item.key}: the copy in {temporary[name]} is not what S3 "
                "holds; start the same command again"
            )
        temporary[name].replace(folder / name)


def versions(aws: Aws) -> tuple[int, int]:
    """Return how many versions of objects the bucket holds, and their bytes. Raise AwsError."""
    sizes: list[int] = []
    with _while_there():
        listed = aws.pages("s3", "ListObjectVersions", "Versions", Bucket=aws.bucket)
        sizes = [item["Size"] for item in listed]
    return len(sizes), sum(sizes)


def empty(aws: Aws) -> int:
    """Empty the project's bucket: all versions of all objects, and unfinished uploads.

    Return how many versions of objects there were. Raise AwsError.
    """
    count = 0
    with _while_there():
        count = delete_versions(aws, aws.bucket)
        for upload in aws.pages("s3", "ListMultipartUploads", "Uploads", Bucket=aws.bucket):
            which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            aws.call("s3", "AbortMultipartUpload", Bucket=aws.bucket, **which)
    return count


@contextlib.contextmanager
def _while_there() -> Iterator[None]:
    """Leave the context quietly where another command has deleted the bucket."""
    try:
        yield
    except AwsError as error:
        if error.code != NO_BUCKET:
            raise


def delete_versions(aws: Aws, bucket: str, prefix: str = "") -> int:
    """Delete every version of every object below `prefix`.

    Return how many there were. Raise AwsError.
    """
    where = {"Bucket": bucket} | ({"Prefix": prefix} if prefix else {})
    listed = [
        {"Key": item["Key"], "VersionId": item["VersionId"]}
        for kind in ("Versions", "DeleteMarkers")
        for item in aws.pages("s3", "ListObjectVersions", kind, **where)
    ]
    for start in range(0, len(listed), DELETE_AT_ONCE):
        batch = {"Objects": listed[start : start + DELETE_AT_ONCE], "Quiet": True}
        failed = aws.call("s3", "DeleteObjects", Bucket=bucket, Delete=batch).get("Errors", [])
        if failed:
            key, reason = failed[0]["Key"], failed[0].get("Message", "")
            line = f"s3:DeleteObjects: s3://{bucket}/{key}: {reason}; start the same command again"
            raise AwsError(line, failed[0]["Code"], reason)
    return len(listed)


def _equal(path: Path, item: Object) -> bool:
    """Return whether a file equals the object.

    An object that another tool uploaded in parts of another size is compared by its size alone.
    """
    if path.stat().st_size != item.size:
        return False
    ours = etag(path)
    if ("-" in item.etag) != ("-" in ours):
        ours = _md5(path.read_bytes()).hex()
    return ours == item.etag or "-" in item.etag


def _equals_encrypted(aws: Aws, path: Path, item: Object) -> bool:
    """Return whether a file equals an object that is encrypted with the account's own key.

    Its ETag is no MD5 then; botocore has verified the download by the checksum that S3 sends.
    """
    return path.stat().st_size == item.size and has_own_key(aws, item.key)


def _transfer(aws: Aws, direction: str, pairs: list[tuple[str, str]]) -> None:
    """Move (file, key) pairs, several at a time. direction: upload or download."""
    config = TransferConfig(multipart_threshold=CHUNK, multipart_chunksize=CHUNK, use_threads=False)
    client = aws.client("s3")

    def upload(path: str, key: str) -> None:
        client.upload_file(path, aws.bucket, key, Config=config)

    def download(path: str, key: str) -> None:
        client.download_file(aws.bucket, key, path, Config=config)

    actions = {"upload": ("PutObject", upload), "download": ("GetObject", download)}
    operation, transfer = actions[direction]

    def move(pair: tuple[str, str]) -> None:
        try:
            transfer(*pair)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                error.filename = pair[0]
                raise
            raise explained(error, f"s3:{operation} {pair[1]}") from error

    progress = ProgressBar(f"{direction}ing", len(pairs))
    with ThreadPoolExecutor(WORKERS) as pool, progress:
        try:
            for _ in pool.map(move, pairs):
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
