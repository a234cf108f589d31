"""`python -m launch fetch`: a run's model package, report and metrics, copied here and verified."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cloud import s3
from launch.cloud.session import Aws, AwsError
from launch.targets import attempt as notes
from launch.targets.attempt import Phase
from launch.targets.base import of
from launch.verbs.arguments import chosen, run_parser
from launch.verbs.overview import dollars, run_uri
from trainer.common.arguments import typed_path
from trainer.common.console import command, log
from trainer.common.errors import FAULT, OK, UserError
from trainer.common.files import write
from trainer.common.paths import ARCHIVE, RENTED

# What comes of an archive that isn't one, is cut short, or leads out of its folder.
DAMAGED = (tarfile.TarError, EOFError, zlib.error)


def fetch(aws: Aws, run: str, prefix: str, folder: Path) -> list[Path]:
    """Write a run's files below a key into `folder`; return them.

    Files that are already in the folder and equal are not copied. Raise UserError, AwsError.
    """
    objects = s3.listing(aws, prefix)
    if not objects:
        raise UserError(
            f"s3://{aws.bucket}/{prefix} is empty: the run has saved nothing yet; "
            f"{command('launch', 'logs', run)} says how far it is"
        )
    s3.download(aws, objects, folder)
    files = [folder / name for name in objects]
    packed = folder / "output.tar.gz"
    if packed.exists():
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(folder, filter="data")  # refuses names that lead out of it
                files += [folder / name for name in archive.getnames() if (folder / name).is_file()]
        except DAMAGED as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{packed}: the object in S3 is damaged, or no archive of a job ({reason}); "
                "train once more with submit --again"
            ) from error
    return files


def write_cost(aws: Aws, run: str, folder: Path) -> None:
    """Write the run's address and cost beside the fetched files, for `packhorse runs`."""
    told: dict[str, Any] = {"uri": run_uri(aws, run), "dollars": None}
    with contextlib.suppress(AwsError):  # without the permission to ask, the model is there anyway
        states = [(each, of(each).observe(aws, each)) for each in notes.attempts(aws, run)]
        told["dollars"] = dollars(states)
    write(folder / RENTED, json.dumps(told) + "\n")


def verify(package: Path) -> int:
    """Run the package's own self-test; return its exit code."""
    if importlib.util.find_spec("onnxruntime") is None:
        log.warning(
            "%s is what S3 holds, bit for bit; its self-test needs onnxruntime: "
            "pip install onnxruntime",
            package,
        )
        return OK
    return subprocess.run([sys.executable, "-m", "serving", "check", str(package)]).returncode


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("fetch", __doc__, "the newest")
    parser.add_argument(
        "--to", type=typed_path, metavar="DIR", help="the folder to copy to (default runs/RUN)"
    )
    options = parser.parse_intermixed_args(arguments)
    aws, attempt = chosen(options.run)
    prefix = of(attempt).results(aws, attempt)
    state = of(attempt).observe(aws, attempt)
    if state.phase is not Phase.COMPLETE:
        log.warning("%s: copied what it has saved so far", attempt.told(state))
    folder = options.to or Path("runs") / attempt.run
    folder.mkdir(parents=True, exist_ok=True)
    files = fetch(aws, attempt.run, prefix, folder)
    write_cost(aws, attempt.run, folder)
    for path in sorted(files):
        log.info("%10.1f kB  %s", path.stat().st_size / 1e3, path)
    package = folder / ARCHIVE
    if package in files and verify(package) != OK:
        log.error(
            "%s: it does not pass its self-test: do not deploy it; "
            "train once more with submit --again",
            package,
        )
        return FAULT
    return OK
