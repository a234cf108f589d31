"""`python -m serving sign PACKAGE --key FILE`: sign a package, which shows who built it."""

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING

from serving import signature
from serving.locate import package_of
from serving.manifest import MANIFEST
from serving.package import load_for_command
from serving.signature import CURVES, HASHES, SIGNATURE
from trainer.common import files
from trainer.common.console import command
from trainer.common.errors import OK, UserError, needed_by
from trainer.common.paths import expanded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

PASSWORD = "SERVING_KEY_PASSWORD"  # the environment variable of a key's password

Signer = Callable[[bytes], bytes]  # a message's signature: ECDSA, DER


def main(arguments: Sequence[str]) -> int:
    """Verify a package, and sign it. arguments: the verb and its own. Raise UserError."""
    options = _parser().parse_args(arguments[1:])
    with needed_by("sign", "sign"):
        # imported here: it comes with the extra
        import cryptography  # noqa: F401
    path = package_of(options.package)
    load_for_command(path)
    if options.kms is not None:
        key, signer = _of_kms(options.kms, options.region)
    else:
        key, signer = _of_file(Path(expanded(options.key)))
    target = _target(path, options.to)
    if path.is_dir():
        data = signature.sign(_digests((path / MANIFEST).read_bytes()), path.name, key, signer)
        files.write(path / SIGNATURE, data)
    else:
        _sign_archive(path, target, key, signer)
    public = signature.as_text(key)
    print(
        f"{target}: signed, in {SIGNATURE}\n"
        f"public key: {public}\n"
        f"next: {command('serving', 'serve', str(target), '--signed-by', public)}"
    )
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving sign",
        description="Sign a model package (OpenSSF model signing), so that --signed-by of serve, "
        "check and deploy refuses every other one.",
    )
    parser.add_argument("package", help="a model.tar.gz, a package's directory, a run's, or newest")
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument(
        "--key",
        metavar="FILE",
        help=f"a private key (PEM) of {CURVES}: openssl ecparam -name prime256v1 -genkey -noout "
        f"-out key.pem; where it has a password, {PASSWORD} or a terminal gives it",
    )
    by.add_argument(
        "--kms",
        metavar="KEY",
        help="a key of AWS KMS, its id, ARN or alias/NAME: ECC_NIST_P256, for SIGN_VERIFY",
    )
    parser.add_argument("--region", help="of the KMS key (default: as in every AWS tool)")
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="the signed archive (default: model-signed.tar.gz beside a model.tar.gz, since a run "
        "checks that its own archive is unchanged); a directory is signed in place",
    )
    return parser


def _target(path: Path, to: str | None) -> Path:
    """Return the path of the signed package. Raise UserError."""
    if path.is_dir():
        if to is not None:
            raise UserError(f"--to {to}: {path} is a directory, which is signed in place")
        return path
    if to is not None:
        return Path(expanded(to))
    return path.with_name(path.name.removesuffix(".tar.gz") + "-signed.tar.gz")


def _of_file(path: Path) -> tuple["EllipticCurvePublicKey", Signer]:
    """Return the public half of a private key, and a function that signs. Raise UserError."""
    # imported here: it comes with the extra
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    password = os.environ.get(PASSWORD)
    try:
        data = path.read_bytes()
        if b"ENCRYPTED" in data and password is None and sys.stdin.isatty():
            password = getpass(f"password of {path}: ")
        secret = password.encode() if password and b"ENCRYPTED" in data else None
        private = serialization.load_pem_private_key(data, secret)
    except OSError as error:
        raise UserError(f"{path}: can't read this key: {error.strerror}") from error
    except TypeError as error:
        raise UserError(f"{path}: it has a password: give it in {PASSWORD}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"{path}: this is no private key in PEM, or its password is another one"
        ) from error
    private = signature.checked(private, str(path))
    algorithm = getattr(hashes, HASHES[private.key_size].upper())
    return private.public_key(), lambda message: private.sign(message, ECDSA(algorithm()))


def _of_kms(name: str, region: str | None) -> tuple["EllipticCurvePublicKey", Signer]:
    """Return the public half of a KMS key, and a function that signs by AWS. Raise UserError."""
    with needed_by("--kms", "aws"):
        # imported here: only --kms needs AWS
        from launch.cloud.session import Aws
    # imported here: it comes with the extra
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    aws = Aws("packhorse", region)
    public = signature.checked(
        load_der_public_key(aws.call("kms", "GetPublicKey", KeyId=name)["PublicKey"]),
        f"--kms {name}",
    )
    algorithm = HASHES[public.key_size]

    def sign(message: bytes) -> bytes:
        answer = aws.call(
            "kms",
            "Sign",
            KeyId=name,
            Message=hashlib.new(algorithm, message).digest(),
            MessageType="DIGEST",
            SigningAlgorithm=f"ECDSA_SHA_{algorithm.removeprefix('sha')}",
        )
        return bytes(answer["Signature"])

    return public, sign


def _digests(manifest: bytes) -> dict[str, str]:
    """Return the SHA-256 of each file of a package, including its manifest."""
    listed: Mapping[str, str] = json.loads(manifest)["files"]
    return {**listed, MANIFEST: hashlib.sha256(manifest).hexdigest()}


def _sign_archive(path: Path, target: Path, key: "EllipticCurvePublicKey", signer: Signer) -> None:
    """Write a copy of the archive with its signature. Raise OSError, UserError."""
    temporary = target.with_name(files.TEMPORARY + target.name)
    try:
        with (
            tarfile.open(path, "r:gz") as old,
            temporary.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w") as new,
        ):
            manifest = b""
            for member in old:
                content = old.extractfile(member)
                if content is None or member.name == SIGNATURE:
                    continue
                if member.name == MANIFEST:
                    manifest = content.read()
                    content = io.BytesIO(manifest)
                new.addfile(member, content)
            data = signature.sign(_digests(manifest), path.name, key, signer)
            entry = tarfile.TarInfo(SIGNATURE)
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
