"""The functions, as their zips hold them, under AWS's own runtime client."""

import base64
import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from serving.adapters import lambda_inside
from serving.deploy import bundle
from serving.handler import Settings
from tests.conftest import PROJECT
from tests.serving.runtime import PUBLIC, Endpoint, Function, Web, unpack

LABELS = {"labels": [{"label": "dog", "probability": 0.9}], "set": ["dog"], "sure": True}
PICTURE = b"\x89PNG\r\n\x1a\n and more"


@pytest.fixture(scope="module")
def endpoint():
    with Endpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def web():
    with Web() as web:
        web.files = {"/dog.png": PICTURE, "/large.png": bytes(6_291_457)}
        yield web


@pytest.fixture(scope="module")
def proxy_zip(tmp_path_factory):
    return unpack(bundle.proxy(), tmp_path_factory.mktemp("proxy"))


@pytest.fixture(scope="module")
def start(proxy_zip, endpoint, web, tmp_path_factory):
    started = []

    def start(**environment):
        settings = {
            "ENDPOINT_NAME": "dogs",
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.url,
            "WEB_PORT": str(web.port),
        } | environment
        log = tmp_path_factory.mktemp("log") / "log.txt"
        started.append(
            Function(
                proxy_zip,
                "lambda_function.handler",
                log,
                **{name: value for name, value in settings.items() if value},
            )
        )
        return started[-1]

    yield start
    for function in started:
        function.close()


@pytest.fixture(scope="module")
def function(start):
    return start()


@pytest.fixture(autouse=True)
def healthy(endpoint):
    endpoint.calls.clear()
    endpoint.answer = lambda: (200, b"[[0.25, -1.5]]", {})


def http_event(body, **fields):
    """As a function URL and an HTTP API send it (payload format 2.0)."""
    encoded = isinstance(body, bytes)
    return {
        "version": "2.0",
        "rawPath": "/",
        "headers": {"content-type": "application/json"},
        "requestContext": {"http": {"method": "POST", "path": "/"}},
        "body": base64.b64encode(body).decode() if encoded else body,
        "isBase64Encoded": encoded,
    } | fields


def rest_event(body, **headers):
    """As a REST API sends it (payload format 1.0)."""
    return {
        "httpMethod": "POST",
        "path": "/",
        "headers": headers,
        "requestContext": {"httpMethod": "POST"},
        "body": body,
        "isBase64Encoded": False,
    }


def error(answer):
    assert answer["headers"]["Content-Type"] == "application/json"
    body = json.loads(answer["body"])
    assert body.keys() == {"error", "request_id"} and "Traceback" not in answer["body"]
    assert body["request_id"] == answer["headers"]["X-Request-Id"]
    return answer["statusCode"], body["error"]


def refuse(status, model_status=None, message="", code=None):
    """An error as SageMaker's runtime sends it."""
    body = (
        {"Message": message, "OriginalStatusCode": model_status, "OriginalMessage": message}
        if model_status
        else {"Message": message}
    )
    return lambda: (status, json.dumps(body).encode(), {"x_amzn_ErrorType": code or "ModelError"})


# --- what arrives at the endpoint, and what comes back ---


def test_a_direct_call_by_url_sends_the_pictures_bytes_and_answers_in_the_known_shape(
    function, endpoint
):
    answer = function.invoke({"url": f"http://{PUBLIC}/dog.png"})
    [call] = endpoint.calls
    assert (call.path, call.content_type, call.body) == (
        "/endpoints/dogs/invocations",
        "application/octet-stream",
        PICTURE,
    )
    request_id = answer["headers"].pop("X-Request-Id")
    assert len(request_id) == 36
    assert answer == {
        "statusCode": 200,
        "headers": {
            "Content-Type": "application/json",
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Expose-Headers": "X-Request-Id, Retry-After, Server-Timing",
        },
        "type-result": "<class 'str'>",
        "body": "[[0.25, -1.5]]",
    }


