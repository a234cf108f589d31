"""Each line of docs/serving.md's table, asked of all five ways in: the same body, the same answer.

They are the real server, a process; the toolkit's four functions; Ray Serve's replica, with a
request and a response as Starlette makes them (`make doors` has the real one); the proxy, whose
endpoint is the server; and the function that holds the model.
"""

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.adapters import lambda_inside, lambda_proxy, ray, toolkit
from tests import hostile
from tests.conftest import PROJECT
from tests.serving.runtime import Neighbour, Quiet

GOLDEN = ("0.jpg", "1.png", "2.webp")
JSON, LINES = "application/json", "application/jsonlines"
LABELS = "application/json; output=labels"
FORM = "multipart/form-data; boundary=x-y"


@dataclass(frozen=True)
class Ask:
    body: bytes
    content_type: str = JSON
    accept: str = ""
    method: str = "POST"


@dataclass(frozen=True)
class Told:
    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)  # in lower case


Way = Callable[[Ask], Told]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def jsons(value: object, **more: str) -> Ask:
    return Ask(json.dumps(value).encode(), **more)


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart form of (what stands behind `form-data; `, value)."""
    pieces = [
        b"--x-y\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), value)
        for head, value in parts
    ]
    return b"".join(pieces) + b"--x-y--\r\n"


FILE = 'name="file"; filename="a b.jpg"'
# By the line of the table: from the golden pictures' files to what is asked. Those with a number
# get that status; "one", "all", "labels" and "lines" get the golden logits in that form.
CASES: dict[str, tuple[Callable[[list[bytes]], list[Ask]], int | str]] = {
    "a picture's bytes": (
        lambda files: [
            Ask(files[0], kind) for kind in ("image/png", "application/octet-stream", "")
        ],
        "one",
    ),
    "JSON with `base64`": (lambda files: [jsons({"base64": b64(files[0])})], "one"),
    "JSON without a content type": (
        lambda files: (
            [
                Ask(b" \n" + json.dumps({"base64": b64(files[0])}).encode(), kind)
                for kind in ("", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded")
            ]
            + [Ask(b"\xef\xbb\xbf" + json.dumps({"base64": b64(files[0])}).encode(), "")]
        ),
        "one",
    ),
    "JSON with further keys": (
        lambda files: [
            jsons({"base64": b64(files[0]), "id": 7, "url": None, "top": None}),
            jsons({"instances": [{"base64": b64(files[0]), "id": {"a": []}}], "signature": "x"}),
        ],
        "one",
    ),
    "base64 with line breaks": (
        lambda files: [jsons({"base64": base64.encodebytes(files[0]).decode()})],
        "one",
    ),
    "base64 in the URL alphabet": (
        lambda files: [jsons({"base64": base64.urlsafe_b64encode(files[0]).decode().rstrip("=")})],
        "one",
    ),
    "a data: URL": (
        lambda files: [
            jsons({kind: f"data:image/jpeg;base64,{b64(files[0])}"}) for kind in ("base64", "url")
        ],
        "one",
    ),
    "a multipart form with one file": (
        lambda files: [
            Ask(form((FILE, files[0])), FORM),
            Ask(form(('name="note"', b"x"), (FILE, files[0])), FORM),
            Ask(form(('name="base64"', b64(files[0]).encode())), FORM),
        ],
        "one",
    ),
    "`instances` with several pictures": (
        lambda files: [jsons({"instances": [{"base64": b64(file)} for file in files]})],
        "all",
    ),
    "a multipart form with several files": (
        lambda files: [Ask(form(*((FILE, file) for file in files)), FORM)],
        "all",
    ),
    "`application/jsonlines`": (
        lambda files: [
            Ask(b"\n".join(json.dumps({"base64": b64(file)}).encode() for file in files), LINES),
            Ask(
                b"\r\n".join(json.dumps({"base64": b64(file)}).encode() for file in files)
                + b"\n\n",
                "application/x-ndjson",
                "*/*",
            ),
        ],
        "lines",
    ),
    '`"output": "labels"`': (
        lambda files: [
            jsons({"base64": b64(files[0]), "output": "labels"}),
            Ask(files[0], "image/jpeg", LABELS),
        ],
        "labels",
    ),
    "a multipart form with the fields": (
        lambda files: [
            Ask(form((FILE, files[0]), ('name="output"', b"labels"), ('name="top"', b"2")), FORM)
        ],
        "two labels",
    ),
    "`Accept: application/jsonlines`": (
        lambda files: [
            jsons({"instances": [{"base64": b64(file)} for file in files]}, accept=LINES)
        ],
        "lines",
    ),
    "nothing": (lambda files: [Ask(b"", "image/jpeg"), jsons({})], 400),
    "bytes that are no picture": (
        lambda files: [Ask(b"no picture", "image/jpeg"), jsons({"base64": b64(b"GIF8")})],
        400,
    ),
    "a picture that would take minutes": (
        lambda files: [Ask(hostile.scans(12_000), "image/jpeg")],
        400,
    ),
    "incomplete JSON": (
        lambda files: [Ask(b"{"), Ask(b"[]"), Ask(b"\xff\xfe\0"), Ask(b"{}[", ""), Ask(b"\xff{")],
        400,
    ),
    "JSON with more values": (
        lambda files: [Ask(b'{"a": [' + b"[]," * 100_000 + b"0]}")],
        400,
    ),
    "two pictures where one is allowed": (
        lambda files: [
            jsons({"base64": b64(files[0]), "url": "http://a"}),
            jsons({"instances": []}),
            jsons({"instances": [{"base64": b64(files[0])}] * 17}),
            jsons({"instances": [{"base64": b64(files[0])}], "url": "http://a"}),
            jsons({"url": 5}),
        ],
        400,
    ),
    "invalid base64": (
        lambda files: [jsons({"base64": text}) for text in ("####", "a", "é", "data:,x", "ab==cd")],
        400,
    ),
    "an incomplete form": (
        lambda files: [
            Ask(form((FILE, files[0]))[:-6], FORM),
            Ask(form((FILE, files[0])), "multipart/form-data"),
            Ask(form(('name="note"', b"x")), FORM),
            Ask(form(*[(FILE, b"x")] * 100), FORM),
        ],
        400,
    ),
    "a URL that leads to no public address": (
        lambda files: [jsons({"url": url}) for url in ("http://127.0.0.1/", "file:///a", "\ud800")],
        400,
    ),
    "an invalid `top` or `output`": (
        lambda files: [
            jsons({"base64": b64(files[0])} | more)
            for more in ({"top": 0}, {"top": "1"}, {"output": "text"}, {"output": ["labels"]})
        ],
        400,
    ),
    "`Accept: text/html`": (lambda files: [Ask(files[0], "image/jpeg", "text/html")], 406),
    "any other content type": (lambda files: [Ask(b"1,2", "text/csv")], 415),
    "`OPTIONS`": (lambda files: [Ask(b"", "", method="OPTIONS")], 204),
    "`GET` instead": (lambda files: [Ask(b"", "", method="GET")], 405),
}
METHODS = {"`OPTIONS`", "`GET` instead"}  # which the toolkit knows nothing of


def lines_of_the_table() -> list[str]:
    page = (PROJECT / "docs/serving.md").read_text()
    table = page.split("| the request | gets |\n| --- | --- |\n")[1].split("\n\n")[0]
    return [re.split(r" \| ", line.strip("| "))[0] for line in table.splitlines()]


def test_the_table_says_what_is_tested():
    told = lines_of_the_table()
    assert len(told) == len(CASES)
    for line, case in zip(told, CASES, strict=True):
        assert line.startswith(case)


# --- the ways in ---


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in dict(headers).items()}


@pytest.fixture(scope="module")
def through_server(server) -> Way:
    def ask(asked: Ask) -> Told:
        headers = {"Accept": asked.accept, "Content-Type": asked.content_type, "Origin": "http://a"}
        given = {name: value for name, value in headers.items() if value}
        connection = server.connect()
        connection.request(asked.method, "/invocations", asked.body, given)
        answer = connection.getresponse()
        told = Told(answer.status, answer.read().decode(), lower(answer.headers))
        connection.close()
        return told

    return ask


@pytest.fixture(scope="module")
def through_toolkit(engine) -> Way:
    def ask(asked: Ask) -> Told:
        status = [200]
        context = SimpleNamespace(set_response_status=lambda code, phrase: status.append(code))
        query = toolkit.input_fn(asked.body, asked.content_type)
        body = toolkit.output_fn(toolkit.predict_fn(query, engine), asked.accept, context)
        return Told(status[-1], body)

    return ask


@dataclass
class Response:
    """As Starlette's: https://www.starlette.io/responses/."""

    content: bytes
    status_code: int
    headers: dict[str, str]


