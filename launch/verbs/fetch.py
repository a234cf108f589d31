"""`python -m launch fetch`: a run's model package, report and metrics, copied to a local run directory and verified."""

import argparse
import importlib.util
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from launch.cloud import ownership, s3
from launch.cloud.session import Aws
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log
from trainer.common.errors import FAULT, OK, UserError


def fetch(aws: Aws, attempt: Attempt, folder: Path) -> list[Path]:
    """Writes what the run left into `folder`; returns the files. What is there and equal is not copied again. Raises UserError, AwsError."""
    prefix = f"runs/{attempt.run}/output/"
    if attempt.target != "ec2":
        prefix += f"{_job(aws, attempt)}/output/"  # where SageMaker puts model.tar.gz and output.tar.gz of a job
    objects = s3.listing(aws, prefix)
    if not objects:
        raise UserError(
            f"s3://{aws.bucket}/{prefix} is empty: the run has left nothing yet; python -m launch logs {attempt.run} says how far it is"
        )
    s3.download(aws, objects, folder)
    files = [folder / name for name in objects]
    if (packed := folder / "output.tar.gz").exists():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")  # refuses names that lead out of the folder
            files += [folder / name for name in archive.getnames() if (folder / name).is_file()]
    return files


def _job(aws: Aws, attempt: Attempt) -> str:
    """The training job whose results are the run's: of a tuning job the best trial. Raises UserError where there is none."""
    if attempt.target != "tuner":
        return attempt.job
    found = (
        aws.find(
            "sagemaker",
            "DescribeHyperParameterTuningJob",
            ownership.NOT_FOUND,
            HyperParameterTuningJobName=attempt.job,
        )
        or {}
    )
    if "BestTrainingJob" not in found:
        raise UserError(
            f"{attempt.job}: no trial has ended with a result yet; python -m launch status"
        )
    return str(found["BestTrainingJob"]["TrainingJobName"])


def verify(package: Path) -> int:
    """Runs the package's own self-test; returns its exit code."""
    if importlib.util.find_spec("onnxruntime") is None:
        log.warning(
            "%s is what S3 holds, bit for bit; its self-test needs onnxruntime: pip install onnxruntime",
            package,
        )
        return OK
    return subprocess.run([sys.executable, "-m", "serving", "check", str(package)]).returncode


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch fetch", description=__doc__)
    parser.add_argument(
        "run",
        nargs="*",
        help="the run's id, or the overrides it was submitted with; none: the newest",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to; default runs/RUN")
    options = parser.parse_intermixed_args(arguments)
    targets = split_overrides(options.run)[0]
    aws = aws_of(targets)
    overdue.warn(aws, targets)
    attempt = runs.choose(aws, options.run)
    if attempt.target == "notebook":
        raise UserError(
            f"{attempt.run}: a notebook leaves no model; name a run: python -m launch status"
        )
    state = runs.observe(aws, attempt)
    if state.phase is not Phase.COMPLETE:
        log.warning(
            "attempt %d at %s is %s (%s): what it has left so far is copied",
            attempt.number,
            attempt.run,
            state.phase,
            state.detail,
        )
    folder = options.to or Path("runs") / attempt.run
    folder.mkdir(parents=True, exist_ok=True)
    files = fetch(aws, attempt, folder)
    for path in sorted(files):
        log.info("%10.1f kB  %s", path.stat().st_size / 1e3, path)
    package = folder / "model.tar.gz"
    if package in files and verify(package) != OK:
        log.error(
            "%s: it does not pass its self-test: do not deploy it; train once more with submit --again",
            package,
        )
        return FAULT
    return OK
