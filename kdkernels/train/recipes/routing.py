"""Several teachers, each for its own samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..outputs import Batch, Outputs
from ..teachers import Ensemble, Teacher
from .logits import hinton
from .plan import Plan


class Routed(Ensemble):
    """Teachers of which every sample asks one.

    Args:
        teachers: Modules, or functions of a batch, that give logits of one shape.
        by: The entry of batches, integers `[N]`, that says which; or a function of the batch that gives them.

    Example:
        >>> teacher = Routed([of_code, of_prose], by="domain")
    """

    def __init__(
        self, teachers: Sequence[Teacher], by: str | Callable[[Batch], Tensor] = "teacher_id"
    ) -> None:
        super().__init__(teachers)
        self.by = by

    def answer(self, batch: Batch, ask: Callable[[Teacher, Batch], Outputs]) -> Outputs:
        """Logits of every sample, of its teacher; none is asked of a sample that is another's.

        Raises:
            ValueError: There is no such entry, or no such teacher.
        """
        which = batch.get(self.by) if isinstance(self.by, str) else self.by(batch)
        if not isinstance(which, Tensor) or which.dim() != 1 or which.is_floating_point():
            what = (
                f"{which.dtype} {tuple(which.shape)}" if isinstance(which, Tensor) else type(which).__name__
            )
            raise ValueError(f"batches must say by {self.by!r} which teacher, as integers [N], got {what}")
        order = which.argsort(stable=True)
        counts = [int((which == n).sum()) for n in range(len(self.teachers))]
        if sum(counts) != len(which):
            raise ValueError(
                f"{self.by!r} must be from 0 to {len(self.teachers) - 1}, got {int(which.min())} to "
                f"{int(which.max())}"
            )
        found = []
        for teacher, rows in zip(self.teachers, order.split(counts), strict=True):
            if len(rows):
                own = {n: x[rows] if _has_rows(x, len(which)) else x for n, x in batch.items()}
                found.append(ask(teacher, own)["logits"])
        return Outputs(logits=torch.cat(found)[order.argsort()])


def routed(
    student: Any,
    teachers: Sequence[Teacher],
    *,
    by: str | Callable[[Batch], Tensor] = "teacher_id",
    **options: Any,
) -> Plan:
    """Several teachers, one for each sample: `hinton` of a `Routed`.

    Args:
        student: The model to train.
        teachers: Modules, or functions of a batch.
        by: As `Routed` takes it.
        **options: As of `hinton`.
    """
    return hinton(student, Routed(teachers, by), **options)


def _has_rows(x: Any, rows: int) -> bool:
    return isinstance(x, Tensor) and x.shape[:1] == (rows,)
