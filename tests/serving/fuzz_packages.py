"""`python -m tests.serving.fuzz_packages --count 2000 --seed 0`: damaged and forged model packages.

Each is made from (seed, number): a package with something changed, and then sealed, as a builder
with a fault would. It loads, or is refused in one line.
"""

import argparse
import gzip
import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.manifest import PackageError
from serving.package import load
from tests.packages import make_calibrated, make_network
from trainer.results.package import build

JUNK: list[Any] = [
    *(None, True, 0, -1, 1, 10**400, 1.5, -0.0, float("nan"), float("inf"), 1e308),
    *("", "a", "../../etc/passwd", "/etc/passwd", "a\nb", "\0", "\ud800", "é" * 300, "bilinear"),
    *([], {}, [[]], [None], {"a": 1}, [1] * 1000, ["golden/0.jpg"] * 3, {"size": 32}),
]
Change = Callable[[random.Random, Path], None]


def bytes_changed(rng: random.Random, data: bytes) -> bytes:
    """The bytes cut off, with some changed, with some put in, or others altogether."""
    changed = bytearray(data)
    what = rng.randrange(4)
    if what == 0:
        del changed[rng.randrange(len(changed) + 1) :]
    elif what == 1:
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif what == 2:
        at = rng.randrange(len(changed))
        changed[at:at] = rng.randbytes(rng.randrange(1, 64))
    else:
        return rng.randbytes(rng.randrange(2000))
    return bytes(changed)


def change_manifest(rng: random.Random, package: Path) -> None:
    """Puts junk somewhere in the manifest, or takes something out."""
    path = package / "package.json"
    manifest = json.loads(path.read_bytes())
    for _ in range(rng.randrange(1, 4)):
        node: Any = manifest
        while True:
            keys = [*node] if isinstance(node, dict) else [*range(len(node))]
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and rng.random() < 0.6:
                node = node[key]
                continue
            if rng.random() < 0.3:
                del node[key]
            else:
                node[key] = rng.choice(JUNK)
            break
    path.write_text(json.dumps(manifest))


def nest(rng: random.Random, package: Path) -> None:
    """Makes the manifest deep, or no JSON."""
    path = package / "package.json"
    depth = rng.choice([10, 900, 5_000, 100_000])
    text = path.read_text()
    deep = rng.choice([("[", "]"), ('{"a":', "}")])
    nested = deep[0] * depth + "1" + deep[1] * depth
    path.write_text(rng.choice([nested, text.replace('"config":', f'"x": {nested}, "config":', 1)]))


def change_file(rng: random.Random, package: Path) -> None:
    """Changes the bytes of a file."""
    names = ["golden/expected.npz", "golden/0.jpg", "golden/1.png", "model.onnx", "package.json"]
    path = package / rng.choice(names)
    path.write_bytes(bytes_changed(rng, path.read_bytes()))


def swap(rng: random.Random, package: Path) -> None:
    """Takes a file away, puts another or a folder in its place, or adds one."""
    files = [path for path in package.rglob("*") if path.is_file()]
    path = rng.choice(files)
    what = rng.randrange(4)
    if what == 0:
        path.unlink()
    elif what == 1:
        shutil.copy(rng.choice(files), path)
    elif what == 2:
        path.unlink()
        path.mkdir()
    else:
        (path.parent / rng.choice(["x.py", "é", "__init__.pyc", "a" * 200])).write_bytes(b"x")


CHANGES: list[Change] = [change_manifest, change_manifest, change_file, change_file, swap, nest]


def seal(rng: random.Random, package: Path) -> None:
    """Brings the digests up to date, where the manifest still is one."""
    path = package / "package.json"
    try:
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest.get("files"), dict) and rng.random() < 0.9:
            for name in manifest["files"]:
                file = package / name
                if file.is_file() and file.resolve().is_relative_to(package.resolve()):
                    digest = hashlib.sha256(file.read_bytes()).hexdigest()
                    manifest["files"][name] = digest
        manifest.pop("sha256", None)
        text = json.dumps(manifest, sort_keys=True)
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(manifest))
    except (ValueError, RecursionError, AttributeError, OSError):
        return


def archived(rng: random.Random, package: Path, path: Path) -> None:
    """Packs it, sometimes with members that have no business there, or with bytes changed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if rng.random() < 0.3:
            entry = tarfile.TarInfo(
                rng.choice(["a" * 300, "x/" * 200 + "y", "é\n", "model.onnx", "."])
            )
            entry.type = rng.choice([*b"0123456xgLKS"]).to_bytes()
            entry.linkname = rng.choice(["", "/etc/passwd", "../x", "model.onnx"])
            entry.pax_headers = {str(number): "x" for number in range(rng.choice([0, 0, 3000]))}
            tar.addfile(entry)
        tar.add(package, ".")
    data = buffer.getvalue()
    if rng.random() < 0.3:
        head = 512 * rng.randrange(len(data) // 512)
        data = data[:head] + bytes_changed(rng, data[head : head + 512]) + data[head + 512 :]
    if rng.random() < 0.1:
        data = bytes_changed(rng, gzip.compress(data, 1))
    else:
        data = gzip.compress(data, 1)
    path.write_bytes(data)


def attack(original: Path, scratch: Path, count: int, seed: int) -> Counter[str]:
    """How many packages were served, and how many refused. Raises what is no refusal."""
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        package = Path(shutil.copytree(original, scratch / "package"))
        for _ in range(rng.randrange(1, 3)):
            try:
                rng.choice(CHANGES)(rng, package)
            except (OSError, ValueError, IndexError, TypeError, RecursionError):
                continue  # there is nothing left to change
        seal(rng, package)
        path = package
        if rng.random() < 0.3:
            path = scratch / "model.tar.gz"
            archived(rng, package, path)
        try:
            load(path, threads=1)
            outcomes["loaded"] += 1
        except PackageError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (
                number,
                str(error),
            )
            outcomes["refused"] += 1
        except BaseException:
            print(f"package {number} of seed {seed}", file=sys.stderr)
            raise
        shutil.rmtree(package)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.serving.fuzz_packages")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        pictures = make_calibrated(Path(scratch, "pictures"))
        build(make_network(), pictures, Path(scratch, "original"), archive=False)
        outcomes = attack(Path(scratch, "original"), Path(scratch), options.count, options.seed)
    print(f"{options.count} packages, seed {options.seed}: {dict(outcomes)}")


if __name__ == "__main__":
    sys.exit(main())
