"""For models and trainers of `transformers`: `head`, `shard`, and `DistillMixin` when it is asked for."""

from __future__ import annotations

from typing import Any

from ..models.heads import head
from ..models.sharding import shard

__all__ = ["DistillMixin", "head", "shard"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """What needs more packages than the rest."""
    if name != "DistillMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import DistillMixin

    return DistillMixin
