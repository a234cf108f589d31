"""`python -m tests.serving.fuzz --requests 10000 --seed 0`: hostile requests to a real server.

Each is made from (seed, number). None may get a 5xx, make the server connect anywhere, grow its
memory without end, or keep the next good request from its answer.
"""

import argparse
import base64
import io
import json
import random
import re
import struct
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.conftest import PROJECT
from tests.packages import make_contents, make_network
from tests.serving.conftest import Server
from trainer.results.package import build

# Runs in the server's process: writes down every connection that its Python opens.
RECORDER = """
import os, sys
log = os.open(os.environ["CONNECTIONS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def record(event, arguments):
    if event == "socket.connect":
        os.write(log, f"{arguments[1]}\\n".encode())
sys.addaudithook(record)
"""
GROWTH = (
    150 << 20
)  # bytes of resident memory that decoding the worst allowed pictures may leave behind

HOSTS = [
    *(
        "127.0.0.1",
        "localhost",
        "127.1",
        "0x7f000001",
        "2130706433",
        "0",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
    ),
    *(
        "169.254.169.254",
        "[fd00:ec2::254]",
        "169.254.170.2",
        "100.100.100.200",
        "168.63.129.16",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
    ),
    *(
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::]",
        "[2001:0:a9fe::]",
        "224.0.0.1",
        "255.255.255.255",
        "[ff02::1]",
        "[fe80::1%25lo]",
        "missing.invalid",
    ),
    *(
        "①②⑦.0.0.1",
        "localhost.",
        "LOCALHOST",
        "a" * 300,
        "..",
        "a..b",
        "",
        "%31%32%37.0.0.1",
        "127.0.0.1%00.example.com",
        "\u0000",
        "\ud800",
    ),
]


def url(rng: random.Random) -> str:
    scheme = rng.choice(
        [
            "http",
            "https",
            "http",
            "HTTP",
            "ftp",
            "file",
            "gopher",
            "",
            "http:http",
            "data:image/png;base64,AAAA;",
        ]
    )
    user = rng.choice(["", "", "", "user@", "a:b@", "93.184.216.34@", "93.184.216.34\\@", "\t"])
    port = rng.choice(["", "", ":80", ":443", ":22", ":8080", ":0", ":99999", ":-1", ":a", ":"])
    path = rng.choice(
        [
            "",
            "/",
            "/latest/meta-data/iam",
            "/a\r\nHost: b",
            "/?x=\\",
            "/" + "a" * rng.randrange(9000),
            "/ä%zz",
        ]
    )
    return f"{scheme}{rng.choice(['://', ':', ':////', ''])}{user}{rng.choice(HOSTS)}{port}{path}"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(rng: random.Random) -> bytes:
    """A PNG or a GIF that states a huge size."""
    width, height = (rng.choice([0, 1, 4000, 30_000, 65_535, 2**31 - 1]) for _ in range(2))
    if rng.random() < 0.3:
        return (
            b"GIF89a"
            + struct.pack("<HH", width % 65536, height % 65536)
            + bytes(rng.randrange(256) for _ in range(40))
        )
    header = struct.pack(
        ">IIBBBBB",
        width,
        height,
        rng.choice([1, 8, 16]),
        rng.choice([0, 2, 3, 4, 6]),
        0,
        0,
        rng.choice([0, 1]),
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(rng.randrange(1 << 20))))
        + chunk(b"IEND", b"")
    )


def broken(rng: random.Random, good: list[bytes]) -> bytes:
    """A picture cut off, with bytes changed, or stuck together from two."""
    data = bytearray(rng.choice(good))
    what = rng.randrange(4)
    if what == 0:
        del data[rng.randrange(len(data)) :]
    elif what == 1:
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif what == 2:
        data[rng.randrange(len(data)) :] = rng.choice(good)[rng.randrange(200) :]
    else:
        data[12 : 12 + rng.randrange(60)] = rng.randbytes(rng.randrange(60))
    return bytes(data)


def text(rng: random.Random) -> bytes:
    """JSON, more or less."""
    values = [
        None,
        True,
        0,
        -1,
        1e308,
        10**400,
        "",
        "a",
        [],
        {},
        [[]],
        {"url": {}},
        "\ud800",
        "x" * rng.randrange(5000),
        {"base64": "####"},
    ]
    value = rng.choice(values)
    asked = {
        rng.choice(
            ["url", "base64", "s3", "instances", "output", "top", "URL", "", "__proto__"]
        ): value
        for _ in range(rng.randrange(4))
    }
    form = rng.randrange(6)
    if form == 0:
        return b"[" * rng.randrange(200_000)
    if form == 1:
        return b'{"url":' * rng.randrange(60_000)
    if form == 2:
        return ("{" + f'"top": {"9" * rng.randrange(9000)}' + "}").encode()
    if form == 3:
        return rng.randbytes(rng.randrange(3000))
    data = json.dumps(asked if form == 4 else {"instances": [asked] * rng.randrange(40)}).encode(
        "utf-8"
    )
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data