@pytest.fixture(scope="module")
def through_ray(original) -> Iterator[Way]:
    import asyncio

    patch = pytest.MonkeyPatch()
    starlette, responses = ModuleType("starlette"), ModuleType("starlette.responses")
    responses.Response = Response  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "starlette", starlette)
    patch.setitem(sys.modules, "starlette.responses", responses)
    model = ray.Model(str(original / "package"))

    def ask(asked: Ask) -> Told:
        async def body() -> bytes:
            return asked.body

        headers = {"accept": asked.accept, "content-type": asked.content_type, "origin": "http://a"}
        request = SimpleNamespace(method=asked.method, headers=headers, body=body)
        response: Any = asyncio.run(model(request))  # type: ignore[arg-type]
        return Told(response.status_code, response.content.decode(), lower(response.headers))

    yield ask
    patch.undo()


def event_of(asked: Ask) -> dict[str, Any]:
    """As a function URL sends it."""
    headers = {"accept": asked.accept, "content-type": asked.content_type, "origin": "http://a"}
    return {
        "version": "2.0",
        "headers": {name: value for name, value in headers.items() if value},
        "requestContext": {"http": {"method": asked.method}},
        "body": b64(asked.body),
        "isBase64Encoded": True,
    }


def through(handler: Callable[[Any, Any], Any]) -> Way:
    def ask(asked: Ask) -> Told:
        told = handler(event_of(asked), SimpleNamespace(aws_request_id="request-1"))
        return Told(told["statusCode"], told["body"], lower(told["headers"]))

    return ask


