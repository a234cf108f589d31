"""The script of an instance, run for real: in namespaces, with AWS's own command line, against
moto's S3. Only `shutdown` is a stub.
"""

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch.cloud import source, wheelhouse
from launch.targets import ec2_request
from launch.targets.attempt import attempt_key
from launch.targets.base import Spec
from launch.targets.spec import load_config, load_target
from tests.conftest import Metadata, environment, wait_for
from tests.launch.conftest import REGION, Cloud, running
from trainer.common.errors import MISTAKE, OK, RESUME

pytestmark = pytest.mark.long  # the machine's script, many times

BIN = Path(sys.executable).parent
ACCOUNT, RUN = "123456789012", "a-run"
MISSING, WRONG = (
    "0" * 64,
    "1" * 64,
)  # of source tarballs that are not there, or not what they should be
AS_ROOT = [] if os.geteuid() == 0 else ["--map-root-user"]
UNSHARE = ["unshare", *AS_ROOT, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]

# The machine's disks are directories below $1. The script becomes process 1, so that nothing
# outlives it, as on a machine that shuts down.
MACHINE = """
mount -t tmpfs tmpfs "$1/ram"
mkdir "$1/ram/upper" "$1/ram/work"
mount -t overlay overlay -o "lowerdir=/opt,upperdir=$1/ram/upper,workdir=$1/ram/work" /opt
mkdir -p /opt/dlami/nvme
mount --bind "$1/nvme" /opt/dlami/nvme
mount --bind "$1/log" /var/log
[ -z "${FULL:-}" ] || { mount -t tmpfs -o size=8k tmpfs /var/log; ! yes 2>&1 >/var/log/other; }
mount --bind "$1/lib" /var/lib
exec bash "$2"
"""


class Machine:
    """An instance, at its first boot."""

    def __init__(
        self,
        root: Path,
        script: str,
        endpoint: str,
        prepared: Path | None = None,
        **environment: str,
    ) -> None:
        """prepared: the disk of an earlier machine, whose Python environment this one
        finds ready.
        """
        self.root, self.nvme = root, root / "nvme"
        self.log, self.console = root / "log" / "packhorse.log", root / "console"
        self.lib = root / "lib"
        self.shutdowns: list[str] = []  # how `shutdown` was called
        for directory in ("ram", "nvme/source", "log", "lib", "bin"):
            (root / directory).mkdir(parents=True)
        if prepared:
            subprocess.run(
                ["cp", "-al", prepared / "source" / ".venv", self.nvme / "source"], check=True
            )
        (root / "user_data.sh").write_text(script)
        self.program("shutdown", f'echo "$*" >> {root}/shutdowns')
        setuptools = importlib.util.find_spec("setuptools")
        assert setuptools and setuptools.origin
        self.environment = {
            "PATH": f"{root}/bin:{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9",
            # The set-up goes on top of the Python of the tests, and downloads nothing. (pip reads
            # "0" here as: no isolation.)
            "PYTHON": sys.executable,
            "PYTHONPATH": str(Path(setuptools.origin).parents[1]),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
        } | environment
        self.boot(root / "user_data.sh")

    def program(self, name: str, script: str) -> None:
        """Puts a program into the machine's path."""
        (self.root / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.root / "bin" / name).chmod(0o755)

    def boot(self, script: Path) -> None:
        with self.console.open("w") as console:
            self.process = subprocess.Popen(
                [*UNSHARE, "bash", "-euc", MACHINE, "machine", str(self.root), str(script)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def boot_again(self, **environment: str) -> "Machine":
        """As cloud-init does it, whatever that machine was told to run at each boot."""
        self.environment |= environment
        (self.root / "shutdowns").unlink()
        self.boot(next((self.lib / "cloud" / "scripts" / "per-boot").iterdir()))
        return self

    def cut_off(self) -> None:
        """The end of the power."""
        self.process.kill()
        self.process.wait()

    def script(self) -> int:
        """Its process, the one child of unshare."""
        return children(self.process.pid)[0]

    def trainer(self) -> int:
        return next(
            pid
            for pid in children(self.script())
            if b"-m\0trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    def wait(self) -> "Machine":
        """Until the machine's end."""
        self.process.wait(timeout=3600)  # as long as a very busy machine may take
        self.shutdowns = (self.root / "shutdowns").read_text().splitlines()
        return self


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Bucket:
    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name
        client.create_bucket(Bucket=name)

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body)

    def text(self, key: str) -> str:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read().decode()

    def keys(self, prefix: str) -> set[str]:
        """The keys below a prefix, without it."""
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])
        return {entry["Key"].removeprefix(prefix) for entry in found}

    def outcome(self, run: str, attempt: int = 1) -> dict[str, object]:
        return json.loads(self.text(f"runs/{run}/attempts/{attempt}.json"))


