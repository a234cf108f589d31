"""What SageMaker's toolkit runs in its container: the trainer.

The job's hyperparameters and channels are its overrides. Standard library only until the trainer
starts. On several hosts the toolkit runs it by torchrun, whose environment the trainer reads
itself.
"""

import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # Python put this file's folder there, but its modules are not top-level ones.
    sys.path[0] = str(ROOT)

from launch.cloud import hyperparameters as codec  # noqa: E402
from trainer.common.errors import FAULT, MISTAKE, OK, RESUME, UserError  # noqa: E402

# Channel -> the setting for its folder of images or weights. `training` holds the
# folders train, valid and test.
CHANNELS = {
    "training": "data.root",
    "train": "data.train",
    "valid": "data.valid",
    "val": "data.valid",
    "validation": "data.valid",
    "test": "data.test",
    "weights": "model.weights_dir",
}
INSTALLED = "wheels"  # the channel of wheels: the toolkit has installed from it before this starts
FAILURE_CHARACTERS = 1024  # so many characters of the failure file become the job's FailureReason

# Remedies that the trainer's messages lack, since it knows nothing of jobs. The first match counts;
# \1 is its group.
REMEDIES = {
    r"ModuleNotFoundError: No module named '((?:trainer|serving|launch|conf)\b[\w.]*)'": (
        r"\1 is not in the tarball: name it in launch/cloud/source.py"
    ),
    r"ModuleNotFoundError: No module named '([\w.]+)'": (
        r"add the package that holds \1 to the dependencies in pyproject.toml"
    ),
    r"no space is left": "give the job a larger disk: target.disk_gb=N",
    r"no GPU|no CUDA|CUDA driver": (
        "rent a machine with a GPU (target.instance_type=ml.g4dn.xlarge), or give train.device=cpu"
    ),
    r"URLError|Temporary failure in name resolution|HTTPError": (
        "the job has no network: give model.weights_dir=DIR, a folder of weights that travels there"
    ),
    r"no longer answers|exchange between the processes": (
        "see in the other hosts' logs (python -m launch logs) what ended first"
    ),
}


def main() -> int:
    """Train as the job says; return the exit code."""
    # The toolkit was started with SIGTERM ignored (launch/targets/sagemaker.py): until there is
    # something to save, end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    failure = Path(os.environ.get("SM_OUTPUT_DIR", "/opt/ml/output")) / "failure"
    reasons = LastError()
    logging.getLogger("packhorse").addHandler(reasons)
    try:
        arguments = overrides(os.environ)
    except UserError as mistake:
        print(f"error: {mistake}", flush=True)
        report(failure, str(mistake))
        return MISTAKE
    if int(os.environ.get("RANK", "0")) == 0:
        print("trainer " + " ".join(arguments), flush=True)
    sys.argv = ["trainer", *arguments]
    code: int | str | None = FAULT
    try:
        # imported here: slow, and its failure is a reason to report
        from trainer.__main__ import main as train

        code = train()
    except SystemExit as end:  # of Hydra's function
        code = end.code
    except Exception as error:
        traceback.print_exc()
        report(failure, essence(error))
    if code == RESUME and not reasons.text:
        report(
            failure,
            "stopped as asked; everything is saved: submit again to continue",
        )
    elif code != OK and reasons.text:
        report(failure, reasons.text)
    leave(code)
    return code if isinstance(code, int) else FAULT


def overrides(environment: Mapping[str, str]) -> list[str]:
    """Return the trainer's command line: the hyperparameters, then the job's folders.

    Raise UserError for channels that the trainer can't use.
    """
    config = Path(environment.get("SM_INPUT_CONFIG_DIR", "/opt/ml/input/config"))
    hyperparameters = json.loads((config / "hyperparameters.json").read_text(encoding="utf-8"))
    arguments = codec.decode(hyperparameters)
    channels = json.loads(environment.get("SM_CHANNELS", "[]"))
    channels = [name for name in channels if name != INSTALLED]
    for name in channels:
        directory = Path(environment[f"SM_CHANNEL_{name.upper()}"])
        if name not in CHANNELS:
            raise UserError(
                f"channel {name}: the trainer doesn't use it; allowed: training (holds train, "
                f"valid, test), or {', '.join(list(CHANNELS)[1:])}"
            )
        if not directory.is_dir() or not any(directory.iterdir()):
            raise UserError(
                f"channel {name}: {directory} holds nothing; upload the pictures with "
                "--data DIR, and look at the channel's S3Uri"
            )
        for other in channels:
            if other != name and CHANNELS.get(other) == CHANNELS[name]:
                raise UserError(
                    f"channels {name} and {other}: both would be {CHANNELS[name]}; "
                    "leave one of them out"
                )
        arguments.append(f"{CHANNELS[name]}='{directory}'")
    if "data=folder" in arguments and not set(channels) - {"weights"}:
        raise UserError(
            "data=folder: the job has no channel with pictures; give --data DIR, "
            "which makes the channel training"
        )
    if "_tuning_objective_metric" in hyperparameters:
        # Trials may share one S3 prefix: each needs its own folder in it, or it would continue
        # from another's checkpoint.
        shared = Path(environment.get("PACKHORSE_CHECKPOINTS", "/opt/ml/checkpoints"))
        os.environ["PACKHORSE_CHECKPOINTS"] = str(shared / environment["TRAINING_JOB_NAME"])
    return arguments


def essence(error: Exception) -> str:
    """Return the error, its remedy, and the innermost frames that lead to it.

    The result fits into FailureReason.
    """
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-4:])
    place = "".join(frames).replace(f"{ROOT}/", "")
    return f"{what[:400]}{remedy(what)}\n{place[-(FAILURE_CHARACTERS - 600) :]}"


def remedy(text: str) -> str:
    """Return `; ` and the remedy, or nothing if the text itself has it."""
    for pattern, advice in REMEDIES.items():
        if match := re.search(pattern, text):
            return f"; {match.expand(advice)}"
    return ""


def report(failure: Path, text: str) -> None:
    """Write the failure file, unless another process of this host has.

    The toolkit doesn't change it.
    """
    failure.parent.mkdir(parents=True, exist_ok=True)
    try:
        with failure.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text[:FAILURE_CHARACTERS])
    except FileExistsError:
        pass


def leave(code: int | str | None) -> None:
    """Leave a job of several processes, as the trainer does.

    Do nothing if the trainer was never imported.
    """
    if "trainer.distributed.world" in sys.modules:
        sys.modules["trainer.distributed.world"].current_world().leave(code)


class LastError(logging.Handler):
    """Keeps the trainer's last error message, with the remedy for a job."""

    text = ""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.text = message + remedy(message)


if __name__ == "__main__":
    sys.exit(main())
