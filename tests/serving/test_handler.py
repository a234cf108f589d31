import base64
import json
from dataclasses import fields

import numpy as np
import pytest

from serving.decoders import Rooms
from serving.engine import Engine
from serving.handler import Answer, Request, Settings, answer, new_id, settings_from
from serving.package import load
from tests.packages import CLASSES, LEAST, TEMPERATURE, make_contents, make_network
from trainer.common.errors import UserError
from trainer.results.calibrate import Calibration
from trainer.results.package import build

JSON = "application/json"
LABELS = "application/json; output=labels"


@pytest.fixture
def ask(engine):
    """Answers a body; a dict is sent as JSON."""

    def ask(body, content_type="", accept="", **settings) -> Answer:
        if not isinstance(body, bytes):
            body, content_type = json.dumps(body).encode(), content_type or JSON
        request = Request(body, content_type, accept, "some-id")
        return answer(engine, Settings(**settings), request)

    return ask


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- what is understood ---


@pytest.mark.parametrize(
    "content_type",
    [
        "image/jpeg",
        "image/png",
        "application/octet-stream",
        "application/x-image",
        "",
        "image/jpeg; a=b",
        "IMAGE/X",
    ],
)
def test_a_pictures_bytes_give_its_logits_whatever_picture_they_are_called(
    ask, picture, expected, content_type
):
    result = ask(picture, content_type)
    assert result.status == 200
    np.testing.assert_allclose(json.loads(result.body), expected[:1], rtol=0, atol=1e-5)


def test_several_pictures_in_one_request_are_answered_in_order(ask, original, expected):
    files = [
        (original / "package/golden" / name).read_bytes() for name in ("0.jpg", "1.png", "2.webp")
    ]
    result = ask({"instances": [{"base64": text(file)} for file in files]})
    np.testing.assert_allclose(json.loads(result.body), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "accept"),
    [
        ({"output": "labels"}, ""),
        ({}, LABELS),
        ({"output": "labels"}, "*/*"),
        ({}, "text/html, application/json;output=labels"),
    ],
)
def test_labels_come_with_probabilities_where_asked_for(ask, picture, expected, fields, accept):
    [row] = json.loads(ask({"base64": text(picture), **fields}, accept=accept).body)
    powers = np.exp(expected[0] / TEMPERATURE)
    probabilities = powers / powers.sum()
    order = np.argsort(-probabilities)
    assert [entry["label"] for entry in row["labels"]] == [CLASSES[index] for index in order]
    np.testing.assert_allclose(
        [entry["probability"] for entry in row["labels"]], probabilities[order], atol=1e-6
    )


def test_the_field_decides_before_the_accept_header_and_top_limits_the_labels(ask, picture):
    [row] = json.loads(ask({"base64": text(picture), "output": "labels", "top": 2}).body)
    assert len(row["labels"]) == 2
    assert isinstance(
        json.loads(ask({"base64": text(picture), "output": "logits"}, accept=LABELS).body)[0][0],
        float,
    )


def test_labels_carry_the_set_and_whether_they_are_sure(ask, original, expected):
    files = [
        (original / "package/golden" / name).read_bytes() for name in ("0.jpg", "1.png", "2.webp")
    ]
    asked = {"instances": [{"base64": text(file)} for file in files], "output": "labels"}
    rows = json.loads(ask(asked).body)
    assert [row["unlike"] for row in rows] == [False, False, True]
    sizes = set()
    for row in rows:
        probable = [each["label"] for each in row["labels"] if each["probability"] >= LEAST]
        assert row["set"] == (probable or [row["labels"][0]["label"]])
        assert row["sure"] == (len(row["set"]) == 1 and not row["unlike"])
        sizes.add(len(row["set"]))
    assert sizes == {1, 2}


def test_a_package_without_calibration_is_served_as_before(tmp_path, picture, expected):
    build(make_network(), make_contents(tmp_path / "pictures"), tmp_path / "old", archive=False)
    old = load(tmp_path / "old", threads=1)
    assert (old.calibration, old.golden_scores.distance) == (Calibration(), None)
    asked = Request(picture, "image/jpeg", LABELS, "some-id")
    [row] = json.loads(answer(Engine(old, Rooms(10**6)), Settings(), asked).body)
    powers = np.sort(np.exp(expected[0]))[::-1]
    told = [each["probability"] for each in row["labels"]]
    np.testing.assert_allclose(told, powers / powers.sum(), atol=1e-6)
    assert (row["set"], row["sure"], row["unlike"]) == (None, None, None)


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/*",
        "application/json",
        "text/html;q=0.9, */*;q=0.1",
        " application/json ",
    ],
)
def test_logits_are_the_default(ask, picture, accept):
    assert isinstance(json.loads(ask(picture, accept=accept).body)[0][0], float)