def make(rng: random.Random, good: list[bytes]) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers."""
    kinds: list[Callable[[], bytes]] = [
        lambda: broken(rng, good),
        lambda: bomb(rng),
        lambda: rng.choice(good)[:8] + rng.randbytes(rng.randrange(3000)),
        lambda: rng.randbytes(rng.randrange(3000)),
        lambda: b"a" * rng.choice([0, 1, 999_999, 1_000_001, 3_000_000]),
    ]
    texts: list[Callable[[], bytes]] = [
        lambda: text(rng),
        lambda: json.dumps({"url": url(rng)}).encode(),
        lambda: json.dumps(
            {"instances": [{"url": url(rng)} for _ in range(rng.randrange(1, 5))]}
        ).encode(),
        lambda: json.dumps({"base64": base64.b64encode(broken(rng, good)).decode()}).encode(),
    ]
    is_text = rng.random() < 0.5
    body = rng.choice(texts if is_text else kinds)()
    right = "application/json" if is_text else "image/jpeg"
    types = [
        right,
        "",
        "application/octet-stream",
        "application/json",
        "text/html",
        "a",
        "/",
        "é",
        "image/" + "x" * 5000,
        "multipart/form-data",
    ]
    accepts = [
        "*/*",
        "",
        "application/json; output=labels",
        "application/json; output*=x''labels",
        "text/html",
        ",,,;;;",
        "*" * 5000,
    ]
    headers = {
        "Content-Type": right if rng.random() < 0.8 else rng.choice(types),
        "Accept": "application/json" if rng.random() < 0.8 else rng.choice(accepts),
    }
    if rng.random() < 0.1:
        headers["X-Request-Id"] = rng.choice(["a b", "x" * 500, "../..", "é"])
    return body, {name: value.encode("utf-8").decode("latin-1") for name, value in headers.items()}


def event(rng: random.Random, good: bytes) -> Any:
    """An event of Lambda, more or less: an HTTP request with something put wrong, or a call."""
    junk = [
        None,
        True,
        5,
        1.5,
        "",
        "x",
        "\ud800",
        [],
        {},
        [[]],
        {"http": 5},
        {"elb": None},
        {"a": []},
    ]
    text = base64.b64encode(good).decode()
    whole: dict[str, Any] = rng.choice(
        [
            {"base64": text},
            {
                "requestContext": {"http": {"method": rng.choice(["POST", "GET", "OPTIONS", ""])}},
                "headers": {"content-type": "image/jpeg", "accept": "*/*"},
                "body": text,
                "isBase64Encoded": True,
            },
            {
                "requestContext": {"elb": {}},
                "httpMethod": "POST",
                "multiValueHeaders": {"Content-Type": ["application/json"], "Accept": []},
                "body": json.dumps({"base64": text}),
                "isBase64Encoded": False,
            },
        ]
    )
    for _ in range(rng.randrange(3)):
        node: Any = whole
        while isinstance(node, dict) and node:
            key = rng.choice([*node])
            if isinstance(node[key], dict) and rng.random() < 0.5:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = rng.choice(junk)
            break
    if rng.random() < 0.05:
        return rng.choice(junk)
    return whole


def pictures() -> list[bytes]:
    """Small whole pictures of every kind that is read."""
    image = Image.effect_noise((60, 40), 60).convert("RGB")
    made = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        file = io.BytesIO()
        image.save(file, kind)
        made.append(file.getvalue())
    return made


def attack(package: Path, scratch: Path, requests: int, seed: int) -> Counter[int]:
    """How many of the hostile requests got each status. Raises AssertionError."""
    (scratch / "sitecustomize.py").write_text(RECORDER)
    connections = scratch / "connections.txt"
    server = Server(
        *(
            scratch / "log.txt",
            str(package),
            "--max-body",
            "2000000",
            "--max-pixels",
            "2000000",
            "--seconds",
            "10",
        ),
        PYTHONPATH=f"{scratch}:{PROJECT}",
        CONNECTIONS=str(connections),
    )
    good = pictures()
    statuses: Counter[int] = Counter()
    try:
        for file in good:
            assert server.invoke(file).status == 200
        right = server.invoke(good[0]).json
        before = server.memory()
        connection = server.connect()
        for number in range(requests):
            body, headers = make(random.Random(f"{seed} {number}"), good)
            connection.request("POST", "/invocations", body, headers)
            answer = connection.getresponse()
            told = json.loads(answer.read())
            statuses[answer.status] += 1
            assert answer.status < 500, (number, told)
            assert answer.status == 200 or re.fullmatch("[0-9a-zA-Z_-]+", told["request_id"]), (
                number,
                told,
            )
            if number % 50 == 0:
                assert server.invoke(good[0]).json == right, number
        connection.close()
        assert server.invoke(good[0]).json == right
        grown = server.memory() - before
        assert grown < GROWTH, f"memory grew by {grown:,} bytes"
        assert not connections.read_text(), connections.read_text()[:1000]
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.serving.fuzz",
        description="Send hostile requests to a server of its own.",
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        build(
            make_network(), make_contents(Path(scratch, "pictures")), Path(scratch, "model.tar.gz")
        )
        with tarfile.open(Path(scratch, "model.tar.gz")) as tar:
            tar.extractall(Path(scratch, "package"), filter="data")
        statuses = attack(Path(scratch, "package"), Path(scratch), options.requests, options.seed)
    print(
        f"{options.requests} requests, seed {options.seed}:",
        ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())),
    )


if __name__ == "__main__":
    sys.exit(main())
