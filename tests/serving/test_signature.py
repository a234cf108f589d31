"""A package's signature: who built it. Keys are real, the library of OpenSSF's too where it is."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from serving.__main__ import main
from serving.adapters import lambda_inside, toolkit
from serving.manifest import PackageError
from serving.package import load
from serving.signature import as_text, public_key
from tests.conftest import PROJECT
from tests.launch.conftest import CREDENTIALS
from tests.serving.keys import make_key
from trainer.common.errors import MISTAKE, OK, UserError


@pytest.fixture(scope="module")
def signed(original, tmp_path_factory) -> Path:
    """A folder: `signed.tar.gz`, unpacked as `package`, with `key.pub`, and `other.pub` of
    somebody else. Read it, don't change it.
    """
    root = tmp_path_factory.mktemp("signed")
    key = make_key(root / "key.pem")
    make_key(root / "other.pem")
    words = [str(original / "model.tar.gz"), "--key", str(key), "--to", str(root / "signed.tar.gz")]
    assert main(["sign", *words]) == OK
    with tarfile.open(root / "signed.tar.gz") as tar:
        tar.extractall(root / "package", filter="data")
    return root


def refused(capsys, *words: str | Path) -> str:
    assert main([str(word) for word in words]) == MISTAKE
    captured = capsys.readouterr()
    line, end, rest = captured.err.partition("\n")
    assert (captured.out, end, rest) == ("", "\n", "")
    return line


def test_a_signed_package_is_the_same_with_one_file_more(signed, original):
    with (
        tarfile.open(original / "model.tar.gz") as before,
        tarfile.open(signed / "signed.tar.gz") as after,
    ):
        assert after.getnames() == [*before.getnames(), "model.sig"]
    assert load(signed / "signed.tar.gz").digest == load(original / "package").digest
    assert load(signed / "package", signed_by=str(signed / "key.pub")).golden == 3


def test_a_package_that_nobody_or_somebody_else_has_signed_is_refused(
    signed, original, capsys, monkeypatch
):
    monkeypatch.setattr("serving.server.bind", lambda *arguments: None)
    key = signed / "key.pub"
    assert "it isn't signed" in refused(capsys, "check", original / "package", "--signed-by", key)
    line = refused(capsys, "check", signed / "signed.tar.gz", "--signed-by", signed / "other.pub")
    assert line.endswith(f"signed.tar.gz: it is signed by another key than {signed / 'other.pub'}")
    for wrong in (original / "package", signed / "signed.tar.gz"):
        line = refused(capsys, "serve", wrong, "--port=0", "--signed-by", signed / "other.pub")
        assert line.startswith(f"{wrong}: it is")


def reseal(package: Path, **changes) -> None:
    """Change a package's manifest as one who knows how it is sealed."""
    path = package / "package.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["files"] = {
        name: hashlib.sha256((package / name).read_bytes()).hexdigest()
        for name in manifest["files"]
    }
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": digest}, indent=1))


