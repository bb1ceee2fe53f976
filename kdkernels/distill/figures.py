"""What a student is measured by on held-out texts: KL to the teacher, cross-entropy, agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..functional import kd_loss
from ..models.calls import IGNORE_INDEX
from ..models.gathering import together
from ..sources import Head, Mixture
from ..sparse import Sampled, TopK
from ..train.objective import Objective, Progress, Step, count
from ..train.outputs import Adaptor, Batch, detached
from ..train.passes import Passes, counts
from ..train.records import Means
from ..train.teachers import as_teacher, modules_of
from ..train.terms import HardLabels, SoftTargets

# Rows whose logits exist together, which are then float32: 128 MB at 128,000 classes.
_ROWS = 256
# Of the student: in nats, in nats, a share of rows.
STUDENT = ("kl", "cross_entropy", "agreement")


class Figures:
    """The figures of a step, all from one pass over its rows.

    `kl` is KL(p‖q) at T = 1, of a cached teacher over what is stored and one class of the rest (of draws at
    the temperature of those); `cross_entropy` is the student's, of the next token, `teacher_cross_entropy`
    the teacher's; `agreement` is the share of rows in which the most probable classes are the same. All are
    means over rows that have a label. A figure that a stored teacher can't give isn't there.

    Args:
        pad_vocab: Whether classes beyond the smaller vocabulary don't count.
    """

    def __init__(self, pad_vocab: bool) -> None:
        self.pad_vocab = pad_vocab
        self._of: Any = lambda: None
        self._found: dict[str, float] = {}

    def metric(self, name: str) -> Callable[[Step], Tensor]:
        """One of them as a function of the step."""
        return lambda step: torch.tensor(self(step)[name])

    @torch.no_grad()
    def __call__(self, step: Step) -> dict[str, float]:
        """By name."""
        if self._of() is not step:
            self._of, self._found = ref(step), self._figures(step)
        return self._found

    def _figures(self, step: Step) -> dict[str, float]:
        student, teacher = step.student.source, detached(step.teacher.source)
        counted = step.labels != IGNORE_INDEX
        rows = counted.nonzero(as_tuple=True)
        total = max(len(rows[0]), 1)
        stored = isinstance(teacher, (TopK, Sampled))
        t = float(teacher.temperature) if isinstance(teacher, Sampled) else 1.0
        padded = self.pad_vocab and not stored
        found = {"kl": float(kd_loss(student, teacher, mask=counted, temperature=t, t_squared=False,
                                     pad_vocab=padded, hard_weight=0.0))}  # fmt: skip
        classes = None
        if padded:
            classes = min(_classes(student), _classes(teacher))
        sums: dict[str, float] = {}

        def add(name: str, x: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + float(x.sum())

        for part in _parts(rows):
            labels = step.labels[part].unsqueeze(-1)
            log_q = _log_probs(student, part, classes)
            add("cross_entropy", -log_q.gather(-1, labels))
            if isinstance(teacher, Sampled):
                continue
            if isinstance(teacher, TopK):
                best = teacher.log_probs[part].argmax(-1, keepdim=True)
                top = teacher.ids[part].gather(-1, best)[..., 0]
            else:
                log_p = _log_probs(teacher, part, classes)
                add("teacher_cross_entropy", -log_p.gather(-1, labels))
                top = log_p.argmax(-1)
            add("agreement", log_q.argmax(-1) == top)
        return found | {name: x / total for name, x in sums.items()}


def _parts(rows: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    for begin in range(0, len(rows[0]), _ROWS):
        yield tuple(index[begin : begin + _ROWS] for index in rows)


def _classes(source: Any) -> int:
    if isinstance(source, Mixture):
        return _classes(source.teachers[0])
    return len(source.weight) if isinstance(source, Head) else source.shape[-1]


def _log_probs(source: Any, rows: Any, classes: int | None) -> Tensor:
    """Of some rows, float32."""
    if isinstance(source, Mixture):
        each = [_log_probs(t, rows, classes) for t in source.teachers]
        given: Any = source.weights or [1.0] * len(each)
        weights = torch.tensor([w / sum(given) for w in given], device=each[0].device)
        return torch.logsumexp(torch.stack(each) + weights.log()[:, None, None], 0)
    z = source[rows].logits() if isinstance(source, Head) else source[rows]
    return z[..., :classes].float().log_softmax(-1)


@torch.no_grad()
def evaluate(
    student: Any, teacher: Any, batches: Iterable[Batch], adaptor: Adaptor, figures: Figures,
    objective: Objective, device: torch.device, processes: int,
) -> dict[str, float]:  # fmt: skip
    """Means over the batches of all processes; `loss`, too, where the objective is of predictions alone.

    Neither model is changed, wrapped or moved, so that it can be done before a fit.

    Args:
        student: It.
        teacher: As `Distiller` takes it.
        batches: Of this process.
        adaptor: How models are called.
        figures: What is measured.
        objective: What is minimised.
        device: Where batches go.
        processes: How many there are.
    """
    terms: dict[str, Any] = dict(objective.terms.items())
    plain = all(isinstance(term, (SoftTargets, HardLabels)) for term in terms.values())
    passes = Passes({"student": student}, {"student": student}, {"teacher": as_teacher(teacher)}, [], adaptor)
    means = Means()
    with passes.open(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        # A teacher in parts is asked by all processes as often.
        for raw, own in together(batches, [student, *modules_of(teacher)]):
            into = means if own else Means()
            given = passes.given([{name: x.to(device) for name, x in raw.items()}])
            (step,) = passes.steps(given, (), Progress(), counts(given, objective.counted))
            n = float(count(step.batch, "items"))
            for name, value in figures(step).items():
                into.add(name, value, n)
            for name, (part, _) in objective.parts(step).items() if plain else ():
                weight = float(count(step.batch, terms[name].over))
                into.add(("loss", name), 0.0 if part is None else float(part), weight)
    row: dict[str, float] = {}
    for name, value in means.over(processes).items():
        key = name if isinstance(name, str) else name[0]
        row[key] = row.get(key, 0.0) + value
    return row
