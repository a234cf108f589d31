"""The host names under which a server answers, against DNS rebinding (`App._check_host`)."""

import ipaddress


def known_hosts(host: str, names: str) -> frozenset[str]:
    """Return the names under which a server answers; empty: any.

    host: the one that it listens on. names: the setting `hosts`.
    """
    if not names:
        if not is_loopback(host):
            return frozenset()
        names = f"localhost,127.0.0.1,::1,{host}"
    words = frozenset(word.strip().strip("[]").lower() for word in names.split(","))
    if "*" in words:
        return frozenset()
    return words


def is_loopback(host: str) -> bool:
    """Return whether a server that listens there can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_port(host: str) -> str:
    """Return the name in a Host header."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    return name.strip("[]").rstrip(".").lower()
