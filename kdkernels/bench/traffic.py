"""What this process passes to the collectives of torch.distributed, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

# Which argument a collective takes its input from; newer names of the same stand beside older ones.
_INPUTS = {
    "all_reduce": ("all_reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "all_gather": ("all_gather", 1, "tensor"),
    "all_gather_into_tensor": ("all_gather", 1, "input_tensor"),
    "all_gather_single": ("all_gather", 1, "input"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    "reduce_scatter_single": ("reduce_scatter", 1, "input"),
}


class Collective(NamedTuple):
    """One call: its kind, and the bytes that this process handed in."""

    kind: str
    bytes: int


@contextmanager
def counted() -> Iterator[list[Collective]]:
    """Within it, calls of collectives in Python are added to the list that it gives.

    What C++ does by itself isn't seen, such as the reducer of `DistributedDataParallel`.
    """
    calls: list[Collective] = []
    before = {name: getattr(dist, name) for name in _INPUTS if hasattr(dist, name)}
    inside = False

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        kind, at, named = _INPUTS[name]

        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:  # one name may call another
                return function(*args, **options)
            given = args[at] if len(args) > at else options.get(named)
            if isinstance(given, Tensor):
                calls.append(Collective(kind, given.numel() * given.element_size()))
            inside = True
            try:
                return function(*args, **options)
            finally:
                inside = False

        return call

    for name, function in before.items():
        setattr(dist, name, counting(name, function))
    try:
        yield calls
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
