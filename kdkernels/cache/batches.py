"""A teacher that batches bring, or that they are looked up in: what trainers ask in the place of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..sparse import Sampled, TopK
from .collate import LOOKED_AT
from .reader import TeacherCache

Batch = Mapping[str, Any]


class Stored:
    """A teacher that isn't run: the batch brings its outputs, or they are looked up in a cache.

    `batch["teacher"]` is a source of logits, a stored one, or named outputs. Where there is none, and there
    is a cache, the batch's sequences are looked up there, here and not in a loader's workers.

    Args:
        cache: A `kd.cache.TeacherCache`, or None.

    Attributes:
        collator: What looks a batch up, or None.
    """

    def __init__(self, cache: TeacherCache | None = None) -> None:
        self.collator = None if cache is None else cache.collate(dict)

    def __call__(self, batch: Batch) -> Any:
        """What is there."""
        found = batch.get("teacher")
        if found is None and self.collator is not None:
            found = self.collator.teacher(_here(batch))
        if found is None:
            raise ValueError(
                "the objective asks for a teacher, and there is none: pass teacher=, or batches with a "
                "'teacher' entry"
            )
        if not isinstance(found, (TopK, Sampled)):
            return found
        _check_rows(found, batch)
        device = next((x.device for x in batch.values() if isinstance(x, Tensor)), None)
        return found if device is None else found.to(device)


def _here(batch: Batch) -> Batch:
    """What a batch's sequences are found by, on the CPU, where they are compared."""
    found = {name: batch[name] for name in LOOKED_AT if name in batch}
    if "input_ids" not in found and "inputs" in batch:  # of a model that is no other's
        found["input_ids"] = batch["inputs"]
    if "input_ids" not in found:
        raise ValueError(
            "a batch is looked up in a cache by its 'input_ids', or 'inputs', and has "
            f"{', '.join(map(repr, batch)) or 'nothing'}"
        )
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in found.items()}


def _check_rows(found: TopK | Sampled, batch: Batch) -> None:
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and found.ids.shape[:-1] != ids.shape:
        raise ValueError(
            f"batch['teacher'] has rows {tuple(found.ids.shape[:-1])}, and input_ids are {tuple(ids.shape)}: "
            "what cut the batch left the teacher whole. Pass the cache as teacher= to the trainer, which "
            "looks up what is left, instead of cache.collate"
        )