# --- what is not ---


@pytest.mark.parametrize(
    ("body", "content_type", "accept", "status", "message"),
    [
        (b"", "image/jpeg", "", 400, "the file is empty"),
        (b"GIF89a", "image/gif", "", 400, "the picture can't be read"),
        (b"no picture", "", "", 400, "not a JPEG, PNG"),
        (
            b"1,2",
            "text/csv",
            "",
            415,
            "'text/csv' is not supported; allowed: application/json, application/jsonlines, ",
        ),
        (b"x" * 2000, "image/jpeg", "", 413, "the body has 2,000 bytes; allowed: 1,000"),
        (b"{", JSON, "", 400, "the body is not JSON"),
        (b"\xff\xfe\0", JSON, "", 400, "the body is not JSON"),
        (b"[" * 900, JSON, "", 400, "the body is not JSON"),
        (b"[]", JSON, "", 400, "the JSON must be an object"),
        (b"null", "application/problem+json", "", 400, "the JSON must be an object"),
        ({}, "", "", 400, "one text of: url, base64, s3"),
        ({"url": 5}, "", "", 400, "one text of: url, base64, s3"),
        ({"url": "http://a", "base64": ""}, "", "", 400, "one text of"),
        ({"URL": "http://a"}, "", "", 400, "one text of"),
        ({"instances": []}, "", "", 400, '"instances" must be a list of 1 to 2 objects'),
        (
            {"instances": [{"base64": ""}] * 3},
            "",
            "",
            400,
            '"instances" must be a list of 1 to 2 objects',
        ),
        ({"instances": {"base64": ""}}, "", "", 400, '"instances" must be a list'),
        ({"instances": [["base64", ""]]}, "", "", 400, "one text of"),
        ({"instances": [{"base64": ""}], "url": "http://a"}, "", "", 400, "one text of"),
        ({"base64": "é"}, "", "", 400, '"base64" does not hold base64'),
        ({"base64": "a"}, "", "", 400, '"base64" does not hold base64'),
        ({"base64": "abcd", "output": "text"}, "", "", 400, '"output" must be'),
        ({"base64": "abcd", "output": ["labels"]}, "", "", 400, '"output" must be'),
        ({"base64": "abcd", "top": 0}, "", "", 400, '"top" must be'),
        ({"base64": "abcd", "top": True}, "", "", 400, '"top" must be'),
        ({"base64": "abcd", "top": 1.5}, "", "", 400, '"top" must be'),
        (
            {"base64": "abcd"},
            "",
            "text/html",
            406,
            "only application/json and",
        ),
        (
            {"base64": "abcd"},
            "",
            "application/json; output=xml",
            406,
            "with output=logits or output=labels",
        ),
        ({"url": "http://127.0.0.1/"}, "", "", 400, "the URL is not allowed"),
        ({"url": "\ud800"}, "", "", 400, "the URL is not allowed"),
        ({"s3": "s3://bucket/key"}, "", "", 400, 'this server does not fetch pictures by "s3"'),
    ],
)
def test_the_callers_mistakes_are_told_with_a_request_id(
    ask, body, content_type, accept, status, message
):
    result = ask(body, content_type, accept, max_body=1000, max_pictures=2)
    told = json.loads(result.body)
    assert (result.status, told["request_id"]) == (status, "some-id")
    assert message in told["error"]


def test_which_of_several_pictures_is_broken_is_told(ask, picture):
    result = ask({"instances": [{"base64": text(picture)}, {"base64": text(b"GIF8")}]})
    assert result.status == 400 and "picture 2 of 2: " in json.loads(result.body)["error"]


def test_urls_are_off_where_a_setting_says_so(ask):
    result = ask({"url": "https://example.com/a.jpg"}, urls=False)
    assert (
        result.status == 400
        and 'does not fetch pictures by "url"' in json.loads(result.body)["error"]
    )


def test_a_request_that_has_no_time_left_gets_503_and_when_to_try_again(ask, picture):
    result = ask(picture, seconds=0.0)
    assert (result.status, result.headers["Retry-After"]) == (503, "1")


