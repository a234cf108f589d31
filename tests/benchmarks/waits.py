"""What people wait for besides training: figures, the end of a run, the prompt, a cold Lambda."""

import io
import os
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from tests.benchmarks import photos
from tests.benchmarks.measure import cpu_of, ratio, short
from tests.benchmarks.table import Row, Table
from tests.conftest import PROJECT
from tests.serving.runtime import Endpoint
from trainer.network import probe
from trainer.network.device import counting
from trainer.training.metrics import classification

TITLE = "What people wait for"
PICTURES, CLASSES = 50_000, 1_000
PHOTOS, BREEDS, WIDTH = 1_000, 100, 512
NOTE = f"""In CPU seconds: the figures of {PICTURES:,} pictures in {CLASSES:,} classes (loss, top-1,
top-5 and macro F1) from their logits, by torchmetrics alone and as a run computes them, when
torchmetrics is loaded; and a function of AWS Lambda in front of an endpoint, from the start of
Python to the end of its initialisation, and its first request, which a server on this machine
answers, against a function of five lines with boto3.

A head is solved on the features of {PHOTOS:,} pictures, two views each, in {BREEDS} classes, its
penalty chosen from 11 by 5 folds: by scikit-learn's LogisticRegressionCV, to which views are
pictures of their own, and as `model.head=probe` does it.

In seconds of wall time: the end of a run of MobileNetV2 (frozen, 224 px, 48 pictures), from its
last figure to the last line that it prints: package, self-test, predictions and report, with the
export made before the training; and from there to the prompt. A ratio below 1 is better here."""
COLUMNS = ("ratio", "seconds")

ENDS = """
import runpy, sys, time
from trainer.results import outcome
from trainer.training.run import Run

test, summarize = outcome.test, Run.summarize

def tested(training):
    result = test(training)
    print("TESTED", time.time(), flush=True)
    return result

def summarized(run, result):
    summarize(run, result)
    print("SUMMARIZED", time.time(), flush=True)

outcome.test, Run.summarize = tested, summarized
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""

PLAIN = """
import boto3
client = boto3.client("sagemaker-runtime")
def handler(event, context):
    return client.invoke_endpoint(EndpointName="dogs", Body=b"x")["Body"].read().decode()
"""

COLD = """
import resource

def used():
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime

from {module} import handler

class Context:
    aws_request_id = "x"

