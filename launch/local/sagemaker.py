"""A training job as SageMaker would run it, on this machine.

Each host has an /opt/ml and runs AWS's own toolkit; the results are kept. If the machine allows it
(root, or user namespaces), each host has a mount, host-name and process namespace with its own
/opt/ml, and all share a network that reaches nothing else. Otherwise they are plain processes, with
SAGEMAKER_BASE_DIR instead of /opt/ml. DIR/s3/BUCKET takes the place of S3, so the next rehearsal of
a stopped run continues from its checkpoints.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launch.cloud import hyperparameters as codec
from launch.local.container_entry import FAILURE_CHARACTERS
from launch.targets.sagemaker import preferred_machine

GRACE = 120  # seconds between SIGTERM and SIGKILL of a stopped job, as SageMaker's
LINGER = 60  # seconds for the other hosts to notice that one has failed
OUTSIDE = ("--mount", "--net", "--uts")  # namespaces that all hosts share
# Namespaces of each host.
HOST = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# How a host enters its namespaces: $1 its tree, $2 its /etc/hosts, $3 its name, then the command.
ENTER = (
    'mount --bind "$1" /opt/ml && mount --bind "$2" /etc/hosts'
    ' && echo "$3" > /proc/sys/kernel/hostname && shift 3 && exec "$@"'
)
INSIDE = "PACKHORSE_REHEARSAL"  # set inside the namespaces of OUTSIDE
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h
GROUP = "homogeneousCluster"  # SageMaker's name for the machines of a job that are all of one type

# Environment variables of AWS's PyTorch image.
IMAGE = {"SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main"}
# pip only checks what is installed: a rehearsal must not change this Python.
DRY_PIP = {
    "PIP_DRY_RUN": "1",
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "rehearsal",
    "AWS_SECRET_ACCESS_KEY": "rehearsal",
    "AWS_EC2_METADATA_DISABLED": "true",
}
PASSED_ON = ("LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class TrainingJob:
    """The training job of a request, or of a tuning job's trial."""

    name: str
    hyperparameters: dict[str, str]
    definition: dict[str, Any]  # of CreateTrainingJob, or of TrainingJobDefinition
    region: str

    @property
    def instances(self) -> int:
        return int(preferred_machine(self.definition)["InstanceCount"])

    @property
    def command(self) -> list[str]:
        """The command that the container starts.

        AWS's image starts `train` from a shell that doesn't forward SIGTERM.
        """
        algorithm = self.definition["AlgorithmSpecification"]
        return [
            *algorithm.get("ContainerEntrypoint", ["bash", "-c"]),
            *algorithm.get("ContainerArguments", ["train; exit $?"]),
        ]

    @property
    def metrics(self) -> list[dict[str, str]]:
        """The names and regular expressions by which SageMaker scrapes the log."""
        definitions: list[dict[str, str]]
        definitions = self.definition["AlgorithmSpecification"]["MetricDefinitions"]
        return definitions


@dataclass
class Outcome:
    """What SageMaker would show of a job."""

    codes: list[int]  # of each host
    stopped: bool
    resumed: bool  # it began from an earlier rehearsal's checkpoints
    seconds: float
    failure: str | None  # FailureReason
    log: list[str]
    metrics: dict[str, list[float]]  # by name, as the request's regexes find them in the log
    # The files in model.tar.gz and output.tar.gz.
    archives: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Host:
    """One machine of a job. tree: its /opt/ml."""

    name: str
    tree: Path

    @property
    def checkpoints(self) -> Path:
        return self.tree / "checkpoints"


