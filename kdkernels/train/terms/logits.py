"""Terms of logits: soft targets and labels of one student in one fused call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...divergences import DKD, BinaryKL, LogitMSE
from ...functional import check_options, kd_loss, kd_loss_with_stats
from ...models.calls import IGNORE_INDEX
from ...sources import Head, Logits
from ..objective import Over, Step, Term, Weight
from ..outputs import detached


class _LogitTerm(Term):
    """A term of logits. Soft targets and labels of the same student are one call, which reads logits once."""

    soft = True

    def __init__(
        self, weight: Weight, student: str, teacher: str, options: Mapping[str, Any], over: Over = "items"
    ) -> None:
        super().__init__(weight, over)
        for name in ("reduction", "soft_weight", "hard_weight"):
            if name in options:
                raise TypeError(f"{name} is no option of a term: its weight is weight=, and it is a mean")
        check_options(dict(options))
        self.student, self.teacher, self.options = student, teacher, dict(options)
        self.binary = isinstance(self.options.get("divergence"), BinaryKL)
        self._all: Tensor | None = None

    @property
    def group(self) -> Any:
        """Terms of the same student and rows; noise on its logits is in no other term."""
        noisy = self.options.get("student_noise") is not None
        return None if noisy else ("logits", self.student, self.over, self.binary)

    @classmethod
    def together(
        cls, step: Step, terms: Mapping[str, Term], weights: Mapping[str, float]
    ) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Soft and hard term in one call; of more than two, the rest alone."""
        soft = [n for n, t in terms.items() if isinstance(t, _LogitTerm) and t.soft]
        hard = [n for n in terms if n not in soft]
        found = {}
        for name in (*soft[1:], *hard[1:], *(() if soft and hard else (*soft[:1], *hard[:1]))):
            term: Any = terms[name]
            loss = term.loss(step, **{"soft_weight" if term.soft else "hard_weight": weights[name]})
            found[name] = (loss, loss.detach() / weights[name])
        if soft and hard:
            first, labels = terms[soft[0]], terms[hard[0]]  # type: Any, Any
            loss, stats = first.loss(step, True, soft_weight=weights[soft[0]], hard_weight=weights[hard[0]])
            labels.see(step.labels)
            found[soft[0]] = (loss, stats.soft)
            found[hard[0]] = (None, stats.hard)
        return found

    def loss(
        self, step: Step, stats: bool = False, soft_weight: float = 0.0, hard_weight: float = 0.0
    ) -> Any:
        """`kd_loss` of a step."""
        student = step[self.student].source
        teacher = detached(step[self.teacher].source if soft_weight else student)
        mask = step.mask
        if self.over != "items":
            given = step.batch.get("attention_mask") if self.over == "tokens" else None
            mask = None if given is None else given.bool()
        leading = _leading(student)
        # Of rows that all count, a batch's part of the mean is that of its samples.
        items = step.total(self.over) if mask is not None else leading.numel() / step.share(self.over)
        labels = None
        if hard_weight or isinstance(self.options.get("divergence"), DKD):
            labels = step.labels
            if mask is None:  # rows labelled -100 count, with a soft term
                if self._all is None or self._all.shape != leading or self._all.device != labels.device:
                    self._all = torch.ones(leading, dtype=torch.bool, device=labels.device)
                mask = self._all
        return (kd_loss_with_stats if stats else kd_loss)(
            student, teacher, labels, soft_weight=soft_weight, hard_weight=hard_weight, mask=mask,
            token_weights=step.batch.get("token_weights"), num_items=items, **self.options,
        )  # fmt: skip

    def check_stored(self, teacher: str, row: Any) -> None:
        """What `kd_loss` says of one row."""
        if self.soft and self.teacher == teacher:
            # Of random numbers and of a device that isn't there nothing is asked.
            options = {**self.options, "backend": "reference", "student_noise": None}
            label = torch.zeros(1, dtype=torch.int64)
            kd_loss(torch.zeros(1, 2), row, label, hard_weight=0.0, **options)


def _leading(source: Any) -> torch.Size:
    """The rows of a source of logits."""
    if isinstance(source, Head):
        source = source.hidden
    return (source.z if isinstance(source, Logits) else source).shape[:-1]