def test_one_picture_is_passed_on_as_its_bytes_and_several_as_json(function, endpoint):
    text = base64.b64encode(PICTURE).decode()
    endpoint.answer = lambda: (200, json.dumps([LABELS]).encode(), {})
    assert function.invoke({"base64": text, "output": "labels"})["statusCode"] == 200
    endpoint.answer = lambda: (200, json.dumps([LABELS] * 2).encode(), {})
    instances = [{"url": f"http://{PUBLIC}/dog.png"}, {"base64": "aGVsbG8="}]
    asked = {"instances": instances, "output": "labels", "top": 3, "id": 7}
    assert function.invoke(asked)["statusCode"] == 200
    one, several = endpoint.calls
    assert (one.body, one.content_type) == (PICTURE, "application/octet-stream")
    assert one.accept == several.accept == "application/json; output=labels"
    assert json.loads(several.body) == {
        "instances": [{"base64": text}, {"base64": "aGVsbG8="}],
        "output": "labels",
        "top": 3,
    }


@pytest.mark.parametrize(
    "event",
    [
        http_event(
            PICTURE,
            headers={"content-type": "image/png", "accept": "application/json; output=labels"},
        ),
        http_event(
            json.dumps({"url": f"http://{PUBLIC}/dog.png"}),
            headers={"accept": "application/json;output=labels"},
        ),
        rest_event(
            json.dumps({"url": f"http://{PUBLIC}/dog.png"}),
            **{"Accept": "application/json; output=labels"},
        ),
    ],
    ids=["function URL, bytes", "function URL, JSON", "REST API"],
)
def test_http_events_bring_bytes_or_json_and_get_only_fields_that_a_gateway_knows(
    function, endpoint, event
):
    endpoint.answer = lambda: (200, json.dumps([LABELS]).encode(), {})
    answer = function.invoke(event)
    assert answer.keys() == {"statusCode", "headers", "body"}
    [call] = endpoint.calls
    assert (call.body, call.content_type, call.accept) == (
        PICTURE,
        "application/octet-stream",
        "application/json; output=labels",
    )


# --- the caller's faults ---


@pytest.mark.parametrize(
    "event",
    [
        "a text",
        None,
        ["http://example.com"],
        {"url": 5},
        {"url": "ftp://example.com/dog.png"},
        {"instances": [{"url": f"http://{PUBLIC}/dog.png"}] * 17},
        {"url": f"http://{PUBLIC}/absent.png"},
        {"url": f"http://{PUBLIC}/large.png"},
        http_event(""),
        http_event(None),
        http_event("{broken"),
        http_event("{" * 100_000),
        http_event("\ud800"),
        http_event("!", isBase64Encoded=True),
        http_event(5),
        http_event({"url": "http://a"}),
    ],
    ids=lambda event: str(event)[:30].encode("ascii", "replace").decode(),
)
def test_a_bad_request_is_400_and_never_reaches_the_endpoint(function, endpoint, event):
    status, message = error(function.invoke(event))
    assert status == 400 and message
    assert endpoint.calls == []


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "127.0.0.1", "[::ffff:10.0.0.1]", "localhost"]
)
def test_no_url_leads_inside_and_all_refusals_read_alike(function, endpoint, address):
    status, message = error(function.invoke({"url": f"http://{address}/latest/meta-data"}))
    assert (status, message) == (
        400,
        "the URL is not allowed: it must be http or https, on port 80 or 443, "
        "of a host with public addresses only",
    )
    assert endpoint.calls == []


def test_a_body_beyond_the_endpoints_limit_is_413(function, endpoint):
    assert error(function.invoke({"base64": "A" * 8_400_000}))[0] == 413
    assert endpoint.calls == []


def peak(function):
    status = Path(f"/proc/{function.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def test_pictures_that_are_too_large_together_are_refused_before_they_fill_the_memory(
    start, endpoint, web
):
    function = start()
    web.files["/six.png"] = bytes(6_000_000)
    function.invoke({"url": f"http://{PUBLIC}/absent.png"})
    before = peak(function)
    pictures = [{"url": f"http://{PUBLIC}/six.png"}] * 16
    assert error(function.invoke({"instances": pictures})) == (
        413,
        "the pictures have together more than 4,718,592 bytes",
    )
    web.files["/two.png"] = bytes(2_000_000)
    pictures = [{"url": f"http://{PUBLIC}/two.png"}] * 16
    assert error(function.invoke({"instances": pictures, "output": "labels"}))[0] == 413
    assert endpoint.calls == []
    assert peak(function) < before + (48 << 20)
    assert function.invoke({"url": f"http://{PUBLIC}/six.png"})["statusCode"] == 200
    endpoint.answer = lambda: (200, b"[[0.25, -1.5], [1, 2]]", {})
    assert function.invoke({"instances": pictures[:2]})["statusCode"] == 200


