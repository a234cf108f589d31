"""The files to upload: zips of the functions, and the archive for an endpoint on AWS's image."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from serving.manifest import MANIFEST
from serving.signature import SIGNATURE
from trainer.common.errors import PROJECT, UserError
from trainer.common.serving_code import FOR_HEIC, REQUIREMENTS, SERVING_CODE

PROXY = {
    "lambda_function.py": "serving/adapters/lambda_proxy.py",
    **{
        f"serving/{name}.py": f"serving/{name}.py"
        for name in ("__init__", "adapters/__init__", "adapters/lambda_events", "contract", "fetch")
    },
}
# Names in the zip of the function that holds the model, and the files there. stack.yaml names the
# first one as the function's handler.
DIRECT = {
    "serving/lambda_direct.py": "serving/adapters/lambda_inside.py",
    "serving/adapters/__init__.py": "serving/adapters/__init__.py",
    "serving/adapters/lambda_events.py": "serving/adapters/lambda_events.py",
    **{name: name for name in SERVING_CODE},
}
REQUIRED = "code/requirements.txt"  # of a package
PACKAGE = "package"  # the folder of the unpacked model package in the direct zip

RUNTIME = "3.13"  # Python of stack.yaml's Runtime, and of AWS's Ray Serve image
LIBRARIES = Path(__file__).with_name("libraries.txt")
# Platforms of wheels that Amazon Linux 2023 (glibc 2.34) runs, in Lambda and in that image.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux2014")
MACHINES = {"x86_64": "x86_64", "arm64": "aarch64"}  # Lambda's name, and that in wheels
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


def endpoint(package: Path) -> bytes:
    """Return the archive of an endpoint on AWS's Ray Serve image. Raise UserError.

    It has the libraries that the image lacks, in `code/`, which is on Python's path there. It has
    no requirements.txt: the image would install it from a network, which an isolated endpoint
    lacks. package: a model.tar.gz that loads.
    """
    contents = _members(package, _needed_by_endpoint)
    libraries_ = libraries(*_needed(package))
    contents |= {f"code/{name}": data for name, data in libraries_.items()}
    return _tar(_sealed(contents))


def direct(package: Path, architecture: str = "x86_64") -> bytes:
    """Return the zip of the function that holds the model. Raise UserError where it is too large.

    package: a model.tar.gz that loads.
    """
    contents = {name: (PROJECT / source).read_bytes() for name, source in DIRECT.items()}
    contents |= {f"{PACKAGE}/{name}": data for name, data in slim(package).items()}
    contents |= libraries(*_needed(package), architecture=architecture)
    size = sum(map(len, contents.values()))
    if size > MAX_UNPACKED:
        raise UserError(
            f"{package}: with its libraries it has {size:,} bytes, "
            f"and Lambda takes {MAX_UNPACKED:,}; deploy it with --mode endpoint"
        )
    return archive(contents, zipfile.ZIP_DEFLATED)


def slim(package: Path) -> dict[str, bytes]:
    """Return the files of a package that Lambda uses, by name, with a manifest of these.

    It leaves out PyTorch's copy of the weights, and the code.
    """
    return _sealed(_members(package, _served))


def _members(package: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the package's files for whose names `wanted` is true, by name."""
    with tarfile.open(package) as tar:
        members = {str(PurePosixPath(member.name)): member for member in tar if member.isreg()}
        files = {name: tar.extractfile(each) for name, each in members.items() if wanted(name)}
        return {name: file.read() for name, file in files.items() if file}


def _sealed(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Return a package of these files: its manifest lists exactly them."""
    manifest = json.loads(contents[MANIFEST])
    manifest["files"] = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in sorted(contents.items())
        if name != MANIFEST
    }
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return contents | {MANIFEST: json.dumps(manifest, indent=1).encode()}


def _served(name: str) -> bool:
    return not name.endswith(".safetensors") and name != SIGNATURE and not name.startswith("code/")


def _needed_by_endpoint(name: str) -> bool:
    return not name.endswith(".safetensors") and name not in (REQUIRED, SIGNATURE)


def _needed(package: Path) -> tuple[str, ...]:
    """Return the libraries that this package needs besides those that all need."""
    with tarfile.open(package) as tar:
        file = tar.extractfile(REQUIRED)
        assert file is not None
        said = file.read().decode()
    return tuple(name for name in FOR_HEIC if name in said)


def libraries(*more: str, architecture: str = "x86_64") -> dict[str, bytes]:
    """Return the files of the runtime's libraries for AWS's Python, by path.

    libraries.txt pins the versions. architecture: Lambda's name for the processor. Raise UserError
    where pip can't get them.
    """
    names = (*REQUIREMENTS, *more)
    lines = [line for line in LIBRARIES.read_text().splitlines() if line.split("==")[0] in names]
    print(f"bringing {', '.join(names)} for Python {RUNTIME} on {architecture}", flush=True)
    with tempfile.TemporaryDirectory(prefix="libraries-") as scratch:
        directory = Path(scratch) / "unpacked"
        pinned = Path(scratch) / "pinned.txt"
        pinned.write_text("\n".join(lines))
        command = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--no-compile", f"--python-version={RUNTIME}"]
        command += [f"--platform={platform}_{MACHINES[architecture]}" for platform in PLATFORMS]
        command += ["--require-hashes", f"--target={directory}", f"--requirement={pinned}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no output").splitlines()[-1]
            raise UserError(
                f"pip: can't get {', '.join(names)} for AWS's Python {RUNTIME} ({reason}); "
                "see that pip reaches its package index"
            )
        paths = {
            path.relative_to(directory).as_posix(): path
            for path in directory.rglob("*")
            if path.is_file()
        }
        return {
            name: path.read_bytes()
            for name, path in paths.items()
            if not any(part in f"/{name}" for part in UNUSED)
        }


def archive(contents: Mapping[str, bytes], compression: int) -> bytes:
    """Return a zip. Equal contents give equal bytes (if compressed, with the same zlib)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # its date is 1980
            # Lambda runs as another user, who must be able to read it.
            entry.external_attr = 0o644 << 16
            entry.compress_type = compression
            file.writestr(entry, contents[name])
    return buffer.getvalue()


def _tar(contents: Mapping[str, bytes]) -> bytes:
    """Return a gzipped tar archive. Equal contents give equal bytes (with the same zlib)."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=buffer, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name in sorted(contents):
            entry = tarfile.TarInfo(name)
            entry.size = len(contents[name])
            tar.addfile(entry, io.BytesIO(contents[name]))
    return buffer.getvalue()
