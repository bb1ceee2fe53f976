"""What a trainer can know of a cached teacher before the first batch: whether the terms can do with it.

It needs Accelerate, which the store alone does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn

from ..models.calls import unwrap, without_adapters
from .collate import TeacherCollator


def collator_of(loader: Any) -> TeacherCollator | None:
    """The one that looks teachers up for a loader, or that is in a collator, if there is one."""
    found = getattr(loader, "collate_fn", loader)
    while not isinstance(found, TeacherCollator):
        # As `transformers` wraps one that it takes columns from.
        found = getattr(found, "data_collator", None)
        if found is None:
            return None
    return found


def check_loader(loader: Any) -> Any:
    """The loader, unless it would cut a batch up, and leave the stored teacher in it whole."""
    if not isinstance(loader, DataLoaderDispatcher) or loader.state.num_processes == 1:
        return loader
    if collator_of(loader.base_dataloader) is not None:
        raise ValueError(
            "Accelerate reads these batches in one process and cuts them up for the others, as it does of a "
            "stream, and can't cut a stored teacher: pass the cache as teacher= to the trainer instead of "
            "cache.collate, or dispatch_batches=False (accelerator_config={'dispatch_batches': False}), with "
            "which every process reads its own"
        )
    return loader


def check_cached(
    collator: TeacherCollator, name: str, terms: Iterable[tuple[str, Any]], models: Iterable[nn.Module]
) -> None:
    """Raises where a term, or a student, can't do with a cache; has class ids that a student lacks refused.

    Args:
        collator: What looks the teacher up.
        name: The teacher's.
        terms: By their names.
        models: Those that are trained.
    """
    cache = collator.cache
    declared = ", ".join(f"{t:g}" for t in cache.manifest.temperatures)
    for term_name, term in terms:
        try:
            term.check_stored(name, cache.example())
        except ValueError as error:
            raise ValueError(
                f"term {term_name!r} can't have {name!r} from the cache {cache.path}, which is of kind "
                f"{cache.manifest.kind!r} at the temperatures {declared}: {error}"
            ) from error
    for model in models:
        if getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(unwrap(model)).__name__} predicts one sequence from another, and the cache "
                f"{cache.path} is of sequences that stand alone: pass the model itself as teacher="
            )
    sizes = [n for n in map(_classes, models) if n is not None]
    # Of a teacher that is padded to more classes, none that the student lacks may be among the stored ones.
    collator.classes = min(sizes) if sizes and min(sizes) < cache.manifest.vocab_size else None


def _classes(model: nn.Module) -> int | None:
    """Of a language model's logits."""
    base: Any = without_adapters(unwrap(model))
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return len(weight)
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None
