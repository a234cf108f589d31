"""The same package in every adapter: our server, AWS's PyTorch toolkit, Ray Serve, and Lambda.

TorchServe, the toolkit and Ray are the real ones, in an environment of their own that `make doors`
makes; without it those tests are skipped. The variable DOORS names another one.
"""

import json
import os
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serving.adapters import lambda_inside, toolkit
from tests.conftest import PROJECT, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.long  # TorchServe, Ray and Java start

DOORS = Path(os.environ.get("DOORS", PROJECT / ".venv-doors")) / "bin"
installed = pytest.mark.skipif(
    not (DOORS / "python").exists(), reason="TorchServe and Ray are not installed: make doors"
)


ANSWER = {"labels", "set", "sure", "unlike"}


@pytest.fixture(scope="module")
def golden(original) -> dict[str, bytes]:
    return {
        name: (original / "package/golden" / name).read_bytes()
        for name in ("0.jpg", "1.png", "2.webp")
    }


@pytest.fixture(scope="module")
def ours(server, golden) -> dict[str, Any]:
    """What our server answers, by picture."""
    return {name: server.invoke(file).json for name, file in golden.items()}


def test_our_server_gives_what_the_trainers_evaluation_gave(ours, expected):
    """The recorded logits are PyTorch's, of the pixels that `prepare` gives.

    Loading the package has compared the pixels, exactly.
    """
    np.testing.assert_allclose(np.concatenate([*ours.values()]), expected, rtol=0, atol=1e-5)


# --- the toolkit's four functions ---


class Context:
    status = 200

    def set_response_status(self, code: int, phrase: str) -> None:
        self.status = code


def through_toolkit(
    engine, body: bytes | str, content_type: str, accept: str = "application/json"
) -> tuple[int, Any]:
    context = Context()
    prediction = toolkit.predict_fn(toolkit.input_fn(body, content_type), engine)
    return context.status, json.loads(
        toolkit.output_fn(prediction, accept, context)
    ) if context.status == 200 else None


def test_the_four_functions_answer_as_our_server(original, golden, ours):
    engine = toolkit.model_fn(str(original / "package"))
    for name, file in golden.items():
        assert through_toolkit(engine, bytearray(file), "image/png") == (200, ours[name])
    asked = json.dumps(
        {"instances": [{"base64": b64encode(file).decode()} for file in golden.values()]}
    )  # the toolkit decodes JSON to text
    assert through_toolkit(engine, asked, "application/json")[1] == [
        row for rows in ours.values() for row in rows
    ]
    [row] = through_toolkit(
        engine, golden["0.jpg"], "image/jpeg", "application/json; output=labels"
    )[1]
    assert row.keys() == ANSWER


@pytest.mark.parametrize(
    ("body", "content_type", "accept", "status"),
    [
        (b"1,2", "text/csv", "application/json", 415),
        (b"x", "image/jpeg", "application/json", 400),
        (None, "image/jpeg", "text/html", 406),
    ],
)
def test_the_four_functions_set_an_errors_status_and_raise_nothing(
    engine, picture, body, content_type, accept, status
):
    context = Context()
    prediction = toolkit.predict_fn(
        toolkit.input_fn(picture if body is None else body, content_type), engine
    )
    assert json.loads(toolkit.output_fn(prediction, accept, context)).keys() == {
        "error",
        "request_id",
    }
    assert context.status == status


# --- real servers ---


