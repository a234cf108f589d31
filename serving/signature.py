"""A package's signature, which shows who built it, in the format of OpenSSF's model signing.

model.sig is a Sigstore bundle of a DSSE envelope, whose payload is an in-toto statement: the
SHA-256 of each file. `model_signing verify key` verifies it too, and this code verifies files of
`model_signing sign key`. Format: https://github.com/ossf/model-signing-spec (v1.0), and
https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md. We don't use that library: of
its forty packages a server needs only `cryptography`.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from serving.manifest import MANIFEST, PackageError
from trainer.common.errors import UserError, needed_by

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE = "model.sig"
SIGNED_BY = "SERVING_SIGNED_BY"  # the environment variable of the key that must have signed
MAX_BYTES = 8 << 20  # of the signature; a package's has 20 KB
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
BY_FILES = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
# The hash for each curve of the specification: by the key's bits, its name in hashlib and KMS.
HASHES = {256: "sha256", 384: "sha384", 521: "sha512"}
CURVES = "P-256, P-384 or P-521"


def sign(
    digests: Mapping[str, str],
    name: str,
    key: "EllipticCurvePublicKey",
    signer: Callable[[bytes], bytes],
) -> bytes:
    """Return model.sig of a package.

    digests: SHA-256 (hex) of each file, by name. name: of the package, for people. signer: returns
    the signature (ECDSA, DER) of a message by the private half of `key`.
    """
    resources = [
        {"name": each, "algorithm": "sha256", "digest": digests[each]}
        for each in sorted(digests, key=PurePosixPath)
    ]
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(resources)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {**BY_FILES, "ignore_paths": [SIGNATURE]},
            "resources": resources,
        },
    }
    payload = json.dumps(statement).encode()
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": b64encode(payload).decode(),
            "payloadType": PAYLOAD,
            "signatures": [{"sig": b64encode(signer(_encoded(payload))).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode()


def check(directory: Path, listed: Mapping[str, str], signed_by: str) -> None:
    """Raise PackageError unless this key has signed the package in a directory as it is now.

    listed: SHA-256 of its files by name, from its manifest; the files are checked against it
    already. signed_by: see `public_key`. Raise UserError for a text that is no key.
    """
    key = public_key(signed_by)
    path = directory / SIGNATURE
    if not path.is_file():
        raise PackageError(
            f"it isn't signed, and only packages signed by {signed_by} are allowed: "
            "python -m serving sign signs one"
        )
    if path.stat().st_size > MAX_BYTES:
        raise PackageError(f"{SIGNATURE} has more than {MAX_BYTES:,} bytes")
    digests = {
        **listed,
        MANIFEST: hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest(),
    }
    try:
        payload = _verified(json.loads(path.read_bytes()), key, signed_by)
        signed = _digests(json.loads(payload))
    except PackageError:
        raise
    # JSON of another shape may fail in any of these ways.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{SIGNATURE} is no signature of a model by a key") from error
    for name in sorted(digests.keys() | signed.keys()):
        if digests.get(name) != signed.get(name):
            raise PackageError(f"{name} isn't what was signed: it was changed, added or removed")


def public_key(text: str) -> "EllipticCurvePublicKey":
    """Return a public key from its PEM file, or from the text of `as_text`. Raise UserError."""
    with needed_by("a signature", "sign"):
        # imported here: only signatures need it
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
    try:
        key = serialization.load_der_public_key(b64decode(text, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        path = Path(text)
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except OSError as error:
            raise UserError(f"{text}: can't read this public key: {error.strerror}") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UserError(
                f"{text}: this is not a public key in PEM; from a private key make it with: "
                "openssl ec -in KEY -pubout"
            ) from error
    usable: EllipticCurvePublicKey = checked(key, text)
    return usable


def checked(key: Any, name: str) -> Any:
    """Return the key, private or public. Raise UserError where its curve may not sign."""
    curve = getattr(key, "curve", None)
    if curve is None or curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise UserError(
            f"{name}: model signing takes keys of the curves {CURVES}; make one with: "
            "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        )
    return key


def as_text(key: "EllipticCurvePublicKey") -> str:
    """Return a public key as one word: its DER (SubjectPublicKeyInfo) in base64."""
    # imported here: only signatures need it
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def fingerprint(key: "EllipticCurvePublicKey") -> str:
    """Return a key's fingerprint in model signing: SHA-256 (hex) of its PEM."""
    # imported here: only signatures need it
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _verified(bundle: Any, key: "EllipticCurvePublicKey", name: str) -> bytes:
    """Return the payload of a bundle that the key has signed.

    name: of the key. Raise PackageError where the key has not signed it; JSON of another shape
    raises other errors.
    """
    # imported here: only signatures need it
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    envelope = bundle["dsseEnvelope"]
    if bundle["mediaType"] != BUNDLE or envelope["payloadType"] != PAYLOAD:
        raise ValueError("another kind of bundle")
    hint = bundle["verificationMaterial"]["publicKey"].get("hint")
    if hint and hint != fingerprint(key):
        raise PackageError(f"it is signed by another key than {name}")
    payload = b64decode(envelope["payload"], validate=True)
    [signature] = envelope["signatures"]
    algorithm = getattr(hashes, HASHES[key.key_size].upper())
    try:
        key.verify(
            b64decode(signature["sig"], validate=True), _encoded(payload), ECDSA(algorithm())
        )
    except InvalidSignature as error:
        raise PackageError(
            f"{SIGNATURE} isn't by {name}, or was changed after it was signed"
        ) from error
    return payload


def _digests(statement: Any) -> dict[str, str]:
    """Return the SHA-256 of each file in a statement. JSON of another shape raises any error."""
    predicate = statement["predicate"]
    how = predicate["serialization"]
    resources = predicate["resources"]
    if statement["_type"] != STATEMENT or statement["predicateType"] != PREDICATE:
        raise ValueError("another kind of statement")
    if how["method"] != "files" or any(each["algorithm"] != "sha256" for each in resources):
        raise ValueError("another way to digest files")
    [subject] = statement["subject"]
    if subject["digest"]["sha256"] != _root(resources):
        raise ValueError("its digests are not those of its subject")
    return {each["name"]: each["digest"] for each in resources}


def _root(resources: list[dict[str, str]]) -> str:
    """Return the digest of all files together, which names the model."""
    return hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()


def _encoded(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)
