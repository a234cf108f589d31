"""`python -m launch export --to ENGINE`: write the run of `submit` for another engine.

SkyPilot, dstack and AWS Batch rent machines, wait for capacity and replace reclaimed machines, with
the laptop off. This command rents nothing; --upload uploads code and pictures to the bucket.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.exports import ENGINES, hours, written
from launch.planning import means, missing
from launch.submission import upload
from launch.targets.spec import load_target, split_overrides, weights_folder
from launch.verbs.plan import connect, job_parser, planned
from trainer.common.arguments import typed_path
from trainer.common.console import command, log
from trainer.common.errors import OK, UserError
from trainer.common.files import write
from trainer.common.text import dollars


def main(arguments: Sequence[str]) -> int:
    targets, rest = split_overrides(arguments)
    parser = job_parser("export", __doc__)
    parser.add_argument("--to", choices=ENGINES, required=True, help="the engine")
    parser.add_argument(
        "--file", type=typed_path, help="where to write it (default: RUN.ENGINE.yaml, here)"
    )
    parser.add_argument(
        "--upload", action="store_true", help="upload code and pictures, as submit does"
    )
    options = parser.parse_intermixed_args(rest)
    target = load_target(targets)
    aws, offline = connect(target)
    aws, plan, denied = planned(aws, target, options)
    spec = plan.spec
    suffix = "json" if options.to == "batch" else "yaml"
    file: Path = options.file or Path(f"{spec.run}.{options.to}.{suffix}")
    text, start = written(plan, options.to, file)
    for line in means(spec, options.data):
        log.info("means     %s", line)
    lines = [*filter(None, [offline or denied]), *missing(aws, plan, options.data)]
    if options.upload:
        if aws is None or lines:
            raise UserError(f"missing: {lines[0]}")
        upload(aws, plan, options.data, weights_folder(target, spec.overrides, options.data))
    for line in lines:
        log.warning("missing: %s", line)
    write(file, text)
    if plan.ceiling is not None:
        log.info(
            "ceiling   %s for the whole run, by the limit of %.3g h that goes with it",
            dollars(plan.ceiling.dollars),
            hours(plan),
        )
    log.info("wrote %s", file)
    if not options.upload:
        words = [word for word in arguments if word != "--upload"]
        log.info(
            "code and pictures are not uploaded yet:\n  %s",
            command("launch", "export", *words, "--upload"),
        )
    log.info("next:\n  %s", shlex.join(start))
    return OK