class LocalSageMaker:
    """This machine instead of SageMaker.

    directory: for S3 and the hosts. isolated: whether to use namespaces.
    """

    def __init__(self, directory: Path, isolated: bool) -> None:
        self.directory, self.isolated = directory, isolated
        self.s3 = directory / "s3"
        self._containers: list[subprocess.Popen[bytes]] = []
        self._stop_at: float | None = None
        directory.mkdir(parents=True, exist_ok=True)
        if isolated:
            _bring_up_loopback()
            _make_mount_point(directory)
            _hide_checkout()

    def local(self, uri: str) -> Path:
        """Return the local path of an S3 URI."""
        return self.s3 / uri.removeprefix("s3://")

    def upload(self, uri: str, data: bytes) -> None:
        """Write an object of the local S3."""
        self.local(uri).parent.mkdir(parents=True, exist_ok=True)
        self.local(uri).write_bytes(data)

    def run(self, job: TrainingJob, channels: dict[str, Path]) -> Outcome:
        """Run a job to its end. channels: the folder of each channel's data."""
        started = time.monotonic()
        names = [_address(number) for number in range(job.instances)]
        if self.isolated:
            names = [f"algo-{number}" for number in range(1, job.instances + 1)]
        hosts = [Host(name, self.directory / job.name / name) for name in names]
        for host in hosts:
            self._make_tree(job, host, names, channels)
        resumed = any(hosts[0].checkpoints.glob("step-*"))
        lines: list[str] = []
        readers = []
        with _served(self.s3) as endpoint:
            for host in hosts:
                container = self._start(job, host, names, endpoint)
                self._containers.append(container)
                prefix = f"{host.name} | " if len(hosts) > 1 else ""
                readers.append(threading.Thread(target=_read, args=(container, prefix, lines)))
            for reader in readers:
                reader.start()
            codes = self._wait()
            for reader in readers:
                reader.join()
        (self.directory / "log.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace"
        )
        outcome = Outcome(
            codes,
            stopped=self._stop_at is not None,
            resumed=resumed,
            seconds=time.monotonic() - started,
            failure=_failure(hosts) if any(codes) else None,
            log=lines,
            metrics=scrape(lines, job.metrics),
        )
        outcome.warnings += self._save_checkpoints(job, hosts, complete=not any(codes))
        for archive, folder in {"model.tar.gz": "model", "output.tar.gz": "output/data"}.items():
            outcome.archives[archive], warnings = self._pack(job, hosts, archive, folder)
            outcome.warnings += warnings
        outcome.warnings += self._lost(job, hosts)
        return outcome

    def stop(self, *_: object) -> None:
        """Stop the job as StopTrainingJob does.

        Send SIGTERM to each container's first process, and SIGKILL after the grace period.
        """
        self._stop_at = self._stop_at or time.monotonic()
        for container in self._containers:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
                os.kill(self._first_process(container), signal.SIGTERM)

    def _first_process(self, container: "subprocess.Popen[bytes]") -> int:
        if not self.isolated:
            return container.pid
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
        return int(children.read_text().split()[0])

    def _wait(self) -> list[int]:
        try:
            until = math.inf
            while time.monotonic() < until:
                ended = [container.poll() for container in self._containers]
                if None not in ended:
                    break
                if self._stop_at is not None:
                    until = self._stop_at + GRACE
                elif any(ended):  # the first failing host fails the job
                    until = min(until, time.monotonic() + LINGER)
                time.sleep(0.02)
        finally:
            for container in self._containers:
                _kill(container)
        codes = [container.wait() for container in self._containers]
        self._containers = []
        return codes

    def _make_tree(
        self, job: TrainingJob, host: Host, names: list[str], channels: dict[str, Path]
    ) -> None:
        """Make a host's fresh /opt/ml, with the files that SageMaker puts there."""
        tree = host.tree
        shutil.rmtree(tree, ignore_errors=True)
        for name in ("code", "input/config", "input/data", "model", "output/data", "home"):
            (tree / name).mkdir(parents=True)
        kind = preferred_machine(job.definition)["InstanceType"]
        mode = {
            "TrainingInputMode": "File",
            "S3DistributionType": "FullyReplicated",
            "RecordWrapperType": "None",
        }
        group = {"instance_group_name": GROUP, "instance_type": kind, "hosts": names}
        facts = {
            "hyperparameters": job.hyperparameters,
            "inputdataconfig": {
                channel["ChannelName"]: mode
                for channel in job.definition.get("InputDataConfig", [])
            },
            "resourceconfig": {
                "current_host": host.name,
                "hosts": names,
                "current_instance_type": kind,
                "current_group_name": GROUP,
                "instance_groups": [group],
                "network_interface_name": "lo",
            },
        }
        for name, content in facts.items():
            (tree / f"input/config/{name}.json").write_text(json.dumps(content))
        for name, folder in channels.items():
            (tree / "input/data" / name).symlink_to(folder.resolve())
        saved = self.local(job.definition["CheckpointConfig"]["S3Uri"])
        if saved.is_dir():
            shutil.copytree(saved, host.checkpoints)
        else:
            host.checkpoints.mkdir()

    def _start(
        self, job: TrainingJob, host: Host, names: list[str], endpoint: str
    ) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= IMAGE | DRY_PIP | CREDENTIALS | job.definition["Environment"]
        environment |= {
            "AWS_REGION": job.region,
            "AWS_DEFAULT_REGION": job.region,
            "S3_ENDPOINT_URL": endpoint,
            "TRAINING_JOB_NAME": job.name,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(host.tree / "home"),
            "TORCH_HOME": os.environ.get("TORCH_HOME", str(Path.home() / ".cache/torch")),
        }
        command = job.command
        if self.isolated:
            addresses = self.directory / "hosts"
            lines = [f"{_address(number)} {name}\n" for number, name in enumerate(names)]
            addresses.write_text("127.0.0.1 localhost\n" + "".join(lines))
            enter = ["bash", "-c", ENTER, "host", str(host.tree), str(addresses), host.name]
            command = ["unshare", *HOST, *enter, *command]
        else:
            environment["SAGEMAKER_BASE_DIR"] = str(host.tree)
            environment["PACKHORSE_CHECKPOINTS"] = str(host.checkpoints)
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _save_checkpoints(self, job: TrainingJob, hosts: list[Host], complete: bool) -> list[str]:
        """Keep the first host's checkpoints, and delete removed ones; return what is wrong.

        After a complete job keep none, so the next rehearsal starts from the beginning.
        """
        saved = self.local(job.definition["CheckpointConfig"]["S3Uri"])
        before = {path.relative_to(saved) for path in saved.rglob("*")}
        warnings = []
        for host in hosts[1:]:
            for path in _files(host.checkpoints):
                if path.relative_to(host.checkpoints) not in before:
                    warnings.append(
                        f"{host.name} writes checkpoints too ({path.name}): "
                        "all hosts share one prefix; let only rank 0 write them"
                    )
                    break
        shutil.rmtree(saved, ignore_errors=True)
        if not complete:
            shutil.copytree(hosts[0].checkpoints, saved)
        return warnings

    def _pack(
        self, job: TrainingJob, hosts: list[Host], archive: str, folder: str
    ) -> tuple[list[str], list[str]]:
        """Write an archive of all hosts' files; return its names, and what is wrong."""
        output = self.local(job.definition["OutputDataConfig"]["S3OutputPath"])
        output = output / job.name / "output"
        output.mkdir(parents=True, exist_ok=True)
        files: dict[str, Path] = {}
        warnings: list[str] = []
        for host in hosts:
            for path in _files(host.tree / folder):
                name = path.relative_to(host.tree / folder).as_posix()
                if name in files and not warnings:
                    warnings.append(
                        f"several hosts write the same files for {archive}: one overwrites the "
                        "other; let only rank 0 write them"
                    )
                files[name] = path
        with tarfile.open(output / archive, "w:gz", compresslevel=1) as tar:
            for name, path in files.items():
                tar.add(path, name)
        return sorted(files), warnings

    def _lost(self, job: TrainingJob, hosts: list[Host]) -> list[str]:
        """Return a line for each file that a job wrote where it will be lost."""
        source = codec.decode_value(job.hyperparameters["sagemaker_submit_directory"])
        with tarfile.open(self.local(source)) as tar:
            shipped = set(tar.getnames())
        return [
            f"{path.relative_to(host.tree)} lies outside /opt/ml's model, output/data and "
            "checkpoints: lost when the job ends; leave platform.* as it is"
            for host in hosts
            for path in strays(host.tree, shipped)
        ]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _failure(hosts: list[Host]) -> str | None:
    """Return the failure reason of the first host that failed."""
    for host in hosts:
        path = host.tree / "output/failure"
        if path.exists():
            return path.read_text(errors="replace")[:FAILURE_CHARACTERS]
    return None


