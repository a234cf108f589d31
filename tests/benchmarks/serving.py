"""Servers of one ResNet-18 side by side: time to ready, memory, answers to 1 and 8 clients."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from serving import bench
from serving.bench import Load, example
from tests.benchmarks.measure import ratio, short
from tests.benchmarks.table import Row, Table, installed
from tests.ports import free_port
from trainer.images.decode import Preprocessing
from trainer.network import build as model
from trainer.results.package import Contents, build
from trainer.results.quantize import Pictures

TITLE = "Serving"
PROJECT = Path(__file__).parents[2]
DOORS = Path(os.environ.get("DOORS", PROJECT / ".venv-doors")) / "bin"
CLASSES = 133
Start = Callable[[int], subprocess.Popen[bytes]]  # starts a server on a port
SECONDS = 2.0  # of load at a time
TURNS = 4  # of each server in a round, with each number of clients
NOTE = """ResNet-18 at 224 px, 133 classes; a JPEG of 500 x 375 px posted to `/invocations` by 1 and
by 8 clients on the same machine. All servers run; they take turns of 2 s, so that what else the
machine does falls on all of them. Eager torch is what tutorials do: Pillow, torchvision's
transforms, `model(x)`. TorchServe runs AWS's own toolkit with that code as its four functions.
Ready: from the process's start to its first answer. Memory (resident) and CPU time are of all its
processes together. Throughput, p50 and p99 are so many times better than FastAPI's."""

NETWORK = """
import io
import torch
from PIL import Image
from torchvision import models, transforms

def make_model(path={weights!r}):
    network = models.resnet18(num_classes={classes})
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()

to_tensor = transforms.Compose([
    transforms.Resize(256),
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])

def decode(body):
    return to_tensor(Image.open(io.BytesIO(body)).convert("RGB"))
"""
FASTAPI = """
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

network = make_model()
app = FastAPI()

def predict(body):
    with torch.no_grad():
        return network(decode(body)[None]).tolist()

@app.get("/ping")
def ping():
    return "ok"

@app.post("/invocations")
async def invocations(request: Request):
    return await run_in_threadpool(predict, await request.body())

uvicorn.run(app, port={port}, log_level="warning")
"""
LITSERVE = """
import base64
import litserve

class Api(litserve.LitAPI):
    def setup(self, device):
        self.network = make_model()

    def decode_request(self, request):  # LitServe takes JSON and forms
        return decode(base64.b64decode(request["base64"]))

    def batch(self, inputs):
        return torch.stack(inputs)

    def predict(self, inputs):
        with torch.no_grad():
            return self.network(inputs)

    def encode_response(self, output):
        return output.tolist()

if __name__ == "__main__":
    api = Api(max_batch_size=8, batch_timeout=0.005, api_path="/invocations")
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port={port}, generate_client_file=False, log_level="warning")
"""
TOOLKIT = """
import json

def model_fn(directory):
    return make_model()

def input_fn(body, content_type):
    return decode(body)[None]

def predict_fn(inputs, network):
    with torch.no_grad():
        return network(inputs)

def output_fn(logits, accept):
    return json.dumps(logits.tolist())
"""
TS_PROPERTIES = """
vmargs=-XX:-UseContainerSupport
decode_input_request=false
disable_token_authorization=true
default_workers_per_model=1
default_service_handler=sagemaker_pytorch_serving_container.handler_service:handle
"""


@dataclass(frozen=True)
class Measured:
    """A round of a server."""

    ready: float  # seconds
    memory: int  # bytes
    loads: dict[int, Load]  # by the number of clients
    cpu: float  # seconds an answer


