"""Frozen models shared out over processes, each of which reads no more of a file than its own part."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..processes import pause_at_exit

_INDEX, _ALONE = "model.safetensors.index.json", "model.safetensors"


def shard(teacher: nn.Module | str | Path, mesh: Any = None, *, dtype: torch.dtype | None = None) -> Any:
    """A frozen teacher of which each process has a part (FSDP2): none has the whole of it at any time.

    `fully_shard` on every block, on the embedding and on the head, so that a forward pass gathers one of them
    after another. Every process has to call the model as often as the others. A folder is read by parts: a
    process has never more than its own and what is being gathered. A model that is given was whole in each
    process, and no longer is.

    Args:
        teacher: The folder that `save_pretrained` of `transformers` wrote, in safetensors, whose code is the
            library's own; or a model of any kind, which is changed in place.
        mesh: A `DeviceMesh` of one dimension, or of copies by shards; None for all processes.
        dtype: What the weights are read or cast as; None for what they are.

    Returns:
        The model, in eval mode, of which nothing requires a gradient. `kd.hf.head` takes it, and trainers do
        as their teacher.

    Raises:
        ValueError: No process group; a folder of what can't be read by parts (quantised weights, or names
            that aren't the model's).

    Example:
        >>> teacher = kd.hf.shard("teacher", dtype=torch.bfloat16)  # under torchrun
        >>> loss = kd.kd_loss(kd.hf.head(student, **batch), kd.hf.head(teacher, **batch))
    """
    if not distributed.is_initialized():
        raise ValueError(
            "shard needs processes to share a teacher out to: start them by torchrun or accelerate launch, "
            "and call torch.distributed.init_process_group() or make the Accelerator first"
        )
    pause_at_exit()
    if isinstance(teacher, nn.Module):
        return _sharded(teacher if dtype is None else teacher.to(dtype), mesh)
    folder = Path(teacher)
    model = _sharded(_empty(folder, dtype), mesh)
    _fill(model, folder)
    return model


def _sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """In place, frozen."""
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False).eval()
    for block in _parts(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # A root is left whole for its backward pass unless it is told that there is none.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def _parts(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: blocks; the embedding and the head, unless they share their weights."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    found = [block for each in outer for block in each]
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in ("get_input_embeddings", "get_output_embeddings"):
        part = getattr(model, name, lambda: None)()
        if part is not None and all(uses[id(p)] == 1 for p in part.parameters()):
            found.append(part)
    inside = {m for part in found for m in part.modules() if m is not part}
    return [
        part for part in dict.fromkeys(found) if part not in inside and any(True for _ in part.parameters())
    ]


def _empty(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model of a folder without its weights."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    problem = None
    if kind is None:
        problem = f"its config names no class of transformers (architectures: {config.architectures})"
    elif getattr(config, "quantization_config", None) is not None:
        problem = "its weights are quantised"
    elif not any((folder / name).is_file() for name in (_INDEX, _ALONE)):
        problem = f"there is no {_ALONE}"
    if kind is None or problem:
        raise _unreadable(folder, problem)
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    model.tie_weights()
    dtype = dtype or getattr(config, "dtype", None)
    for p in model.parameters() if dtype is not None else ():
        p.data = p.data.to(dtype)
    return model


def _fill(model: nn.Module, folder: Path) -> None:
    """Reads each weight's rows of this process."""
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    def there(name: str) -> Any:
        return safe_open(str(folder / files[name]), framework="pt")

    if (folder / _INDEX).is_file():
        files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(str(folder / _ALONE), framework="pt") as file:
            files = dict.fromkeys(file.keys(), _ALONE)
    names: dict[int, list[str]] = {}
    targets: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, target in targets.items():
        names.setdefault(id(target), []).append(name)
    state: dict[str, Tensor] = {}
    for tied in names.values():
        if not any(name in files for name in tied):
            raise _unreadable(folder, f"it has no {tied[0]}")
        target, name = targets[tied[0]], next(name for name in tied if name in files)
        # A file is opened for each weight: what has been read of it counts as memory until it is closed.
        with there(name) as file:
            rows = file.get_slice(name)
            if tuple(rows.get_shape()) != tuple(target.shape):
                raise _unreadable(folder, f"{name} is {rows.get_shape()} and not {[*target.shape]}")
            if isinstance(target, DTensor):
                mesh, own = target.device_mesh, target.to_local()
                first = mesh.get_local_rank(mesh.ndim - 1) * -(-target.shape[0] // mesh.size(mesh.ndim - 1))
                part = rows[first : first + len(own)] if len(own) else torch.empty(own.shape)
                part = part.to(mesh.device_type, own.dtype, copy=True)
                whole: Tensor = DTensor.from_local(
                    part, mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
                )
                whole = nn.Parameter(whole, requires_grad=False)
            else:
                whole = file.get_tensor(name).to(target.device, target.dtype, copy=True)
        state.update(dict.fromkeys(tied, whole))
    model.load_state_dict(state, assign=True)


def _unreadable(folder: Path, problem: str | None) -> ValueError:
    return ValueError(
        f"{folder} can't be read by parts, since {problem}: load the model with from_pretrained in every "
        "process, and give that to shard"
    )
