"""Fetches a URL from a stranger, but only from hosts that the stranger could reach too.

In server-side request forgery a caller makes our machine ask one that only ours can reach: its
metadata service, its neighbours, itself. So the code checks each address just before it connects to
that very address, however the URL is spelled, and after each redirect. Standard library only: the
Lambda function's zip holds a copy of this file.
"""

import contextlib
import functools
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, urljoin, urlsplit

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_URL = 4096  # characters: S3's presigned URLs take about 2,000
MAX_REDIRECTS = 3
CHUNK = 64 << 10  # bytes read at a time
PORTS = {"http": 80, "https": 443}
SAFE = "/%:@!$&'()*+,;=~"  # characters of a path that are sent unquoted
REDIRECTS = {301, 302, 303, 307, 308}

# Addresses that no image on the public internet has: IANA's two special-purpose registries
# (RFC 6890), and those that clouds add. `ipaddress.is_global` doesn't suffice: it accepts
# multicast, NAT64, 6to4 and IPv4-compatible addresses, and each of them can lead inside.
FORBIDDEN = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network (RFC 791); Linux takes 0.0.0.0 for itself
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # carrier-grade NAT (RFC 6598); Alibaba's metadata service
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform services, on a public address
        # Link-local: the metadata service (169.254.169.254), ECS credentials (169.254.170.2),
        # Lambda's own.
        "169.254.0.0/16",
        "172.16.0.0/12",  # private (RFC 1918)
        "192.0.0.0/24",  # IETF protocols (RFC 6890); Oracle's metadata service
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT: leads to multicast
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private (RFC 1918)
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        # All IPv6 outside GLOBAL_IPV6 is forbidden without being listed here: loopback,
        # IPv4-mapped (::ffff:0:0/96) and IPv4-compatible (::/96), NAT64 (64:ff9b::/96,
        # 64:ff9b:1::/48), unique local with AWS's fd00:ec2::254, link-local, site-local, multicast.
        "2001::/23",  # IETF protocols; Teredo (2001::/32) holds IPv4 addresses
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: holds IPv4 addresses
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # 6bone, returned to IANA
        "3fff::/20",  # documentation
    )
)
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # all global unicast that IANA has allocated

LOOK_SECONDS = 0.25  # between two checks, while no data comes, that the fetch is still wanted
NO_HEADERS: Mapping[str, str] = {}


class RequestError(Exception):
    """A request gets no prediction. status, headers: of HTTP. The message is for the caller."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class FetchError(RequestError):
    """The URL was tried, and gave no usable answer."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class Refused(FetchError):
    """The URL may not be tried. `reason` is for our own log.

    The caller always sees the same message, so that nobody can map a network by refusals.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the URL is not allowed: it must be http or https, on port 80 or 443, "
            "of a host with public addresses only"
        )
        self.reason = reason


class ByteLimit:
    """Counts the bytes of one request's images. Call it with the size of each piece."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    def __call__(self, size: int) -> None:
        """Raise RequestError where the request would have more bytes than its limit."""
        if self.taken + size > self.limit:
            raise RequestError(413, f"the pictures have together more than {self.limit:,} bytes")
        self.taken += size


def fetch(
    url: str, *, max_bytes: int, deadline: float, reserve: Callable[[int], None] = lambda size: None
) -> bytes:
    """Return the body of the answer to a GET of `url`, whatever its content type.

    deadline: seconds for everything together (names, connections, redirects, body).
    max_bytes: of the body. reserve: called with the size of each piece that comes, and with 0 while
    none comes; an exception from it ends the fetch. Ignores the environment's proxies, cookies and
    credentials. Raises Refused or FetchError.
    """
    end = time.monotonic() + deadline
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _parse(url)
            with _connected(parts, end, reserve) as stream:
                status, location, body = _get(parts, stream, max_bytes, reserve)
            if status == 200:
                return body
            if status not in REDIRECTS or not location:
                raise FetchError(f"the URL's server answered {status}")
            url = urljoin(url, location)
    except TimeoutError as error:
        raise FetchError(f"the URL gave no whole answer within {deadline:g} s") from error
    # ValueError: http.client raises it for forged lengths
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError("the URL's server could not be reached, or broke off") from error
    raise FetchError(f"the URL redirects more than {MAX_REDIRECTS} times")