def measure(scratch: Path, rounds: int) -> Table:
    contenders = make_contenders(scratch)
    found: dict[str, list[Measured]] = {name: [] for name in contenders}
    for number in range(rounds):
        print(f"\r  round {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
        for name, measured in play(contenders, scratch).items():
            found[name].append(measured)
    print(file=sys.stderr)
    return make_table(found)


def play(contenders: dict[str, Start], scratch: Path) -> dict[str, Measured]:
    """One round: starts all servers, lets them take turns, and ends them."""
    picture = (scratch / "picture.jpg").read_bytes()
    servers: dict[str, Server] = {}
    try:
        for name, start in contenders.items():
            servers[name] = Server(start, scratch, *request(name, picture))
        loads: dict[str, dict[int, list[Load]]] = {name: {1: [], 8: []} for name in servers}
        before = {name: server.cpu() for name, server in servers.items()}
        for _ in range(TURNS):
            for clients in (1, 8):
                for name, server in servers.items():
                    loads[name][clients].append(server.load(clients))
        return {
            name: Measured(
                ready=server.ready,
                memory=server.memory(),
                loads={clients: join(parts) for clients, parts in loads[name].items()},
                cpu=(server.cpu() - before[name])
                / sum(len(load.latencies) for parts in loads[name].values() for load in parts),
            )
            for name, server in servers.items()
        }
    finally:
        for server in servers.values():
            server.stop()


def join(parts: Sequence[Load]) -> Load:
    assert not sum(load.failed for load in parts)
    return Load(
        parts[0].clients,
        sum(load.seconds for load in parts),
        sorted(latency for load in parts for latency in load.latencies),
        0,
    )


def request(name: str, picture: bytes) -> tuple[bytes, str]:
    """The body that a contender takes, and its content type."""
    if name.startswith("LitServe"):
        return json.dumps(
            {"base64": base64.b64encode(picture).decode()}
        ).encode(), "application/json"
    return picture, "application/octet-stream"


def make_contenders(scratch: Path) -> dict[str, Start]:
    package, quantized = make_packages(scratch)
    network = NETWORK.format(weights=str(scratch / "weights.pt"), classes=CLASSES)

    def ours(path: Path) -> Start:
        return lambda port: launch(
            [sys.executable, "-m", "serving", "serve", str(path), "--port", str(port)], scratch
        )

    def script(code: str) -> Start:
        def start(port: int) -> subprocess.Popen[bytes]:
            (scratch / "server.py").write_text(network + code.replace("{port}", str(port)))
            return launch([sys.executable, "server.py"], scratch)

        return start

    def torchserve(port: int) -> subprocess.Popen[bytes]:
        code = scratch / "ml/model/code"
        code.mkdir(parents=True, exist_ok=True)
        (code / "inference.py").write_text(network + TOOLKIT)
        (scratch / "store").mkdir(exist_ok=True)
        addresses = [
            f"{kind}_address=http://127.0.0.1:{number}"
            for kind, number in (
                ("inference", port),
                ("management", free_port()),
                ("metrics", free_port()),
            )
        ]
        (scratch / "ts.properties").write_text(TS_PROPERTIES + "\n".join(addresses))
        command = [
            "torchserve",
            "--start",
            "--foreground",
            "--model-store",
            "store",
            "--ts-config",
            "ts.properties",
            "--models",
        ]
        environment = {
            "SAGEMAKER_BASE_DIR": str(scratch / "ml"),
            "SAGEMAKER_PROGRAM": "inference.py",
            "PYTHONPATH": str(code),
        }
        return launch(
            [*command, f"model={scratch / 'ml/model'}"],
            scratch,
            PATH=f"{DOORS}:{os.environ['PATH']}",
            **environment,
        )

    contenders = {"FastAPI, eager torch": script(FASTAPI)} if installed("fastapi") else {}
    contenders |= (
        {"LitServe, eager torch, batches of 8": script(LITSERVE)} if installed("litserve") else {}
    )
    contenders |= (
        {"TorchServe, AWS's toolkit, eager torch": torchserve}
        if (DOORS / "torchserve").exists() and shutil.which("java")
        else {}
    )
    return contenders | {"ours": ours(package), "ours, int8": ours(quantized)}


def make_packages(scratch: Path) -> tuple[Path, Path]:
    """Make a float32 and an int8 package of one network, and weights.pt by torchvision's names.

    Random weights are as fast as any.
    """
    torch.manual_seed(0)
    network = model.build(
        "resnet18", CLASSES, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ).train()
    with torch.no_grad():
        for _ in range(10):
            network(torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8))
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in network.state_dict().items()
        if name not in ("mean", "std")
    }
    renamed = {re.sub("^head[.]", "fc.", name): tensor for name, tensor in state.items()}
    torch.save(renamed, scratch / "weights.pt")
    (scratch / "picture.jpg").write_bytes(example())
    contents = Contents(
        classes=[f"breed {number}" for number in range(CLASSES)],
        preprocessing=Preprocessing(256, 224, "bilinear"),
        metrics={},
        config={"model.name": "resnet18"},
        revision=None,
        golden=[str(scratch / "picture.jpg")],
    )
    build(network, contents, scratch / "float", archive=False)
    with Image.open(scratch / "picture.jpg") as image:
        pixels = np.asarray(image.resize((224, 224)))[None]
    build(
        network,
        replace(
            contents, int8=Pictures(np.repeat(pixels, 8, 0), np.zeros(8, np.int64)), max_drop=1.0
        ),
        scratch / "int8",
        archive=False,
    )
    return scratch / "float", scratch / "int8"


