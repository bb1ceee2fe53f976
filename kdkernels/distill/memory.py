"""What a step takes, by formulas: weights, gradients, the optimizer, and the loss in each way to compute it.

N are the rows of a batch of one process, V and U the classes of student and teachers, d the student's width,
a and b the bytes of their numbers, of weights or of what is computed. An estimate of the largest of a step is
the sum of all parts, though a step doesn't hold all of them at once. What layers keep for backward is not in
it, and the same in every way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..functional import Explanation, explain
from ..sources import Head, Mixture
from ..sparse import TopK

# Tensors in float32 of the size of the logits that an eager KL holds beside those: both log-probabilities,
# their difference, the teacher's probabilities, and the products.
EAGER = 5
# Of a stored class: its id, its log-probability, and both once more as kernels take them.
STORED_BYTES = 2 * (8 + 4)
WAYS = {
    "eager": "eager PyTorch, logits",
    "logits": "kd_loss, logits",
    "heads": "kd_loss, heads",
    "cached": "kd_loss, a head and a cache",
}


@dataclass(frozen=True)
class Side:
    """A model as far as memory goes.

    Attributes:
        parameters: How many numbers it has.
        classes: Of its logits.
        width: Of its hidden states.
        dtype: Of its weights.
        computed: Of its logits, which autocast may make in another.
    """

    parameters: int
    classes: int
    width: int
    dtype: torch.dtype
    computed: torch.dtype


@dataclass(frozen=True)
class Held:
    """What is there whatever the loss.

    Attributes:
        weights: parameters · a.
        gradients: parameters · a.
        optimizer: 2 · parameters · a, AdamW's two moments.
        teachers: Σ parameters · b of the teachers.
    """

    weights: int
    gradients: int
    optimizer: int
    teachers: int

    @property
    def together(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.teachers


def held(student: Side, teachers: list[Side]) -> Held:
    """What models and AdamW hold."""
    own = student.parameters * student.dtype.itemsize
    return Held(own, own, 2 * own, sum(t.parameters * t.dtype.itemsize for t in teachers))


def of_losses(student: Side, teachers: list[Side], rows: int, k: int, probe: Any) -> dict[str, int]:
    """Bytes that each way of `WAYS` takes beside hidden states, weights, and the gradients of both.

    Formulas:
        eager: N · (V · a + Σ U · b) logits, and N · V · 4 · `EAGER`.
        logits: N · (2 · V · a + Σ U · b): logits and the student's gradient.
        heads: n · V · a + m · Σ U · b, of the n ≤ N rows of a chunk, and the m of its part; where a is 2,
            also V · d · 4 in which the head's gradient is summed; and copies of rows: all as `kd.explain`
            counts them.
        cached: the same without teachers, and N · k · `STORED_BYTES`.

    Args:
        student: It.
        teachers: Those that run; of a cache, none.
        rows: N.
        k: Classes that a cache keeps of a row.
        probe: `kd.explain` of sources, as `explained` makes one.
    """
    a, logits = student.computed.itemsize, sum(t.classes * t.computed.itemsize for t in teachers)
    found = {
        "eager": rows * (student.classes * a + logits + EAGER * 4 * student.classes),
        "logits": rows * (2 * student.classes * a + logits),
        "heads": probe(student, teachers, rows).plan.bytes,
    } if teachers else {}  # fmt: skip
    return {**found, "cached": probe(student, [], rows, k).plan.bytes + rows * k * STORED_BYTES}


def explained(
    student: Side, teachers: list[Side], rows: int, k: int = 1, *, device: torch.device, heads: bool = True,
    **options: Any,
) -> Explanation:  # fmt: skip
    """What `kd.explain` says of sources of these sizes, which take no memory: each is one number, expanded.

    Args:
        student: It.
        teachers: Those that run; none for a stored one of `k` classes.
        rows: N.
        k: Classes.
        device: Where.
        heads: Whether sources are heads; else logits.
        **options: Of `kd_loss`.
    """

    def source(side: Side, learns: bool) -> Any:
        own, made = (torch.zeros((), dtype=x, device=device) for x in (side.dtype, side.computed))
        if not heads:
            return made.expand(rows, side.classes).requires_grad_(learns)
        # What layers end with is of the weights' dtype, as a norm's output is.
        hidden, weight = own.expand(rows, side.width), own.expand(side.classes, side.width)
        return Head(hidden.requires_grad_(learns), weight.requires_grad_(learns))

    labels = torch.zeros((), dtype=torch.int64, device=device).expand(rows)
    if teachers:
        made = [source(t, False) for t in teachers]
        teacher: Any = made[0] if len(made) == 1 else Mixture(made)
    else:
        ids = torch.arange(k, device=device).expand(1, k)
        log_probs = torch.full((1, k), -1.0 - k, device=device)
        t = float(options.get("temperature", 1.0))
        lse = {x: torch.zeros(rows, device=device) for x in {1.0, t}}
        teacher = TopK(ids.expand(rows, k), log_probs.expand(rows, k), lse=lse)
    cast = student.computed is not student.dtype
    with torch.autocast(device.type, student.computed if cast else None, enabled=cast):
        return explain(source(student, True), teacher, labels, **{"hard_weight": 0.1, **options})
