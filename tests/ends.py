"""`python -m tests.ends` shows until when AWS supports what the project uses (`make ends`).

It ends with exit code 1 where something ends within 60 days, or where botocore knows a newer value
than the table has seen. `tests/test_ends.py`, which is right at any date, holds the table against
the code: each name is read from where the project has it.
"""

import argparse
import datetime
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date

import botocore.session
import yaml

from launch.targets import notebook, sagemaker
from launch.targets.instance_types import LOCAL_GB, OFFERED
from tests.conftest import PROJECT

WARN_DAYS = 60


@dataclass(frozen=True)
class Support:
    """Until when AWS supports something, and where that was read.

    ends: the last day with patches; None where AWS names none.
    """

    ends: date | None
    source: str
    read: date
    note: str = ""


LOOKED_UP = date(2026, 11, 26)
DLC = "https://aws.github.io/deep-learning-containers/reference/support_policy"
DLAMI = "https://docs.aws.amazon.com/dlami/latest/devguide/support-policy.html"
LAMBDA = "https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html"
INSTANCES = "https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html"
VARIANT = "https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ProductionVariant.html"
NOTEBOOKS = (
    "https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateNotebookInstance.html"
)
BUILDS = "https://docs.aws.amazon.com/codebuild/latest/userguide/ec2-compute-images.html"
CLI = (
    "https://aws.amazon.com/blogs/developer/"
    "aws-cli-v1-maintenance-mode-announcing-changes-to-dependency-updates/"
)

# By the kind of thing and AWS's name for it, as `used` yields them.
TABLE = {
    ("training image", "pytorch:2.13"): Support(
        date(2027, 7, 20), DLC, LOOKED_UP, "2.14 is there since 2026-09-28; its AMI was not seen"
    ),
    ("machine image", "pytorch-2.13"): Support(
        date(2027, 7, 20), DLAMI, LOOKED_UP, "by the policy: a year after the release"
    ),
    ("system", "amazon-linux-2023"): Support(date(2029, 6, 30), DLAMI, LOOKED_UP),
    ("notebook platform", "notebook-al2023-v2"): Support(None, NOTEBOOKS, LOOKED_UP),
    ("Lambda runtime", "python3.13"): Support(
        date(2029, 6, 30), LAMBDA, LOOKED_UP, "python3.14 ends on the same day"
    ),
    ("inference image", "al2023-ami-sagemaker-inference-gpu-4-1"): Support(
        None, VARIANT, LOOKED_UP, "driver 580, CUDA 13.0"
    ),
    ("build image", "amazonlinux-x86_64-standard:5.0"): Support(
        None, BUILDS, LOOKED_UP, "Amazon Linux 2023; the newest of its line"
    ),
    ("instance family", "g4dn"): Support(None, INSTANCES, LOOKED_UP),
    ("instance family", "g5"): Support(None, INSTANCES, LOOKED_UP),
    ("instance family", "g6"): Support(None, INSTANCES, LOOKED_UP),
    ("instance family", "g6e"): Support(None, INSTANCES, LOOKED_UP),
    ("instance family", "m5"): Support(None, INSTANCES, LOOKED_UP),
    ("instance family", "t3"): Support(None, INSTANCES, LOOKED_UP),
    ("command line", "awscli 1"): Support(
        date(2027, 7, 15),
        CLI,
        LOOKED_UP,
        "in maintenance since 2026-07-15, which by AWS's policy lasts a year; in tests only, "
        "since version 2 is not on PyPI",
    ),
}

