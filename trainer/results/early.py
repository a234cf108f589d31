"""Check before training that the run can build its model package.

The untrained network is exported and packaged by the functions that do it at the end, and serving
loads the package. A machine does this once for each network and set of versions. The cache records
it, with the network's graph, so the end needs no second export. Disk space is checked each time.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from trainer.common import files
from trainer.common.console import ProgressBar, log
from trainer.common.errors import MachineFault, UserError
from trainer.common.text import amount
from trainer.images import identity
from trainer.images.decode import Preprocessing
from trainer.images.folder import ImageFolder
from trainer.images.usable import preprocessing
from trainer.network import build
from trainer.network.build import Classifier
from trainer.results import package
from trainer.settings.config import Config
from trainer.training.run import Run
from trainer.training.training import build_network, prepare_machine

DIRECTORY = "exports"  # below platform.cache
# Tolerance for an untrained network. Wide, since its logits may be nearly equal, or huge: the check
# is for an export that fails or computes something else.
TOLERANCE = {"absolute": 1e-5, "relative": 0.1}
COPIES = 4  # copies of the weights while the package is built: two files, and their archive


def network(run: Run, images: ImageFolder) -> Classifier:
    """Build the network of a run, and check that the run can end.

    Raise UserError if the network can't be packaged, or the disk is too small.
    """
    machine = prepare_machine(run.config, run.world)
    with ProgressBar("building the network", 1):
        network = build_network(run, images, machine)
    if run.world.is_main_process:
        check_room(run, network)
        check_package(run, images, network)
    # No exchange between the processes here: an export may take longer than train.timeout_seconds.
    run.world.barrier(run.stop)
    return network


def check_package(run: Run, images: ImageFolder, network: Classifier) -> None:
    """Raise UserError if the network can't be exported, or serving can't load its package.

    Random number generators are left as they were.
    """
    pixels = preprocessing(run.config)
    facts = _facts(network, pixels)
    known = _known(run.config, facts)
    if known.exists():
        return
    with (
        run.stages.of("package"),
        ProgressBar("trying the model package", 1),
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=run.directory) as scratch,
    ):
        _try(network, images.classes, pixels, Path(scratch), _graph(known))
    files.keep(known, facts)


def graph_of(config: Config, network: Classifier) -> Path:
    """Return the file for the network's graph (`results.graph`)."""
    return _graph(_known(config, _facts(network, preprocessing(config))))


def _facts(network: Classifier, pixels: Preprocessing) -> str:
    """Return everything but the weights that a package's success depends on, as JSON."""
    facts = {
        "network": network.name,
        "structure": identity.of_bytes(identity.structure(network).encode()),
        "pixels": pixels.size,
        "versions": package.versions(),
        "built by": build.builder(network),
        "code": [identity.of_file(path) for path in package.sources()],
    }
    return json.dumps(facts, sort_keys=True, indent=1)


def _known(config: Config, facts: str) -> Path:
    """Return the file that records that a network was tried."""
    return Path(config.platform.cache, DIRECTORY, f"{identity.of_bytes(facts.encode())}.json")


def _graph(known: Path) -> Path:
    return known.with_suffix(".graph")


def _try(
    network: Classifier,
    classes: tuple[str, ...],
    pixels: Preprocessing,
    scratch: Path,
    graph: Path,
) -> None:
    side = max(pixels.size, pixels.resize)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = scratch / "noise.png"
    Image.fromarray(noise).save(picture)
    contents = package.Contents(
        classes=classes,
        preprocessing=pixels,
        metrics={},
        config={"model.name": network.name},
        revision=None,
        golden=[str(picture)],
        means=torch.ones(len(classes), network.features_width),
        tolerance=TOLERANCE,
        graph=graph,
    )
    try:
        package.build(network, contents, scratch / "model", archive=False)
    except package.SelfTestFailed as error:
        raise UserError(
            f"model.name={network.name}: {error}; it was tried before training, with the untrained "
            "network; choose another model.name"
        ) from error


def check_room(run: Run, network: Classifier) -> None:
    """Compare the bytes that the run will write with the free ones.

    Raise UserError if they are certainly too few; warn if they may be.
    """
    config, weights = run.config, _bytes(network)
    trained = weights
    if config.model.freeze == "backbone" and config.model.cached_views is not None:
        trained = _bytes(network.head)
    copies = 2  # as it is, and the best
    if config.train.ema_decay is not None:
        copies += 1
    changed = sum(part.nbytes for part in network.parameters() if part.requires_grad)
    # An optimizer keeps up to two numbers for each parameter.
    largest = copies * trained + 2 * changed
    few = {run.checkpoints: copies * trained, run.package.parent: COPIES * weights}
    many = few | {run.checkpoints: (config.checkpoint.keep + 1) * largest}
    words = {run.checkpoints: "checkpoints", run.package.parent: "the model package"}
    disks: dict[int, list[Path]] = {}
    for place in few:
        disks.setdefault(place.stat().st_dev, []).append(place)
    for places in disks.values():
        room = shutil.disk_usage(places[0]).free
        if run.checkpoints in places:  # existing ones are removed
            room += sum(path.stat().st_size for path in run.checkpoints.rglob("*.*"))
        least, most = (sum(needed[place] for place in places) for needed in (few, many))
        if most <= room:
            continue
        what = " and ".join(words[place] for place in places)
        size = amount(least)
        if most > least:
            size += f" to {amount(most)}"
        line = (
            f"{places[0]}: {what} will take {size}, and {amount(room)} are free; "
            "free some, or give platform.runs=DIR on a larger disk"
        )
        if least > room:
            raise MachineFault(line)
        log.warning(line)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