def make_spec(
    *overrides: str,
    run: str = RUN,
    attempt: int = 1,
    hours: float = 8,
    code: str = "",
    instances: int = 1,
) -> Spec:
    target = load_target(["target=ec2", f"target.hours={hours}", f"target.instances={instances}"])
    config, name = load_config(target, overrides)
    return Spec(target, config, overrides, run, ACCOUNT, REGION, name, code, None, attempt)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with running(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def bucket(cloud: Cloud) -> Bucket:
    return Bucket(cloud.client("s3"), make_spec().bucket)


@pytest.fixture(scope="module")
def code(bucket: Bucket) -> str:
    """SHA-256 of the project's own tarball, which is in the bucket."""
    tarball = source.build()
    digest = hashlib.sha256(tarball).hexdigest()
    bucket.put(f"source/{digest}.tar.gz", tarball)
    return digest


@pytest.fixture(scope="module", autouse=True)
def _namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("probe")
    for directory in ("ram", "nvme", "log", "lib"):
        (root / directory).mkdir()
    (root / "user_data.sh").write_text("mountpoint -q /opt/dlami/nvme")
    try:
        tried = subprocess.run(
            [*UNSHARE, "bash", "-euc", MACHINE, "machine", str(root), str(root / "user_data.sh")],
            capture_output=True,
            text=True,
            timeout=600,
        )
    except FileNotFoundError:
        pytest.skip("no unshare here (Linux only)")
    if tried.returncode != 0:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")


TINY = ("train.epochs=8", "data.size=16", "data.resize=16", "train.threads=1")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with which the set-up never ends."""
    python = tmp_path_factory.mktemp("python") / "endless"
    python.write_text("#!/bin/bash\nwhile :; do sleep 1; done\n")
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def broken(
    tmp_path_factory: pytest.TempPathFactory, cloud: Cloud, bucket: Bucket, code: str, endless: Path
) -> dict[str, Machine]:
    """Machines that never come to train, by their run; all at once, to save time."""
    root = tmp_path_factory.mktemp("broken")
    deaf = root / "deaf"
    deaf.write_text("#!/bin/bash\ntrap '' TERM\nwhile :; do sleep 1; done\n")
    deaf.chmod(0o755)

    bucket.put(f"source/{WRONG}.tar.gz", b"other bytes")
    for run in ("missing", "wrong"):
        bucket.put(f"runs/{run}/checkpoints/step-00000001/manifest.json", b"{}")
        bucket.put(f"runs/{run}/log.txt", b"the first attempt\n")
    bucket.put(attempt_key("unwanted", 1, "stop"), b"")
    unreachable = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    for run, attempts in {
        "twin": {"1.machine": b"another"},
        "older": {"2.request.json": b"{}"},
        "over": {"1.json": b"{}"},
    }.items():
        bucket.put(f"runs/{run}/checkpoints/step-00000001/manifest.json", b"{}")
        for name, content in attempts.items():
            bucket.put(f"runs/{run}/attempts/{name}", content)
    machines = {
        "twin": (make_spec(run="twin", code=code), {}),
        "older": (make_spec(run="older", code=code), {}),
        "over": (make_spec(run="over", code=code), {}),
        "missing": (make_spec(run="missing", code=MISSING, attempt=2), {}),
        "wrong": (make_spec(run="wrong", code=WRONG, attempt=2), {}),
        "limited": (make_spec(run="limited", code=code, hours=10 / 3600), {"PYTHON": str(deaf)}),
        "unwanted": (make_spec(run="unwanted", code=code), {"PYTHON": str(endless)}),
        "unconnected": (make_spec(run="unconnected", code=code), unreachable),
        "full": (make_spec(run="full", code=code), {"PYTHON": "/bin/false", "FULL": "yes"}),
    }
    return {
        run: Machine(root / run, ec2_request.user_data(spec), cloud.url, **environment)
        for run, (spec, environment) in machines.items()
    }


@pytest.fixture(scope="module")
def terminated(
    tmp_path_factory: pytest.TempPathFactory,
    cloud: Cloud,
    bucket: Bucket,
    code: str,
    broken: dict[str, Machine],
) -> Machine:
    """A machine that was told to end while it trained; the broken ones run beside it."""
    spec = make_spec(*TINY, "checkpoint.max_cost=1", code=code)
    machine = Machine(
        tmp_path_factory.mktemp("machines") / "first",
        ec2_request.user_data(spec, upload_every=2),
        cloud.url,
    )
    assert wait_for(
        lambda: machine.log.exists() and "metrics: epoch=2 " in machine.log.read_text()
    ), machine.log.read_text()
    # Held, so that it is not done before all this is. Saved while it runs: a machine that is lost
    # without a word loses little.
    trainer = machine.trainer()
    os.kill(trainer, signal.SIGSTOP)
    assert wait_for(lambda: "manifest.json" in str(bucket.keys(f"runs/{RUN}/checkpoints/step-"))), (
        machine.log.read_text()
    )
    for each in (machine.script(), trainer):  # as the end of somebody's session would
        os.kill(each, signal.SIGHUP)
    os.kill(machine.script(), signal.SIGTERM)
    assert wait_for(lambda: "stopping: SIGTERM" in machine.log.read_text())
    os.kill(trainer, signal.SIGCONT)
    return machine.wait()


def test_terminated_it_saves_and_shuts_down(terminated: Machine, bucket: Bucket) -> None:
    log = bucket.text(f"runs/{RUN}/log.txt")
    assert terminated.shutdowns == ["-h +480", "-h now"], log
    assert bucket.outcome(RUN) == {"attempt": 1, "code": RESUME, "reason": "SIGTERM"}, log
    saved = terminated.nvme / f"runs/{RUN}/checkpoints"
    files = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    kept = {str(path) for path in files if path.name != ".lock"}  # of this machine's process
    assert bucket.keys(f"runs/{RUN}/checkpoints/") == kept and any(
        name.startswith("step-") for name in kept
    )
    assert "result.json" not in bucket.keys(f"runs/{RUN}/output/")


def test_the_next_attempt_goes_on_and_completes(
    terminated: Machine, tmp_path: Path, cloud: Cloud, bucket: Bucket, code: str
) -> None:
    bucket.put(
        f"runs/{RUN}/checkpoints/step-99999999/tensors.safetensors", b"an upload that was cut short"
    )
    spec = make_spec(*TINY, code=code, attempt=2)
    machine = Machine(
        tmp_path / "machine", ec2_request.user_data(spec), cloud.url, terminated.nvme
    ).wait()
    log = bucket.text(f"runs/{RUN}/log.txt")
    assert machine.shutdowns == ["-h +480", "-h now"]
    assert bucket.outcome(RUN, 2) == {"attempt": 2, "code": OK, "reason": "done"}, log
    assert (
        log.startswith(terminated.log.read_text())
        and "resumed from" in log
        and "attempt 2 ended: done" in log
    )
    assert bucket.keys(f"runs/{RUN}/output/") >= {
        "model.tar.gz",
        "report.html",
        "metrics.jsonl",
        "result.json",
        "log.txt",
    }
    assert not [key for key in bucket.keys(f"runs/{RUN}/") if "/." in key or "99999999" in key]
    assert (
        len(bucket.text(f"runs/{RUN}/output/metrics.jsonl").splitlines()) == 8 + 1
    )  # epochs, and the test


def test_a_failing_trainer(
    terminated: Machine, tmp_path: Path, cloud: Cloud, bucket: Bucket, code: str
) -> None:
    """Pictures that are no class folders, with every character in an override that a shell could
    stumble over.
    """
    bucket.put("data/no-classes/readme.txt", b"nothing to see")
    spec = make_spec(
        "data=folder",
        "data.root=no-classes",
        """hydra.help.footer='$(touch /opt/dlami/nvme/pwned) `id` \\"* é'""",
        run="failing",
        code=code,
    )
    machine = Machine(
        tmp_path / "machine", ec2_request.user_data(spec), cloud.url, terminated.nvme
    ).wait()
    assert machine.shutdowns == ["-h +480", "-h now"]
    log = bucket.text("runs/failing/log.txt")
    assert bucket.outcome("failing") == {"attempt": 1, "code": MISTAKE, "reason": "failed"}, log
    assert "/opt/dlami/nvme/data/no-classes/train" in log
    assert (machine.nvme / "data/no-classes/readme.txt").exists() and not (
        machine.nvme / "pwned"
    ).exists()


@pytest.mark.parametrize(("run", "fault"), [("missing", "404"), ("wrong", "did NOT match")])
def test_no_code(run: str, fault: str, broken: dict[str, Machine], bucket: Bucket) -> None:
    """What earlier attempts have saved stays."""
    assert broken[run].wait().shutdowns == ["-h +480", "-h now"]
    assert bucket.outcome(run, 2) == {"attempt": 2, "code": 1, "reason": "failed"}
    log = bucket.text(f"runs/{run}/log.txt")
    assert log.startswith("the first attempt\n") and fault in log
    assert bucket.keys(f"runs/{run}/checkpoints/") == {"step-00000001/manifest.json"}
    assert broken[run].console.read_text().endswith("attempt 2 ended: failed, exit code 1\n")


def test_the_time_limit(broken: dict[str, Machine], bucket: Bucket) -> None:
    """It holds for whatever takes too long, even where that doesn't listen."""
    assert broken["limited"].wait().shutdowns == ["-h +1", "-h now"]
    assert bucket.outcome("limited") == {
        "attempt": 1,
        "code": 128 + signal.SIGKILL,
        "reason": "time limit",
    }
    assert "stopping: time limit" in bucket.text("runs/limited/log.txt")


def test_it_stops_when_asked(broken: dict[str, Machine], bucket: Bucket) -> None:
    assert broken["unwanted"].wait().shutdowns == ["-h +480", "-h now"]
    assert bucket.outcome("unwanted") == {
        "attempt": 1,
        "code": 128 + signal.SIGTERM,
        "reason": "asked to stop",
    }
    assert "stopping: asked to stop" in bucket.text("runs/unwanted/log.txt")


def test_with_a_full_disk_it_still_says_how_it_ended(
    broken: dict[str, Machine], bucket: Bucket
) -> None:
    """No line of its log was written."""
    assert broken["full"].wait().shutdowns == ["-h +480", "-h now"]
    outcome = bucket.outcome("full")
    assert (outcome["attempt"], outcome["reason"]) == (1, "failed") and outcome["code"]
    assert bucket.text("runs/full/log.txt") == ""
    assert "No space left on device" in broken["full"].console.read_text()


def test_without_s3_it_still_shuts_down(broken: dict[str, Machine]) -> None:
    """What is known of it stays on the console."""
    assert broken["unconnected"].wait().shutdowns == ["-h +480", "-h now"]
    assert "Could not connect" in broken["unconnected"].console.read_text()


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ("twin", "another machine has this attempt"),
        ("older", "attempt 2 has taken over"),
        ("over", "has ended before"),
    ],
)
def test_a_machine_that_is_not_the_runs_leaves_it_alone(
    run: str, why: str, broken: dict[str, Machine], bucket: Bucket
) -> None:
    assert broken[run].wait().shutdowns == ["-h +480", "-h now"]
    assert why in broken[run].console.read_text()
    assert bucket.keys(f"runs/{run}/checkpoints/") == {"step-00000001/manifest.json"}
    assert not [key for key in bucket.keys(f"runs/{run}/") if key in ("log.txt", "output/")]
    assert run == "over" or "1.json" not in bucket.keys(f"runs/{run}/attempts/")


