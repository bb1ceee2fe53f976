"""Teachers: called in eval mode and without gradients, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..cache import TeacherCache
from ..cache.batches import Stored
from ..sources import Mixture
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


def as_teacher(given: Any) -> Any:
    """What trainers are given as a teacher: none, a cache, or a list as what they are."""
    if given is None or isinstance(given, TeacherCache):
        return Stored(given)
    return Ensemble(given) if isinstance(given, (list, tuple)) else given


def modules_of(teacher: Any) -> list[nn.Module]:
    """The modules a teacher consists of."""
    if isinstance(teacher, Ensemble):
        return [module for each in teacher.teachers for module in modules_of(each)]
    return [teacher] if isinstance(teacher, nn.Module) else []
