"""The network is real, on loopback, but for two things.

These are what a name resolves to, and that public addresses lead to our own servers.
"""

import gzip
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serving.fetch import (
    FORBIDDEN,
    MAX_REDIRECTS,
    FetchError,
    Refused,
    _one_tls,
    _tls,
    fetch,
    public,
)
from tests.conftest import PROJECT

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"


class Network:
    """What the machine sees: `names` resolve to addresses.

    Connections to an address and port of `servers` reach a port on loopback.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.servers: dict[tuple[str, int], int] = {}
        self.connected: list[tuple[str, int]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve, connect = socket.getaddrinfo, socket.create_connection

        def getaddrinfo(host, port, *arguments, **keywords):
            if host in self.names:
                return [
                    answer
                    for address in self.names[host]
                    for answer in resolve(address, port, *arguments, **keywords)
                ]
            return resolve(host, port, *arguments, **keywords)

        def create_connection(address, timeout=None, **keywords):
            self.connected.append(address)
            if address not in self.servers:
                raise ConnectionRefusedError
            return connect(("127.0.0.1", self.servers[address]), timeout, **keywords)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket, "create_connection", create_connection)


@pytest.fixture
def network(monkeypatch) -> Network:
    made = Network()
    made.install(monkeypatch)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # must not be used
    return made


class Handler(BaseHTTPRequestHandler):
    replies: dict[str, tuple[int, dict[str, str], bytes]]
    seen: list[tuple[str, str, dict[str, str]]]

    def do_GET(self):
        self.seen.append((self.command, self.path, dict(self.headers)))
        status, headers, body = self.replies[self.path]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(network) -> Handler:
    """A server of `pictures.example` on ports 80 of both its addresses.

    `replies` maps paths to answers.
    """
    handler = type("Site", (Handler,), {"replies": {"/a.jpg": (200, {}, b"picture")}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    network.names = {"pictures.example": [PUBLIC]}
    network.servers = {(PUBLIC, 80): server.server_port, (OTHER, 80): server.server_port}
    yield handler
    server.shutdown()
    server.server_close()


def get(url: str, max_bytes: int = 1000, deadline: float = 5.0) -> bytes:
    return fetch(url, max_bytes=max_bytes, deadline=deadline)


def refusal(url: str) -> Refused:
    with pytest.raises(Refused) as caught:
        get(url)
    return caught.value


# --- what is fetched ---


@pytest.mark.parametrize("length", ["300000", ""], ids=["announced", "not announced"])
def test_what_comes_is_counted_before_more_of_it_is_read(web, length):
    web.replies["/large"] = (200, {"Content-Length": length}, bytes(300_000))
    came: list[int] = []
    url = "http://pictures.example/large"
    assert fetch(url, max_bytes=300_000, deadline=5.0, reserve=came.append) == bytes(300_000)
    assert sum(came) == 300_000 and max(came) <= 65_536

    def refuse(size: int) -> None:
        came.append(size)
        raise MemoryError

    came.clear()
    with pytest.raises(MemoryError):
        fetch(url, max_bytes=300_000, deadline=5.0, reserve=refuse)
    assert len(came) == 1


def test_a_picture_is_fetched_from_the_address_that_was_checked(web, network):
    assert get("http://pictures.example/a.jpg") == b"picture"
    assert network.connected == [(PUBLIC, 80)]
    [(method, path, headers)] = web.seen
    assert (method, path, headers["Host"], headers["Accept-Encoding"]) == (
        "GET",
        "/a.jpg",
        "pictures.example",
        "identity",
    )
    assert not {"Cookie", "Authorization", "Referer", "Proxy-Authorization"} & headers.keys()


@pytest.mark.parametrize(
    ("url", "path", "host"),
    [
        ("http://pictures.example", "/", "pictures.example"),
        (
            "http://pictures.example:80?a=b c".replace(" ", "%20"),
            "/?a=b%20c",
            "pictures.example:80",
        ),
        ("HTTP://Pictures.Example/b#fragment", "/b", "pictures.example"),
        (
            "http://pictures.example/ä%20b?q=ö&X-Amz-Signature=a%2Fb",
            "/%C3%A4%20b?q=%C3%B6&X-Amz-Signature=a%2Fb",
            "pictures.example",
        ),
        (
            "http://[2606:2800:220:1:248:1893:25c8:1946]/b",
            "/b",
            "[2606:2800:220:1:248:1893:25c8:1946]",
        ),
        ("http://93.184.216.34/b", "/b", "93.184.216.34"),
    ],
)
def test_url_spellings(web, url, path, host):
    web.replies[path] = (200, {}, b"other")
    assert get(url) == b"other"
    assert web.seen[0][2]["Host"] == host


def test_names_of_other_scripts_are_asked_for_in_ascii(web, network):
    network.names["xn--bcher-kva.example"] = [PUBLIC]
    assert get("http://bücher.example/a.jpg") == b"picture"
    assert web.seen[0][2]["Host"] == "xn--bcher-kva.example"


def test_the_next_address_is_tried_where_one_does_not_answer(web, network):
    network.names["pictures.example"] = ["93.184.216.35", OTHER]
    assert get("http://pictures.example/a.jpg") == b"picture"
    assert network.connected == [("93.184.216.35", 80), (OTHER, 80)]


def test_redirects_are_followed_and_checked_like_the_first_url(web, network):
    network.names["other.example"] = [OTHER]
    web.replies |= {
        "/1": (302, {"Location": "/2"}, b""),
        "/2": (307, {"Location": "//other.example/a.jpg"}, b""),
    }
    assert get("http://pictures.example/1") == b"picture"
    assert network.connected == [(PUBLIC, 80), (PUBLIC, 80), (OTHER, 80)]


# --- what is refused ---


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "a.jpg",
            "//pictures.example/a",
            "http:",
            "http://",
            "http:///a",
            "http://:80/a",
            "http://?a",
            "http://#a",
        ),
        *(
            "ftp://pictures.example/a",
            "file:///etc/passwd",
            "gopher://pictures.example/",
            "data:image/png;base64,AAAA",
            "javascript:1",
            "s3://a/b",
        ),
        *(
            "http://pictures.example:81/",
            "http://pictures.example:8080/",
            "http://pictures.example:0/",
            "http://pictures.example:65536/",
        ),
        *(
            "http://pictures.example:http/",
            "http://pictures.example:-80/",
            "http://user@pictures.example/",
            "http://user:word@pictures.example/",
        ),
        *(
            "http://93.184.216.34@127.0.0.1/",
            "http://127.0.0.1\\@pictures.example/",
            "http://pictures.example\\.evil/",
            "http://pictures.example /",
        ),
        *(
            " http://pictures.example/",
            "http://pictures.example/\n",
            "http://pictures.example/\r\nHost: evil",
            "http://pic\ttures.example/",
        ),
        *(
            "http://pictures.example/\x00",
            "http://pictures.example/\x7f",
            "http://[::1",
            "http://[fe80::1%25eth0]/",
            "http://fe80::1/",
            "http://a..b/",
        ),
        *(
            "http://" + "a" * 64 + ".example/",
            "http://missing.invalid/",
            "http://pictures.example/" + "a" * 5000,
            "http://\ud800/",
        ),
        *(
            "http://127.0.0.1/",
            "http://127.1/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://2130706433/",
            "http://0/",
            "http://localhost/",
        ),
        *(
            "http://LOCALHOST/",
            "http://localhost./",
            "http://①②⑦.⓪.⓪.①/",
            "http://\uff4cocalhost/",
            "http://127.0.0.1:80/",
            "https://127.0.0.1:443/",
        ),
        *(
            "http://169.254.169.254/latest/meta-data/",
            "http://169.254.170.2/",
            "http://[fd00:ec2::254]/",
            "http://168.63.129.16/",
            "http://100.100.100.200/",
        ),
        *(
            "http://[::]/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:7f00:1]/",
            "http://[::127.0.0.1]/",
            "http://[64:ff9b::7f00:1]/",
        ),
        *(
            "http://[64:ff9b:1::1]/",
            "http://[2002:7f00:1::]/",
            "http://[2001::1]/",
            "http://[ff02::1]/",
            "http://224.0.0.1/",
            "http://255.255.255.255/",
        ),
        *(
            "http://10.0.0.1/",
            "http://172.16.0.1/",
            "http://172.31.255.255/",
            "http://192.168.0.1/",
            "http://100.64.0.1/",
            "http://198.18.0.1/",
        ),
    ],
)
def test_urls_that_may_not_be_tried_are_refused_with_one_and_the_same_message(web, network, url):
    assert str(refusal(url)) == str(refusal("http://10.0.0.1/"))
    assert network.connected == []


@pytest.mark.parametrize(
    "address",
    [
        *(
            "0.0.0.0",
            "9.255.255.255x",
            "10.255.255.255",
            "100.127.255.255",
            "127.255.255.255",
            "169.254.0.1",
            "172.20.1.1",
            "192.0.0.192",
        ),
        *(
            "192.0.2.1",
            "192.88.99.1",
            "192.168.255.255",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "239.255.255.255",
            "240.0.0.1",
        ),
        *(
            "::",
            "::1",
            "::a00:1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "64:ff9b:1::",
            "100::1",
            "2001:0:1::1",
            "2001:db8::1",
            "2002:808:808::1",
        ),
        *(
            "3ffe::1",
            "3fff::1",
            "4000::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fe80::1%lo",
            "fec0::1",
            "ff0e::1",
            "2606:4700::1%lo",
            "",
        ),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "223.255.255.255",
        "2606:4700::1",
        "2a00::1",
    ],
)
def test_addresses_that_are_public(address):
    assert public(address)


def test_the_table_holds_what_python_calls_private_and_more():
    outside = [network for network in FORBIDDEN if network.is_global]
    assert {str(network) for network in outside} >= {
        "168.63.129.16/32",
        "2002::/16",
    }  # why is_global alone is not enough


def test_one_address_that_is_not_public_condemns_the_name(web, network):
    network.names["pictures.example"] = [PUBLIC, "10.0.0.1"]
    assert "10.0.0.1" in refusal("http://pictures.example/a.jpg").reason
    assert network.connected == []


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://inside.example/",
        "ftp://pictures.example/",
        "http://pictures.example:8080/",
        "\\\\a",
    ],
)
def test_a_redirect_to_an_unchecked_place_is_refused(web, network, location):
    network.names["inside.example"] = ["192.168.0.1"]
    web.replies["/1"] = (302, {"Location": location}, b"")
    refusal("http://pictures.example/1")
    assert network.connected == [(PUBLIC, 80)]


def test_a_name_that_changes_its_address_is_checked_each_time(web, network):
    """DNS rebinding: the second answer, for the redirect to the same name, leads inside."""
    web.replies["/1"] = (302, {"Location": "/a.jpg"}, b"")
    do_get = web.do_GET

    def rebind(self):
        network.names["pictures.example"] = ["127.0.0.1"]
        do_get(self)

    web.do_GET = rebind
    refusal("http://pictures.example/1")
    assert network.connected == [(PUBLIC, 80)]


# --- what fails ---


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("/", (404, {}, b"x" * 500), "answered 404"),
        ("/", (500, {}, b""), "answered 500"),
        ("/", (206, {}, b"part"), "answered 206"),
        ("/", (302, {}, b""), "answered 302"),
        ("/", (302, {"Location": "/"}, b""), f"redirects more than {MAX_REDIRECTS} times"),
        ("/", (200, {}, b"x" * 1001), "has 1,001 bytes; allowed: 1,000"),
        ("/", (200, {"Content-Length": ""}, b"x" * 1001), "more than the allowed 1,000 bytes"),
        ("/", (200, {"Content-Length": "900"}, b"x"), "broke off"),
        (
            "/",
            (200, {"Content-Length": "", "Transfer-Encoding": "chunked"}, b"5\r\nab"),
            "broke off",
        ),
        (
            "/",
            (200, {"Content-Length": "", "Transfer-Encoding": "chunked"}, b"zz\r\n"),
            "broke off",
        ),
    ],
)
def test_what_gives_no_picture_is_an_error_for_the_caller(web, path, reply, message):
    web.replies[path] = reply
    with pytest.raises(FetchError, match=message) as caught:
        get("http://pictures.example/")
    assert not isinstance(caught.value, Refused)


def test_bytes_come_as_they_are(web):
    packed = gzip.compress(b"picture" * 100)
    web.replies["/"] = (200, {"Content-Encoding": "gzip", "Content-Type": "text/html"}, packed)
    assert get("http://pictures.example/") == packed


def test_a_server_that_is_away_is_an_error(network):
    network.names = {"pictures.example": [PUBLIC]}
    with pytest.raises(FetchError, match="could not be reached"):
        get("http://pictures.example/")


@pytest.fixture
def raw(network) -> Callable[[Callable[[socket.socket], None]], None]:
    """Puts a server for one connection, given as a function, behind http://pictures.example."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        network.names = {"pictures.example": [PUBLIC]}
        network.servers = {(PUBLIC, port): listener.getsockname()[1] for port in (80, 443)}

        def serve(talk: Callable[[socket.socket], None]) -> None:
            def accept() -> None:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    talk(connection)

            threading.Thread(target=accept, daemon=True).start()

        yield serve


