"""Files to and from the project's bucket. What lies where in it:

source/SHA256.tar.gz    the trainer's code
data/NAME-DIGEST/       pictures, as class folders; DIGEST is of their names and contents, so what lies there never changes
runs/RUN/attempts/      what was sent for each attempt (launch/targets/attempt.py), and how it ended (launch/targets/ec2.py)
runs/RUN/checkpoints/   kept in step with the job's own directory
runs/RUN/output/        model package, report, metrics
runs/RUN/log.txt        the log of a run on EC2
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch.cloud.session import Aws, AwsError, explained
from trainer.common.console import ProgressBar, log
from trainer.common.errors import UserError
from trainer.common.files import TEMPORARY

CHUNK = (
    8 * 2**20
)  # bytes of a part: boto3's own, fixed here because the ETag of a large object depends on it
WORKERS = 16  # small objects are bound by latency, not by bandwidth


@dataclass(frozen=True)
class Object:
    key: str
    size: int  # bytes
    etag: str
    modified: datetime


def listing(aws: Aws, prefix: str) -> dict[str, Object]:
    """The objects below `prefix`, by the rest of their keys. Raises AwsError."""
    found = aws.pages("s3", "ListObjectsV2", "Contents", Bucket=aws.bucket, Prefix=prefix)
    return {
        item["Key"].removeprefix(prefix): Object(
            item["Key"], item["Size"], item["ETag"].strip('"'), item["LastModified"]
        )
        for item in found
    }


def folders(aws: Aws, prefix: str) -> list[str]:
    """The names of the folders whose keys begin with `prefix`, without what they lie in. Raises AwsError."""
    found = aws.pages(
        "s3", "ListObjectsV2", "CommonPrefixes", Bucket=aws.bucket, Prefix=prefix, Delimiter="/"
    )
    return [each["Prefix"].rstrip("/").rpartition("/")[2] for each in found]


def exists(aws: Aws, key: str) -> bool:
    return aws.find("s3", "HeadObject", r"404|NoSuchKey", Bucket=aws.bucket, Key=key) is not None


def read(aws: Aws, key: str) -> tuple[bytes, datetime] | None:
    """An object's content and when it was written; None where there is no such object. Raises AwsError."""
    answer = aws.find("s3", "GetObject", "NoSuchKey", Bucket=aws.bucket, Key=key)
    return None if answer is None else (answer["Body"].read(), answer["LastModified"])


def write(aws: Aws, key: str, data: bytes) -> None:
    aws.call("s3", "PutObject", Bucket=aws.bucket, Key=key, Body=data)


def claim(aws: Aws, key: str, data: bytes) -> bool:
    """Writes an object that must not be there yet; False where another was faster. S3 decides, so of several writers one wins."""
    absent = "PreconditionFailed|ConditionalRequestConflict"
    return (
        aws.find("s3", "PutObject", absent, Bucket=aws.bucket, Key=key, Body=data, IfNoneMatch="*")
        is not None
    )


def etag(path: Path) -> str:
    """The ETag that S3 gives a file of this content, uploaded in parts of CHUNK and encrypted by SSE-S3: the MD5, or the MD5 of the parts' MD5s."""
    with path.open("rb") as file:
        parts = [
            hashlib.md5(part, usedforsecurity=False).digest()
            for part in iter(lambda: file.read(CHUNK), b"")
        ]
    if path.stat().st_size < CHUNK:
        return (parts[0] if parts else hashlib.md5(b"", usedforsecurity=False).digest()).hex()
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


