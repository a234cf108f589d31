"""The package's network in PyTorch, for GPU endpoints. It needs all of Packhorse installed: the network is built by `trainer/network/build.py`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.errors import UserError, install_command

if TYPE_CHECKING:
    from serving.package import Network


def open_network(directory: Path, manifest: dict[str, Any], threads: int | None) -> "Network":
    """The network with the package's weights, on the GPU where there is one. threads: of a CPU. Raises UserError where PyTorch is missing."""
    try:
        import torch
        from safetensors.torch import load_file

        from trainer.network import build as model
    except ImportError as error:
        raise UserError(
            f"--backend=torch needs {error.name}: {install_command('serve')}"
        ) from error

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = (
        False  # its 10 bits of mantissa would not reproduce the golden pictures' logits
    )
    config = manifest["config"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The pictures' mean and standard deviation are among the weights.
    network = model.build(
        config["model.name"], len(manifest["classes"]), head_hidden=config.get("model.head_hidden")
    )
    network.load_state_dict(load_file(directory / "model.safetensors"))
    network.eval().to(device)

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = network(torch.from_numpy(pixels).to(device)).cpu().numpy()
            return logits

    return run
