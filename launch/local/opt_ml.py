"""A training job as SageMaker would run it, on this machine: /opt/ml for each host, AWS's own toolkit in it, and what becomes of the results.

Where the machine allows it (root, or user namespaces), each host has a mount, host-name and process namespace with its own /opt/ml, and all of them a
network of nothing but themselves. Elsewhere they are plain processes with SAGEMAKER_BASE_DIR in the place of /opt/ml. What S3 would hold lies in
DIR/s3/BUCKET, so the next rehearsal of a run that was stopped goes on from its checkpoints.
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

GRACE = 120  # seconds between SIGTERM and SIGKILL of a stopped job, as SageMaker's
LINGER = 60  # seconds for the other hosts to notice that one has failed
OUTSIDE = ("--mount", "--net", "--uts")  # the namespaces that all hosts share
HOST = (
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)  # those that each has for itself
INSIDE = "PACKHORSE_REHEARSAL"  # set where OUTSIDE's are made
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h
GROUP = "homogeneousCluster"  # SageMaker's name for the machines of a job that are all of one type

IMAGE = {
    "SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main"
}  # that AWS's PyTorch image brings in its environment
# pip only looks whether everything is installed: this Python is not a container's to change.
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
class Job:
    """One training job: a request's, or a trial's of a tuning job."""

    name: str
    hyperparameters: dict[str, str]
    definition: dict[str, Any]  # of CreateTrainingJob, or of TrainingJobDefinition
    region: str

    @property
    def instances(self) -> int:
        return int(self.definition["ResourceConfig"]["InstanceCount"])

    @property
    def command(self) -> list[str]:
        """What the container starts. AWS's image has `train` started by a shell that keeps SIGTERM for itself."""
        algorithm = self.definition["AlgorithmSpecification"]
        return [
            *algorithm.get("ContainerEntrypoint", ["bash", "-c"]),
            *algorithm.get("ContainerArguments", ["train; exit $?"]),
        ]


@dataclass
class Outcome:
    """What SageMaker would show of a job."""

    codes: list[int]  # of each host
    stopped: bool
    resumed: bool  # it found checkpoints of a rehearsal before it
    seconds: float
    failure: str | None  # FailureReason
    log: list[str]
    metrics: dict[
        str, list[float]
    ]  # by the request's names, as its regexes scrape them from the log
    archives: dict[str, list[str]] = field(
        default_factory=dict
    )  # model.tar.gz and output.tar.gz: the files in them
    warnings: list[str] = field(default_factory=list)


