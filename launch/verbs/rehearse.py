"""`python -m launch rehearse`: check the request that would be sent, and run it here.

AWS's own toolkit runs it (launch/local/sagemaker.py).
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cloud import hyperparameters as codec
from launch.cloud import source, wheelhouse
from launch.local.rehearse import faults_of, jobs_of, objective_of, preflight
from launch.local.sagemaker import INSIDE, LocalSageMaker, Outcome, namespaces
from launch.planning import Plan
from launch.planning import prepare as planned
from launch.targets import sagemaker
from launch.targets.spec import load_target, resolved, split_overrides, weights_folder
from trainer.common.arguments import typed_path, whole
from trainer.common.console import command, log
from trainer.common.errors import MISTAKE, OK, RESUME, UserError
from trainer.common.paths import expanded
from trainer.common.sessions import heeded


def main(arguments: Sequence[str]) -> int:
    """Rehearse; return an exit code.

    0: the job would complete; 2: one line says what to change; 75: stopped; the next rehearsal
    continues.
    """
    options = _parse(arguments)
    inside = INSIDE in os.environ
    if not inside and not options.plain:
        _enter_namespaces(arguments)
    plan, folder = prepare(options.overrides, options.data)
    spec, request = plan.spec, plan.requests[0]
    channels = {} if folder is None else {sagemaker.CHANNEL: folder}
    weights = weights_folder(spec.target, spec.overrides, options.data)
    if weights is not None:
        channels[sagemaker.WEIGHTS_CHANNEL] = weights
    if spec.wheels is not None:
        channels[source.WHEELS_CHANNEL] = wheelhouse.KEPT / spec.wheels
    jobs = jobs_of(request, options.trials, spec.region)
    preflight(request, jobs, plan.source, channels, spec.config)
    directory = (options.directory or Path("runs/rehearsed") / spec.run).resolve()
    local = LocalSageMaker(directory, isolated=inside)
    if not inside:
        log.info(
            "without namespaces: the hosts are plain processes, "
            "with SAGEMAKER_BASE_DIR in the place of /opt/ml"
        )
    local.upload(spec.uri("source", f"{spec.source}.tar.gz"), plan.source)
    for signum in heeded():
        signal.signal(signum, local.stop)
    code = OK
    for job in jobs:
        log.info("rehearsing %s: %s", job.name, " ".join(codec.decode(job.hyperparameters)))
        outcome = local.run(job, channels)
        show(outcome, objective_of(request), directory)
        faults = faults_of(job, outcome, channels)
        for fault in faults:
            log.error(fault)
        if outcome.stopped:
            return RESUME
        if faults:
            code = MISTAKE
    if code == OK:
        again = [entry for entry in options.overrides if not entry.startswith("target=")]
        again.insert(0, f"target={spec.target.name}")
        if options.data is not None:
            again += ["--data", str(options.data)]
        log.info("\nthe job would complete; next:\n  %s", command("launch", "plan", *again))
    return code


def _enter_namespaces(arguments: Sequence[str]) -> None:
    """Move this process into namespaces, if the machine has any, so that signals still reach it."""
    flags = namespaces()
    if flags is None:
        return
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {INSIDE: "inside", "PYTHONPATH": path}
    command = ["unshare", *flags, sys.executable, "-m", "launch", "rehearse", *arguments]
    os.execvpe("unshare", command, environment)


def prepare(arguments: Sequence[str], data: Path | None) -> tuple[Plan, Path | None]:
    """Return what `submit` would do, without credentials, and the folder of the images.

    The folder is None if the trainer writes its own pictures. Raise UserError.
    """
    ours, overrides = split_overrides(arguments)
    if not any(override.startswith("target=") for override in ours):
        ours = ["target=sagemaker", *ours]
    target = load_target(ours)
    if not isinstance(target, sagemaker.SageMakerConfig):
        raise UserError(
            f"target={target.name}: only SageMaker's containers are rehearsed; "
            "allowed: sagemaker, sagemaker_multi, tuner"
        )
    plan = planned(None, target, overrides, data)
    if plan.spec.data is None:
        return plan, None
    folder = data or Path(plan.spec.data)
    typed = [override for override in overrides if override.startswith("data.root=")]
    if data is None and typed:
        folder = Path(expanded(resolved(target, overrides).composed.data.root))
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of pictures; give --data DIR")
    return plan, folder


def show(outcome: Outcome, objective: str | None, directory: Path) -> None:
    """Print what SageMaker would show of a job."""
    completed = not outcome.stopped and not any(outcome.codes)
    status = "Stopped" if outcome.stopped else "Failed"
    if completed:
        status = "Completed"
    log.info("\n%-15s %s, after %.1f s", "status", status, outcome.seconds)
    for name, values in outcome.metrics.items():
        count = f"  ({len(values)} values)" if len(values) > 1 else ""
        log.info("%-15s %-12s %g%s", "metric", name, values[-1], count)
    for name, names in outcome.archives.items():
        log.info("%-15s %s", name, ", ".join(names) or "nothing")
    log.info("%-15s %s", "kept in", directory)
    if outcome.failure:
        log.info("%-15s %s", "FailureReason", outcome.failure)
    if completed and objective is not None and objective in outcome.metrics:
        log.info("%-15s %s=%g", "objective", objective, outcome.metrics[objective][-1])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch rehearse",
        description="Runs the request that submit would send, here, in AWS's own training toolkit: "
        "no AWS account, no Docker, no network.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="target=sagemaker, sagemaker_multi or tuner; target.KEY=VALUE; the trainer's settings",
    )
    parser.add_argument(
        "--data",
        type=typed_path,
        metavar="DIR",
        help="the folder of pictures that submit would upload",
    )
    parser.add_argument(
        "--directory",
        type=typed_path,
        metavar="DIR",
        help=(
            "where S3 and /opt/ml lie (runs/rehearsed/RUN); kept, so that a stopped run can "
            "continue"
        ),
    )
    parser.add_argument(
        "--trials",
        type=whole(),
        default=3,
        metavar="N",
        help="target=tuner: how many trials (3)",
    )
    parser.add_argument(
        "--plain", action="store_true", help="without namespaces, as on machines that give none"
    )
    return parser.parse_intermixed_args(list(arguments))
