"""Checkpoints: tensors in safetensors, the rest in JSON, a folder that is there whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VERSION = 1
_TENSORS, _STATE = "tensors.safetensors", "state.json"


def save(folder: Path, tree: Any) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings and tensors to a folder, atomically.

    Raises:
        TypeError: Something else is in it, named by where.
    """
    tensors: dict[str, Tensor] = {}
    known: dict[Any, str] = {}
    document = {"version": VERSION, "tree": _packed("", tree, tensors, known)}
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / _TENSORS)
    (partial / _STATE).write_text(json.dumps(document), encoding="utf-8")
    for path in (partial / _TENSORS, partial / _STATE, partial):
        _to_disk(path)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Any:
    """What `save` wrote; runs nothing that is in the files.

    Raises:
        FileNotFoundError: There is no checkpoint there.
        ValueError: It is not one, or of another version.
    """
    if not (folder / _STATE).is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint: {_STATE} is missing")
    try:
        document = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(f"it is of version {document['version']}, and this reads {VERSION}")
        tensors = load_file(folder / _TENSORS)
        return _unpacked(document["tree"], tensors)
    except Exception as error:
        raise ValueError(f"{folder} is not a checkpoint that can be read: {error}") from error


def steps(root: Path) -> list[Path]:
    """Checkpoints in a folder of them, the newest last."""
    for aside in root.glob("step-*.old"):  # where a process ended between the two renames of `save`
        if not aside.with_suffix("").exists():
            aside.rename(aside.with_suffix(""))
    found = [p for p in root.glob("step-*") if p.name[5:].isdigit() and (p / _STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def random_state() -> dict[str, Any]:
    """Of Python's, NumPy's and torch's global generators."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(), "cuda": cuda,
    }  # fmt: skip


def set_random_state(state: dict[str, Any]) -> None:
    """Puts them back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _packed(where: str, x: Any, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    """As JSON has it: {"dict": pairs}, {"tuple": items}, {"tensor": name}, lists and plain values.

    Tensors go aside, one that is there twice once, and have memory of their own.
    """
    if isinstance(x, dict):
        pairs = [[k, _packed(f"{where}.{k}".lstrip("."), v, tensors, known)] for k, v in x.items()]
        return {"dict": pairs}
    if isinstance(x, (tuple, list)):
        items = [_packed(f"{where}.{n}", v, tensors, known) for n, v in enumerate(x)]
        return {"tuple": items} if isinstance(x, tuple) else items
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if not isinstance(x, Tensor) or hasattr(x, "full_tensor"):
        raise TypeError(
            f"{where} is a {type(x).__name__}, which a checkpoint can't hold: it holds dicts, lists, tuples, "
            "numbers, strings and whole tensors"
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
    return (
        tuple(_unpacked(v, tensors) for v in value)
        if kind == "tuple"
        else {k: _unpacked(v, tensors) for k, v in value}
    )


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