@pytest.fixture(scope="module")
def through_proxy(server) -> Iterator[Way]:
    """The endpoint hands the request on to the server, as SageMaker does, with its errors."""

    class Endpoint(Quiet):
        def do_POST(self) -> None:
            accept = self.headers["Accept"]
            reply = server.invoke(self.body(), self.headers["Content-Type"], Accept=accept)
            if reply.status == 200:
                self.reply(200, reply.body, Content_Type=JSON)
                return
            said = reply.body.decode()
            error = {"OriginalStatusCode": reply.status, "OriginalMessage": said, "Message": said}
            self.reply(424, json.dumps(error).encode(), x_amzn_ErrorType="ModelError")

    patch = pytest.MonkeyPatch()
    with Neighbour(Endpoint) as endpoint:
        variables = {
            "ENDPOINT_NAME": "dogs",
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        lambda_proxy.client.cache_clear()
        yield through(lambda_proxy.handler)
        lambda_proxy.client.cache_clear()
        patch.undo()


@pytest.fixture(scope="module")
def through_inside(original) -> Iterator[Way]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MODEL_DIR", str(original / "package"))
    lambda_inside.engine.cache_clear()
    yield through(lambda_inside.handler)
    lambda_inside.engine.cache_clear()
    patch.undo()


@pytest.fixture(scope="module")
def ways(
    through_server, through_toolkit, through_ray, through_proxy, through_inside
) -> dict[str, Way]:
    return {
        "server": through_server,
        "toolkit": through_toolkit,
        "Ray Serve": through_ray,
        "proxy": through_proxy,
        "inside": through_inside,
    }


@pytest.fixture(scope="module")
def golden(original) -> list[bytes]:
    return [(original / "package/golden" / name).read_bytes() for name in GOLDEN]


@pytest.mark.parametrize("line", CASES)
def test_the_same_body_gets_the_same_answer_at_all_five(ways, golden, expected, line):
    make, right = CASES[line]
    for asked in make(golden):
        told = {
            name: way(asked)
            for name, way in ways.items()
            if name != "toolkit" or line not in METHODS
        }
        for name, answer in told.items():
            check(answer, right, expected, f"{name}: {asked.content_type} {asked.body[:40]!r}")
            if name != "toolkit":
                assert answer.headers["access-control-allow-origin"] == "*"
        bodies = {
            re.sub(r'"request_id": "[^"]*"', "", answer.body).replace("\n", " ")
            for answer in told.values()
        }
        assert len(bodies) == 1, bodies


def check(answer: Told, right: int | str, expected: np.ndarray, what: str) -> None:
    wanted = right if isinstance(right, int) else 200
    assert answer.status == wanted, (what, answer)
    if right == 204:
        assert answer.body == "" and "POST" in answer.headers["access-control-allow-methods"]
        assert "Content-Type" in answer.headers["access-control-allow-headers"]
        return
    if wanted != 200:
        assert json.loads(answer.body).keys() == {"error", "request_id"}, what
        return
    if right == "lines":
        rows = [json.loads(line) for line in answer.body.splitlines()]
        assert answer.headers.get("content-type", LINES) == LINES
    else:
        rows = json.loads(answer.body)
        assert answer.headers.get("content-type", JSON) == JSON
    if right in ("labels", "two labels"):
        assert rows[0].keys() == {"labels", "set", "sure", "unlike"}, what
        assert len(rows[0]["labels"]) == (2 if right == "two labels" else 3)
        return
    right_rows = expected[:1] if right == "one" else expected
    np.testing.assert_allclose(rows, right_rows, rtol=0, atol=1e-5, err_msg=what)


# --- what differs by nature ---


def test_a_load_balancers_lists_are_read_and_answered_in_lists(through_inside, golden, expected):
    event = {
        "requestContext": {"elb": {"targetGroupArn": "arn"}},
        "httpMethod": "POST",
        "multiValueHeaders": {"Accept": ["text/html", LABELS], "Content-Type": ["image/jpeg"]},
        "body": b64(golden[0]),
        "isBase64Encoded": True,
    }
    context = SimpleNamespace(aws_request_id="request-1")
    told = lambda_inside.handler(event, context)
    assert told.keys() == {
        *("statusCode", "statusDescription", "isBase64Encoded", "multiValueHeaders", "body")
    }
    assert (told["statusCode"], told["statusDescription"]) == (200, "200 OK")
    assert told["multiValueHeaders"]["Content-Type"] == [JSON]
    assert json.loads(told["body"])[0].keys() >= {"labels"}
    single = {name: value[-1] for name, value in event.pop("multiValueHeaders").items()}
    told = lambda_inside.handler(event | {"headers": single}, context)
    assert told["headers"]["Content-Type"] == JSON and "multiValueHeaders" not in told


@pytest.mark.parametrize(
    "event",
    [
        {"requestContext": {}, "body": 5},
        {"requestContext": {}, "body": {"url": "x"}},
        {"requestContext": {}, "headers": "a text", "body": "{}"},
        {"requestContext": None, "headers": None, "body": None},
        {"requestContext": {"http": "x"}, "headers": {"accept": None}, "body": "\ud800"},
        {"requestContext": {"elb": None}, "multiValueHeaders": {"accept": "x"}, "body": "é"},
        {"httpMethod": 5, "requestContext": [], "headers": {"content-type": {}}, "body": "{"},
        {"s3": "s3://bucket/\ud800"},
    ],
)
def test_an_event_of_no_shape_is_the_callers_fault(through_inside, through_proxy, event):
    context = SimpleNamespace(aws_request_id="request-1")
    for handler in (lambda_inside.handler, lambda_proxy.handler):
        assert 400 <= handler(event, context)["statusCode"] < 500


def test_a_half_character_in_an_s3_uri_is_the_callers_fault(engine):
    from serving.handler import Request, Settings, answer

    for uri in ("s3://bucket/\ud800", "s3://\ud800/key", "s3://bucket/" + "é" * 600, "s3:///key"):
        body = json.dumps({"s3": uri}).encode()
        told = answer(engine, Settings(s3=True), Request(body, JSON, "", "x"))
        assert (told.status, b"s3://bucket/key" in told.body) == (400, True)


def test_a_photo_of_48_megapixels_is_answered(server, engine):
    from serving.handler import Request, Settings, answer

    buffer = io.BytesIO()
    Image.new("RGB", (8064, 6048), "teal").save(buffer, "JPEG")
    told = answer(engine, Settings(), Request(buffer.getvalue(), "image/jpeg", "", "x"))
    assert told.status == 200