def strays(tree: Path, shipped: set[str]) -> list[Path]:
    """Return up to three files that a job left in its home, or beside the shipped code."""
    lost = []
    for path in sorted(_files(tree / "home") + _files(tree / "code")):
        parts = path.relative_to(tree).parts
        cache = any(part.startswith(".") or part == "__pycache__" for part in parts)
        # The demo's pictures: the trainer writes them itself.
        images = parts[:2] == ("code", "data")
        if not cache and not images and "/".join(parts[1:]) not in shipped:
            lost.append(path)
    return lost[:3]


def scrape(lines: Sequence[str], definitions: list[dict[str, str]]) -> dict[str, list[float]]:
    """Return the values that the regexes of MetricDefinitions find in a log, by name."""
    values: dict[str, list[float]] = {}
    for definition in definitions:
        for line in lines:
            if match := re.search(definition["Regex"], line):
                values.setdefault(definition["Name"], []).append(float(match[1]))
    return values


def namespaces() -> list[str] | None:
    """Return the options with which `unshare` works on this machine, if any."""
    attempt = "mount -t tmpfs none /opt && echo a > /proc/sys/kernel/hostname"
    for user in ([], ["--user", "--map-root-user"]):
        outside = [*user, *OUTSIDE]
        probe = ["unshare", *outside, "unshare", *HOST, "bash", "-c", attempt]
        with contextlib.suppress(OSError):
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return outside
    return None