def test_the_model_servers_4xx_is_the_callers_with_its_message(function, endpoint):
    endpoint.answer = refuse(424, 415, json.dumps({"error": "no such thing", "request_id": "x"}))
    assert error(function.invoke({"base64": ""})) == (415, "no such thing")
    endpoint.answer = refuse(424, 400, "Traceback (most recent call last)")
    assert error(function.invoke({"base64": ""})) == (400, "the endpoint refused the request")


# --- the endpoint's faults ---


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (refuse(400, code="ThrottlingException"), 2),
        (refuse(429, code="ModelNotReadyException"), None),
        (refuse(424, 503, json.dumps({"error": "too busy", "request_id": "x"})), 1),
    ],
    ids=["throttled by AWS", "model not ready", "our server's queue is full"],
)
def test_too_much_at_once_is_429_after_a_second_try(function, endpoint, answer, calls):
    endpoint.answer = answer
    got = function.invoke({"base64": ""})
    assert error(got) == (429, "the endpoint is busy; try again")
    assert got["headers"]["Retry-After"] == "1"
    assert calls is None or len(endpoint.calls) == calls


@pytest.mark.parametrize(
    "answer",
    [
        refuse(424, 500, "a secret of the model"),
        refuse(500, message="a secret", code="InternalFailure"),
        refuse(
            400, message="Endpoint dogs of account 123456789012 not found", code="ValidationError"
        ),
        lambda: (502, b"<html>", {}),
    ],
    ids=["the model", "SageMaker", "no such endpoint", "no JSON"],
)
def test_a_failing_endpoint_is_502_and_its_words_stay_in_the_log(function, endpoint, answer):
    endpoint.answer = answer
    assert error(function.invoke({"base64": ""})) == (502, "the endpoint failed")


def test_a_slow_endpoint_is_504(start, endpoint):
    function, asked_enough = start(ENDPOINT_SECONDS="0.5"), threading.Event()
    endpoint.answer = lambda: (asked_enough.wait(600), (200, b"", {}))[1]
    assert error(function.invoke({"base64": ""})) == (504, "the endpoint did not answer in time")
    asked_enough.set()


def test_an_endpoint_out_of_reach_is_502(start):
    function = start(AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME="http://127.0.0.1:9")
    assert error(function.invoke({"base64": ""})) == (502, "the endpoint could not be reached")


@pytest.mark.parametrize(
    "body",
    [
        *("", "<html>", "[[NaN]]", "[[1e999]]", "[]", "[[1], [2]]", "[[]]", '[["1"]]', '{"a": 1}'),
        *("[" * 9, "[[true]]", json.dumps([LABELS]), "[[\xff]]", "[[1]"),
    ],
)
def test_an_answer_of_the_endpoint_that_is_none_is_502(function, endpoint, body):
    endpoint.answer = lambda: (200, body.encode("latin-1"), {})
    told = error(function.invoke({"base64": base64.b64encode(PICTURE).decode()}))
    assert told == (502, "the endpoint's answer has the wrong form")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ENDPOINT_NAME": ""}, "the variable ENDPOINT_NAME is not set"),
        ({"FETCH_URLS": "maybe"}, "FETCH_URLS=maybe is not allowed; allowed: lambda, endpoint"),
    ],
)
def test_a_function_that_could_answer_nothing_does_not_start(start, variables, said):
    function = start(**variables)
    with pytest.raises(AssertionError, match=said):
        function.invoke({"base64": ""})


def test_who_fetches_urls_is_a_setting(start, endpoint):
    asked = {"url": f"http://{PUBLIC}/dog.png"}
    assert error(start(FETCH_URLS="off").invoke(asked)) == (
        400,
        'this service does not fetch pictures by "url"; send the picture\'s bytes',
    )
    assert endpoint.calls == []
    assert start(FETCH_URLS="endpoint").invoke(asked)["statusCode"] == 200
    asked_on = {"instances": [asked], "output": None, "top": 5}
    assert json.loads(endpoint.calls[0].body) == asked_on


# --- the zip ---


def test_the_zip_is_small_and_its_bytes_follow_from_its_contents():
    first, second = bundle.proxy(), bundle.proxy()
    assert first == second and len(first) < 50_000