class SoftTargets(_LogitTerm):
    """A divergence between the teacher's and the student's softened predictions: T² · D(p, q).

    Args:
        divergence: As `kd_loss` takes it.
        temperature: T.
        weight: A number, or a function of the `Progress`.
        student: The name of the model whose logits get the gradient.
        teacher: The name of the one that gives the targets; a trained model gives them without gradients.
        over: Its rows: `items` that count, or `tokens`, all that the attention mask has, labelled or not.
        **options: Further options of `kd_loss`, such as `teacher_noise`, `t_squared` or `memory_budget`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    def __init__(
        self,
        divergence: Any = "forward_kl",
        temperature: float = 1.0,
        weight: Weight = 1.0,
        *,
        student: str = "student",
        teacher: str = "teacher",
        over: Over = "items",
        **options: Any,
    ) -> None:
        options |= {"divergence": divergence, "temperature": temperature}
        super().__init__(weight, student, teacher, options, over)


class LogitMatch(SoftTargets):
    """Squared error of logits, ½‖z − v‖² for each row, as `kd.LogitMSE` takes it; other arguments as there.

    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014.
    """

    def __init__(
        self, weight: Weight = 1.0, *, student: str = "student", teacher: str = "teacher", **options: Any
    ) -> None:
        super().__init__(LogitMSE(), 1.0, weight, student=student, teacher=teacher, **options)


class HardLabels(_LogitTerm):
    """Cross-entropy of labels, −log softmax(z)[label], over rows that count; those labelled −100 add 0.

    Raises, when an epoch has ended, ValueError if no row had a label.
    """

    soft = False

    def __init__(self, weight: Weight = 1.0, *, student: str = "student") -> None:
        super().__init__(weight, student, student, {})
        self._seen: Any = None

    def see(self, labels: Tensor) -> None:
        """Notes whether there was a label."""
        if self._seen is True:
            return
        if labels.device.type == "cpu":
            self._seen = bool((labels != IGNORE_INDEX).any())
        else:
            some = (labels != IGNORE_INDEX).any()
            self._seen = some if self._seen is None else self._seen | some

    def loss(
        self, step: Step, stats: bool = False, soft_weight: float = 0.0, hard_weight: float = 0.0
    ) -> Any:
        """Of the labels alone."""
        self.see(step.labels)
        return super().loss(step, stats, soft_weight, hard_weight)

    def check(self) -> None:
        """Raises if no label was seen."""
        if self._seen is not None and not bool(self._seen):
            raise ValueError(
                "a term of labels saw none: every row was labelled -100. Leave the term out for data without"
            )


class MultiLabel(HardLabels):
    """Binary cross-entropy of every label, Σ_c over classes, of labels in [0, 1], floats `[..., C]`.

    With `SoftTargets(kd.BinaryKL())`, a sigmoid for each label, it is one call.
    """

    def __init__(self, weight: Weight = 1.0, *, student: str = "student") -> None:
        super().__init__(weight, student=student)
        self.options, self.binary = {"divergence": BinaryKL()}, True

    def see(self, labels: Tensor) -> None:
        """Labels of every class."""
        if not labels.is_floating_point():
            raise TypeError(
                f"MultiLabel takes labels [..., C] of floats in [0, 1], got {labels.dtype}: use .float()"
            )
        self._seen = True


def accuracy(step: Step, model: str = "student") -> Tensor:
    """A metric: of labelled rows that count, those whose label is the model's most probable class."""
    right = step[model]["logits"].argmax(-1) == step.labels
    labelled = step.labels != IGNORE_INDEX
    labelled = labelled if step.mask is None else labelled & step.mask
    return (right & labelled).sum() / labelled.sum().clamp(min=1)


def churn(step: Step, first: str, second: str) -> Tensor:
    """A metric: of the rows that count, those for which two models' most probable classes differ.

    Source: Anil et al., "Large scale distributed neural network training through online distillation", 2018,
        section 3.5, there of two models that were trained alike.
    """
    differ = step[first]["logits"].argmax(-1) != step[second]["logits"].argmax(-1)
    counts = torch.ones_like(differ) if step.mask is None else step.mask
    return (differ & counts).sum() / counts.sum().clamp(min=1)