# The values that botocore named when the table was written. A new one is to be looked at.
NOTEBOOK_PLATFORMS = {
    "notebook-al1-v1", "notebook-al2-v1", "notebook-al2-v2", "notebook-al2-v3",
    "notebook-al2023-v1", "notebook-al2023-v2",
}  # fmt: skip
INFERENCE_IMAGES = {
    "al2-ami-sagemaker-inference-gpu-2", "al2-ami-sagemaker-inference-gpu-2-1",
    "al2-ami-sagemaker-inference-gpu-3-1", "al2-ami-sagemaker-inference-neuron-2",
    "al2023-ami-sagemaker-inference-gpu-4-1",
}  # fmt: skip
LAMBDA_PYTHONS = {
    "python2.7", "python3.6", "python3.7", "python3.8", "python3.9", "python3.10", "python3.11",
    "python3.12", "python3.13", "python3.14", "python3.15",
}  # fmt: skip
GPU_FAMILIES = {
    "g2", "g3", "g3s", "g4ad", "g4dn", "g5", "g5g", "g6", "g6e", "g6f", "g7", "g7e", "gr6", "gr6f",
    "p2", "p3", "p3dn", "p4d", "p4de", "p5", "p5e", "p5en", "p6-b200", "p6-b300", "p6e-gb200",
}  # fmt: skip


def used() -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of what the project uses of AWS's, from where the project names it."""
    yield "training image", f"pytorch:{sagemaker.PYTORCH}"
    ec2 = yaml.safe_load((PROJECT / "conf/target/ec2.yaml").read_text())
    [(pytorch, system)] = re.findall(
        r"gpu-(pytorch-[\d.]+)-(amazon-linux-\d+)/", ec2["ssm_parameter"]
    )
    yield "machine image", pytorch
    yield "system", system
    yield "notebook platform", notebook.AL2023
    stack = (PROJECT / "serving/stack.yaml").read_text()
    for runtime in set(re.findall(r"^ +Runtime: (\S+)$", stack, re.MULTILINE)):
        yield "Lambda runtime", runtime
    for image in set(re.findall(r"\b\w+-ami-sagemaker-inference-[\w-]+", stack)):
        yield "inference image", image
    builds = (PROJECT / "serving/image.yaml").read_text()
    for image in re.findall(r"^ +Image: aws/codebuild/(\S+)$", builds, re.MULTILINE):
        yield "build image", image
    families = {each.name.removeprefix("ml.").partition(".")[0] for each in OFFERED}
    for family in sorted(families | set(LOCAL_GB)):
        yield "instance family", family
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    for each in extras["optional-dependencies"]["dev"]:
        if version := re.match(r"awscli>=(\d+)", each):
            yield "command line", f"awscli {version[1]}"


def newer() -> Iterator[str]:
    """Yield a line for each value that botocore knows, and the table has not seen."""
    session = botocore.session.get_session()
    model = session.get_service_model("sagemaker")
    platforms = model.shape_for("PlatformIdentifier").metadata["pattern"].strip("()").split("|")
    families = {
        each.partition(".")[0]
        for each in session.get_service_model("ec2").shape_for("InstanceType").enum
    }
    known = {
        "notebook platform": (platforms, NOTEBOOK_PLATFORMS),
        "inference image": (
            model.shape_for("ProductionVariantInferenceAmiVersion").enum,
            INFERENCE_IMAGES,
        ),
        "Lambda runtime": (
            [
                each
                for each in session.get_service_model("lambda").shape_for("Runtime").enum
                if each.startswith("python")
            ],
            LAMBDA_PYTHONS,
        ),
        "instance family": (
            [each for each in families if re.match(r"(p|gr?)\d", each)],
            GPU_FAMILIES,
        ),
    }
    for kind, (named, seen) in known.items():
        for each in sorted(set(named) - seen):
            yield f"{kind}: botocore knows {each}; take it, or add it to tests/ends.py"


def ending(today: date, days: int = WARN_DAYS) -> list[str]:
    """Return a line for each thing whose support ends within so many days, the first one first."""
    limit = today + datetime.timedelta(days=days)
    dated = sorted(
        (support.ends, kind, name, support.source)
        for (kind, name), support in TABLE.items()
        if support.ends is not None and support.ends <= limit
    )
    return [f"{kind} {name} ends on {ends}: {source}" for ends, kind, name, source in dated]


def main() -> int:
    """Print the table, and what is to be done; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=WARN_DAYS, help="before the end (60)")
    options = parser.parse_args()
    for (kind, name), support in TABLE.items():
        ends = support.ends or "no date"
        print(f"{ends!s:<11} {kind:<18} {name:<40} {support.note}".rstrip())
    wrong = [*ending(date.today(), options.days), *newer()]
    for line in wrong:
        print(f"to do: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