@pytest.fixture
def setting_up(
    tmp_path: Path, cloud: Cloud, code: str, endless: Path, request: pytest.FixtureRequest
) -> Machine:
    """A machine that is at its set-up; its run is named by the test."""
    script = ec2_request.user_data(make_spec(run=request.param, code=code), upload_every=2)
    machine = Machine(tmp_path / "machine", script, cloud.url, PYTHON=str(endless))
    reaches_set_up(machine)
    return machine


def reaches_set_up(machine: Machine, times: int = 1) -> None:
    assert wait_for(
        lambda: machine.log.exists() and machine.log.read_text().count("setting up") == times, 300
    ), machine.log.read_text()


@pytest.mark.parametrize("setting_up", ["taken-over"], indirect=True)
def test_a_newer_attempt_takes_over_while_this_one_runs(
    setting_up: Machine, bucket: Bucket
) -> None:
    bucket.put("runs/taken-over/attempts/2.request.json", b"{}")
    assert setting_up.wait().shutdowns == ["-h +480", "-h now"]
    assert "1.json" not in bucket.keys("runs/taken-over/attempts/")


@pytest.mark.parametrize("setting_up", ["reclaimed"], indirect=True)
def test_a_spot_notice_is_told_as_the_reason(
    setting_up: Machine, bucket: Bucket, metadata: Any
) -> None:
    """Also when the system ends the script before there is anything to save."""
    setting_up.cut_off()
    metadata.notices = frozenset({"spot/instance-action"})
    address = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
    setting_up.boot_again(**{address: os.environ[address]})
    reaches_set_up(setting_up, 2)
    os.kill(setting_up.script(), signal.SIGTERM)
    assert setting_up.wait().shutdowns[-1] == "-h now"
    assert bucket.outcome("reclaimed") == {
        "attempt": 1,
        "code": 128 + signal.SIGTERM,
        "reason": "spot notice",
    }