class Machine:
    """This machine in SageMaker's place. directory: holds S3 and the hosts. isolated: whether namespaces are made."""

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
        """Where an S3 URI lies."""
        return self.s3 / uri.removeprefix("s3://")

    def upload(self, uri: str, data: bytes) -> None:
        self.local(uri).parent.mkdir(parents=True, exist_ok=True)
        self.local(uri).write_bytes(data)

    def run(self, job: Job, channels: dict[str, Path]) -> Outcome:
        """Runs a job to its end. channels: the folder of each channel's data."""
        started = time.monotonic()
        hosts = (
            [f"algo-{number}" for number in range(1, job.instances + 1)]
            if self.isolated
            else [_address(n) for n in range(job.instances)]
        )
        trees = [self._tree(job, host, hosts, channels) for host in hosts]
        resumed = any((trees[0] / "checkpoints").iterdir())
        lines: list[str] = []
        with _served(self.s3) as endpoint:
            for host, tree in zip(hosts, trees, strict=True):
                self._containers.append(self._start(job, host, hosts, tree, endpoint))
            readers = [
                threading.Thread(
                    target=_read, args=(container, f"{host} | " if len(hosts) > 1 else "", lines)
                )
                for host, container in zip(hosts, self._containers, strict=True)
            ]
            for reader in readers:
                reader.start()
            codes = self._wait()
            for reader in readers:
                reader.join()
        (self.directory / "log.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace"
        )
        failures = [tree / "output/failure" for tree in trees]
        outcome = Outcome(
            codes,
            stopped=self._stop_at is not None,
            resumed=resumed,
            seconds=time.monotonic() - started,
            failure=next(
                (
                    path.read_text(errors="replace")[:FAILURE_CHARACTERS]
                    for path in failures
                    if path.exists()
                ),
                None,
            )
            if any(codes)
            else None,
            log=lines,
            metrics=scrape(lines, job.definition["AlgorithmSpecification"]["MetricDefinitions"]),
        )
        self._collect(job, trees, outcome)
        return outcome

    def stop(self, *_: object) -> None:
        """What StopTrainingJob does: SIGTERM to each container's first process, and SIGKILL when the time of grace is over."""
        self._stop_at = self._stop_at or time.monotonic()
        for container in self._containers:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
                os.kill(self._first_process(container), signal.SIGTERM)

    def _first_process(self, container: "subprocess.Popen[bytes]") -> int:
        return (
            int(Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()[0])
            if self.isolated
            else container.pid
        )

    def _wait(self) -> list[int]:
        try:
            until = math.inf
            while (
                None in (ended := [container.poll() for container in self._containers])
                and time.monotonic() < until
            ):
                if self._stop_at is not None:
                    until = self._stop_at + GRACE
                elif any(ended):  # a job fails with its first host
                    until = min(until, time.monotonic() + LINGER)
                time.sleep(0.02)
        finally:
            for container in self._containers:
                _kill(container)
        codes = [container.wait() for container in self._containers]
        self._containers = []
        return codes

    def _tree(self, job: Job, host: str, hosts: list[str], channels: dict[str, Path]) -> Path:
        """A fresh /opt/ml of one host, with what SageMaker puts there before it starts a container."""
        tree = self.directory / job.name / host
        shutil.rmtree(tree, ignore_errors=True)
        for name in ("code", "input/config", "input/data", "model", "output/data", "home"):
            (tree / name).mkdir(parents=True)
        kind = job.definition["ResourceConfig"]["InstanceType"]
        facts = {
            "hyperparameters": job.hyperparameters,
            "inputdataconfig": {
                channel["ChannelName"]: {
                    "TrainingInputMode": "File",
                    "S3DistributionType": "FullyReplicated",
                    "RecordWrapperType": "None",
                }
                for channel in job.definition.get("InputDataConfig", [])
            },
            "resourceconfig": {
                "current_host": host,
                "hosts": hosts,
                "current_instance_type": kind,
                "current_group_name": GROUP,
                "instance_groups": [
                    {"instance_group_name": GROUP, "instance_type": kind, "hosts": hosts}
                ],
                "network_interface_name": "lo",
            },
        }
        for name, content in facts.items():
            (tree / f"input/config/{name}.json").write_text(json.dumps(content))
        for name, folder in channels.items():
            (tree / "input/data" / name).symlink_to(folder.resolve())
        saved = self.local(job.definition["CheckpointConfig"]["S3Uri"])
        shutil.copytree(saved, tree / "checkpoints") if saved.is_dir() else (
            tree / "checkpoints"
        ).mkdir()
        return tree

    def _start(
        self, job: Job, host: str, hosts: list[str], tree: Path, endpoint: str
    ) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= IMAGE | DRY_PIP | CREDENTIALS | job.definition["Environment"]
        environment |= {
            "AWS_REGION": job.region,
            "AWS_DEFAULT_REGION": job.region,
            "S3_ENDPOINT_URL": endpoint,
            "TRAINING_JOB_NAME": job.name,
        }
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(tree / "home"),
        }
        environment |= {
            "TORCH_HOME": os.environ.get("TORCH_HOME", str(Path.home() / ".cache/torch"))
        }
        command = job.command
        if self.isolated:
            names = self.directory / "hosts"
            names.write_text(
                "127.0.0.1 localhost\n"
                + "".join(f"{_address(number)} {name}\n" for number, name in enumerate(hosts))
            )
            enter = 'mount --bind "$1" /opt/ml && mount --bind "$2" /etc/hosts && echo "$3" > /proc/sys/kernel/hostname && shift 3 && exec "$@"'
            command = [
                "unshare",
                *HOST,
                "bash",
                "-c",
                enter,
                "host",
                str(tree),
                str(names),
                host,
                *command,
            ]
        else:
            environment |= {
                "SAGEMAKER_BASE_DIR": str(tree),
                "PACKHORSE_CHECKPOINTS": str(tree / "checkpoints"),
            }
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _collect(self, job: Job, trees: list[Path], outcome: Outcome) -> None:
        """What S3 holds after the job: the archives of all hosts' files, and the checkpoints of the first, whose deletes count too."""
        saved = self.local(job.definition["CheckpointConfig"]["S3Uri"])
        before = {path.relative_to(saved) for path in saved.rglob("*")}
        for host in trees[1:]:
            new = [
                path
                for path in (host / "checkpoints").rglob("*")
                if path.is_file() and path.relative_to(host / "checkpoints") not in before
            ]
            if new:
                outcome.warnings.append(
                    f"{host.name} writes checkpoints too ({new[0].name}): all hosts share one prefix; let only rank 0 write them"
                )
        shutil.rmtree(saved, ignore_errors=True)
        if any(
            outcome.codes
        ):  # after a complete job there is nothing to go on from: the next rehearsal begins anew
            shutil.copytree(trees[0] / "checkpoints", saved)
        output = (
            self.local(job.definition["OutputDataConfig"]["S3OutputPath"]) / job.name / "output"
        )
        output.mkdir(parents=True, exist_ok=True)
        for archive, folder in {"model.tar.gz": "model", "output.tar.gz": "output/data"}.items():
            files = {
                path.relative_to(tree / folder).as_posix(): path
                for tree in trees
                for path in sorted((tree / folder).rglob("*"))
                if path.is_file()
            }
            if sum(
                len([path for path in (tree / folder).rglob("*") if path.is_file()])
                for tree in trees
            ) > len(files):
                outcome.warnings.append(
                    f"several hosts write the same files for {archive}: one overwrites the other; let only rank 0 write them"
                )
            with tarfile.open(output / archive, "w:gz", compresslevel=1) as tar:
                for name, path in files.items():
                    tar.add(path, name)
            outcome.archives[archive] = sorted(files)
        with tarfile.open(
            self.local(codec.decode_value(job.hyperparameters["sagemaker_submit_directory"]))
        ) as tar:
            shipped = set(tar.getnames())
        outcome.warnings += [
            f"{path.relative_to(tree)} lies outside /opt/ml's model, output/data and checkpoints: lost when the job ends; leave platform.* as it is"
            for tree in trees
            for path in strays(tree, shipped)
        ]


