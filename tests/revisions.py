"""`python -m tests.revisions BEFORE AFTER --to DIR`: whether two checkouts give the same bytes.

For a change of structure: runs the same commands in both folders and compares what comes out: the
final weights and metrics, the model package (weights, ONNX, golden pictures, their pixels and
logits), what a sweep notes, the requests that `launch plan` shows for each target, and a server's
answers. What tells of the code itself (the revision, dates, seconds, the source's digest, the paths
of modules) is left out. Prints a line for each comparison; 1 where any differs.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.ports import free_port

SHORT = ("train.epochs=3", "train.threads=1", "platform=local")
BIG = "train.batch_size=64"
TRAININGS = {
    "demo": [BIG],
    "mixed": [
        BIG, "data.augment.mixup=0.2", "data.augment.cutmix=0.5", "data.augment.trivial=true",
        "train.accumulate=2", "train.clip_norm=1",
        "optim=sgd", "optim.schedule=step", "optim.step_epochs=1",
    ],
    "exact": [BIG, "train.exact_shards=4", "train.ema_decay=null", "data.cache=none"],
    "frozen": [
        BIG, "model.freeze=backbone", "model.weights={weights}", "model.head_hidden=32",
        "optim.lr=1e-3",
    ],
    "bf16": [
        BIG, "train.precision=bf16", "model.head_hidden=16",
        "train.monitor=valid_loss", "train.patience=1",
    ],
}  # fmt: skip
TARGETS = {
    "ec2": [],
    "sagemaker": ["target.spot=true"],
    "sagemaker_multi": [],
    "tuner": ["sweep=lr_batch"],
    "notebook": [],
}
TIMES = {"seconds", "data_wait", "evaluate_seconds"}
MODULE = re.compile(r"(launch|trainer|serving)(/\w+)+\.(py|sh)")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b|(?<=-1-)[0-9a-f]{8}\b")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.revisions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="an empty folder for what they make"
    )
    options = parser.parse_args()
    made = {}
    for name in ("before", "after"):
        place = (options.to / name).absolute()
        place.mkdir(parents=True)
        made[name] = dict(everything(getattr(options, name).absolute(), place))
    different = 0
    for what in made["before"]:
        equal = made["before"][what] == made["after"].get(what)
        different += not equal
        print(f"{'equal    ' if equal else 'DIFFERENT'}  {what}")
    print(f"{len(made['before'])} comparisons, {different} different")
    return 1 if different else 0


def everything(checkout: Path, place: Path) -> Iterator[tuple[str, str]]:
    """(what, digest or text) of everything that is compared."""
    for name, settings in TRAININGS.items():
        words = [word.format(weights=place / "demo.safetensors") for word in settings]
        run(
            checkout,
            place,
            "trainer",
            *SHORT,
            *words,
            f"name={name}",
            f"platform.runs={place}",
            f"platform.cache={place}/cache",
        )
        yield from of_run(name, place / name)
        if name == "demo":
            with tarfile.open(place / "demo/model.tar.gz") as archive:
                (place / "demo.safetensors").write_bytes(
                    archive.extractfile("model.safetensors").read()
                )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer"]
    python(
        checkout,
        place,
        *command,
        *SHORT,
        BIG,
        "name=two",
        f"platform.runs={place}",
        f"platform.cache={place}/cache",
    )
    yield from of_run("two", place / "two")
    sweep = ["-m", *SHORT, BIG, *TRAININGS["frozen"], "optim.lr=1e-3,1e-4", "name=sweep"]
    words = [word.format(weights=place / "demo.safetensors") for word in sweep]
    run(
        checkout,
        place,
        "trainer",
        *words,
        f"platform.runs={place}",
        f"platform.cache={place}/cache",
    )
    for trial in (0, 1):
        yield f"sweep: metrics of trial {trial}", rows(place / f"sweep/{trial:04d}/metrics.jsonl")
    for target, words in TARGETS.items():
        yield f"plan: {target}", plan(checkout, place, target, words)
    with served(checkout, place, place / "demo/model.tar.gz") as address:
        for image in sorted((place / "data/fashion_mnist/test").rglob("*.png"))[:20]:
            for kind in ("application/json", "application/json; output=labels"):
                yield f"answer: {image.name}, {kind}", ask(address, image.read_bytes(), kind)


def of_run(name: str, directory: Path) -> Iterator[tuple[str, str]]:
    yield f"{name}: metrics.jsonl", rows(directory / "metrics.jsonl")
    result = json.loads((directory / "result.json").read_text())
    yield (
        f"{name}: result",
        json.dumps(
            {key: value for key, value in result.items() if key not in TIMES | {"identity"}}
        ),
    )
    with tarfile.open(directory / "model.tar.gz") as archive:
        for member in sorted(archive.getnames()):
            if not member.startswith("code/") and member != "package.json":
                yield f"{name}: package, {member}", digest(archive.extractfile(member).read())
        manifest = json.loads(archive.extractfile("package.json").read())
    kept = {
        key: manifest[key]
        for key in ("classes", "preprocessing", "metrics", "config", "tolerance", "golden")
    }
    yield f"{name}: package, manifest", json.dumps(kept, sort_keys=True)


def rows(path: Path) -> str:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return json.dumps(
        [{key: value for key, value in row.items() if key not in TIMES} for row in lines]
    )


def plan(checkout: Path, place: Path, target: str, words: list[str]) -> str:
    shown = json.loads(run(checkout, place, "launch", "plan", "--json", f"target={target}", *words))
    return MODULE.sub("MODULE", DIGEST.sub("DIGEST", json.dumps(strip(shown), sort_keys=True)))


def strip(node: Any) -> Any:
    """Leave out the code's revision, which differs by itself, and read the notebook's scripts."""
    if isinstance(node, dict):
        if "Content" in node:
            return base64.b64decode(node["Content"]).decode()
        return {
            key: strip(value)
            for key, value in node.items()
            if key not in ("PACKHORSE_REVISION", "ClientToken")
        }
    return [strip(value) for value in node] if isinstance(node, list) else node


def run(checkout: Path, place: Path, *words: str) -> str:
    return python(checkout, place, "-P", "-m", *words)


def environment(checkout: Path) -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return without | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def python(checkout: Path, place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env=environment(checkout),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        command = " ".join(words)
        sys.exit(f"{checkout}: {command}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def served(checkout: Path, place: Path, package: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-P", "-m", "serving", "serve", str(package), "--port", str(port)]
    server = subprocess.Popen(
        command,
        cwd=place,
        env=environment(checkout),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


def ask(address: str, image: bytes, accept: str) -> str:
    headers = {"Content-Type": "image/png", "Accept": accept}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/invocations", image, headers), timeout=60
    ) as answer:
        return str(answer.read().decode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