def launch(command: Sequence[str], scratch: Path, **environment: str) -> subprocess.Popen[bytes]:
    inherited = {
        name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"
    }  # each as many threads as it takes by itself
    with (scratch / "server.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=scratch,
            env=inherited | {"PYTHONPATH": str(PROJECT)} | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


class Server:
    """A process group that has answered once."""

    def __init__(self, start: Start, scratch: Path, body: bytes, content_type: str) -> None:
        self._port, self._body, self._content_type = free_port(), body, content_type
        began = time.monotonic()
        self._process = start(self._port)
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > began + 120:
                self.stop()
                raise RuntimeError(
                    f"a server did not start: {(scratch / 'server.log').read_text()[-3000:]}"
                )
            time.sleep(0.01)
        self.ready = time.monotonic() - began
        self.load(8)  # warm-up

    def load(self, clients: int) -> Load:
        return bench.measure(
            f"http://127.0.0.1:{self._port}", self._body, clients, SECONDS, self._content_type
        )

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(
                "POST", "/invocations", self._body, {"Content-Type": self._content_type}
            )
            answer = connection.getresponse()
            return answer.status == 200 and bool(json.loads(answer.read()))
        except (OSError, ValueError):
            return False
        finally:
            connection.close()

    def memory(self) -> int:
        """Resident bytes."""
        return sum(
            int(status["VmRSS"].split()[0]) * 1024
            for status, _ in self._processes()
            if "VmRSS" in status
        )

    def cpu(self) -> float:
        """Seconds of user and system time so far."""
        return sum(int(stat[11]) + int(stat[12]) for _, stat in self._processes()) / os.sysconf(
            "SC_CLK_TCK"
        )

    def _processes(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """Return status and stat (from the third field on: proc(5)) of the group's processes."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == self._process.pid:
                    status = dict(
                        line.split(":\t", 1)
                        for line in (folder / "status").read_text().splitlines()
                        if ":\t" in line
                    )
                    yield status, (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it has ended

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def make_table(found: dict[str, list[Measured]]) -> Table:
    base = found.get("FastAPI, eager torch")
    rows: list[Row] = []
    for name, values in found.items():
        if not base:
            break
        cells = [
            f"{median(value.ready for value in values):.2f}",
            f"{median(value.memory for value in values) / 1e6:.0f}",
            f"{1000 * median(value.cpu for value in values):.0f}",
        ]
        numbers: list[float] = []
        for clients in (1, 8):
            own, other = (
                [value.loads[clients] for value in values],
                [value.loads[clients] for value in base],
            )
            better = [
                ratio([1 / load.rate for load in other], [1 / load.rate for load in own]),
                *(
                    ratio([load.quantile(q) for load in other], [load.quantile(q) for load in own])
                    for q in (0.5, 0.99)
                ),
            ]
            numbers += [one.median for one in better]
            cells += [str(better[0]), *(short(one.median) for one in better[1:])]
        rows.append(
            Row(
                name,
                (*cells, short(median(value.loads[8].rate for value in values))),
                *target(name, values, numbers),
            )
        )
    columns = (
        "ready, s",
        "MB",
        "CPU ms",
        "1 client: throughput",
        "p50",
        "p99",
        "8 clients: throughput",
        "p50",
        "p99",
        "answers/s",
    )
    missing = [name for name in ("fastapi", "litserve") if not installed(name)] + (
        [] if (DOORS / "torchserve").exists() else ["torchserve (make doors)"]
    )
    return Table(TITLE, NOTE, columns, rows, ("onnxruntime", "fastapi", "litserve"), missing)


def target(
    name: str, values: Sequence[Measured], better: Sequence[float]
) -> tuple[str, bool | None]:
    """better: throughput, p50, p99 with 1 client, and the same with 8, as ratios to FastAPI's."""
    if name == "ours":
        light = (
            median(value.ready for value in values) <= 1.2
            and median(value.memory for value in values) < 320e6
        )
        fast = (
            better[0] >= 1.6
            and better[3] >= 1.7
            and min(better[1], better[4]) >= 1 / 0.67
            and min(better[2], better[5]) >= 1 / 0.6
        )
        return "1.2 s, 320 MB, 1.6x and 1.7x throughput, p50 0.67x, p99 0.6x", light and fast
    if name == "ours, int8":
        return "4x throughput", min(better[0], better[3]) >= 4
    return "", None
