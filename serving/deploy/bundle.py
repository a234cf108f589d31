"""The zips that Lambda runs: the function in front of an endpoint, and the one that holds the model itself."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from serving.package import MANIFEST
from trainer.common.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
PROXY = {"lambda_function.py": "serving/adapters/lambda_proxy.py", "fetch.py": "serving/fetch.py"}
# Names in the zip of the function that holds the model, and what lies there. stack.yaml names the
# first one as the function's handler.
DIRECT = {
    "serving/lambda_direct.py": "serving/adapters/lambda_inside.py",
    **{
        f"{name}.py": f"{name}.py"
        for name in (
            "serving/__init__",
            "serving/adapters/__init__",
            "serving/adapters/lambda_proxy",
            "serving/backends",
            "serving/engine",
            "serving/fetch",
            "serving/handler",
            "serving/package",
            "serving/s3",
            "trainer/__init__",
            "trainer/common/__init__",
            "trainer/common/errors",
            "trainer/images/__init__",
            "trainer/images/bounds",
            "trainer/images/decode",
        )
    },
}
PACKAGE = "package"  # where the direct zip holds the model package, unpacked

RUNTIME = "3.13"  # Python of stack.yaml's Runtime
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux2014_x86_64",
)  # that Lambda's Amazon Linux 2023 (glibc 2.34) runs
LIBRARIES = ("numpy", "pillow", "onnxruntime")
UNUSED = (
    "onnxruntime/quantization/",
    "onnxruntime/tools/",
    "onnxruntime/transformers/",
    "onnxruntime/datasets/",
    ".dist-info/",
    "/tests/",
    "/bin/",
    ".pyi",
)
MAX_UNPACKED = 262_144_000  # bytes, of a function's code: Lambda's quota of 250 MB


def proxy() -> bytes:
    """The zip of the function in front of an endpoint."""
    return archive(
        {name: (PROJECT / source).read_bytes() for name, source in PROXY.items()},
        zipfile.ZIP_STORED,
    )


def direct(package: Path) -> bytes:
    """The zip of the function that holds the model. package: a model.tar.gz that loads. Raises UserError."""
    contents = {name: (PROJECT / source).read_bytes() for name, source in DIRECT.items()}
    contents |= {f"{PACKAGE}/{name}": data for name, data in slim(package).items()}
    contents |= libraries()
    size = sum(map(len, contents.values()))
    if size > MAX_UNPACKED:
        raise UserError(
            f"{package}: with its libraries it has {size:,} bytes, and Lambda takes {MAX_UNPACKED:,}; deploy it with --door endpoint"
        )
    return archive(contents, zipfile.ZIP_DEFLATED)


def slim(package: Path) -> dict[str, bytes]:
    """A package's files without the second copy of the weights and the code, which Lambda does not use, and its manifest for what is left."""
    with tarfile.open(package) as tar:
        members = {str(PurePosixPath(member.name)): member for member in tar if member.isreg()}
        contents = {
            name: file.read()
            for name, member in members.items()
            if _served(name) and (file := tar.extractfile(member))
        }
    manifest = json.loads(contents[MANIFEST])
    manifest["files"] = {
        name: digest for name, digest in manifest["files"].items() if _served(name)
    }
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return contents | {MANIFEST: json.dumps(manifest, indent=1).encode()}


def _served(name: str) -> bool:
    return name != "model.safetensors" and not name.startswith("code/")


def libraries() -> dict[str, bytes]:
    """The runtime's libraries for Lambda's Python and processor, in the versions that are installed here. Raises UserError."""
    wanted = [f"{name}=={version(name)}" for name in LIBRARIES]
    with tempfile.TemporaryDirectory(prefix="libraries-") as directory:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--no-compile",
            "--target",
            directory,
        ]
        command += [
            "--python-version",
            RUNTIME,
            *(f"--platform={platform}" for platform in PLATFORMS),
            *wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no output").splitlines()[-1]
            raise UserError(
                f"pip: can't get {', '.join(wanted)} for Lambda's Python {RUNTIME} ({reason}); see that pip reaches its package index"
            )
        paths = {
            path.relative_to(directory).as_posix(): path
            for path in Path(directory).rglob("*")
            if path.is_file()
        }
        return {
            name: path.read_bytes()
            for name, path in paths.items()
            if not any(part in f"/{name}" for part in UNUSED)
        }


def archive(contents: Mapping[str, bytes], compression: int) -> bytes:
    """Equal contents give equal bytes (compressed: with the same zlib)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.external_attr = (
                0o644 << 16
            )  # Lambda runs as another user, who must be able to read
            entry.compress_type = compression
            file.writestr(entry, contents[name])
    return buffer.getvalue()
