"""`python -m serving bench URL`: how fast a server answers, and what to deploy for a load."""

import argparse
import http.client
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from launch.cloud.prices import FALLBACK, HOURS_A_MONTH, price
from trainer.common.arguments import positive, typed_path
from trainer.common.errors import OK, UserError

MOST_CLIENTS = 1000
HEADROOM = 0.7  # of what an instance can do: autoscaling reacts after minutes
PROVISIONED = 3  # the fewest warm Lambda environments, as in stack.yaml


@dataclass(frozen=True)
class Load:
    """The answers to clients that each wait for an answer before they ask again."""

    clients: int
    seconds: float
    latencies: Sequence[float]  # seconds, of the answers with status 200; sorted
    failed: int

    @property
    def rate(self) -> float:
        """Return the answers per second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Return the latency in seconds that this share of the answers kept (nearest rank)."""
        return self.latencies[max(0, math.ceil(share * len(self.latencies)) - 1)]


@dataclass(frozen=True)
class Advice:
    """What to deploy for a load."""

    target: int  # SageMakerVariantInvocationsPerInstance: requests per minute and instance
    instances: int
    concurrency: int  # Lambda environments busy at once
    month: float  # US dollars per month, for the instances


def main(arguments: Sequence[str]) -> int:
    """Measure a server, and print what to deploy. arguments: the verb and its own.

    Raises UserError where the server answers nothing.
    """
    options = _parser().parse_args(arguments[1:])
    rented = price(options.instance, FALLBACK)
    if rented.on_demand is None:
        raise UserError(
            f"--instance {options.instance}: its price is not known; "
            "python -m launch prices lists those that are"
        )
    image = example()
    if options.picture:
        image = options.picture.read_bytes()
    loads = []
    print(f"{len(image):,} bytes a picture\n\nclients  answers/s  p50 ms  p95 ms  p99 ms  failed")
    for clients in counts(options.clients):
        load = measure(options.url, image, clients, options.seconds)
        p50, p95, p99 = (1000 * load.quantile(share) for share in (0.5, 0.95, 0.99))
        print(
            f"{clients:7}  {load.rate:9.1f}  {p50:6.1f}  {p95:6.1f}  {p99:6.1f}  {load.failed:6}",
            flush=True,
        )
        loads.append(load)
    advice = advise(loads, options.rate, options.limit, rented.on_demand)
    if advice is None:
        print(
            f"\nNo load had 95% of its answers within {options.limit:g} s: take a faster "
            "instance, int8 (package.int8=true) or a smaller network."
        )
        return OK
    warm = max(PROVISIONED, advice.concurrency)
    print(
        f"\nFor {options.rate:g} requests a minute, "
        f"if {options.instance} is as fast as this machine:\n"
        f"  autoscaling target   {advice.target} invocations a minute and instance "
        f"({HEADROOM:.0%} of what it can do)\n"
        f"  instances            {advice.instances} at the busiest time\n"
        f"  Lambda concurrency   {advice.concurrency} at the busiest time; "
        f"provisioned {warm} leaves no cold start\n"
        f"  instances' price     ${advice.month:,.0f} a month "
        f"(${rented.on_demand} an hour, {rented.basis})"
    )
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving bench",
        description="Measure a server, and say what to deploy for a load.",
    )
    parser.add_argument("url", help="of the server, like http://127.0.0.1:8080")
    parser.add_argument(
        "--picture",
        type=typed_path,
        help="the file to send (default: a JPEG of 500 x 375 pixels, made here)",
    )
    parser.add_argument(
        "--clients",
        default="1,2,4,8",
        help="numbers of clients that ask at once, measured in turn (default %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=positive, default=5.0, help="for each number (default %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=positive,
        default=50.0,
        help="requests a minute to plan for, at the busiest time (default %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=1.0,
        help="seconds that 95%% of the answers may take (default %(default)s)",
    )
    parser.add_argument(
        "--instance",
        metavar="TYPE",
        default="ml.m5.large",
        help="the instance type that this machine represents (default %(default)s)",
    )
    return parser


def counts(text: str) -> list[int]:
    """Return the numbers of clients in a text like "1,2,4". Raises UserError."""
    try:
        numbers = [*map(int, text.split(","))]
    except ValueError as error:
        raise UserError(f"--clients {text}: not numbers; give some like 1,2,4") from error
    if not 1 <= min(numbers) <= max(numbers) <= MOST_CLIENTS:
        raise UserError(
            f"--clients {text}: allowed: numbers, at least 1 and at most {MOST_CLIENTS}"
        )
    return numbers


def example() -> bytes:
    """Return a JPEG of a photo's size and detail."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(smooth) + rng.normal(0, 18, (375, 500, 3)), 0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(
    url: str,
    body: bytes,
    clients: int,
    seconds: float,
    content_type: str = "application/octet-stream",
) -> Load:
    """Post `body` to /invocations again and again, by so many clients for so many seconds.

    Raises UserError where no request is answered.
    """
    connections = [_connect(url) for _ in range(clients)]
    latencies: list[float] = []
    failures: list[str] = []
    began = time.monotonic()

    def ask(connection: http.client.HTTPConnection) -> None:
        while time.monotonic() < began + seconds:
            start = time.monotonic()
            try:
                connection.request("POST", "/invocations", body, {"Content-Type": content_type})
                answer = connection.getresponse()
                told = answer.read()
            except (OSError, http.client.HTTPException) as error:
                failures.append(str(error) or type(error).__name__)
                connection.close()
                time.sleep(0.1)
                continue
            if answer.status == 200:
                latencies.append(time.monotonic() - start)
            else:
                failures.append(f"{answer.status} {_error(told)}")
                time.sleep(float(answer.headers.get("Retry-After") or 0.1))
        connection.close()

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, connections))
    if not latencies:
        reason = (*failures, "nothing came in time")[0]
        raise UserError(f"{url}: no request was answered ({reason}); check that the server runs")
    return Load(clients, time.monotonic() - began, sorted(latencies), len(failures))


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url}: not a server's URL; give one like http://127.0.0.1:8080")
    kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
    if parts.scheme == "https":
        kind = http.client.HTTPSConnection
    return kind(parts.hostname, parts.port, timeout=60)


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return ""


def advise(loads: Sequence[Load], per_minute: float, limit: float, price: float) -> Advice | None:
    """Return what to deploy for `per_minute` requests, 95 % of them answered within `limit` s.

    price: US dollars per instance and hour. None where no load was answered so fast.
    """
    good = [load for load in loads if load.quantile(0.95) <= limit and not load.failed]
    if not good:
        return None
    best = max(good, key=lambda load: load.rate)
    target = max(1, math.floor(HEADROOM * best.rate * 60))
    instances = max(1, math.ceil(per_minute / target))
    # Little's law: requests in progress = arrival rate x seconds per request.
    concurrency = math.ceil(per_minute / 60 * best.quantile(0.95))
    return Advice(target, instances, concurrency, instances * price * HOURS_A_MONTH)