def files_of(folder: Path) -> dict[str, Path]:
    """The folder's visible files, by their paths in it. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; give the one that holds train, valid and test"
        )
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files = {
        name: path
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    if not files:
        raise UserError(
            f"{folder}: it holds no files; give the folder that holds train, valid and test"
        )
    return files


def digest(folder: Path) -> str:
    """The SHA-256 (hex) of what `upload_folder` uploads: equal for folders of the same names and contents, wherever they lie. Raises UserError."""
    files = files_of(folder)

    def of_content(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool, ProgressBar("reading pictures", len(files)) as progress:
        for name, content in zip(files, pool.map(of_content, files.values()), strict=True):
            whole.update(f"{content} {name}\0".encode(errors="surrogateescape"))
            progress.advance()
    return whole.hexdigest()


def upload_folder(aws: Aws, folder: Path, prefix: str) -> None:
    """Uploads the folder's visible files to `prefix`, as far as they aren't there: a job may be reading them. Raises UserError, AwsError.

    prefix: one that carries the folder's digest, so that only an upload that was cut short leaves anything to do.
    """
    files = files_of(folder)
    there = listing(aws, prefix)
    with ThreadPoolExecutor(WORKERS) as pool:
        same_size = [
            name
            for name, path in files.items()
            if name in there and there[name].size == path.stat().st_size
        ]
        equal = {
            name
            for name, digest in zip(
                same_size, pool.map(lambda name: etag(files[name]), same_size), strict=True
            )
            if digest == there[name].etag
        }
    changed = {name: path for name, path in files.items() if name not in equal}
    megabytes = sum(path.stat().st_size for path in changed.values()) / 1e6
    log.info(
        "%s: %d of %d files to upload (%.1f MB) to s3://%s/%s",
        folder,
        len(changed),
        len(files),
        megabytes,
        aws.bucket,
        prefix,
    )
    if strange := there.keys() - files.keys():
        log.warning(
            "s3://%s/%s also holds %d other files (%s), which a job reads too: remove them",
            aws.bucket,
            prefix,
            len(strange),
            min(strange),
        )
    _transfer(
        aws, "upload", [(str(path), prefix + name) for name, path in changed.items()], "uploading"
    )


def download(aws: Aws, objects: dict[str, Object], folder: Path) -> None:
    """Writes objects to folder/NAME, each whole or not at all and held against its ETag; a file that is there and equal is left. Raises UserError."""
    wanted = {
        name: item
        for name, item in objects.items()
        if not ((folder / name).is_file() and _equal(folder / name, item))
    }
    for name in wanted:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"s3://{aws.bucket}/{wanted[name].key}: its name leads out of {folder}; remove this object"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    temporary = {name: (folder / name).with_name(TEMPORARY + Path(name).name) for name in wanted}
    _transfer(
        aws,
        "download",
        [(str(temporary[name]), item.key) for name, item in wanted.items()],
        "downloading",
    )
    for name, item in wanted.items():
        if not _equal(temporary[name], item):
            raise UserError(
                f"s3://{aws.bucket}/{item.key}: the copy in {temporary[name]} is not what S3 holds; start the same command again"
            )
        temporary[name].replace(folder / name)


def delete(aws: Aws, keys: Iterable[dict[str, str]]) -> None:
    """Deletes objects, {"Key": ...} with "VersionId" where one version is meant. Raises AwsError."""
    left = list(keys)
    while left:
        batch, left = left[:1000], left[1000:]  # DeleteObjects' maximum
        failed = aws.call(
            "s3", "DeleteObjects", Bucket=aws.bucket, Delete={"Objects": batch, "Quiet": True}
        ).get("Errors", [])
        if failed:
            raise AwsError(
                f"s3:DeleteObjects: {failed[0]['Key']}: {failed[0].get('Message')}",
                failed[0]["Code"],
                failed[0].get("Message", ""),
            )


def versions(aws: Aws) -> tuple[int, int]:
    """How many versions of objects the bucket holds, and their bytes together. Raises AwsError."""
    sizes = [
        item["Size"]
        for item in aws.pages("s3", "ListObjectVersions", "Versions", Bucket=aws.bucket)
    ]
    return len(sizes), sum(sizes)


def empty(aws: Aws) -> int:
    """Deletes every version of every object in the bucket, and unfinished uploads. Returns how many versions there were."""
    versions = [
        {"Key": item["Key"], "VersionId": item["VersionId"]}
        for kind in ("Versions", "DeleteMarkers")
        for item in aws.pages("s3", "ListObjectVersions", kind, Bucket=aws.bucket)
    ]
    delete(aws, versions)
    for upload in aws.pages("s3", "ListMultipartUploads", "Uploads", Bucket=aws.bucket):
        aws.call(
            "s3",
            "AbortMultipartUpload",
            Bucket=aws.bucket,
            Key=upload["Key"],
            UploadId=upload["UploadId"],
        )
    return len(versions)


def _equal(path: Path, item: Object) -> bool:
    """Whether a file is what S3 holds. An object that another tool uploaded in parts of its own size is compared by its size alone."""
    if path.stat().st_size != item.size:
        return False
    digest = etag(path)
    if ("-" in item.etag) != ("-" in digest):
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    return digest == item.etag or "-" in item.etag


def _transfer(aws: Aws, direction: str, pairs: list[tuple[str, str]], what: str) -> None:
    """Moves (file, key) pairs, several at a time. direction: upload or download."""
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(multipart_threshold=CHUNK, multipart_chunksize=CHUNK, use_threads=False)
    client = aws.client("s3")

    def move(pair: tuple[str, str]) -> None:
        path, key = pair
        try:
            if direction == "upload":
                client.upload_file(path, aws.bucket, key, Config=config)
            else:
                client.download_file(aws.bucket, key, path, Config=config)
        except Exception as error:
            raise explained(
                error, f"s3:{'PutObject' if direction == 'upload' else 'GetObject'} {key}"
            ) from error

    with ThreadPoolExecutor(WORKERS) as pool, ProgressBar(what, len(pairs)) as progress:
        try:
            for _ in pool.map(move, pairs):
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
