"""Teachers: called in eval mode and without gradients, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..cache import TeacherCache
from ..cache.collate import LOOKED_AT
from ..sources import Mixture
from ..sparse import Sampled, TopK
from .outputs import Batch, Outputs

# A module, a function of the batch that gives a source of logits or named outputs, or an `Ensemble` of those.
Teacher = nn.Module | Callable[[Batch], Any]


class Ensemble:
    """Several teachers as one, their predictions averaged as probabilities.

    Args:
        teachers: Modules, or functions of a batch.
        weights: As `kd.Mixture` takes them; None for equal ones.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Any = None) -> None:
        if not teachers:
            raise ValueError("an ensemble must have a teacher, got none")
        if any(isinstance(t, (TeacherCache, Stored)) for t in teachers):
            raise TypeError(
                "an ensemble averages whole distributions, and a TeacherCache has parts of one: build a "
                "cache of the ensemble's own predictions, or name the teachers and give each a term"
            )
        self.teachers, self.weights = list(teachers), weights

    def answer(self, batch: Batch, ask: Callable[[Teacher, Batch], Outputs]) -> Outputs:
        """Outputs of all as one, each `ask`ed on a batch."""
        return Outputs(logits=Mixture([ask(t, batch).source for t in self.teachers], self.weights))


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


def as_teacher(given: Any) -> Any:
    """What trainers are given as a teacher: none, a cache, or a list as what they are."""
    if given is None or isinstance(given, TeacherCache):
        return Stored(given)
    return Ensemble(given) if isinstance(given, (list, tuple)) else given


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


def modules_of(teacher: Any) -> list[nn.Module]:
    """The modules a teacher consists of."""
    if isinstance(teacher, Ensemble):
        return [module for each in teacher.teachers for module in modules_of(each)]
    return [teacher] if isinstance(teacher, nn.Module) else []