def public(address: str) -> bool:
    """Return whether an IP address, as getaddrinfo writes it, is on the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.scope_id is not None or ip not in GLOBAL_IPV6):
        return False
    return not any(ip in network for network in FORBIDDEN)


def _parse(url: str) -> SplitResult:
    if len(url) > MAX_URL:
        raise Refused(f"{len(url)} characters")
    # urlsplit drops tabs and line ends, and some parsers take a backslash for a slash: refuse any
    # URL that two parsers could read in two ways.
    if any(character <= " " or character in "\\\x7f" for character in url):
        raise Refused("white space, a control character or a backslash")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except (ValueError, UnicodeError) as error:
        raise Refused(f"no URL: {error}") from error
    if parts.scheme not in PORTS:
        raise Refused(f"scheme {parts.scheme!r}")
    if "@" in parts.netloc:
        raise Refused("user information")
    if not host or "%" in host:
        raise Refused(f"host {host!r}")
    if port not in (None, *PORTS.values()):
        raise Refused(f"port {port}")
    if ":" in host:
        host = f"[{host}]"
    if port is not None:
        host = f"{host}:{port}"
    return parts._replace(netloc=host)


@contextlib.contextmanager
def _connected(
    parts: SplitResult, end: float, reserve: Callable[[int], None]
) -> Iterator["_Stream"]:
    """Connect to a checked address of the URL's host.

    For https use TLS, and verify the host's certificate.
    """
    host = parts.hostname
    assert host
    addresses = _resolve(host, parts.port or PORTS[parts.scheme], end, reserve)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(_connect(addresses, end))
        if parts.scheme == "https":
            connection.settimeout(_left(end))
            connection = stack.enter_context(_tls().wrap_socket(connection, server_hostname=host))
        yield _Stream(connection, end, reserve)


_reading_certificates = threading.Lock()


def _tls() -> ssl.SSLContext:
    """Return the one TLS context: to read the system's certificates takes 30 ms of CPU time.

    With functools.cache alone, fetches that begin together would each read them.
    """
    with _reading_certificates:
        return _one_tls()


@functools.cache
def _one_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _resolve(
    host: str, port: int, end: float, reserve: Callable[[int], None]
) -> list[tuple[str, int]]:
    """Return the host's addresses, all of them public.

    Raises Refused, also for a name that doesn't exist: callers must not learn which names do.
    """
    addresses: list[tuple[str, int]] = []

    def look_up() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses.extend((str(address[0]), int(address[1])) for *_, address in answers)

    # The system's resolver has no deadline. Where it takes too long, its thread is left alone, and
    # ends by itself.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    while True:
        thread.join(min(_left(end), LOOK_SECONDS))
        if not thread.is_alive():
            break
        reserve(0)
    if not addresses:
        raise Refused(f"{host} has no address")
    for address, _ in addresses:
        if not public(address):
            raise Refused(f"{host} has the address {address}")
    return addresses


def _connect(addresses: list[tuple[str, int]], end: float) -> socket.socket:
    for number, address in enumerate(addresses):
        try:
            return socket.create_connection(address, _left(end) / (len(addresses) - number))
        except OSError as error:
            last = error
    raise last


def _get(
    parts: SplitResult, stream: "_Stream", max_bytes: int, reserve: Callable[[int], None]
) -> tuple[int, str | None, bytes]:
    """Return the status, the Location header, and the body of a 200."""
    target = quote(parts.path or "/", safe=SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=f"{SAFE}?")
    connection = http.client.HTTPConnection(parts.netloc)
    connection.sock = stream  # connected already: http.client makes no connection of its own
    headers = {
        "Host": parts.netloc,
        "User-Agent": "packhorse",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    if response.status != 200:
        return response.status, response.getheader("Location"), b""
    if (response.length or 0) > max_bytes:
        raise FetchError(f"the URL's file has {response.length:,} bytes; allowed: {max_bytes:,}")
    body = io.BytesIO()
    # Read one byte more than allowed, to recognise a longer body.
    while chunk := response.read(min(CHUNK, max_bytes + 1 - body.tell())):
        reserve(len(chunk))
        body.write(chunk)
        if body.tell() > max_bytes:
            raise FetchError(f"the URL's file has more than the allowed {max_bytes:,} bytes")
    if response.length:
        raise FetchError("the URL's server broke off")
    return 200, None, body.getvalue()


class _Stream(io.RawIOBase):
    """The part of a socket that http.client uses; each call ends at the common deadline.

    A socket's own timeout would begin anew with every byte.
    """

    def __init__(
        self, connection: socket.socket, end: float, reserve: Callable[[int], None]
    ) -> None:
        self._connection, self._end, self._reserve = connection, end, reserve

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(_left(self._end))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        # A second stream: http.client closes its socket as soon as it has the answer's head, and
        # then reads the body.
        return io.BufferedReader(_Stream(self._connection, self._end, self._reserve))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while True:
            self._connection.settimeout(min(_left(self._end), LOOK_SECONDS))
            try:
                return self._connection.recv_into(buffer)
            except TimeoutError:
                self._reserve(0)


def _left(end: float) -> float:
    """Return the seconds until `end`. Raises TimeoutError where none are left."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
