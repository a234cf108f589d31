"""The zips that Lambda runs: the function before an endpoint, and the one that holds the model."""

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

from serving.manifest import MANIFEST
from trainer.common.errors import PROJECT, UserError
from trainer.common.serving_code import FOR_HEIC, REQUIREMENTS, SERVING_CODE

PROXY = {
    "lambda_function.py": "serving/adapters/lambda_proxy.py",
    **{
        f"serving/{name}.py": f"serving/{name}.py"
        for name in ("__init__", "adapters/__init__", "adapters/lambda_events", "contract", "fetch")
    },
}
# Names in the zip of the function that holds the model, and what lies there. stack.yaml names the
# first one as the function's handler.
DIRECT = {
    "serving/lambda_direct.py": "serving/adapters/lambda_inside.py",
    "serving/adapters/__init__.py": "serving/adapters/__init__.py",
    "serving/adapters/lambda_events.py": "serving/adapters/lambda_events.py",
    **{name: name for name in SERVING_CODE},
}
PACKAGE = "package"  # where the direct zip holds the model package, unpacked

RUNTIME = "3.13"  # Python of stack.yaml's Runtime
# What Lambda's Amazon Linux 2023 (glibc 2.34) runs.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
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
    """Return the zip of the function in front of an endpoint."""
    return archive(
        {name: (PROJECT / source).read_bytes() for name, source in PROXY.items()},
        zipfile.ZIP_STORED,
    )


def direct(package: Path) -> bytes:
    """Return the zip of the function that holds the model. Raise UserError where it is too large.

    package: a model.tar.gz that loads.
    """
    contents = {name: (PROJECT / source).read_bytes() for name, source in DIRECT.items()}
    contents |= {f"{PACKAGE}/{name}": data for name, data in slim(package).items()}
    contents |= libraries(*_needed(package))
    size = sum(map(len, contents.values()))
    if size > MAX_UNPACKED:
        raise UserError(
            f"{package}: with its libraries it has {size:,} bytes, "
            f"and Lambda takes {MAX_UNPACKED:,}; deploy it with --mode endpoint"
        )
    return archive(contents, zipfile.ZIP_DEFLATED)


def slim(package: Path) -> dict[str, bytes]:
    """Return what Lambda uses of a package's files, by name, and the manifest of that.

    It leaves out what is for PyTorch, a second copy of the weights, and the code.
    """
    with tarfile.open(package) as tar:
        members = {str(PurePosixPath(member.name)): member for member in tar if member.isreg()}
        files = {name: tar.extractfile(each) for name, each in members.items() if _served(name)}
        contents = {name: file.read() for name, file in files.items() if file}
    manifest = json.loads(contents[MANIFEST])
    manifest["files"] = {
        name: digest for name, digest in manifest["files"].items() if _served(name)
    }
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return contents | {MANIFEST: json.dumps(manifest, indent=1).encode()}


def _served(name: str) -> bool:
    return not name.endswith(".safetensors") and not name.startswith("code/")


def _needed(package: Path) -> tuple[str, ...]:
    """Return the libraries that this package needs beside those of all."""
    with tarfile.open(package) as tar:
        file = tar.extractfile("code/requirements.txt")
        assert file is not None
        said = file.read().decode()
    return tuple(name for name in FOR_HEIC if name in said)


def libraries(*more: str) -> dict[str, bytes]:
    """Return the runtime's libraries for Lambda's Python, by path, in the versions installed here.

    Raise UserError where pip can't get them.
    """
    pinned = [f"{name}=={version(name)}" for name in (*REQUIREMENTS, *more)]
    with tempfile.TemporaryDirectory(prefix="libraries-") as directory:
        command = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--no-compile", f"--python-version={RUNTIME}"]
        command += [f"--platform={platform}" for platform in PLATFORMS]
        command += [f"--target={directory}", *pinned]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no output").splitlines()[-1]
            raise UserError(
                f"pip: can't get {', '.join(pinned)} for Lambda's Python {RUNTIME} ({reason}); "
                "see that pip reaches its package index"
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
    """Return a zip: equal contents give equal bytes (compressed: with the same zlib)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # of 1980
            # Lambda runs as another user, who must be able to read.
            entry.external_attr = 0o644 << 16
            entry.compress_type = compression
            file.writestr(entry, contents[name])
    return buffer.getvalue()