def test_a_fault_of_ours_is_500_and_tells_the_log_alone(engine, picture, caplog):
    class Broken:
        package = engine.package

        def scores(self, pictures, work):
            raise RuntimeError("a secret")

    request = Request(picture, "image/jpeg", "", "some-id")
    result = answer(Broken(), Settings(), request)  # type: ignore[arg-type]
    assert result.status == 500 and b"secret" not in result.body and b"some-id" in result.body
    assert "some-id" in caplog.text and "a secret" in caplog.text


# --- S3 ---


@pytest.fixture
def bucket(monkeypatch):
    """A bucket `pictures` on a moto server, and a client that fills it."""
    server_module = pytest.importorskip("moto.server")
    import boto3

    from serving import s3

    moto = server_module.ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3._client.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield client
    moto.stop()
    s3._client.cache_clear()


def test_pictures_come_from_s3_where_it_is_on(ask, bucket, picture, expected):
    bucket.put_object(Bucket="pictures", Key="a/wide one?#.jpg", Body=picture)
    result = ask({"s3": "s3://pictures/a/wide one?#.jpg"}, s3=True)
    np.testing.assert_allclose(json.loads(result.body), expected[:1], rtol=0, atol=1e-5)
    assert (
        b"allowed: 100" in ask({"s3": "s3://pictures/a/wide one?#.jpg"}, s3=True, max_body=100).body
    )
    twice = {"instances": [{"s3": "s3://pictures/a/wide one?#.jpg"}] * 2}
    assert ask(twice, s3=True, max_fetched=2 * len(picture)).status == 200
    too_much = ask(twice, s3=True, max_fetched=2 * len(picture) - 1)
    assert too_much.status == 413 and b"the pictures have together more than" in too_much.body
    told = {
        ask({"s3": uri}, s3=True).body
        for uri in ("s3://pictures/missing", "s3://other/a", "s3://Not A Bucket/a")
    }
    assert len(told) == 1 and b"can't be read with this server's role" in told.pop()
    assert all(
        ask({"s3": uri}, s3=True).status == 400
        for uri in ("s3://pictures", "s3://pictures/", "http://pictures/a", "s3://[/a", "")
    )


# --- settings and ids ---


def test_settings_come_from_variables():
    settings = settings_from(
        {"SERVING_MAX_BODY": "1000", "SERVING_URLS": "off", "SERVING_SECONDS": "2.5", "OTHER": "x"}
    )
    assert (settings.max_body, settings.urls, settings.seconds, settings.queue) == (
        1000,
        False,
        2.5,
        Settings().queue,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("URLS", "yes"),
        ("MAX_BODY", "1.5"),
        ("MAX_BODY", "-1"),
        ("SECONDS", "inf"),
        ("SECONDS", "nan"),
        ("QUEUE", ""),
    ],
)
def test_a_variable_that_does_not_fit_is_named(name, value):
    with pytest.raises(UserError, match=f"SERVING_{name}={value} is not allowed; allowed: "):
        settings_from({f"SERVING_{name}": value})


def test_a_request_id_of_the_callers_is_kept_where_it_is_harmless():
    assert new_id("a-1_B") == "a-1_B"
    for given in ("", "a b", "a\nb", "é", "a" * 65, "-"):
        assert len(new_id(given)) == 32 and new_id(given) != new_id(given)


def test_sites_and_names_are_held_to_their_shape():
    for name, good, bad in (
        ("ORIGINS", ("*", "", "https://a.example, http://localhost:3000"), ("a.example", "*,x")),
        ("HOSTS", ("*", "", "a.example,10.0.0.1,[::1]"), ("http://a", "a b", ",")),
    ):
        for value in good:
            taken = settings_from({f"SERVING_{name}": value})
            assert getattr(taken, name.lower()) == value
        for value in bad:
            with pytest.raises(UserError, match="is not allowed; allowed: \\*, or"):
                settings_from({f"SERVING_{name}": value})


@pytest.mark.parametrize(
    "setting",
    [each for each in fields(Settings) if not isinstance(each.default, str)],
    ids=lambda setting: setting.name,
)
def test_every_setting_takes_a_number_as_it_is_or_refuses_it_in_one_line(setting):
    name = f"SERVING_{setting.name.upper()}"
    for value in ("nan", "inf", "-1", "0", "18446744073709551616", "1e400", "1.5", "a word", ""):
        try:
            taken = getattr(settings_from({name: value}), setting.name)
        except UserError as error:
            assert str(error).startswith(f"{name}={value} is not allowed; allowed: ")
        else:
            assert taken == float(value) < 1e13