def bundle(package: Path, change) -> None:
    """Change what lies in a signature: its bundle, and the statement in it."""
    path = package / "model.sig"
    whole = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(whole["dsseEnvelope"]["payload"]))
    change(whole, statement)
    whole["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(whole))


def rename_class(package: Path) -> None:
    reseal(package, classes=["café", "dog", "hen!"])


def change_code(package: Path) -> None:
    (package / "code/inference.py").write_text("import os\n")
    reseal(package)


def change_statement(package: Path) -> None:
    rename_class(package)
    digest = hashlib.sha256((package / "package.json").read_bytes()).hexdigest()

    def forge(whole, statement) -> None:
        for each in statement["predicate"]["resources"]:
            if each["name"] == "package.json":
                each["digest"] = digest

    bundle(package, forge)


def another_key_that_says_it_is_this_one(package: Path) -> None:
    """The signature of another key, with the fingerprint of the right one."""
    hint = json.loads((package / "model.sig").read_text())["verificationMaterial"]
    key = make_key(package.parent / "forger.pem")
    assert main(["sign", str(package), "--key", str(key)]) == OK
    bundle(package, lambda whole, statement: whole.update(verificationMaterial=hint))


FORGED = {
    rename_class: "package.json isn't what was signed",
    change_code: "code/inference.py isn't what was signed",
    change_statement: "was changed after it was signed",
    another_key_that_says_it_is_this_one: "was changed after it was signed",
    lambda package: (package / "model.sig").write_text("{}"): "is no signature of a model",
    lambda package: (package / "model.sig").write_text("[" * 9999): "is no signature of a model",
    lambda package: (package / "model.sig").write_bytes(b" " * (9 << 20)): "more than 8,388,608",
    lambda package: bundle(package, lambda whole, _: whole["dsseEnvelope"]["signatures"].clear()): (
        "is no signature of a model"
    ),
}


@pytest.mark.parametrize("forge", FORGED)
def test_what_was_changed_after_it_was_signed_is_refused(signed, tmp_path, forge, capsys):
    package = Path(shutil.copytree(signed / "package", tmp_path / "package"))
    forge(package)
    capsys.readouterr()
    with pytest.raises(PackageError, match=FORGED[forge]):
        load(package, signed_by=str(signed / "key.pub"))


def test_the_other_ways_in_take_the_key_as_a_variable(signed, original, monkeypatch):
    key = as_text(public_key(str(signed / "key.pub")))
    monkeypatch.setenv("SERVING_SIGNED_BY", key)
    assert toolkit.model_fn(str(signed / "package")).package.golden == 3
    with pytest.raises(PackageError, match="it isn't signed, and only packages signed by MF"):
        toolkit.model_fn(str(original / "package"))
    monkeypatch.setenv("MODEL_DIR", str(original / "package"))
    lambda_inside.engine.cache_clear()
    with pytest.raises(PackageError, match="it isn't signed"):
        lambda_inside.engine()
    lambda_inside.engine.cache_clear()


def test_keys_of_every_curve_sign_and_others_are_refused_in_one_line(
    original, tmp_path, capsys, monkeypatch
):
    package = Path(shutil.copytree(original / "package", tmp_path / "package"))
    for curve in (ec.SECP384R1(), ec.SECP521R1()):
        key = make_key(tmp_path / f"{curve.name}.pem", ec.generate_private_key(curve))
        assert main(["sign", str(package), "--key", str(key)]) == OK  # in the place of the other
        said = capsys.readouterr().out
        load(package, signed_by=said.split("public key: ")[1].split("\n")[0])
    locked = make_key(tmp_path / "locked.pem", password=b"secret")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "give it in SERVING_KEY_PASSWORD" in refused(capsys, "sign", package, "--key", locked)
    monkeypatch.setenv("SERVING_KEY_PASSWORD", "wrong")
    assert "its password is another" in refused(capsys, "sign", package, "--key", locked)
    monkeypatch.setenv("SERVING_KEY_PASSWORD", "secret")
    assert main(["sign", str(package), "--key", str(locked)]) == OK
    capsys.readouterr()
    other = make_key(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048))
    odd = make_key(tmp_path / "odd.pem", ec.generate_private_key(ec.SECP256K1()))
    (tmp_path / "text").write_text("no key")
    for wrong in (other, odd):
        assert "P-256, P-384 or P-521" in refused(capsys, "sign", package, "--key", wrong)
    assert "no private key" in refused(capsys, "sign", package, "--key", tmp_path / "text")
    assert "can't read this key" in refused(capsys, "sign", package, "--key", tmp_path / "none")
    with pytest.raises(UserError, match="can't read this public key"):
        public_key("none")
    with pytest.raises(UserError, match="not a public key"):
        public_key(str(tmp_path / "text"))


class Kms(BaseHTTPRequestHandler):
    """AWS KMS with one key, as it is documented: what it is given to sign is a digest already.

    moto's signs the digest of that.
    """

    key = ec.generate_private_key(ec.SECP384R1())

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = 400, {"__type": "NotFoundException", "message": "Alias is not found."}
        if said["KeyId"] == "alias/mine":
            status, answer = 200, getattr(self, self.headers["X-Amz-Target"].split(".")[1])(said)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def GetPublicKey(self, said: dict) -> dict:
        public = self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return {"PublicKey": base64.b64encode(public).decode()}

    def Sign(self, said: dict) -> dict:
        assert (said["MessageType"], said["SigningAlgorithm"]) == ("DIGEST", "ECDSA_SHA_384")
        algorithm = ec.ECDSA(Prehashed(hashes.SHA384()))
        signature = self.key.sign(base64.b64decode(said["Message"]), algorithm)
        return {"Signature": base64.b64encode(signature).decode()}

    def log_message(self, *arguments: object) -> None: ...


def test_a_key_of_kms_signs_without_leaving_it(original, tmp_path, capsys, monkeypatch):
    package = Path(shutil.copytree(original / "package", tmp_path / "package"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Kms) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": url}).items():
            monkeypatch.setenv(name, value)
        assert main(["sign", str(package), "--kms", "alias/mine"]) == OK
        public = capsys.readouterr().out.split("public key: ")[1].split("\n")[0]
        assert load(package, signed_by=public).golden == 3
        assert "Alias is not found" in refused(capsys, "sign", package, "--kms", "alias/none")
        server.shutdown()


# --- OpenSSF's own library ---

LIBRARY = Path(os.environ.get("MODEL_SIGNING", PROJECT / ".venv-sign/bin/model_signing"))


@pytest.mark.long
@pytest.mark.skipif(
    not LIBRARY.exists(), reason="model-signing is not installed: `make signatures` installs it"
)
def test_openssf_verifies_ours_and_ours_verifies_openssf(signed, tmp_path):
    def model_signing(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([LIBRARY, *words], capture_output=True, text=True)

    package = Path(shutil.copytree(signed / "package", tmp_path / "package"))
    file = package / "model.sig"
    verify = ("verify", "key", package, "--signature", file, "--public_key", signed / "key.pub")
    assert model_signing(*verify).returncode == 0, model_signing(*verify)
    theirs = ("sign", "key", package, "--signature", file, "--private_key", signed / "key.pem")
    file.unlink()
    assert model_signing(*theirs).returncode == 0, model_signing(*theirs)
    load(package, signed_by=str(signed / "key.pub"))
    rename_class(package)
    assert model_signing(*verify).returncode != 0
    with pytest.raises(PackageError, match=r"package\.json isn't what was signed"):
        load(package, signed_by=str(signed / "key.pub"))
