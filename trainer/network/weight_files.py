"""Loads files of weights into networks, in the forms that common training scripts write.

The state dict may be wrapped, its names may have prefixes, and its head another shape. No code in a
file is run.
"""

import argparse
import pathlib
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.common import files, model_package
from trainer.common.console import log
from trainer.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

# The keys under which scripts save a state dict: a moving average before the last weights, since
# the average is what was evaluated.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (
    *AVERAGES, "state_dict", "model_state_dict", "model", "net", "network", "module",
)  # fmt: skip
# The prefixes that wrappers of networks put before the names of tensors, nested in any order.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder.", "backbone.")
# The auxiliary classifiers of torchvision's inception_v3 and googlenet.
AUXILIARY = ("AuxLogits", "aux1", "aux2")
# DenseNet's names from before 2017, in the files that torchvision still publishes.
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")
# The names of an EfficientNet's layers in the package efficientnet_pytorch, and timm's names for
# them; in a block with and without an expansion. The EfficientNet-Lites have the package's names
# too.
STEM_AND_HEAD = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
    "_fc": "classifier",
}  # fmt: skip
EXPANDED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
NOT_EXPANDED = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2",
}  # fmt: skip
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def state_dict(name: str, weights: str) -> State:
    """Return the tensors of a file of weights of the model `name`, or of one of our packages.

    Raise Unreadable, and UserError for a file that holds something else.
    """
    # imported here: the settings are checked before PyTorch is loaded.
    from safetensors import SafetensorError
    from safetensors.torch import load

    allowed = (
        f"allowed: a state dict for {name}, "
        "saved by torch.save(model.state_dict(), FILE) or as safetensors"
    )
    if model_package.is_package(weights):
        state: Any = model_package.network(weights, load(model_package.tensors(weights)))
    else:
        path = pathlib.Path(weights)
        if not files.patiently(path, path.is_file):
            raise UserError(f"model.weights={weights}: there is no such file")
        data = files.patiently(path, path.read_bytes)
        if data.startswith(b"version https://git-lfs"):
            raise UserError(
                f"model.weights={weights} is git's pointer to the weights, not the weights; "
                "fetch them with git lfs pull"
            )
        try:
            state = load(data) if _is_safetensors(path, data) else _unpickled(weights, data)
        except SafetensorError as error:
            raise UserError(f"model.weights={weights} is damaged ({error}); {allowed}") from error
        except UserError as error:
            raise UserError(f"{error}; {allowed}") from error
    found = next(_state_dicts(state), None)
    if found is None:
        raise UserError(
            f"model.weights={weights} holds no state dict; "
            "allowed: names with tensors, as model.state_dict() gives them"
        )
    wrapper, tensors = found
    if wrapper in AVERAGES:
        log.info("model.weights=%s: using its moving average, %s", weights, wrapper)
    return tensors


def _is_safetensors(path: pathlib.Path, data: bytes) -> bool:
    """Return whether the bytes are a safetensors file: the length of its JSON, then the JSON."""
    return path.suffix == ".safetensors" or (
        data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data)
    )


def _unpickled(weights: str, data: bytes) -> Any:
    """Return what torch.save wrote. Raise UserError where loading it would run code."""
    # imported here: as above.
    import torch

    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage has its own exception class
        reason = str(error)
        code = re.search(r"GLOBAL (\S+) was not an allowed global", reason)
        if code:
            raise UserError(
                f"model.weights={weights} holds more than tensors ({code[1]}); it is refused, "
                "since loading it would run code"
            ) from error
        if "TorchScript" in reason:
            raise UserError(
                f"model.weights={weights} holds a program (TorchScript); it is refused, since "
                "loading it would run code"
            ) from error
        raise UserError(
            f"model.weights={weights} is damaged, or holds more than tensors; it is refused, "
            "since loading it could run code"
        ) from error


def _harmless() -> list[Any]:
    """Return the classes that training scripts save besides tensors, and that run no code.

    Command-line arguments, paths, and NumPy's numbers.
    """
    numbers = [value for value in vars(np.dtypes).values() if isinstance(value, type)]
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, pathlib.PurePosixPath,
        np.dtype, (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"), *numbers,
    ]  # fmt: skip


def _state_dicts(node: Any, wrapper: str = "") -> Iterator[tuple[str, State]]:
    """Yield the state dicts in what a script has saved, the likeliest first, with the outer key.

    They may lie at any depth, as in {"ema": {"module": names with tensors}}.
    """
    # imported here: as above.
    import torch

    if not isinstance(node, Mapping) or not node:
        return
    if all(map(torch.is_tensor, node.values())) and all(isinstance(key, str) for key in node):
        yield wrapper, dict(node)
        return
    for key in WRAPPERS:
        yield from _state_dicts(node.get(key), wrapper or key)


