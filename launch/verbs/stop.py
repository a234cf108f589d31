"""`python -m launch stop`: ends a run after a checkpoint; the same submit goes on from it."""

import argparse
from collections.abc import Sequence

from launch.cloud import ownership, s3
from launch.cloud.session import Aws
from launch.targets import overdue, runs
from launch.targets.runs import Attempt, Phase, attempt_key
from launch.targets.spec import aws_of, split_overrides
from trainer.common.console import log, python
from trainer.common.errors import OK, UserError


def stop(aws: Aws, attempt: Attempt, at_once: bool) -> None:
    """Asks for the end of an attempt that runs. at_once: on EC2, without a checkpoint. Raises AwsError."""
    state = runs.observe(aws, attempt)
    stop_key = attempt_key(attempt.run, attempt.number, "stop")
    on_its_way = state.phase is Phase.ABSENT and attempt.refused is None and attempt.target == "ec2"
    if on_its_way and runs.now() - attempt.since < runs.YOUNG:
        s3.write(aws, stop_key, b"")
        log.info(
            "attempt %d at %s may be on its way: it is asked to stop, and looks when it has started",
            attempt.number,
            attempt.run,
        )
        return
    if state.phase is not Phase.RUNNING:
        log.info(
            "attempt %d at %s is %s (%s): there is nothing to stop",
            attempt.number,
            attempt.run,
            state.phase,
            state.detail,
        )
        return
    if attempt.target == "ec2" and at_once:
        runs.terminate(aws, attempt, str(state.id))
    elif attempt.target == "ec2":
        s3.write(aws, stop_key, b"")
        log.info(
            "asked %s to stop: it looks once a minute, saves, uploads and terminates; --now does not wait for it",
            state.id,
        )
    elif state.detail in ("Stopping", "Pending"):
        log.info("%s is %s already", attempt.job, state.detail.lower())
    else:
        operation, key = {
            "tuner": ("StopHyperParameterTuningJob", "HyperParameterTuningJobName"),
            "notebook": ("StopNotebookInstance", "NotebookInstanceName"),
        }.get(attempt.target, ("StopTrainingJob", "TrainingJobName"))
        if aws.find("sagemaker", operation, ownership.NOT_FOUND, **{key: attempt.job}) is None:
            raise UserError(
                f"{attempt.job}: SageMaker does not list it yet; start the same command again in a minute"
            )
        log.info(
            "asked SageMaker to stop %s: a training saves and ends within two minutes", attempt.job
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch stop", description=__doc__)
    parser.add_argument(
        "run",
        nargs="*",
        help="the run's id, or the overrides it was submitted with; none: the newest",
    )
    parser.add_argument(
        "--now",
        action="store_true",
        help="on EC2: terminate the machine without waiting for a checkpoint",
    )
    options = parser.parse_intermixed_args(arguments)
    targets = split_overrides(options.run)[0]
    aws = aws_of(targets)
    overdue.warn(aws, targets)
    attempt = runs.choose(aws, options.run)
    stop(aws, attempt, options.now)
    log.info("next:\n  %s -m launch status", python())
    return OK
