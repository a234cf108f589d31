"""Checkpoints: a directory per step, complete or absent, verified before it is believed.

A directory holds `tensors.safetensors`, `state.json` (everything that is no tensor), the same of
the best weights so far (`best.safetensors`, `best.json`) and `manifest.json` (size and SHA-256 of
each), written last. It needs no other directory: what damages one checkpoint leaves the others
whole. It is made temporary, flushed to the disk and renamed, so a kill or a power cut at any moment
leaves the checkpoints before it untouched. Nothing in it is a pickle: loading runs no code.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from trainer.common import files
from trainer.common.console import log
from trainer.common.errors import Unreadable, UserError
from trainer.common.model_package import BEST, CHANNELS_LAST, STATE, TENSOR, join

FORMAT = 2  # 1 kept the best weights in a directory of their own, to which all checkpoints referred
# The names that safetensors has for the types of tensors.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Damaged(UserError):
    """A checkpoint whose files are not what was written.

    The message names the file and what is wrong.
    """


class CutOff(Damaged):
    """A checkpoint that lacks a file: a copy of it was stopped half way."""


class OtherFormat(Damaged):
    """A checkpoint that another version has written."""


@dataclass(frozen=True)
class Snapshot:
    """A state as the bytes of its files.

    In memory of its own: training may go on while it is written.
    """

    tree: bytes  # its JSON file
    header: bytes  # of its safetensors file
    data: torch.Tensor  # the rest of it, uint8 on the CPU
    finite: bool  # whether all weights of its network are finite numbers

    def state(self) -> dict[str, Any]:
        """Return a copy of what it was taken of, tensors on the CPU."""
        return _state(self.tree, self.header + self.data.numpy().tobytes())


def snapshot(state: dict[str, Any]) -> Snapshot:
    """Copy `state`: nested dicts and lists of tensors, numbers, strings, booleans and None."""
    return freeze(state)(None)


def freeze(state: dict[str, Any]) -> Callable[[torch.Tensor | None], Snapshot]:
    """Return a function that copies the tensors of `state`; another thread may call it.

    They must stay as they are until it has returned. What is no tensor is copied now. The function
    takes memory to copy into, uint8, where it is large enough (`Snapshot.data` of an earlier one,
    say): fresh memory costs several times the copy.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", "", tensors)
    # What Apple's GPU computes can't be waited for in another thread.
    tensors = {name: each.cpu() if each.is_mps else each for name, each in tensors.items()}
    stream: torch.cuda.Stream | None = None
    if torch.cuda.is_available():
        # Its own: it waits for what is computed until now, and not for the steps after.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def copy(memory: torch.Tensor | None) -> Snapshot:
        forms = ((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        header, places = _layout(tuple(forms))
        size = max((end for _, end in places.values()), default=0)
        if memory is not None and len(memory) >= size:
            data = memory[:size]
        else:
            data = torch.empty(size, dtype=torch.uint8, pin_memory=stream is not None)
        with torch.cuda.stream(stream):
            for name, (start, end) in places.items():
                tensor = tensors[name]
                place = data[start:end].view(tensor.dtype).view(tensor.shape)
                place.copy_(tensor, non_blocking=stream is not None)
        if stream is not None:
            stream.synchronize()
        # A sum is finite where all is: a twelfth of the time of looking at each number.
        finite = all(
            data[slice(*places[name])].view(tensor.dtype).sum().isfinite()
            for name, tensor in tensors.items()
            if name.startswith("network/") and tensor.is_floating_point()
        )
        return Snapshot(json.dumps(tree).encode(), header, data, finite)

    return copy


Form = tuple[str, torch.dtype, torch.Size]  # a tensor's name, type and shape


@lru_cache(maxsize=2)  # of a training: its state, and its best weights
def _layout(tensors: tuple[Form, ...]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a safetensors file's header, and where each tensor's bytes lie behind it.

    The header is its length, then JSON. Written here and not by the library, which copies
    everything once more and holds the interpreter's lock meanwhile.
    """
    places, entries, end = {}, {}, 0
    # The largest elements first, so that each tensor starts at a multiple of its element's size.
    for name, dtype, shape in sorted(tensors, key=lambda form: (-form[1].itemsize, form[0])):
        start, end = end, end + shape.numel() * dtype.itemsize
        places[name] = (start, end)
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def save(root: Path, name: str, state: dict[str, Any]) -> Path:
    """Write a state as root/name, its entry `best` as the best weights.

    See `snapshot` and `write`.
    """
    rest = {key: value for key, value in state.items() if key != "best"}
    best = state.get("best")
    return write(root, name, snapshot(rest), snapshot(best) if best else None)


def write(root: Path, name: str, contents: Snapshot, best: Snapshot | None = None) -> Path:
    """Write a snapshot, and that of the best weights, as root/name.

    Hashing and writing leave the interpreter free for other threads. Where the same is there
    already, it is left alone; anything else of that name, another run's checkpoint say, is
    replaced. What fails once, as a network's disk may, is tried again. Raises OSError (a full disk,
    say) and then leaves nothing behind.
    """
    target = root / name
    parts: dict[str, tuple[bytes | memoryview, ...]] = {}
    for names, part in ((STATE, contents), (BEST, best)):
        if part is not None:
            parts |= {names[0]: (part.tree,), names[1]: (part.header, part.data.numpy().data)}
    listed = {file: _describe(*data) for file, data in parts.items()}
    if _holds(target, listed):
        return target
    manifest = json.dumps({"format": FORMAT, "files": listed}, indent=1).encode()
    parts["manifest.json"] = (manifest,)
    files.persistently(lambda: _replace(target, parts))
    return target


def _replace(target: Path, parts: dict[str, tuple[bytes | memoryview, ...]]) -> None:
    """Write the files of a checkpoint, in the place of what has its name."""
    root = target.parent
    temporary = root / f"{files.TEMPORARY}{target.name}"
    replaced = root / f"{files.TEMPORARY}replaced-{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.remove(temporary)
        temporary.mkdir()
        for file, data in parts.items():
            files.flush(temporary / file, *data)
        files.flush_directory(temporary)
        if os.path.lexists(target):
            files.remove(replaced)
            target.rename(replaced)
        temporary.rename(target)
        files.flush_directory(root)
    except OSError as error:
        error.filename = str(target)
        raise
    finally:
        for left in (temporary, replaced):
            with suppress(OSError):
                files.remove(left)


def load(path: Path) -> dict[str, Any]:
    """Read the state that `save` wrote, tensors on the CPU; `best` may be None. Raises Damaged."""
    contents = _verified(path)
    try:
        best = _state(*(contents[file] for file in BEST)) if BEST[0] in contents else None
        return _state(*(contents[file] for file in STATE)) | {"best": best}
    except (SafetensorError, ValueError, KeyError) as error:
        raise Damaged(f"{path}: its contents can't be read ({error})") from error


def verify(path: Path) -> None:
    """Raise Damaged unless every file of the checkpoint is as it was written."""
    _verified(path)


def steps(root: Path) -> list[Path]:
    """Return the resumable checkpoints below root, oldest first.

    Raise Unreadable: a directory that can't be listed isn't empty (Path.glob takes one without
    permission for that).
    """

    def read() -> list[Path]:
        try:
            return list(root.iterdir())
        except FileNotFoundError:
            return []

    return sorted(path for path in files.patiently(root, read) if path.name.startswith("step-"))


def step_name(step: int, evaluated: bool) -> str:
    """Return the name of the state after `step` steps. Names sort by time.

    evaluated: where an epoch ends there, whether its evaluation is done.
    """
    return f"step-{step:08d}" + ("-evaluated" if evaluated else "")


def newest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest good checkpoint and its state; None where there never was one.

    One that is damaged or can't be read is passed over with a warning. Raises UserError where all
    are: to start from zero would throw work away that a person may still be able to save. Where all
    lack files (the first one, whose copy was cut off), there is nothing to save.
    """
    checkpoints = steps(root)
    passed_over: list[Damaged] = []
    for path in reversed(checkpoints):
        try:
            state = load(path)
        except Damaged as error:
            passed_over.append(error)
            continue
        for reason in passed_over:
            log.warning("%s; going back to the checkpoint before it", reason)
        return path, state
    if all(isinstance(reason, CutOff) for reason in passed_over):
        for reason in passed_over:
            log.warning("%s: it was not copied whole; starting from the beginning", reason)
        return None
    for reason in passed_over:
        if isinstance(reason, OtherFormat):
            raise reason
    raise UserError(
        f"{root}: none of its {len(checkpoints)} checkpoints is whole ({passed_over[0]}); "
        "restore a copy of one, or delete the directory to start from the beginning"
    )


class Cadence:
    """When to save: every so many minutes, and at each epoch's end.

    But never so often that saving takes more than its share of the time.
    """

    def __init__(self, minutes: float, max_cost: float) -> None:
        self._interval, self._max_cost = 60 * minutes, max_cost
        self._saved_at, self._cost = time.monotonic(), 0.0

    def due(self, epoch_ends: bool) -> bool:
        """Return whether to save now.

        What the last save took is what the next one is expected to take.
        """
        elapsed = time.monotonic() - self._saved_at
        return elapsed >= self._cost / self._max_cost and (epoch_ends or elapsed >= self._interval)

    def saved(self, seconds: float) -> None:
        """Note that a state has just been saved. seconds: what that took."""
        self._saved_at, self._cost = time.monotonic(), seconds


def prune(root: Path, keep: int, good: set[str]) -> list[Path]:
    """Delete all but the newest `keep` good checkpoints. Return what went.

    good: names known to be whole, which are not read again; those found whole are added.
    """
    kept: list[Path] = []
    for path in reversed(steps(root)):
        try:
            if path.name not in good:
                verify(path)
                good.add(path.name)
        except Damaged:
            continue
        kept.append(path)
        if len(kept) == keep:
            break
    else:
        return []  # while good ones are few, even a damaged one may be of use to a person
    gone = []
    for path in steps(root):
        if path in kept:
            continue
        # Renamed first, so that a kill half way leaves no half checkpoint under a complete one's
        # name.
        temporary = root / f"{files.TEMPORARY}{path.name}"
        try:
            path.rename(temporary)
            files.remove(temporary)
        except OSError as error:
            log.warning("%s: an old checkpoint that can't be deleted (%s)", path, error.strerror)
            continue
        gone.append(path)
    return gone


def _describe(*parts: bytes | memoryview) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {"size": sum(len(part) for part in parts), "sha256": digest.hexdigest()}


def _manifest(path: Path) -> dict[str, Any]:
    """Return what a checkpoint's manifest says of its files, by their names. Raises Damaged."""
    data = _bytes(path, "manifest.json")
    try:
        manifest = json.loads(data)
        written, listed = manifest["format"], dict(manifest["files"])
        sizes = [entry["size"] for entry in listed.values()]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: manifest.json is damaged") from error
    if written != FORMAT:
        raise OtherFormat(
            f"{path}: another version of Packhorse wrote this checkpoint (format {written}, "
            f"this version reads {FORMAT}); use that version, or start a new run with another "
            "name=..."
        )
    named = set(listed) in (set(STATE), {*STATE, *BEST})
    if not named or not all(isinstance(size, int) for size in sizes):
        raise Damaged(f"{path}: manifest.json is damaged")
    return listed


def _verified(path: Path) -> dict[str, bytes]:
    """Return every file of a checkpoint, as bytes, held against the manifest. Raises Damaged."""
    contents = {}
    for file, written in _manifest(path).items():
        data = _bytes(path, file)
        if _describe(data) != written:
            raise Damaged(
                f"{path}: {file} is damaged ({len(data)} bytes, {written['size']} were written)"
            )
        contents[file] = data
    return contents


def _bytes(path: Path, file: str) -> bytes:
    def read() -> bytes | None:
        try:
            return (path / file).read_bytes()
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            return b""

    try:
        data = files.patiently(path / file, read)
    except Unreadable as error:
        why = getattr(error.__cause__, "strerror", None) or "no memory is left for it"
        raise Damaged(f"{path}: {file} can't be read ({why.lower()})") from error
    if data is None:
        raise CutOff(f"{path}: {file} is missing")
    return data


def _holds(path: Path, listed: dict[str, Any]) -> bool:
    """Return whether a checkpoint has these files, and they are whole."""
    try:
        if _manifest(path) != listed:
            return False
        verify(path)
    except Damaged:
        return False
    return True


def _state(tree: bytes, tensors: bytes) -> dict[str, Any]:
    """Return what a snapshot was taken of."""
    state = join(json.loads(tree), safetensors.load(tensors))
    assert isinstance(state, dict)
    return state


def _split(node: Any, parent: str, key: str | int, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of a nested state into `tensors`; return the rest, JSON that names them.

    node: what `parent` has under `key`; a tensor's name is both. Most of a state needs no name.
    """
    if node is None or isinstance(node, bool | int | float | str):
        assert not (isinstance(node, str) and node.startswith((TENSOR, CHANNELS_LAST))), node
        return node
    name = f"{parent}/{key}" if parent else str(key)
    if isinstance(node, torch.Tensor):
        if (
            node.ndim == 4
            and not node.is_contiguous()
            and node.is_contiguous(memory_format=torch.channels_last)
        ):
            tensors[name] = node.permute(0, 2, 3, 1)
            return CHANNELS_LAST + name
        tensors[name] = node
        return TENSOR + name
    if isinstance(node, dict):
        assert all(isinstance(key, str) for key in node), name
        return {key: _split(value, name, key, tensors) for key, value in node.items()}
    assert isinstance(node, list | tuple), (name, type(node))
    return [_split(value, name, number, tensors) for number, value in enumerate(node)]