def trickle(start: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            time.sleep(0.05)
            connection.sendall(b"a")

    return talk


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"],
    ids=["status", "headers", "body"],
)
def test_a_server_that_trickles_is_left_at_the_deadline(raw, start):
    raw(trickle(start))
    with pytest.raises(
        FetchError, match=r"no whole answer within 0\.4 s"
    ):  # it would trickle for a minute
        get("http://pictures.example/", deadline=0.4)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 999999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 99999,
    ],
)
def test_what_is_no_http_is_an_error(raw, answer):
    raw(lambda connection: connection.sendall(answer))
    with pytest.raises(FetchError, match=r"broke off|answered"):
        get("http://pictures.example/")


def test_a_resolver_that_hangs_is_left_at_the_deadline(network, monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **keywords: hang.wait(10) and [])
    with pytest.raises(FetchError, match=r"no whole answer within 0\.2 s"):
        get("http://pictures.example/", deadline=0.2)
    hang.set()


# --- TLS ---


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
@pytest.mark.parametrize(
    ("certified", "message"),
    [
        ("pictures.example", None),
        ("other.example", "could not be reached"),
        (None, "could not be reached"),
    ],
)
def test_the_certificate_must_be_the_names_own_and_trusted(
    raw, tmp_path, monkeypatch, certified, message
):
    name = certified or "pictures.example"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
        "-subj",
        f"/CN={name}",
        "-addext",
        f"subjectAltName=DNS:{name}",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    if certified:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    _one_tls.cache_clear()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    asked: list[str | None] = []
    context.sni_callback = lambda _, server_name, __: asked.append(server_name)

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1000)
            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture")

    raw(talk)
    if message is None:
        assert get("https://pictures.example/") == b"picture"
    else:
        with pytest.raises(FetchError, match=message):
            get("https://pictures.example/")
    assert asked == ["pictures.example"]
    _one_tls.cache_clear()


def test_the_module_needs_the_standard_library_only():
    script = (
        "import sys; before = set(sys.modules); import fetch; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=PROJECT / "serving",
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"fetch"}


def test_fetches_that_begin_together_read_the_certificates_once(monkeypatch):
    _one_tls.cache_clear()
    together, read = threading.Barrier(8), []

    def create():
        read.append(None)
        time.sleep(0.05)
        return read

    def use():
        together.wait()
        return _tls()

    monkeypatch.setattr(ssl, "create_default_context", create)
    with ThreadPoolExecutor(8) as pool:
        assert all(use.result() is read for use in [pool.submit(use) for _ in range(8)])
    _one_tls.cache_clear()
    assert len(read) == 1