begun = used()
assert "0.25" in str(handler({{"base64": "aGFsbG8="}}, Context))
print(begun, used() - begun)
"""


def measure(scratch: Path, rounds: int) -> Table:
    return Table(
        TITLE,
        NOTE,
        COLUMNS,
        [
            *figures(rounds),
            *heads(rounds),
            *functions(scratch, rounds),
            *ends(scratch, rounds),
        ],
        ("torchmetrics", "scikit-learn", "boto3"),
    )


def figures(rounds: int) -> list[Row]:
    from torchmetrics.functional import classification as theirs

    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (PICTURES,))
    logits = torch.randn(PICTURES, CLASSES)
    logits[torch.arange(PICTURES), labels] += 3

    @counting()  # or it takes 400 GB, in the mode of another benchmark of this process
    def alone() -> None:
        torch.nn.functional.cross_entropy(logits, labels)
        theirs.multiclass_accuracy(logits, labels, CLASSES, average="micro")
        theirs.multiclass_accuracy(logits, labels, CLASSES, average="micro", top_k=5)
        theirs.multiclass_f1_score(logits, labels, CLASSES, average="macro")

    costs: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(rounds):
        costs["theirs"].append(cpu_of(alone))
        costs["ours"].append(cpu_of(lambda: classification(logits, labels, "valid")))
    share, seconds = ratio(costs["ours"], costs["theirs"]), median(costs["ours"])
    return [
        Row("figures: torchmetrics, of the logits", ("1", short(median(costs["theirs"])))),
        Row("figures: ours", (str(share), short(seconds)), "at most 0.4 s", seconds <= 0.4),
    ]


def heads(rounds: int) -> list[Row]:
    # imported here: a peer, which the environment of the tests has not
    from sklearn.linear_model import LogisticRegressionCV

    rng = np.random.default_rng(0)
    labels = np.arange(PHOTOS) % BREEDS
    centres = rng.normal(size=(BREEDS, WIDTH))
    views = centres[labels][:, None] + 3 * rng.normal(size=(PHOTOS, 2, WIDTH))
    views = views.astype(np.float32)
    each = (views - views.mean(axis=(0, 1))).reshape(-1, WIDTH)
    each /= np.sqrt(np.square(each).sum(axis=1).mean())
    strengths = [1 / (penalty * len(each)) for penalty in probe.PENALTIES]
    theirs = LogisticRegressionCV(Cs=strengths, cv=5, scoring="neg_log_loss", max_iter=500)
    costs: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(rounds):
        with warnings.catch_warnings(action="ignore"):  # of what a next version will change
            costs["theirs"].append(cpu_of(lambda: theirs.fit(each, labels.repeat(2))))
        costs["ours"].append(cpu_of(lambda: probe.fit(views, labels, BREEDS, seed=0)))
    share, seconds = ratio(costs["ours"], costs["theirs"]), median(costs["ours"])
    return [
        Row("a head: scikit-learn", ("1", short(median(costs["theirs"])))),
        Row("a head: ours", (str(share), short(seconds)), "at most 1x", share.median <= 1),
    ]


def functions(scratch: Path, rounds: int) -> list[Row]:
    # imported here: they need the extras of serving.
    from serving.deploy import bundle

    ours, plain = scratch / "ours", scratch / "plain"
    with zipfile.ZipFile(io.BytesIO(bundle.proxy())) as archive:
        archive.extractall(ours)
    plain.mkdir()
    (plain / "plain.py").write_text(PLAIN)
    inits: dict[str, list[float]] = {"plain": [], "lambda_function": []}
    requests: dict[str, list[float]] = {"plain": [], "lambda_function": []}
    with Endpoint() as endpoint:
        endpoint.answer = lambda: (200, b"[[0.25, -1.5]]", {})
        for _ in range(rounds):
            for module, place in (("plain", plain), ("lambda_function", ours)):
                init, request = cold(place, module, endpoint.url)
                inits[module].append(init)
                requests[module].append(request)
    rows = []
    for what, costs in (("initialisation", inits), ("first request", requests)):
        share, seconds = ratio(costs["lambda_function"], costs["plain"]), costs["lambda_function"]
        target, met = "at most 1x", share.median <= 1
        if what == "first request":
            target, met = "at most 0.01 s", median(seconds) <= 0.01
        rows += [
            Row(f"Lambda, {what}: plain boto3", ("1", short(median(costs["plain"])))),
            Row(f"Lambda, {what}: ours", (str(share), short(median(seconds))), target, met),
        ]
    return rows


def cold(place: Path, module: str, url: str) -> tuple[float, float]:
    """Return the CPU seconds of a function's initialisation, and of its first request."""
    environment = os.environ | {
        "ENDPOINT_NAME": "dogs",
        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_LAMBDA_RUNTIME_API": "127.0.0.1:1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", COLD.format(module=module)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    init, request = map(float, done.stdout.split())
    return init, request


def ends(scratch: Path, rounds: int) -> list[Row]:
    root = photos.write(scratch / "photos", 48, 500, 375)
    ended, prompt = [], []
    for number in range(rounds):
        command = [sys.executable, "-c", ENDS, f"data.root={root}", f"seed={number}"]
        command += ["data=folder", "data.size=224", "data.resize=256", "train.epochs=2"]
        command += ["model=torchvision", "model.name=mobilenet_v2", "model.weights=null"]
        command += ["model.freeze=backbone", "train.batch_size=16"]
        command += [f"platform.runs={scratch / 'runs'}", f"platform.cache={scratch / 'cache'}"]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        finished = time.time()
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        words = done.stdout.split()
        tested, summarized = (
            float(words[words.index(word) + 1]) for word in ("TESTED", "SUMMARIZED")
        )
        ended.append(summarized - tested)
        prompt.append(finished - summarized)
    return [
        Row(
            "the end of a run: package, self-test, report",
            ("", short(median(ended))),
            "at most 5 s",
            median(ended) <= 5,
        ),
        Row(
            "the end of a run: back at the prompt",
            ("", short(median(prompt))),
            "at most 1 s",
            median(prompt) <= 1,
        ),
    ]
