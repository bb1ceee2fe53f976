"""Teachers: called in eval mode and without gradients, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

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
        self.teachers, self.weights = list(teachers), weights

    def answer(self, batch: Batch, ask: Callable[[Teacher, Batch], Outputs]) -> Outputs:
        """Outputs of all as one, each `ask`ed on a batch."""
        return Outputs(logits=Mixture([ask(t, batch).source for t in self.teachers], self.weights))


class Stored:
    """A teacher whose outputs the batch brings: `batch["teacher"]`, a source of logits or named outputs."""

    def __call__(self, batch: Batch) -> Any:
        """What is there."""
        if batch.get("teacher") is None:
            raise ValueError(
                "the objective asks for a teacher, and there is none: pass teacher=, or batches with a "
                "'teacher' entry"
            )
        return batch["teacher"]


def modules_of(teacher: Any) -> list[nn.Module]:
    """The modules a teacher consists of."""
    if isinstance(teacher, Ensemble):
        return [module for each in teacher.teachers for module in modules_of(each)]
    return [teacher] if isinstance(teacher, nn.Module) else []
