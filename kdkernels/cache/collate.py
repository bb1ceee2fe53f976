"""Batches with their teacher: a collator around another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..sparse import Sampled, TopK
from .errors import CacheError, CacheMiss

if TYPE_CHECKING:
    from .reader import TeacherCache

# Where packed rows are taken apart, by the names that collators and models have for it.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens")
# All that a batch is looked up by.
LOOKED_AT = ("input_ids", "attention_mask", "position_ids", *_BOUNDARIES)
_WORKERS = 256


class TeacherCollator:
    """Makes a batch as another collator does, and looks its teacher up: `batch["teacher"]`.

    What the sequences are is read off the batch: `attention_mask` leaves padding out, on whichever side, and
    packed rows are taken apart at `cu_seq_lens_q` (or `cu_seqlens`), else where `position_ids` start again.
    A row without any of these is one sequence. The teacher is a `kd.TopK` or `kd.Sampled` of `[B, S, k]`; at
    padding ids are −1, weights and `lse` 0. All else that the other collator makes is left as it is.

    It can be pickled, and works in the workers of a DataLoader, whose counts come together in `missed`.
    `TeacherCache.collate` makes one.

    Attributes:
        cache: What is read.
        base_collator: What makes the batch.
        classes: How many the student has, where it has fewer than the manifest's; a trainer sets it. An id
            that the student lacks is an error then.
    """

    classes: int | None = None

    def __init__(
        self,
        cache: TeacherCache,
        base_collator: Any,
        *,
        missing: Literal["error", "live"] = "error",
        inputs: str = "input_ids",
    ) -> None:
        if not callable(base_collator):
            raise CacheError(
                "base_collator must make a batch from a list of features, as transformers' "
                f"default_data_collator, got {type(base_collator).__name__}"
            )
        if missing not in ("error", "live"):
            raise CacheError(f"missing must be 'error' or 'live', got {missing!r}")
        self.cache, self.base_collator = cache, base_collator
        self._live, self._inputs = missing == "live", inputs
        # A place for each worker: none waits for another, and none is lost.
        self._missed = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()

    @property
    def missed(self) -> int:
        """How many batches had no teacher so far, in all workers, because a sequence was missing."""
        return int(self._missed.sum())

    def __call__(self, features: Any) -> Any:
        """A batch with its teacher, or with None where a sequence is missing and the live one is asked."""
        batch = self.base_collator(features)
        try:
            batch["teacher"] = self.teacher(batch)
        except CacheMiss:
            if not self._live:
                raise
            batch["teacher"] = None
            worker = get_worker_info()
            self._missed[0 if worker is None else 1 + worker.id % (_WORKERS - 1)] += 1
        return batch

    def teacher(self, batch: Any) -> TopK | Sampled:
        """Of a batch that is there already, as the collator would add it.

        Raises:
            CacheMiss: A sequence of it isn't in the cache.
            CacheError: Its token ids or what takes them apart have not the shape for it.
        """
        if self._inputs not in batch:
            raise CacheError(
                f"the batch has no {self._inputs!r} to look its teacher up by, it has "
                f"{sorted(map(str, batch))}: name the token ids with inputs="
            )
        ids = torch.as_tensor(batch[self._inputs])
        if ids.dim() != 2:
            raise CacheError(f"{self._inputs} must be [B, S], got {tuple(ids.shape)}")
        flat = ids.reshape(-1)
        spans = [*_spans(batch, ids)]
        if not spans:
            raise CacheError(f"attention_mask leaves nothing of {self._inputs}")
        found = self.cache.lookup_packed([flat[span] for span in spans])
        if self.classes is not None and len(found.ids) and int(found.ids.max()) >= self.classes:
            raise CacheError(
                f"the cache {self.cache.path} keeps the id {int(found.ids.max())}, of "
                f"{self.cache.manifest.vocab_size} classes, and the student has {self.classes}: give it a "
                "head of as many, or build the cache of a teacher of the same vocabulary"
            )
        return _placed(found, torch.cat(spans), ids.shape)


def _spans(batch: Any, ids: Tensor) -> Iterator[Tensor]:
    """Of each sequence, where its tokens are in the flattened batch."""
    mask = _of_tokens(batch, "attention_mask", ids)
    positions = _of_tokens(batch, "position_ids", ids)
    boundaries = next((name for name in _BOUNDARIES if batch.get(name) is not None), None)
    if boundaries is not None:
        ends = torch.as_tensor(batch[boundaries]).reshape(-1).to(torch.int64)
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != ids.numel() or bool((ends.diff() < 0).any()):
            raise CacheError(
                f"{boundaries} must rise from 0 to {ids.numel()}, the number of tokens in the batch, got "
                f"{ends[:8].tolist()}"
            )
        positions = None
    else:
        ends = torch.arange(len(ids) + 1) * ids.shape[1]
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        span = torch.arange(begin, end)
        if mask is not None:
            span = span[mask[begin:end] != 0]
        if positions is not None:
            again = (positions[span].diff() != 1).nonzero()[:, 0] + 1
            yield from (part for part in span.tensor_split(again) if len(part))
        elif len(span):
            yield span


def _of_tokens(batch: Any, name: str, ids: Tensor) -> Tensor | None:
    given = batch.get(name)
    if given is None:
        return None
    x = torch.as_tensor(given)
    if x.shape != ids.shape:
        raise CacheError(f"{name} must be [B, S] = {tuple(ids.shape)} as the token ids, got {tuple(x.shape)}")
    return x.reshape(-1)


def _placed(teacher: TopK | Sampled, at: Tensor, shape: torch.Size) -> TopK | Sampled:
    """Rows at their places in the batch, and nothing at the others."""

    def spread(x: Tensor, nothing: float) -> Tensor:
        y = x.new_full((shape.numel(), *x.shape[1:]), nothing)
        y[at] = x
        return y.view(*shape, *x.shape[1:])

    ids = spread(teacher.ids, -1)
    if isinstance(teacher, Sampled):
        return Sampled(
            ids, spread(teacher.weights, 0), temperature=teacher.temperature, _ordered=teacher._ordered
        )
    lse = {t: spread(x, 0) for t, x in (teacher.lse or {}).items()}
    log_probs = spread(teacher.log_probs, -torch.inf)
    return TopK(ids, log_probs, teacher.tail, lse, _ordered=teacher._ordered)
