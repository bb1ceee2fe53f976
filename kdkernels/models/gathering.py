"""What `fully_shard` has shared out over processes, whole: a head for its loss, states for a file."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from ..processes import pause_at_exit


def is_sharded(x: Any) -> bool:
    """Whether a tensor is one of parts in several processes (a DTensor), or any parameter of a module is."""
    if isinstance(x, nn.Module):
        return any(is_sharded(p) for p in x.parameters()) or any(map(_is_of_fsdp, x.modules()))
    return hasattr(x, "full_tensor")


def _is_of_fsdp(module: Any) -> bool:
    # Imported by whoever has sharded a model: it takes most of a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def owner_of(model: nn.Module, module: nn.Module) -> Any:
    """The part of a model that `fully_shard` was called on and that a module's own weights are gathered with.

    Args:
        model: It.
        module: One of its modules.

    Returns:
        The module itself or the innermost one around it; None where nothing around it is sharded.
    """
    inside = next((name for name, part in model.named_modules(remove_duplicate=False) if part is module), "")
    names = inside.split(".")
    around = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
    return next((part for part in around if _is_of_fsdp(part)), None)


def is_of_data_parallel(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module's weight, which is sharded, is whole once FSDP has gathered it.

    FSDP's dimension of the mesh comes first, after one of copies at most: if there is another after it, what
    FSDP gathers is a shard of tensor parallelism still.
    """
    weight: Any = module.weight
    *before, last = weight.placements
    rows = bool(last.is_shard()) and all(placement.is_replicate() for placement in before)
    return rows and owner_of(model, module) is not None


class Lending:
    """A head's weights, which FSDP has gathered for a forward pass, kept for the loss that is made after it.

    With gradients they stay until the backward pass, where FSDP reduces theirs. Without, they are given back
    when nobody has them any more, or else before the model's next pass, so that all processes gather alike.

    Args:
        model: The model.
        owner: What its head's weights are gathered with.
    """

    def __init__(self, model: nn.Module, owner: Any) -> None:
        # Not held, since the model holds this.
        self.owner, self.passes, self.is_lent = weakref.ref(owner), 0, False
        self.model, self.was_whole, self.alone = weakref.ref(model), False, sys.maxsize
        # Before FSDP's own, which would find the weights there and not gather them.
        model.register_forward_pre_hook(self._begin, prepend=True)

    def _begin(self, *_: Any) -> None:
        self.passes += 1
        self.take_back()

    def keep(self, head: nn.Module) -> None:
        """Before a pass: FSDP is told to leave the weights whole after it."""
        self.take_back()
        owner: Any = self.owner()
        owner.set_reshard_after_forward(False, recurse=False)
        self.was_whole = not is_sharded(head.weight)

    def lend(self, weight: Tensor) -> Tensor:
        """After a pass without gradients: the weight for a head, which gives it back in the end."""
        if self.was_whole:  # for an earlier pass, which may have gradients
            return weight
        self.is_lent, weight = True, weight.detach()  # a tensor of its own, whose end can be seen
        held = weight.untyped_storage()
        # Of FSDP and of this one tensor, if ever there was no other head.
        self.alone = min(self.alone, _users(held))
        weakref.finalize(weight, _ended, weakref.ref(self), self.passes, held)
        return weight

    def take_back(self) -> None:
        """Frees the weights if they are lent, and those of the root, which FSDP keeps for a backward pass."""
        if self.is_lent:
            self.is_lent = False
            parts: set[Any] = {self.owner(), self.model()}
            for part in parts:
                if _is_of_fsdp(part):
                    part.reshard()


def _ended(lending: Any, of: int, held: Any) -> None:
    """Takes back what was lent to a pass, unless another has begun or some other tensor is on it still."""
    lending = lending()
    if lending is not None and lending.passes == of and 0 < _users(held) <= lending.alone:
        lending.take_back()


def _users(storage: Any) -> int:
    # Private, and so guarded: without it weights are whole until the next pass.
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 0 if count is None else int(count(storage._cdata))


class Following(torch.autograd.Function):
    """The first arguments, whose gradients come only after those of the last one, which has none.

    FSDP's hooks are on what a model returns: by that way they run before the gradient of anything else does.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor | None) -> Any:
        """The same tensors."""
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.detach() for x in parts[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Those as they are."""
        return *gradients, None


