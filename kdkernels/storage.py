"""Nested values in a folder: tensors as safetensors, the rest as JSON; reading it runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from .files import replacing, restore

VERSION = 1
_TENSORS, _TREE = "tensors.safetensors", "state.json"


def save(folder: Path, tree: Any) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings, arrays and tensors to a folder, atomically.

    Raises:
        TypeError: Something else is in it, named by where.
    """
    tensors: dict[str, Tensor] = {}
    document = {"version": VERSION, "tree": _packed("", tree, tensors, {})}
    with replacing(folder) as part:
        part.mkdir()
        save_file(tensors, part / _TENSORS)
        (part / _TREE).write_text(json.dumps(document), encoding="utf-8")


def load(folder: Path) -> Any:
    """What `save` wrote.

    Raises:
        FileNotFoundError: Nothing was written there.
        ValueError: It can't be read, or is of another version.
    """
    if not is_saved(folder):
        raise FileNotFoundError(f"{folder} holds nothing that was saved: {_TREE} is missing")
    try:
        document = json.loads((folder / _TREE).read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(f"it is of version {document['version']}, and this reads {VERSION}")
        return _unpacked(document["tree"], load_file(folder / _TENSORS))
    except Exception as error:
        raise ValueError(f"{folder} can't be read: {error}") from error


def is_saved(folder: Path) -> bool:
    """Whether there is something to `load`."""
    return (folder / _TREE).is_file()


def numbered(folder: Path, prefix: str) -> list[Path]:
    """What was saved in a folder under a prefix and a number, the largest number last."""
    for aside in folder.glob(f"{prefix}*.old"):
        restore(aside.with_suffix(""))
    found = [p for p in folder.glob(f"{prefix}*") if p.name[len(prefix) :].isdigit() and is_saved(p)]
    return sorted(found, key=lambda p: int(p.name[len(prefix) :]))


def export(folder: Path, model: nn.Module, state: dict[str, Tensor] | None = None) -> None:
    """Writes a model alone: as its own `save_pretrained` does where it has that, else as safetensors.

    Args:
        folder: Where.
        model: It.
        state: What is written as its state; None for that itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own: Any = getattr(model, "save_pretrained", None)
    if own is not None:
        own(folder, **({} if state is None else {"state_dict": state}))
    elif state is None:
        save_model(model, str(folder / "model.safetensors"))
    else:
        save_file(state, folder / "model.safetensors")


def _packed(where: str, x: Any, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    """As JSON has it: {"dict": pairs}, {"tuple": items}, {"array": its parts}, {"tensor": name}.

    Lists and plain values are themselves. Tensors go aside, one that is there twice once.
    """
    if isinstance(x, dict):
        parts = [(f"{where}.{k}".lstrip("."), k, v) for k, v in x.items()]
        return {"dict": [[_packed(at, y, tensors, known) for y in (k, v)] for at, k, v in parts]}
    if isinstance(x, (tuple, list)):
        items = [_packed(f"{where}.{n}", v, tensors, known) for n, v in enumerate(x)]
        return {"tuple": items} if isinstance(x, tuple) else items
    if isinstance(x, np.ndarray):
        data = torch.from_numpy(np.frombuffer(x.tobytes(), np.uint8).copy())
        return {"array": [x.dtype.str, x.shape, _packed(where, data, tensors, known)["tensor"]]}
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if not isinstance(x, Tensor) or hasattr(x, "full_tensor"):
        raise TypeError(
            f"{where} is a {type(x).__name__}, which can't be saved: dicts, lists, tuples, numbers, strings, "
            "arrays and whole tensors can"
        )
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) if x.numel() else where
    if key not in known:
        kept = x.detach().to("cpu").contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in known or storage.nbytes() != kept.numel() * kept.itemsize:
            kept = kept.clone()
        known[key] = known[storage.data_ptr()] = where
        tensors[where] = kept
    return {"tensor": known[key]}


def _unpacked(x: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, list):
        return [_unpacked(v, tensors) for v in x]
    if not isinstance(x, dict):
        return x
    ((kind, value),) = x.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        dtype, shape, name = value
        return np.frombuffer(tensors[name].numpy().tobytes(), np.dtype(dtype)).reshape(shape)
    if kind == "tuple":
        return tuple(_unpacked(v, tensors) for v in value)
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in value}
