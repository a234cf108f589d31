"""`python -m trainer.care DIR [key=value ...]`: find problems in a folder of pictures.

These are duplicates, leaks between train, valid and test, doubtful labels, and empty pictures. It
trains nothing and changes nothing; it writes a page, care.html, and a list, care.csv.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from trainer.common import sessions
from trainer.common.console import ProgressBar, loading, log, to_terminal

if __name__ == "__main__":
    sessions.end_when_asked()  # before what takes seconds to import
    with loading():
        import torch  # noqa: F401 (for the bar: the modules below import it)

import numpy as np
from numpy.typing import NDArray

from trainer.common.arguments import typed_path
from trainer.common.command import guarded, leave
from trainer.common.errors import UserError
from trainer.common.interrupt import Stop, on_signals
from trainer.distributed.world import World
from trainer.images import folder
from trainer.images.care import Findings, keep_or_stop
from trainer.images.datasets import find_images
from trainer.images.folder import ImageFolder
from trainer.images.loader import ImageLoader
from trainer.images.usable import preprocessing, report_left_out, usable_images
from trainer.network import features, weights
from trainer.network.build import Classifier
from trainer.network.device import Machine
from trainer.results.care import write_page
from trainer.settings import config as settings
from trainer.settings.compose import explain_settings, resolve
from trainer.settings.words import override
from trainer.training import care, recipe
from trainer.training.run import Run
from trainer.training.training import build_network, make_loader, prepare_machine


def main() -> int:
    """Check the folder on the command line; return the exit code."""
    sessions.end_when_asked(clear=True)
    to_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m trainer.care",
        description="Looks for duplicates, leaks, doubtful labels and pictures that show nothing.",
    )
    parser.add_argument("folder", metavar="DIR", help="holds train, valid and test, as data.root")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as for python -m trainer"
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=typed_path,
        default=Path("care"),
        help="to write to (default care)",
    )
    options = parser.parse_intermixed_args()
    settings.register()
    words = [override("data.root", options.folder), *options.overrides]
    return guarded(lambda: examine(words, options.folder, options.to), log.log, explain_settings)


def examine(overrides: list[str], title: str, target: Path) -> None:
    """Check the images of the settings, and write care.html and care.csv to `target`."""
    resolved = resolve(overrides)
    config = settings.load(resolved.composed)
    for line in resolved.notes:
        log.info(line)
    leaks, config.data.leaks = config.data.leaks, "warn"
    config.data.cache = "packed"  # also cached for the run that may follow
    world = World()
    with on_signals() as stop:
        machine = prepare_machine(config, world)
        images = find_images(config, stop)
        glanced = recipe.glanced(config, machine.device.type)
        with loading("looking at the weights"):
            config = weights.resolve(glanced, images)
        run = Run(config, world, stop, "care", target, target, target)
        images, reader = usable_images(config, images, stop, world)
        target.mkdir(parents=True, exist_ok=True)
        report_left_out(images, target / "quarantine.txt")
        images, findings = care.look(run, images, reader)
        network = _network(run, images, machine, findings)
        if network is not None:
            loader = make_loader(run, images, reader, machine)
            parts = {
                name: partial(_features, network, loader, machine, name, stop)
                for name in images.splits
            }
            care.judge(findings, images, parts, machine.device)
    care.write(findings, target / "care.csv")
    spec, page = preprocessing(config), target / "care.html"
    counts = {name: images.count(name) for name in images.splits}
    with ProgressBar("report", 1):
        write_page(findings, title, counts, page, lambda path: folder.read_prepared(path, spec))
    if not findings.all:
        log.info("no problems found in the pictures")
    log.info("report: %s", page)
    keep_or_stop(images, findings, leaks)


def _network(run: Run, images: ImageFolder, machine: Machine, out: Findings) -> Classifier | None:
    """Return the pretrained network; without one None, and add to `out` what isn't checked."""
    what = "wrong labels and pictures unlike all others"
    if run.config.model.weights is None:
        out.unseen.append(f"{what}, for which a pretrained network is needed (model.weights)")
        return None
    try:
        with ProgressBar("building the network", 1):
            return build_network(run, images, machine)
    except UserError as error:
        out.unseen.append(f"{what}: {error}")
        return None


def _features(
    network: Classifier, loader: ImageLoader, machine: Machine, name: str, stop: Stop
) -> NDArray[np.float32]:
    """Return the features of a split's images in their plain view, float32 [N, width].

    Raise Interrupted when asked to stop.
    """
    loader = dataclasses.replace(loader, batch_size=features.BATCH)
    parts = []
    with ProgressBar(f"features, {name}", loader.folder.count(name)) as bar:
        for batch in loader.eval_batches(name):
            parts.append(features.compute(network, batch, machine))
            bar.advance(len(batch.target))
            stop.check()
    return np.concatenate(parts)


if __name__ == "__main__":
    leave(main(), globals())