def loaded(directory, code, **environment):
    script = f"import sys\n{code}\nprint(*sys.modules)"
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    environment = {
        "PYTHONPATH": packages,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_client_is_made_before_the_first_request_and_only_in_lambda(proxy_zip):
    modules = loaded(proxy_zip, "import lambda_function")
    assert "boto3" not in modules
    assert {name.split(".")[0] for name in modules} <= set(sys.stdlib_module_names) | {
        "lambda_function",
        "serving",
        "__main__",
    }
    assert "boto3" in loaded(
        proxy_zip,
        "import lambda_function",
        AWS_LAMBDA_RUNTIME_API="127.0.0.1:1",
        ENDPOINT_NAME="dogs",
    )


FIRST = """
import json, time
import lambda_function
sent = []
class Client:
    def invoke_endpoint(self, **asked):
        sent.append(asked)
        import io
        return {"Body": io.BytesIO(b"[[0.5, 1.5]]")}
lambda_function.client = Client
event = {"base64": "aGFsbG8="}
class Context: aws_request_id = "r"
import sys
before = {*sys.modules}
answer = lambda_function.handler(event, Context)
assert answer["statusCode"] == 200 and len(sent) == 1, answer
assert not [name for name in {*sys.modules} - before if name.startswith(("boto", "urllib3"))]
"""


def test_the_first_request_imports_nothing_of_botocores_any_more(proxy_zip):
    """So it takes a few milliseconds; no clock says so here, since a busy machine's would not."""
    environment = {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:1", "ENDPOINT_NAME": "dogs"}
    assert "boto3" in loaded(proxy_zip, FIRST, **environment)


PLAIN = """
import boto3
client = boto3.client("sagemaker-runtime")
def handler(event, context):
    return client.invoke_endpoint(EndpointName="dogs", Body=b"x")["Body"].read().decode()
"""


def test_a_cold_start_takes_at_most_a_fifth_more_than_boto3_itself(proxy_zip, endpoint, tmp_path):
    """Processor time from the interpreter's start to the first answer, the best of 3."""
    (tmp_path / "plain.py").write_text(PLAIN)

    def cost(directory, module):
        code = (
            f"from {module} import handler\nclass Context: aws_request_id = 'x'\n"
            "assert '0.25' in str(handler({'base64': ''}, Context))"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        loaded(
            directory,
            code,
            ENDPOINT_NAME="dogs",
            AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=endpoint.url,
            **credentials,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    rounds = [(cost(proxy_zip, "lambda_function"), cost(tmp_path, "plain")) for _ in range(3)]
    ours, plain = (min(times) for times in zip(*rounds, strict=True))
    assert ours <= 1.2 * plain, (ours, plain)


# --- the model inside the function ---


def test_pictures_take_half_of_the_memory_that_the_function_has(monkeypatch):
    assert lambda_inside._settings() == Settings()
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1024")
    assert lambda_inside._settings().max_decoded == 512 << 20
    monkeypatch.setenv("SERVING_MAX_DECODED", "1000000")
    assert lambda_inside._settings().max_decoded == 1_000_000


def test_the_model_inside_the_function_gives_the_trained_networks_logits(
    original, expected, picture, web, tmp_path
):
    contents = {name: (PROJECT / source).read_bytes() for name, source in bundle.DIRECT.items()}
    contents |= {
        f"{bundle.PACKAGE}/{name}": data
        for name, data in bundle.slim(original / "model.tar.gz").items()
    }
    assert "package/model.onnx" in contents and "package/model.safetensors" not in contents
    archive = bundle.archive(contents, 0)
    web.files["/golden.jpg"] = picture
    environment = {"WEB_PORT": str(web.port), "SERVING_SECONDS": "28"}
    function = Function(
        unpack(archive, tmp_path / "zip"),
        "serving.lambda_direct.handler",
        tmp_path / "log.txt",
        **environment,
    )
    try:
        for event in (
            {"base64": base64.b64encode(picture).decode()},
            {"url": f"http://{PUBLIC}/golden.jpg"},
            http_event(picture, headers={"content-type": "image/jpeg"}),
        ):
            answer = function.invoke(event)
            assert answer["statusCode"] == 200, answer
            np.testing.assert_allclose(json.loads(answer["body"]), expected[:1], rtol=0, atol=1e-5)
        assert error(function.invoke({"url": "http://169.254.169.254/"}))[0] == 400
        assert error(function.invoke("a text"))[0] == 400
    finally:
        function.close()