@pytest.mark.parametrize("setting_up", ["rebooted"], indirect=True)
def test_a_reboot_loses_neither_the_run_nor_its_deadline(
    setting_up: Machine, bucket: Bucket
) -> None:
    """First one in order, then one after the limit."""
    machine = setting_up
    machine.program("systemctl", "echo 1234 reboot.target start waiting")
    os.kill(machine.script(), signal.SIGTERM)
    assert machine.wait().shutdowns == ["-h +480"]
    assert "1.json" not in bucket.keys("runs/rebooted/attempts/"), "it has not ended"
    (machine.root / "bin" / "systemctl").unlink()

    deadline = machine.lib / "packhorse" / "deadline"
    deadline.write_text(str(int(deadline.read_text()) - 4 * 3600))
    machine.boot_again()
    reaches_set_up(machine, 2)
    machine.cut_off()
    [armed] = (machine.root / "shutdowns").read_text().splitlines()
    assert 0 < int(armed.removeprefix("-h +")) <= 4 * 60, "what is left of the limit"

    deadline.write_text("1000")
    assert machine.boot_again().wait().shutdowns == ["-h +1", "-h now"]
    assert bucket.outcome("rebooted") == {"attempt": 1, "code": RESUME, "reason": "time limit"}
    assert machine.log.read_text().count("setting up") == 2


