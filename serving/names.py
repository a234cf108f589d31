"""The names that a server goes by: a page of any site may have one of its own that leads here."""

import ipaddress


def known_hosts(host: str, names: str) -> frozenset[str]:
    """Return the names that a server goes by; none for any.

    host: that it listens on. names: the setting.
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
    """Return whether a server that listens there hears this machine alone."""
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
