"""A teacher in a folder: its model and tokenizer, read without running anything that is in there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import heads
from ..sources import Head
from .errors import CacheError

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Of every file of weights, bytes that its fingerprint is of: another checkpoint differs in all of them.
_PIECES, _PIECE = 64, 4096


def check_packages() -> None:
    """Raises where what runs a teacher isn't installed."""
    absent = [name for name in ("transformers", "safetensors") if find_spec(name) is None]
    if absent:
        raise CacheError(f"a teacher is run by {', '.join(absent)}: pip install 'kdkernels[hf]'")


def model_of(folder: Path, device: str, dtype: str) -> Any:
    """The causal language model of a folder, in eval mode and without gradients.

    Its weights are safetensors, and its code is in `transformers`, not in the folder.

    Args:
        folder: As `save_pretrained` writes it.
        device: Of torch, or `auto` for spread over all that there are.
        dtype: One of `DTYPES`, `auto` for the one that it was saved in.

    Raises:
        CacheError: It can't be read so.
    """
    check_packages()
    if dtype not in DTYPES:
        raise CacheError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check(folder)
    from transformers import AutoModelForCausalLM

    place: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True, **place
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CacheError(f"--teacher {folder} can't be loaded: {_line(error)}") from error
    try:
        model = model if place else model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CacheError(f"--device {device} can't be used: {_line(error)}") from error
    return model.eval().requires_grad_(False)


def tokenizer_of(folder: Path, option: str = "--teacher") -> Any:
    """The tokenizer of a folder.

    Raises:
        CacheError: There is none, or it needs code that is in the folder.
    """
    check_packages()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of whatever kind its files are wrong in
        raise CacheError(f"{option} {folder} has no tokenizer that can be loaded: {_line(error)}") from error


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint from another: a hash of its config and of pieces of its weights."""
    state = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        state.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for n in range(_PIECES):
                file.seek(max(size - _PIECE, 0) * n // (_PIECES - 1))
                state.update(file.read(_PIECE))
    return f"pieces-blake2b:{state.hexdigest()}"


@torch.no_grad()
def answers(model: Any, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor | Head]:
    """What a model says after each token of some sequences, run as one batch: a head, or logits `[S, V]`."""
    longest = max(map(len, sequences))
    device = model.get_input_embeddings().weight.device
    ids, mask = (torch.zeros(len(sequences), longest, dtype=torch.int64) for _ in range(2))
    for n, tokens in enumerate(sequences):
        ids[n, : len(tokens)], mask[n, : len(tokens)] = torch.tensor(tokens), 1
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if heads.has_head(model):
        made: Any = heads.outputs(model, batch)["head"]
    else:
        made = model(**batch).logits
    for n, tokens in enumerate(sequences):
        yield made[n, : len(tokens)]


def classes_of(model: Any) -> int:
    """How many a model's logits have."""
    (made,) = answers(model, [[0]])
    return len(made.weight) if isinstance(made, Head) else made.shape[-1]


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CacheError(
            f"--teacher must be a folder that save_pretrained wrote, and {folder} has no config.json; models "
            "are not downloaded"
        )
    if not any(folder.glob("*.safetensors")):
        raise CacheError(
            f"--teacher {folder} has no *.safetensors: other files of weights (.bin, .pt) are pickles, which "
            "run code when they are read. Write it anew with save_pretrained(..., safe_serialization=True)"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CacheError(f"--teacher {folder} has a config.json that can't be read: {error}") from error
    # Of the form owner/name it is a kernel that transformers would download and run.
    for name, value in _entries(config):
        if name.endswith("attn_implementation") and "/" in str(value):
            raise CacheError(
                f"--teacher {folder} asks in its config.json for the code of {value!r}, which is not run: "
                f"remove {name}"
            )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in config.items() if isinstance(config, dict) else ():
        yield name, value
        yield from _entries(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