@pytest.mark.parametrize("run", ["two-gpus", "two-gpus-failing"])
def test_every_gpu_trains(
    run: str, terminated: Machine, tmp_path: Path, cloud: Cloud, bucket: Bucket, code: str
) -> None:
    """The code is the trainer's own, which torchrun does not keep."""
    fails = run == "two-gpus-failing"
    bucket.put("data/no-classes/readme.txt", b"nothing to see")
    settings = ["data=folder", "data.root=no-classes"] if fails else ["train.epochs=1"]
    spec = make_spec(*TINY, *settings, run=run, code=code)
    path = tmp_path / "machine"
    smi = tmp_path / "smi"
    smi.mkdir()
    (smi / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-0)'\necho 'GPU 1: Tesla T4 (UUID: GPU-1)'\n"
    )
    (smi / "nvidia-smi").chmod(0o755)
    with_smi = f"{path}/bin:{smi}:{BIN}:{os.environ['PATH']}"
    machine = Machine(
        path, ec2_request.user_data(spec), cloud.url, terminated.nvme, PATH=with_smi
    ).wait()
    log = bucket.text(f"runs/{run}/log.txt")
    assert machine.shutdowns == ["-h +480", "-h now"] and "training in 2 processes" in log
    expected = {"code": MISTAKE, "reason": "failed"} if fails else {"code": OK, "reason": "done"}
    assert bucket.outcome(run) == {"attempt": 1} | expected, log