def strays(tree: Path, shipped: set[str]) -> list[Path]:
    """The files, three at most, that a job left where nobody keeps them: in its home, or beside the code that was shipped."""
    found = []
    for path in sorted([*(tree / "home").rglob("*"), *(tree / "code").rglob("*")]):
        parts = path.relative_to(tree).parts
        cache = any(part.startswith(".") or part == "__pycache__" for part in parts)
        pictures = parts[:2] == (
            "code",
            "data",
        )  # those that ship with the trainer: it writes them itself
        if path.is_file() and not cache and not pictures and "/".join(parts[1:]) not in shipped:
            found.append(path)
    return found[:3]


def scrape(lines: Sequence[str], definitions: list[dict[str, str]]) -> dict[str, list[float]]:
    """What the regexes of MetricDefinitions find in a log: by name, the values of its lines."""
    found: dict[str, list[float]] = {}
    for definition in definitions:
        matches = [match for line in lines if (match := re.search(definition["Regex"], line))]
        if matches:
            found[definition["Name"]] = [float(match[1]) for match in matches]
    return found


def namespaces() -> list[str] | None:
    """The options of `unshare` with which this machine gives namespaces, or None where it gives none."""
    for user in ([], ["--user", "--map-root-user"]):
        probe = [
            "unshare",
            *user,
            *OUTSIDE,
            "unshare",
            *HOST,
            "bash",
            "-c",
            "mount -t tmpfs none /opt && echo a > /proc/sys/kernel/hostname",
        ]
        with contextlib.suppress(OSError):
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return [*user, *OUTSIDE]
    return None


def _address(number: int) -> str:
    return f"127.0.0.{number + 1}"


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def _make_mount_point(directory: Path) -> None:
    """Makes /opt/ml without writing to this machine's /opt: a file system in memory over it, that shows what is there."""
    if Path("/opt/ml").is_dir():
        return
    real = directory / "opt"
    real.mkdir(exist_ok=True)
    for command in (
        ["mount", "--rbind", "/opt", str(real)],
        ["mount", "-t", "tmpfs", "none", "/opt"],
    ):
        subprocess.run(command, check=True)
    for entry in real.iterdir():
        shown = Path("/opt", entry.name)
        shown.mkdir() if entry.is_dir() else shown.touch()
        subprocess.run(["mount", "--rbind", str(entry), str(shown)], check=True)
    Path("/opt/ml").mkdir()


def _hide_checkout() -> None:
    """A container has no editable install of the project, whose import hook would fill in for what the tarball lacks."""
    for hook in Path(sysconfig.get_path("purelib")).glob("__editable__.packhorse-*.pth"):
        subprocess.run(["mount", "--bind", "/dev/null", str(hook)], check=True)


@contextlib.contextmanager
def _served(directory: Path) -> Iterator[str]:
    """An S3 endpoint of a directory's files, to read from, on the loopback."""
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
    for raw in container.stdout:
        line = prefix + raw.decode(errors="replace").rstrip("\n")
        lines.append(line)
        print(line, flush=True)


def _kill(container: "subprocess.Popen[bytes]") -> None:
    """Kills a container and everything in it: its processes are those of its session, however they are grouped."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == container.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    container.kill()