def head_of(name: str, weights: str) -> State:
    """Return the tensors of the head of one of our packages. Raise as `state_dict`."""
    return {
        key.removeprefix("head."): value
        for key, value in state_dict(name, weights).items()
        if key.startswith("head.")
    }


# --- into a network ---


def fill(
    network: "nn.Module",
    state: State,
    weights: str,
    heads: Sequence[str] = (),
    adapt: Callable[[State], State] | None = None,
) -> None:
    """Load a state dict into a network, all but its heads, which have other classes.

    heads: the layers that give logits, where the network or the file has any. adapt: converts
    another form of the state to this network's; it is tried where the state doesn't fit as it is.
    Raise UserError where the state doesn't fit.
    """
    own = network.state_dict()
    of_heads = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    needed = {key: value for key, value in own.items() if key not in of_heads}
    state = _plain_names(needed, state)
    # A head may have several layers in the file, and one here.
    ignored = {head.split(".")[0] for head in heads} | set(AUXILIARY)
    differences = _differences(needed, state, ignored)
    if differences and adapt is not None:
        adapted = _adapted(adapt, state)
        if adapted is not None and not _differences(needed, adapted, ignored):
            state, differences = adapted, ""
    if differences:
        raise UserError(
            f"model.weights={weights} doesn't fit the model: it {differences}; check model.name"
        )
    network.load_state_dict({key: state[key] for key in needed if key in state}, strict=False)


def _plain_names(needed: State, state: State) -> State:
    """Return the state without the prefix that, taken away, makes most names match the needed ones.

    Tensors without the prefix, such as a head beside a backbone, are left out.
    """
    state = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    prefixes = {prefix: None for key in state for prefix in _prefixes(key)}
    best = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in needed))
    plain = {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}
    return _timm_efficientnet(needed, plain)


def _timm_efficientnet(needed: State, state: State) -> State:
    """Return the state of an efficientnet_pytorch file with timm's names, any other as it is.

    That package numbers all blocks in one sequence, timm by stage.
    """
    blocks = list(dict.fromkeys(re.findall(r"^blocks\.\d+\.\d+", "\n".join(needed), re.M)))
    numbers = {key.split(".")[1] for key in state if key.startswith("_blocks.")}
    if not blocks or numbers != set(map(str, range(len(blocks)))):
        return state
    renamed = {}
    for key, value in state.items():
        place, _, layer = key.rpartition(".")[0].rpartition(".")
        names, before = STEM_AND_HEAD, ""
        if place:
            expands = f"{place}._expand_conv.weight" in state
            names = (EXPANDED if expands else NOT_EXPANDED) | SQUEEZE
            before = f"{blocks[int(place.split('.')[1])]}."
        renamed[f"{before}{names.get(layer, layer)}.{key.rpartition('.')[2]}"] = value
    return renamed


def _prefixes(key: str) -> Iterator[str]:
    """Yield the prefixes of a tensor's name that wrappers may have put there: "" first."""
    whole = ""
    yield whole
    while True:
        prefix = next((each for each in PREFIXES if key.startswith(whole + each)), None)
        if prefix is None:
            return
        whole += prefix
        yield whole


def _differences(needed: State, state: State, ignored: set[str]) -> str:
    """Return in words how a state dict doesn't fit the needed one; "" where it fits.

    ignored: modules that may have tensors in the state beyond the needed ones.
    """
    kinds = {
        # Older files have no such counter, and no training here reads it.
        "lacks": [
            key for key in needed if key not in state and not key.endswith("num_batches_tracked")
        ],
        "has tensors that the model lacks:": [
            key for key in state if key not in needed and key.split(".")[0] not in ignored
        ],
        "has in another shape": [
            key for key in needed if key in state and state[key].shape != needed[key].shape
        ],
    }
    for what, names in kinds.items():
        if names:
            return f"{what} {', '.join(names[:3])} ({len(names)} in all)"
    return ""


def _adapted(adapt: Callable[[State], State], state: State) -> State | None:
    """Return the state as the library's function converts it, None where it can't."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the library's warnings about itself
            return adapt(dict(state))
    except Exception as error:  # written for other files, it may fail on this one in any way
        log.debug("not adapted: %s", error)
        return None
