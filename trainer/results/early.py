"""What can be known before hours are paid: whether the run can end with its model package.

The network is exported and packaged before it is trained, by the functions that do it in the end,
and serving loads the package. A machine does that once for each network and set of versions: it is
noted in the cache, with the network's graph, so that the end needs no second export. Whether the
disk is large enough is looked at each time.
"""

import json
import shutil
import tempfile
from contextlib import suppress
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
# Of an untrained network. Wide, since its logits may be all alike, or huge: what is looked for is
# an export that fails or computes something else.
TOLERANCE = {"absolute": 1e-5, "relative": 0.1}
COPIES = 4  # of the weights, while the package is built: two files of them, and their archive


def network(run: Run, images: ImageFolder) -> Classifier:
    """Build the network of a run, and show that the run can end.

    Raise UserError where it can't be packaged, or where the disk is too small for it.
    """
    machine = prepare_machine(run.config, run.world)
    with ProgressBar("building the network", 1):
        network = build_network(run, images, machine)
    if run.world.is_main_process:
        check_room(run, network)
        check_package(run, images, network)
    # Not an exchange, which waits for train.timeout_seconds at most: an export may take longer.
    run.world.barrier(run.stop)
    return network


def check_package(run: Run, images: ImageFolder, network: Classifier) -> None:
    """Raise UserError where the network can't be exported, or serving can't load its package.

    Random numbers stay as they are.
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
    with suppress(OSError):  # it is tried again then
        known.parent.mkdir(parents=True, exist_ok=True)
        files.write(known, facts)


def graph_of(config: Config, network: Classifier) -> Path:
    """Return where the graph of a network that was tried is kept, see `results.graph`."""
    return _graph(_known(config, _facts(network, preprocessing(config))))


def _facts(network: Classifier, pixels: Preprocessing) -> str:
    """Return what a package's success is a function of, but for the weights: JSON."""
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
    """Return where it is noted that a network was tried."""
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
    """Compare the bytes that the run will write with those that are free.

    Raise UserError where they are surely too few; warn where they may be.
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
        if run.checkpoints in places:  # those that are there give way
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