@pytest.fixture
def run(tmp_path) -> Iterator[Callable[..., Path]]:
    """Starts a command of the servers' environment, and gives its log. The test's end ends it."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str, **environment: str) -> Path:
        log = tmp_path / "log.txt"
        clean = {
            "PATH": f"{DOORS}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": "/tmp",
        }
        with log.open("wb") as output:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=clean | environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
        return log

    yield run
    for process in started:
        os.killpg(process.pid, 15)
        try:
            process.wait(600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def ask(
    port: int, path: str, body: bytes, content_type: str, accept: str = "application/json"
) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": content_type, "Accept": accept})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, ValueError):
        return 0, None
    finally:
        connection.close()


def check_server(
    port: int, path: str, golden: dict[str, bytes], ours: dict[str, Any], log: Path
) -> None:
    assert wait_for(lambda: ask(port, path, golden["0.jpg"], "image/jpeg")[0] == 200), (
        log.read_text()[-5000:]
    )
    for name, file in golden.items():
        assert ask(port, path, file, "image/jpeg") == (200, ours[name])
    asked = json.dumps(
        {"instances": [{"base64": b64encode(file).decode()} for file in golden.values()]}
    ).encode()
    assert ask(port, path, asked, "application/json")[1] == [
        row for rows in ours.values() for row in rows
    ]
    [row] = ask(port, path, golden["0.jpg"], "image/jpeg", "application/json; output=labels")[1]
    assert row.keys() == ANSWER
    status, told = ask(port, path, b"no picture", "image/jpeg")
    assert status == 400 and told.keys() == {"error", "request_id"}


@installed
@pytest.mark.skipif(shutil.which("java") is None, reason="TorchServe needs Java")
def test_torchserve_with_awss_toolkit_answers_as_our_server(run, original, golden, ours, tmp_path):
    model = shutil.copytree(original / "package", tmp_path / "ml/model")
    (tmp_path / "store").mkdir()
    ports = [free_port() for _ in range(3)]
    script = (
        "from importlib.resources import files; "
        "package = files('sagemaker_pytorch_serving_container'); "
        "print((package / 'etc/default-ts.properties').read_text())"
    )
    defaults = subprocess.run(
        [DOORS / "python", "-c", script], capture_output=True, text=True, check=True
    ).stdout
    addresses = "\n".join(
        f"{kind}_address=http://127.0.0.1:{port}"
        for kind, port in zip(("inference", "management", "metrics"), ports, strict=True)
    )
    handler = (
        "default_workers_per_model=1\n"
        "default_service_handler=sagemaker_pytorch_serving_container.handler_service:handle"
    )
    # As the toolkit's own start_torchserve writes and starts it, but for the ports and the place of
    # the file.
    (tmp_path / "ts.properties").write_text(f"{defaults}\n{addresses}\n{handler}\n")
    command = (
        "torchserve",
        "--start",
        "--foreground",
        "--model-store",
        "store",
        "--ts-config",
        "ts.properties",
        "--models",
        f"model={model}",
    )
    log = run(
        *command,
        SAGEMAKER_BASE_DIR=str(tmp_path / "ml"),
        SAGEMAKER_PROGRAM="inference.py",
        PYTHONPATH=str(model / "code"),
    )
    check_server(ports[0], "/invocations", golden, ours, log)


@installed
def test_ray_serve_answers_as_our_server(run, original, golden, ours, tmp_path):
    """The image's adapter sends /invocations on to the application's root.

    See deep-learning-containers, scripts/ray/sagemaker_serve.py.
    """
    port = free_port()
    (tmp_path / "start.py").write_text(
        "import threading\nfrom ray import serve\n"
        f"serve.start(http_options={{'host': '127.0.0.1', 'port': {port}}})\n"
        "from serving.ray_app import app\nserve.run(app)\nthreading.Event().wait()\n"
    )
    # A copy: Python leaves what it has compiled beside the code that runs.
    package = shutil.copytree(original / "package", tmp_path / "package")
    environment = {
        "MODEL_DIR": str(package),
        "PYTHONPATH": str(package / "code"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DASHBOARD": "1",
    }
    log = run("python", "start.py", **environment)
    check_server(port, "/", golden, ours, log)


# --- inside Lambda ---


@pytest.fixture
def direct(original, monkeypatch) -> Callable[[Any], dict[str, Any]]:
    monkeypatch.setenv("MODEL_DIR", str(original / "package"))
    lambda_inside.engine.cache_clear()
    yield lambda event: lambda_inside.handler(event, SimpleNamespace(aws_request_id="request-1"))
    lambda_inside.engine.cache_clear()


def http_event(body: bytes, **headers: str) -> dict[str, Any]:
    return {
        "requestContext": {"http": {"method": "POST"}},
        "headers": headers,
        "body": b64encode(body).decode(),
        "isBase64Encoded": True,
    }


def test_lambdas_events_are_answered_as_by_our_server(direct, golden, ours):
    for name, file in golden.items():
        answer = direct({"base64": b64encode(file).decode()})
        assert (answer["statusCode"], json.loads(answer["body"]), answer["type-result"]) == (
            200,
            ours[name],
            "<class 'str'>",
        )
        assert answer["headers"]["Access-Control-Allow-Origin"] == "*"
        assert json.loads(direct(http_event(file))["body"]) == ours[name]
    labels = json.loads(
        direct(http_event(golden["0.jpg"], accept="application/json; output=labels"))["body"]
    )
    assert labels[0].keys() == ANSWER


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        "x",
        {},
        {"url": "http://127.0.0.1/"},
        {"base64": "####"},
        http_event(b"no picture"),
        http_event(b""),
    ],
)
def test_lambdas_bad_events_get_400(direct, event):
    answer = direct(event)
    assert answer["statusCode"] == 400 and json.loads(answer["body"])["request_id"] == "request-1"


def test_no_adapter_needs_its_framework_to_be_imported():
    script = (
        "import sys; from serving.adapters import lambda_inside, ray, toolkit; "
        "print(not {'ray', 'boto3', 'torch', 'starlette'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"