def whole(tree: Any, keep: bool = True) -> Any:
    """Nested values with every sharded tensor whole, on the CPU, one after the other; all processes call it.

    Args:
        tree: States of models and optimizers.
        keep: Whether this process gets them; else it only takes part, and has None in their place.
    """

    def gathered(x: Any) -> Any:
        if not is_sharded(x):
            return x
        full = x.detach().full_tensor()
        return full.cpu() if keep else None

    return pytree.tree_map_only(Tensor, gathered, tree)


def load(part: Any, state: Any) -> None:
    """Loads whole tensors, which every process has, into a model, an optimizer or anything with a state."""
    if isinstance(part, nn.Module):
        targets = part.state_dict()
        state = {name: _shared_out(x, targets.get(name)) for name, x in state.items()}
    part.load_state_dict(state)
    optimizer = getattr(part, "optimizer", part)  # in a wrapper
    for p, its in optimizer.state.items() if isinstance(optimizer, torch.optim.Optimizer) else ():
        for name, x in its.items():
            its[name] = _shared_out(x, p)


def _shared_out(x: Any, like: Any) -> Any:
    """This process's part of a tensor, of what is sharded."""
    if not is_sharded(like) or not isinstance(x, Tensor) or is_sharded(x) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    # Of its own copy each: there is nothing to send.
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def export(folder: Path, model: Any) -> None:
    """As `storage.export`; of a sharded model, which all processes ask for, the first writes it whole."""
    from .. import storage  # which imports what losses alone don't need

    if not is_sharded(model):
        storage.export(folder, model)
        return
    first = distributed.get_rank() == 0
    state = whole(model.state_dict(), first)
    if first:
        storage.export(folder, model, state)
    distributed.barrier()


def place(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device, unless it is spread over several, or sharded over processes."""
    if not is_sharded(model) and not hasattr(model, "hf_device_map"):
        model.to(device)


def prepare(
    accelerator: Any, models: Mapping[str, nn.Module], updates: Iterable[Any]
) -> dict[str, nn.Module]:
    """Models as Accelerate makes them ready, and so the optimizers of updates; a sharded model is ready.

    Raises:
        ValueError: Several models, and Accelerate is to shard them.
    """
    if accelerator.num_processes > 1:
        pause_at_exit()
    kind = accelerator.distributed_type.value
    if len(models) > 1 and kind in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            f"{kind} by Accelerate trains one model, not {', '.join(models)}: use DDP, or call fully_shard "
            "on each, and leave it out of Accelerate's configuration"
        )
    given = {name: model for name, model in models.items() if kind == "FSDP" or not is_sharded(model)}
    ready = accelerator.prepare(*given.values(), *(o for update in updates for o in update.optimizer))
    each = iter(ready if isinstance(ready, (tuple, list)) else (ready,))
    made = {**models, **{name: next(each) for name in given}}
    for update in updates:
        update.optimizer = [next(each) for _ in update.optimizer]
    return made


def together(loader: Iterable[Any], models: Iterable[nn.Module]) -> Iterator[tuple[Any, bool]]:
    """Batches, and whether each counts.

    A pass of a sharded model is one of all processes: where there is one, a process whose batches have come
    to an end goes on with its last one, or, if it had none, with another's, until all have.
    """
    if not (distributed.is_initialized() and any(map(is_sharded, models))):
        yield from ((batch, True) for batch in loader)
        return
    batches, last = iter(loader), None
    while True:
        batch = next(batches, None)
        own: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(own, (batch is not None, last is not None))
        if not any(has for has, _ in own):
            return
        if any(not has and not had for has, had in own):
            source = next(rank for rank, (has, _) in enumerate(own) if has)
            shared = [batch if distributed.get_rank() == source else None]
            distributed.broadcast_object_list(shared, source)
            last = shared[0]
        last = last if batch is None else batch
        yield last, batch is not None


def check_alike(models: Iterable[Any], but: str) -> None:
    """Refuses sharded models where that is in the way."""
    for model in models:
        if isinstance(model, nn.Module) and is_sharded(model):
            raise ValueError(
                f"{type(model).__name__} is sharded over processes, which run it together, {but}"
            )
