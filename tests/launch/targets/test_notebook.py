"""The notebook's requests as data, and its scripts: linted, and the auto-stop run against moto and
a Jupyter of canned answers.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launch.cloud import request
from launch.targets import notebook
from launch.targets.base import Spec
from launch.targets.spec import load_config, load_target, run_id

BIN = Path(sys.executable).parent
IDLE = Path(notebook.__file__).with_name("notebook_idle.py")


def make_spec(**settings: object) -> Spec:
    target = load_target(
        ["target=notebook", *(f"target.{key}={value}" for key, value in settings.items())]
    )
    config, name = load_config(target, [])
    return Spec(
        target,
        config,
        (),
        run_id(target, config, name, ()),
        "123456789012",
        "us-east-1",
        name,
        "5e" * 32,
        None,
    )


def scripts(spec: Spec) -> dict[str, str]:
    made = notebook.lifecycle_config(spec)
    request.check(made)
    return {
        when: base64.b64decode(made.parameters[when][0]["Content"]).decode()
        for when in ("OnCreate", "OnStart")
    }


def test_the_notebook() -> None:
    spec = make_spec(disk_gb=30)
    made = notebook.notebook_instance(spec)
    request.check(made)
    assert made.parameters == {
        "NotebookInstanceName": "packhorse-notebook-1",
        "InstanceType": "ml.t3.medium",
        "RoleArn": "arn:aws:iam::123456789012:role/packhorse-notebook-us-east-1",
        "LifecycleConfigName": notebook.lifecycle_config(spec).parameters[
            "NotebookInstanceLifecycleConfigName"
        ],
        "VolumeSizeInGB": 30,
        "PlatformIdentifier": "notebook-al2023-v2",
        "DirectInternetAccess": "Enabled",
        "RootAccess": "Disabled",
        "InstanceMetadataServiceConfiguration": {"MinimumInstanceMetadataServiceVersion": "2"},
        "Tags": [{"Key": "project", "Value": "packhorse"}, {"Key": "run", "Value": "notebook"}],
    }


@pytest.mark.parametrize("repository", ["null", "https://example.org/packhorse.git"])
def test_the_scripts_are_clean(repository: str) -> None:
    for when, script in scripts(make_spec(repository=repository)).items():
        checked = subprocess.run(
            [BIN / "shellcheck", "-"], input=script, capture_output=True, text=True
        )
        assert checked.returncode == 0, f"{when}: {checked.stdout}"


def test_where_the_project_comes_from() -> None:
    assert "repository=''\n" in scripts(make_spec())["OnCreate"]
    assert (
        f"source_uri=s3://packhorse-123456789012-us-east-1/source/{'5e' * 32}.tar.gz\n"
        in scripts(make_spec())["OnCreate"]
    )
    assert "repository='; touch x'\n" in notebook.on_create(make_spec(repository="'; touch x'"))


def test_the_auto_stop_is_in_the_script_whole() -> None:
    script = scripts(make_spec(idle_minutes=30))["OnStart"]
    assert "idle_minutes=30\n" in script and f"<<'PYTHON'\n{IDLE.read_text()}PYTHON\n" in script
    assert "PYTHON\n" not in IDLE.read_text()


# --- the auto-stop ---


class Jupyter(BaseHTTPRequestHandler):
    answers: dict[str, list[dict[str, str]]]

    def do_GET(self) -> None:
        body = json.dumps(self.answers[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """SageMaker's side: what is asked of AWS."""
        self.calls.append(
            (
                self.headers["X-Amz-Target"],
                json.loads(self.rfile.read(int(self.headers["Content-Length"]))),
            )
        )
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def jupyter():
    handler = type(
        "Handler", (Jupyter,), {"answers": {"/api/kernels": [], "/api/terminals": []}, "calls": []}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def look(address: str, note: Path) -> subprocess.CompletedProcess[str]:
    """One look at a notebook that may be idle for 60 minutes."""
    aws = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}"} | aws
    return subprocess.run(
        [sys.executable, "-I", IDLE, address, note, "a-notebook", "60"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def at(minutes_ago: float) -> str:
    """As Jupyter writes it."""
    return (
        datetime.fromtimestamp(time.time() - 60 * minutes_ago, UTC)
        .isoformat()
        .replace("+00:00", "Z")
    )


@pytest.mark.parametrize(
    ("kernels", "terminals", "noted", "stops"),
    [
        ([("idle", 70)], [], 90, True),
        ([("idle", 70), ("idle", 30)], [], 90, False),
        ([("busy", 70)], [], 90, False),
        ([], [10], 90, False),
        ([], [], None, False),  # just started
        ([], [], 61, True),
        ([], [], 30, False),  # what was open has been closed since
    ],
)
def test_idle(kernels, terminals, noted, stops, jupyter, tmp_path: Path) -> None:
    """kernels: (state, minutes ago); terminals and noted: minutes ago. Counted from now on."""
    began = time.time()
    jupyter.answers["/api/kernels"] = [
        {"execution_state": state, "last_activity": at(ago)} for state, ago in kernels
    ]
    jupyter.answers["/api/terminals"] = [{"last_activity": at(ago)} for ago in terminals]
    note = tmp_path / "note"
    if noted is not None:
        note.write_text(str(time.time() - 60 * noted))
    looked = look(jupyter.address, note)
    assert looked.returncode == 0, looked.stderr
    assert jupyter.calls == (
        [("SageMaker.StopNotebookInstance", {"NotebookInstanceName": "a-notebook"})]
        if stops
        else []
    )
    assert began - 60 * 91 < float(note.read_text()) <= time.time()


def test_a_silent_jupyter_is_no_idle_one(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("0")
    looked = look("http://127.0.0.1:9", tmp_path / "note")
    assert looked.returncode != 0 and "refused" in looked.stderr