def _address(number: int) -> str:
    return f"127.0.0.{number + 1}"


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def _make_mount_point(directory: Path) -> None:
    """Make /opt/ml without writing to this machine's /opt.

    Mount a file system in memory over it, which shows the original content.
    """
    if Path("/opt/ml").is_dir():
        return
    real = directory / "opt"
    real.mkdir(exist_ok=True)
    subprocess.run(["mount", "--rbind", "/opt", str(real)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/opt"], check=True)
    for entry in real.iterdir():
        shown = Path("/opt", entry.name)
        if entry.is_dir():
            shown.mkdir()
        else:
            shown.touch()
        subprocess.run(["mount", "--rbind", str(entry), str(shown)], check=True)
    Path("/opt/ml").mkdir()


def _hide_checkout() -> None:
    """Hide an editable install of the project, which a container does not have.

    Otherwise its import hook would replace files that are missing in the tarball.
    """
    for hook in Path(sysconfig.get_path("purelib")).glob("__editable__.packhorse-*.pth"):
        subprocess.run(["mount", "--bind", "/dev/null", str(hook)], check=True)


@contextlib.contextmanager
def _served(directory: Path) -> Iterator[str]:
    """Serve a directory's files as a read-only S3 endpoint on the loopback."""
    directory.mkdir(exist_ok=True)
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _read(container: "subprocess.Popen[bytes]", prefix: str, lines: list[str]) -> None:
    assert container.stdout is not None
    with container.stdout as output:
        for raw in output:
            line = prefix + raw.decode(errors="replace").rstrip("\n")
            lines.append(line)
            print(line, flush=True)


def _kill(container: "subprocess.Popen[bytes]") -> None:
    """Kill a container and everything in it.

    Its processes are all those in its session.
    """
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == container.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    container.kill()