def test_in_a_closed_network_it_installs_from_the_bucket_by_hash_alone(
    tmp_path: Path, cloud: Cloud, bucket: Bucket
) -> None:
    """A wheel that somebody has changed there is not installed, and nothing is trained with it."""
    wheel = tmp_path / "closed-1.0-py3-none-any.whl"
    info = "closed-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: closed\nVersion: 1.0\n")
        kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        packed.writestr(f"{info}/WHEEL", kind)
        packed.writestr(f"{info}/RECORD", "")
    tarball = source.build(lock=wheelhouse.lock_of(tmp_path))
    digest = hashlib.sha256(tarball).hexdigest()
    bucket.put(f"source/{digest}.tar.gz", tarball)
    bucket.put(f"data/wheels-good/{wheel.name}", wheel.read_bytes())
    bucket.put(f"data/wheels-changed/{wheel.name}", wheel.read_bytes() + b"another's")
    # An index that would never answer, as from a closed network.
    nowhere = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    machines = {}
    for wheels in ("good", "changed"):
        spec = make_spec(*TINY, "train.epochs=1", run=wheels, code=digest)
        script = ec2_request.user_data(dataclasses.replace(spec, wheels=f"wheels-{wheels}"))
        machines[wheels] = Machine(tmp_path / wheels, script, cloud.url, **nowhere)
    for wheels, machine in machines.items():
        assert machine.wait().shutdowns == ["-h +480", "-h now"]
        log = bucket.text(f"runs/{wheels}/log.txt")
        assert "1 packages from /opt/dlami/nvme/wheels, each by its hash" in log
        ended = {"good": (OK, "done"), "changed": (1, "failed")}[wheels]
        code, reason = ended
        assert bucket.outcome(wheels) == {"attempt": 1, "code": code, "reason": reason}, log
        assert ("DO NOT MATCH THE HASHES" in log) is (wheels == "changed")


@pytest.fixture
def metadata_of() -> Iterator[Callable[[int], Any]]:
    """Makes the metadata service of one of several machines; it returns its handler."""
    servers = []

    def make(index: int, group: str = "r-one") -> Any:
        said = {
            "ami-launch-index": str(index),
            "reservation-id": group,
            "local-ipv4": "127.0.0.1",
        }
        handler = type("Handler", (Metadata,), {"answers": said})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        handler.url = f"http://127.0.0.1:{server.server_port}"
        return handler

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def pair(
    root: Path, script: str, cloud: Cloud, services: list[Any], *more: dict[str, str], **given: Any
) -> list[Machine]:
    """Two machines of one request. more: of the environment of each."""
    each = more or ({}, {})
    return [
        Machine(
            root / str(number),
            script,
            cloud.url,
            **given,
            AWS_EC2_METADATA_SERVICE_ENDPOINT=service.url,
            **each[number],
        )
        for number, service in enumerate(services)
    ]


