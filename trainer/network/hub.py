"""A check that the servers of pretrained weights answer, before a library downloads from them.

Without a network, timm retries for 25 seconds per model; where a firewall drops packets,
torchvision waits for minutes. Neither says what it waits for.
"""

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

from trainer.common.console import log

PATIENCE = 5.0  # seconds; a connection that takes longer is too slow to download weights


class Absent(Exception):
    """Weights that can't be had. The message says why."""


def check(url: str) -> None:
    """Raise Absent where the server of a URL can't be reached.

    Behind a proxy nothing is checked: only the proxy can tell.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxied = urllib.request.getproxies().get(parts.scheme)
    if proxied and not urllib.request.proxy_bypass(host):
        return
    ports = {"https": 443, "http": 80}
    port = parts.port or ports.get(parts.scheme)
    if not host or port is None:  # a file's URL, for example
        return
    reason = _reason(host, port)
    if reason:
        raise Absent(f"{host} can't be reached: {reason}")


@functools.cache
def _reason(host: str, port: int) -> str | None:
    """Return why a server can't be reached, None where it can. Each is asked once."""
    log.info("weights: asking %s", host)
    try:
        with socket.create_connection((host, port), PATIENCE):
            return None
    except TimeoutError:
        return f"no answer in {PATIENCE:g} seconds"
    except OSError as error:
        return error.strerror or str(error)
