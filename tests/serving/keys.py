"""Keys to sign packages with."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def make_key(place: Path, key: Any = None, password: bytes | None = None) -> Path:
    """Write a private key, and its public half beside it as NAME.pub."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    how = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password)
    place.write_bytes(key.private_bytes(PEM, PKCS8, how))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    place.with_suffix(".pub").write_bytes(public)
    return place
