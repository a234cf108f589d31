"""What the first run of a process does once for all: imported by the process that others fork from.

PyTorch exports a network, the pages' templates are compiled, and Hydra composes what most runs
begin with.
"""

import gc
from pathlib import Path

import numpy as np

import tests.packages  # noqa: F401 (it lets PyTorch's exporter register operators once)
from tests.composed_once import compose_once
from trainer.common.templates import environment
from trainer.network.build import build
from trainer.results import report
from trainer.results.graph import to_onnx
from trainer.settings import config as settings
from trainer.settings.compose import compose

to_onnx(build("small_cnn", 2).eval(), np.zeros((1, 16, 16, 3), np.uint8), ["logits"])
compose_once()
settings.register()
for options in ([], ["model=small_cnn"], ["platform=local"], ["model=small_cnn", "platform=local"]):
    compose(["data.root=/nowhere", *options])
PAGES = Path(report.__file__).parent
environment(PAGES).filters.update(report.FILTERS)
for page in PAGES.rglob("*.j2"):
    environment(PAGES).get_template(str(page.relative_to(PAGES)))
# A child's garbage collector need not look at what is there already, nor copy its memory so.
gc.collect()
gc.freeze()
