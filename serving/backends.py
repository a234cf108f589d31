"""The backends that run a package's network, by name: ONNX Runtime on a CPU or GPU, or PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.common.errors import UserError, needed_by

if TYPE_CHECKING:
    import onnxruntime


# The mean features of the classes, for PyTorch; the ONNX network holds them too.
MEANS = "distance.safetensors"
CUDA = "CUDAExecutionProvider"
OWN = "own"  # model.name of a network that the user's own code builds


class NetworkError(ValueError):
    """The package's network can't be opened, or does not fit its manifest."""


class Scores(NamedTuple):
    """The network's outputs for N images."""

    logits: NDArray[np.float32]  # [N, classes]
    # [N], from the nearest class that was trained on; None: an older package has none.
    distance: NDArray[np.float32] | None = None

    def of(self, number: int) -> "Scores":
        """Return the scores of one image."""
        distance = self.distance
        if distance is not None:
            distance = distance[number : number + 1]
        return Scores(self.logits[number : number + 1], distance)

    @staticmethod
    def joined(parts: Sequence["Scores"]) -> "Scores":
        """Return the scores of several images, by one network, together."""
        distances = [part.distance for part in parts if part.distance is not None]
        distance = None
        if distances:
            distance = np.concatenate(distances)
        return Scores(np.concatenate([part.logits for part in parts]), distance)


class Network(Protocol):
    """Turns pixels [N, size, size, 3] into scores. Safe from any thread."""

    def __call__(self, pixels: NDArray[np.uint8], /) -> Scores: ...


def open_onnx(directory: Path, manifest: dict[str, Any], threads: int | None) -> Network:
    """Return the network of a package's directory in ONNX Runtime, on the CPU.

    threads: of one run of the network; None: one per core. Raises NetworkError.
    """
    return _open_onnx(directory, manifest, threads, "CPUExecutionProvider", {})


def open_cuda(directory: Path, manifest: dict[str, Any], threads: int | None) -> Network:
    """Return the same on an NVIDIA GPU. It needs the package onnxruntime-gpu. Raises UserError."""
    # imported here: it is half of the start-up time of a command that needs no network
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries, where pip has installed them
    if CUDA not in onnxruntime.get_available_providers():
        raise UserError(
            "--backend=cuda: this ONNX Runtime has no CUDA: pip install onnxruntime-gpu[cuda,cudnn]"
        )
    # TF32's 10 bits of mantissa would not reproduce the golden images' logits.
    return _open_onnx(directory, manifest, threads, CUDA, {"use_tf32": "0"})


def _open_onnx(
    directory: Path,
    manifest: dict[str, Any],
    threads: int | None,
    provider: str,
    its: dict[str, str],
) -> Network:
    """Return the network by one of ONNX Runtime's providers. its: the provider's options."""
    # imported here: it is half of the start-up time of a command that needs no network
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one per core
    # Threads that spin while they wait take cores from those that decode and answer: that halves
    # the throughput on a shared machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # fatal: ONNX Runtime would also print the errors it raises
    model = directory / "model.onnx"
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=[(provider, its)])
    except Exception as error:  # its exceptions have no other base class
        reason = " ".join(str(error).split())
        raise NetworkError(
            f"{model.name} can't be opened by ONNX Runtime {onnxruntime.__version__} ({reason})"
        ) from error
    _check_shapes(session, manifest["preprocessing"]["size"], len(manifest["classes"]))
    if provider not in session.get_providers():
        raise UserError(f"--backend=cuda: {provider} finds no GPU that it can use on this machine")
    outputs = [name for name in Scores._fields if name in _names(session.get_outputs())]

    def network(pixels: NDArray[np.uint8], /) -> Scores:
        return Scores(*session.run(outputs, {"pixels": pixels}))

    return network


def _names(values: Sequence[Any]) -> list[str]:
    return [value.name for value in values]


def _check_shapes(session: "onnxruntime.InferenceSession", size: int, classes: int) -> None:
    """Raise NetworkError unless inputs and outputs have the right names, types and shapes.

    The first dimension, the batch, is free.
    """
    shapes = [
        (value.name, value.type, value.shape[1:])
        for value in (*session.get_inputs(), *session.get_outputs())
        if isinstance(value.shape[0], str)
    ]
    needed = [("pixels", "tensor(uint8)", [size, size, 3]), ("logits", "tensor(float)", [classes])]
    if "distance" in _names(session.get_outputs()):
        needed.append(("distance", "tensor(float)", []))
    if shapes != needed:
        raise NetworkError(
            f"model.onnx does not fit package.json: it has {shapes}; "
            f"its size and classes need {needed}"
        )


def open_torch(directory: Path, manifest: dict[str, Any], threads: int | None) -> Network:
    """Return the network with the package's weights in PyTorch, on the GPU where there is one.

    It needs all of Packhorse installed. threads: on a CPU. Raises UserError without PyTorch.
    """
    with needed_by("--backend=torch", "serve"):
        # imported here: serving needs PyTorch only for --backend=torch
        import torch
        from safetensors.torch import load_file

        from trainer.network import build as model
        from trainer.network.distance import WithDistance

    if threads is not None:
        torch.set_num_threads(threads)
    # TF32's 10 bits of mantissa would not reproduce the golden images' logits.
    torch.backends.cudnn.allow_tf32 = False
    config = manifest["config"]
    if config["model.name"] == OWN:
        raise UserError(
            "--backend=torch: its network is a file of its author's own (model.code), which isn't "
            "in the package; --backend=cuda runs it on a GPU"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    # The weights include the images' mean and standard deviation.
    module = model.build(
        config["model.name"],
        len(manifest["classes"]),
        head_hidden=config.get("model.head_hidden"),
        size=manifest["preprocessing"]["size"],
    )
    module.averages_flip = config.get("train.tta") == "flip"
    module.load_state_dict(load_file(directory / "model.safetensors"))
    whole: torch.nn.Module = module
    has_distance = MEANS in manifest["files"]
    if has_distance:
        whole = WithDistance(module, load_file(directory / MEANS)["means"])
    whole.eval().to(device)

    def network(pixels: NDArray[np.uint8], /) -> Scores:
        with torch.inference_mode():
            given = whole(torch.from_numpy(pixels).to(device))
        if not has_distance:
            given = (given,)
        return Scores(*(each.cpu().numpy() for each in given))

    return network


BACKENDS = {"onnx": open_onnx, "cuda": open_cuda, "torch": open_torch}
