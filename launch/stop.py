"""`python -m launch stop`: ends a run after a checkpoint; the same submit goes on from it."""

import argparse
from collections.abc import Sequence

from launch import runs, s3
from launch.aws import Aws
from launch.runs import Attempt, Phase, attempt_key
from launch.spec import aws_of, split_overrides
from trainer.console import log, python
from trainer.errors import OK


def stop(aws: Aws, attempt: Attempt, at_once: bool) -> None:
    """Asks for the end of an attempt that runs. at_once: on EC2, without a checkpoint. Raises AwsError."""
    state = runs.observe(aws, attempt)
    if state.phase is not Phase.RUNNING:
        log.info("attempt %d at %s is %s (%s): there is nothing to stop", attempt.number, attempt.run, state.phase, state.detail)
        return
    if attempt.target == "ec2" and at_once:
        aws.call("ec2", "TerminateInstances", InstanceIds=[state.id])
        log.info("terminating %s; what it did since its last checkpoint is lost", state.id)
    elif attempt.target == "ec2":
        s3.write(aws, attempt_key(attempt.run, attempt.number, "stop"), b"")
        log.info("asked %s to stop: it looks once a minute, saves, uploads and terminates; --now does not wait for it", state.id)
    elif state.detail in ("Stopping", "Pending"):
        log.info("%s is %s already", attempt.job, state.detail.lower())
    else:
        operation, key = {
            "tuner": ("StopHyperParameterTuningJob", "HyperParameterTuningJobName"),
            "notebook": ("StopNotebookInstance", "NotebookInstanceName"),
        }.get(attempt.target, ("StopTrainingJob", "TrainingJobName"))
        aws.call("sagemaker", operation, **{key: attempt.job})
        log.info("asked SageMaker to stop %s: a training saves and ends within two minutes", attempt.job)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch stop", description=__doc__)
    parser.add_argument("run", nargs="*", help="the run's id, or the overrides it was submitted with; none: the newest")
    parser.add_argument("--now", action="store_true", help="on EC2: terminate the machine without waiting for a checkpoint")
    options = parser.parse_intermixed_args(arguments)
    aws = aws_of(split_overrides(options.run)[0])
    attempt = runs.choose(aws, options.run)
    stop(aws, attempt, options.now)
    log.info("next:\n  %s -m launch status", python())
    return OK