def weights_in(package: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        file = archive.extractfile("model.safetensors")
        assert file is not None
        return file.read()


def test_two_machines_train_one_run_until_one_is_taken_back(
    tmp_path: Path,
    cloud: Cloud,
    bucket: Bucket,
    code: str,
    metadata_of: Callable[[int], Any],
) -> None:
    """The first one has the run; both end when the second one is reclaimed, and both go on.

    To the very weights of a run that nobody has ended.
    """
    prepared = None
    for attempt in (1, 2):
        spec = make_spec(
            *TINY, "checkpoint.max_cost=1", run="pair", code=code, instances=2, attempt=attempt
        )
        services = [metadata_of(0), metadata_of(1)]
        script = ec2_request.user_data(spec, upload_every=2)
        root = tmp_path / str(attempt)
        first, second = pair(root, script, cloud, services, prepared=prepared)
        if attempt == 1:
            assert wait_for(
                lambda log=first.log: log.exists() and "metrics: epoch=1 " in log.read_text()
            ), first.console.read_text()
            services[1].notices = frozenset({"spot/instance-action"})
        for machine in (first, second):
            assert machine.wait().shutdowns == ["-h +480", "-h now"], "nothing is left"
        prepared = first.nvme
        log = first.log.read_text()
        said = [
            json.loads(bucket.text(f"runs/pair/attempts/{attempt}{number}.json"))["reason"]
            for number in ("", ".1")
        ]
        if attempt == 1:
            assert said == ["interrupted", "spot notice"], log
        else:
            assert said == ["done", "done"], log
            assert "resumed from" in log
        assert "training on 2 machines, of which this is number 1" in log
        assert "2 on 2 hosts" in log, log
    assert "result.json" in bucket.keys("runs/pair/output/")
    # What two processes make of the same that nobody ends.
    command = [sys.executable, "-m", "trainer.distributed.torchrun", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "trainer", *TINY, "name=pair", "platform=local"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = (tmp_path / "runs/pair/model.tar.gz").read_bytes()
    reclaimed = bucket.client.get_object(Bucket=bucket.name, Key="runs/pair/output/model.tar.gz")
    assert weights_in(reclaimed["Body"].read()) == weights_in(whole)
    assert "of which this is number 2" in bucket.text("runs/pair/log.1.txt")
    assert not (second.nvme / "runs/pair").exists(), "the run is the first one's"


def test_one_of_two_that_fails_ends_the_other_before_it_trains(
    tmp_path: Path,
    cloud: Cloud,
    bucket: Bucket,
    code: str,
    endless: Path,
    metadata_of: Callable[[int], Any],
) -> None:
    script = ec2_request.user_data(make_spec(run="half", code=code, instances=2), upload_every=2)
    pythons = ({"PYTHON": str(endless)}, {"PYTHON": "/nowhere"})
    machines = pair(tmp_path, script, cloud, [metadata_of(0), metadata_of(1)], *pythons)
    for machine in machines:
        assert machine.wait().shutdowns == ["-h +480", "-h now"]
    assert bucket.outcome("half")["reason"] == "another machine has ended"
    assert json.loads(bucket.text("runs/half/attempts/1.1.json"))["reason"] == "failed"


def test_a_machine_of_another_request_leaves_the_run_alone(
    tmp_path: Path,
    cloud: Cloud,
    bucket: Bucket,
    code: str,
    metadata_of: Callable[..., Any],
) -> None:
    bucket.put("runs/rival/attempts/1.machine", b"i-0 r-one 127.0.0.1\n")
    script = ec2_request.user_data(make_spec(run="rival", code=code, instances=2))
    services = [metadata_of(0, "r-two"), metadata_of(1, "r-two")]
    for machine in pair(tmp_path, script, cloud, services):
        assert machine.wait().shutdowns == ["-h +480", "-h now"]
        assert "another machine has this attempt" in machine.console.read_text()
    assert bucket.keys("runs/rival/") == {"attempts/1.machine"}
