"""What the first run of a process does once for all: imported by the process that others fork from.

PyTorch's exporter reads and registers some thousand operators when it is first used.
"""

import numpy as np

from trainer.network.build import build
from trainer.results.graph import to_onnx

to_onnx(build("small_cnn", 2).eval(), np.zeros((1, 16, 16, 3), np.uint8), ["logits"])
